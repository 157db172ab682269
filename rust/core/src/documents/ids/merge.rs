//! Going through several segments in order of their ids, with a few thousand ids of each in memory.

use std::cmp::Ordering;

use crate::documents::DocumentId;
use crate::documents::ids::chunk::wide;
use crate::documents::ids::segment::{Forward, IdSegment, Keys, Order};
use crate::documents::ids::space::{Form, KeptKey, Key, Space, Translation, compare};
use crate::error::Result;

/// Ids that a cursor fetches at once: many fetches in a row overlap their waits for memory.
const BATCH: u64 = 1024;

/// The space of all ids of these segments.
pub(super) fn common_space(segments: &[&IdSegment]) -> Space {
    segments
        .iter()
        .filter(|s| s.rows() > 0)
        .map(|s| s.space().clone())
        .reduce(|a, b| a.union(&b))
        .or_else(|| segments.first().map(|s| s.space().clone()))
        .unwrap_or(Space::Text)
}

/// Calls `found` with the docnos, ascending, of each id that occurs more than once among the segments.
pub fn duplicates(
    segments: &[&IdSegment],
    found: &mut dyn FnMut(&DocumentId, &[u64]) -> Result<()>,
) -> Result<()> {
    let space = common_space(segments);
    let mut group: Vec<(usize, u64)> = Vec::new();
    let mut end = |group: &[(usize, u64)]| {
        let [(first, row), _, ..] = group else {
            return Ok(());
        };
        let Some(segment) = segments.get(*first) else {
            return Ok(());
        };
        let id = segment.id_of_row(*row)?;
        let mut docnos = Vec::with_capacity(group.len());
        for (i, row) in group {
            if let Some(segment) = segments.get(*i) {
                docnos.push(segment.docno(*row)?);
            }
        }
        docnos.sort_unstable();
        found(&id, &docnos)
    };
    for cluster in clusters(segments, &space)? {
        if let [only] = cluster.as_slice()
            && segments.get(*only).is_some_and(|s| s.ascends())
        {
            continue;
        }
        in_order(segments, &cluster, &space, &mut |i, row, again| {
            if !again {
                end(&group)?;
                group.clear();
            }
            group.push((i, row));
            Ok(())
        })?;
        end(&group)?;
        group.clear();
    }
    Ok(())
}

/// The segments in clusters whose ids lie in ranges that do not overlap, in order of the ranges.
pub(super) fn clusters(segments: &[&IdSegment], space: &Space) -> Result<Vec<Vec<usize>>> {
    let mut ranges = Vec::new();
    for (i, segment) in segments.iter().enumerate() {
        let Some(last) = segment.rows().checked_sub(1) else {
            continue;
        };
        let mut ends = [KeptKey::default(), KeptKey::default()];
        for (rank, end) in [0, last].into_iter().zip(&mut ends) {
            let mut translation = Translation::new(segment.space(), space);
            let (mut read, mut translated) = (Vec::new(), Vec::new());
            let row = segment.order()?.get(rank);
            let key = row.zip(Some(segment.keys()?)).and_then(|(row, keys)| {
                let key = keys.get(row, &mut read)?;
                translation.apply(key, &mut translated)
            });
            end.set(key.ok_or_else(|| segment.broken("order"))?);
        }
        let [min, max] = ends;
        ranges.push((min, max, i));
    }
    ranges.sort_by(|a, b| (a.0.get(), a.2).cmp(&(b.0.get(), b.2)));
    let mut clusters: Vec<Vec<usize>> = Vec::new();
    let mut end: Option<KeptKey> = None;
    for (min, max, i) in ranges {
        match clusters.last_mut() {
            Some(cluster) if end.as_ref().is_some_and(|end| end.get() >= min.get()) => {
                cluster.push(i);
            }
            _ => clusters.push(vec![i]),
        }
        if end.as_ref().is_none_or(|end| end.get() < max.get()) {
            end = Some(max);
        }
    }
    // Of equal ids, those of earlier segments come first.
    clusters.iter_mut().for_each(|c| c.sort_unstable());
    Ok(clusters)
}

/// What is told of each id: the segment, the row, and whether the id is that of the call before.
pub(super) type Visit<'v> = dyn FnMut(usize, u64, bool) -> Result<()> + 'v;

/// Visits all rows of the segments of a cluster in order of (id, segment, row).
pub(super) fn in_order(
    segments: &[&IdSegment],
    cluster: &[usize],
    space: &Space,
    visit: &mut Visit<'_>,
) -> Result<()> {
    match space.form() {
        Form::Number => merge::<Vec<u64>>(segments, cluster, space, visit),
        Form::Packed(width) if width <= 16 => merge::<Vec<u128>>(segments, cluster, space, visit),
        Form::Packed(_) | Form::Text => merge::<ByteKeys>(segments, cluster, space, visit),
    }
}

