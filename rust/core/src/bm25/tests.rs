#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::*;

const NOTHING: &(dyn Fn(u64) -> bool + Sync) = &|_| false;

fn spec() -> IndexSpec {
    IndexSpec::default()
}

fn store(path: &Path) -> Directory {
    Directory::open(path).unwrap()
}

/// One commit of documents with the given docnos.
fn unseen(progress: &Progress) -> Meanwhile<'_> {
    Meanwhile { progress, worth: 0 }
}

fn commit(
    path: &Path,
    generation: u64,
    previous: &[IndexFile],
    docs: &[(u64, &str)],
) -> Vec<IndexFile> {
    let before = (generation > 1).then(|| generation - 1);
    let mut writer = IndexWriter::open(&store(path), before, previous, &spec()).unwrap();
    for (docno, text) in docs {
        writer
            .add(*docno, "", text, FilterValues::default())
            .unwrap();
    }
    writer
        .commit(generation, unseen(&Progress::unseen()))
        .unwrap()
}

fn reader(path: &Path, generation: u64, files: &[IndexFile]) -> IndexReader {
    IndexReader::open(&store(path), generation, files, &spec()).unwrap()
}

fn found(reader: &IndexReader, text: &str) -> Vec<u64> {
    let hits = reader.search(text, 10, None, NOTHING).unwrap();
    hits.into_iter().map(|(docno, _)| docno).collect()
}

#[test]
fn add_commit_reopen_search() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = IndexWriter::open(&store(dir.path()), None, &[], &spec()).unwrap();
    writer
        .add(
            7,
            "Darwin",
            "On the origin of species",
            FilterValues::default(),
        )
        .unwrap();
    writer
        .add(9, "Curie", "Radium and polonium", FilterValues::default())
        .unwrap();
    let files = writer.commit(1, unseen(&Progress::unseen())).unwrap();
    drop(writer);

    for file in &files {
        let bytes = fs::read(dir.path().join(&file.name)).unwrap();
        assert_eq!(bytes.len() as u64, file.length);
        assert_eq!(*blake3::hash(&bytes).as_bytes(), file.blake3);
    }
    let on_disk = fs::read_dir(dir.path().join("bm25")).unwrap().count();
    assert_eq!(on_disk, files.len(), "nothing is left over");
    assert!(files.iter().any(|file| file.name == "bm25/meta-1.json"));

    let reader = reader(dir.path(), 1, &files);
    reader.verify(&Progress::unseen()).unwrap();
    assert_eq!(reader.segments(), 1);
    assert_eq!(found(&reader, "Who wrote about DARWIN's species?"), [7]);
    assert_eq!(found(&reader, "polonium OR species").len(), 2);
}

#[test]
fn hostile_questions_are_text() {
    let dir = tempfile::tempdir().unwrap();
    let files = commit(
        dir.path(),
        1,
        &[],
        &[(0, "cats AND dogs"), (1, "title: a \"quoted\" star*")],
    );
    let reader = reader(dir.path(), 1, &files);
    for nothing in [
        "", "   ", "?!", ":", "\"", "*", "()[]{}", "\\", "\u{0}", "~^",
    ] {
        assert_eq!(found(&reader, nothing), [] as [u64; 0], "{nothing:?}");
    }
    assert_eq!(found(&reader, "cats AND"), [0]);
    assert_eq!(found(&reader, "title:quoted"), [1]);
    assert_eq!(found(&reader, "+(star* -\"quoted"), [1]);
    assert_eq!(found(&reader, &"cats ".repeat(100_000)), [0]);
    let many: String = (0..5_000).map(|n| format!("w{n} ")).collect();
    assert_eq!(found(&reader, &format!("dogs {many}")), [0]);
    assert_eq!(reader.search("cats", 0, None, NOTHING).unwrap(), []);
    assert_eq!(
        reader
            .search("cats", usize::MAX, None, NOTHING)
            .unwrap()
            .len(),
        1
    );
}

#[test]
fn an_empty_index_finds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let files = commit(dir.path(), 1, &[], &[]);
    assert_eq!(files.len(), 1);
    let reader = reader(dir.path(), 1, &files);
    reader.verify(&Progress::unseen()).unwrap();
    assert_eq!(found(&reader, "anything"), [] as [u64; 0]);
}

