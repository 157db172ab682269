//! Stores that were cut, altered, half written, or come from the future: an error that says so, or the
//! right answer; never a panic, never a wrong answer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;

use common::*;
use polyprag_core::{Document, Error, Kind, Result, RouteArray, Store};

/// Everything that a reader can ask of the small store.
#[derive(Debug, PartialEq)]
struct Answers {
    routes: RouteArray,
    documents: Vec<Document>,
    ids: Vec<polyprag_core::DocumentId>,
    experts: Vec<Vec<u8>>,
}

fn ask(store: &Store) -> Result<Answers> {
    let known = ids(&["ada", "dan", "bob", "fay"]);
    Ok(Answers {
        routes: store.routes(&known, Kind::Weights)?,
        documents: store.documents(&ids(&["ada", "dan", "bob", "fay", "eve"]))?,
        ids: store.ids()?.collect::<Result<_>>()?,
        experts: store
            .experts()?
            .iter()
            .map(|t| t.raw.bytes().to_vec())
            .collect(),
    })
}

fn without_panic<T>(what: &str, work: impl FnOnce() -> T + std::panic::UnwindSafe) -> T {
    catch_unwind(work).unwrap_or_else(|_| panic!("panicked: {what}"))
}

/// Files that the newest generation of the small store needs.
fn needed(path: &Path) -> Vec<String> {
    let manifest = fs::read_to_string(path.join("manifest-00000002.json")).unwrap();
    let in_use = |name: &str| {
        name == "CURRENT"
            || name == "manifest-00000002.json"
            || manifest.contains(&format!("\"{name}\""))
    };
    files(path).into_iter().filter(|n| in_use(n)).collect()
}

#[test]
fn a_file_that_was_cut_is_an_error_or_not_needed() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let expected = ask(&small(&path, "code(3)")).unwrap();
    for name in files(&path) {
        let file = path.join(&name);
        let whole = fs::read(&file).unwrap();
        let n = whole.len();
        for cut in [0, 1, 7, 8, 31, 64, n / 3, n / 2, n.saturating_sub(9), n - 1] {
            if cut >= n {
                continue;
            }
            fs::write(&file, &whole[..cut]).unwrap();
            match Store::open(&path) {
                Err(e) => assert!(is_typed(&e), "{name} cut to {cut}: {e:?}"),
                Ok(store) => {
                    assert_eq!(ask(&store).unwrap(), expected, "{name} cut to {cut}");
                    if needed(&path).contains(&name) {
                        assert!(
                            name.starts_with("bm25/"),
                            "{name} cut to {cut} was not noticed"
                        );
                        let error = store.search("harbour", 3, None).unwrap_err();
                        assert!(matches!(error, Error::CorruptIndex { .. }), "{error:?}");
                        assert!(is_typed(&store.verify().unwrap_err()));
                    }
                }
            }
        }
        fs::write(&file, &whole).unwrap();
    }
    Store::open(&path).unwrap().verify().unwrap();
}

#[test]
fn a_flipped_byte_is_found_and_never_a_panic() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    small(&path, "code(3)");
    std::panic::set_hook(Box::new(|_| {}));
    for name in needed(&path) {
        let file = path.join(&name);
        let whole = fs::read(&file).unwrap();
        let dense = !name.ends_with(".safetensors") && !name.starts_with("bm25/");
        // Headers byte by byte, the rest in strides that are no power of two.
        let step = |at: usize| match (dense, at < 64) {
            (true, true) => 3,
            (true, false) => 13,
            (false, true) => 11,
            (false, false) => 61,
        };
        let mut at = 0;
        while at < whole.len() {
            let mut altered = whole.clone();
            altered[at] ^= [0x01, 0x80, 0xff, 0x20][at % 4];
            fs::write(&file, &altered).unwrap();
            let what = format!("byte {at} of {name}");
            let verified = without_panic(&what, || {
                let store = Store::open(&path)?;
                if let Err(e) = ask(&store) {
                    assert!(is_typed_or_miss(&e), "{e:?}");
                }
                let _ = store.search("the harbour house", 3, None);
                store.verify()
            });
            match verified {
                Ok(_) => panic!("{what} was not found"),
                Err(e) => assert!(is_typed(&e), "{what}: {e:?}"),
            }
            at += step(at);
        }
        fs::write(&file, &whole).unwrap();
    }
    let _ = std::panic::take_hook();
    Store::open(&path).unwrap().verify().unwrap();
}

