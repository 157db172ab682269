//! `CURRENT` and the manifests: which parts make up a generation, and what every part must be.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{self, Digest, Directory, INDEX_FOLDER, Lock, LockMode, is_part_name};
use crate::lock::LOCK;
use crate::routes::Keeps;
use crate::spec::StoreSpec;

/// The version of the format as a whole.
pub const FORMAT: u32 = 1;
pub const CURRENT: &str = "CURRENT";
/// Where the next one is written.
const CURRENT_NEW: &str = "CURRENT.new";
/// Features of a store that this version reads, and writes, beyond version 1: none so far.
const READER_FEATURES: [&str; 0] = [];
const WRITER_FEATURES: [&str; 0] = [];
pub const CURRENT_LIMIT: u64 = 4096;
pub const MANIFEST_LIMIT: u64 = 64 << 20;
/// How many commas and opening brackets a manifest may have: each may begin a value, which takes more memory
/// than its text.
const MANIFEST_VALUES: usize = 1 << 20;
const FIRST_LINE: &str = "polyprag store 1";
/// How often a reader begins again when the manifest that it read was swapped and collected meanwhile.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(1);

/// What a part is for. Roles of later versions that a reader may ignore are kept as they are.
pub mod role {
    pub const EXPERTS: &str = "experts";
    pub const DECODER: &str = "decoder";
    pub const ROUTER: &str = "router";
    pub const SCALES: &str = "scales";
    pub const ROUTES: &str = "routes";
    pub const IDS: &str = "ids";
    pub const DOCUMENTS: &str = "documents";
    pub const DEAD: &str = "dead";
    pub const BM25: &str = "bm25";
    pub const MANIFEST: &str = "manifest";

    /// Those whose parts are files beside the manifest.
    pub const OF_FILES: [&str; 8] = [
        EXPERTS, DECODER, ROUTER, SCALES, ROUTES, IDS, DOCUMENTS, DEAD,
    ];
}

/// A BLAKE3 hash, in lower-case hexadecimal when written.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Hash(pub [u8; 32]);

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> String {
        hash.to_string()
    }
}

impl TryFrom<String> for Hash {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let digit = |b: u8| match b {
            b'0'..=b'9' => Some(b - b'0'),
            b'a'..=b'f' => Some(b - b'a' + 10),
            _ => None,
        };
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        let mut hash = [0; 32];
        if pairs.len() != hash.len() || !rest.is_empty() {
            return Err(format!("a hash of {} characters instead of 64", text.len()));
        }
        for (byte, [high, low]) in hash.iter_mut().zip(pairs) {
            match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => *byte = high << 4 | low,
                _ => return Err("a hash that is not lower-case hexadecimal".into()),
            }
        }
        Ok(Hash(hash))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub role: String,
    pub file: String,
    pub length: u64,
    pub blake3: Hash,
    /// Hashes of the parts with trained or fitted parameters without which this one means nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parameters: Vec<Hash>,
}

impl Part {
    pub fn new(role: &str, file: String, digest: Digest) -> Self {
        Self {
            role: role.to_owned(),
            file,
            length: digest.length,
            blake3: Hash(digest.blake3),
            parameters: Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub reader_features: Vec<String>,
    pub writer_features: Vec<String>,
    pub encoding: Encoding,
    pub generation: u64,
    /// The generation before, kept for rollback.
    pub previous: Option<u64>,
    /// The hash of its manifest.
    pub previous_blake3: Option<Hash>,
    /// The generation whose commit wrote the BM25 index, if there is one.
    pub index_generation: Option<u64>,
    /// All docnos of the store are below it.
    pub next_docno: u64,
    /// Documents that are alive.
    pub documents: u64,
    /// Those of them that have no route.
    pub unrouted: u64,
    pub spec: StoreSpec,
    pub parts: Vec<Part>,
}

/// How a document is held in weights: a route through shared experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    Route,
}

/// The fields that decide whether the rest can be understood.
#[derive(Debug, Deserialize)]
struct Preamble {
    format: u32,
    #[serde(default)]
    reader_features: Vec<String>,
    #[serde(default)]
    encoding: String,
    #[serde(default)]
    spec: PreambleSpec,
}

#[derive(Debug, Default, Deserialize)]
struct PreambleSpec {
    #[serde(default)]
    codec: String,
}

impl Manifest {
    pub fn empty(spec: StoreSpec) -> Self {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Self {
            format: FORMAT,
            reader_features: owned(&READER_FEATURES),
            writer_features: owned(&WRITER_FEATURES),
            encoding: Encoding::Route,
            generation: 0,
            previous: None,
            previous_blake3: None,
            index_generation: None,
            next_docno: 0,
            documents: 0,
            unrouted: 0,
            spec,
            parts: Vec::new(),
        }
    }

