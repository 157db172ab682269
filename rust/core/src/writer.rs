//! The face for the one writer: stages changes in memory, then commits them as the next generation.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use roaring::RoaringTreemap;

use crate::bm25::IndexWriter;
use crate::collect;
use crate::documents::{Contents, Document, DocumentId};
use crate::error::{Error, Result};
use crate::experts::Experts;
use crate::files::Directory;
use crate::generation::{Generation, Index, index_files};
use crate::lock::take_lock;
use crate::manifest::{Hash, Manifest, Part, Pinned, role};
use crate::new_folder::NewFolder;
use crate::routes::{Codec, Decoder, DecoderInput, Keeps};
use crate::spec::StoreSpec;
use crate::tensors::Tensor;

/// What becomes of a document whose id is in the store already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnDuplicate {
    #[default]
    Error,
    /// The new one takes its place, under a new docno.
    Replace,
    /// The one in the store stays.
    Skip,
}

/// Routes as a caller gives them, C order: [n, groups, K] logits or [n, d] codes.
#[derive(Debug, Clone, Copy)]
pub struct RouteRows<'r> {
    pub shape: &'r [usize],
    pub data: &'r [f32],
}

/// The one writer of a store. Dropping it without a commit leaves no trace.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// Or why there is none any more.
    session: Result<Box<Session>, String>,
}

/// A writer at work.
#[derive(Debug)]
pub(crate) struct Session {
    pub dir: Directory,
    pub base: Base,
    pub spec: Arc<StoreSpec>,
    pub codec: Arc<dyn Codec>,
    pub staged: Staged,
    /// Opened when the first document with words comes.
    pub index: Option<IndexWriter>,
    _lock: File,
}

/// What the next generation builds on.
#[derive(Debug)]
pub(crate) enum Base {
    /// A folder beside the path, and the parts that creation wrote into it.
    New {
        folder: NewFolder,
        parts: Vec<Part>,
    },
    Existing(Box<Generation>),
}

/// Changes since the last commit.
#[derive(Debug)]
pub(crate) struct Staged {
    /// The docno of the first entry.
    pub first: u64,
    pub entries: Vec<Entry>,
    pub by_id: HashMap<DocumentId, u64>,
    /// Docnos that died, of the base and of the entries.
    pub dead: RoaringTreemap,
    /// Of those, documents of the base, and how many of them had no route.
    pub dead_in_base: u64,
    pub dead_unrouted_in_base: u64,
    /// Rows of routes, one after the other.
    pub routes: Vec<f32>,
}

#[derive(Debug)]
pub(crate) struct Entry {
    pub id: DocumentId,
    pub contents: Contents,
    /// Which row of the staged routes.
    pub route: Option<usize>,
}

