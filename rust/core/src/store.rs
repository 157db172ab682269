//! The face for readers: one generation, open, shared between threads.

use std::ffi::OsStr;
use std::iter::FusedIterator;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwapOption;

use crate::bm25::{Filter, IndexReader, ResolvedFilter};
use crate::copy;
use crate::documents::{Document, DocumentId, LastBlock};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::experts::ExpertTensor;
use crate::files::Directory;
use crate::generation::{Generation, Index};
use crate::info::{self, StoreInfo};
use crate::manifest::{CURRENT, Current};
use crate::new_folder::parent_of;
use crate::parallel::in_parallel;
use crate::recode::{self, Recoding};
use crate::routes::{DecoderInput, Keeps};
use crate::spec::StoreSpec;
use crate::tensors::{Tensor, TensorView};
use crate::verify::{self, VerifyReport};
use crate::watch::{Progress, Unit, Unwatched, Watch};
use crate::writer::Writer;

/// A store, open for reading. It keeps its generation until [`Store::refresh`].
#[derive(Debug)]
pub struct Store {
    dir: Directory,
    generation: ArcSwapOption<Generation>,
    watch: Arc<dyn Watch>,
}

/// One document that BM25 found.
#[derive(Debug, Clone, PartialEq)]
pub struct Hit {
    pub id: DocumentId,
    pub score: f32,
    pub docno: u64,
}

/// How many routes are held at once to be combined.
const BATCH: usize = 4096;

/// What is asked of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// phi(z), each group summing to 1: [n, groups, K].
    Weights,
    /// The logits z: [n, groups, K].
    Logits,
    /// The code: [n, d].
    Code,
}

/// Numbers in C order.
#[derive(Debug, Clone, PartialEq)]
pub struct RouteArray {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Store {
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let dir = Directory::open(path).map_err(|e| match e.io_kind() {
            Some(std::io::ErrorKind::NotADirectory) => Error::NotAStore {
                path: path.to_owned(),
                reason: "it is a file, and a store is a directory".into(),
            },
            _ => e,
        })?;
        Self::open_in(dir)
    }

    /// As [`Store::open`], if the generation in force has this digest. Together with [`Store::verify`] that
    /// vouches for every byte.
    pub fn open_expecting(path: impl AsRef<Path>, digest: &str) -> Result<Self> {
        let store = Self::open(path)?;
        let found = store.digest()?;
        match found == digest {
            true => Ok(store),
            false => Err(Error::corrupt(
                store.dir.path_of(CURRENT),
                "digest",
                digest,
                found,
            )),
        }
    }

    /// The store in a directory that is open already.
    pub fn open_in(dir: Directory) -> Result<Self> {
        let generation = Generation::open(&dir, Index::Open)?;
        Ok(Self {
            dir,
            generation: ArcSwapOption::from_pointee(generation),
            watch: Arc::new(Unwatched),
        })
    }

    /// The same generation, with a watch over its long work: [`Store::verify`], [`Store::snapshot`],
    /// [`Store::pack`] and [`Store::recode`] count bytes, those that are gone through twice twice;
    /// [`Store::search_many`] counts questions.
    pub fn watched(&self, watch: Arc<dyn Watch>) -> Self {
        Self {
            dir: self.dir.clone(),
            generation: ArcSwapOption::new(self.generation.load_full()),
            watch,
        }
    }

