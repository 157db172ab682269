//! Question to ranking.
//!
//! A question is text, not a query language: it goes through the index's analyser and becomes the
//! disjunction of its distinct terms, so `:`, quotes, brackets, `*` and `AND` mean nothing.
//!
//! Block-max WAND finds the candidates. The order in which it adds up the terms of a document
//! depends on the layout of the segments, and floating point notices; so candidates are kept a
//! little below the threshold and scored again with the terms in a fixed order. Equal scores are
//! ordered by docno. The ranking therefore does not depend on how the index was cut into segments.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashSet};

use tantivy::query::{BooleanQuery, EnableScoring, Occur, Query, TermQuery, Weight};
use tantivy::schema::{Field, IndexRecordOption};
use tantivy::{DocId, Searcher, SegmentReader, Term};

use super::DOCNO;
use super::analyser::Analyser;
use super::filter::ResolvedFilter;

/// A question is cut after this many distinct terms.
pub const MAX_QUESTION_TERMS: usize = 1_024;

/// Candidates are scored again when this many have come together.
const CANDIDATES: usize = 4_096;

/// How far below the k-th best score a candidate is kept: rounding for one segment. Over several
/// segments the maxima that Tantivy keeps for each block were chosen with each segment's own
/// average length, and need more room.
const SLACK_ONE_SEGMENT: f32 = 1e-4;
const SLACK_MANY_SEGMENTS: f32 = 2e-2;

/// The distinct terms of a question, in order of appearance.
pub(super) fn question_terms(analyser: Analyser, question: &str) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut terms = analyser.terms(question);
    terms.retain(|term| seen.len() < MAX_QUESTION_TERMS && seen.insert(term.clone()));
    terms
}

/// A score that is never NaN: a finite sum of finite BM25 terms.
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
    searcher: &Searcher,
    body: Field,
    terms: &[String],
    k: usize,
    filter: Option<&ResolvedFilter>,
    is_dead: &(dyn Fn(u64) -> bool + Sync),
) -> tantivy::Result<Vec<(u64, f32)>> {
    let mut known: Vec<Term> = Vec::with_capacity(terms.len());
    for term in terms {
        let term = Term::from_field_text(body, term);
        if searcher.doc_freq(&term)? > 0 {
            known.push(term);
        }
    }
    if known.is_empty() || k == 0 {
        return Ok(Vec::new());
    }
    known.sort_unstable();
    let query = |term: &Term| TermQuery::new(term.clone(), IndexRecordOption::WithFreqs);
    let scoring = EnableScoring::enabled_from_searcher(searcher);
    let union = BooleanQuery::new(
        known
            .iter()
            .map(|term| (Occur::Should, Box::new(query(term)) as Box<dyn Query>))
            .collect(),
    );
    let union = union.weight(scoring)?;
    let weights = known
        .iter()
        .map(|term| query(term).weight(scoring))
        .collect::<tantivy::Result<Vec<_>>>()?;

    let segments = searcher.segment_readers();
    let slack = if segments.len() > 1 {
        SLACK_MANY_SEGMENTS
    } else {
        SLACK_ONE_SEGMENT
    };
    let mut search = Search {
        weights,
        k,
        slack,
        rough: BinaryHeap::new(),
        best: Vec::new(),
        failure: None,
    };
    for reader in segments {
        search.segment(reader, union.as_ref(), filter, is_dead)?;
    }
    Ok(search
        .best
        .into_iter()
        .map(|(Reverse(score), docno)| (docno, score.0))
        .collect())
}

struct Search {
    /// One for each term, in the order in which scores are added up.
    weights: Vec<Box<dyn Weight>>,
    k: usize,
    slack: f32,
    /// The k best scores as WAND adds them up; the worst is on top.
    rough: BinaryHeap<Reverse<Score>>,
    /// The k best documents so far, in final order.
    best: Vec<(Reverse<Score>, u64)>,
    failure: Option<tantivy::TantivyError>,
}

impl Search {
    fn threshold(&self) -> f32 {
        match self.rough.peek() {
            Some(Reverse(worst)) if self.rough.len() >= self.k => worst.0 * (1.0 - self.slack),
            _ => f32::MIN,
        }
    }

    fn segment(
        &mut self,
        reader: &SegmentReader,
        union: &dyn Weight,
        filter: Option<&ResolvedFilter>,
        is_dead: &(dyn Fn(u64) -> bool + Sync),
    ) -> tantivy::Result<()> {
        let filter = match filter.map(|filter| filter.on(reader)).transpose()? {
            Some(None) => return Ok(()),
            other => other.flatten(),
        };
        let docnos = reader.fast_fields().u64(DOCNO)?;
        let alive = reader.alive_bitset();
        let mut candidates: Vec<(DocId, u64)> = Vec::new();
        union.for_each_pruning(self.threshold(), reader, &mut |doc, score| {
            if alive.is_some_and(|alive| alive.is_deleted(doc)) {
                return self.threshold();
            }
            if filter.as_ref().is_some_and(|filter| !filter.passes(doc)) {
                return self.threshold();
            }
            let Some(docno) = docnos.first(doc).filter(|docno| !is_dead(*docno)) else {
                return self.threshold();
            };
            self.rough.push(Reverse(Score(score)));
            if self.rough.len() > self.k {
                self.rough.pop();
            }
            candidates.push((doc, docno));
            if candidates.len() >= CANDIDATES
                && let Err(error) = self.settle(reader, &mut candidates)
            {
                self.failure.get_or_insert(error);
                return f32::MAX; // nothing more is of interest
            }
            self.threshold()
        })?;
        if let Some(error) = self.failure.take() {
            return Err(error);
        }
        self.settle(reader, &mut candidates)
    }

    /// Scores the candidates exactly and keeps the k best of all so far.
    fn settle(
        &mut self,
        reader: &SegmentReader,
        candidates: &mut Vec<(DocId, u64)>,
    ) -> tantivy::Result<()> {
        candidates.sort_unstable();
        let mut scores = vec![0.0_f64; candidates.len()];
        for weight in &self.weights {
            let mut scorer = weight.scorer(reader, 1.0)?;
            for ((doc, _), score) in candidates.iter().zip(&mut scores) {
                if scorer.doc() < *doc {
                    scorer.seek(*doc);
                }
                if scorer.doc() == *doc {
                    *score += f64::from(scorer.score());
                }
            }
        }
        let scored = candidates.drain(..).zip(scores);
        self.best
            .extend(scored.map(|((_, docno), score)| (Reverse(Score(score as f32)), docno)));
        self.best.sort_unstable();
        self.best.truncate(self.k);
        Ok(())
    }
}
