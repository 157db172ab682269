//! Searching through the store: filters against brute force, many questions at once, an index that is
//! opened by the first search, and one that was damaged.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::*;
use polyprag_core::{
    Condition, Document, Error, Filter, FilterField, FilterKind, Hit, OnDuplicate, Result, Store,
    StoreSpec, Writer,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn filtered_spec() -> StoreSpec {
    StoreSpec {
        filters: vec![
            FilterField::new("lang", FilterKind::String),
            FilterField::new("year", FilterKind::I64),
            FilterField::new("weight", FilterKind::F64),
            FilterField::new("open", FilterKind::Bool),
        ],
        ..spec("f32")
    }
}

fn document(name: &str, text: &str, metadata: &Value) -> Document {
    Document::new(name)
        .with_text(text)
        .with_metadata(metadata.to_string())
}

fn put(writer: &mut Writer, document: Document, on: OnDuplicate) {
    writer.add(&[document], None, on).unwrap();
}

fn filter(json: &Value) -> Filter {
    Filter::from_json(&json.to_string()).unwrap()
}

fn names(hits: &[Hit]) -> Vec<String> {
    hits.iter().map(|hit| hit.id.to_string()).collect()
}

// --- filters ---------------------------------------------------------------------------------------

/// What a filter means, without the store.
fn passes(filter: &Value, metadata: &Value) -> bool {
    let equal = |asked: &Value, held: &Value| match (asked.as_f64(), held.as_f64()) {
        (Some(asked), Some(held)) => asked == held,
        _ => asked == held,
    };
    filter.as_object().unwrap().iter().all(|(name, asked)| {
        let held = match &metadata[name] {
            Value::Null => return false,
            Value::Array(several) => several.clone(),
            one => vec![one.clone()],
        };
        held.iter().any(|held| match asked {
            Value::Array(any) => any.iter().any(|asked| equal(asked, held)),
            Value::Object(range) => range.iter().all(|(key, limit)| {
                let (held, limit) = (held.as_f64().unwrap(), limit.as_f64().unwrap());
                match key.as_str() {
                    "gte" => held >= limit,
                    "gt" => held > limit,
                    "lte" => held <= limit,
                    "lt" => held < limit,
                    other => panic!("{other}"),
                }
            }),
            one => equal(one, held),
        })
    })
}

const WORDS: [&str; 8] = [
    "ash", "birch", "cedar", "elm", "fir", "holly", "larch", "oak",
];
const LANGS: [&str; 5] = ["en", "de", "fr", "", "zh-Hant 漢"];

fn langs() -> impl Strategy<Value = Value> {
    prop_oneof![
        1 => Just(Value::Null),
        3 => prop::sample::select(&LANGS[..]).prop_map(Value::from),
        1 => prop::collection::vec(prop::sample::select(&LANGS[..]), 0..3).prop_map(Value::from),
    ]
}

/// Small ranges, so that values meet.
fn metadata() -> impl Strategy<Value = Value> {
    let year = prop_oneof![1 => Just(Value::Null), 4 => (-3..4_i64).prop_map(Value::from)];
    let weight = prop_oneof![
        1 => Just(Value::Null),
        2 => (-4..5_i64).prop_map(|n| json!(n as f64 / 2.0)),
        1 => (-2..3_i64).prop_map(Value::from),
    ];
    let open = prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from)];
    (langs(), year, weight, open).prop_map(|(lang, year, weight, open)| {
        json!({"lang": lang, "year": year, "weight": weight, "open": open, "other": [1]})
    })
}

fn limits(number: impl Strategy<Value = Value>) -> impl Strategy<Value = Value> {
    let key = prop::sample::select(&["gte", "gt", "lte", "lt"][..]);
    prop::collection::btree_map(key, number, 1..3).prop_map(|range| json!(range))
}