#[test]
fn scripts_are_found_by_their_own_questions() {
    let texts = [
        "القاهرة هي عاصمة مصر",
        "ירושלים היא עיר הבירה",
        "Η Αθήνα είναι πρωτεύουσα",
        "Москва столица России",
        "दिल्ली भारत की राजधानी है",
        "กรุงเทพเป็นเมืองหลวงของไทย",
        "北京是中国的首都",
        "東京は日本の首都です",
        "서울은 대한민국의 수도이다",
        "Thủ đô là Hà Nội",
    ];
    let questions = [
        "ما هي عاصمة مصر؟",
        "עיר הבירה ירושלים",
        "πρωτεύουσα ΑΘΉΝΑ",
        "столица",
        "राजधानी दिल्ली",
        "เมืองหลวง",
        "中国首都",
        "日本の首都",
        "대한민국 수도",
        "ha\u{300} nội hà nội",
    ];
    let docs: Vec<(u64, &str)> = texts
        .iter()
        .enumerate()
        .map(|(at, text)| (at as u64, *text))
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let files = commit(dir.path(), 1, &[], &docs);
    let reader = reader(dir.path(), 1, &files);
    for (at, question) in questions.iter().enumerate() {
        assert_eq!(
            found(&reader, question).first(),
            Some(&(at as u64)),
            "{question}"
        );
    }
}

#[test]
fn deletes_take_effect_with_their_generation_and_dead_ones_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let docs: Vec<(u64, &str)> = (0..20).map(|docno| (docno, "same words")).collect();
    let one = commit(dir.path(), 1, &[], &docs);
    let mut writer = IndexWriter::open(&store(dir.path()), Some(1), &one, &spec()).unwrap();
    writer.delete(0).unwrap();
    writer
        .add(50, "", "same words", FilterValues::default())
        .unwrap();
    writer.delete(50).unwrap();
    let two = writer.commit(2, unseen(&Progress::unseen())).unwrap();
    drop(writer);

    let old = reader(dir.path(), 1, &one);
    let new = reader(dir.path(), 2, &two);
    assert_eq!(found(&old, "words"), (0..10).collect::<Vec<u64>>());
    assert_eq!(found(&new, "words"), (1..11).collect::<Vec<u64>>());
    let live = new.search("words", 10, None, &|docno| docno < 15).unwrap();
    let live: Vec<u64> = live.into_iter().map(|(docno, _)| docno).collect();
    assert_eq!(live, [15, 16, 17, 18, 19]);
}

#[test]
fn a_reader_goes_on_while_the_writer_commits() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = commit(dir.path(), 1, &[], &[(0, "alpha beta")]);
    let old = reader(dir.path(), 1, &files);
    let first = files.clone();
    for generation in 2..30 {
        files = commit(
            dir.path(),
            generation,
            &files,
            &[(generation, "alpha gamma")],
        );
        assert_eq!(found(&old, "alpha"), [0]);
        let new = reader(dir.path(), generation, &files);
        assert!(
            new.segments() <= MAX_SEGMENTS,
            "{} segments",
            new.segments()
        );
        assert_eq!(
            new.search("alpha", 100, None, NOTHING).unwrap().len() as u64,
            generation
        );
    }
    for file in first {
        assert!(
            dir.path().join(&file.name).exists(),
            "{} of generation 1 is the collector's",
            file.name
        );
    }
}

