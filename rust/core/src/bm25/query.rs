//! Question to ranking.
//!
//! A question is text, not a query language: it goes through the index's analyser and becomes the
//! disjunction of its distinct terms, so `:`, quotes, brackets, `*` and `AND` mean nothing.
//!
//! The best documents are found by MaxScore, over a window of documents at a time. What a term can add to
//! a score is bounded. Terms that together cannot lift a document over the k-th best score so far are
//! only looked up for documents that hold another term and could still get there; since those are the
//! frequent ones, most postings are never read. Scores are added up as integers, so no order of adding
//! changes them, and equal scores are ordered by docno: the ranking does not depend on how the index was
//! cut into segments.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};
use std::sync::Arc;

use tantivy::columnar::Column;
use tantivy::fastfield::AliveBitSet;
use tantivy::fieldnorm::FieldNormReader;
use tantivy::postings::{BlockSegmentPostings, TermInfo};
use tantivy::query::Bm25Weight;
use tantivy::schema::{Field, IndexRecordOption};
use tantivy::{DocId, InvertedIndexReader, SegmentReader, TERMINATED, Term};

use super::DOCNO;
use super::analyser::Analyser;
use super::filter::{ResolvedFilter, SegmentFilter};

/// A question is cut after this many distinct terms.
pub const MAX_QUESTION_TERMS: usize = 1_024;

/// Documents in a window; their sums fit into the first cache of a processor.
const WINDOW: u32 = 4_096;

/// Scores are counted in units of 2^-45. The score of a term is below 2^6, so a sum of 2^10 fits.
const UNIT: f32 = (1_u64 << 45) as f32;

/// The distinct terms of a question, in order of appearance.
pub(super) fn question_terms(analyser: Analyser, question: &str) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut terms = analyser.terms(question);
    terms.retain(|term| seen.len() < MAX_QUESTION_TERMS && seen.insert(term.clone()));
    terms
}

/// One segment, with everything that each search needs of it.
pub(super) struct Segment {
    reader: SegmentReader,
    terms: Arc<InvertedIndexReader>,
    norms: FieldNormReader,
    docnos: Column<u64>,
}

impl Segment {
    pub(super) fn open(reader: &SegmentReader, body: Field) -> tantivy::Result<Self> {
        Ok(Self {
            terms: reader.inverted_index(body)?,
            norms: reader.get_fieldnorms_reader(body)?,
            docnos: reader.fast_fields().u64(DOCNO)?,
            reader: reader.clone(),
        })
    }

    /// How many documents it has, with those that were deleted from it.
    pub(super) fn documents(&self) -> DocId {
        self.reader.max_doc()
    }

    /// The docnos of what is not deleted among the documents from `first` on, so many.
    pub(super) fn living(&self, first: DocId, most: usize) -> Vec<u64> {
        let alive = self.reader.alive_bitset();
        (first..self.documents())
            .take(most)
            .filter(|doc| alive.is_none_or(|alive| alive.is_alive(*doc)))
            .filter_map(|doc| self.docnos.first(doc))
            .collect()
    }
}

/// A score that is never NaN: a sum of integers.
#[derive(Clone, Copy, PartialEq)]
struct Score(f32);