fn filters() -> impl Strategy<Value = Value> {
    let lang = prop_oneof![
        prop::sample::select(&LANGS[..]).prop_map(Value::from),
        Just(json!("nowhere")),
        prop::collection::vec(prop::sample::select(&LANGS[..]), 0..3).prop_map(Value::from),
    ];
    let int = || (-4..5_i64).prop_map(Value::from);
    let half = || (-5..6_i64).prop_map(|n| json!(n as f64 / 2.0));
    let year = prop_oneof![
        int(),
        limits(int()),
        prop::collection::vec(int(), 0..3).prop_map(Value::from)
    ];
    let weight = prop_oneof![
        half(),
        limits(half()),
        prop::collection::vec(half(), 0..3).prop_map(Value::from)
    ];
    let open = prop_oneof![
        any::<bool>().prop_map(Value::from),
        prop::collection::vec(any::<bool>(), 0..3).prop_map(Value::from),
    ];
    let maybe = |part: BoxedStrategy<Value>| prop::option::weighted(0.4, part);
    (
        maybe(lang.boxed()),
        maybe(year.boxed()),
        maybe(weight.boxed()),
        maybe(open.boxed()),
    )
        .prop_map(|(lang, year, weight, open)| {
            let mut filter = serde_json::Map::new();
            for (name, part) in [
                ("lang", lang),
                ("year", year),
                ("weight", weight),
                ("open", open),
            ] {
                if let Some(part) = part {
                    filter.insert(name.into(), part);
                }
            }
            Value::Object(filter)
        })
}

fn texts() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(&WORDS[..]), 0..9).prop_map(|words| words.join(" "))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases / 32, ..Default::default() })]

    /// Several segments, deletions, replaced documents: a filter takes away and changes nothing else.
    #[test]
    fn a_filter_leaves_the_ranking_of_those_that_pass(
        commits in prop::collection::vec(
            prop::collection::vec((0..40_u8, texts(), metadata()), 1..15), 1..5),
        deleted in prop::collection::vec(0..40_u8, 0..5),
        asked in prop::collection::vec((texts(), filters(), 0..12_usize), 1..20),
    ) {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s");
        let mut writer = create(&path, filtered_spec());
        let mut held = std::collections::HashMap::new();
        for commit in &commits {
            for (name, text, metadata) in commit {
                let name = format!("{name}");
                put(&mut writer, document(&name, text, metadata), OnDuplicate::Replace);
                held.insert(polyprag_core::DocumentId::from(name), metadata.clone());
            }
            writer.commit().unwrap();
        }
        for name in &deleted {
            let name = format!("{name}").into();
            if held.remove(&name).is_some() {
                writer.delete(&[name]).unwrap();
            }
        }
        writer.commit().unwrap();
        let store = Store::open(&path).unwrap();
        for (text, wanted, k) in &asked {
            let all = store.search(text, usize::MAX, None).unwrap();
            let expected: Vec<Hit> = all
                .into_iter()
                .filter(|hit| passes(wanted, &held[&hit.id]))
                .collect();
            let wanted = filter(wanted);
            prop_assert_eq!(&store.search(text, usize::MAX, Some(&wanted)).unwrap(), &expected);
            let first: Vec<Hit> = expected.into_iter().take(*k).collect();
            prop_assert_eq!(store.search(text, *k, Some(&wanted)).unwrap(), first);
        }
    }
}

