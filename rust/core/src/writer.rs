//! The face for the one writer: stages changes, then commits them as the next generation.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use roaring::RoaringTreemap;

use crate::bm25::{FilterValues, IndexWriter};
use crate::collect::{self, next_generation};
use crate::documents::{Contents, Document, DocumentId, IdBatch};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::experts::Experts;
use crate::files::Directory;
use crate::generation::{Generation, Index, index_files};
use crate::lock::{WriterLock, take_lock};
use crate::manifest::{Hash, Manifest, Part, Pinned, role};
use crate::new_folder::NewFolder;
use crate::routes::{Codec, CodecName, Decoder, DecoderInput, Keeps, Router};
use crate::spec::StoreSpec;
use crate::staged::Staged;
use crate::store::Store;
use crate::tensors::Tensor;
use crate::watch::{Progress, Unit, Unwatched, Watch};

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
    watch: Arc<dyn Watch>,
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
    /// The generation that may have been put in force, while nobody knows whether it was.
    pub in_doubt: Option<u64>,
    _lock: WriterLock,
}

/// What the next generation builds on.
#[derive(Debug)]
pub(crate) enum Base {
    /// A folder beside the path, and the parts that creation wrote into it.
    New {
        folder: Box<NewFolder>,
        parts: Vec<Part>,
    },
    Existing(Box<Generation>),
}

impl Base {
    /// None for a new store.
    pub fn generation(&self) -> Option<&Generation> {
        match self {
            Base::New { .. } => None,
            Base::Existing(base) => Some(base),
        }
    }
}

