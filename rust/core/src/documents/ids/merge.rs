//! Going through several segments in order of their ids, with a few thousand ids of each in memory.

use std::cmp::Ordering;

use crate::documents::DocumentId;
use crate::documents::ids::chunk::wide;
use crate::documents::ids::segment::{Forward, IdSegment, Keys, Order};
use crate::documents::ids::space::{Form, KeptKey, Key, Space, Translation, compare};
use crate::error::Result;
use crate::watch::Progress;

/// Ids that a cursor fetches at once: many fetches in a row overlap their waits for memory.
const BATCH: u64 = 2048;

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
    progress: &Progress,
    found: &mut Found<'_>,
) -> Result<()> {
    let space = common_space(segments);
    let mut repeats = Repeats::new(segments, found);
    for cluster in clusters(segments, &space)? {
        if let [only] = cluster.as_slice()
            && let Some(segment) = segments.get(*only)
            && segment.ascends()
        {
            progress.add(segment.rows())?;
            continue;
        }
        in_order(
            segments,
            &cluster,
            &space,
            progress,
            &mut |i, row, again| repeats.add(i, row, again),
        )?;
    }
    repeats.end()
}

/// What is told of an id that occurs more than once: its docnos, ascending.
pub type Found<'f> = dyn FnMut(&DocumentId, &[u64]) -> Result<()> + 'f;

/// Gathers the rows of one id after another.
pub(super) struct Repeats<'r, 'f> {
    segments: &'r [&'r IdSegment],
    found: &'r mut Found<'f>,
    rows: Vec<(usize, u64)>,
}

impl<'r, 'f> Repeats<'r, 'f> {
    pub fn new(segments: &'r [&'r IdSegment], found: &'r mut Found<'f>) -> Self {
        let rows = Vec::new();
        Self {
            segments,
            found,
            rows,
        }
    }

    #[inline]
    pub fn add(&mut self, segment: usize, row: u64, again: bool) -> Result<()> {
        if !again {
            self.end()?;
        }
        self.rows.push((segment, row));
        Ok(())
    }

    #[inline]
    pub fn end(&mut self) -> Result<()> {
        if self.rows.len() > 1 {
            self.tell()?;
        }
        self.rows.clear();
        Ok(())
    }

    fn tell(&mut self) -> Result<()> {
        let (mut id, mut docnos) = (None, Vec::with_capacity(self.rows.len()));
        for (i, row) in &self.rows {
            let Some(segment) = self.segments.get(*i) else {
                continue;
            };
            docnos.push(segment.docno(*row)?);
            if id.is_none() {
                id = Some(segment.id_of_row(*row)?);
            }
        }
        docnos.sort_unstable();
        id.map_or(Ok(()), |id| (self.found)(&id, &docnos))
    }
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
    progress: &Progress,
    visit: &mut Visit<'_>,
) -> Result<()> {
    match space.form() {
        Form::Number => merge::<Vec<u64>>(segments, cluster, space, progress, visit),
        Form::Packed(width) if width <= 16 => {
            merge::<Vec<u128>>(segments, cluster, space, progress, visit)
        }
        Form::Packed(_) | Form::Text => {
            merge::<ByteKeys>(segments, cluster, space, progress, visit)
        }
    }
}

/// A batch of keys of one form.
trait Batch: Default {
    /// Decides most comparisons.
    type Head: Ord + Copy + Default + std::fmt::Debug;

    fn clear(&mut self);
    fn push(&mut self, key: Key<'_>);
    fn len(&self) -> usize;
    fn head(&self, i: usize) -> Self::Head;
    /// Keys whose heads are equal.
    fn compare(&self, i: usize, other: &Self, j: usize) -> Ordering;
    fn save(&self, i: usize, saved: &mut Saved<Self::Head>);
    fn compare_saved(&self, i: usize, saved: &Saved<Self::Head>) -> Ordering;
}

/// A copy of a key, from which batches may go on.
#[derive(Debug, Default)]
struct Saved<H> {
    head: H,
    bytes: Vec<u8>,
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
            fn save(&self, i: usize, saved: &mut Saved<$number>) {
                saved.head = self.head(i);
            }