/// A batch of keys of one form.
trait Batch: Default {
    /// Decides most comparisons.
    type Head: Ord + Copy + Default;

    fn clear(&mut self);
    fn push(&mut self, key: Key<'_>);
    fn len(&self) -> usize;
    fn head(&self, i: usize) -> Self::Head;
    /// Keys whose heads are equal.
    fn compare(&self, i: usize, other: &Self, j: usize) -> Ordering;
    /// Keeps a key, and says how the one that was kept before compares with it.
    fn keep(&self, i: usize, kept: &mut Option<Self::Head>, bytes: &mut Vec<u8>) -> Ordering;
}

macro_rules! batch_of_numbers {
    ($number:ty, $of:expr) => {
        impl Batch for Vec<$number> {
            type Head = $number;

            fn clear(&mut self) {
                self.clear();
            }

            #[inline]
            fn push(&mut self, key: Key<'_>) {
                self.push($of(key));
            }

            fn len(&self) -> usize {
                self.len()
            }

            #[inline]
            fn head(&self, i: usize) -> $number {
                self.get(i).copied().unwrap_or_default()
            }

            #[inline]
            fn compare(&self, _: usize, _: &Self, _: usize) -> Ordering {
                Ordering::Equal
            }

            #[inline]
            fn keep(&self, i: usize, kept: &mut Option<$number>, _: &mut Vec<u8>) -> Ordering {
                let head = Some(self.head(i));
                std::mem::replace(kept, head).cmp(&head)
            }
        }
    };
}

batch_of_numbers!(u64, |key| match key {
    Key::Number(n) => n,
    Key::Bytes(_) => 0,
});
batch_of_numbers!(u128, |key| match key {
    Key::Number(n) => u128::from(n),
    Key::Bytes(value) => wide(value),
});

#[derive(Debug, Default)]
struct ByteKeys {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl ByteKeys {
    #[inline]
    fn get(&self, i: usize) -> &[u8] {
        let start = i.checked_sub(1).and_then(|before| self.ends.get(before));
        let (start, end) = (start.copied().unwrap_or(0), self.ends.get(i).copied());
        self.bytes
            .get(start..end.unwrap_or(start))
            .unwrap_or_default()
    }
}

impl Batch for ByteKeys {
    type Head = u128;

    fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    fn push(&mut self, key: Key<'_>) {
        if let Key::Bytes(key) = key {
            self.bytes.extend_from_slice(key);
        }
        self.ends.push(self.bytes.len());
    }

    fn len(&self) -> usize {
        self.ends.len()
    }

    /// The length and the first 14 bytes.
    #[inline]
    fn head(&self, i: usize) -> u128 {
        let key = self.get(i);
        let mut word = [0; 16];
        for (to, from) in word.iter_mut().skip(2).zip(key) {
            *to = *from;
        }
        (key.len() as u128) << 112 | u128::from_be_bytes(word)
    }

    #[inline]
    fn compare(&self, i: usize, other: &Self, j: usize) -> Ordering {
        compare(self.get(i), other.get(j))
    }

    #[inline]
    fn keep(&self, i: usize, kept: &mut Option<u128>, bytes: &mut Vec<u8>) -> Ordering {
        let head = Some(self.head(i));
        let key = self.get(i);
        let order = std::mem::replace(kept, head).cmp(&head);
        let order = order.then_with(|| compare(bytes, key));
        if order != Ordering::Equal {
            bytes.clear();
            bytes.extend_from_slice(key);
        }
        order
    }
}

/// A segment on its way through the order of its ids.
struct Cursor<'s, B> {
    index: usize,
    segment: &'s IdSegment,
    keys: Keys<'s>,
    order: Order<'s>,
    forward: Option<Forward<'s>>,
    translation: Translation<'s>,
    /// The rank after those fetched.
    rank: u64,
    rows: Vec<u64>,
    batch: B,
    at: usize,
}

impl<'s, B: Batch> Cursor<'s, B> {
    fn new(index: usize, segment: &'s IdSegment, space: &'s Space) -> Result<Self> {
        let keys = segment.keys()?;
        let mut cursor = Self {
            index,
            segment,
            keys,
            order: segment.order()?,
            forward: segment.ascends().then(|| Forward::new(keys)),
            translation: Translation::new(segment.space(), space),
            rank: 0,
            rows: Vec::new(),
            batch: B::default(),
            at: 0,
        };
        cursor.fetch()?;
        Ok(cursor)
    }

