//! What a writer has taken since the last commit. It goes to disk as it comes, into parts that no manifest
//! names yet, so that memory stays bounded however much one commit adds.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use roaring::RoaringTreemap;

use crate::compact::MAX_GAP;
use crate::documents::{
    Contents, DocumentId, IdBatch, IdSegment, IdsChunk, KeptWriter, duplicates, join_and_find,
    join_ids,
};
use crate::error::{Error, Result};
use crate::files::{Digest, Directory};
use crate::generation::Generation;
use crate::manifest::{Hash, Part, role};
use crate::presence::PresenceBuilder;
use crate::routes::{Codec, ColumnRange, ScaleValues, Scales, SegmentPlan, SegmentWriter};
use crate::spec::IdType;
use crate::watch::Progress;
use crate::writer::OnDuplicate;

/// A chunk of ids is sorted and written when it has this many bytes, or this many ids that came with documents.
const CHUNK_BYTES: usize = 64 << 20;
const CHUNK_DOCUMENTS: usize = 1 << 17;
/// More runs of ids than this are joined, so that looking one up stays quick.
const MAX_RUNS: usize = 32;
/// Rows are encoded when so many numbers have come together: scales are fitted to that many at first.
const PENDING_NUMBERS: usize = 1 << 22;

/// The names of the files that a generation writes, so that they can be removed if it never comes to be.
#[derive(Debug)]
pub struct Names {
    pub generation: u64,
    given: HashMap<&'static str, u32>,
    pub all: Vec<String>,
}

impl Names {
    pub fn new(generation: u64) -> Self {
        Self {
            generation,
            given: HashMap::new(),
            all: Vec::new(),
        }
    }

    pub fn next(&mut self, role: &'static str, end: &str) -> String {
        let n = self.given.entry(role).or_default();
        let name = match *n {
            0 => format!("{role}-{:08}.{end}", self.generation),
            n => format!("{role}-{:08}.{n}.{end}", self.generation),
        };
        *n += 1;
        self.all.push(name.clone());
        name
    }

    /// Best effort: what stays is listed nowhere, and found by the collector.
    pub fn remove_all(&mut self, dir: &Directory) {
        for name in self.all.drain(..) {
            let _ = dir.remove(&name);
        }
    }

    fn remove(&mut self, dir: &Directory, name: &str) {
        let _ = dir.remove(name);
        self.all.retain(|n| n != name);
    }
}

/// Changes since the last commit.
#[derive(Debug)]
pub struct Staged {
    pub names: Names,
    /// The docno of the first document that was staged, and of the next one.
    pub first: u64,
    pub next: u64,
    ids: StagedIds,
    routes: StagedRoutes,
    /// Rows that are not encoded yet, with their docnos.
    pending: Vec<f32>,
    pending_docnos: Vec<u64>,
    /// Which of the staged documents have a route.
    routed: PresenceBuilder,
    kept: Option<(String, KeptWriter)>,
    /// Docnos that died, of the base and of those staged.
    pub dead: RoaringTreemap,
    /// Of those, documents of the base, and how many of them had no route.
    pub dead_in_base: u64,
    pub dead_unrouted_in_base: u64,
    /// Documents that were staged without a route, and died.
    pub dead_unrouted_here: u64,
}

#[derive(Debug)]
struct StagedIds {
    id_type: IdType,
    /// The newest ids, and where those among them are that came one by one.
    chunk: IdsChunk,
    chunk_first: u64,
    by_id: HashMap<DocumentId, u64>,
    /// Chunks that were written, in order of docnos.
    runs: Vec<(Part, IdSegment)>,
    /// From which docno on duplicates are dealt with in which way; below `resolved` that has been done.
    policies: Vec<(u64, OnDuplicate)>,
    resolved: u64,
}

