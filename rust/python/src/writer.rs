use std::mem;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use numpy::PyUntypedArrayMethods;
use polyprag_core::{Error, IdType, OnDuplicate, Result, RouteRows, Unwatched};
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::document::Document;
use crate::errors::{OrRaise, invalid};
use crate::store::Store;
use crate::watch::Asking;
use crate::{arrays, ids};

/// The one writer of a store. Leaving the `with` block cleanly commits; an exception discards.
#[pyclass(frozen, module = "polyprag._polyprag")]
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// The process that made it: a forked child has a copy that must not touch the disk.
    process: u32,
    /// The thread whose call is under way: what is called back in it must not wait for itself.
    at_work: Mutex<Option<ThreadId>>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Open(Box<polyprag_core::Writer>),
    /// And why.
    Closed(&'static str),
}

const DISCARDED: &str = "the writer was discarded: open a new one";
const LEFT: &str = "the with block of this writer has ended: open a new one";
const BUSY: &str = "the writer is at work, and was called by what is told of its progress";
const FORKED: &str =
    "the writer belongs to the process that opened it, and this is a fork: open a new one";

impl Writer {
    pub fn new(core: polyprag_core::Writer) -> Self {
        Self {
            path: core.path().to_owned(),
            process: std::process::id(),
            at_work: Mutex::default(),
            state: Mutex::new(State::Open(Box::new(core))),
        }
    }

    fn closed(&self, reason: &str) -> Error {
        Error::StoreClosed {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }

    fn state(&self) -> Result<MutexGuard<'_, State>> {
        if std::process::id() != self.process {
            return Err(self.closed(FORKED));
        }
        if *self.at_work() == Some(thread::current().id()) {
            return Err(Error::invalid(BUSY));
        }
        Ok(self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn at_work(&self) -> MutexGuard<'_, Option<ThreadId>> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs on the core's writer, detached; calls from several threads wait for each other.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut polyprag_core::Writer) -> Result<T> + Send,
    ) -> PyResult<T> {
        py.detach(|| self.run(work)).or_raise(py)
    }

    fn run<T>(&self, work: impl FnOnce(&mut polyprag_core::Writer) -> Result<T>) -> Result<T> {
        match &mut *self.state()? {
            State::Open(core) => work(core),
            State::Closed(reason) => Err(self.closed(reason)),
        }
    }

    /// Long work, of which `progress` is told.
    fn watched<T: Send>(
        &self,
        py: Python<'_>,
        progress: Option<&Bound<'_, PyAny>>,
        work: impl FnOnce(&mut polyprag_core::Writer) -> Result<T> + Send,
    ) -> PyResult<T> {
        let asking = Asking::new(progress)?;
        let done = py.detach(|| {
            self.run(|core| {
                let _at_work = AtWork::begin(self);
                core.watch(asking.clone());
                let done = work(core);
                core.watch(Arc::new(Unwatched));
                done
            })
        });
        asking.outcome(py, done)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let state = mem::replace(state, State::Closed(DISCARDED));
        if std::process::id() != self.process {
            // Dropping it would discard what the parent is still writing.
            mem::forget(state);
        } else if matches!(state, State::Open(_)) {
            // Discarding waits for the threads that index. An interpreter that ends runs no other thread.
            Python::try_attach(|py| py.detach(|| drop(state)));
        }
    }
}

/// Notes the thread whose call is under way, until it is done, however it ends.
struct AtWork<'w>(&'w Writer);

impl<'w> AtWork<'w> {
    fn begin(writer: &'w Writer) -> Self {
        *writer.at_work() = Some(thread::current().id());
        Self(writer)
    }
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        *self.0.at_work() = None;
    }
}

fn on_duplicate(py: Python<'_>, word: &str) -> PyResult<OnDuplicate> {
    match word {
        "error" => Ok(OnDuplicate::Error),
        "replace" => Ok(OnDuplicate::Replace),
        "skip" => Ok(OnDuplicate::Skip),
        other => Err(invalid(
            py,
            format!("on_duplicate: expected \"error\", \"replace\" or \"skip\", got {other:?}"),
        )),
    }
}

#[pymethods]
impl Writer {
    /// Stage documents and their routes; None leaves them unrouted. All or none of a call; returns
    /// how many were added.
    #[pyo3(signature = (documents, routes=None, *, on_duplicate="error", progress=None))]
    fn add(
        &self,
        py: Python<'_>,
        documents: &Bound<'_, PyAny>,
        routes: Option<&Bound<'_, PyAny>>,
        on_duplicate: &str,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let on_duplicate = self::on_duplicate(py, on_duplicate)?;
        let mut staged = Vec::new();
        for (at, document) in documents.try_iter()?.enumerate() {
            let document = document?;
            match document.cast::<Document>() {
                Ok(document) => staged.push(document.get().core.clone()),
                Err(_) => {
                    let shown = ids::shown(&document);
                    return Err(invalid(
                        py,
                        format!("documents[{at}]: expected a Document, got {shown}"),
                    ));
                }
            }
        }
        let routes = routes
            .map(|routes| arrays::float32("routes", routes))
            .transpose()?;
        let rows = match &routes {
            Some(routes) => Some(RouteRows {
                shape: routes.shape(),
                data: routes.as_slice()?,
            }),
            None => None,
        };
        self.watched(py, progress, |core| core.add(&staged, rows, on_duplicate))
    }

