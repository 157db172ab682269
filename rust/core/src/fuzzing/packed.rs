//! The packed store: an archive of plain files.

use std::io::Read;
use std::path::Path;

use super::input::{Form, Input, put};
use crate::copy::read_packed;
use crate::manifest::{Hash, Manifest, Part};

const BLOCK: usize = 512;

pub fn packed(data: &[u8]) -> bool {
    let Some(input) = Input::split(data) else {
        return false;
    };
    let file = match input.form() {
        Form::Raw => input.rest.to_vec(),
        Form::Summed => summed(input.rest.to_vec()),
        _ => archive(input.rest),
    };
    let mut taken: Vec<(String, u64)> = Vec::new();
    let take = |_: &mut (), part: &Part, entry: &mut dyn Read| {
        let mut bytes = Vec::new();
        // What lies in the archive is all that it can give.
        assert!(entry.read_to_end(&mut bytes).is_err() || bytes.len() <= file.len());
        taken.push((part.file.clone(), bytes.len() as u64));
        Ok(())
    };
    let path = Path::new("packed.tar");
    let Ok(((), current, json)) = read_packed(file.as_slice(), path, |_| Ok(()), take) else {
        return false;
    };
    assert_eq!(current.blake3, Hash(*blake3::hash(&json).as_bytes()));
    let manifest = Manifest::parse(&json, Path::new(&current.manifest));
    assert!(manifest.is_ok());
    let parts = manifest.map(|m| m.parts).unwrap_or_default();
    assert_eq!(parts.len(), taken.len());
    for (part, (name, _)) in parts.iter().zip(&taken) {
        assert_eq!(part.file, *name);
    }
    true
}

/// The checksum of each header that is found is made right.
fn summed(mut file: Vec<u8>) -> Vec<u8> {
    let mut at = 0usize;
    while let Some(header) = file.get(at..).and_then(<[u8]>::first_chunk::<BLOCK>) {
        let zeros = header.iter().all(|b| *b == 0);
        let digits = header.get(124..135).unwrap_or_default();
        let size = std::str::from_utf8(digits).ok();
        let size = size.and_then(|digits| usize::from_str_radix(digits, 8).ok());
        if !zeros {
            sum_header(&mut file, at);
        }
        let Some(next) = size
            .and_then(|n| n.checked_next_multiple_of(BLOCK))
            .and_then(|n| n.checked_add(at + BLOCK))
        else {
            break;
        };
        at = next;
    }
    file
}

fn sum_header(file: &mut [u8], at: usize) {
    put(file, at + 148, b"        ");
    let header = file.get(at..at + BLOCK).unwrap_or_default();
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    put(file, at + 148, format!("{sum:06o}\0 ").as_bytes());
}

/// An archive of {type, length of the name, length (2 bytes), name, content}; of a `CURRENT`, the hash is made that of
/// the entry after it.
fn archive(mut list: &[u8]) -> Vec<u8> {
    let mut entries: Vec<(u8, &[u8], Vec<u8>)> = Vec::new();
    while let Some(([kind, name, low, high], rest)) = list.split_first_chunk() {
        let (name, rest) = rest.split_at(usize::from(*name).min(rest.len()));
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        let (content, rest) = rest.split_at(length.min(rest.len()));
        entries.push((*kind, name, content.to_vec()));
        list = rest;
    }
    let hash = |content: &[u8]| Hash(*blake3::hash(content).as_bytes()).to_string();
    if let [(_, _, current), (_, _, manifest), ..] = entries.as_mut_slice()
        && let Some(at) = current.len().checked_sub(65)
    {
        put(current, at, hash(manifest).as_bytes());
    }
    let mut file = Vec::new();
    for (kind, name, content) in entries {
        let at = file.len();
        file.resize(at + BLOCK, 0);
        put(&mut file, at, name.get(..100).unwrap_or(name));
        put(&mut file, at + 100, b"0000644\0");
        put(
            &mut file,
            at + 124,
            format!("{:011o}\0", content.len()).as_bytes(),
        );
        put(&mut file, at + 156, &[kind]);
        put(&mut file, at + 257, b"ustar  \0");
        sum_header(&mut file, at);
        file.extend_from_slice(&content);
        file.resize(file.len().next_multiple_of(BLOCK), 0);
    }
    file.resize(file.len() + 2 * BLOCK, 0);
    file
}