    fn fetch(&mut self) -> Result<()> {
        self.at = 0;
        self.rows.clear();
        self.batch.clear();
        let end = self.segment.rows().min(self.rank + BATCH);
        for rank in self.rank..end {
            let row = self.order.get(rank);
            self.rows
                .push(row.ok_or_else(|| self.segment.broken("order"))?);
        }
        self.rank = end;
        let (mut read, mut translated) = (Vec::new(), Vec::new());
        for row in &self.rows {
            let key = match &mut self.forward {
                Some(forward) => forward.next().ok().flatten(),
                None => self.keys.get(*row, &mut read),
            };
            let key = key.and_then(|key| self.translation.apply(key, &mut translated));
            self.batch
                .push(key.ok_or_else(|| self.segment.broken("ids"))?);
        }
        Ok(())
    }

    #[inline]
    fn advance(&mut self) -> Result<()> {
        self.at += 1;
        if self.at >= self.batch.len() && self.rank < self.segment.rows() {
            self.fetch()?;
        }
        Ok(())
    }
}

/// A cursor in the tree of losers; those that are done come last.
#[derive(Debug, Clone, Copy, Default)]
struct Player<H> {
    done: bool,
    head: H,
    cursor: usize,
}

fn player<B: Batch>(cursors: &[Cursor<'_, B>], cursor: usize) -> Player<B::Head> {
    match cursors.get(cursor) {
        Some(c) if c.at < c.batch.len() => Player {
            done: false,
            head: c.batch.head(c.at),
            cursor,
        },
        _ => Player {
            done: true,
            head: B::Head::default(),
            cursor,
        },
    }
}

#[inline]
fn before<B: Batch>(cursors: &[Cursor<'_, B>], a: &Player<B::Head>, b: &Player<B::Head>) -> bool {
    match (a.done, a.head).cmp(&(b.done, b.head)) {
        Ordering::Less => true,
        Ordering::Greater => false,
        Ordering::Equal => {
            let keys = match (cursors.get(a.cursor), cursors.get(b.cursor)) {
                (Some(a), Some(b)) if a.at < a.batch.len() => a.batch.compare(a.at, &b.batch, b.at),
                _ => Ordering::Equal,
            };
            keys.then(a.cursor.cmp(&b.cursor)) == Ordering::Less
        }
    }
}

fn merge<B: Batch>(
    segments: &[&IdSegment],
    cluster: &[usize],
    space: &Space,
    visit: &mut Visit<'_>,
) -> Result<()> {
    let mut cursors = Vec::with_capacity(cluster.len());
    for index in cluster {
        if let Some(segment) = segments.get(*index) {
            cursors.push(Cursor::<B>::new(*index, segment, space)?);
        }
    }
    // A tournament: each inner node keeps the loser of its match, so that the next winner is found by
    // playing only the matches of the last one again. Node 1 is the final; cursor i plays first at (n + i) / 2.
    let n = cursors.len();
    let mut winners: Vec<Player<B::Head>> = vec![Player::default(); n];
    winners.extend((0..n).map(|i| player(&cursors, i)));
    let mut losers = vec![Player::default(); n];
    for node in (1..n).rev() {
        let (Some(a), Some(b)) = (winners.get(2 * node), winners.get(2 * node + 1)) else {
            continue;
        };
        let (winner, loser) = match before(&cursors, a, b) {
            true => (*a, *b),
            false => (*b, *a),
        };
        if let (Some(w), Some(l)) = (winners.get_mut(node), losers.get_mut(node)) {
            (*w, *l) = (winner, loser);
        }
    }
    let Some(mut winner) = winners.get(1).copied() else {
        return Ok(());
    };
    let (mut kept, mut bytes) = (None, Vec::new());
    let mut place = (0, 0);
    while !winner.done {
        let Some(cursor) = cursors.get_mut(winner.cursor) else {
            break;
        };
        let row = cursor.rows.get(cursor.at).copied().unwrap_or_default();
        let here = (cursor.index, row);
        // Strictly ascending in all, no row comes twice: with as many as there are, none is left out.
        let again = match cursor.batch.keep(cursor.at, &mut kept, &mut bytes) {
            Ordering::Less => false,
            Ordering::Equal if place < here => true,
            _ => return Err(cursor.segment.broken("order")),
        };
        place = here;
        visit(cursor.index, row, again)?;
        cursor.advance()?;
        winner = player(&cursors, winner.cursor);
        let mut node = (n + winner.cursor) / 2;
        while node > 0 {
            if let Some(loser) = losers.get_mut(node)
                && before(&cursors, loser, &winner)
            {
                std::mem::swap(loser, &mut winner);
            }
            node /= 2;
        }
    }
    Ok(())
}