/// Encodes rows into segments, a new one wherever the scales must widen.
#[derive(Debug)]
pub struct StagedRoutes {
    /// Scales and segments that are finished.
    parts: Vec<Part>,
    /// The scales that there are, by their hashes: equal ones are one file.
    known: HashSet<Hash>,
    /// The newest scales, of this commit or before, and the hash of the decoder.
    scales: Option<(Hash, ScaleValues)>,
    decoder: Option<Hash>,
    codec_name: String,
    open: Option<(String, SegmentWriter)>,
    records: Vec<u8>,
}

impl Staged {
    pub fn new(
        generation: u64,
        first: u64,
        id_type: IdType,
        scales: &[(Hash, Arc<Scales>)],
        decoder: Option<Hash>,
        codec_name: String,
    ) -> Self {
        Self {
            names: Names::new(generation),
            first,
            next: first,
            ids: StagedIds {
                id_type,
                chunk: IdsChunk::new(id_type),
                chunk_first: first,
                by_id: HashMap::new(),
                runs: Vec::new(),
                policies: Vec::new(),
                resolved: first,
            },
            routes: StagedRoutes::new(scales, decoder, codec_name),
            pending: Vec::new(),
            pending_docnos: Vec::new(),
            routed: PresenceBuilder::default(),
            kept: None,
            dead: RoaringTreemap::new(),
            dead_in_base: 0,
            dead_unrouted_in_base: 0,
            dead_unrouted_here: 0,
        }
    }

    /// For the generation that follows `base`.
    pub fn on(base: &Generation, generation: u64) -> Self {
        let manifest = base.manifest();
        Self::new(
            generation,
            manifest.next_docno,
            base.spec.id_type,
            &base.scales,
            manifest.of_role(role::DECODER).next().map(|p| p.blake3),
            base.spec.codec.to_string(),
        )
    }

    pub fn is_empty(&self) -> bool {
        self.next == self.first && self.dead.is_empty()
    }

    /// Whether a staged document has a route.
    fn is_routed(&self, docno: u64) -> bool {
        docno
            .checked_sub(self.first)
            .is_some_and(|i| self.routed.contains(i))
    }

    /// Staged documents without a route, dead ones included.
    pub fn absent(&self) -> u64 {
        self.routed.count() - self.routed.rows()
    }

    /// The living docno of an id among those staged.
    pub fn lookup(&self, id: &DocumentId) -> Result<Option<u64>> {
        let newest = self.ids.by_id.get(id).copied();
        if let Some(docno) = newest.filter(|docno| !self.dead.contains(*docno)) {
            return Ok(Some(docno));
        }
        for (_, run) in self.ids.runs.iter().rev() {
            if let Some(docno) = run.find(id, |docno| self.dead.contains(docno))? {
                return Ok(Some(docno));
            }
        }
        Ok(None)
    }

    /// A document that is known to be no duplicate, under the docno `next`.
    pub fn push(
        &mut self,
        dir: &Directory,
        codec: &dyn Codec,
        id: &DocumentId,
        route: Option<&[f32]>,
        contents: &Contents,
    ) -> Result<()> {
        let docno = self.next;
        self.ids.chunk.push(id)?;
        self.ids.by_id.insert(id.clone(), docno);
        self.next += 1;
        self.ids.resolved = self.next;
        match route {
            Some(row) => self.push_rows(dir, codec, docno, row)?,
            None => self.routed.extend_absent(1),
        }
        match contents.is_empty() {
            true => Ok(()),
            false => self.keep(dir, docno, contents),
        }
    }

    /// Ids with their rows, of which duplicates are found later; counts them.
    pub fn push_many(
        &mut self,
        dir: &Directory,
        codec: &dyn Codec,
        ids: IdBatch<'_>,
        rows: &[f32],
        policy: OnDuplicate,
        progress: &Progress,
    ) -> Result<()> {
        self.set_policy(policy);
        let mut docno = self.next;
        match ids {
            IdBatch::Any(ids) => ids.iter().try_for_each(|id| self.ids.chunk.push(id))?,
            IdBatch::U64(ids) => self.ids.chunk.extend_u64(ids)?,
        }
        self.next += ids.len() as u64;
        // What comes in bulk is not copied together first.
        for rows in rows.chunks(at_once(codec)) {
            self.push_rows(dir, codec, docno, rows)?;
            let n = (rows.len() / codec.columns().max(1)) as u64;
            docno += n;
            progress.add(n)?;
        }
        Ok(())
    }