impl Staged {
    pub fn new(first: u64) -> Self {
        Self {
            first,
            entries: Vec::new(),
            by_id: HashMap::new(),
            dead: RoaringTreemap::new(),
            dead_in_base: 0,
            dead_unrouted_in_base: 0,
            routes: Vec::new(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.dead.is_empty()
    }
}

impl Writer {
    pub(crate) fn create(
        parent: Directory,
        name: &OsStr,
        spec: StoreSpec,
        experts: &[Tensor<'_>],
        decoder: Option<&DecoderInput<'_>>,
    ) -> Result<Self> {
        spec.validate()?;
        if decoder.is_some() != (spec.codec.keeps() == Keeps::Code) {
            let (codec, needs) = (
                spec.codec,
                if decoder.is_some() {
                    "takes no"
                } else {
                    "needs a"
                },
            );
            return Err(Error::invalid(format!("codec {codec} {needs} decoder")));
        }
        let path = parent.path_of(name);
        let folder = NewFolder::beside(parent, name)?;
        let dir = folder.dir().clone();
        let lock = take_lock(&dir)?;
        let file = format!("{}-{:08}.safetensors", role::EXPERTS, 1);
        let digest = Experts::write(&dir, &file, experts, &spec)?;
        let mut parts = vec![Part::new(role::EXPERTS, file, digest)];
        let codec: Arc<dyn Codec> = spec.codec.build(spec.logits()).into();
        if let Some(decoder) = decoder {
            let file = format!("{}-{:08}.safetensors", role::DECODER, 1);
            let digest = Decoder::write(&dir, &file, decoder, spec.logits(), codec.columns())?;
            parts.push(Part::new(role::DECODER, file, digest));
        }
        Ok(Self {
            path,
            session: Ok(Box::new(Session {
                dir,
                base: Base::New { folder, parts },
                spec: Arc::new(spec),
                codec,
                staged: Staged::new(0),
                index: None,
                _lock: lock,
            })),
        })
    }

    pub(crate) fn open(dir: Directory) -> Result<Self> {
        let lock = take_lock(&dir)?;
        let pinned = Pinned::newest(&dir)?;
        pinned
            .manifest
            .check_writable(&dir.path_of(&pinned.current.manifest))?;
        let base = Generation::from_pinned(&dir, pinned, Index::Leave)?;
        // What a writer that was killed left behind. It may fail: the names of this one are new anyhow.
        let _ = collect::collect(&dir);
        Ok(Self {
            path: dir.path().to_owned(),
            session: Ok(Box::new(Session {
                spec: Arc::clone(&base.spec),
                codec: Arc::clone(&base.codec),
                staged: Staged::new(base.manifest().next_docno),
                base: Base::Existing(Box::new(base)),
                index: None,
                dir,
                _lock: lock,
            })),
        })
    }

    fn session(&mut self) -> Result<&mut Session> {
        match &mut self.session {
            Ok(session) => Ok(session),
            Err(reason) => Err(Error::StoreClosed {
                path: self.path.clone(),
                reason: reason.clone(),
            }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn is_closed(&self) -> bool {
        self.session.is_err()
    }

    pub fn spec(&mut self) -> Result<Arc<StoreSpec>> {
        Ok(Arc::clone(&self.session()?.spec))
    }

    /// Stages documents with their routes, or unrouted; all of a call or none. Returns how many.
    pub fn add(
        &mut self,
        documents: &[Document],
        routes: Option<RouteRows<'_>>,
        on_duplicate: OnDuplicate,
    ) -> Result<usize> {
        let session = self.session()?;
        let plan = session.plan(documents, routes, on_duplicate)?;
        session.open_index(&plan)?;
        let staged = session.stage(&plan, routes);
        self.or_poison(staged)
    }

    /// Stages documents of which nothing but id and route is known.
    pub fn add_arrays(
        &mut self,
        ids: &[DocumentId],
        routes: RouteRows<'_>,
        on_duplicate: OnDuplicate,
    ) -> Result<usize> {
        let documents: Vec<Document> = ids.iter().cloned().map(Document::new).collect();
        self.add(&documents, Some(routes), on_duplicate)
    }

    /// Stages deletions; all of a call or none. Returns how many documents it takes away.
    pub fn delete(&mut self, ids: &[DocumentId]) -> Result<usize> {
        let session = self.session()?;
        let mut docnos = RoaringTreemap::new();
        for id in ids {
            match session.lookup(id)? {
                Some(docno) => docnos.insert(docno),
                None => return Err(session.unknown(id)),
            };
        }
        if session.has_index() {
            session.index()?;
        }
        let deleted = docnos.iter().try_for_each(|docno| session.kill(docno));
        self.or_poison(deleted.map(|()| docnos.len() as usize))
    }

    /// Makes everything staged the next generation and returns its number; the writer stays open.
    /// With nothing staged the generation in force stays so.
    pub fn commit(&mut self) -> Result<u64> {
        let path = self.path.clone();
        let session = self.session()?;
        let number = session.commit(&path);
        let number = self.or_poison(number)?;
        // The commit has happened, whatever comes of going on.
        let reopened = self.session().and_then(|s| s.go_on());
        if let Err(e) = reopened {
            self.session = Err(format!(
                "generation {number} is committed, but the writer could not go on: {e}"
            ));
        }
        Ok(number)
    }

    /// Forgets everything staged, and the store itself if it was never committed.
    pub fn discard(&mut self) {
        self.close("the writer was discarded");
    }

    fn close(&mut self, reason: &str) {
        let session =
            std::mem::replace(&mut self.session, Err(format!("{reason}: open a new one")));
        if let Ok(session) = session
            && let Some(index) = session.index
        {
            index.discard();
        }
    }

    /// After a failure half way, what is staged is not what the caller thinks: nothing of it may be committed.
    fn or_poison<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(e) = &result {
            self.close(&format!(
                "the writer failed before ({e}) and nothing of what it staged was committed"
            ));
        }
        result
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.discard();
    }
}

/// The documents of one call that will be staged, each with its place in the call and whom it replaces.
struct Plan<'d> {
    chosen: Vec<(usize, &'d Document, Option<u64>)>,
}

impl Session {
    fn plan<'d>(
        &self,
        documents: &'d [Document],
        routes: Option<RouteRows<'_>>,
        on_duplicate: OnDuplicate,
    ) -> Result<Plan<'d>> {
        if let Some(routes) = routes {
            self.check_shape(routes, documents.len())?;
        }
        let room = u64::MAX - self.staged.first - self.staged.entries.len() as u64;
        if documents.len() as u64 > room {
            return Err(Error::invalid("the store has no docnos left"));
        }
        let mut seen = HashSet::new();
        let mut chosen = Vec::with_capacity(documents.len());
        for (i, document) in documents.iter().enumerate() {
            document.validate(self.spec.id_type)?;
            if let Some(routes) = routes {
                self.check_row(&document.id, self.row(routes, i))?;
            }
            let again = !seen.insert(&document.id);
            let held = self.lookup(&document.id)?;
            let duplicate = |reason: &str| {
                Err(Error::DuplicateId {
                    id: document.id.to_string(),
                    reason: reason.into(),
                })
            };
            match on_duplicate {
                OnDuplicate::Skip if again || held.is_some() => {}
                _ if again => return duplicate("appears twice in one call"),
                OnDuplicate::Error if held.is_some() => {
                    return duplicate(
                        "is in the store already: replace it, skip it, or delete it first",
                    );
                }
                _ => chosen.push((i, document, held)),
            }
        }
        Ok(Plan { chosen })
    }

    fn check_shape(&self, routes: RouteRows<'_>, n: usize) -> Result<()> {
        let expected = match self.codec.keeps() {
            Keeps::Logits => vec![n, self.spec.groups(), self.spec.experts as usize],
            Keeps::Code => vec![n, self.codec.columns()],
        };
        let numbers = expected
            .iter()
            .try_fold(1usize, |product, x| product.checked_mul(*x));
        if routes.shape != expected || numbers != Some(routes.data.len()) {
            return Err(Error::invalid(format!(
                "routes: expected shape {expected:?} for {n} documents and codec {}, got {:?} with {} numbers",
                self.spec.codec,
                routes.shape,
                routes.data.len()
            )));
        }
        Ok(())
    }

    fn row<'r>(&self, routes: RouteRows<'r>, i: usize) -> &'r [f32] {
        let width = self.codec.columns();
        // `check_shape` has seen that the row is there.
        routes
            .data
            .get(i * width..(i + 1) * width)
            .unwrap_or_default()
    }

    fn check_row(&self, id: &DocumentId, row: &[f32]) -> Result<()> {
        let limit = self.codec.limit();
        match row
            .iter()
            .enumerate()
            .find(|(_, x)| !x.is_finite() || x.abs() > limit)
        {
            None => Ok(()),
            Some((column, x)) => Err(Error::invalid(format!(
                "route of document {id}: number {column} is {x}, and codec {} keeps finite numbers up to {limit:e}",
                self.spec.codec
            ))),
        }
    }

    /// The document with this id as it would be after a commit.
    fn lookup(&self, id: &DocumentId) -> Result<Option<u64>> {
        if let Some(docno) = self.staged.by_id.get(id) {
            return Ok(Some(*docno));
        }
        match &self.base {
            Base::New { .. } => Ok(None),
            Base::Existing(base) => Ok(base
                .lookup(id)?
                .filter(|docno| !self.staged.dead.contains(*docno))),
        }
    }

    fn unknown(&self, id: &DocumentId) -> Error {
        match &self.base {
            Base::Existing(base) => base.unknown(id),
            Base::New { .. } => Error::UnknownId {
                id: id.to_string(),
                hint: String::new(),
            },
        }
    }

    /// Whether any document of the store was ever indexed.
    fn has_index(&self) -> bool {
        let in_base = match &self.base {
            Base::New { .. } => false,
            Base::Existing(base) => base.manifest().index_generation.is_some(),
        };
        in_base || self.index.is_some()
    }

    fn index(&mut self) -> Result<&mut IndexWriter> {
        match self.index.take() {
            Some(index) => Ok(self.index.insert(index)),
            None => {
                let (generation, files) = match &self.base {
                    Base::New { .. } => (None, Vec::new()),
                    Base::Existing(base) => (
                        base.manifest().index_generation,
                        index_files(base.manifest()),
                    ),
                };
                let index = IndexWriter::open(&self.dir, generation, &files, &self.spec.analyser)?;
                Ok(self.index.insert(index))
            }
        }
    }

    /// Before anything is staged, so that an index that cannot be opened leaves the writer as it was.
    fn open_index(&mut self, plan: &Plan<'_>) -> Result<()> {
        let replaces = plan.chosen.iter().any(|(_, _, held)| held.is_some());
        let has_words = plan.chosen.iter().any(|(_, d, _)| has_words(d));
        if has_words || (replaces && self.has_index()) {
            self.index()?;
        }
        Ok(())
    }

    fn stage(&mut self, plan: &Plan<'_>, routes: Option<RouteRows<'_>>) -> Result<usize> {
        for (i, document, replaced) in &plan.chosen {
            if let Some(docno) = replaced {
                self.kill(*docno)?;
            }
            let docno = self.staged.first + self.staged.entries.len() as u64;
            if has_words(document) {
                let title = document.title.as_deref().unwrap_or_default();
                let text = document.text.as_deref().unwrap_or_default();
                self.index()?.add(docno, title, text)?;
            }
            let route = routes.map(|routes| {
                let row = self.staged.routes.len() / self.codec.columns().max(1);
                let numbers = self.row(routes, *i);
                self.staged.routes.extend_from_slice(numbers);
                row
            });
            let keep = |kept: bool, field: &Option<String>| field.clone().filter(|_| kept);
            self.staged.by_id.insert(document.id.clone(), docno);
            self.staged.entries.push(Entry {
                id: document.id.clone(),
                contents: Contents {
                    title: keep(self.spec.keep_title, &document.title),
                    text: keep(self.spec.keep_text, &document.text),
                    metadata: keep(self.spec.keep_metadata, &document.metadata),
                },
                route,
            });
        }
        Ok(plan.chosen.len())
    }

    /// Marks a living docno as dead.
    fn kill(&mut self, docno: u64) -> Result<()> {
        if self.has_index() {
            self.index()?.delete(docno)?;
        }
        self.staged.dead.insert(docno);
        let place = docno.checked_sub(self.staged.first).map(|i| i as usize);
        match place.and_then(|i| self.staged.entries.get_mut(i)) {
            Some(entry) => {
                // Its docno was given out; nothing else of it needs to be written.
                entry.contents = Contents::default();
                entry.route = None;
                self.staged.by_id.remove(&entry.id);
            }
            None => {
                self.staged.dead_in_base += 1;
                if let Base::Existing(base) = &self.base {
                    self.staged.dead_unrouted_in_base += u64::from(!base.is_routed(docno)?);
                }
            }
        }
        Ok(())
    }

    /// After a commit: the generation that it made is the new base.
    fn go_on(&mut self) -> Result<()> {
        let base = Generation::open(&self.dir, Index::Leave)?;
        self.staged = Staged::new(base.manifest().next_docno);
        self.base = Base::Existing(Box::new(base));
        let _ = collect::collect(&self.dir);
        Ok(())
    }

    /// The manifest on which the next one builds.
    pub fn base_manifest(&self) -> Manifest {
        match &self.base {
            Base::Existing(base) => base.manifest().clone(),
            Base::New { parts, .. } => Manifest {
                parts: parts.clone(),
                ..Manifest::empty((*self.spec).clone())
            },
        }
    }

    /// The scales that were fitted last.
    pub fn newest_scales(&self) -> Option<(Hash, &[f32])> {
        match &self.base {
            Base::New { .. } => None,
            Base::Existing(base) => base.scales.last().map(|(hash, s)| (*hash, s.values())),
        }
    }
}

fn has_words(document: &Document) -> bool {
    [&document.title, &document.text]
        .into_iter()
        .flatten()
        .any(|field| !field.is_empty())
}
