//! A commit: parts, then the manifest, then `CURRENT`, each durable before the next names it.

use std::path::Path;

use crate::collect::next_generation;
use crate::documents::{Dead, DocumentId, KeptWriter, write_ids};
use crate::error::Result;
use crate::manifest::{CURRENT, Current, Hash, Manifest, Part, role};
use crate::routes::scales::{Scales, column_maxima, fits, widen};
use crate::routes::{SegmentPlan, SegmentWriter};
use crate::writer::{Base, Session};

/// The manifest in the making, and the files written for it, which go if the commit fails.
struct Next {
    manifest: Manifest,
    written: Vec<String>,
}

impl Next {
    fn file(&mut self, role: &str, end: &str) -> String {
        let file = format!("{role}-{:08}.{end}", self.manifest.generation);
        self.written.push(file.clone());
        file
    }
}

impl Session {
    /// The number of the generation in force afterwards.
    pub fn commit(&mut self, path: &Path) -> Result<u64> {
        let base = self.base_manifest();
        let is_new = matches!(self.base, Base::New { .. });
        if self.staged.is_empty() && !is_new {
            return Ok(base.generation);
        }
        let generation = match is_new {
            true => 1,
            false => next_generation(&self.dir)?,
        };
        let mut next = Next {
            written: Vec::new(),
            manifest: Manifest {
                generation,
                previous: (!is_new).then_some(base.generation),
                ..base
            },
        };
        let written = self
            .write_parts(&mut next)
            .and_then(|()| self.write_manifest(&mut next));
        let current = match written {
            Ok(current) => current,
            Err(e) => {
                if let Some(index) = self.index.take() {
                    index.discard();
                }
                for file in &next.written {
                    // The failure itself is what the caller must hear of.
                    let _ = self.dir.remove(file);
                }
                return Err(e);
            }
        };
        // From here on the new generation may be in force whatever fails: nothing of it is removed.
        self.dir.replace(CURRENT, current.to_text().as_bytes())?;
        self.dir.sync()?;
        if let Base::New { folder, .. } = &mut self.base {
            let published = folder.publish();
            if folder.is_published() {
                self.dir = self.dir.moved_to(path);
            }
            published?;
        }
        Ok(generation)
    }

    fn write_parts(&mut self, next: &mut Next) -> Result<()> {
        self.write_routes(next)?;
        let staged = &self.staged;
        if !staged.entries.is_empty() {
            let ids: Vec<&DocumentId> = staged.entries.iter().map(|e| &e.id).collect();
            let file = next.file(role::IDS, "seg");
            let digest = write_ids(&self.dir, &file, self.spec.id_type, staged.first, &ids)?;
            next.manifest.parts.push(Part::new(role::IDS, file, digest));
        }
        if staged.entries.iter().any(|e| !e.contents.is_empty()) {
            let file = next.file(role::DOCUMENTS, "seg");
            let mut kept = KeptWriter::create(&self.dir, &file, staged.first)?;
            for (docno, entry) in (staged.first..).zip(&staged.entries) {
                kept.add(docno, &entry.contents)?;
            }
            let digest = kept.finish()?;
            next.manifest
                .parts
                .push(Part::new(role::DOCUMENTS, file, digest));
        }
        self.write_dead(next)?;
        self.count(&mut next.manifest);

        let generation = next.manifest.generation;
        if let Some(index) = &mut self.index {
            let files = index.commit(generation)?;
            next.manifest.parts.retain(|p| p.role != role::BM25);
            next.manifest.parts.extend(files.into_iter().map(|f| Part {
                role: role::BM25.into(),
                file: f.name,
                length: f.length,
                blake3: Hash(f.blake3),
                parameters: Vec::new(),
            }));
            next.manifest.index_generation = Some(generation);
        }
        // It holds memory and threads; the next commit that needs one opens it again.
        self.index = None;
        Ok(())
    }