            #[inline]
            fn compare_saved(&self, i: usize, saved: &Saved<$number>) -> Ordering {
                self.head(i).cmp(&saved.head)
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
    fn save(&self, i: usize, saved: &mut Saved<u128>) {
        saved.head = self.head(i);
        saved.bytes.clear();
        saved.bytes.extend_from_slice(self.get(i));
    }

    #[inline]
    fn compare_saved(&self, i: usize, saved: &Saved<u128>) -> Ordering {
        let order = self.head(i).cmp(&saved.head);
        order.then_with(|| compare(self.get(i), &saved.bytes))
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
    numbers: Vec<u64>,
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
            numbers: Vec::new(),
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
        if let (Keys::Numbers(numbers), None) = (&self.keys, &self.forward) {
            let many = numbers.get_many(&self.rows, &mut self.numbers);
            many.ok_or_else(|| self.segment.broken("ids"))?;
            let mut translated = Vec::new();
            for number in &self.numbers {
                let key = self
                    .translation
                    .apply(Key::Number(*number), &mut translated);
                self.batch
                    .push(key.ok_or_else(|| self.segment.broken("ids"))?);
            }
            return Ok(());
        }
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

    fn has_more(&self) -> bool {
        self.rank < self.segment.rows()
    }

    #[inline]
    fn entry(&self, cursor: u32, at: usize) -> Entry<B::Head> {
        Entry {
            head: self.batch.head(at),
            cursor,
            at: at as u32,
        }
    }

    fn advance(&mut self) -> Result<()> {
        self.at += 1;
        if self.at >= self.batch.len() && self.has_more() {
            self.fetch()?;
        }
        Ok(())
    }
}

/// A key of a batch.
#[derive(Debug, Clone, Copy)]
struct Entry<H> {
    head: H,
    cursor: u32,
    at: u32,
}

fn compare_entries<B: Batch>(
    cursors: &[Cursor<'_, B>],
    a: &Entry<B::Head>,
    b: &Entry<B::Head>,
) -> Ordering {
    a.head.cmp(&b.head).then_with(|| {
        let batch = |e: &Entry<B::Head>| cursors.get(e.cursor as usize).map(|c| &c.batch);
        match (batch(a), batch(b)) {
            (Some(x), Some(y)) => x.compare(a.at as usize, y, b.at as usize),
            _ => Ordering::Equal,
        }
    })
}

/// Tells of keys in order, and that they are so.
struct Teller<'m, 'v, B: Batch> {
    visit: &'m mut Visit<'v>,
    last: Saved<B::Head>,
    place: Option<(usize, u64)>,
}

impl<B: Batch> Teller<'_, '_, B> {
    #[inline]
    fn tell(&mut self, cursor: &Cursor<'_, B>, at: usize) -> Result<()> {
        let row = cursor.rows.get(at).copied().unwrap_or_default();
        let here = (cursor.index, row);
        // Strictly ascending in all, no row comes twice: with as many as there are, none is left out.
        let again = match &self.place {
            None => false,
            Some(before) => match cursor.batch.compare_saved(at, &self.last) {
                Ordering::Greater => false,
                Ordering::Equal if *before < here => true,
                _ => return Err(cursor.segment.broken("order")),
            },
        };
        if !again {
            cursor.batch.save(at, &mut self.last);
        }
        self.place = Some(here);
        (self.visit)(cursor.index, row, again)
    }
}

/// In rounds: what all cursors have below the smallest end of a batch is in order after one sort, which finds
/// the runs of the cursors and merges them.
fn merge<B: Batch>(
    segments: &[&IdSegment],
    cluster: &[usize],
    space: &Space,
    progress: &Progress,
    visit: &mut Visit<'_>,
) -> Result<()> {
    let mut cursors = Vec::with_capacity(cluster.len());
    for index in cluster {
        if let Some(segment) = segments.get(*index) {
            cursors.push(Cursor::<B>::new(*index, segment, space)?);
        }
    }
    let mut teller = Teller::<B> {
        visit,
        last: Saved::default(),
        place: None,
    };
    let mut round: Vec<Entry<B::Head>> = Vec::new();
    let mut last_of_round = Saved::default();
    loop {
        // Of the cursors that have more to fetch, the one whose batch ends first.
        let ends = (0u32..).zip(&cursors).filter(|(_, c)| c.has_more());
        let end = ends
            .filter_map(|(i, c)| Some(c.entry(i, c.batch.len().checked_sub(1)?)))
            .min_by(|a, b| compare_entries(&cursors, a, b));
        round.clear();
        for (i, cursor) in (0u32..).zip(&cursors) {
            for at in cursor.at..cursor.batch.len() {
                let entry = cursor.entry(i, at);
                // An equal id may follow in the next batch.
                if end.is_some_and(|end| compare_entries(&cursors, &entry, &end).is_ge()) {
                    break;
                }
                round.push(entry);
            }
        }
        round.sort_by(|a, b| compare_entries(&cursors, a, b));
        for entry in &round {
            if let Some(cursor) = cursors.get(entry.cursor as usize) {
                teller.tell(cursor, entry.at as usize)?;
            }
        }
        progress.add(round.len() as u64)?;
        let Some(end) = end else {
            return Ok(());
        };
        for entry in &round {
            if let Some(cursor) = cursors.get_mut(entry.cursor as usize) {
                cursor.at = entry.at as usize + 1;
            }
        }
        // Now all of the id at which the round ended, however many batches it fills.
        if let Some(cursor) = cursors.get(end.cursor as usize) {
            cursor.batch.save(end.at as usize, &mut last_of_round);
        }
        for cursor in &mut cursors {
            while cursor.at < cursor.batch.len()
                && cursor
                    .batch
                    .compare_saved(cursor.at, &last_of_round)
                    .is_eq()
            {
                teller.tell(cursor, cursor.at)?;
                cursor.advance()?;
                progress.add(1)?;
            }
        }
    }
}
