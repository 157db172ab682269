//! Long work says how far it is, and can be stopped.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, ThreadId};

use crate::error::{Error, Result};

/// Hears of long work and may stop it. A watch is asked often, so it must be quick, or answer most calls unseen.
pub trait Watch: fmt::Debug + Send + Sync {
    /// `done` of `total` are done: what is counted, the method that works says. `done` never goes back, and the
    /// last call of work that ends well has `done == total`. `total` is 0 while it is not known.
    ///
    /// Only the thread that asked for the work calls this. After `Break` the work ends with
    /// [`Error::Interrupted`], as it does where anything else fails: nothing of it is committed.
    fn at(&self, done: u64, total: u64) -> ControlFlow<()>;
}

/// Lets everything go on.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unwatched;

impl Watch for Unwatched {
    fn at(&self, _: u64, _: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// What work counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Documents,
    Questions,
}

impl Unit {
    /// So many take some milliseconds.
    fn step(self) -> u64 {
        match self {
            Unit::Bytes => 1 << 20,
            Unit::Documents => 256,
            Unit::Questions => 1,
        }
    }
}

/// How far one piece of work is. Its threads share it; all of them end soon after it was stopped.
#[derive(Debug)]
pub struct Progress {
    watch: Arc<dyn Watch>,
    caller: ThreadId,
    total: AtomicU64,
    done: AtomicU64,
    /// What the watch was told, and from where on it is told again.
    told: AtomicU64,
    due: AtomicU64,
    most: u64,
    /// Whether the watch is asked but shown no way made.
    aside: bool,
    stopped: AtomicBool,
    ended: AtomicBool,
}

impl Progress {
    /// Tells the watch that nothing is done yet.
    pub fn begin(watch: &Arc<dyn Watch>, unit: Unit, total: u64) -> Result<Self> {
        let progress = Self {
            watch: Arc::clone(watch),
            caller: thread::current().id(),
            total: AtomicU64::new(total),
            done: AtomicU64::new(0),
            told: AtomicU64::new(0),
            due: AtomicU64::new(0),
            most: unit.step(),
            aside: false,
            stopped: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        };
        progress.tell(0)?;
        Ok(progress)
    }

    /// For work of which nobody needs to hear.
    pub fn unseen() -> Self {
        Self {
            watch: Arc::new(Unwatched),
            caller: thread::current().id(),
            total: AtomicU64::new(0),
            done: AtomicU64::new(0),
            told: AtomicU64::new(0),
            due: AtomicU64::new(u64::MAX),
            most: u64::MAX,
            aside: false,
            stopped: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        }
    }

    /// For work on the way that the total leaves out: it can be stopped, and counts nothing.
    pub fn aside(&self) -> Self {
        let told = self.told.load(Ordering::Relaxed);
        Self {
            watch: Arc::clone(&self.watch),
            caller: self.caller,
            total: AtomicU64::new(self.total.load(Ordering::Relaxed)),
            done: AtomicU64::new(0),
            told: AtomicU64::new(told),
            due: AtomicU64::new(0),
            most: self.most,
            aside: true,
            stopped: AtomicBool::new(self.is_stopped()),
            ended: AtomicBool::new(false),
        }
    }

    /// The total, where it was not known at the beginning.
    pub fn set_total(&self, total: u64) -> Result<()> {
        self.total.store(total, Ordering::Relaxed);
        self.tell(0)
    }

    /// `n` more are done.
    #[inline]
    pub fn add(&self, n: u64) -> Result<()> {
        // Relaxed: numbers for a bar, and a flag that may be seen a little later.
        let before = self.done.fetch_add(n, Ordering::Relaxed);
        match before.saturating_add(n) >= self.due.load(Ordering::Relaxed) || self.is_stopped() {
            true => self.tell(0),
            false => Ok(()),
        }
    }