#[test]
fn bodies_of_noise_never_panic() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    small(&path, "q8");
    let segments: Vec<String> = needed(&path)
        .into_iter()
        .filter(|n| n.ends_with(".seg") || n.ends_with(".bin"))
        .collect();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for round in 0..60 {
        for name in &segments {
            let file = path.join(name);
            let whole = fs::read(&file).unwrap();
            let mut noisy = whole.clone();
            for _ in 0..1 + round % 5 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                // Only the body and its checksums: head and tail are checked at open.
                let tail = u32::from_le_bytes(*whole[whole.len() - 16..].first_chunk().unwrap());
                let at = 64 + state as usize % (whole.len() - 64 - tail as usize);
                noisy[at] = (state >> 32) as u8;
            }
            fs::write(&file, &noisy).unwrap();
            without_panic(name, || {
                if let Err(e) = Store::open(&path).and_then(|store| ask(&store).map(drop)) {
                    assert!(is_typed_or_miss(&e), "{name}: {e:?}");
                }
            });
            fs::write(&file, &whole).unwrap();
        }
    }
}

#[test]
fn what_is_no_store_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let missing = Store::open(tmp.path().join("missing")).unwrap_err();
    assert_eq!(missing.io_kind(), Some(std::io::ErrorKind::NotFound));
    let empty = Store::open(tmp.path()).unwrap_err();
    assert!(matches!(empty, Error::NotAStore { .. }) && empty.to_string().contains("CURRENT"));
    fs::write(tmp.path().join("file"), "x").unwrap();
    assert!(matches!(
        Store::open(tmp.path().join("file")),
        Err(Error::NotAStore { .. })
    ));
}

#[test]
fn a_commit_that_stopped_half_way_does_not_count() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let expected = ask(&small(&path, "q8")).unwrap();
    // Parts and manifest of the next generation are there, CURRENT does not name them.
    fs::write(path.join("routes-00000003.seg"), "half").unwrap();
    fs::write(path.join("manifest-00000003.json"), "{").unwrap();
    fs::write(path.join("CURRENT.new"), "polyprag").unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(ask(&store).unwrap(), expected);
    let mut writer = store.writer().unwrap();
    add(
        &mut writer,
        passage("gus", "gus is new"),
        3,
        Default::default(),
    )
    .unwrap();
    assert!(writer.commit().unwrap() >= 3);
    assert!(store.refresh().unwrap());
    assert_eq!(store.len().unwrap(), 6);
    store.verify().unwrap();

    // CURRENT names a manifest that is not there.
    let current = fs::read_to_string(path.join("CURRENT")).unwrap();
    let name = current.split_whitespace().nth(3).unwrap();
    fs::remove_file(path.join(name)).unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(
        matches!(error, Error::CorruptStore { .. }) && error.to_string().contains(name),
        "{error}"
    );
}

/// Puts an altered manifest in force.
fn forge(path: &Path, change: impl Fn(&mut serde_json::Value)) {
    let name = "manifest-00000002.json";
    let mut manifest = serde_json::from_slice(&fs::read(path.join(name)).unwrap()).unwrap();
    change(&mut manifest);
    let json = serde_json::to_vec(&manifest).unwrap();
    let hash = blake3::hash(&json).to_hex();
    fs::write(path.join(name), json).unwrap();
    fs::write(
        path.join("CURRENT"),
        format!("polyprag store 1\n{name} {hash}\n"),
    )
    .unwrap();
}