#[test]
fn a_filter_on_each_kind() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, filtered_spec());
    let max = i64::MAX;
    for (name, metadata) in [
        (
            "a",
            json!({"lang": "en", "year": 1990, "weight": 0.5, "open": true}),
        ),
        (
            "b",
            json!({"lang": ["de", "en"], "year": 2000, "weight": 3, "open": false}),
        ),
        ("c", json!({"lang": null, "year": max, "weight": -0.0})),
        ("d", json!({})),
    ] {
        put(
            &mut writer,
            document(name, "alike", &metadata),
            OnDuplicate::Error,
        );
    }
    put(
        &mut writer,
        Document::new("e").with_text("alike"),
        OnDuplicate::Error,
    );
    writer.commit().unwrap();
    let store = Store::open(&path).unwrap();
    let found = |json: Value| -> String {
        let hits = store.search("alike", 9, Some(&filter(&json))).unwrap();
        hits.iter()
            .map(|hit| hit.id.to_string().replace('"', ""))
            .collect()
    };
    assert_eq!(found(json!({})), "abcde");
    assert_eq!(found(json!({"lang": "en"})), "ab");
    assert_eq!(found(json!({"lang": ["de", "fr"]})), "b");
    assert_eq!(found(json!({"lang": []})), "");
    assert_eq!(found(json!({"lang": "En"})), "");
    assert_eq!(found(json!({"lang": ""})), "");
    assert_eq!(found(json!({"year": {"gte": 1990, "lt": 2000}})), "a");
    assert_eq!(found(json!({"year": {"gt": 1990}})), "bc");
    assert_eq!(found(json!({"year": {"gt": max}})), "");
    assert_eq!(found(json!({"year": {"lt": i64::MIN}})), "");
    assert_eq!(found(json!({"year": [max, 1990]})), "ac");
    assert_eq!(found(json!({"year": max - 1})), "");
    assert_eq!(found(json!({"weight": 3})), "b");
    assert_eq!(found(json!({"weight": {"gte": 0.5}})), "ab");
    assert_eq!(found(json!({"weight": 0})), "c");
    assert_eq!(found(json!({"open": true})), "a");
    assert_eq!(found(json!({"open": [true, false]})), "ab");
    assert_eq!(found(json!({"open": true, "lang": "de"})), "");
    let built = Filter::new()
        .with("lang", Condition::AnyOf(vec!["de".into()]))
        .with("lang", Condition::AnyOf(vec!["en".into()]));
    assert_eq!(
        names(&store.search("alike", 9, Some(&built)).unwrap()),
        ["\"b\""]
    );
    let many = store.search_many(&["alike"; 9], 2, Some(&filter(&json!({"lang": "en"}))));
    assert!(
        many.unwrap()
            .iter()
            .all(|hits| names(hits) == ["\"a\"", "\"b\""])
    );
    store.verify().unwrap();
}

#[test]
fn filters_live_through_compaction_reindexing_and_merging() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, filtered_spec());
    for generation in 0..3 {
        for i in 0..6 {
            let metadata = json!({"lang": LANGS[i % 3], "year": 10 * generation + i as i64});
            let name = format!("{generation}-{i}");
            put(
                &mut writer,
                document(&name, "alike", &metadata),
                OnDuplicate::Error,
            );
        }
        writer.commit().unwrap();
    }
    writer.delete(&ids(&["1-1", "2-4"])).unwrap();
    writer.commit().unwrap();
    let asked = filter(&json!({"lang": ["en", "de"], "year": {"gte": 3, "lt": 22}}));
    let found = |store: &Store| names(&store.search("alike", 99, Some(&asked)).unwrap());
    let store = Store::open(&path).unwrap();
    let expected = found(&store);
    assert_eq!(
        expected,
        [
            "\"0-3\"", "\"0-4\"", "\"1-0\"", "\"1-3\"", "\"1-4\"", "\"2-0\"", "\"2-1\""
        ]
    );

    writer.compact().unwrap();
    assert!(store.refresh().unwrap());
    assert_eq!(found(&store), expected);

    for name in files(&path).iter().filter(|name| name.ends_with(".fast")) {
        fs::write(path.join(name), "no index").unwrap();
    }
    assert!(
        Store::open(&path)
            .unwrap()
            .search("alike", 3, None)
            .is_err()
    );
    writer.reindex().unwrap();
    let rebuilt = Store::open(&path).unwrap();
    rebuilt.verify().unwrap();
    assert_eq!(found(&rebuilt), expected);
    drop(writer);

    let other = tmp.path().join("other");
    let mut writer = create(&other, filtered_spec());
    writer.commit().unwrap();
    writer.merge(&rebuilt, OnDuplicate::Error).unwrap();
    writer.commit().unwrap();
    drop(writer);
    assert_eq!(found(&Store::open(&other).unwrap()), expected);

    // Values that were not kept cannot be indexed again.
    let path = tmp.path().join("forgetful");
    let mut writer = create(
        &path,
        StoreSpec {
            keep_metadata: false,
            ..filtered_spec()
        },
    );
    put(
        &mut writer,
        document("a", "alike", &json!({"lang": "en"})),
        OnDuplicate::Error,
    );
    writer.commit().unwrap();
    let error = writer.reindex().unwrap_err();
    assert!(
        error
            .to_string()
            .contains("filters on metadata that it does not keep"),
        "{error}"
    );
    let forgetful = Store::open(&path).unwrap();
    assert_eq!(
        forgetful
            .search("alike", 3, Some(&filter(&json!({"lang": "en"}))))
            .unwrap()
            .len(),
        1
    );
    let mut writer = Store::open(&other).unwrap().writer().unwrap();
    let error = writer.merge(&forgetful, OnDuplicate::Error).unwrap_err();
    assert!(matches!(error, Error::InvalidInput(_)), "{error:?}");
}

