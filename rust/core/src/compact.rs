//! Compaction: what died leaves the files, and neighbouring segments become one. Records are copied bit for bit,
//! and no document gets another docno.
//!
//! A commit does the smaller part of it by itself: where many commits have left many small segments, it joins them.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use crate::bm25::Meanwhile;
use crate::documents::{IdSegment, KeptSegment, KeptWriter, join_ids};
use crate::error::{Error, Result};
use crate::generation::Generation;
use crate::manifest::{Hash, Manifest, Part, role};
use crate::routes::{RouteSegment, SegmentPlan, SegmentWriter};
use crate::staged::Names;
use crate::watch::{Progress, Unit, Watch};
use crate::writer::{Base, Session};

/// Where so many docnos in a row have nothing, a new segment begins: it is smaller than a note of each.
pub const MAX_GAP: u64 = 1 << 16;

/// A commit that finds more segments of a role than this joins the small ones at the end.
const MAX_SEGMENTS: usize = 32;

impl Session {
    /// The number of the generation in force afterwards.
    pub fn compact(&mut self, path: &Path, watch: &Arc<dyn Watch>) -> Result<u64> {
        let mut manifest = self.next_manifest();
        let indexed = manifest.index_generation.map_or(0, |_| manifest.documents);
        let parts = self.base.generation().map_or(0, |base| {
            let each = JOINED.iter().map(|role| to_join(base, role, 0));
            each.fold(0, u64::saturating_add)
        });
        let total = parts.saturating_add(indexed);
        let progress = Progress::begin(watch, Unit::Documents, total)?;
        if let Base::Existing(base) = &self.base {
            let names = &mut self.staged.names;
            let mut joining = Joining {
                base,
                names,
                all: base.dead.docnos().is_empty(),
                keep: &|docno| base.is_alive(docno),
                progress: &progress,
            };
            for role in JOINED {
                joining.join(role, 0, &mut manifest)?;
            }
            manifest.parts.retain(|p| p.role != role::DEAD);
            // A segment names its scales last; those that none names any more go, and repeated ones.
            let mut used: HashSet<Hash> = manifest
                .of_role(role::ROUTES)
                .filter_map(|p| p.parameters.last().copied())
                .collect();
            manifest
                .parts
                .retain(|p| p.role != role::SCALES || used.remove(&p.blake3));
        }
        if manifest.index_generation.is_some() {
            let meanwhile = Meanwhile {
                progress: &progress,
                worth: indexed,
            };
            self.index()?.compact(meanwhile)?;
            self.commit_index(&mut manifest, &progress, 0)?;
        }
        self.publish(manifest, path, &progress)
    }

    /// Joins small segments, so that their number grows with the logarithm of the number of commits.
    pub fn join_small(&mut self, manifest: &mut Manifest, progress: &Progress) -> Result<()> {
        let Base::Existing(base) = &self.base else {
            return Ok(());
        };
        for role in JOINED {
            if let Some(from) = small_tail(manifest, role) {
                let mut joining = Joining {
                    base,
                    names: &mut self.staged.names,
                    all: true,
                    keep: &|_| true,
                    progress,
                };
                joining.join(role, from, manifest)?;
            }
        }
        Ok(())
    }

    /// How many documents [`Session::join_small`] goes through, each as often as it does.
    pub fn small(&self) -> u64 {
        let Base::Existing(base) = &self.base else {
            return 0;
        };
        let each = JOINED.iter().filter_map(|role| {
            let from = small_tail(base.manifest(), role)?;
            Some(to_join(base, role, from))
        });
        each.fold(0, u64::saturating_add)
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

const JOINED: [&str; 3] = [role::ROUTES, role::IDS, role::DOCUMENTS];

/// Where the segments begin that together outweigh each of them, if there are too many segments. So whatever
/// is rewritten at least doubles.
fn small_tail(manifest: &Manifest, role: &str) -> Option<usize> {
    let sizes: Vec<u64> = manifest.of_role(role).map(|p| p.length).collect();
    if sizes.len() <= MAX_SEGMENTS {
        return None;
    }
    let mut rest = sizes.iter().fold(0u64, |sum, n| sum.saturating_add(*n));
    sizes.iter().position(|size| {
        rest = rest.saturating_sub(*size);
        *size <= rest
    })
}

/// How many documents of a role are gone through: those of the segments from the `from`-th on, ids twice.
fn to_join(base: &Generation, role: &str, from: usize) -> u64 {
    fn sum<S>(segments: &[S], from: usize, of: impl Fn(&S) -> u64) -> u64 {
        let segments = segments.get(from..).unwrap_or_default().iter();
        segments.map(of).fold(0, u64::saturating_add)
    }
    match role {
        role::ROUTES => sum(&base.routes, from, RouteSegment::rows),
        role::IDS => sum(&base.ids, from, ids_gone_through),
        _ => sum(&base.kept, from, kept_gone_through),
    }
}

fn ids_gone_through(segment: &IdSegment) -> u64 {
    segment.rows().saturating_mul(2)
}

fn kept_gone_through(segment: &KeptSegment) -> u64 {
    segment.end() - segment.first()
}

struct Joining<'j> {
    base: &'j Generation,
    names: &'j mut Names,
    /// Whether `keep` allows every docno.
    all: bool,
    keep: &'j (dyn Fn(u64) -> bool + Sync),
    progress: &'j Progress,
}

impl Joining<'_> {
    /// Replaces the parts of a role from the `from`-th on by joined ones.
    fn join(&mut self, role: &str, from: usize, manifest: &mut Manifest) -> Result<()> {
        let listed: Vec<Part> = manifest.of_role(role).skip(from).cloned().collect();
        let base = self.base;
        let joined = match role {
            role::ROUTES => self.groups(
                base.routes.get(from..).unwrap_or_default(),
                &listed,
                |a, b| scales_of(a) == scales_of(b) && near(a.end(), b.first()),
                RouteSegment::rows,
                Self::write_routes,
            )?,
            role::IDS => self.groups(
                base.ids.get(from..).unwrap_or_default(),
                &listed,
                |a, b| near(a.end(), b.first()),
                ids_gone_through,
                Self::write_ids,
            )?,
            _ => self.groups(
                base.kept.get(from..).unwrap_or_default(),
                &listed,
                |a, b| near(a.end(), b.first()),
                kept_gone_through,
                Self::write_documents,
            )?,
        };
        manifest.parts.retain(|p| !listed.contains(p));
        manifest.parts.extend(joined);
        Ok(())
    }

