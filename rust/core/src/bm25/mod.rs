//! The BM25 index: Tantivy inside a store.
//!
//! Tantivy works through a directory of our own that sees the files of one generation and nothing
//! else, so that a generation of the store and its index are committed together. The index keeps
//! the docno of a document and no text; it is derived, and can be rebuilt from kept text.
//!
//! Title and text go into one field: BM25 then counts a title's words as words of the passage. (In a
//! field of its own, a title's length of 2 or 3 words dominates the score.)
//!
//! Nothing of Tantivy is trusted with the process: calls run under `catch_unwind`, and a panic, like
//! any other sign of damage, is [`Error::CorruptIndex`].

mod analyser;
mod checked;
mod directory;
mod filter;
mod lazy;
mod query;
#[cfg(test)]
mod tests;
mod wait;

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tantivy::directory::error::{Incompatibility, OpenReadError, OpenWriteError};
use tantivy::indexer::{IndexWriterOptions, NoMergePolicy};
use tantivy::schema::{
    FAST, Field, INDEXED, IndexRecordOption, Schema, TextFieldIndexing, TextOptions,
};
use tantivy::tokenizer::Tokenizer;
use tantivy::{Index, IndexSettings, ReloadPolicy, TantivyDocument, TantivyError, Term};

pub use self::analyser::{Analyser, AnalyserSpec, MAX_TERM_BYTES, UNICODE_V1};
pub use self::filter::{
    Comparison, Condition, Filter, FilterField, FilterKind, FilterValues, MAX_FILTER_FIELDS,
    MAX_FILTER_NAME, MAX_FILTER_STRING, ResolvedFilter,
};
pub use self::lazy::LazyIndex;
pub use self::query::MAX_QUESTION_TERMS;
pub use self::wait::Meanwhile;

use self::directory::StoreDirectory;
pub(crate) use self::directory::as_index_error;
use self::wait::Wait;
use crate::error::{Error, Result};
use crate::files::Directory;
use crate::watch::Progress;

/// The version of Tantivy, and of the index format that it writes.
pub fn tantivy_version() -> &'static str {
    tantivy::version_string()
}

const DOCNO: &str = "docno";
const BODY: &str = "body";

/// Indexing threads. One gives the fewest segments and the same ones every time.
const WRITER_THREADS: usize = 1;
/// What the indexing thread may buffer before it writes a segment (Tantivy's minimum is 15 MB).
const WRITER_BYTES: usize = 64 << 20;
/// Docnos that are read from a segment at once, where all are gone through.
const DOCNOS_AT_ONCE: usize = 1 << 16;
/// A commit leaves at most this many segments: a search visits each of them.
const MAX_SEGMENTS: usize = 8;

/// One file of the index, as the manifest lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexFile {
    /// Relative to the store, for example `bm25/meta-3.json`.
    pub name: String,
    pub length: u64,
    pub blake3: [u8; 32],
}

/// What an index is made for: how words are told apart, and what a search can be filtered on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct IndexSpec {
    pub analyser: AnalyserSpec,
    pub filters: Vec<FilterField>,
}

struct Fields {
    docno: Field,
    body: Field,
    /// In the order in which they are declared.
    filters: Vec<Field>,
}

fn schema(analyser: Analyser, filters: &[FilterField]) -> (Schema, Fields) {
    let mut builder = Schema::builder();
    let docno = builder.add_u64_field(DOCNO, FAST | INDEXED);
    let indexing = TextFieldIndexing::default()
        .set_tokenizer(analyser.tokenizer_name())
        .set_index_option(IndexRecordOption::WithFreqs)
        .set_fieldnorms(true);
    let body = builder.add_text_field(BODY, TextOptions::default().set_indexing_options(indexing));
    let fields = Fields {
        docno,
        body,
        filters: filter::add_to_schema(&mut builder, filters),
    };
    (builder.build(), fields)
}

/// The analyser as indexing uses it: when nothing more is written, there are no words to find either.
#[derive(Clone)]
struct Indexing {
    analyser: Analyser,
    directory: StoreDirectory,
}

impl Tokenizer for Indexing {
    type TokenStream<'a> = <Analyser as Tokenizer>::TokenStream<'a>;

    fn token_stream<'a>(&'a mut self, text: &'a str) -> Self::TokenStream<'a> {
        let text = if self.directory.is_stopped() {
            ""
        } else {
            text
        };
        self.analyser.token_stream(text)
    }
}

