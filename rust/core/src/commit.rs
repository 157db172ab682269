//! A commit: parts, then the manifest, then `CURRENT`, each durable before the next names it.

use std::path::Path;
use std::sync::Arc;

use crate::bm25::Meanwhile;
use crate::documents::Dead;
use crate::error::Result;
use crate::files::Directory;
use crate::manifest::{CURRENT, Current, Hash, Manifest, Part, role};
use crate::watch::{Progress, Unit, Watch};
use crate::writer::{Base, Session};

impl Directory {
    /// Makes a manifest the one in force, durably; it and its name must be so already.
    pub fn put_in_force(&self, current: &Current) -> Result<()> {
        self.replace(CURRENT, current.to_text().as_bytes())?;
        self.sync()
    }
}

impl Session {
    /// The number of the generation in force afterwards.
    pub fn commit(&mut self, path: &Path, watch: &Arc<dyn Watch>) -> Result<u64> {
        if self.staged.is_empty() && !matches!(self.base, Base::New { .. }) {
            return Ok(self.base_manifest().generation);
        }
        let staged = &self.staged;
        let indexed = match self.index {
            Some(_) => staged.next - staged.first,
            None => 0,
        };
        let steps = [
            staged.to_resolve(self.base.generation()),
            self.small(),
            staged.to_finish(),
            indexed,
        ];
        let total = steps.into_iter().fold(0, u64::saturating_add);
        let progress = Progress::begin(watch, Unit::Documents, total)?;
        self.resolve(&progress)?;
        let mut manifest = self.next_manifest();
        self.join_small(&mut manifest, &progress)?;
        let codec = self.codec.as_ref();
        let parts = self.staged.finish(&self.dir, codec, &progress)?;
        manifest.parts.extend(parts);
        let mut dead = std::mem::take(&mut self.staged.dead);
        self.count(&mut manifest, dead.len());
        if !dead.is_empty() {
            if let Base::Existing(base) = &self.base {
                dead |= base.dead.docnos();
            }
            let file = self.staged.names.next(role::DEAD, "bin");
            let digest = Dead::write(&self.dir, &file, &dead)?;
            manifest.parts.retain(|p| p.role != role::DEAD);
            manifest.parts.push(Part::new(role::DEAD, file, digest));
        }
        self.commit_index(&mut manifest, &progress, indexed)?;
        self.publish(manifest, path, &progress)
    }

    /// The manifest on which the parts of the next generation are listed.
    pub fn next_manifest(&self) -> Manifest {
        let base = self.base_manifest();
        let is_new = matches!(self.base, Base::New { .. });
        Manifest {
            generation: self.staged.names.generation,
            previous: (!is_new).then_some(base.generation),
            previous_blake3: self.base.generation().map(|base| base.current().blake3),
            ..base
        }
    }

    fn count(&self, manifest: &mut Manifest, dead: u64) {
        let staged = &self.staged;
        let dead_here = dead - staged.dead_in_base;
        let alive_here = staged.next - staged.first - dead_here;
        let unrouted_here = staged.absent() - staged.dead_unrouted_here;
        manifest.documents = manifest.documents.saturating_sub(staged.dead_in_base) + alive_here;
        manifest.unrouted = manifest
            .unrouted
            .saturating_sub(staged.dead_unrouted_in_base)
            + unrouted_here;
        manifest.next_docno = staged.next;
    }

    /// Commits the BM25 index, if anything of it was staged, and lists its files.
    pub fn commit_index(
        &mut self,
        manifest: &mut Manifest,
        progress: &Progress,
        worth: u64,
    ) -> Result<()> {
        // It holds memory and threads; the next commit that needs one opens it again.
        if let Some(mut index) = self.index.take() {
            let files = index.commit(manifest.generation, Meanwhile { progress, worth })?;
            manifest.parts.retain(|p| p.role != role::BM25);
            manifest.parts.extend(files.into_iter().map(|f| Part {
                role: role::BM25.into(),
                file: f.name,
                length: f.length,
                blake3: Hash(f.blake3),
                parameters: Vec::new(),
            }));
            manifest.index_generation = Some(manifest.generation);
        }
        Ok(())
    }

    /// Makes a manifest, whose parts are all durable, the generation in force. Returns its number.
    pub fn publish(&mut self, manifest: Manifest, path: &Path, progress: &Progress) -> Result<u64> {
        let file = Manifest::name(manifest.generation);
        let json = manifest.to_json(&self.dir.path_of(&file))?;
        self.staged.names.all.push(file.clone());
        let digest = self.dir.write_part(&file, &json)?;
        // Nothing leads to a new store before its folder is renamed, and that is synced in time.
        if matches!(self.base, Base::Existing(_)) {
            self.dir.sync()?;
        }
        let current = Current {
            manifest: file,
            blake3: Hash(digest.blake3),
        };
        progress.end()?;
        // From here on the new generation may be in force whatever fails: nothing of it is removed.
        self.staged.names.all.clear();
        self.in_doubt = Some(manifest.generation);
        self.dir.put_in_force(&current)?;
        if let Base::New { folder, .. } = &mut self.base {
            let published = folder.publish();
            if folder.is_published() {
                self.dir = self.dir.moved_to(path);
            }
            published?;
        }
        Ok(manifest.generation)
    }
}
