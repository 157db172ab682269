//! The ids of one call, in bulk.

use crate::documents::DocumentId;
use crate::error::Result;
use crate::spec::IdType;

/// Many ids in order. Integers are taken as they lie in memory.
#[derive(Debug, Clone, Copy)]
pub enum IdBatch<'i> {
    Any(&'i [DocumentId]),
    U64(&'i [u64]),
}

impl IdBatch<'_> {
    pub fn len(&self) -> usize {
        match self {
            IdBatch::Any(ids) => ids.len(),
            IdBatch::U64(ids) => ids.len(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a store with ids of this type can take them.
    pub fn validate(&self, id_type: IdType) -> Result<()> {
        match self {
            IdBatch::Any(ids) => ids.iter().try_for_each(|id| id.validate(id_type)),
            // All integers are alike.
            IdBatch::U64(ids) => ids
                .first()
                .map_or(Ok(()), |id| DocumentId::U64(*id).validate(id_type)),
        }
    }
}

impl<'i> From<&'i [DocumentId]> for IdBatch<'i> {
    fn from(ids: &'i [DocumentId]) -> Self {
        IdBatch::Any(ids)
    }
}

impl<'i> From<&'i Vec<DocumentId>> for IdBatch<'i> {
    fn from(ids: &'i Vec<DocumentId>) -> Self {
        IdBatch::Any(ids)
    }
}

impl<'i, const N: usize> From<&'i [DocumentId; N]> for IdBatch<'i> {
    fn from(ids: &'i [DocumentId; N]) -> Self {
        IdBatch::Any(ids)
    }
}

impl<'i> From<&'i [u64]> for IdBatch<'i> {
    fn from(ids: &'i [u64]) -> Self {
        IdBatch::U64(ids)
    }
}