/// Opens the index that `directory` shows, or makes a new one there.
fn open_index(directory: &StoreDirectory, spec: &IndexSpec) -> Result<(Index, Fields, Analyser)> {
    let analyser = Analyser::new(&spec.analyser).map_err(|error| Error::UnsupportedFormat {
        file: directory.folder(),
        what: error.to_string(),
        known: format!("the analyser {UNICODE_V1} with the stemmer english or none"),
    })?;
    let (schema, fields) = schema(analyser, &spec.filters);
    guarded(directory, || {
        let boxed: Box<dyn tantivy::Directory> = Box::new(directory.clone());
        let index = if Index::exists(boxed.as_ref())? {
            Index::open(boxed)?
        } else {
            let settings = IndexSettings {
                // Nothing is stored, and the thread for it is one that nobody waits for.
                docstore_compress_dedicated_thread: false,
                ..IndexSettings::default()
            };
            Index::create(boxed, schema.clone(), settings)?
        };
        if index.schema() != schema {
            return Err(TantivyError::SchemaError(
                "its fields are not those of this analyser and these filters".to_owned(),
            ));
        }
        let tokeniser = Indexing {
            analyser,
            directory: directory.clone(),
        };
        index
            .tokenizers()
            .register(analyser.tokenizer_name(), tokeniser);
        Ok((index, fields, analyser))
    })
}

/// Runs a piece of Tantivy; nothing but our own errors comes out.
fn guarded<T>(directory: &StoreDirectory, work: impl FnOnce() -> tantivy::Result<T>) -> Result<T> {
    // Unwind safe: our state behind the call is behind a lock that survives poisoning, and after a
    // failure an index is only dropped or asked again for reading.
    let outcome = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome.map_err(|error| translate(directory, error)),
        Err(panic) => {
            let words = panic
                .downcast_ref::<&str>()
                .copied()
                .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
                .unwrap_or("no message");
            let reason = format!("Tantivy panicked: {words}");
            Err(Error::corrupt_index(directory.folder(), reason))
        }
    };
    // What failed below Tantivy says more than what Tantivy made of it.
    outcome.map_err(|error| directory.take_failure().unwrap_or(error))
}

fn translate(directory: &StoreDirectory, error: TantivyError) -> Error {
    let (path, source) = match &error {
        TantivyError::IncompatibleIndex(found)
        | TantivyError::OpenReadError(OpenReadError::IncompatibleIndex(found)) => {
            return incompatible(directory, found);
        }
        TantivyError::OpenReadError(OpenReadError::FileDoesNotExist(path)) => {
            let reason = "the index needs it, but the manifest does not list it";
            return Error::corrupt_index(path, reason);
        }
        TantivyError::IoError(source) => (None, Some(source)),
        TantivyError::OpenReadError(OpenReadError::IoError { io_error, filepath })
        | TantivyError::OpenWriteError(OpenWriteError::IoError { io_error, filepath }) => {
            (Some(filepath), Some(io_error))
        }
        _ => (None, None),
    };
    let path = path.cloned().unwrap_or_else(|| directory.folder());
    match source {
        Some(source) if source.raw_os_error().is_some() => Error::Io {
            path,
            source: Arc::clone(source),
        },
        _ => Error::corrupt_index(path, error),
    }
}

fn incompatible(directory: &StoreDirectory, found: &Incompatibility) -> Error {
    let file = directory.folder();
    match found {
        Incompatibility::IndexMismatch {
            library_version,
            index_version,
        } if format_number(index_version) > format_number(library_version) => {
            Error::UnsupportedFormat {
                file,
                what: format!("the BM25 index is of {index_version}"),
                known: format!("those up to {library_version}"),
            }
        }
        Incompatibility::IndexMismatch {
            library_version,
            index_version,
        } => Error::IndexTooOld {
            file,
            reason: format!("it is of {index_version}, and this is {library_version}"),
        },
        other => Error::corrupt_index(file, format!("{other:?}")),
    }
}

/// The number is private to Tantivy, but the text of a version ends in it: "..., index_format v7".
fn format_number(version: &tantivy::Version) -> u32 {
    let text = version.to_string();
    let number = text.rsplit('v').next().unwrap_or_default();
    number.parse().unwrap_or(0)
}

/// One generation of the index, open for reading by any number of threads.
pub struct IndexReader {
    directory: StoreDirectory,
    index: Index,
    segments: Vec<query::Segment>,
    body: Field,
    analyser: Analyser,
}

