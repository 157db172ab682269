//! Waiting for the threads of Tantivy, with a watch over them.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::Duration;

use super::directory::StoreDirectory;
use crate::error::Result;
use crate::watch::Progress;

/// How often the watch is told while Tantivy works.
const PERIOD: Duration = Duration::from_millis(20);

/// What is told while Tantivy works, and what its work counts for when it is done.
#[derive(Debug, Clone, Copy)]
pub struct Meanwhile<'p> {
    pub progress: &'p Progress,
    pub worth: u64,
}

impl Meanwhile<'_> {
    /// Counts the work, or says why it failed.
    pub(super) fn end(self, outcome: Result<()>) -> Result<()> {
        self.progress.blame(outcome)?;
        self.progress.add(self.worth)
    }
}

/// Waits for one piece of work after the other.
pub(super) struct Wait<'w> {
    directory: &'w StoreDirectory,
    meanwhile: Meanwhile<'w>,
    /// What had been written before, and what there is to merge.
    before: u64,
    expected: u64,
}

impl<'w> Wait<'w> {
    pub fn new(directory: &'w StoreDirectory, meanwhile: Meanwhile<'w>) -> Self {
        Self {
            directory,
            meanwhile,
            before: directory.written(),
            expected: directory.bytes(),
        }
    }

    /// Its outcome. Work that is stopped fails at its next write, and is waited for until it has.
    pub fn until<T>(&self, work: impl Future<Output = tantivy::Result<T>>) -> tantivy::Result<T> {
        let waker = Waker::from(Arc::new(Unpark(thread::current())));
        let mut context = Context::from_waker(&waker);
        let mut work = pin!(work);
        loop {
            if self.meanwhile.progress.tell(self.ahead()).is_err() {
                self.directory.stop();
            }
            if let Poll::Ready(outcome) = work.as_mut().poll(&mut context) {
                return outcome;
            }
            thread::park_timeout(PERIOD);
        }
    }

    /// A share of the worth, by what was written of what there is.
    fn ahead(&self) -> u64 {
        let written = self.directory.written().saturating_sub(self.before);
        let share = written as f64 / self.expected.max(1) as f64;
        (self.meanwhile.worth as f64 * share.min(1.0)) as u64
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