    pub fn name(generation: u64) -> String {
        format!("manifest-{generation:08}.json")
    }

    /// The generation of a manifest by its name, if it is the name of one.
    pub fn generation_of(name: &str) -> Option<u64> {
        let digits = name.strip_prefix("manifest-")?.strip_suffix(".json")?;
        let generation = digits.parse().ok()?;
        (Self::name(generation) == name).then_some(generation)
    }

    pub fn of_role<'m>(&'m self, role: &'m str) -> impl Iterator<Item = &'m Part> {
        self.parts.iter().filter(move |p| p.role == role)
    }

    /// Of all parts.
    pub fn bytes(&self) -> u64 {
        let lengths = self.parts.iter().map(|part| part.length);
        lengths.fold(0, u64::saturating_add)
    }

    pub fn to_json(&self, path: &Path) -> Result<Vec<u8>> {
        let mut json = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::invalid(format!("the manifest cannot be written: {e}")))?;
        json.push(b'\n');
        if json.len() as u64 > MANIFEST_LIMIT || values(&json) > MANIFEST_VALUES {
            return Err(Error::invalid(format!(
                "{}: the manifest would have {} bytes and {} values, and {MANIFEST_LIMIT} and {MANIFEST_VALUES} are the most",
                path.display(),
                json.len(),
                values(&json),
            )));
        }
        Ok(json)
    }

    /// A spec holds what its caller likes (a recipe, what is known of the base model). What could not be read again
    /// must not be found out after a commit.
    pub fn expect_readable(spec: &StoreSpec, path: &Path) -> Result<()> {
        let json = Self::empty(spec.clone()).to_json(path)?;
        let read: Result<Self, _> = serde_json::from_slice(&json);
        read.map(|_| ()).map_err(|e| {
            let path = path.display();
            Error::invalid(format!("{path}: the spec could not be read again: {e}"))
        })
    }

    pub fn parse(json: &[u8], path: &Path) -> Result<Self> {
        let malformed =
            |e: serde_json::Error| Error::corrupt(path, "manifest", "a manifest in JSON", e);
        let n = values(json);
        if n > MANIFEST_VALUES {
            let expected = format!("at most {MANIFEST_VALUES} values");
            return Err(Error::corrupt(path, "manifest", expected, n));
        }
        let preamble: Preamble = serde_json::from_slice(json).map_err(malformed)?;
        let unsupported = |what: String, known: String| Error::UnsupportedFormat {
            file: path.to_owned(),
            what,
            known,
        };
        if preamble.format != FORMAT {
            let what = format!("the store has format {}", preamble.format);
            return Err(unsupported(what, format!("format {FORMAT}")));
        }
        if let Some(unknown) = unknown(&preamble.reader_features, &READER_FEATURES) {
            let what = format!("the store needs the reader feature {unknown:?}");
            return Err(unsupported(
                what,
                format!("the features {READER_FEATURES:?}"),
            ));
        }
        if preamble.encoding != "route" {
            let what = format!("the store has the encoding {:?}", preamble.encoding);
            return Err(unsupported(what, "the encoding \"route\"".into()));
        }
        if preamble.spec.codec.parse::<crate::CodecName>().is_err() {
            let what = format!("the store has the codec {:?}", preamble.spec.codec);
            return Err(unsupported(what, crate::CodecName::KNOWN.into()));
        }
        let manifest: Manifest = serde_json::from_slice(json).map_err(malformed)?;
        manifest.validate(path)?;
        Ok(manifest)
    }

