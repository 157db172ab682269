//! Ids, what is kept of documents, and the dead.

use std::collections::HashMap;

use roaring::RoaringTreemap;

use super::input::{Input, as_it_is};
use super::{WHOLE, sample};
use crate::documents::{Dead, DocumentId, IdSegment, KeptSegment, LastBlock, duplicates};
use crate::frame::Kind;
use crate::spec::IdType;
use crate::watch::Progress;

pub fn ids(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    let id_type = match input.flavour & 1 {
        0 => IdType::String,
        _ => IdType::U64,
    };
    let map = input.part(Kind::Ids, as_it_is);
    let Ok(segment) = IdSegment::open(map, id_type) else {
        return false;
    };
    let (first, end) = (segment.first(), segment.end());
    assert!(first <= end);
    assert!(segment.rows() <= end - first);
    let verified = segment.verify(&Progress::unseen()).is_ok();
    for docno in sample(first, end) {
        let id = segment.id(docno);
        assert!(!verified || id.is_ok());
        let contains = segment.contains(docno).ok();
        assert!(!verified || contains == id.as_ref().ok().map(Option::is_some));
        let Ok(Some(id)) = id else {
            continue;
        };
        assert!((first..end).contains(&docno) && id.kind() == id_type);
        let newest = segment.find(&id, |_| false);
        let this = segment.find(&id, |other| other > docno);
        let none = segment.find(&id, |_| true);
        if verified {
            assert!(newest.is_ok_and(|found| found >= Some(docno)));
            assert!(this.is_ok_and(|found| found == Some(docno)));
            assert!(none.is_ok_and(|found| found.is_none()));
        }
    }
    if segment.rows() <= WHOLE {
        twice(&segment, verified);
    }
    verified
}

/// The ids that occur more than once, found in order of the ids and in order of the docnos.
fn twice(segment: &IdSegment, verified: bool) {
    let mut found: HashMap<DocumentId, Vec<u64>> = HashMap::new();
    let ran = duplicates(&[segment], &Progress::unseen(), &mut |id, docnos| {
        found.insert(id.clone(), docnos.to_vec());
        Ok(())
    });
    if !verified {
        return;
    }
    assert!(ran.is_ok());
    let mut all: HashMap<DocumentId, Vec<u64>> = HashMap::new();
    for docno in segment.first()..segment.end() {
        if let Ok(Some(id)) = segment.id(docno) {
            all.entry(id).or_default().push(docno);
        }
    }
    all.retain(|_, docnos| docnos.len() > 1);
    assert_eq!(found, all);
}

pub fn documents(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    let Ok(segment) = KeptSegment::open(input.part(Kind::Documents, blocks)) else {
        return false;
    };
    let (first, end) = (segment.first(), segment.end());
    assert!(first <= end);
    let verified = segment.verify(&Progress::unseen()).is_ok();
    let mut last = LastBlock::default();
    for (i, docno) in sample(first, end).enumerate() {
        let contents = segment.read(docno, &mut last);
        assert!(!verified || contents.is_ok());
        let Ok(contents) = contents else {
            // All of it may be broken, and each call looks for that anew.
            if i > 64 {
                break;
            }
            continue;
        };
        assert_eq!(contents.is_some(), (first..end).contains(&docno));
        if i < 4 {
            let alone = segment.read(docno, &mut LastBlock::default());
            assert!(alone.is_ok_and(|alone| alone == contents));
        }
    }
    verified
}

/// Blocks as zstd stores them when it does not compress, and their index: from a list of {documents in the
/// block, bytes of it, the bytes}.
fn blocks(fields: &[u8], mut list: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let (mut body, mut index) = (Vec::new(), Vec::new());
    let (mut position, mut blocks) = (0u64, 0u64);
    let mut entry = |position: u64, offset: usize, unpacked: usize| {
        for n in [position, offset as u64, unpacked as u64] {
            index.extend_from_slice(&n.to_le_bytes());
        }
    };
    while let Some(([documents, low, high], rest)) = list.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (raw, rest) = rest.split_at(length);
        entry(position, body.len(), length);
        position += u64::from(*documents);
        blocks += 1;
        // Magic; a single segment whose size is in 4 bytes; one last block, raw.
        body.extend_from_slice(&[0x28, 0xb5, 0x2f, 0xfd, 0xa0]);
        body.extend_from_slice(&(length as u32).to_le_bytes());
        body.extend_from_slice(&(1 | (length as u32) << 3).to_le_bytes()[..3]);
        body.extend_from_slice(raw);
        list = rest;
    }
    entry(position, body.len(), 0);
    body.resize(body.len().next_multiple_of(8), 0);
    body.extend_from_slice(&index);
    // The first docno is that of the input.
    let mut fields = fields.get(..8).unwrap_or(&[0; 8]).to_vec();
    fields.extend_from_slice(&position.to_le_bytes());
    fields.extend_from_slice(&blocks.to_le_bytes());
    (fields, body)
}

pub fn dead(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    let end = match input.flavour & 3 {
        0 => u64::MAX,
        1 => 1 << 32,
        2 => 1000,
        _ => 0,
    };
    let Ok(dead) = Dead::open(input.part(Kind::Dead, as_it_is), end) else {
        return false;
    };
    let docnos = dead.docnos();
    let mut found = 0u64;
    for docno in docnos.iter().take(1000) {
        assert!(docno < end && dead.contains(docno));
        found += 1;
    }
    assert!(found == docnos.len().min(1000));
    assert!(!dead.contains(end));
    let mut bytes = Vec::new();
    assert!(docnos.serialize_into(&mut bytes).is_ok());
    let again = RoaringTreemap::deserialize_from(bytes.as_slice());
    assert!(again.is_ok_and(|again| again == *docnos));
    dead.verify().is_ok()
}