    /// A writer for a new store; nothing is at `path` before its first commit. The experts are written as
    /// `expert_dtype`, or as they are given.
    pub fn create(
        path: impl AsRef<Path>,
        spec: StoreSpec,
        experts: &[Tensor<'_>],
        decoder: Option<&DecoderInput<'_>>,
        expert_dtype: Option<Dtype>,
    ) -> Result<Writer> {
        let (parent, name) = parent_of(path.as_ref())?;
        Self::create_in(parent, &name, spec, experts, decoder, expert_dtype)
    }

    /// As [`Store::create`], at `name` in a directory that is open already.
    pub fn create_in(
        parent: Directory,
        name: &OsStr,
        spec: StoreSpec,
        experts: &[Tensor<'_>],
        decoder: Option<&DecoderInput<'_>>,
        expert_dtype: Option<Dtype>,
    ) -> Result<Writer> {
        Writer::create(parent, name, spec, experts, decoder, expert_dtype)
    }

    /// The one writer; it builds on the newest generation, which may be newer than the one read here.
    pub fn writer(&self) -> Result<Writer> {
        self.current()?;
        Writer::open(self.dir.clone())
    }

    pub(crate) fn current(&self) -> Result<Arc<Generation>> {
        self.generation
            .load_full()
            .ok_or_else(|| Error::StoreClosed {
                path: self.dir.path().to_owned(),
                reason: "the store was closed: open it again".into(),
            })
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().to_owned()
    }

    pub fn generation(&self) -> Result<u64> {
        Ok(self.current()?.number())
    }

    pub fn spec(&self) -> Result<Arc<StoreSpec>> {
        Ok(Arc::clone(&self.current()?.spec))
    }

    /// Views into the mapped file, in the order of the modules, A before B.
    pub fn experts(&self) -> Result<Vec<ExpertTensor>> {
        Ok(self.current()?.experts.tensors().to_vec())
    }

    pub fn expert_dtype(&self) -> Result<Dtype> {
        Ok(self.current()?.experts.dtype())
    }

    /// V and b, if the codec keeps codes.
    pub fn decoder(&self) -> Result<Option<(TensorView, TensorView)>> {
        Ok(self.current()?.decoder.as_ref().and_then(|d| d.views()))
    }

    /// The tensors of the amortised router in order of their names, if the store has one.
    pub fn router(&self) -> Result<Option<Vec<TensorView>>> {
        let generation = self.current()?;
        Ok(generation.router.as_ref().map(|r| r.views().to_vec()))
    }

    /// Best first, of the documents that pass the filter. Anything is a question; one without a word
    /// finds nothing.
    pub fn search(&self, text: &str, k: usize, filter: Option<&Filter>) -> Result<Vec<Hit>> {
        Searcher::new(&*self.current()?, k, filter)?.search(text)
    }

    /// As [`Store::search`] for each text, all in one generation, on as many threads as there are
    /// processors.
    pub fn search_many<T: AsRef<str> + Sync>(
        &self,
        texts: &[T],
        k: usize,
        filter: Option<&Filter>,
    ) -> Result<Vec<Vec<Hit>>> {
        let generation = self.current()?;
        let searcher = Searcher::new(&generation, k, filter)?;
        let progress = Progress::begin(&self.watch, Unit::Questions, texts.len() as u64)?;
        let found = in_parallel(texts, |text| {
            let hits = searcher.search(text.as_ref())?;
            progress.add(1).map(|()| hits)
        })?;
        progress.end().map(|()| found)
    }

    pub fn routes(&self, ids: &[DocumentId], kind: Kind) -> Result<RouteArray> {
        let generation = self.current()?;
        let spec = &generation.spec;
        let docnos = generation.docnos(ids)?;
        if kind == Kind::Code {
            let keeps = generation.codec.keeps();
            if keeps != Keeps::Code {
                return Err(Error::invalid(format!(
                    "kind \"code\": the codec of this store, {}, keeps {keeps} and no code",
                    spec.codec
                )));
            }
            return Ok(RouteArray {
                shape: vec![ids.len(), generation.codec.columns()],
                data: generation.rows(&docnos)?,
            });
        }
        Ok(RouteArray {
            shape: vec![ids.len(), spec.groups(), spec.experts as usize],
            data: match kind {
                Kind::Weights => generation.weights(&docnos)?,
                _ => generation.logits(&docnos)?,
            },
        })
    }

    /// The records as the codec keeps them, [n, width]: the bytes, and the width.
    pub fn records(&self, ids: &[DocumentId]) -> Result<(Vec<u8>, usize)> {
        let generation = self.current()?;
        let width = generation.codec.record_bytes();
        let mut records = Vec::with_capacity(ids.len().saturating_mul(width));
        for id in ids {
            let docno = generation.docno(id)?;
            let segment = generation.route_segment(docno);
            match segment.map(|s| s.record(docno)).transpose()?.flatten() {
                Some(record) => records.extend_from_slice(record),
                None => return Err(Error::Unrouted { id: id.to_string() }),
            }
        }
        Ok((records, width))
    }

    /// sum_d weights[d] * w_d, of shape [groups, K]; equal weights 1/n if none are given.
    pub fn combined_route(
        &self,
        ids: &[DocumentId],
        weights: Option<&[f64]>,
    ) -> Result<RouteArray> {
        if ids.is_empty() {
            return Err(Error::invalid("combined_route: expected at least one id"));
        }
        let equal = vec![1.0 / ids.len() as f64; ids.len()];
        let weights = weights.unwrap_or(&equal);
        if weights.len() != ids.len() {
            return Err(Error::invalid(format!(
                "combined_route: {} ids, but {} weights",
                ids.len(),
                weights.len()
            )));
        }
        if let Some(bad) = weights.iter().find(|a| !a.is_finite()) {
            return Err(Error::invalid(format!(
                "combined_route: weight {bad} is not finite"
            )));
        }
        let generation = self.current()?;
        let spec = &generation.spec;
        let docnos = generation.docnos(ids)?;
        let mut sum = vec![0.0f64; spec.logits()];
        for (docnos, weights) in docnos.chunks(BATCH).zip(weights.chunks(BATCH)) {
            let rows = generation.weights(docnos)?;
            for (row, a) in rows.chunks_exact(spec.logits().max(1)).zip(weights) {
                for (sum, w) in sum.iter_mut().zip(row) {
                    *sum += a * f64::from(*w);
                }
            }
        }
        Ok(RouteArray {
            shape: vec![spec.groups(), spec.experts as usize],
            data: sum.into_iter().map(|w| w as f32).collect(),
        })
    }

    /// The documents with what the store keeps of them.
    pub fn documents(&self, ids: &[DocumentId]) -> Result<Vec<Document>> {
        let generation = self.current()?;
        let mut last = LastBlock::default();
        ids.iter()
            .map(|id| {
                let kept = generation.contents(generation.docno(id)?, &mut last)?;
                Ok(Document {
                    id: id.clone(),
                    title: kept.title,
                    text: kept.text,
                    metadata: kept.metadata,
                })
            })
            .collect()
    }

    pub fn contains(&self, id: &DocumentId) -> Result<bool> {
        Ok(self.current()?.lookup(id)?.is_some())
    }

    pub fn is_routed(&self, id: &DocumentId) -> Result<bool> {
        let generation = self.current()?;
        generation.is_routed(generation.docno(id)?)
    }

    /// The number of documents.
    pub fn len(&self) -> Result<u64> {
        Ok(self.current()?.manifest().documents)
    }

    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// All ids in order of docno; it keeps the generation that is open now.
    pub fn ids(&self) -> Result<Ids> {
        let generation = self.current()?;
        let docnos = generation.ids.first().map_or(0, |s| s.first());
        Ok(Ids {
            generation,
            next: docnos,
        })
    }

    pub fn info(&self) -> Result<StoreInfo> {
        info::info(&*self.current()?)
    }

    /// Reads everything and compares it with every checksum.
    pub fn verify(&self) -> Result<VerifyReport> {
        let generation = self.current()?;
        let total = verify::bytes(&generation);
        let progress = Progress::begin(&self.watch, Unit::Bytes, total)?;
        verify::verify(&generation, &progress)
    }

    /// What this generation is: the BLAKE3 of its manifest, which names every part with its own. Copies
    /// (snapshots, packed stores) have the digest of their source.
    pub fn digest(&self) -> Result<String> {
        Ok(self.current()?.current().blake3.to_string())
    }

    /// Copies this generation, and nothing of others, to a new store at `path`.
    pub fn snapshot(&self, path: impl AsRef<Path>) -> Result<()> {
        let (parent, name) = parent_of(path.as_ref())?;
        self.snapshot_in(parent, &name)
    }

    /// As [`Store::snapshot`], at `name` in a directory that is open already.
    pub fn snapshot_in(&self, parent: Directory, name: &OsStr) -> Result<()> {
        copy::snapshot(&*self.current()?, parent, name, &self.watch)
    }

    /// Writes this generation into one new file at `path`.
    pub fn pack(&self, path: impl AsRef<Path>) -> Result<()> {
        let (parent, name) = parent_of(path.as_ref())?;
        self.pack_in(parent, &name)
    }

    /// As [`Store::pack`], at `name` in a directory that is open already.
    pub fn pack_in(&self, parent: Directory, name: &OsStr) -> Result<()> {
        copy::pack(&*self.current()?, &parent, name, &self.watch)
    }

    /// Makes a new store at `path` of a file that [`Store::pack`] wrote.
    pub fn unpack(file: impl AsRef<Path>, path: impl AsRef<Path>) -> Result<()> {
        let (parent, name) = parent_of(path.as_ref())?;
        Self::unpack_in(file, parent, &name)
    }

    /// As [`Store::unpack`], with a watch over it that counts bytes.
    pub fn unpack_watched(
        file: impl AsRef<Path>,
        path: impl AsRef<Path>,
        watch: Arc<dyn Watch>,
    ) -> Result<()> {
        let (parent, name) = parent_of(path.as_ref())?;
        copy::unpack(file.as_ref(), parent, &name, &watch)
    }

    /// As [`Store::unpack`], at `name` in a directory that is open already.
    pub fn unpack_in(file: impl AsRef<Path>, parent: Directory, name: &OsStr) -> Result<()> {
        let watch: Arc<dyn Watch> = Arc::new(Unwatched);
        copy::unpack(file.as_ref(), parent, name, &watch)
    }

    /// Writes a new store at `path` with the same documents, their routes or the experts kept in another way.
    pub fn recode(&self, path: impl AsRef<Path>, recoding: &Recoding<'_>) -> Result<()> {
        let (parent, name) = parent_of(path.as_ref())?;
        self.recode_in(parent, &name, recoding)
    }

    /// As [`Store::recode`], at `name` in a directory that is open already.
    pub fn recode_in(
        &self,
        parent: Directory,
        name: &OsStr,
        recoding: &Recoding<'_>,
    ) -> Result<()> {
        recode::recode(&*self.current()?, parent, name, recoding, &self.watch)
    }

    /// Moves on to the newest generation; true if there was one.
    pub fn refresh(&self) -> Result<bool> {
        let held = self.current()?;
        if Current::read(&self.dir)? == *held.current() {
            return Ok(false);
        }
        let newest = Arc::new(Generation::open(&self.dir, Index::Open)?);
        // Closed meanwhile stays closed; of two that refresh at once, the later generation stays.
        self.generation.rcu(|now| match now {
            Some(now) if now.number() < newest.number() || now.number() == held.number() => {
                Some(Arc::clone(&newest))
            }
            other => other.clone(),
        });
        Ok(true)
    }

    /// Lets go of the files; views that were handed out keep theirs.
    pub fn close(&self) {
        self.generation.store(None);
    }

    pub fn is_closed(&self) -> bool {
        self.generation.load().is_none()
    }
}

/// What all the questions of one call share.
struct Searcher<'g> {
    generation: &'g Generation,
    /// None where nothing can be found.
    index: Option<&'g IndexReader>,
    k: usize,
    filter: Option<ResolvedFilter>,
}

impl<'g> Searcher<'g> {
    fn new(generation: &'g Generation, k: usize, filter: Option<&Filter>) -> Result<Self> {
        let filters = &generation.spec.filters;
        let filter = filter.map(|filter| filter.resolve(filters)).transpose()?;
        let documents = usize::try_from(generation.manifest().documents).unwrap_or(usize::MAX);
        let index = generation.index.as_ref().map(|index| index.get());
        Ok(Self {
            generation,
            index: index.transpose()?,
            k: k.min(documents),
            filter,
        })
    }

