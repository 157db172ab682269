//! What the proofs of crash safety share: sessions whose outcome is known, and disks that can be looked at.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod disk;
pub mod oracle;
pub mod session;

use std::path::Path;

/// Whether the full counts were asked for; else a short form runs.
pub fn full() -> bool {
    std::env::var_os("POLYPRAG_PROOF").is_some()
}

/// The seed of this run: `POLYPRAG_SEED`, or 1.
pub fn seed() -> u64 {
    match std::env::var("POLYPRAG_SEED") {
        Ok(text) => text.parse().expect("POLYPRAG_SEED: a number"),
        Err(_) => 1,
    }
}

/// A folder in memory where there is one: these tests write many small files.
pub fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    tempfile::tempdir_in(memory).unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// What kind of file or folder below `parent` a path is.
pub fn kind(path: &Path, parent: &Path) -> String {
    let Ok(rest) = path.strip_prefix(parent) else {
        return path.display().to_string();
    };
    let names: Vec<&str> = rest.iter().map(|n| n.to_str().unwrap()).collect();
    match names.as_slice() {
        [] => "folder above".into(),
        [_] => "folder of the store".into(),
        [_, "bm25"] => "folder of the index".into(),
        [_, "bm25", name] if name.starts_with("meta") => "bm25/meta".into(),
        [_, "bm25", name] => format!("bm25/*.{}", name.rsplit('.').next().unwrap()),
        [_, name, ..] => name.split('-').next().unwrap().into(),
    }
}

/// SplitMix64.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn coin(&mut self) -> bool {
        self.next() >> 63 == 1
    }
}
