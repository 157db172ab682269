//! One generation, open: what a reader holds and what a writer builds on.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::bm25::{IndexFile, LazyIndex};
use crate::documents::{Contents, Dead, DocumentId, IdSegment, KeptSegment, LastBlock};
use crate::error::{Error, Result};
use crate::experts::Experts;
use crate::files::{Directory, Mapped};
use crate::manifest::{Current, Hash, Manifest, Part, Pinned, role};
use crate::parallel::in_parallel;
use crate::routes::{Codec, Decoder, Keeps, RouteSegment, Router, Scales, route_weights};
use crate::spec::{IdType, StoreSpec};

#[derive(Debug)]
pub struct Generation {
    pub dir: Directory,
    pub pinned: Pinned,
    pub spec: Arc<StoreSpec>,
    pub codec: Arc<dyn Codec>,
    pub experts: Experts,
    pub decoder: Option<Decoder>,
    pub router: Option<Router>,
    pub scales: Vec<(Hash, Arc<Scales>)>,
    // All three in order of docnos, none overlapping another.
    pub routes: Vec<RouteSegment>,
    pub ids: Vec<IdSegment>,
    pub kept: Vec<KeptSegment>,
    pub dead: Dead,
    /// Opened by the first search; an index that cannot be read takes only `search` with it.
    pub index: Option<LazyIndex>,
}

/// Whether to open the BM25 index for searching.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    Open,
    Leave,
}

impl Generation {
    pub fn open(dir: &Directory, index: Index) -> Result<Self> {
        Self::from_pinned(dir, Pinned::newest(dir)?, index)
    }

    pub fn from_pinned(dir: &Directory, pinned: Pinned, index: Index) -> Result<Self> {
        let manifest = &pinned.manifest;
        let spec = Arc::new(manifest.spec.clone());
        let codec: Arc<dyn Codec> = spec.build_codec().into();
        let map = |part: &Part| dir.map(&part.file, part.length);
        let only = |role| manifest.of_role(role).next();
        let missing = |role: &str| {
            Error::corrupt(
                dir.path_of(&pinned.current.manifest),
                "parts",
                format!("one of role {role}"),
                "none",
            )
        };

        let experts = only(role::EXPERTS).ok_or_else(|| missing(role::EXPERTS))?;
        let experts = Experts::open(map(experts)?, &spec)?;
        let decoder = match only(role::DECODER) {
            Some(part) => Some(Decoder::open(map(part)?, spec.logits(), codec.columns())?),
            None => None,
        };
        let router = match only(role::ROUTER) {
            Some(part) => Some(Router::open(map(part)?)?),
            None => None,
        };
        let mut scales = Vec::new();
        for part in manifest.of_role(role::SCALES) {
            scales.push((
                part.blake3,
                Arc::new(Scales::open(map(part)?, codec.columns())?),
            ));
        }
        let routes = open_routes(dir, manifest, &codec, &scales, map)?;
        let ids: Vec<IdSegment> = manifest
            .of_role(role::IDS)
            .map(|part| IdSegment::open(map(part)?, spec.id_type))
            .collect::<Result<_>>()?;
        let kept: Vec<KeptSegment> = manifest
            .of_role(role::DOCUMENTS)
            .map(|part| KeptSegment::open(map(part)?))
            .collect::<Result<_>>()?;
        let dead = match only(role::DEAD) {
            Some(part) => Dead::open(map(part)?, manifest.next_docno)?,
            None => Dead::default(),
        };

        let path = dir.path_of(&pinned.current.manifest);
        let end = manifest.next_docno;
        for (what, ranges) in [
            (
                role::ROUTES,
                routes
                    .iter()
                    .map(|s| (s.first(), s.end()))
                    .collect::<Vec<_>>(),
            ),
            (
                role::IDS,
                ids.iter().map(|s| (s.first(), s.end())).collect(),
            ),
            (
                role::DOCUMENTS,
                kept.iter().map(|s| (s.first(), s.end())).collect(),
            ),
        ] {
            check_ranges(&path, what, &ranges, end)?;
        }
        // Every docno has an id until it is dead and left out, so these three numbers tell of each other.
        let given: u64 = ids.iter().map(IdSegment::rows).sum();
        let alive = given.checked_sub(dead.docnos().len());
        if alive != Some(manifest.documents) {
            let expected = format!("{given} ids less {} dead", dead.docnos().len());
            return Err(Error::corrupt(
                path,
                "documents",
                expected,
                manifest.documents,
            ));
        }
        let index = match (index, manifest.index_generation) {
            (Index::Open, Some(generation)) => {
                let files = index_files(manifest);
                Some(LazyIndex::new(dir, generation, files, spec.index_spec()))
            }
            _ => None,
        };
        Ok(Self {
            dir: dir.clone(),
            spec,
            codec,
            experts,
            decoder,
            router,
            scales,
            routes,
            ids,
            kept,
            dead,
            index,
            pinned,
        })
    }

