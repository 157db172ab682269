//! Going back to the generation before. It becomes the newest one, under a new number, so that docnos and
//! generations are never used twice and going back can itself be undone.

use std::io::ErrorKind;
use std::path::Path;

use crate::error::{Error, Result};
use crate::manifest::{Manifest, read_other};
use crate::writer::Session;

impl Session {
    /// The manifest of the generation before.
    pub fn before(&self) -> Result<Manifest> {
        let now = self.base_manifest();
        let none = || {
            let reason = "no generation before the one in force is kept";
            Error::invalid(format!("{}: {reason}", self.dir.path().display()))
        };
        let name = Manifest::name(now.previous.ok_or_else(none)?);
        let before = match read_other(&self.dir, &name) {
            // A copy of a store has the one generation that was copied.
            Err(e) if e.io_kind() == Some(ErrorKind::NotFound) => return Err(none()),
            other => other?,
        };
        before.check_writable(&self.dir.path_of(&name))?;
        Ok(before)
    }

    /// The number of the generation in force afterwards.
    pub fn rollback(&mut self, before: Manifest, path: &Path) -> Result<u64> {
        let now = self.base_manifest();
        let manifest = Manifest {
            generation: self.staged.names.generation,
            previous: Some(now.generation),
            next_docno: now.next_docno.max(before.next_docno),
            ..before
        };
        self.publish(manifest, path)
    }
}