    /// A document of another store with its record as it is; duplicates are found later.
    pub fn push_record(
        &mut self,
        dir: &Directory,
        codec: &dyn Codec,
        id: &DocumentId,
        record: Option<&[u8]>,
        contents: &Contents,
        policy: OnDuplicate,
    ) -> Result<()> {
        self.set_policy(policy);
        let docno = self.next;
        self.ids.chunk.push(id)?;
        self.next += 1;
        match record {
            Some(record) => {
                self.flush_rows(dir, codec)?;
                self.routed.extend_present(1);
                self.routes
                    .write(dir, codec, &mut self.names, docno, record)?;
            }
            None => self.routed.extend_absent(1),
        }
        match contents.is_empty() {
            true => Ok(()),
            false => self.keep(dir, docno, contents),
        }
    }

    /// Goes on with these scales, writing them if they are not the newest already.
    pub fn use_scales(
        &mut self,
        dir: &Directory,
        codec: &dyn Codec,
        hash: Hash,
        values: &ScaleValues,
    ) -> Result<()> {
        self.flush_rows(dir, codec)?;
        match self.routes.scales.as_ref().is_some_and(|(h, _)| *h == hash) {
            true => Ok(()),
            false => self.routes.use_scales(dir, &mut self.names, values),
        }
    }

    fn set_policy(&mut self, policy: OnDuplicate) {
        if self.ids.policies.last().map(|(_, p)| *p) != Some(policy) {
            self.ids.policies.push((self.next, policy));
        }
    }

    fn keep(&mut self, dir: &Directory, docno: u64, contents: &Contents) -> Result<()> {
        let (_, kept) = match self.kept.take() {
            Some(kept) => self.kept.insert(kept),
            None => {
                let name = self.names.next(role::DOCUMENTS, "seg");
                let writer = KeptWriter::create(dir, &name, docno)?;
                self.kept.insert((name, writer))
            }
        };
        kept.add(docno, contents)
    }

    /// Rows of the docnos from `first` on, as many as are encoded at once or fewer.
    fn push_rows(
        &mut self,
        dir: &Directory,
        codec: &dyn Codec,
        first: u64,
        rows: &[f32],
    ) -> Result<()> {
        let columns = codec.columns().max(1);
        let n = (rows.len() / columns) as u64;
        self.routed.extend_present(n);
        if self.pending.is_empty() && rows.len() == at_once(codec) {
            let docnos: Vec<u64> = (first..first + n).collect();
            return self
                .routes
                .encode(dir, codec, &mut self.names, &docnos, rows);
        }
        self.pending_docnos.extend(first..first + n);
        self.pending.extend_from_slice(rows);
        match self.pending.len() >= PENDING_NUMBERS {
            true => self.flush_rows(dir, codec),
            false => Ok(()),
        }
    }

    fn flush_rows(&mut self, dir: &Directory, codec: &dyn Codec) -> Result<()> {
        if self.pending_docnos.is_empty() {
            return Ok(());
        }
        let rows = std::mem::take(&mut self.pending);
        let docnos = std::mem::take(&mut self.pending_docnos);
        self.routes
            .encode(dir, codec, &mut self.names, &docnos, &rows)
    }

    /// Writes the newest ids if there are many; to be called after each that was pushed, or many.
    pub fn end_full_chunk(&mut self, dir: &Directory, progress: &Progress) -> Result<()> {
        let ids = &self.ids;
        match ids.chunk.bytes() >= CHUNK_BYTES || ids.by_id.len() >= CHUNK_DOCUMENTS {
            true => self.end_chunk(dir, progress),
            false => Ok(()),
        }
    }