    pub fn manifest(&self) -> &Manifest {
        &self.pinned.manifest
    }

    pub fn current(&self) -> &Current {
        &self.pinned.current
    }

    pub fn number(&self) -> u64 {
        self.manifest().generation
    }

    fn is_dead(&self, docno: u64) -> bool {
        docno >= self.manifest().next_docno || self.dead.contains(docno)
    }

    /// Whether a docno is a document that can be found.
    pub fn is_alive(&self, docno: u64) -> bool {
        !self.is_dead(docno)
    }

    /// The docno of the document with this id. Newer segments win.
    pub fn lookup(&self, id: &DocumentId) -> Result<Option<u64>> {
        if id.kind() != self.spec.id_type {
            return Ok(None);
        }
        for segment in self.ids.iter().rev() {
            if let Some(docno) = segment.find(id, |docno| self.is_dead(docno))? {
                return Ok(Some(docno));
            }
        }
        Ok(None)
    }

    pub fn docno(&self, id: &DocumentId) -> Result<u64> {
        self.lookup(id)?.ok_or_else(|| self.unknown(id))
    }

    pub fn unknown(&self, id: &DocumentId) -> Error {
        let hint = match (id.kind() == self.spec.id_type, self.spec.id_type) {
            (true, _) => "",
            (false, IdType::String) => ": the ids of this store are strings",
            (false, IdType::U64) => ": the ids of this store are integers",
        };
        Error::UnknownId {
            id: id.to_string(),
            hint: hint.into(),
        }
    }

    pub fn id_of(&self, docno: u64) -> Result<Option<DocumentId>> {
        match in_range(&self.ids, docno, IdSegment::first) {
            Some(segment) => segment.id(docno),
            None => Ok(None),
        }
    }

    /// The docnos of all living documents, in order.
    pub fn living(&self) -> impl Iterator<Item = u64> + '_ {
        self.ids
            .iter()
            .flat_map(IdSegment::docnos)
            .filter(|docno| self.is_alive(*docno))
    }

    /// The segment of routes whose range may hold the docno.
    pub fn route_segment(&self, docno: u64) -> Option<&RouteSegment> {
        in_range(&self.routes, docno, RouteSegment::first)
    }

    /// The next docno above this one that a segment of ids covers.
    pub fn next_covered(&self, docno: u64) -> Option<u64> {
        let next = docno.checked_add(1)?;
        self.ids
            .iter()
            .find(|segment| segment.end() > next)
            .map(|segment| segment.first().max(next))
    }

    pub fn contents(&self, docno: u64, last: &mut LastBlock) -> Result<Contents> {
        match in_range(&self.kept, docno, KeptSegment::first) {
            Some(segment) => Ok(segment.read(docno, last)?.unwrap_or_default()),
            None => Ok(Contents::default()),
        }
    }

    pub fn is_routed(&self, docno: u64) -> Result<bool> {
        match in_range(&self.routes, docno, RouteSegment::first) {
            Some(segment) => segment.contains(docno),
            None => Ok(false),
        }
    }

    /// The row of a docno as its codec keeps it; false if it has none.
    pub fn read_row(&self, docno: u64, row: &mut [f32]) -> Result<bool> {
        match in_range(&self.routes, docno, RouteSegment::first) {
            Some(segment) => segment.read(docno, row),
            None => Ok(false),
        }
    }

    /// The docnos of documents, each of which must be there.
    pub fn docnos(&self, ids: &[DocumentId]) -> Result<Vec<u64>> {
        ids.iter().map(|id| self.docno(id)).collect()
    }

    /// The rows of documents as their codec keeps them, one after the other; each must have one.
    pub fn rows(&self, docnos: &[u64]) -> Result<Vec<f32>> {
        in_batches(docnos, self.codec.columns(), |docnos, rows| {
            self.read_rows(docnos, rows)
        })
    }

    fn read_rows(&self, docnos: &[u64], rows: &mut [f32]) -> Result<()> {
        let columns = self.codec.columns().max(1);
        for (docno, row) in docnos.iter().zip(rows.chunks_exact_mut(columns)) {
            if !self.read_row(*docno, row)? {
                let id = self.id_of(*docno)?;
                let id = id.map_or_else(|| format!("of docno {docno}"), |id| id.to_string());
                return Err(Error::Unrouted { id });
            }
        }
        Ok(())
    }

    /// The logits of documents, one after the other.
    pub fn logits(&self, docnos: &[u64]) -> Result<Vec<f32>> {
        if self.codec.keeps() == Keeps::Weights {
            return Err(self.has_no_logits());
        }
        in_batches(docnos, self.spec.logits(), |docnos, logits| {
            self.read_logits(docnos, logits)
        })
    }

    fn read_logits(&self, docnos: &[u64], logits: &mut [f32]) -> Result<()> {
        match (self.codec.keeps(), &self.decoder) {
            (Keeps::Logits, _) => self.read_rows(docnos, logits),
            (Keeps::Weights, _) => Err(self.has_no_logits()),
            (Keeps::Code, Some(decoder)) => {
                let mut codes = room(docnos.len(), self.codec.columns())?;
                self.read_rows(docnos, &mut codes)?;
                decoder.decode(&codes, logits)
            }
            (Keeps::Code, None) => {
                let file = self.dir.path_of(&self.current().manifest);
                Err(Error::corrupt(file, "parts", "a decoder", "none"))
            }
        }
    }

    fn has_no_logits(&self) -> Error {
        Error::invalid(format!(
            "kind \"z\": the codec of this store, {}, keeps weights, from which no logits can be had",
            self.spec.codec
        ))
    }

    /// The weights of documents, one after the other.
    pub fn weights(&self, docnos: &[u64]) -> Result<Vec<f32>> {
        if self.codec.keeps() == Keeps::Weights {
            return self.rows(docnos);
        }
        let (spec, experts) = (&self.spec, self.spec.experts as usize);
        in_batches(docnos, spec.logits(), |docnos, rows| {
            self.read_logits(docnos, rows)?;
            route_weights(spec.phi, spec.top_k, experts, rows);
            Ok(())
        })
    }
}

