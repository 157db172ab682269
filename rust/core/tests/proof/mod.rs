//! What the proofs of reading share: stores with something of everything in them, all that can be asked of a
//! store, files that are sealed again after they were altered, and children in which a signal is told.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod answers;
pub mod children;
pub mod memory;
pub mod sealed;
pub mod zoo;

/// How many cores there are.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}