impl Writer {
    pub(crate) fn create(
        parent: Directory,
        name: &OsStr,
        spec: StoreSpec,
        experts: &[Tensor<'_>],
        decoder: Option<&DecoderInput<'_>>,
        expert_dtype: Option<Dtype>,
    ) -> Result<Self> {
        spec.validate()?;
        Manifest::expect_readable(&spec, &parent.path_of(name))?;
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
        let digest = Experts::write(&dir, &file, experts, &spec, expert_dtype)?;
        let mut parts = vec![Part::new(role::EXPERTS, file, digest)];
        let codec: Arc<dyn Codec> = spec.build_codec().into();
        let mut decoder_hash = None;
        if let Some(decoder) = decoder {
            let file = format!("{}-{:08}.safetensors", role::DECODER, 1);
            let digest = Decoder::write(&dir, &file, decoder, spec.logits(), codec.columns())?;
            decoder_hash = Some(Hash(digest.blake3));
            parts.push(Part::new(role::DECODER, file, digest));
        }
        let codec_name = spec.codec.to_string();
        Ok(Self {
            path,
            watch: Arc::new(Unwatched),
            session: Ok(Box::new(Session {
                dir,
                base: Base::New {
                    folder: Box::new(folder),
                    parts,
                },
                staged: Staged::new(1, 0, spec.id_type, &[], decoder_hash, codec_name),
                spec: Arc::new(spec),
                codec,
                index: None,
                in_doubt: None,
                _lock: lock,
            })),
        })
    }

    /// Gives a new store, whose codec keeps codes, its amortised router: named f32 tensors that make a document's
    /// code of its text. Once, and before the first commit.
    pub fn keep_router(&mut self, router: &[Tensor<'_>]) -> Result<()> {
        let session = self.session()?;
        if session.codec.keeps() != Keeps::Code {
            let codec = session.spec.codec;
            return Err(Error::invalid(format!(
                "codec {codec} keeps no codes and takes no router"
            )));
        }
        let parts = match &mut session.base {
            Base::New { parts, .. } if parts.iter().all(|p| p.role != role::ROUTER) => parts,
            _ => {
                return Err(Error::invalid(
                    "router: it is given once, to a new store before its first commit",
                ));
            }
        };
        let file = format!("{}-{:08}.safetensors", role::ROUTER, 1);
        let digest = Router::write(&session.dir, &file, router)?;
        parts.push(Part::new(role::ROUTER, file, digest));
        Ok(())
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
            watch: Arc::new(Unwatched),
            session: Ok(Box::new(Session {
                spec: Arc::clone(&base.spec),
                codec: Arc::clone(&base.codec),
                staged: Staged::on(&base, next_generation(&dir)?),
                base: Base::Existing(Box::new(base)),
                index: None,
                in_doubt: None,
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

    /// Puts a watch over the calls from here on, which count documents: each as often as it is gone through.
    /// After a call that it stopped half way the writer is closed, as after any other failure.
    pub fn watch(&mut self, watch: Arc<dyn Watch>) {
        self.watch = watch;
    }

    /// A call that takes `n` documents, each gone through twice, after those that are resolved first.
    fn begin(&mut self, n: usize, resolving: bool) -> Result<Progress> {
        let watch = Arc::clone(&self.watch);
        let session = self.session()?;
        let to_resolve = match resolving {
            true => session.staged.to_resolve(session.base.generation()),
            false => 0,
        };
        let total = to_resolve.saturating_add(2 * n as u64);
        Progress::begin(&watch, Unit::Documents, total)
    }

    /// Stages documents with their routes, or unrouted; all of a call or none. Returns how many.
    pub fn add(
        &mut self,
        documents: &[Document],
        routes: Option<RouteRows<'_>>,
        on_duplicate: OnDuplicate,
    ) -> Result<usize> {
        let progress = self.begin(documents.len(), true)?;
        self.resolve(&progress)?;
        let session = self.session()?;
        let plan = session.plan(documents, routes, on_duplicate, &progress)?;
        session.open_index(&plan)?;
        let staged = session.stage(plan, routes, &progress);
        self.or_poison(staged)
    }

    /// Stages documents of which nothing but id and route is known, in bulk and in bounded memory.
    /// Duplicates are looked for later, by the commit or before the next `add` or `delete`: a
    /// [`Error::DuplicateId`] comes from there. Returns how many were staged.
    pub fn add_arrays<'i>(
        &mut self,
        ids: impl Into<IdBatch<'i>>,
        routes: RouteRows<'_>,
        on_duplicate: OnDuplicate,
    ) -> Result<usize> {
        let ids = ids.into();
        let progress = self.begin(ids.len(), false)?;
        let session = self.session()?;
        session.check_shape(routes, ids.len())?;
        session.check_room(ids.len())?;
        ids.validate(session.spec.id_type)?;
        let check = |i: usize, id: &dyn Display| {
            session.check_row(id, session.row(routes, i))?;
            progress.add(1)
        };
        match ids {
            IdBatch::Any(ids) => (ids.iter().enumerate()).try_for_each(|(i, id)| check(i, id))?,
            IdBatch::U64(ids) => (ids.iter().enumerate()).try_for_each(|(i, id)| check(i, id))?,
        }
        let staged = session.staged.push_many(
            &session.dir,
            session.codec.as_ref(),
            ids,
            routes.data,
            on_duplicate,
            &progress,
        );
        let staged = staged
            .and_then(|()| session.staged.end_full_chunk(&session.dir, &progress))
            .and_then(|()| progress.end());
        self.or_poison(staged.map(|()| ids.len()))
    }

    /// After a duplicate or a failure half way nothing can be committed.
    fn resolve(&mut self, progress: &Progress) -> Result<()> {
        let resolved = self.session()?.resolve(progress);
        self.or_poison(resolved)
    }

    /// Stages deletions; all of a call or none. Returns how many documents it takes away.
    pub fn delete(&mut self, ids: &[DocumentId]) -> Result<usize> {
        let progress = self.begin(ids.len(), true)?;
        self.resolve(&progress)?;
        let session = self.session()?;
        let mut docnos = RoaringTreemap::new();
        for id in ids {
            progress.add(1)?;
            match session.lookup(id)? {
                Some(docno) => docnos.insert(docno),
                None => return Err(session.unknown(id)),
            };
        }
        if session.has_index() && !docnos.is_empty() {
            session.index()?;
        }
        let deleted = docnos.iter().try_for_each(|docno| {
            session.kill(docno)?;
            progress.add(1)
        });
        let deleted = deleted.and_then(|()| progress.end());
        self.or_poison(deleted.map(|()| docnos.len() as usize))
    }

    /// Stages the living documents of another store that has the same experts and decoder; returns how many.
    /// Duplicates are looked for as after [`Writer::add_arrays`].
    pub fn merge(&mut self, other: &Store, on_duplicate: OnDuplicate) -> Result<u64> {
        let other = other.current()?;
        let watch = Arc::clone(&self.watch);
        let session = self.session()?;
        session.expect_mergeable(&other)?;
        let total = other.manifest().documents;
        session.check_docnos(total)?;
        let progress = Progress::begin(&watch, Unit::Documents, total)?;
        let merged = session.merge(&other, on_duplicate, &progress);
        self.or_poison(merged)
    }

    /// Makes everything staged the next generation and returns its number; the writer stays open.
    /// With nothing staged the generation in force stays so.
    pub fn commit(&mut self) -> Result<u64> {
        self.end(Session::commit)
    }

    /// Takes what died out of the files and joins segments, as a new generation; returns its number.
    pub fn compact(&mut self) -> Result<u64> {
        self.session()?.expect_nothing_staged("compact")?;
        self.end(Session::compact)
    }

    /// Builds the BM25 index anew from kept text, as a new generation; returns its number.
    pub fn reindex(&mut self) -> Result<u64> {
        let session = self.session()?;
        session.expect_nothing_staged("reindex")?;
        session.expect_reindexable()?;
        self.end(Session::reindex)
    }

    /// Goes back to what the generation before held, as a new generation; returns its number.
    pub fn rollback(&mut self) -> Result<u64> {
        let session = self.session()?;
        session.expect_nothing_staged("rollback")?;
        let before = session.before()?;
        self.end(|session, path, _| session.rollback(before, path))
    }

    fn end(
        &mut self,
        work: impl FnOnce(&mut Session, &Path, &Arc<dyn Watch>) -> Result<u64>,
    ) -> Result<u64> {
        let (path, watch) = (self.path.clone(), Arc::clone(&self.watch));
        let number = work(self.session()?, &path, &watch);
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
        self.close("the writer was discarded".into());
    }

    fn close(&mut self, reason: String) {
        let session =
            std::mem::replace(&mut self.session, Err(format!("{reason}: open a new one")));
        if let Ok(mut session) = session {
            session.index = None; // its threads end before their files go
            session.staged.names.remove_all(&session.dir);
        }
    }

    /// After a failure half way, what is staged is not what the caller thinks: nothing of it may be committed.
    fn or_poison<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(e) = &result {
            let in_doubt = self.session.as_ref().ok().and_then(|s| s.in_doubt);
            self.close(match in_doubt {
                None => format!(
                    "the writer failed before ({e}) and nothing of what it staged was committed"
                ),
                Some(generation) => format!(
                    "the writer failed before ({e}), as it put generation {generation} in force: \
                     open the store to see whether it is"
                ),
            });
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
    chosen: Vec<(usize, &'d Document, Option<u64>, FilterValues)>,
}

impl Session {
    fn plan<'d>(
        &self,
        documents: &'d [Document],
        routes: Option<RouteRows<'_>>,
        on_duplicate: OnDuplicate,
        progress: &Progress,
    ) -> Result<Plan<'d>> {
        if let Some(routes) = routes {
            self.check_shape(routes, documents.len())?;
        }
        self.check_room(documents.len())?;
        let mut seen = HashSet::new();
        let mut chosen = Vec::with_capacity(documents.len());
        for (i, document) in documents.iter().enumerate() {
            progress.add(1)?;
            document.validate(self.spec.id_type)?;
            let metadata = document.metadata.as_deref();
            let values = FilterValues::of(&self.spec.filters, &document.id, metadata)?;
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
                _ => chosen.push((i, document, held, values)),
            }
        }
        Ok(Plan { chosen })
    }

    fn check_room(&self, n: usize) -> Result<()> {
        // A segment of ids counts its rows in 32 bits, and the ids of one call go into one.
        if u32::try_from(n).is_err() {
            let most = u32::MAX;
            return Err(Error::invalid(format!(
                "{n} documents in one call: {most} are the most"
            )));
        }
        self.check_docnos(n as u64)
    }

    fn check_docnos(&self, n: u64) -> Result<()> {
        match self.staged.next.checked_add(n) {
            Some(_) => Ok(()),
            None => Err(Error::invalid("the store has no docnos left")),
        }
    }

    fn check_shape(&self, routes: RouteRows<'_>, n: usize) -> Result<()> {
        let expected = match self.codec.keeps() {
            Keeps::Code => vec![n, self.codec.columns()],
            _ => vec![n, self.spec.groups(), self.spec.experts as usize],
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

    fn check_row(&self, id: &dyn Display, row: &[f32]) -> Result<()> {
        check_row(self.codec.as_ref(), self.spec.codec, id, row)
    }

    /// The document with this id as it would be after a commit.
    fn lookup(&self, id: &DocumentId) -> Result<Option<u64>> {
        if let Some(docno) = self.staged.lookup(id)? {
            return Ok(Some(docno));
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

    pub fn index(&mut self) -> Result<&mut IndexWriter> {
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
                let index =
                    IndexWriter::open(&self.dir, generation, &files, &self.spec.index_spec())?;
                Ok(self.index.insert(index))
            }
        }
    }

    /// An index that starts from nothing, whatever there is.
    pub fn start_index(&mut self) -> Result<()> {
        self.index = Some(IndexWriter::fresh(&self.dir, &self.spec.index_spec())?);
        Ok(())
    }

    /// Before anything is staged, so that an index that cannot be opened leaves the writer as it was.
    fn open_index(&mut self, plan: &Plan<'_>) -> Result<()> {
        let replaces = plan.chosen.iter().any(|(_, _, held, _)| held.is_some());
        let has_words = plan
            .chosen
            .iter()
            .any(|(_, d, _, _)| words(d.title.as_deref(), d.text.as_deref()).is_some());
        if has_words || (replaces && self.has_index()) {
            self.index()?;
        }
        Ok(())
    }

    fn stage(
        &mut self,
        plan: Plan<'_>,
        routes: Option<RouteRows<'_>>,
        progress: &Progress,
    ) -> Result<usize> {
        let added = plan.chosen.len();
        for (i, document, replaced, values) in plan.chosen {
            if let Some(docno) = replaced {
                self.kill(docno)?;
            }
            let docno = self.staged.next;
            if let Some((title, text)) = words(document.title.as_deref(), document.text.as_deref())
            {
                self.index()?.add(docno, title, text, values)?;
            }
            let contents = Contents {
                title: document.title.clone(),
                text: document.text.clone(),
                metadata: document.metadata.clone(),
            };
            let contents = contents_to_keep(&self.spec, contents);
            let row = routes.map(|routes| self.row(routes, i));
            self.staged
                .push(&self.dir, self.codec.as_ref(), &document.id, row, &contents)?;
            self.staged.end_full_chunk(&self.dir, progress)?;
            progress.add(1)?;
        }
        progress.end().map(|()| added)
    }

    /// Marks a living docno as dead.
    fn kill(&mut self, docno: u64) -> Result<()> {
        if self.has_index() {
            self.index()?.delete(docno)?;
        }
        let base = self.base.generation();
        self.staged.kill(docno, base)
    }

    /// Deals with the duplicates among what came in bulk.
    pub fn resolve(&mut self, progress: &Progress) -> Result<()> {
        let base = self.base.generation();
        let died = self.staged.resolve(&self.dir, base, progress)?;
        died.into_iter().try_for_each(|docno| self.kill(docno))
    }

    /// After a commit: the generation that it made is the new base.
    fn go_on(&mut self) -> Result<()> {
        self.in_doubt = None;
        self.index = None; // what was opened on the generation before
        let base = Generation::open(&self.dir, Index::Leave)?;
        self.staged = Staged::on(&base, next_generation(&self.dir)?);
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
}

/// Whether a codec can keep a row; the error names the document.
pub fn check_row(codec: &dyn Codec, name: CodecName, id: &dyn Display, row: &[f32]) -> Result<()> {
    codec.check(row).map_err(|reason| {
        Error::invalid(format!(
            "route of document {id}, for codec {name}: {reason}"
        ))
    })
}

/// Title and text as the index takes them, if there is anything to index.
pub fn words<'d>(title: Option<&'d str>, text: Option<&'d str>) -> Option<(&'d str, &'d str)> {
    let (title, text) = (title.unwrap_or_default(), text.unwrap_or_default());
    (!title.is_empty() || !text.is_empty()).then_some((title, text))
}

/// What a store keeps of a document.
pub fn contents_to_keep(spec: &StoreSpec, contents: Contents) -> Contents {
    Contents {
        title: contents.title.filter(|_| spec.keep_title),
        text: contents.text.filter(|_| spec.keep_text),
        metadata: contents.metadata.filter(|_| spec.keep_metadata),
    }
}