#[test]
fn a_store_from_the_future_is_refused_by_name() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    small(&path, "q8");
    let unsupported = |change: &dyn Fn(&mut serde_json::Value), word: &str| {
        let other = tmp
            .path()
            .join(word.replace(|c: char| !c.is_alphanumeric(), "_"));
        copy(&path, &other);
        forge(&other, change);
        let error = Store::open(&other).unwrap_err();
        assert!(
            matches!(error, Error::UnsupportedFormat { .. }),
            "{error:?}"
        );
        assert!(error.to_string().contains(word), "{error}");
    };
    unsupported(&|m| m["format"] = 2.into(), "format 2");
    unsupported(
        &|m| m["reader_features"] = vec!["time-travel"].into(),
        "time-travel",
    );
    unsupported(&|m| m["encoding"] = "lora".into(), "lora");
    unsupported(&|m| m["spec"]["codec"] = "q3".into(), "q3");
    unsupported(
        &|m| m["spec"]["analyser"]["name"] = "unicode-v2".into(),
        "unicode-v2",
    );

    forge(&path, |m| {
        m["writer_features"] = vec!["undo-log"].into();
        m["a field of a later version"] = 1.into();
    });
    let store = Store::open(&path).unwrap();
    store.verify().unwrap();
    let error = store.writer().unwrap_err();
    assert!(
        matches!(error, Error::UnsupportedFormat { .. }) && error.to_string().contains("undo-log"),
        "{error}"
    );
    fs::write(path.join("CURRENT"), "polyprag store 2\n").unwrap();
    assert!(matches!(
        Store::open(&path),
        Err(Error::UnsupportedFormat { .. })
    ));
}

#[test]
fn a_hostile_manifest_reaches_nothing_outside() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    small(&path, "q8");
    let corrupt = |i: usize, change: &dyn Fn(&mut serde_json::Value)| {
        let other = tmp.path().join(format!("{i}"));
        copy(&path, &other);
        forge(&other, change);
        let error = Store::open(&other).unwrap_err();
        assert!(
            matches!(error, Error::CorruptStore { .. }),
            "{i}: {error:?}"
        );
    };
    for (i, file) in [
        "../s/CURRENT",
        "/etc/passwd",
        "bm25/../CURRENT",
        "",
        ".",
        "a/b",
        "x\0",
        ".hidden",
    ]
    .iter()
    .enumerate()
    {
        corrupt(i, &|m| m["parts"][0]["file"] = (*file).into());
    }
    corrupt(20, &|m| m["parts"][0]["length"] = u64::MAX.into());
    corrupt(21, &|m| m["documents"] = 1_000_000_000_000_u64.into());
    corrupt(22, &|m| m["next_docno"] = 5.into());
    corrupt(27, &|m| {
        m["documents"] = 1_000_000_000_000_u64.into();
        m["next_docno"] = 1_000_000_000_001_u64.into();
    });
    corrupt(23, &|m| m["spec"]["experts"] = 65_535.into());
    corrupt(24, &|m| {
        m["spec"]["modules"][0]["in_features"] = u32::MAX.into()
    });
    corrupt(25, &|m| m["parts"] = serde_json::json!([]));
    corrupt(26, &|m| m["parts"].as_array_mut().unwrap().reverse());

    // A part behind a symlink, and one that is a pipe, which must not be waited on.
    for (i, kind) in ["symlink", "fifo"].iter().enumerate() {
        let other = tmp.path().join(format!("{kind}{i}"));
        copy(&path, &other);
        let ids = other.join("ids-00000002.seg");
        fs::remove_file(&ids).unwrap();
        match *kind {
            "symlink" => std::os::unix::fs::symlink(path.join("ids-00000002.seg"), &ids).unwrap(),
            _ => assert!(
                std::process::Command::new("mkfifo")
                    .arg(&ids)
                    .status()
                    .unwrap()
                    .success()
            ),
        }
        let error = Store::open(&other).unwrap_err();
        assert!(
            matches!(error, Error::CorruptStore { .. }),
            "{kind}: {error:?}"
        );
    }
}

