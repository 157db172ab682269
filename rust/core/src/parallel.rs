//! The same work for many items, on all processors.
//!
//! The threads live as long as one call: a pool that was started before a fork would have none in the
//! child, and calls would wait for it for ever.

use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, available_parallelism};

use crate::error::Result;

/// Below this many, starting threads is not worth it.
const FEW: usize = 4;

/// `work` for each item, in the order of the items; the error is that of the first item that has one.
pub fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let threads = available_parallelism().map_or(1, NonZero::get);
    in_threads(items, threads.min(items.len() / FEW), work)
}

fn in_threads<T: Sync, R: Send>(
    items: &[T],
    threads: usize,
    work: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    if threads < 2 {
        return items.iter().map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let share = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else {
                return done;
            };
            let result = work(item);
            if result.is_err() {
                // What was taken before is finished; nothing more need be.
                next.store(items.len(), Ordering::Relaxed);
            }
            done.push((at, result));
        }
    };
    let mut done = thread::scope(|scope| {
        // A thread that cannot be had leaves its share to the others.
        let others: Vec<_> = (1..threads)
            .map_while(|_| thread::Builder::new().spawn_scoped(scope, share).ok())
            .collect();
        let mut done = share();
        for other in others {
            match other.join() {
                Ok(part) => done.extend(part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

    use std::collections::HashSet;
    use std::sync::{Barrier, Mutex};

    use super::*;
    use crate::error::Error;

    #[test]
    fn results_are_in_the_order_of_the_items() {
        for n in [0, 1, 3, 4, 5, 8, 1_000] {
            let items: Vec<usize> = (0..n).collect();
            let expected: Vec<usize> = (0..n).map(|i| i * i).collect();
            for threads in [0, 1, 2, 7] {
                assert_eq!(
                    in_threads(&items, threads, |i| Ok(i * i)).unwrap(),
                    expected
                );
            }
            assert_eq!(in_parallel(&items, |i| Ok(i * i)).unwrap(), expected);
        }
    }

    #[test]
    fn the_error_is_that_of_the_first_item_with_one() {
        let items: Vec<usize> = (0..500).collect();
        for threads in [1, 2, 8] {
            for _ in 0..50 {
                let result = in_threads(&items, threads, |i| match i {
                    17 | 18 | 19 | 400 => Err(Error::invalid(i.to_string())),
                    _ => Ok(*i),
                });
                assert_eq!(result.unwrap_err().to_string(), "17");
            }
        }
    }

    #[test]
    fn threads_share_the_work() {
        let (meeting, seen) = (Barrier::new(3), Mutex::new(HashSet::new()));
        in_threads(&[(); 3], 3, |()| {
            seen.lock().unwrap().insert(thread::current().id());
            meeting.wait(); // each item needs a thread of its own
            Ok(())
        })
        .unwrap();
        assert_eq!(seen.into_inner().unwrap().len(), 3);
    }
}