    fn write_routes(&self, next: &mut Next) -> Result<()> {
        let staged = &self.staged;
        let width = self.codec.columns();
        let rows: Vec<Option<&[f32]>> = staged
            .entries
            .iter()
            .map(|e| {
                e.route
                    .and_then(|row| staged.routes.get(row * width..(row + 1) * width))
            })
            .collect();
        if rows.iter().all(Option::is_none) {
            return Ok(());
        }
        let decoder = next
            .manifest
            .of_role(role::DECODER)
            .next()
            .map(|p| p.blake3);
        let mut fitted: Option<(Vec<f32>, Hash)> = None;
        if self.codec.scaled() {
            let maxima = column_maxima(width, rows.iter().copied().flatten());
            fitted = Some(match self.newest_scales() {
                Some((hash, scales)) if fits(scales, &maxima) => (scales.to_vec(), hash),
                newest => {
                    let scales = widen(newest.map(|(_, s)| s), &maxima);
                    let file = next.file(role::SCALES, "bin");
                    let digest = Scales::write(&self.dir, &file, &scales)?;
                    next.manifest
                        .parts
                        .push(Part::new(role::SCALES, file, digest));
                    (scales, Hash(digest.blake3))
                }
            });
        }
        let file = next.file(role::ROUTES, "seg");
        let plan = SegmentPlan {
            codec_name: self.spec.codec.to_string(),
            width: self.codec.record_bytes(),
            first: staged.first,
            decoder: decoder.map(|d| d.0),
            scales: fitted.as_ref().map(|(_, hash)| hash.0),
        };
        let scales = fitted.as_ref().map_or(&[][..], |(values, _)| values);
        let mut segment = SegmentWriter::create(&self.dir, &file, plan)?;
        let mut record = Vec::with_capacity(self.codec.record_bytes());
        for row in &rows {
            record.clear();
            match row {
                Some(row) => {
                    self.codec.encode(row, scales, &mut record);
                    segment.write(&record)?;
                }
                None => segment.skip(1),
            }
        }
        let digest = segment.finish()?;
        let mut part = Part::new(role::ROUTES, file, digest);
        part.parameters = decoder
            .into_iter()
            .chain(fitted.map(|(_, hash)| hash))
            .collect();
        next.manifest.parts.push(part);
        Ok(())
    }

    fn write_dead(&self, next: &mut Next) -> Result<()> {
        if self.staged.dead.is_empty() {
            return Ok(());
        }
        let mut dead = self.staged.dead.clone();
        if let Base::Existing(base) = &self.base {
            dead |= base.dead.docnos();
        }
        let file = next.file(role::DEAD, "bin");
        let digest = Dead::write(&self.dir, &file, &dead)?;
        next.manifest.parts.retain(|p| p.role != role::DEAD);
        next.manifest
            .parts
            .push(Part::new(role::DEAD, file, digest));
        Ok(())
    }

    fn count(&self, manifest: &mut Manifest) {
        let staged = &self.staged;
        let dead_here = staged.dead.len() - staged.dead_in_base;
        let routed_here = staged.entries.iter().filter(|e| e.route.is_some()).count() as u64;
        let alive_here = staged.entries.len() as u64 - dead_here;
        manifest.documents = manifest.documents.saturating_sub(staged.dead_in_base) + alive_here;
        manifest.unrouted = manifest
            .unrouted
            .saturating_sub(staged.dead_unrouted_in_base)
            + (alive_here - routed_here);
        manifest.next_docno = staged.first + staged.entries.len() as u64;
    }

    /// The manifest, and every name so far, durable.
    fn write_manifest(&self, next: &mut Next) -> Result<Current> {
        let file = Manifest::name(next.manifest.generation);
        let json = next.manifest.to_json(&self.dir.path_of(&file))?;
        next.written.push(file.clone());
        let digest = self.dir.write_part(&file, &json)?;
        self.dir.sync()?;
        Ok(Current {
            manifest: file,
            blake3: Hash(digest.blake3),
        })
    }
}