#[test]
fn a_filter_that_cannot_be_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    // Nothing was ever indexed, and still it is told.
    create(&path, filtered_spec()).commit().unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(store.search("x", 3, Some(&Filter::new())).unwrap(), []);
    for (json, words) in [
        (
            "{\"month\": 3}",
            "\"month\" is no field of this store's filters, which are: \"lang\" (string), \"year\" (i64)",
        ),
        (
            "{\"lang\": 3}",
            "\"lang\" is of kind string: expected a string, found the number 3",
        ),
        (
            "{\"lang\": [\"en\", true]}",
            "expected a string, found true",
        ),
        (
            "{\"lang\": {\"gte\": 3}}",
            "expected a value or an array of values, found a range",
        ),
        ("{\"lang\": null}", "found null"),
        (
            "{\"year\": 1990.5}",
            "expected an integer of 64 bits, found the number 1990.5",
        ),
        (
            "{\"year\": 9223372036854775808}",
            "found the number 9223372036854775808",
        ),
        ("{\"year\": \"1990\"}", "found the string \"1990\""),
        (
            "{\"year\": {\"gte\": 1.5}}",
            "expected an integer of 64 bits, found the number 1.5",
        ),
        (
            "{\"year\": {\"gte\": \"a\"}}",
            "found the string \"a\" under \"gte\"",
        ),
        ("{\"year\": {\"above\": 3}}", "found the key \"above\""),
        ("{\"year\": {}}", "found none"),
        ("{\"year\": [[1]]}", "found an array"),
        ("{\"weight\": true}", "expected a number, found true"),
        (
            "{\"open\": 1}",
            "expected true or false, found the number 1",
        ),
        ("[]", "expected a JSON object"),
        ("{\"year\": 1", "expected a JSON object"),
    ] {
        let asked = Filter::from_json(json).and_then(|f| store.search("x", 3, Some(&f)));
        let error = asked.unwrap_err();
        assert!(matches!(error, Error::InvalidInput(_)), "{json}: {error:?}");
        assert!(error.to_string().contains(words), "{json}: {error}");
    }
    let plain = tmp.path().join("plain");
    create(&plain, spec("f32")).commit().unwrap();
    let error = Store::open(&plain)
        .unwrap()
        .search("x", 3, Some(&filter(&json!({"a": 1}))))
        .unwrap_err();
    assert!(error.to_string().contains("which are: none"), "{error}");
}

#[test]
fn a_value_of_another_type_is_refused_before_anything_is_staged() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, filtered_spec());
    let long = "x".repeat(4_097);
    for (metadata, words) in [
        (
            json!({"lang": 3}),
            "\"lang\" is declared as a filter of kind string: expected a string or an array of strings, found the number 3",
        ),
        (json!({"lang": ["en", null]}), "found null"),
        (
            json!({"lang": long}),
            "expected at most 4096 bytes, found 4097",
        ),
        (
            json!({"year": 1990.0}),
            "\"year\" is declared as a filter of kind i64: expected an integer of 64 bits, found the number 1990.0",
        ),
        (json!({"year": [1990]}), "found an array"),
        (
            json!({"year": u64::MAX}),
            "found the number 18446744073709551615",
        ),
        (
            json!({"weight": "3"}),
            "expected a number, found the string \"3\"",
        ),
        (
            json!({"open": {}}),
            "expected true or false, found an object",
        ),
    ] {
        let good = document("good", "alike", &json!({"lang": "en"}));
        let bad = document("bad", "alike", &metadata);
        let error = writer
            .add(&[good, bad], None, OnDuplicate::Error)
            .unwrap_err();
        assert!(matches!(error, Error::InvalidInput(_)), "{error:?}");
        assert!(
            error
                .to_string()
                .contains("document \"bad\": metadata field"),
            "{error}"
        );
        assert!(error.to_string().contains(words), "{error}");
    }
    put(
        &mut writer,
        document("good", "alike", &json!({"lang": "x".repeat(4_096)})),
        OnDuplicate::Error,
    );
    writer.commit().unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(store.len().unwrap(), 1);
    let asked = filter(&json!({"lang": "x".repeat(4_096)}));
    assert_eq!(store.search("alike", 3, Some(&asked)).unwrap().len(), 1);
}