#[test]
fn ranking_does_not_depend_on_the_segments() {
    let words = [
        "ash", "birch", "cedar", "elm", "fir", "holly", "larch", "oak",
    ];
    let mut seed = 1_u64;
    let mut random = |below: u64| {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    let texts: Vec<String> = (0..600)
        .map(|_| {
            (0..1 + random(12))
                .map(|_| words[random(8) as usize])
                .collect::<Vec<_>>()
                .join(" ")
        })
        .collect();
    let docs: Vec<(u64, &str)> = texts
        .iter()
        .enumerate()
        .map(|(at, text)| (at as u64, text.as_str()))
        .collect();

    let together = tempfile::tempdir().unwrap();
    let one = commit(together.path(), 1, &[], &docs);
    let apart = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for (at, part) in docs.rchunks(100).enumerate() {
        files = commit(apart.path(), at as u64 + 1, &files, part);
    }
    let one = reader(together.path(), 1, &one);
    let many = reader(apart.path(), 6, &files);
    assert_eq!((one.segments(), many.segments()), (1, 6));
    for question in [
        "oak",
        "ash elm",
        "cedar fir holly larch",
        "ash birch cedar elm fir holly larch oak",
    ] {
        for k in [1, 3, 10, 50, 600] {
            let expected = one.search(question, k, None, NOTHING).unwrap();
            assert_eq!(
                expected,
                many.search(question, k, None, NOTHING).unwrap(),
                "{question} {k}"
            );
            let ordered = |pair: &[(u64, f32)]| {
                pair[0].1 > pair[1].1 || (pair[0].1 == pair[1].1 && pair[0].0 < pair[1].0)
            };
            assert!(expected.windows(2).all(ordered));
            assert_eq!(
                expected,
                one.search(question, 600, None, NOTHING)
                    .unwrap()
                    .into_iter()
                    .take(k)
                    .collect::<Vec<_>>()
            );
        }
    }
}

/// BM25 by its formula, in f64, over all documents that the index holds.
fn reference(texts: &[(u64, String)], question: &str) -> Vec<(f64, u64)> {
    use tantivy::fieldnorm::FieldNormReader;
    let words = |text: &str| -> Vec<String> { text.split(' ').map(str::to_owned).collect() };
    let average = {
        let tokens: usize = texts.iter().map(|(_, text)| words(text).len()).sum();
        tokens as f64 / texts.len() as f64
    };
    let mut asked = words(question);
    asked.sort();
    asked.dedup();
    let (k1, b) = (1.2, 0.75);
    let mut scores = vec![0.0; texts.len()];
    for term in asked {
        let counts: Vec<f64> = texts
            .iter()
            .map(|(_, text)| words(text).iter().filter(|word| **word == term).count() as f64)
            .collect();
        let held = counts.iter().filter(|count| **count > 0.0).count() as f64;
        let idf = (1.0 + (texts.len() as f64 - held + 0.5) / (held + 0.5)).ln();
        for (score, (count, (_, text))) in scores.iter_mut().zip(counts.iter().zip(texts)) {
            // The length as the index keeps it, in one byte.
            let id = FieldNormReader::fieldnorm_to_id(words(text).len() as u32);
            let length = f64::from(FieldNormReader::id_to_fieldnorm(id));
            let norm = k1 * (1.0 - b + b * length / average);
            *score += idf * (k1 + 1.0) * count / (count + norm);
        }
    }
    let mut ranked: Vec<(f64, u64)> = scores
        .into_iter()
        .zip(texts)
        .filter(|(score, _)| *score > 0.0)
        .map(|(score, (docno, _))| (score, *docno))
        .collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    ranked
}

/// Enough documents for many windows and blocks, and words of every frequency, so that the search leaves
/// most of them out.
#[test]
fn the_best_are_those_of_the_formula() {
    let mut seed = 3_u64;
    let mut random = || {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as f64 / (1_u64 << 31) as f64
    };
    let texts: Vec<(u64, String)> = (0..13_000)
        .map(|docno| {
            let words: Vec<String> = (0..1 + (random() * random() * 60.0) as usize)
                .map(|_| format!("w{}", (2_000_f64.powf(random()) - 1.0) as u32))
                .collect();
            (docno, words.join(" "))
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for (at, part) in texts.chunks(5_000).enumerate() {
        let part: Vec<(u64, &str)> = part.iter().map(|(n, text)| (*n, text.as_str())).collect();
        files = commit(dir.path(), at as u64 + 1, &files, &part);
    }
    let reader = reader(dir.path(), 3, &files);
    assert_eq!(reader.segments(), 3);
    let dead = |docno: u64| docno % 7 == 3;
    for question in [
        "w0",
        "w1999 w0",
        "w0 w1 w2 w3",
        "w0 w1 w2 w5 w40 w300 w1500",
        "w700 w900 w1100 w1300",
        "w0 w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w20 w50 w100",
        "w12 w0 nothing w1 w1234",
    ] {
        let expected = reference(&texts, question);
        let of_docno: std::collections::HashMap<u64, f64> = expected
            .iter()
            .map(|(score, docno)| (*docno, *score))
            .collect();
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * a.max(b);
        for k in [1, 3, 10, 100, 20_000] {
            for is_dead in [NOTHING, &dead as &(dyn Fn(u64) -> bool + Sync)] {
                let hits = reader.search(question, k, None, is_dead).unwrap();
                let living = expected.iter().filter(|(_, docno)| !is_dead(*docno));
                let wanted: Vec<&(f64, u64)> = living.take(k).collect();
                assert_eq!(hits.len(), wanted.len(), "{question}, {k}");
                for ((docno, score), (wanted, _)) in hits.iter().zip(&wanted) {
                    assert!(!is_dead(*docno));
                    assert!(
                        near(f64::from(*score), of_docno[docno]),
                        "{question}, {k}: {docno}"
                    );
                    // As high as the formula's at this place, if not the same of two that are equal.
                    assert!(near(of_docno[docno], *wanted), "{question}, {k}: {docno}");
                }
                let unique: HashSet<u64> = hits.iter().map(|(docno, _)| *docno).collect();
                assert_eq!(unique.len(), hits.len());
            }
        }
    }
}

#[test]
fn more_equals_than_fit_at_once_are_ordered_by_docno() {
    let dir = tempfile::tempdir().unwrap();
    let docs: Vec<(u64, &str)> = (0..10_000).rev().map(|docno| (docno, "one two")).collect();
    let files = commit(dir.path(), 1, &[], &docs);
    let reader = reader(dir.path(), 1, &files);
    let hits = reader
        .search("two one", 3, None, &|docno| docno == 1)
        .unwrap();
    let docnos: Vec<u64> = hits.iter().map(|hit| hit.0).collect();
    assert_eq!(docnos, [0, 2, 3]);
    assert_eq!(
        reader.search("two", 20_000, None, NOTHING).unwrap().len(),
        10_000
    );
}

#[test]
fn many_threads_search_one_reader() {
    let dir = tempfile::tempdir().unwrap();
    let docs: Vec<(u64, &str)> = (0..100).map(|docno| (docno, "river bank")).collect();
    let files = commit(dir.path(), 1, &[], &docs);
    let reader = reader(dir.path(), 1, &files);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                for _ in 0..200 {
                    assert_eq!(found(&reader, "river").len(), 10);
                }
            });
        }
    });
}

