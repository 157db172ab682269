//! The ids of the documents: docno to id by row, id to docno by the order of the ids.
//!
//! A [`IdsChunk`] gathers ids in memory and writes them as one [`IdSegment`]; [`join_ids`] makes one segment of
//! many, and [`duplicates`] finds the ids that occur more than once, both in bounded memory.

mod bits;
mod chunk;
mod join;
mod merge;
mod numbers;
mod search;
mod segment;
mod space;
mod template;
#[cfg(test)]
mod tests;
mod text;
#[cfg(test)]
mod times;

pub use chunk::IdsChunk;
pub use join::{join_and_find, join_ids};
pub use merge::duplicates;
pub use segment::IdSegment;