    /// Stage documents without title and text (reachable by id only), in bulk. Duplicates are found later:
    /// by `commit`, or by the next `add` or `delete`, which then raise DuplicateId.
    #[pyo3(signature = (ids, routes, *, on_duplicate="error", progress=None))]
    fn add_arrays(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        routes: &Bound<'_, PyAny>,
        on_duplicate: &str,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let on_duplicate = self::on_duplicate(py, on_duplicate)?;
        let ids = ids::batch(ids, self.id_type(py)?)?;
        let ids = ids.core()?;
        let routes = arrays::float32("routes", routes)?;
        let rows = RouteRows {
            shape: routes.shape(),
            data: routes.as_slice()?,
        };
        self.watched(py, progress, |core| {
            core.add_arrays(ids, rows, on_duplicate)
        })
    }

    /// Stage the living documents of another store that has the same experts and decoder; returns how
    /// many. Duplicates are found later, as after `add_arrays`.
    #[pyo3(signature = (store, *, on_duplicate="error", progress=None))]
    fn merge(
        &self,
        py: Python<'_>,
        store: &Bound<'_, Store>,
        on_duplicate: &str,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<u64> {
        let on_duplicate = self::on_duplicate(py, on_duplicate)?;
        let other = &store.get().core;
        self.watched(py, progress, |core| core.merge(other, on_duplicate))
    }

    /// Stage deletions; all or none of a call. Returns how many documents it takes away.
    #[pyo3(signature = (ids, *, progress=None))]
    fn delete(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let ids = ids::many(ids, self.id_type(py)?)?;
        self.watched(py, progress, |core| core.delete(&ids))
    }

    /// Make everything staged the next generation and return its number; the writer stays open.
    #[pyo3(signature = (*, progress=None))]
    fn commit(&self, py: Python<'_>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        self.watched(py, progress, |core| core.commit())
    }

    /// Take what died out of the files and join segments, as a new generation; returns its number.
    #[pyo3(signature = (*, progress=None))]
    fn compact(&self, py: Python<'_>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        self.watched(py, progress, |core| core.compact())
    }

    /// Build the BM25 index anew from kept text, as a new generation; returns its number.
    #[pyo3(signature = (*, progress=None))]
    fn reindex(&self, py: Python<'_>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<u64> {
        self.watched(py, progress, |core| core.reindex())
    }

    /// Go back to what the generation before held, as a new generation; returns its number.
    fn rollback(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(py, |core| core.rollback())
    }

    /// Forget everything staged, and close the writer.
    fn discard(&self, py: Python<'_>) -> PyResult<()> {
        self.close(py, DISCARDED)
    }

    fn __enter__<'py>(slf: Bound<'py, Self>) -> PyResult<Bound<'py, Self>> {
        slf.get().with(slf.py(), |core| core.spec().map(|_| ()))?;
        Ok(slf)
    }

    #[pyo3(signature = (exc_type, exc, traceback))]
    fn __exit__(
        &self,
        py: Python<'_>,
        exc_type: Option<&Bound<'_, PyType>>,
        exc: Option<&Bound<'_, PyAny>>,
        traceback: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let _ = (exc, traceback);
        if exc_type.is_some() {
            // The exception is what the caller must hear of.
            let _ = self.close(py, LEFT);
            return Ok(());
        }
        let open = py.detach(|| Ok(matches!(&*self.state()?, State::Open(_))));
        // Discarded within the block, there is nothing to commit.
        let committed = match open.or_raise(py)? {
            true => self.watched(py, None, |core| core.commit().map(|_| ())),
            false => Ok(()),
        };
        let closed = self.close(py, LEFT);
        committed.and(closed)
    }

    fn __repr__(&self, py: Python<'_>) -> PyResult<String> {
        let path = self.path.as_os_str().into_pyobject(py)?.repr()?;
        let open = py.detach(|| match self.state().as_deref() {
            Ok(State::Open(core)) => !core.is_closed(),
            Err(Error::InvalidInput(_)) => true, // at work
            _ => false,
        });
        let state = if open { "open" } else { "closed" };
        Ok(format!("<Writer {path}: {state}>"))
    }
}

impl Writer {
    fn id_type(&self, py: Python<'_>) -> PyResult<IdType> {
        self.with(py, |core| Ok(core.spec()?.id_type))
    }

    fn close(&self, py: Python<'_>, reason: &'static str) -> PyResult<()> {
        let closed = py.detach(|| {
            let mut state = self.state()?;
            if let State::Open(_) = &*state {
                *state = State::Closed(reason); // which drops the core's writer, and so discards
            }
            Ok(())
        });
        closed.or_raise(py)
    }
}