    /// Sorts and writes the newest ids.
    fn end_chunk(&mut self, dir: &Directory, progress: &Progress) -> Result<()> {
        let ids = &mut self.ids;
        if ids.chunk.is_empty() {
            return Ok(());
        }
        let chunk = std::mem::replace(&mut ids.chunk, IdsChunk::new(ids.id_type));
        let name = self.names.next(role::IDS, "seg");
        let digest = chunk.write(dir, &name, ids.chunk_first)?;
        let run = IdSegment::open(dir.map(&name, digest.length)?, ids.id_type)?;
        ids.runs.push((Part::new(role::IDS, name, digest), run));
        ids.by_id.clear();
        ids.chunk_first = self.next;
        if ids.runs.len() > MAX_RUNS {
            self.join_runs(dir, &progress.aside())?;
        }
        Ok(())
    }

    /// Makes one run of all.
    fn join_runs(&mut self, dir: &Directory, progress: &Progress) -> Result<()> {
        let ids = &mut self.ids;
        if ids.runs.len() < 2 {
            return Ok(());
        }
        let name = self.names.next(role::IDS, "seg");
        let segments: Vec<&IdSegment> = ids.runs.iter().map(|(_, run)| run).collect();
        let digest = join_ids(dir, &name, &segments, &|_| true, progress)?;
        self.replace_runs(dir, name, digest)
    }

    fn replace_runs(&mut self, dir: &Directory, name: String, digest: Digest) -> Result<()> {
        let ids = &mut self.ids;
        let joined = IdSegment::open(dir.map(&name, digest.length)?, ids.id_type)?;
        for (part, _) in ids.runs.drain(..) {
            self.names.remove(dir, &part.file);
        }
        ids.runs.push((Part::new(role::IDS, name, digest), joined));
        Ok(())
    }

    /// How many documents [`Staged::resolve`] goes through, each as often as it does.
    pub fn to_resolve(&self, base: Option<&Generation>) -> u64 {
        if self.ids.resolved == self.next {
            return 0;
        }
        let passes = match self.runs() {
            0 | 1 => 1,
            _ => 2,
        };
        let staged = (self.next - self.first).saturating_mul(passes);
        let compared = match base {
            Some(base) if base.manifest().documents > 0 => self.next - self.ids.resolved,
            _ => 0,
        };
        staged.saturating_add(compared)
    }

    /// How many documents [`Staged::finish`] goes through, if [`Staged::resolve`] goes first.
    pub fn to_finish(&self) -> u64 {
        let joins = self.ids.resolved == self.next && self.runs() > 1;
        let passes = if joins { 3 } else { 1 };
        (self.next - self.first).saturating_mul(passes)
    }

    fn runs(&self) -> usize {
        self.ids.runs.len() + usize::from(!self.ids.chunk.is_empty())
    }

