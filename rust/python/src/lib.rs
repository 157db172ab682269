//! The extension module `polyprag._polyprag`.
//!
//! It translates and does nothing else: every class is one file, every call that touches the disk or
//! loops runs detached from the interpreter, and `errors.rs` is the only map of failures.
//! `python/polyprag/_polyprag.pyi` is the documentation for users.

#[cfg(target_endian = "big")]
compile_error!(
    "views into a store are little endian, and numpy would read them as this machine does"
);

mod arrays;
mod decoder;
mod document;
mod errors;
mod hit;
mod id_arrays;
mod ids;
mod info;
mod json;
mod spec;
mod store;
mod watch;
mod writer;

use pyo3::prelude::*;

/// The Rust core of polyprag.
#[pymodule(name = "_polyprag")]
mod extension {
    use super::*;

    #[pymodule_export]
    use crate::document::Document;
    #[pymodule_export]
    use crate::hit::Hit;
    #[pymodule_export]
    use crate::info::{PartInfo, StoreInfo, VerifyReport};
    #[pymodule_export]
    use crate::spec::{Combination, Module, StoreSpec};
    #[pymodule_export]
    use crate::store::Store;
    #[pymodule_export]
    use crate::writer::Writer;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        module.add("tantivy_version", polyprag_core::bm25::tantivy_version())
    }
}
