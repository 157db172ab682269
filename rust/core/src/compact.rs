//! Compaction: what died leaves the files, and neighbouring segments become one. Records are copied bit for bit,
//! and no document gets another docno.

use std::path::Path;

use crate::documents::{IdSegment, KeptSegment, KeptWriter, join_ids};
use crate::error::{Error, Result};
use crate::generation::Generation;
use crate::manifest::{Hash, Part, role};
use crate::routes::{RouteSegment, SegmentPlan, SegmentWriter};
use crate::writer::{Base, Session};

/// Where so many docnos in a row have nothing, a new segment begins: it is smaller than a note of each.
pub const MAX_GAP: u64 = 1 << 16;

impl Session {
    /// The number of the generation in force afterwards.
    pub fn compact(&mut self, path: &Path) -> Result<u64> {
        let mut manifest = self.next_manifest();
        if let Base::Existing(base) = &self.base {
            let rewritten = [
                role::SCALES,
                role::ROUTES,
                role::IDS,
                role::DOCUMENTS,
                role::DEAD,
            ];
            manifest
                .parts
                .retain(|p| !rewritten.contains(&p.role.as_str()));
            let mut parts = Vec::new();
            let names = &mut self.staged.names;
            let mut compaction = Compaction {
                base,
                file: &mut |role, end| names.next(role, end),
                parts: &mut parts,
            };
            compaction.routes()?;
            compaction.ids()?;
            compaction.documents()?;
            manifest.parts.extend(parts);
        }
        if manifest.index_generation.is_some() {
            self.index()?.compact()?;
            self.commit_index(&mut manifest)?;
        }
        self.publish(manifest, path)
    }

    /// For what changes the whole store: it goes by what is committed, so nothing else may be under way.
    pub fn expect_nothing_staged(&self, verb: &str) -> Result<()> {
        match (&self.base, self.staged.is_empty()) {
            (Base::Existing(_), true) => Ok(()),
            _ => Err(Error::invalid(format!(
                "{verb}: commit or discard what is staged first"
            ))),
        }
    }
}

struct Compaction<'c> {
    base: &'c Generation,
    file: &'c mut dyn FnMut(&'static str, &str) -> String,
    parts: &'c mut Vec<Part>,
}

impl Compaction<'_> {
    fn routes(&mut self) -> Result<()> {
        let base = self.base;
        let manifest = base.manifest();
        let decoder = manifest.of_role(role::DECODER).next().map(|p| p.blake3.0);
        let listed: Vec<&Part> = manifest.of_role(role::ROUTES).collect();
        // A segment names its scales last; those that none names any more go.
        let scales_of = |part: &&Part| match base.codec.scaled() {
            true => part.parameters.last().copied(),
            false => None,
        };
        let used: Vec<Hash> = listed.iter().filter_map(scales_of).collect();
        let scales = manifest.of_role(role::SCALES);
        self.parts
            .extend(scales.filter(|p| used.contains(&p.blake3)).cloned());

        let segments: Vec<(Option<Hash>, &RouteSegment)> =
            listed.iter().map(scales_of).zip(&base.routes).collect();
        let joined = segments.chunk_by(|(scales, a), (other, b)| {
            scales == other && b.first().saturating_sub(a.end()) <= MAX_GAP
        });
        for group in joined {
            let alive = |docno: u64| base.is_alive(docno);
            let Some((scales, first)) = group.iter().find_map(|(scales, segment)| {
                let docno = segment.docnos().find(|d| alive(*d))?;
                Some((*scales, docno))
            }) else {
                continue;
            };
            let plan = SegmentPlan {
                codec_name: base.spec.codec.to_string(),
                width: base.codec.record_bytes(),
                first,
                decoder,
                scales: scales.map(|hash| hash.0),
            };
            let name = (self.file)(role::ROUTES, "seg");
            let mut writer = SegmentWriter::create(&base.dir, &name, plan)?;
            for (_, segment) in group {
                for docno in segment.docnos().filter(|d| *d >= first && alive(*d)) {
                    if let Some(record) = segment.record(docno)? {
                        writer.skip(docno - writer.end());
                        writer.write(record)?;
                    }
                }
            }
            let mut part = Part::new(role::ROUTES, name, writer.finish()?);
            part.parameters = decoder.map(Hash).into_iter().chain(scales).collect();
            self.parts.push(part);
        }
        Ok(())
    }

    fn ids(&mut self) -> Result<()> {
        let base = self.base;
        for group in base.ids.chunk_by(|a, b| near(a.end(), b.first())) {
            let alive = group
                .iter()
                .any(|segment| segment.docnos().any(|d| base.is_alive(d)));
            if !alive {
                continue;
            }
            let name = (self.file)(role::IDS, "seg");
            let group: Vec<&IdSegment> = group.iter().collect();
            let digest = join_ids(&base.dir, &name, &group, &|docno| base.is_alive(docno))?;
            self.parts.push(Part::new(role::IDS, name, digest));
        }
        Ok(())
    }

    fn documents(&mut self) -> Result<()> {
        let base = self.base;
        for group in base.kept.chunk_by(|a, b| near(a.end(), b.first())) {
            let Some(first) = group.first().map(KeptSegment::first) else {
                continue;
            };
            let name = (self.file)(role::DOCUMENTS, "seg");
            let mut writer = KeptWriter::create(&base.dir, &name, first)?;
            for segment in group {
                writer.copy(segment, &|docno| base.is_alive(docno))?;
            }
            self.parts
                .push(Part::new(role::DOCUMENTS, name, writer.finish()?));
        }
        Ok(())
    }
}

fn near(end: u64, next: u64) -> bool {
    next.saturating_sub(end) <= MAX_GAP
}
