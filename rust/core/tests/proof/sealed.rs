//! Files that are altered and sealed again: their checksums, the manifest with their hashes, and `CURRENT` are
//! right, so that what is in them is read.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

/// One of our own parts, taken apart.
#[derive(Debug, Clone)]
pub struct Part {
    pub head: [u8; 64],
    pub body: Vec<u8>,
    /// The fields of the role, and the zeros after them.
    pub fields: Vec<u8>,
}

fn number(bytes: &[u8], at: usize) -> usize {
    u64::from_le_bytes(*bytes[at..].first_chunk().unwrap()) as usize
}

impl Part {
    pub fn read(bytes: &[u8]) -> Self {
        let n = bytes.len();
        let tail = u32::from_le_bytes(*bytes[n - 16..].first_chunk().unwrap()) as usize;
        let body = number(bytes, n - 32);
        Self {
            head: *bytes.first_chunk().unwrap(),
            body: bytes[64..64 + body].to_vec(),
            fields: bytes[n - tail..n - 32].to_vec(),
        }
    }

    pub fn new(letter: u8, body: Vec<u8>, fields: &[u64]) -> Self {
        let mut head = [0; 64];
        head[..8].copy_from_slice(&[0x89, b'P', b'P', letter, b'\r', b'\n', 0x1a, b'\n']);
        head[8] = 1;
        head[14] = 1;
        let fields = fields.iter().flat_map(|n| n.to_le_bytes()).collect();
        Self { head, body, fields }
    }

    /// The `i`-th field, of those that are numbers.
    pub fn field(&self, i: usize) -> u64 {
        number(&self.fields, 8 * i) as u64
    }

    pub fn set(&mut self, i: usize, value: u64) {
        self.fields[8 * i..8 * i + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// A number of the body.
    pub fn put(&mut self, at: usize, value: u64) {
        self.body[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub fn seal(&self) -> Vec<u8> {
        let block = u32::from_le_bytes(*self.head[12..].first_chunk().unwrap()) as usize;
        let table: Vec<u8> = self
            .body
            .chunks(block.max(1))
            .flat_map(|block| xxh3_64(block).to_le_bytes())
            .collect();
        let mut tail = self.fields.clone();
        tail.resize((tail.len() + 32).next_multiple_of(64) - 32, 0);
        tail.extend_from_slice(&(self.body.len() as u64).to_le_bytes());
        tail.extend_from_slice(&xxh3_64(&table).to_le_bytes());
        tail.extend_from_slice(&((tail.len() + 16) as u32).to_le_bytes());
        tail.extend_from_slice(&[0; 4]);
        let sum = xxh3_64(&[self.head.as_slice(), &tail].concat());
        tail.extend_from_slice(&sum.to_le_bytes());
        [self.head.as_slice(), &self.body, &table, &tail].concat()
    }
}

/// A store whose files may be altered.
#[derive(Debug, Clone)]
pub struct Forge {
    pub path: PathBuf,
}

impl Forge {
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
        }
    }

    pub fn current(&self) -> String {
        let text = fs::read_to_string(self.path.join("CURRENT")).unwrap();
        text.split_whitespace().nth(3).unwrap().to_owned()
    }

    pub fn manifest(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path.join(self.current())).unwrap()).unwrap()
    }

    /// Puts these bytes in force as the manifest of this name.
    pub fn publish_bytes(&self, name: &str, json: &[u8]) {
        let hash = blake3::hash(json).to_hex();
        fs::write(self.path.join(name), json).unwrap();
        let text = format!("polyprag store 1\n{name} {hash}\n");
        fs::write(self.path.join("CURRENT"), text).unwrap();
    }

    pub fn publish(&self, manifest: &Value) {
        self.publish_bytes(&self.current(), &serde_json::to_vec(manifest).unwrap());
    }

    pub fn alter(&self, change: impl FnOnce(&mut Value)) {
        let mut manifest = self.manifest();
        change(&mut manifest);
        self.publish(&manifest);
    }

    /// The names of the parts of a role, in their order.
    pub fn parts(&self, role: &str) -> Vec<String> {
        let manifest = self.manifest();
        let parts = manifest["parts"].as_array().unwrap();
        let named = parts.iter().filter(|p| p["role"] == role);
        named
            .map(|p| p["file"].as_str().unwrap().to_owned())
            .collect()
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path.join(name)).unwrap()
    }

    /// Other content for a part, with its length and hash in the manifest, and in what names it by its hash.
    pub fn replace(&self, name: &str, bytes: &[u8]) {
        // Not in place: another copy of the store may share the file.
        let _ = fs::remove_file(self.path.join(name));
        fs::write(self.path.join(name), bytes).unwrap();
        self.relist(
            name,
            bytes.len() as u64,
            blake3::hash(bytes).to_hex().as_str(),
        );
    }

    pub fn relist(&self, name: &str, length: u64, hash: &str) {
        self.alter(|manifest| {
            for part in manifest["parts"].as_array_mut().unwrap() {
                if part["file"] == name {
                    part["length"] = length.into();
                    part["blake3"] = hash.into();
                }
            }
        });
    }

    /// Alters one of our own parts.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Part)) {
        let mut part = Part::read(&self.read(name));
        change(&mut part);
        self.replace(name, &part.seal());
    }

    /// Alters the last part of a role.
    pub fn edit_last(&self, role: &str, change: impl FnOnce(&mut Part)) {
        let name = self
            .parts(role)
            .pop()
            .unwrap_or_else(|| panic!("no {role}"));
        self.edit(&name, change);
    }

    pub fn edit_first(&self, role: &str, change: impl FnOnce(&mut Part)) {
        self.edit(&self.parts(role)[0], change);
    }
}