    /// One part for each group of neighbours; `write` writes it, unless nothing is left.
    fn groups<S>(
        &mut self,
        segments: &[S],
        listed: &[Part],
        neighbours: impl Fn(&S, &S) -> bool,
        rows: impl Fn(&S) -> u64,
        write: impl Fn(&mut Self, &[&S]) -> Result<Option<Part>>,
    ) -> Result<Vec<Part>> {
        let segments: Vec<(&S, &Part)> = segments.iter().zip(listed).collect();
        let mut parts = Vec::new();
        for group in segments.chunk_by(|(a, _), (b, _)| neighbours(a, b)) {
            if let ([(segment, part)], true) = (group, self.all) {
                parts.push((*part).clone());
                self.progress.add(rows(segment))?;
                continue;
            }
            let group: Vec<&S> = group.iter().map(|(segment, _)| *segment).collect();
            parts.extend(write(self, &group)?);
        }
        Ok(parts)
    }

    fn write_routes(&mut self, group: &[&RouteSegment]) -> Result<Option<Part>> {
        let base = self.base;
        let mut docnos = group.iter().flat_map(|segment| segment.docnos());
        let Some(first) = docnos.find(|docno| (self.keep)(*docno)) else {
            return Ok(None);
        };
        let decoder = base.manifest().of_role(role::DECODER).next();
        let decoder = decoder.map(|p| p.blake3);
        let scales = group.first().and_then(|segment| scales_of(segment));
        let plan = SegmentPlan {
            codec_name: base.spec.codec.to_string(),
            width: base.codec.record_bytes(),
            first,
            decoder: decoder.map(|hash| hash.0),
            scales: scales.map(|hash| hash.0),
        };
        let name = self.names.next(role::ROUTES, "seg");
        let mut writer = SegmentWriter::create(&base.dir, &name, plan)?;
        for segment in group {
            let kept = |docno: &u64| *docno >= first && (self.keep)(*docno);
            for docno in segment.docnos() {
                let Some(record) = segment.record(docno)? else {
                    continue;
                };
                self.progress.add(1)?;
                if kept(&docno) {
                    writer.skip(docno - writer.end());
                    writer.write(record)?;
                }
            }
        }
        let mut part = Part::new(role::ROUTES, name, writer.finish()?);
        part.parameters = decoder.into_iter().chain(scales).collect();
        Ok(Some(part))
    }

    fn write_ids(&mut self, group: &[&IdSegment]) -> Result<Option<Part>> {
        let mut docnos = group.iter().flat_map(|segment| segment.docnos());
        if !docnos.any(|docno| (self.keep)(docno)) {
            return Ok(None);
        }
        let name = self.names.next(role::IDS, "seg");
        let digest = join_ids(&self.base.dir, &name, group, self.keep, self.progress)?;
        Ok(Some(Part::new(role::IDS, name, digest)))
    }

    fn write_documents(&mut self, group: &[&KeptSegment]) -> Result<Option<Part>> {
        let Some(first) = group.first() else {
            return Ok(None);
        };
        let name = self.names.next(role::DOCUMENTS, "seg");
        let mut writer = KeptWriter::create(&self.base.dir, &name, first.first())?;
        for segment in group {
            writer.copy(segment, self.keep, self.progress)?;
        }
        let part = Part::new(role::DOCUMENTS, name, writer.finish()?);
        Ok(Some(part))
    }
}

fn scales_of(segment: &RouteSegment) -> Option<Hash> {
    segment.scales().map(|(hash, _)| hash)
}

fn near(end: u64, next: u64) -> bool {
    next.saturating_sub(end) <= MAX_GAP
}
