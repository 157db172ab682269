//! The store of polyprag: latent experts, routes, documents and their BM25 index in one directory,
//! opened read-only by many and written by one.
//!
//! [`Store`] reads one committed generation; [`Writer`] stages changes and commits the next one.
//! `docs/format.md` describes the files field by field.

// Windows lets nobody rename a folder in which a file is open, which is how a new store gets its name; nor
// remove a file that is mapped, as the collector does beside readers; and its locks keep others from reading.
#[cfg(not(unix))]
compile_error!(
    "polyprag-core needs a Unix system, for flock, openat and renames over open files; on Windows use WSL 2"
);

pub mod bm25;
mod collect;
mod commit;
mod compact;
mod copy;
mod documents;
mod dtype;
pub mod error;
mod experts;
pub mod files;
mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod generation;
mod info;
mod lock;
mod manifest;
mod merge;
mod new_folder;
mod parallel;
mod presence;
mod recode;
mod reindex;
mod rollback;
pub mod routes;
mod spec;
mod staged;
mod store;
pub mod tap;
mod tensors;
mod verify;
mod watch;
mod writer;

pub use bm25::{Comparison, Condition, Filter, FilterField, FilterKind};
pub use documents::{Document, DocumentId, IdBatch, MAX_FIELD};
pub use dtype::Dtype;
pub use error::{Error, Result};
pub use experts::ExpertTensor;
pub use info::{PartInfo, StoreInfo};
pub use manifest::FORMAT;
pub use recode::Recoding;
pub use routes::{CodecName, Decoder, DecoderInput, Keeps, Phi, route_weights};
pub use spec::{Combination, IdType, MAX_NAME, Mixing, Module, Rule, StoreSpec};
pub use store::{Hit, Ids, Kind, RouteArray, Store};
pub use tensors::{Tensor, TensorView};
pub use verify::VerifyReport;
pub use watch::{Unwatched, Watch};
pub use writer::{OnDuplicate, RouteRows, Writer};