impl Eq for Score {}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// The best `k` documents that pass the filter and are not dead, best first.
pub(super) fn top_k(
    segments: &[Segment],
    body: Field,
    terms: &[String],
    k: usize,
    filter: Option<&ResolvedFilter>,
    is_dead: &(dyn Fn(u64) -> bool + Sync),
) -> tantivy::Result<Vec<(u64, f32)>> {
    let (mut documents, mut tokens) = (0_u64, 0_u64);
    for segment in segments {
        documents += u64::from(segment.reader.max_doc());
        tokens = tokens.saturating_add(segment.terms.total_num_tokens());
    }
    let average = tokens as f32 / documents as f32;
    // For each term, where its postings are in each segment.
    let mut known: Vec<(Bm25Weight, Vec<Option<TermInfo>>)> = Vec::with_capacity(terms.len());
    for term in terms {
        let term = Term::from_field_text(body, term);
        let infos = segments
            .iter()
            .map(|segment| segment.terms.get_term_info(&term))
            .collect::<std::io::Result<Vec<_>>>()?;
        let found = infos.iter().flatten().map(|i| u64::from(i.doc_freq)).sum();
        if found > 0 {
            let weight = Bm25Weight::for_one_term_without_explain(found, documents, average);
            known.push((weight, infos));
        }
    }
    let mut best = Best {
        k,
        heap: BinaryHeap::new(),
    };
    if k > 0 {
        for (at, segment) in segments.iter().enumerate() {
            let mut lists = Vec::with_capacity(known.len());
            for (weight, infos) in &known {
                if let Some(info) = infos.get(at).and_then(Option::as_ref) {
                    lists.push(List::open(segment, info, weight)?);
                }
            }
            let filter = match filter
                .map(|filter| filter.on(&segment.reader))
                .transpose()?
            {
                Some(None) => continue,
                other => other.flatten(),
            };
            let documents = Documents {
                alive: segment.reader.alive_bitset(),
                docnos: &segment.docnos,
                filter,
                is_dead,
            };
            search(lists, &documents, &mut best);
        }
    }
    let sorted = best.heap.into_sorted_vec().into_iter();
    Ok(sorted
        .map(|(Reverse(score), docno)| (docno, score.0))
        .collect())
}

/// The k best documents so far.
struct Best {
    k: usize,
    /// The worst is on top: the lowest score, and of equal ones the highest docno.
    heap: BinaryHeap<(Reverse<Score>, u64)>,
}

impl Best {
    /// What is below this is not among the best, in units.
    fn threshold(&self) -> u64 {
        match self.heap.peek() {
            Some((Reverse(worst), _)) if self.heap.len() >= self.k => {
                let units = (worst.0 * UNIT) as u64;
                // Sums that differ by less can be one and the same f32.
                units - (units >> 22)
            }
            _ => 0,
        }
    }

    fn offer(&mut self, units: u64, docno: u64) {
        let new = (Reverse(Score(units as f32 / UNIT)), docno);
        if self.heap.len() < self.k {
            self.heap.push(new);
        } else if let Some(mut worst) = self.heap.peek_mut()
            && new < *worst
        {
            *worst = new;
        }
    }
}

/// Which documents of a segment count.
struct Documents<'s> {
    alive: Option<&'s AliveBitSet>,
    docnos: &'s Column<u64>,
    filter: Option<SegmentFilter<'s>>,
    is_dead: &'s (dyn Fn(u64) -> bool + Sync),
}

impl Documents<'_> {
    fn passes(&self, doc: DocId) -> bool {
        self.alive.is_none_or(|alive| alive.is_alive(doc))
            && self.filter.as_ref().is_none_or(|filter| filter.passes(doc))
    }

    fn docno(&self, doc: DocId) -> Option<u64> {
        let docno = self.docnos.first(doc)?;
        (!(self.is_dead)(docno)).then_some(docno)
    }
}

/// The postings of one term in one segment.
struct List<'s> {
    postings: BlockSegmentPostings,
    /// The next one of the block that is unpacked.
    at: usize,
    weight: &'s Bm25Weight,
    norms: &'s FieldNormReader,
    /// No document gets more from this term, in units.
    bound: u64,
}

fn units(weight: &Bm25Weight, norms: &FieldNormReader, doc: DocId, frequency: u32) -> u64 {
    (weight.score(norms.fieldnorm_id(doc), frequency) * UNIT) as u64
}

impl<'s> List<'s> {
    fn open(
        segment: &'s Segment,
        info: &TermInfo,
        weight: &'s Bm25Weight,
    ) -> tantivy::Result<Self> {
        let option = IndexRecordOption::WithFreqs;
        Ok(Self {
            postings: segment
                .terms
                .read_block_postings_from_terminfo(info, option)?,
            at: 0,
            weight,
            norms: &segment.norms,
            // An empty document that is full of it: the limit of the formula.
            bound: (weight.score(0, u32::MAX) * UNIT) as u64,
        })
    }