#[test]
fn discarding_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let files = commit(dir.path(), 1, &[], &[(0, "kept")]);
    let mut writer = IndexWriter::open(&store(dir.path()), Some(1), &files, &spec()).unwrap();
    writer
        .add(1, "", "dropped", FilterValues::default())
        .unwrap();
    writer.delete(0).unwrap();
    drop(writer);
    assert_eq!(
        fs::read_dir(dir.path().join("bm25")).unwrap().count(),
        files.len()
    );
    assert_eq!(found(&reader(dir.path(), 1, &files), "kept dropped"), [0]);
}

#[test]
fn what_a_failed_commit_left_is_in_nobodys_way() {
    let dir = tempfile::tempdir().unwrap();
    let one = commit(dir.path(), 1, &[], &[(0, "first"), (1, "second")]);
    for _ in 0..2 {
        // As after a crash between this commit and the store's: the same generation once more.
        let mut writer = IndexWriter::open(&store(dir.path()), Some(1), &one, &spec()).unwrap();
        writer.delete(0).unwrap();
        let two = writer.commit(2, unseen(&Progress::unseen())).unwrap();
        assert_eq!(found(&reader(dir.path(), 2, &two), "first second"), [1]);
    }
}

#[test]
fn merging_is_bounded_and_prefers_small_segments() {
    assert_eq!(to_merge(&[(5, 0); 8]), [] as [usize; 0]);
    assert_eq!(to_merge(&[(5, 0); 9]).len(), 9);
    let mut sizes = vec![(1_000_000, 0)];
    sizes.extend([(1, 0); 8]);
    assert_eq!(to_merge(&sizes), (1..9).collect::<Vec<_>>());
    let doubling: Vec<(u32, u32)> = (0..9).map(|power| (4_u32.pow(power), 0)).collect();
    assert_eq!(to_merge(&doubling), [0, 1]);
    assert_eq!(to_merge(&[(10, 11), (10, 0)]), [0]);
}

