//! From the core's errors to Python's: the only place where they meet.
//!
//! The classes are those of the Python module `polyprag.errors`. Failures of the operating system
//! become the builtin `OSError` of their number, so that `except FileNotFoundError` just works.

use std::io;
use std::path::Path;

use polyprag_core::Error;
use pyo3::exceptions::{
    PyBlockingIOError, PyFileExistsError, PyFileNotFoundError, PyInterruptedError,
    PyIsADirectoryError, PyNotADirectoryError, PyOSError, PyPermissionError, PyTimeoutError,
};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

/// As what it should be raised.
pub fn to_python(py: Python<'_>, error: Error) -> PyErr {
    let class = match &error {
        Error::Io { path, source } => return os_error(py, path, source),
        Error::InvalidInput(_) => "InvalidInput",
        Error::NotAStore { .. } => "NotAStore",
        Error::CorruptStore { .. } => "CorruptStore",
        Error::CorruptIndex { .. } => "CorruptIndex",
        Error::UnsupportedFormat { .. } => "UnsupportedFormat",
        Error::IndexTooOld { .. } => "IndexTooOld",
        Error::StoreLocked { .. } => "StoreLocked",
        Error::StoreClosed { .. } => "StoreClosed",
        Error::DuplicateId { .. } => "DuplicateId",
        Error::UnknownId { .. } => "UnknownId",
        Error::Unrouted { .. } => "Unrouted",
        _ => "StoreError",
    };
    raise(py, class, error.to_string())
}

/// An argument that cannot be what it should.
pub fn invalid(py: Python<'_>, message: impl Into<String>) -> PyErr {
    to_python(py, Error::invalid(message))
}

fn raise(py: Python<'_>, class: &str, message: String) -> PyErr {
    static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    let module = MODULE.get_or_try_init(py, || Ok(py.import("polyprag.errors")?.unbind()));
    let raised = module.and_then(|module: &Py<PyModule>| {
        let class = module.bind(py).getattr(class)?.cast_into::<PyType>()?;
        Ok(PyErr::from_type(class, message))
    });
    raised.unwrap_or_else(|other| other)
}

fn os_error(py: Python<'_>, path: &Path, source: &io::Error) -> PyErr {
    let made = match source.raw_os_error() {
        // OSError itself picks the subclass by the number.
        Some(number) => py.import("os").and_then(|os| {
            let words = os.call_method1("strerror", (number,))?;
            let class = py.get_type::<PyOSError>();
            class.call1((number, words, path.as_os_str()))
        }),
        None => by_kind(py, source.kind()).call1((format!("{}: {source}", path.display()),)),
    };
    made.map_or_else(|other| other, PyErr::from_value)
}

fn by_kind(py: Python<'_>, kind: io::ErrorKind) -> Bound<'_, PyType> {
    match kind {
        io::ErrorKind::NotFound => py.get_type::<PyFileNotFoundError>(),
        io::ErrorKind::PermissionDenied => py.get_type::<PyPermissionError>(),
        io::ErrorKind::AlreadyExists => py.get_type::<PyFileExistsError>(),
        io::ErrorKind::IsADirectory => py.get_type::<PyIsADirectoryError>(),
        io::ErrorKind::NotADirectory => py.get_type::<PyNotADirectoryError>(),
        io::ErrorKind::Interrupted => py.get_type::<PyInterruptedError>(),
        io::ErrorKind::TimedOut => py.get_type::<PyTimeoutError>(),
        io::ErrorKind::WouldBlock => py.get_type::<PyBlockingIOError>(),
        _ => py.get_type::<PyOSError>(),
    }
}

/// `?` for the core's results.
pub trait OrRaise<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T>;
}

impl<T> OrRaise<T> for polyprag_core::Result<T> {
    fn or_raise(self, py: Python<'_>) -> PyResult<T> {
        self.map_err(|error| to_python(py, error))
    }
}
