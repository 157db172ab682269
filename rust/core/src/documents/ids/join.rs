//! One segment from many.

use crate::documents::ids::merge::{Found, Repeats, clusters, common_space, in_order};
use crate::documents::ids::segment::{Forward, IdSegment, SegmentWriter};
use crate::documents::ids::space::{Space, Translation};
use crate::documents::ids::text::SHARED_BLOCK;
use crate::error::{Error, Result};
use crate::files::{Digest, Directory};
use crate::presence::PresenceBuilder;
use crate::watch::Progress;

/// Which rows of a segment were kept, and how many before each.
#[derive(Debug, Default)]
struct Kept {
    /// Rows that were kept before this segment.
    base: u64,
    rows: u64,
    kept: u64,
    /// A bit a row, and for each word the rows kept before it; empty as long as all are kept.
    words: Vec<u64>,
    before: Vec<u64>,
}

impl Kept {
    fn push(&mut self, keep: bool) {
        if !keep && self.kept == self.rows {
            self.words = (0..self.rows / 64).map(|_| u64::MAX).collect();
            self.before = (0..self.rows / 64).map(|word| word * 64).collect();
            if !self.rows.is_multiple_of(64) {
                self.before.push(self.rows / 64 * 64);
                self.words.push((1 << (self.rows % 64)) - 1);
            }
        }
        let all = keep && self.kept == self.rows;
        if !all {
            if self.rows.is_multiple_of(64) {
                self.before.push(self.kept);
                self.words.push(0);
            }
            if let Some(word) = self.words.last_mut() {
                *word |= u64::from(keep) << (self.rows % 64);
            }
        }
        self.rows += 1;
        self.kept += u64::from(keep);
    }

    /// The row after joining, if it was kept.
    #[inline]
    fn row(&self, row: u64) -> Option<u64> {
        if self.kept == self.rows {
            return Some(self.base + row);
        }
        let at = usize::try_from(row / 64).ok()?;
        let (word, before) = (*self.words.get(at)?, *self.before.get(at)?);
        let bit = 1u64 << (row % 64);
        let below = u64::from((word & (bit - 1)).count_ones());
        (word & bit != 0).then_some(self.base + before + below)
    }
}

/// The docnos from the first that was kept on, and which of them were.
#[derive(Debug)]
struct Docnos {
    first: u64,
    presence: PresenceBuilder,
}

impl Docnos {
    /// None of those before this one that have not come was kept.
    fn skip_to(&mut self, docno: u64) -> Result<()> {
        if self.presence.count() > 0 {
            let gap = docno.checked_sub(self.first + self.presence.count());
            let gap = gap.ok_or_else(|| Error::invalid("segments to join are not in order"))?;
            self.presence.extend_absent(gap);
        }
        Ok(())
    }

    /// The next one.
    fn push(&mut self, docno: u64, keep: bool) {
        if self.presence.count() == 0 {
            // A store of which the oldest documents die again and again does not note each of them for ever.
            if !keep {
                return;
            }
            self.first = docno;
        }
        match keep {
            true => self.presence.extend_present(1),
            false => self.presence.extend_absent(1),
        }
    }
}

/// Writes one segment from neighbours in order of docnos, those docnos that `keep` refuses left out. No
/// document gets another docno. Counts each row twice: when it is copied and when it is put in order.
pub fn join_ids(
    dir: &Directory,
    name: &str,
    segments: &[&IdSegment],
    keep: &(dyn Fn(u64) -> bool + Sync),
    progress: &Progress,
) -> Result<Digest> {
    write(dir, name, segments, keep, progress, None)
}

/// [`join_ids`] of all docnos, and [`duplicates`](super::duplicates), for the time of one of them.
pub fn join_and_find(
    dir: &Directory,
    name: &str,
    segments: &[&IdSegment],
    progress: &Progress,
    found: &mut Found<'_>,
) -> Result<Digest> {
    let repeats = Repeats::new(segments, found);
    write(dir, name, segments, &|_| true, progress, Some(repeats))
}

fn write(
    dir: &Directory,
    name: &str,
    segments: &[&IdSegment],
    keep: &(dyn Fn(u64) -> bool + Sync),
    progress: &Progress,
    mut repeats: Option<Repeats<'_, '_>>,
) -> Result<Digest> {
    let space = common_space(segments);
    let mut writer = SegmentWriter::create(dir, name, &space, text_block(segments, &space))?;
    let mut docnos = Docnos {
        first: segments.first().map_or(0, |s| s.first()),
        presence: PresenceBuilder::default(),
    };
    let mut kept = Vec::with_capacity(segments.len());
    let mut base = 0;
    for segment in segments {
        docnos.skip_to(segment.first())?;
        let rows = copy_rows(
            &mut writer,
            segment,
            &space,
            keep,
            progress,
            &mut docnos,
            base,
        )?;
        base += rows.kept;
        kept.push(rows);
    }
    // Ids that ascend need no order, and none is there twice.
    if writer.end_rows(docnos.first, &docnos.presence)? {
        progress.add(base)?;
    } else {
        for cluster in clusters(segments, &space)? {
            in_order(
                segments,
                &cluster,
                &space,
                progress,
                &mut |i, row, again| {
                    if let Some(repeats) = &mut repeats {
                        repeats.add(i, row, again)?;
                    }
                    match kept.get(i).and_then(|kept| kept.row(row)) {
                        Some(row) => writer.push_order(row),
                        None => Ok(()),
                    }
                },
            )?;
        }
        repeats.map_or(Ok(()), |mut repeats| repeats.end())?;
    }
    writer.finish()
}

fn copy_rows(
    writer: &mut SegmentWriter,
    segment: &IdSegment,
    space: &Space,
    keep: &(dyn Fn(u64) -> bool + Sync),
    progress: &Progress,
    docnos: &mut Docnos,
    base: u64,
) -> Result<Kept> {
    let mut kept = Kept {
        base,
        ..Kept::default()
    };
    let all = segment.rows() == segment.end() - segment.first();
    let mut forward = Forward::new(segment.keys()?);
    let mut translation = Translation::new(segment.space(), space);
    let mut translated = Vec::new();
    for docno in segment.first()..segment.end() {
        if !all && !segment.contains(docno)? {
            docnos.push(docno, false);
            continue;
        }
        let key = forward.next().ok().flatten();
        let key = key.ok_or_else(|| segment.broken("presence"))?;
        progress.add(1)?;
        let keep = keep(docno);
        kept.push(keep);
        docnos.push(docno, keep);
        if keep {
            let key = translation.apply(key, &mut translated);
            writer.push(key.ok_or_else(|| segment.broken("ids"))?)?;
        }
    }
    match kept.rows == segment.rows() {
        true => Ok(kept),
        false => Err(segment.broken("presence")),
    }
}

/// Strings in a block: as most of those to join have it. What comes from templates shares much.
fn text_block(segments: &[&IdSegment], space: &Space) -> u64 {
    if *space != Space::Text {
        return 0;
    }
    let (mut single, mut rows) = (0u64, 0u64);
    for segment in segments {
        rows = rows.saturating_add(segment.rows());
        if segment.text_block() == Some(1) {
            single = single.saturating_add(segment.rows());
        }
    }
    match single > rows / 2 {
        true => 1,
        false => SHARED_BLOCK,
    }
}