    fn search(&self, text: &str) -> Result<Vec<Hit>> {
        let generation = self.generation;
        let Some(index) = self.index.filter(|_| self.k > 0) else {
            return Ok(Vec::new());
        };
        let is_dead = |docno| !generation.is_alive(docno);
        index
            .search(text, self.k, self.filter.as_ref(), &is_dead)?
            .into_iter()
            .map(|(docno, score)| match generation.id_of(docno)? {
                Some(id) => Ok(Hit { id, score, docno }),
                None => Err(Error::corrupt_index(
                    generation.dir.path_of(crate::files::INDEX_FOLDER),
                    format!("it found docno {docno}, which has no id"),
                )),
            })
            .collect()
    }
}

/// Iterates over the ids of one generation.
#[derive(Debug)]
pub struct Ids {
    generation: Arc<Generation>,
    next: u64,
}

impl Iterator for Ids {
    type Item = Result<DocumentId>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.next < self.generation.manifest().next_docno {
            let docno = self.next;
            self.next += 1;
            if !self.generation.is_alive(docno) {
                continue;
            }
            match self.generation.id_of(docno) {
                Ok(Some(id)) => return Some(Ok(id)),
                // A gap between segments, which a hostile manifest could make very long, is skipped.
                Ok(None) => match self.generation.next_covered(docno) {
                    Some(next) => self.next = next,
                    None => self.next = u64::MAX,
                },
                Err(e) => {
                    self.next = u64::MAX;
                    return Some(Err(e));
                }
            }
        }
        None
    }
}

impl FusedIterator for Ids {}