    fn validate(&self, path: &Path) -> Result<()> {
        let bad = |what: &str, expected: &str, found: String| {
            Err(Error::corrupt(path, what, expected, found))
        };
        if self.spec.analyser.name != crate::bm25::UNICODE_V1 {
            return Err(Error::UnsupportedFormat {
                file: path.to_owned(),
                what: format!("the store has the analyser {:?}", self.spec.analyser.name),
                known: crate::bm25::UNICODE_V1.into(),
            });
        }
        if let Err(e) = self.spec.validate() {
            return bad("spec", "a valid one", e.to_string());
        }
        if path.file_name().and_then(|n| n.to_str()) != Some(&Self::name(self.generation)) {
            return bad(
                "generation",
                "the one in the file name",
                self.generation.to_string(),
            );
        }
        if self.previous.is_some() != self.previous_blake3.is_some() {
            let found = format!("{:?}", self.previous_blake3);
            return bad(
                "previous_blake3",
                "one if and only if there is one before",
                found,
            );
        }
        if self.documents > self.next_docno || self.unrouted > self.documents {
            let found = format!(
                "{} of {}, below {}",
                self.unrouted, self.documents, self.next_docno
            );
            return bad(
                "document counts",
                "unrouted <= documents <= next_docno",
                found,
            );
        }
        let mut names = HashSet::new();
        for part in &self.parts {
            let in_folder = part.file.starts_with(INDEX_FOLDER) && part.file.contains('/');
            let ours = [CURRENT, CURRENT_NEW, LOCK, INDEX_FOLDER].contains(&part.file.as_str())
                || Self::generation_of(&part.file).is_some();
            if !is_part_name(&part.file) || ours || in_folder != (part.role == role::BM25) {
                return bad(
                    "part name",
                    "a plain file name",
                    format!("{:?} ({})", part.file, part.role),
                );
            }
            if !names.insert(&part.file) {
                return bad("parts", "each file once", format!("{:?} twice", part.file));
            }
        }
        let decoders = usize::from(self.spec.codec.keeps() == Keeps::Code);
        for (role, expected) in [
            (role::EXPERTS, 1..=1),
            (role::DECODER, decoders..=decoders),
            (role::ROUTER, 0..=decoders),
            (role::DEAD, 0..=1),
        ] {
            let n = self.of_role(role).count();
            if !expected.contains(&n) {
                return bad(role, &format!("{expected:?} parts"), n.to_string());
            }
        }
        if self.index_generation.is_some() != self.of_role(role::BM25).next().is_some() {
            return bad(
                "index_generation",
                "one if and only if there are bm25 parts",
                format!("{:?}", self.index_generation),
            );
        }
        Ok(())
    }

    /// Whether this version may write the next generation.
    pub fn check_writable(&self, path: &Path) -> Result<()> {
        match unknown(&self.writer_features, &WRITER_FEATURES) {
            None => Ok(()),
            Some(feature) => Err(Error::UnsupportedFormat {
                file: path.to_owned(),
                what: format!("writing to the store needs the feature {feature:?}"),
                known: format!("it, but writes with the features {WRITER_FEATURES:?} only"),
            }),
        }
    }
}

fn values(json: &[u8]) -> usize {
    let begins = |b: &&u8| matches!(b, b',' | b'[' | b'{');
    json.iter().filter(begins).count()
}

fn unknown<'f>(features: &'f [String], known: &[&str]) -> Option<&'f str> {
    features
        .iter()
        .map(String::as_str)
        .find(|f| !known.contains(f))
}

/// What `CURRENT` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Current {
    pub manifest: String,
    pub blake3: Hash,
}