    /// Tells the watch at once: `ahead` more than are counted are done.
    pub fn tell(&self, ahead: u64) -> Result<()> {
        if self.is_stopped() {
            return Err(Error::Interrupted);
        }
        if thread::current().id() != self.caller || self.ended.load(Ordering::Relaxed) {
            return Ok(());
        }
        let total = self.total.load(Ordering::Relaxed);
        let done = self.done.load(Ordering::Relaxed);
        let step = (total / 1024).clamp(1, self.most);
        self.due.store(done.saturating_add(step), Ordering::Relaxed);
        // A total is counted beforehand, and may be a little less than comes.
        let shown = match self.aside {
            true => 0,
            false => done.saturating_add(ahead).min(total),
        };
        let shown = self.told.fetch_max(shown, Ordering::Relaxed).max(shown);
        match self.watch.at(shown, total) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => {
                self.stopped.store(true, Ordering::Relaxed);
                Err(Error::Interrupted)
            }
        }
    }

    /// All is done, but for what cannot be taken back: the last moment to stop. After it the watch is asked no more.
    pub fn end(&self) -> Result<()> {
        let total = self.total.load(Ordering::Relaxed);
        self.tell(total)?;
        self.ended.store(true, Ordering::Relaxed);
        Ok(())
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// What failed because the work was stopped says so, whatever was made of it on the way up.
    pub fn blame<T>(&self, result: Result<T>) -> Result<T> {
        match self.is_stopped() {
            true => result.map_err(|_| Error::Interrupted),
            false => result,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::sync::Mutex;

    use super::*;
    use crate::parallel::in_parallel;

    #[derive(Debug, Default)]
    struct Notes {
        seen: Mutex<Vec<(u64, u64, ThreadId)>>,
        stop_at: Option<u64>,
    }

    impl Watch for Notes {
        fn at(&self, done: u64, total: u64) -> ControlFlow<()> {
            let here = thread::current().id();
            self.seen.lock().unwrap().push((done, total, here));
            match self.stop_at.is_some_and(|stop| done >= stop) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        }
    }

    fn watched(stop_at: Option<u64>) -> (Arc<Notes>, Arc<dyn Watch>) {
        let notes = Arc::new(Notes {
            stop_at,
            ..Notes::default()
        });
        (Arc::clone(&notes), notes)
    }

    #[test]
    fn it_is_told_seldom_in_order_and_up_to_the_total() {
        let (notes, watch) = watched(None);
        let progress = Progress::begin(&watch, Unit::Documents, 1_000_000).unwrap();
        for _ in 0..1_100_000 {
            progress.add(1).unwrap();
        }
        progress.end().unwrap();
        let seen = notes.seen.lock().unwrap();
        assert!(seen.is_sorted_by_key(|s| s.0));
        assert_eq!(seen.first().map(|s| (s.0, s.1)), Some((0, 1_000_000)));
        assert_eq!(seen.last().map(|s| s.0), Some(1_000_000));
        assert!((3_000..6_000).contains(&seen.len()), "{}", seen.len());
    }

    #[test]
    fn what_is_ahead_is_shown_and_not_counted() {
        let (notes, watch) = watched(None);
        let progress = Progress::begin(&watch, Unit::Bytes, 100).unwrap();
        progress.tell(40).unwrap();
        progress.add(10).unwrap();
        progress.add(50).unwrap();
        let seen: Vec<u64> = notes.seen.lock().unwrap().iter().map(|s| s.0).collect();
        assert_eq!(seen, [0, 40, 40, 60]);
    }

    #[test]
    fn threads_count_and_stop_but_only_the_caller_tells() {
        let (notes, watch) = watched(None);
        let items: Vec<u64> = (0..5_000).collect();
        let progress = Progress::begin(&watch, Unit::Questions, 5_000).unwrap();
        in_parallel(&items, |_| progress.add(1)).unwrap();
        progress.end().unwrap();
        let here = thread::current().id();
        let seen = notes.seen.lock().unwrap();
        assert!(seen.iter().all(|(_, _, thread)| *thread == here));
        assert_eq!(seen.last().map(|s| s.0), Some(5_000));

        let (_, watch) = watched(Some(1_000));
        let progress = Progress::begin(&watch, Unit::Questions, 5_000).unwrap();
        let stopped = in_parallel(&items, |_| progress.add(1));
        // Where the other threads took everything, this one hears of it at the end.
        let stopped = stopped.and_then(|_| progress.end());
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert!(matches!(progress.add(0), Err(Error::Interrupted)));
        let other: Result<()> = Err(Error::invalid("other"));
        assert!(matches!(progress.blame(other), Err(Error::Interrupted)));
    }
}