impl std::fmt::Debug for IndexReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IndexReader")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl IndexReader {
    pub fn open(
        store: &Directory,
        generation: u64,
        files: &[IndexFile],
        spec: &IndexSpec,
    ) -> Result<Self> {
        let directory = StoreDirectory::new(store, Some(generation), files)?;
        let (index, fields, analyser) = open_index(&directory, spec)?;
        let segments = guarded(&directory, || {
            let builder = index.reader_builder().reload_policy(ReloadPolicy::Manual);
            let reader: tantivy::IndexReader = builder.try_into()?;
            let searcher = reader.searcher();
            let segments = searcher.segment_readers().iter();
            segments
                .map(|segment| query::Segment::open(segment, fields.body))
                .collect()
        })?;
        Ok(Self {
            directory,
            index,
            segments,
            body: fields.body,
            analyser,
        })
    }

    /// The best `k` documents for a text, best first; fewer if fewer live ones that pass the filter hold
    /// any of its terms. The filter leaves the scores as they are.
    pub fn search(
        &self,
        text: &str,
        k: usize,
        filter: Option<&ResolvedFilter>,
        is_dead: &(dyn Fn(u64) -> bool + Sync),
    ) -> Result<Vec<(u64, f32)>> {
        let terms = query::question_terms(self.analyser, text);
        guarded(&self.directory, || {
            query::top_k(&self.segments, self.body, &terms, k, filter, is_dead)
        })
    }

    /// Compares every block with its checksum, and every file with the one that Tantivy keeps in it.
    pub fn verify(&self, progress: &Progress) -> Result<()> {
        self.directory.verify(progress)?;
        let files = guarded(&self.directory, || {
            Ok(self.index.load_metas()?.list_segment_files())
        })?;
        let mut files: Vec<_> = files.into_iter().collect();
        files.sort_unstable();
        for file in files {
            let Some(length) = self.directory.length_of(&file) else {
                continue;
            };
            let index = self.index.directory();
            if !guarded(&self.directory, || Ok(index.validate_checksum(&file)?))? {
                let path = self.directory.folder().join(file);
                let reason = "Tantivy's checksum does not match";
                return Err(Error::corrupt_index(path, reason));
            }
            progress.add(length)?;
        }
        Ok(())
    }

    /// Goes through the docnos that a search may find, dead ones of the store included, some at a time.
    pub fn each_docnos(&self, each: &mut dyn FnMut(&[u64]) -> Result<()>) -> Result<()> {
        for segment in &self.segments {
            for first in (0..segment.documents()).step_by(DOCNOS_AT_ONCE) {
                let some = guarded(
                    &self.directory,
                    || Ok(segment.living(first, DOCNOS_AT_ONCE)),
                )?;
                each(&some)?;
            }
        }
        Ok(())
    }

    /// How many segments a search visits.
    pub fn segments(&self) -> usize {
        self.segments.len()
    }
}

/// Which segments, given as (live, dead) documents, a commit merges into one.
///
/// None while there are few. Past [`MAX_SEGMENTS`], the smallest, as many as it takes to be within
/// the bound, and further ones as long as they are no larger than what is merged anyway: so a
/// document is rewritten a number of times that grows only with the logarithm of the index. A
/// segment of which more than half is dead is rewritten in any case.
fn to_merge(sizes: &[(u32, u32)]) -> Vec<usize> {
    let needed = match sizes.len().saturating_sub(MAX_SEGMENTS) {
        0 => 0,
        over => over + 1,
    };
    let mut order: Vec<(usize, &(u32, u32))> = sizes.iter().enumerate().collect();
    order.sort_by_key(|(at, size)| (size.0, *at));
    let mut merged = 0_u64;
    let mut chosen = Vec::new();
    for (rank, (at, (live, dead))) in order.into_iter().enumerate() {
        let goes_along = needed > 0 && (rank < needed || u64::from(*live) <= merged);
        if goes_along || dead > live {
            merged += u64::from(*live);
            chosen.push(at);
        }
    }
    chosen.sort_unstable();
    chosen
}

/// Commits what is staged, and sees that few segments are left.
fn commit(index: &Index, writer: &mut TantivyWriter, wait: &Wait<'_>) -> tantivy::Result<()> {
    let old: HashSet<_> = index.searchable_segment_ids()?.into_iter().collect();
    wait.until(writer.prepare_commit()?.commit_future())?;
    // What one commit wrote in several pieces becomes one piece.
    let mut new = index.searchable_segment_ids()?;
    new.retain(|id| !old.contains(id));
    if new.len() > 1 {
        wait.until(writer.merge(&new))?;
    }
    let (ids, sizes): (Vec<_>, Vec<_>) = index
        .searchable_segment_metas()?
        .iter()
        .map(|meta| (meta.id(), (meta.num_docs(), meta.num_deleted_docs())))
        .unzip();
    let chosen = to_merge(&sizes);
    if !chosen.is_empty() {
        let chosen: Vec<_> = chosen
            .into_iter()
            .filter_map(|at| ids.get(at).copied())
            .collect();
        wait.until(writer.merge(&chosen))?;
    }
    Ok(())
}