/// Every file of the index, cut at every length and with every byte flipped: an error or an answer.
#[test]
fn damage_is_an_error_and_never_a_panic() {
    let dir = tempfile::tempdir().unwrap();
    let docs: Vec<(u64, &str)> = (0..40)
        .map(|docno| (docno, "river bank water stone"))
        .collect();
    let one = commit(dir.path(), 1, &[], &docs);
    let mut writer = IndexWriter::open(&store(dir.path()), Some(1), &one, &spec()).unwrap();
    writer.delete(3).unwrap();
    let files = writer.commit(2, unseen(&Progress::unseen())).unwrap();
    drop(writer);

    let attempt = |files: &[IndexFile]| -> Result<()> {
        let reader = IndexReader::open(&store(dir.path()), 2, files, &spec())?;
        reader.search("river stone", 3, None, NOTHING)?;
        reader.verify(&Progress::unseen())
    };
    attempt(&files).unwrap();
    let typed = |result: Result<()>, what: &str| match result {
        Err(
            Error::CorruptIndex { .. }
            | Error::IndexTooOld { .. }
            | Error::UnsupportedFormat { .. },
        ) => {}
        other => panic!("{what}: {other:?}"),
    };
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    for file in &files {
        let path = dir.path().join(&file.name);
        let whole = fs::read(&path).unwrap();
        let place = fs::File::options().write(true).open(&path).unwrap();
        for length in (0..whole.len()).rev() {
            place.set_len(length as u64).unwrap();
            typed(attempt(&files), &format!("{} cut to {length}", file.name));
        }
        // One byte in place: a file system may flush what is written anew.
        fs::write(&path, &whole).unwrap();
        let place = fs::File::options().write(true).open(&path).unwrap();
        for (at, byte) in whole.iter().enumerate() {
            place.write_all_at(&[byte ^ 0x41], at as u64).unwrap();
            typed(attempt(&files), &format!("{} altered at {at}", file.name));
            place.write_all_at(&[*byte], at as u64).unwrap();
        }
        fs::remove_file(&path).unwrap();
        typed(attempt(&files), &format!("{} missing", file.name));
        std::os::unix::fs::symlink("/etc/hostname", &path).unwrap();
        typed(attempt(&files), &format!("{} a symlink", file.name));
        fs::remove_file(&path).unwrap();
        fs::write(&path, &whole).unwrap();
    }
    std::panic::set_hook(hook);
    attempt(&files).unwrap();
}

