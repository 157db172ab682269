//! The BM25 index, rebuilt from kept text: for an index that is damaged, or of a Tantivy that can no longer be read.

use std::path::Path;

use crate::documents::LastBlock;
use crate::error::{Error, Result};
use crate::manifest::role;
use crate::writer::{Base, Session, has_words};

impl Session {
    /// The number of the generation in force afterwards.
    pub fn reindex(&mut self, path: &Path) -> Result<u64> {
        let spec = &self.spec;
        if !(spec.keep_title && spec.keep_text) {
            return Err(Error::invalid(format!(
                "{}: the index cannot be rebuilt, because this store keeps no {}: encode the corpus again",
                path.display(),
                if spec.keep_text { "titles" } else { "text" }
            )));
        }
        let mut manifest = self.next_manifest();
        manifest.parts.retain(|p| p.role != role::BM25);
        manifest.index_generation = None;
        self.start_index()?;
        if let (Base::Existing(base), Some(index)) = (&self.base, &mut self.index) {
            let mut last = LastBlock::default();
            for docno in base.living() {
                let document = base.contents(docno, &mut last)?;
                if has_words(document.title.as_deref(), document.text.as_deref()) {
                    let title = document.title.as_deref().unwrap_or_default();
                    let text = document.text.as_deref().unwrap_or_default();
                    index.add(docno, title, text)?;
                }
            }
        }
        self.commit_index(&mut manifest)?;
        self.publish(manifest, path)
    }
}