#[test]
fn filters_are_declared_once_and_in_bounds() {
    let fields = |names: &[String]| {
        let field = |name: &String| FilterField::new(name, FilterKind::Bool);
        let spec = StoreSpec {
            filters: names.iter().map(field).collect(),
            ..spec("f32")
        };
        spec.validate()
    };
    let many: Vec<String> = (0..65).map(|i| i.to_string()).collect();
    fields(&many[1..]).unwrap();
    fields(&["é".repeat(64)]).unwrap();
    for bad in [
        many,
        vec!["é".repeat(65)],
        vec![String::new()],
        vec!["a".into(), "b".into(), "a".into()],
    ] {
        assert!(
            matches!(fields(&bad), Err(Error::InvalidInput(_))),
            "{bad:?}"
        );
    }
    let written = serde_json::to_value(filtered_spec()).unwrap();
    assert_eq!(
        written["filters"][1],
        json!({"name": "year", "kind": "i64"})
    );
}

// --- many questions --------------------------------------------------------------------------------

#[test]
fn many_questions_are_answered_as_one_by_one() {
    let tmp = tempfile::tempdir().unwrap();
    let store = small(&tmp.path().join("s"), "q8");
    let questions: Vec<String> = (0..200)
        .map(|i| {
            ["harbour", "house ada", "bees or lighthouse", "", "zebra"][i % 5].repeat(1 + i % 3)
        })
        .collect();
    for n in [0, 1, 2, 7, 200] {
        let asked = &questions[..n];
        let single: Vec<Vec<Hit>> = asked
            .iter()
            .map(|q| store.search(q, 3, None).unwrap())
            .collect();
        assert_eq!(store.search_many(asked, 3, None).unwrap(), single);
    }
}

// --- damage ----------------------------------------------------------------------------------------

const QUESTIONS: [&str; 4] = ["the harbour house", "bees", "lives", "about eve"];

fn answers(store: &Store) -> Result<Vec<Vec<Hit>>> {
    QUESTIONS.iter().map(|q| store.search(q, 5, None)).collect()
}

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// How often `work` panicked, inside what it calls too.
fn panics_in(work: impl FnOnce()) -> u32 {
    PANICS.set(0);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANICS.set(PANICS.get() + 1);
        before(info);
    }));
    work();
    let _ = std::panic::take_hook();
    PANICS.get()
}

fn index_of(path: &Path) -> Vec<String> {
    let manifest = fs::read_to_string(path.join("manifest-00000002.json")).unwrap();
    let mut names = files(path);
    names.retain(|name| name.starts_with("bm25/") && manifest.contains(&format!("\"{name}\"")));
    names
}

/// Every byte of every file of the index: an error of the search, or the right answer.
#[test]
fn an_altered_byte_of_the_index_never_alters_an_answer() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let expected = answers(&small(&path, "q8")).unwrap();
    assert!(expected.iter().all(|hits| !hits.is_empty()));
    let mut told = 0;
    let panics = panics_in(|| {
        for name in index_of(&path) {
            let file = path.join(&name);
            let whole = fs::read(&file).unwrap();
            // In place: a file system may flush what is written anew.
            let place = fs::File::options().write(true).open(&file).unwrap();
            for (at, byte) in whole.iter().enumerate() {
                let altered = byte ^ [0x01, 0x80, 0xff, 0x20][at % 4];
                place.write_all_at(&[altered], at as u64).unwrap();
                let store = Store::open(&path).unwrap();
                for again in 0..2 {
                    match answers(&store) {
                        Ok(found) => assert_eq!(found, expected, "byte {at} of {name}"),
                        Err(Error::CorruptIndex { file, .. }) => {
                            assert!(
                                file.ends_with(&name),
                                "byte {at} of {name}: {}",
                                file.display()
                            );
                            told += 1;
                        }
                        Err(other) => panic!("byte {at} of {name}, time {again}: {other:?}"),
                    }
                }
                let error = store.verify().unwrap_err();
                assert!(
                    matches!(error, Error::CorruptIndex { .. }),
                    "byte {at} of {name}: {error:?}"
                );
                assert!(
                    error.to_string().contains(&name),
                    "byte {at} of {name}: {error}"
                );
                place.write_all_at(&[*byte], at as u64).unwrap();
            }
        }
    });
    assert_eq!(panics, 0, "nothing was altered that Tantivy saw");
    assert!(told > 1_000, "{told} were told");
    let store = Store::open(&path).unwrap();
    store.verify().unwrap();
    assert_eq!(answers(&store).unwrap(), expected);
}

