//! Documents: their ids, what is kept of them, and which of them are dead.

mod batch;
mod dead;
mod ids;
mod kept;

use std::fmt;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::spec::{IdType, MAX_NAME};

pub use batch::IdBatch;
pub use dead::Dead;
pub use ids::{IdSegment, IdsChunk, duplicates, join_and_find, join_ids};
pub use kept::{Contents, KeptSegment, KeptWriter, LastBlock};

/// The longest title, text or metadata of one document, in bytes.
pub const MAX_FIELD: usize = 16 << 20;

/// What a caller knows a document by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DocumentId {
    String(String),
    U64(u64),
}

impl DocumentId {
    pub fn kind(&self) -> IdType {
        match self {
            DocumentId::String(_) => IdType::String,
            DocumentId::U64(_) => IdType::U64,
        }
    }

    /// Whether a store with ids of this type can take it.
    pub fn validate(&self, id_type: IdType) -> Result<()> {
        let id = self;
        if id.kind() != id_type {
            let expected = match id_type {
                IdType::String => "a string",
                IdType::U64 => "an integer",
            };
            return Err(Error::invalid(format!(
                "document id {id}: this store takes {expected} (id_type)"
            )));
        }
        if let DocumentId::String(text) = id
            && !(1..=MAX_NAME).contains(&text.len())
        {
            let n = text.len();
            let start: String = text.chars().take(40).collect();
            return Err(Error::invalid(format!(
                "document id {start:?}...: expected 1 to {MAX_NAME} bytes of UTF-8, got {n}"
            )));
        }
        Ok(())
    }
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DocumentId::String(id) => write!(f, "{id:?}"),
            DocumentId::U64(id) => write!(f, "{id}"),
        }
    }
}

impl From<&str> for DocumentId {
    fn from(id: &str) -> Self {
        DocumentId::String(id.to_owned())
    }
}

impl From<String> for DocumentId {
    fn from(id: String) -> Self {
        DocumentId::String(id)
    }
}

impl From<u64> for DocumentId {
    fn from(id: u64) -> Self {
        DocumentId::U64(id)
    }
}

/// One retrievable passage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Document {
    pub id: DocumentId,
    pub title: Option<String>,
    pub text: Option<String>,
    /// The text of a JSON object.
    pub metadata: Option<String>,
}

impl Document {
    pub fn new(id: impl Into<DocumentId>) -> Self {
        Self {
            id: id.into(),
            title: None,
            text: None,
            metadata: None,
        }
    }

    pub fn with_title(mut self, title: impl Into<String>) -> Self {
        self.title = Some(title.into());
        self
    }

    pub fn with_text(mut self, text: impl Into<String>) -> Self {
        self.text = Some(text.into());
        self
    }

    pub fn with_metadata(mut self, json: impl Into<String>) -> Self {
        self.metadata = Some(json.into());
        self
    }

    /// Whether a store with ids of this type can take it.
    pub fn validate(&self, id_type: IdType) -> Result<()> {
        let id = &self.id;
        id.validate(id_type)?;
        let fields = [
            ("title", &self.title),
            ("text", &self.text),
            ("metadata", &self.metadata),
        ];
        for (name, field) in fields {
            let n = field.as_ref().map_or(0, |f| f.len());
            if n > MAX_FIELD {
                return Err(Error::invalid(format!(
                    "document {id}: {name} has {n} bytes, and {MAX_FIELD} are the most: split it into passages"
                )));
            }
        }
        if let Some(json) = &self.metadata
            && let Err(e) = serde_json::from_str::<Map<String, Value>>(json)
        {
            return Err(Error::invalid(format!(
                "document {id}: metadata is not a JSON object: {e}"
            )));
        }
        Ok(())
    }
}