impl Current {
    pub fn to_text(&self) -> String {
        format!("{FIRST_LINE}\n{} {}\n", self.manifest, self.blake3)
    }

    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let malformed = || {
            let found = String::from_utf8_lossy(bytes.get(..100).unwrap_or(bytes)).into_owned();
            Error::corrupt(
                path,
                "CURRENT",
                "two lines that name a manifest and its hash",
                format!("{found:?}"),
            )
        };
        let text = std::str::from_utf8(bytes).map_err(|_| malformed())?;
        let (first, rest) = text.split_once('\n').ok_or_else(malformed)?;
        if first != FIRST_LINE {
            return match first.strip_prefix("polyprag store ") {
                Some(version) if version.bytes().all(|b| b.is_ascii_digit()) => {
                    Err(Error::UnsupportedFormat {
                        file: path.to_owned(),
                        what: format!("the store has format {version}"),
                        known: format!("format {FORMAT}"),
                    })
                }
                _ => Err(malformed()),
            };
        }
        let (manifest, hash) = rest
            .strip_suffix('\n')
            .and_then(|line| line.split_once(' '))
            .ok_or_else(malformed)?;
        let blake3 = Hash::try_from(hash.to_owned()).map_err(|_| malformed())?;
        if Manifest::generation_of(manifest).is_none() {
            return Err(malformed());
        }
        Ok(Self {
            manifest: manifest.to_owned(),
            blake3,
        })
    }

    /// That these bytes, from the file at `path`, are the manifest it names.
    pub fn check(&self, manifest: &[u8], path: &Path) -> Result<()> {
        let found = Hash(*blake3::hash(manifest).as_bytes());
        match found == self.blake3 {
            true => Ok(()),
            false => {
                let expected = format!("BLAKE3 {}", self.blake3);
                Err(Error::corrupt(path, "manifest", expected, found))
            }
        }
    }

    pub fn read(dir: &Directory) -> Result<Self> {
        match dir.read(CURRENT, CURRENT_LIMIT) {
            Ok(bytes) => Self::parse(&bytes, &dir.path_of(CURRENT)),
            Err(e) if e.io_kind() == Some(ErrorKind::NotFound) => Err(Error::NotAStore {
                path: dir.path().to_owned(),
                reason: match dir.is_removed() {
                    true => "its folder was removed while it was open: open the store again",
                    false => "it has no file CURRENT, so nothing was ever committed there",
                }
                .into(),
            }),
            Err(e) => Err(e),
        }
    }
}

/// A manifest that was read, its bytes compared with the hash, and the lock that keeps its parts in place.
#[derive(Debug)]
pub struct Pinned {
    pub current: Current,
    pub manifest: Manifest,
    /// Bytes of the manifest itself.
    pub length: u64,
    /// A shared lock lasts as long as this is open.
    _file: File,
}

impl Pinned {
    /// The generation in force. A commit and a clean-up may pass between the steps: then begin again.
    pub fn newest(dir: &Directory) -> Result<Self> {
        let mut tries = 0;
        loop {
            let current = Current::read(dir)?;
            let name = current.manifest.clone();
            tries += 1;
            match Self::open(dir, current) {
                Ok(Some(pinned)) => return Ok(pinned),
                Ok(None) if tries < TRIES => std::thread::sleep(PAUSE),
                Ok(None) => {
                    let file = dir.path_of(CURRENT);
                    return Err(Error::corrupt(
                        file,
                        "CURRENT",
                        format!("the manifest {name}"),
                        "no such file",
                    ));
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// None if the manifest is not (or no longer) there.
    pub fn open(dir: &Directory, current: Current) -> Result<Option<Self>> {
        let name = &current.manifest;
        let path = dir.path_of(name);
        let file = match dir.open_file(name) {
            Err(e) if e.io_kind() == Some(ErrorKind::NotFound) => return Ok(None),
            other => other?,
        };
        // Where there are no locks, nothing is ever cleaned up.
        if files::lock(&file, LockMode::Shared, &path)? == Lock::Busy
            || !dir.still_names(name, &file)?
        {
            return Ok(None);
        }
        let json = files::read_limited(&file, MANIFEST_LIMIT, &path)?;
        current.check(&json, &path)?;
        let manifest = Manifest::parse(&json, &path)?;
        Ok(Some(Self {
            length: json.len() as u64,
            current,
            manifest,
            _file: file,
        }))
    }
}

/// Reads a manifest that is not in force, for the collector.
pub fn read_other(dir: &Directory, name: &str) -> Result<Manifest> {
    Manifest::parse(&dir.read(name, MANIFEST_LIMIT)?, &dir.path_of(name))
}