/// Of an index with many blocks, only those that a search needs are looked at, and each is named.
#[test]
fn an_altered_block_is_an_error_where_it_is_needed() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, spec("f32"));
    let documents: Vec<Document> = (0..6_000_u32)
        .map(|i| {
            let word = |n: u32| format!("w{}", (i * 7 + n * n * 31) % 4_000);
            let words: Vec<String> = (0..40).map(word).collect();
            Document::new(format!("d{i}")).with_text(words.join(" "))
        })
        .collect();
    writer.add(&documents, None, OnDuplicate::Error).unwrap();
    writer.commit().unwrap();
    drop(writer);
    let ask = |q: &str| Store::open(&path).unwrap().search(q, 5, None);
    let questions: Vec<String> = (0..40).map(|i| format!("w{}", i * 97)).collect();
    let expected: Vec<Vec<Hit>> = questions.iter().map(|q| ask(q).unwrap()).collect();
    let postings = files(&path)
        .into_iter()
        .find(|name| name.ends_with(".idx"))
        .unwrap();
    let file = path.join(&postings);
    let whole = fs::read(&file).unwrap();
    let blocks = whole.len() / 65_536;
    assert!(blocks > 3, "{} bytes", whole.len());
    for block in 0..blocks {
        let mut altered = whole.clone();
        altered[block * 65_536 + 4_321] ^= 4;
        fs::write(&file, &altered).unwrap();
        let (mut told, mut right) = (0, 0);
        for (question, expected) in questions.iter().zip(&expected) {
            match ask(question) {
                Ok(found) => {
                    assert_eq!(found, *expected, "{question} with block {block}");
                    right += 1;
                }
                Err(error) => {
                    assert!(
                        error.to_string().contains(&format!("block {block}: ")),
                        "{error}"
                    );
                    told += 1;
                }
            }
        }
        // The first block holds what every search reads.
        assert!(
            told > 0 || block > 0,
            "block {block}: {told} errors, {right} answers"
        );
        assert!(
            right > 0 || block == 0,
            "block {block}: {told} errors, {right} answers"
        );
    }
}

#[test]
fn opening_leaves_the_index_to_the_first_search() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let expected = answers(&small(&path, "q8")).unwrap();
    let store = Store::open(&path).unwrap();
    let early = Store::open(&path).unwrap();
    assert_eq!(answers(&early).unwrap(), expected);
    let meta = index_of(&path)
        .into_iter()
        .find(|name| name.ends_with(".json"))
        .unwrap();
    let whole = fs::read(path.join(&meta)).unwrap();
    fs::write(path.join(&meta), vec![b' '; whole.len()]).unwrap();
    for _ in 0..3 {
        let error = store.search("harbour", 3, None).unwrap_err();
        assert!(matches!(error, Error::CorruptIndex { .. }), "{error:?}");
    }
    assert!(store.search_many(&["harbour"; 20], 3, None).is_err());
    assert!(matches!(store.verify(), Err(Error::CorruptIndex { .. })));
    assert_eq!(store.len().unwrap(), 5);
    // What was opened before has what it needs.
    assert_eq!(answers(&early).unwrap(), expected);
    fs::write(path.join(&meta), whole).unwrap();
    let store = Store::open(&path).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(answers(&store).unwrap(), expected));
        }
    });
}
