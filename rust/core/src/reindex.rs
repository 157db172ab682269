//! The BM25 index, rebuilt from kept text: for an index that is damaged, or of a Tantivy that can no longer be read.

use std::path::Path;
use std::sync::Arc;

use crate::bm25::FilterValues;
use crate::documents::{DocumentId, LastBlock};
use crate::error::{Error, Result};
use crate::manifest::role;
use crate::watch::{Progress, Unit, Watch};
use crate::writer::{Base, Session, words};

impl Session {
    /// Whether enough is kept of the documents.
    pub fn expect_reindexable(&self) -> Result<()> {
        let (spec, path) = (&self.spec, self.dir.path());
        if !(spec.keep_title && spec.keep_text) {
            return Err(Error::invalid(format!(
                "{}: the index cannot be rebuilt, because this store keeps no {}: encode the corpus again",
                path.display(),
                if spec.keep_text { "titles" } else { "text" }
            )));
        }
        if !(spec.filters.is_empty() || spec.keep_metadata) {
            return Err(Error::invalid(format!(
                "{}: the index cannot be rebuilt, because this store filters on metadata that it does not keep: \
                 encode the corpus again",
                path.display(),
            )));
        }
        Ok(())
    }

    /// The number of the generation in force afterwards.
    pub fn reindex(&mut self, path: &Path, watch: &Arc<dyn Watch>) -> Result<u64> {
        let filters = self.spec.filters.clone();
        let mut manifest = self.next_manifest();
        // Once when they are told apart into words, and once when what was written becomes one index.
        let documents = manifest.documents;
        let total = documents.saturating_mul(2);
        let progress = Progress::begin(watch, Unit::Documents, total)?;
        manifest.parts.retain(|p| p.role != role::BM25);
        manifest.index_generation = None;
        self.start_index()?;
        if let (Base::Existing(base), Some(index)) = (&self.base, &mut self.index) {
            let mut last = LastBlock::default();
            for docno in base.living() {
                let document = base.contents(docno, &mut last)?;
                if let Some((title, text)) =
                    words(document.title.as_deref(), document.text.as_deref())
                {
                    let id = base.id_of(docno)?.unwrap_or(DocumentId::U64(docno));
                    let values = FilterValues::of(&filters, &id, document.metadata.as_deref())?;
                    index.add(docno, title, text, values)?;
                }
                progress.add(1)?;
            }
        }
        self.commit_index(&mut manifest, &progress, documents)?;
        self.publish(manifest, path, &progress)
    }
}
