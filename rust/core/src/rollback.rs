//! Going back to the generation before. It becomes the newest one, under a new number, so that docnos and
//! generations are never used twice and going back can itself be undone.

use std::path::Path;

use crate::error::{Error, Result};
use crate::generation::{Generation, Index};
use crate::manifest::{Current, Manifest, Pinned};
use crate::watch::Progress;
use crate::writer::Session;

impl Session {
    /// The manifest of the generation before.
    pub fn before(&self) -> Result<Manifest> {
        let now = self.base_manifest();
        let none = || {
            let reason = "no generation before the one in force is kept";
            Error::invalid(format!("{}: {reason}", self.dir.path().display()))
        };
        let (before, blake3) = now.previous.zip(now.previous_blake3).ok_or_else(none)?;
        let current = Current {
            manifest: Manifest::name(before),
            blake3,
        };
        // A copy of a store has the one generation that was copied.
        let before = Pinned::open(&self.dir, current)?.ok_or_else(none)?;
        let file = self.dir.path_of(&before.current.manifest);
        before.manifest.check_writable(&file)?;
        // Nothing that cannot be read is put in force.
        let before = Generation::from_pinned(&self.dir, before, Index::Leave)?;
        Ok(before.manifest().clone())
    }

    /// The number of the generation in force afterwards.
    pub fn rollback(&mut self, before: Manifest, path: &Path) -> Result<u64> {
        let next = self.next_manifest();
        let manifest = Manifest {
            generation: next.generation,
            previous: next.previous,
            previous_blake3: next.previous_blake3,
            next_docno: next.next_docno.max(before.next_docno),
            ..before
        };
        self.publish(manifest, path, &Progress::unseen())
    }
}