#[test]
fn a_broken_index_leaves_routes_in_use() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let expected = ask(&small(&path, "q8")).unwrap();
    fs::remove_dir_all(path.join("bm25")).unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(ask(&store).unwrap(), expected);
    for _ in 0..2 {
        let error = store.search("harbour", 3, None).unwrap_err();
        assert!(matches!(error, Error::CorruptIndex { .. }), "{error:?}");
    }
    assert!(matches!(store.verify(), Err(Error::CorruptIndex { .. })));
}

#[test]
fn an_index_that_finds_what_the_store_has_not_is_found_by_verify() {
    let tmp = tempfile::tempdir().unwrap();
    let (path, later) = (tmp.path().join("s"), tmp.path().join("later"));
    small(&path, "q8");
    copy(&path, &later);
    let mut writer = Store::open(&later).unwrap().writer().unwrap();
    let document = Document::new("late").with_text("a harbour that came late");
    writer
        .add(&[document], None, polyprag_core::OnDuplicate::Error)
        .unwrap();
    writer.commit().unwrap();
    drop(writer);
    Store::open(&later).unwrap().verify().unwrap();

    let manifest = fs::read(later.join("manifest-00000003.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let of_index = |part: &serde_json::Value| part["role"] == "bm25";
    for part in manifest["parts"].as_array().unwrap() {
        if of_index(part) {
            let file = part["file"].as_str().unwrap();
            fs::copy(later.join(file), path.join(file)).unwrap();
        }
    }
    forge(&path, |old| {
        let parts = old["parts"].as_array_mut().unwrap();
        parts.retain(|part| !of_index(part));
        let new = manifest["parts"].as_array().unwrap().iter();
        parts.extend(new.filter(|part| of_index(part)).cloned());
        old["index_generation"] = 3.into();
        old["next_docno"] = manifest["next_docno"].clone(); // as after going back from it
    });
    let error = Store::open(&path).unwrap().verify().unwrap_err();
    assert!(
        matches!(error, Error::CorruptIndex { .. }) && error.to_string().contains("has no id"),
        "{error}"
    );
}

#[test]
fn a_manifest_that_was_altered_since_it_was_opened_is_not_copied() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let store = small(&path, "q8");
    let manifest = path.join("manifest-00000002.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(
        &manifest,
        text.replace("\"alpha\": 32.0", "\"alpha\": 33.0"),
    )
    .unwrap();
    let (copy, packed) = (tmp.path().join("copy"), tmp.path().join("packed"));
    for copied in [store.snapshot(&copy), store.pack(&packed)] {
        let error = copied.unwrap_err();
        assert!(matches!(error, Error::CorruptStore { .. }), "{error}");
        assert!(error.to_string().contains("corrupt manifest"), "{error}");
    }
    assert!(!copy.exists() && !packed.exists());
}

#[test]
fn a_store_without_docnos_for_them_takes_no_documents() {
    let tmp = tempfile::tempdir().unwrap();
    let (path, other) = (tmp.path().join("s"), tmp.path().join("other"));
    let other = {
        small(&path, "q8");
        small(&other, "q8")
    };
    forge(&path, |m| m["next_docno"] = (u64::MAX - 3).into());
    let store = Store::open(&path).unwrap();
    let mut writer = store.writer().unwrap();
    let on_duplicate = polyprag_core::OnDuplicate::Replace;
    let error = writer.merge(&other, on_duplicate).unwrap_err().to_string();
    assert!(error.contains("no docnos left"), "{error}");
    let documents = ["a", "b", "c", "d"].map(Document::new);
    let error = writer.add(&documents, None, on_duplicate).unwrap_err();
    assert!(error.to_string().contains("no docnos left"), "{error}");
    writer.add(&documents[..3], None, on_duplicate).unwrap();
    writer.commit().unwrap();
    Store::open(&path).unwrap().verify().unwrap();
}
