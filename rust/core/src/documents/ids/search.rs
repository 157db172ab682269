//! Finding a key in the order of ids.

use crate::documents::ids::segment::{Keys, Order};
use crate::documents::ids::space::Key;

/// From so many ranks on, guesses save waits for memory.
const NARROW: u64 = 16;
/// Where ids are spread evenly a few guesses are enough; where they are not, halving is left with the rest.
const MAX_GUESSES: u32 = 12;

/// How many of the rows, in order of their ids, have no greater key; `None` if something is broken.
pub(super) fn count_up_to(
    keys: &Keys<'_>,
    order: &Order<'_>,
    rows: u64,
    key: Key<'_>,
) -> Option<u64> {
    let mut buffer = Vec::new();
    // Whether the key of a rank is greater, and about where it lies.
    let mut look = |rank| {
        let found = keys.get(order.get(rank)?, &mut buffer)?;
        Some((found > key, place(found)))
    };
    // The answer is from low to high.
    let (mut low, mut high) = (0, rows);
    if let Keys::Text(texts) = keys {
        // The first string of a block is read at once: in ids that ascend, those come first.
        let step = texts.block.max(1);
        while high - low >= 2 * step {
            let middle = low + (high - low) / 2;
            let middle = middle - (middle - low) % step;
            match look(middle)?.0 {
                true => high = middle,
                false => low = middle,
            }
        }
    } else if rows > NARROW {
        let ((below_all, mut low_place), (inside, mut high_place)) = (look(0)?, look(rows - 1)?);
        if below_all || !inside {
            return Some(if below_all { 0 } else { rows });
        }
        (low, high) = (1, rows - 1);
        for _ in 0..MAX_GUESSES {
            if high - low <= NARROW {
                break;
            }
            let part = place(key).saturating_sub(low_place) as f64
                / high_place.saturating_sub(low_place).max(1) as f64;
            let steps = (part * (high - low + 1) as f64) as u64;
            let guess = (low - 1).saturating_add(steps).clamp(low, high - 1);
            match look(guess)? {
                (true, place) => (high, high_place) = (guess, place),
                (false, place) => (low, low_place) = (guess + 1, place),
            }
        }
    }
    while low < high {
        let middle = low + (high - low) / 2;
        match look(middle)?.0 {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    Some(low)
}

/// A number that is not smaller for a greater key of one length.
fn place(key: Key<'_>) -> u64 {
    match key {
        Key::Number(n) => n,
        Key::Bytes(bytes) => {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(bytes) {
                *to = *from;
            }
            u64::from_be_bytes(word)
        }
    }
}