/// How many rows one thread reads at a time.
const BATCH: usize = 256;

/// Rows of `columns` numbers for docnos, each batch of them by `read`.
fn in_batches(
    docnos: &[u64],
    columns: usize,
    read: impl Fn(&[u64], &mut [f32]) -> Result<()> + Sync,
) -> Result<Vec<f32>> {
    let mut rows = room(docnos.len(), columns)?;
    let batches: Vec<_> = docnos
        .chunks(BATCH)
        .zip(rows.chunks_mut(BATCH * columns.max(1)))
        .map(|(docnos, rows)| (docnos, Mutex::new(rows)))
        .collect();
    in_parallel(&batches, |(docnos, rows)| {
        // Nobody else asks for this lock.
        let mut rows = rows.lock().unwrap_or_else(PoisonError::into_inner);
        read(docnos, &mut rows)
    })?;
    Ok(rows)
}

/// Room for `n` rows.
fn room(n: usize, columns: usize) -> Result<Vec<f32>> {
    match n.checked_mul(columns) {
        Some(numbers) => Ok(vec![0.0; numbers]),
        None => Err(Error::invalid(format!("{n} routes do not fit into memory"))),
    }
}

/// The segment whose range may hold the docno.
fn in_range<S>(segments: &[S], docno: u64, first: impl Fn(&S) -> u64) -> Option<&S> {
    let after = segments.partition_point(|s| first(s) <= docno);
    segments.get(after.checked_sub(1)?)
}

fn check_ranges(path: &std::path::Path, what: &str, ranges: &[(u64, u64)], end: u64) -> Result<()> {
    let mut before = 0;
    for (first, after) in ranges {
        if *first < before || *after > end {
            let expected = format!("docnos from {before} on, below {end}");
            return Err(Error::corrupt(
                path,
                format!("order of {what}"),
                expected,
                format!("{first}..{after}"),
            ));
        }
        before = *after;
    }
    Ok(())
}

fn open_routes(
    dir: &Directory,
    manifest: &Manifest,
    codec: &Arc<dyn Codec>,
    scales: &[(Hash, Arc<Scales>)],
    map: impl Fn(&Part) -> Result<Mapped>,
) -> Result<Vec<RouteSegment>> {
    let by_hash: HashMap<_, _> = scales.iter().map(|(hash, s)| (hash.0, s)).collect();
    let decoder = manifest.of_role(role::DECODER).next().map(|p| p.blake3);
    let name = manifest.spec.codec.to_string();
    manifest
        .of_role(role::ROUTES)
        .map(|part| {
            let mut used: Vec<Hash> = decoder.into_iter().collect();
            let segment = RouteSegment::open(
                map(part)?,
                &name,
                Arc::clone(codec),
                decoder.map(|d| d.0),
                |hash| {
                    let found = by_hash.get(hash)?;
                    used.push(Hash(*hash));
                    Some(Arc::clone(found))
                },
            )?;
            if used != part.parameters {
                let (used, listed) = (format!("{used:?}"), format!("{:?}", part.parameters));
                return Err(Error::corrupt(
                    dir.path_of(&part.file),
                    "parameters",
                    used,
                    listed,
                ));
            }
            Ok(segment)
        })
        .collect()
}

pub fn index_files(manifest: &Manifest) -> Vec<IndexFile> {
    manifest
        .of_role(role::BM25)
        .map(|part| IndexFile {
            name: part.file.clone(),
            length: part.length,
            blake3: part.blake3.0,
        })
        .collect()
}