    /// Looks for the duplicates among what came in bulk; returns who must die of them.
    pub fn resolve(
        &mut self,
        dir: &Directory,
        base: Option<&Generation>,
        progress: &Progress,
    ) -> Result<Vec<u64>> {
        if self.ids.resolved == self.next {
            return Ok(Vec::new());
        }
        self.end_chunk(dir, progress)?;
        let from = self.ids.resolved;
        let mut deaths: Vec<u64> = Vec::new();
        let policies = &self.ids.policies;
        let policy = |docno: u64| {
            let after = policies.partition_point(|(first, _)| *first <= docno);
            let before = after.checked_sub(1).and_then(|i| policies.get(i));
            before.map_or(OnDuplicate::Error, |(_, policy)| *policy)
        };
        let dead = &self.dead;
        let in_base = |id: &DocumentId| match base {
            Some(base) => Ok(base.lookup(id)?.filter(|docno| !dead.contains(*docno))),
            None => Ok(None),
        };
        let settle = |held: u64, docno: u64, id: &DocumentId| {
            match policy(docno) {
            OnDuplicate::Replace => Ok((held, docno)),
            OnDuplicate::Skip => Ok((docno, held)),
            OnDuplicate::Error => Err(Error::DuplicateId {
                id: id.to_string(),
                reason: "is in the store already, or was added twice: replace it, skip it, or delete it first".into(),
            }),
        }
        };
        let segments: Vec<&IdSegment> = self.ids.runs.iter().map(|(_, run)| run).collect();
        let mut repeated = RoaringTreemap::new();
        let mut found = |id: &DocumentId, docnos: &[u64]| {
            let mut held = in_base(id)?;
            for docno in docnos.iter().copied().filter(|d| !dead.contains(*d)) {
                held = match held {
                    Some(held) if docno >= from => {
                        let (dies, lives) = settle(held, docno, id)?;
                        deaths.push(dies);
                        Some(lives)
                    }
                    _ => Some(docno),
                };
                repeated.insert(docno);
            }
            Ok(())
        };
        let joined = match segments.len() {
            0 | 1 => {
                duplicates(&segments, progress, &mut found)?;
                None
            }
            // They become one segment anyway.
            _ => {
                let name = self.names.next(role::IDS, "seg");
                let digest = join_and_find(dir, &name, &segments, progress, &mut found)?;
                Some((name, digest))
            }
        };
        if base.is_some_and(|base| base.manifest().documents > 0) {
            for (_, run) in &self.ids.runs {
                for docno in from.max(run.first())..run.end() {
                    progress.add(1)?;
                    if repeated.contains(docno) || dead.contains(docno) {
                        continue;
                    }
                    if let Some(id) = run.id(docno)?
                        && let Some(held) = in_base(&id)?
                    {
                        deaths.push(settle(held, docno, &id)?.0);
                    }
                }
            }
        }
        if let Some((name, digest)) = joined {
            self.replace_runs(dir, name, digest)?;
        }
        self.ids.resolved = self.next;
        self.ids.policies.clear();
        Ok(deaths)
    }

    /// Marks a living docno as dead.
    pub fn kill(&mut self, docno: u64, base: Option<&Generation>) -> Result<()> {
        self.dead.insert(docno);
        if docno >= self.first {
            self.dead_unrouted_here += u64::from(!self.is_routed(docno));
            return Ok(());
        }
        self.dead_in_base += 1;
        if let Some(base) = base {
            self.dead_unrouted_in_base += u64::from(!base.is_routed(docno)?);
        }
        Ok(())
    }

    /// Ends everything that is under way; returns the new parts.
    pub fn finish(
        &mut self,
        dir: &Directory,
        codec: &dyn Codec,
        progress: &Progress,
    ) -> Result<Vec<Part>> {
        self.flush_rows(dir, codec)?;
        let mut parts = self.routes.finish()?;
        self.end_chunk(dir, progress)?;
        self.join_runs(dir, progress)?;
        parts.extend(self.ids.runs.iter().map(|(part, _)| part.clone()));
        if let Some((name, kept)) = self.kept.take() {
            parts.push(Part::new(role::DOCUMENTS, name, kept.finish()?));
        }
        progress.add(self.next - self.first)?;
        Ok(parts)
    }
}

/// How many numbers of rows are encoded at once.
fn at_once(codec: &dyn Codec) -> usize {
    let columns = codec.columns().max(1);
    (PENDING_NUMBERS / columns).max(1) * columns
}

impl StagedRoutes {
    pub fn new(scales: &[(Hash, Arc<Scales>)], decoder: Option<Hash>, codec_name: String) -> Self {
        let newest = scales.last();
        Self {
            parts: Vec::new(),
            known: scales.iter().map(|(hash, _)| *hash).collect(),
            scales: newest.map(|(hash, scales)| (*hash, scales.values().clone())),
            decoder,
            codec_name,
            open: None,
            records: Vec::new(),
        }
    }