type TantivyWriter = tantivy::IndexWriter<TantivyDocument>;

/// Stages changes to the index and makes them the next generation.
pub struct IndexWriter {
    directory: StoreDirectory,
    index: Index,
    fields: Fields,
    /// Made by the first change, so that a commit without one starts no thread.
    writer: Option<TantivyWriter>,
}

impl std::fmt::Debug for IndexWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IndexWriter")
            .field("directory", &self.directory)
            .finish_non_exhaustive()
    }
}

impl IndexWriter {
    /// A writer of an index that starts from nothing, whatever the store has now: the names of its files
    /// are new, and a commit lists these alone.
    pub fn fresh(store: &Directory, spec: &IndexSpec) -> Result<Self> {
        Self::open(store, None, &[], spec)
    }

    /// A writer on top of a previous generation, or of nothing.
    pub fn open(
        store: &Directory,
        previous_generation: Option<u64>,
        previous: &[IndexFile],
        spec: &IndexSpec,
    ) -> Result<Self> {
        let directory = StoreDirectory::new(store, previous_generation, previous)?;
        directory.raise_stamp()?;
        let (index, fields, _) = open_index(&directory, spec)?;
        Ok(Self {
            directory,
            index,
            fields,
            writer: None,
        })
    }

    fn with_writer<T>(
        &mut self,
        work: impl FnOnce(&Index, &mut TantivyWriter) -> tantivy::Result<T>,
    ) -> Result<T> {
        let Self {
            directory,
            index,
            writer,
            ..
        } = self;
        guarded(directory, || {
            let writer = match writer {
                Some(writer) => writer,
                None => {
                    let options = IndexWriterOptions::builder()
                        .num_worker_threads(WRITER_THREADS)
                        .num_merge_threads(1)
                        .memory_budget_per_thread(WRITER_BYTES)
                        .build();
                    let new: TantivyWriter = index.writer_with_options(options)?;
                    new.set_merge_policy(Box::new(NoMergePolicy));
                    writer.insert(new)
                }
            };
            work(index, writer)
        })
    }

    /// Stages one document.
    pub fn add(
        &mut self,
        docno: u64,
        title: &str,
        text: &str,
        filters: FilterValues,
    ) -> Result<()> {
        let mut document = TantivyDocument::default();
        document.add_u64(self.fields.docno, docno);
        document.add_text(self.fields.body, title);
        document.add_text(self.fields.body, text);
        filters.add_to(&self.fields.filters, &mut document);
        self.with_writer(|_, writer| writer.add_document(document).map(|_| ()))
    }

    /// Stages the removal of a document, whether it was committed or only staged before.
    pub fn delete(&mut self, docno: u64) -> Result<()> {
        let term = Term::from_field_u64(self.fields.docno, docno);
        self.with_writer(|_, writer| {
            writer.delete_term(term);
            Ok(())
        })
    }

    /// Stages that all segments become one, without what was deleted.
    pub fn compact(&mut self, meanwhile: Meanwhile<'_>) -> Result<()> {
        let directory = self.directory.clone();
        let compacted = self.with_writer(|index, writer| {
            let wait = Wait::new(&directory, meanwhile);
            wait.until(writer.prepare_commit()?.commit_future())?;
            let ids = index.searchable_segment_ids()?;
            if !ids.is_empty() {
                wait.until(writer.merge(&ids))?;
            }
            Ok(())
        });
        meanwhile.end(compacted)
    }

    /// Makes everything staged durable as the files of `generation`, and returns their full list.
    ///
    /// Nothing of an earlier generation is touched, and nothing refers to the new files before the
    /// store's manifest does.
    pub fn commit(&mut self, generation: u64, meanwhile: Meanwhile<'_>) -> Result<Vec<IndexFile>> {
        if self.writer.is_some() {
            let directory = self.directory.clone();
            let committed = self.with_writer(|index, writer| {
                commit(index, writer, &Wait::new(&directory, meanwhile))
            });
            meanwhile.end(committed)?;
        }
        // What is published stays where it is, even if the store's commit fails.
        meanwhile.progress.end()?;
        let living = guarded(&self.directory, || {
            Ok(self.index.load_metas()?.list_segment_files())
        })?;
        self.directory.publish(generation, &living)
    }
}

impl Drop for IndexWriter {
    fn drop(&mut self) {
        // Its threads first: they write. Documents that they have not come to are not worth the time any more.
        self.directory.stop();
        let writer = self.writer.take();
        let _ = catch_unwind(AssertUnwindSafe(move || drop(writer)));
        self.directory.remove_unpublished();
    }
}