    fn doc(&self) -> DocId {
        let docs = self.postings.docs();
        docs.get(self.at).copied().unwrap_or(TERMINATED)
    }

    /// Adds its scores to the documents of a window, and moves behind that.
    fn add_to(&mut self, window: &mut Window) {
        loop {
            let docs = self.postings.docs().get(self.at..).unwrap_or_default();
            let frequencies = self.postings.freqs().get(self.at..).unwrap_or_default();
            let mut taken = 0;
            for (doc, frequency) in docs.iter().zip(frequencies) {
                if *doc >= window.end() {
                    break;
                }
                window.add(*doc, units(self.weight, self.norms, *doc, *frequency));
                taken += 1;
            }
            let is_left = taken < docs.len();
            self.at += taken;
            if is_left || docs.is_empty() {
                return;
            }
            self.postings.advance();
            self.at = 0;
        }
    }

    /// What the document gets from this term; documents must come in ascending order.
    fn look_up(&mut self, doc: DocId) -> u64 {
        let at = self.postings.seek(doc);
        let found = self.postings.docs().get(at).copied();
        match (found, self.postings.freqs().get(at)) {
            (Some(found), Some(frequency)) if found == doc => {
                units(self.weight, self.norms, doc, *frequency)
            }
            _ => 0,
        }
    }
}

/// Sums of scores for neighbouring documents.
struct Window {
    base: DocId,
    sums: Vec<u64>,
    /// A bit for each document that has one of the terms.
    seen: Vec<u64>,
}

impl Window {
    fn new() -> Self {
        Self {
            base: 0,
            sums: vec![0; WINDOW as usize],
            seen: vec![0; WINDOW as usize / 64],
        }
    }

    fn end(&self) -> DocId {
        self.base.saturating_add(WINDOW).min(TERMINATED)
    }

    fn add(&mut self, doc: DocId, units: u64) {
        let at = doc.wrapping_sub(self.base) as usize;
        if let (Some(sum), Some(seen)) = (self.sums.get_mut(at), self.seen.get_mut(at / 64)) {
            *sum += units;
            *seen |= 1 << (at % 64);
        }
    }

    /// Takes the documents out, in ascending order.
    fn drain(&mut self, mut each: impl FnMut(DocId, u64)) {
        for (word, seen) in self.seen.iter_mut().enumerate() {
            let mut bits = std::mem::take(seen);
            while bits != 0 {
                let at = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                if let Some(sum) = self.sums.get_mut(at) {
                    each(self.base + at as DocId, std::mem::take(sum));
                }
            }
        }
    }
}

fn search(mut lists: Vec<List<'_>>, documents: &Documents<'_>, best: &mut Best) {
    lists.sort_by_key(|list| list.bound);
    // What the first lists add at most, one, two, three ... of them.
    let sums: Vec<u64> = lists
        .iter()
        .scan(0, |sum, list| {
            *sum += list.bound;
            Some(*sum)
        })
        .collect();
    let mut window = Window::new();
    loop {
        let threshold = best.threshold();
        // Documents that hold only words of these cannot be among the best.
        let few = sums.partition_point(|sum| *sum < threshold);
        let (frequent, essential) = lists.split_at_mut(few);
        let first = essential.iter().map(|list| list.doc()).min();
        let Some(first) = first.filter(|doc| *doc < TERMINATED) else {
            return;
        };
        window.base = first;
        for list in essential {
            list.add_to(&mut window);
        }
        let most = few.checked_sub(1).and_then(|at| sums.get(at));
        let most = most.copied().unwrap_or(0);
        let mut threshold = threshold;
        window.drain(|doc, mut sum| {
            let mut open = most;
            if sum + open < threshold || !documents.passes(doc) {
                return;
            }
            for list in frequent.iter_mut().rev() {
                if sum + open < threshold {
                    return;
                }
                open -= list.bound;
                sum += list.look_up(doc);
            }
            if sum >= threshold
                && let Some(docno) = documents.docno(doc)
            {
                best.offer(sum, docno);
                threshold = best.threshold();
            }
        });
    }
}