    /// Rows of these docnos, which ascend.
    pub fn encode(
        &mut self,
        dir: &Directory,
        codec: &dyn Codec,
        names: &mut Names,
        docnos: &[u64],
        rows: &[f32],
    ) -> Result<()> {
        let columns = codec.columns().max(1);
        if let Some(levels) = codec.levels() {
            let mut range = ColumnRange::new(columns);
            rows.chunks_exact(columns).for_each(|row| range.extend(row));
            let held = self.scales.as_ref().map(|(_, values)| values);
            if !held.is_some_and(|values| values.covers(levels, &range)) {
                let values = ScaleValues::widen(levels, held, &range);
                self.use_scales(dir, names, &values)?;
            }
        }
        let mut records = std::mem::take(&mut self.records);
        records.clear();
        let scales = match codec.scaled() {
            true => self.scales.as_ref().map(|(_, values)| values),
            false => None,
        };
        let scales = scales.unwrap_or(ScaleValues::none());
        for row in rows.chunks_exact(columns) {
            codec.encode(row, scales, &mut records);
        }
        let width = codec.record_bytes();
        let mut rest = records.as_slice();
        for run in docnos.chunk_by(|a, b| a + 1 == *b) {
            let Some(first) = run.first().copied() else {
                continue;
            };
            let (here, after) = rest.split_at((run.len() * width).min(rest.len()));
            self.write(dir, codec, names, first, here)?;
            rest = after;
        }
        self.records = records;
        Ok(())
    }

    /// Records of the docnos from `first` on, in units of the newest scales.
    fn write(
        &mut self,
        dir: &Directory,
        codec: &dyn Codec,
        names: &mut Names,
        first: u64,
        records: &[u8],
    ) -> Result<()> {
        let near = |segment: &SegmentWriter| first.saturating_sub(segment.end()) <= MAX_GAP;
        if !self.open.as_ref().is_some_and(|(_, segment)| near(segment)) {
            self.end_segment()?;
        }
        let (_, segment) = match self.open.take() {
            Some(open) => self.open.insert(open),
            None => {
                let name = names.next(role::ROUTES, "seg");
                let plan = SegmentPlan {
                    codec_name: self.codec_name.clone(),
                    width: codec.record_bytes(),
                    first,
                    decoder: self.decoder.map(|hash| hash.0),
                    scales: match codec.scaled() {
                        true => self.scales.as_ref().map(|(hash, _)| hash.0),
                        false => None,
                    },
                };
                let writer = SegmentWriter::create(dir, &name, plan)?;
                self.open.insert((name, writer))
            }
        };
        segment.skip(first - segment.end());
        segment.write(records)
    }

    /// Goes on with these scales, in a new segment.
    pub fn use_scales(
        &mut self,
        dir: &Directory,
        names: &mut Names,
        values: &ScaleValues,
    ) -> Result<()> {
        self.end_segment()?;
        let name = names.next(role::SCALES, "bin");
        let digest = Scales::write(dir, &name, values)?;
        let hash = Hash(digest.blake3);
        self.scales = Some((hash, values.clone()));
        match self.known.insert(hash) {
            true => self.parts.push(Part::new(role::SCALES, name, digest)),
            false => names.remove(dir, &name),
        }
        Ok(())
    }

    pub fn finish(&mut self) -> Result<Vec<Part>> {
        self.end_segment()?;
        Ok(std::mem::take(&mut self.parts))
    }

    fn end_segment(&mut self) -> Result<()> {
        if let Some((name, segment)) = self.open.take() {
            let plan = segment.plan().clone();
            let mut part = Part::new(role::ROUTES, name, segment.finish()?);
            part.parameters = plan
                .decoder
                .into_iter()
                .chain(plan.scales)
                .map(Hash)
                .collect();
            self.parts.push(part);
        }
        Ok(())
    }
}
