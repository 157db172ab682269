//! Proof that a generation is whole: every file against its hash, every block against its checksum, and
//! the parts against each other.

use crate::bm25::as_index_error;
use crate::error::{Error, Result};
use crate::files::{Directory, INDEX_FOLDER};
use crate::generation::Generation;
use crate::manifest::{Current, Hash, Manifest, Part, Pinned, role};
use crate::watch::Progress;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifyReport {
    pub files: u64,
    pub bytes: u64,
    pub documents: u64,
}

/// How many bytes are gone through: a part as often as something in it is checked.
pub fn bytes(generation: &Generation) -> u64 {
    let times = |part: &Part| match part.role.as_str() {
        // By the hash of the file, the checksums of blocks, ids by row and in order, and document by document.
        role::IDS => 5,
        // By the hash, the checksums of blocks, and block by block or by Tantivy's own checksum.
        role::DOCUMENTS | role::BM25 => 3,
        _ => 2,
    };
    let parts = generation.manifest().parts.iter();
    parts.fold(generation.pinned.length, |sum, part| {
        sum.saturating_add(part.length.saturating_mul(times(part)))
    })
}

pub fn verify(generation: &Generation, progress: &Progress) -> Result<VerifyReport> {
    let (dir, manifest) = (&generation.dir, generation.manifest());
    let mut report = VerifyReport {
        files: 0,
        bytes: 0,
        documents: manifest.documents,
    };
    // What CURRENT names now, which a commit may have moved on, must be readable too.
    let current = Current::read(dir)?;
    if current != *generation.current() {
        Pinned::newest(dir)?;
    }
    report.files += 1;
    report.bytes += current.to_text().len() as u64;

    let name = &generation.current().manifest;
    check(
        dir,
        name,
        generation.pinned.length,
        generation.current().blake3,
        progress,
        &mut report,
    )?;
    for part in &manifest.parts {
        let checked = check(
            dir,
            &part.file,
            part.length,
            part.blake3,
            progress,
            &mut report,
        );
        checked.map_err(|e| {
            if part.role == role::BM25 {
                as_index_error(e)
            } else {
                e
            }
        })?;
    }
    // The lengths are right, so the maps can be read to their ends.
    generation.experts.verify(progress)?;
    let (mut decoder, mut router) = (generation.decoder.iter(), generation.router.iter());
    decoder.try_for_each(|d| d.verify(progress))?;
    router.try_for_each(|r| r.verify(progress))?;
    generation.scales.iter().try_for_each(|(_, s)| s.verify())?;
    let (mut routes, mut ids) = (generation.routes.iter(), generation.ids.iter());
    routes.try_for_each(|s| s.verify(progress))?;
    ids.try_for_each(|s| s.verify(progress))?;
    let mut kept = generation.kept.iter();
    kept.try_for_each(|s| s.verify(progress))?;
    generation.dead.verify()?;
    check_documents(generation, manifest, progress)?;
    if let Some(index) = &generation.index {
        let index = index.get()?;
        index.verify(progress)?;
        index.each_docnos(&mut |docnos| {
            progress.tell(0)?;
            for docno in docnos.iter().filter(|docno| generation.is_alive(**docno)) {
                if generation.id_of(*docno)?.is_none() {
                    let reason = format!("it finds docno {docno}, which has no id");
                    return Err(Error::corrupt_index(dir.path_of(INDEX_FOLDER), reason));
                }
            }
            Ok(())
        })?;
    }
    progress.end()?;
    Ok(report)
}

fn check(
    dir: &Directory,
    name: &str,
    length: u64,
    blake3: Hash,
    progress: &Progress,
    report: &mut VerifyReport,
) -> Result<()> {
    dir.open_part(name, length)?;
    let digest = dir.digest_watched(name, progress)?;
    let found = Hash(digest.blake3);
    if digest.length != length || found != blake3 {
        return Err(Error::corrupt(
            dir.path_of(name),
            "content",
            format!("BLAKE3 {blake3}"),
            found,
        ));
    }
    report.files += 1;
    report.bytes = report.bytes.saturating_add(length);
    Ok(())
}

/// Counts, and that every document has an id by which it is found.
fn check_documents(
    generation: &Generation,
    manifest: &Manifest,
    progress: &Progress,
) -> Result<()> {
    let file = generation.dir.path_of(&generation.current().manifest);
    let (mut documents, mut unrouted, mut routed) = (0u64, 0u64, 0u64);
    for segment in &generation.ids {
        let share = segment.bytes_per_row();
        for docno in segment.docnos() {
            progress.add(share)?;
            let has_route = generation.is_routed(docno)?;
            routed += u64::from(has_route);
            if !generation.is_alive(docno) {
                continue;
            }
            documents += 1;
            unrouted += u64::from(!has_route);
            if let Some(id) = segment.id(docno)?
                && generation.lookup(&id)? != Some(docno)
            {
                return Err(Error::corrupt(
                    &file,
                    "ids",
                    format!("one document with id {id}"),
                    "two",
                ));
            }
        }
    }
    let wrong = [
        ("documents", manifest.documents, documents),
        ("unrouted", manifest.unrouted, unrouted),
    ];
    for (what, expected, found) in wrong {
        if expected != found {
            return Err(Error::corrupt(&file, what, expected, found));
        }
    }
    // A route without an id would belong to nobody, though it may be that of a dead document.
    let rows: u64 = generation.routes.iter().map(|s| s.rows()).sum();
    if rows != routed {
        let expected = format!("{routed} of docnos that have ids");
        return Err(Error::corrupt(&file, "routes", expected, rows));
    }
    Ok(())
}
