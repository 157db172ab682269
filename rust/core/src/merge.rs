//! Taking over the documents of another store that was encoded with the same experts. Records are copied bit for
//! bit; docnos are those of the store that takes them. So is the amortised router, if it has one: no record needs it.

use crate::bm25::FilterValues;
use crate::documents::LastBlock;
use crate::error::{Error, Result};
use crate::generation::Generation;
use crate::manifest::role;
use crate::watch::Progress;
use crate::writer::{OnDuplicate, Session, contents_to_keep, words};

impl Session {
    /// Stages the living documents of `other` with their routes; returns how many.
    pub fn merge(
        &mut self,
        other: &Generation,
        on_duplicate: OnDuplicate,
        progress: &Progress,
    ) -> Result<u64> {
        let mut last = LastBlock::default();
        let mut taken = 0;
        for docno in other.living() {
            let Some(id) = other.id_of(docno)? else {
                continue;
            };
            let kept = other.contents(docno, &mut last)?;
            if let Some((title, text)) = words(kept.title.as_deref(), kept.text.as_deref()) {
                let metadata = kept.metadata.as_deref();
                let values = FilterValues::of(&self.spec.filters, &id, metadata)?;
                let docno = self.staged.next;
                self.index()?.add(docno, title, text, values)?;
            }
            let segment = other.route_segment(docno);
            let record = match segment {
                Some(segment) => segment.record(docno)?,
                None => None,
            };
            if let (Some(_), Some((hash, scales))) = (record, segment.and_then(|s| s.scales())) {
                self.staged
                    .use_scales(&self.dir, self.codec.as_ref(), hash, scales)?;
            }
            self.staged.push_record(
                &self.dir,
                self.codec.as_ref(),
                &id,
                record,
                &contents_to_keep(&self.spec, kept),
                on_duplicate,
            )?;
            self.staged.end_full_chunk(&self.dir, progress)?;
            progress.add(1)?;
            taken += 1;
        }
        progress.end().map(|()| taken)
    }

    pub fn expect_mergeable(&self, other: &Generation) -> Result<()> {
        let path = other.dir.path().display();
        let refuse = |reason: String| {
            Err(Error::invalid(format!(
                "{path}: cannot be merged: {reason}"
            )))
        };
        let (a, b) = (&self.spec, &other.spec);
        let same = [
            ("modules", a.modules == b.modules),
            ("experts", a.experts == b.experts),
            ("rank", a.rank == b.rank),
            ("alpha", a.alpha == b.alpha),
            ("codec", a.codec == b.codec),
            ("phi", a.phi == b.phi),
            ("top_k", a.top_k == b.top_k),
            ("mixing", a.mixing == b.mixing),
            ("id_type", a.id_type == b.id_type),
        ];
        if let Some((what, _)) = same.iter().find(|(_, same)| !same) {
            return refuse(format!(
                "its {what} differ from those of the store that takes it"
            ));
        }
        let mine = self.base_manifest();
        for role in [role::EXPERTS, role::DECODER] {
            let hash =
                |parts: &crate::manifest::Manifest| parts.of_role(role).next().map(|p| p.blake3);
            if hash(&mine) != hash(other.manifest()) {
                return refuse(format!(
                    "its {role} part is another one: only stores that were encoded together, \
                     or one from the other by adding documents, share it"
                ));
            }
        }
        let words = other.manifest().index_generation.is_some();
        if words && !(b.keep_title && b.keep_text) {
            return refuse("it can be searched but keeps no text, so its documents could not be found any more".into());
        }
        if words && !a.filters.is_empty() && !b.keep_metadata {
            return refuse("it keeps no metadata, on which the store that takes it filters".into());
        }
        Ok(())
    }
}
