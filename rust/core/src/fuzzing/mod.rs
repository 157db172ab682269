//! What the fuzz targets run, and the tests that replay their corpus: each function reads a part, or another
//! file of a store, from bytes that anybody may have made. It must come back, whatever the bytes; what the
//! reader accepts must agree with itself, which is asserted. It returns whether it was accepted.
//!
//! The first byte of an input says how the rest becomes a file ([`input`]): checksums and lengths that a
//! mutation breaks are put right again, for otherwise nothing behind them would ever be reached.

mod codecs;
mod documents;
mod input;
mod packed;
mod routes;
mod store;
mod tensors;

pub use codecs::codecs;
pub use documents::{dead, documents, ids};
pub use packed::packed;
pub use routes::{routes, scales};
pub use store::{current, manifest};
pub use tensors::{decoder, experts, router};

/// A target by its name, which is also that of its folder in the corpus.
pub type Target = (&'static str, fn(&[u8]) -> bool);

pub const TARGETS: [Target; 12] = [
    ("codecs", codecs),
    ("current", current),
    ("dead", dead),
    ("decoder", decoder),
    ("documents", documents),
    ("experts", experts),
    ("ids", ids),
    ("manifest", manifest),
    ("packed", packed),
    ("router", router),
    ("routes", routes),
    ("scales", scales),
];

/// A range of so many is short.
const WHOLE: u64 = 128;

const BETWEEN: u64 = 16;

/// Numbers of a range to try: all of a short one; of a long one its ends and some between. Then some outside.
fn sample(first: u64, end: u64) -> impl Iterator<Item = u64> {
    let count = end.saturating_sub(first);
    let step = count / BETWEEN;
    let (whole, between) = match count <= WHOLE {
        true => (first..end, 0),
        false => (first..first.saturating_add(WHOLE / 4), BETWEEN),
    };
    let last = end.saturating_sub(WHOLE / 8).max(whole.end)..end;
    let between = (0..between).map(move |i| first.saturating_add(step.saturating_mul(i)));
    let outside = [first.wrapping_sub(1), end, u64::MAX, 0];
    let outside = outside
        .into_iter()
        .filter(move |n| !(first..end).contains(n));
    whole.chain(between).chain(last).chain(outside)
}
