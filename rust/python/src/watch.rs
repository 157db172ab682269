//! A watch over long work of the core: signals are heard and a callable is told while it runs.

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use polyprag_core::Watch;
use pyo3::prelude::*;

use crate::errors::{OrRaise, invalid};
use crate::ids::shown;

/// How often Python is asked while the core works.
const PERIOD: Duration = Duration::from_millis(50);

/// Asks Python now and then. Signals reach the main thread alone; for other threads that does nothing.
#[derive(Debug)]
pub struct Asking {
    progress: Option<Py<PyAny>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    asked: Option<Instant>,
    raised: Option<PyErr>,
}

impl Asking {
    /// `progress` is the argument of a method, called with what is done and of how much.
    pub fn new(progress: Option<&Bound<'_, PyAny>>) -> PyResult<Arc<Self>> {
        if let Some(other) = progress.filter(|progress| !progress.is_callable()) {
            let found = shown(other);
            let message = format!("progress: expected a callable or None, got {found}");
            return Err(invalid(other.py(), message));
        }
        Ok(Arc::new(Self {
            progress: progress.map(|progress| progress.clone().unbind()),
            state: Mutex::default(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self, py: Python<'_>, done: u64, total: u64) -> PyResult<()> {
        py.check_signals()?;
        if let Some(progress) = &self.progress {
            progress.call1(py, (done, total))?;
        }
        Ok(())
    }

    /// What the work gave, or what Python raised meanwhile: that is why the work failed.
    pub fn outcome<T>(&self, py: Python<'_>, result: polyprag_core::Result<T>) -> PyResult<T> {
        match self.state().raised.take() {
            Some(raised) => Err(raised),
            None => result.or_raise(py),
        }
    }
}

impl Watch for Asking {
    fn at(&self, done: u64, total: u64) -> ControlFlow<()> {
        let asked = self.state().asked;
        // The end is always told.
        if done < total && asked.is_some_and(|asked| asked.elapsed() < PERIOD) {
            return ControlFlow::Continue(());
        }
        // Nothing is held meanwhile. At the end of the interpreter there is nobody to ask.
        let answer = Python::try_attach(|py| self.ask(py, done, total));
        let mut state = self.state();
        state.asked = Some(Instant::now());
        match answer {
            None | Some(Ok(())) => ControlFlow::Continue(()),
            Some(Err(raised)) => {
                state.raised = Some(raised);
                ControlFlow::Break(())
            }
        }
    }
}