#[test]
fn names_outside_the_folder_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let files = commit(dir.path(), 1, &[], &[(0, "x")]);
    for name in [
        "bm25/../CURRENT",
        "/etc/passwd",
        "bm25/",
        "bm25/.managed.json",
        "bm25/a/b",
        "x.term",
    ] {
        let mut listed = files.clone();
        listed.push(IndexFile {
            name: name.into(),
            length: 1,
            blake3: [0; 32],
        });
        let error = IndexReader::open(&store(dir.path()), 1, &listed, &spec()).unwrap_err();
        assert!(
            matches!(error, Error::CorruptIndex { .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn another_analyser_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let files = commit(dir.path(), 1, &[], &[(0, "x")]);
    let with = |name: &str, stemmer: Option<&str>| IndexSpec {
        analyser: AnalyserSpec {
            name: name.into(),
            stemmer: stemmer.map(Into::into),
        },
        ..spec()
    };
    let other = with("unicode-v9", None);
    let error = IndexReader::open(&store(dir.path()), 1, &files, &other).unwrap_err();
    assert!(matches!(error, Error::UnsupportedFormat { .. }), "{error}");
    let stemmed = with(UNICODE_V1, Some("english"));
    let error = IndexReader::open(&store(dir.path()), 1, &files, &stemmed).unwrap_err();
    assert!(matches!(error, Error::CorruptIndex { .. }), "{error}");
}

/// A segment file whose footer names another version of the format, with checksums that are right.
fn of_format(path: &Path, files: &[IndexFile], version: &str) -> Vec<IndexFile> {
    let mut files = files.to_vec();
    let file = files
        .iter_mut()
        .find(|f| f.name.ends_with(".term"))
        .unwrap();
    let place = path.join(&file.name);
    let whole = fs::read(&place).unwrap();
    let content = &whole[..whole.len() - 8 - 16];
    let text = b"\"index_format_version\":7";
    let at = content.windows(text.len()).position(|w| w == text).unwrap() + text.len() - 1;
    let mut other = content.to_vec();
    other.splice(at..=at, version.bytes());
    let grown = (version.len() - 1) as u32;
    let length_at = other.len() - 8; // of the footer, before its magic
    let length = u32::from_le_bytes(other[length_at..length_at + 4].try_into().unwrap()) + grown;
    other[length_at..length_at + 4].copy_from_slice(&length.to_le_bytes());
    let mut trailer = checked::TrailerWriter::default();
    trailer.write(&other);
    other.extend(trailer.finish());
    file.length = other.len() as u64;
    file.blake3 = *blake3::hash(&other).as_bytes();
    fs::write(place, other).unwrap();
    files
}

#[test]
fn an_index_of_another_tantivy_is_told_at_the_first_search() {
    let dir = tempfile::tempdir().unwrap();
    let files = commit(dir.path(), 1, &[], &[(0, "x")]);
    let lazy = |files: &[IndexFile]| LazyIndex::new(&store(dir.path()), 1, files.to_vec(), spec());

    let old = lazy(&of_format(dir.path(), &files, "3"));
    for _ in 0..2 {
        let error = old.get().unwrap_err();
        assert!(matches!(error, Error::IndexTooOld { .. }), "{error:?}");
        assert!(
            error.to_string().contains("`polyprag reindex STORE`"),
            "{error}"
        );
        assert!(error.to_string().contains("index_format v3"), "{error}");
    }

    let path = tempfile::tempdir().unwrap();
    let files = commit(path.path(), 1, &[], &[(0, "x")]);
    let new = of_format(path.path(), &files, "12");
    let error = IndexReader::open(&store(path.path()), 1, &new, &spec()).unwrap_err();
    assert!(
        matches!(error, Error::UnsupportedFormat { .. }),
        "{error:?}"
    );
    assert!(error.to_string().contains("newer polyprag"), "{error}");
}

#[test]
fn a_fresh_index_is_made_beside_the_old_one() {
    let dir = tempfile::tempdir().unwrap();
    let one = commit(dir.path(), 1, &[], &[(0, "old words"), (1, "stay")]);
    let old = reader(dir.path(), 1, &one);
    // Damage, or another version, is nothing to it.
    let segment = one.iter().find(|f| f.name.ends_with(".idx")).unwrap();
    fs::remove_file(dir.path().join(&segment.name)).unwrap();

    let mut writer = IndexWriter::fresh(&store(dir.path()), &spec()).unwrap();
    writer
        .add(1, "", "new words", FilterValues::default())
        .unwrap();
    let two = writer.commit(2, unseen(&Progress::unseen())).unwrap();
    drop(writer);
    let new = reader(dir.path(), 2, &two);
    new.verify(&Progress::unseen()).unwrap();
    assert_eq!(found(&new, "old new words stay"), [1]);
    assert_eq!(found(&old, "old new words stay"), [0, 1]);
    for file in &one {
        assert!(!two.iter().any(|f| f.name == file.name), "{}", file.name);
        let is_there = dir.path().join(&file.name).exists();
        assert!(
            is_there || file.name == segment.name,
            "{} is the collector's",
            file.name
        );
    }

    let mut writer = IndexWriter::fresh(&store(dir.path()), &spec()).unwrap();
    writer
        .add(5, "", "dropped", FilterValues::default())
        .unwrap();
    drop(writer);
    let left = fs::read_dir(dir.path().join("bm25")).unwrap().count();
    assert_eq!(left, one.len() - 1 + two.len());
}
