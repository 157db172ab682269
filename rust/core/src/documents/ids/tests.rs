//! Against a plain list of ids: whatever the ids are, rows, lookups, joins and duplicates are the same.

use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::documents::DocumentId;
use crate::documents::ids::space::Space;
use crate::documents::ids::{IdSegment, IdsChunk, duplicates, join_and_find, join_ids};
use crate::files::{Digest, Directory};
use crate::spec::IdType;
use crate::watch::Progress;

/// A folder for parts, and names for them.
struct Parts {
    _folder: tempfile::TempDir,
    dir: Directory,
    next: std::cell::Cell<u32>,
}

impl Parts {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = Directory::open(folder.path()).unwrap();
        Self {
            _folder: folder,
            dir,
            next: std::cell::Cell::new(0),
        }
    }

    fn name(&self) -> String {
        self.next.set(self.next.get() + 1);
        format!("ids-{}.seg", self.next.get())
    }

    fn open(&self, name: &str, digest: Digest, id_type: IdType) -> IdSegment {
        let map = self.dir.map(name, digest.length).unwrap();
        IdSegment::open(map, id_type).unwrap()
    }

    fn write(&self, first: u64, ids: &[DocumentId], id_type: IdType) -> IdSegment {
        let mut chunk = IdsChunk::new(id_type);
        for id in ids {
            chunk.push(id).unwrap();
        }
        assert_eq!(chunk.len(), ids.len());
        let name = self.name();
        let digest = chunk.write(&self.dir, &name, first).unwrap();
        self.open(&name, digest, id_type)
    }

    fn join(
        &self,
        segments: &[&IdSegment],
        id_type: IdType,
        keep: &(dyn Fn(u64) -> bool + Sync),
    ) -> IdSegment {
        let name = self.name();
        let digest = join_ids(&self.dir, &name, segments, keep, &Progress::unseen()).unwrap();
        self.open(&name, digest, id_type)
    }
}

/// What segments should say: docno to id.
type Model = BTreeMap<u64, DocumentId>;

fn check(segment: &IdSegment, model: &Model, absent: &[DocumentId]) {
    segment.verify(&Progress::unseen()).unwrap();
    assert_eq!(segment.rows(), model.len() as u64);
    for docno in segment.first().saturating_sub(2)..segment.end() + 2 {
        assert_eq!(segment.id(docno).unwrap().as_ref(), model.get(&docno));
        let inside = model.contains_key(&docno);
        assert_eq!(segment.contains(docno).unwrap(), inside);
    }
    let mut by_id: BTreeMap<&DocumentId, Vec<u64>> = BTreeMap::new();
    for (docno, id) in model {
        by_id.entry(id).or_default().push(*docno);
    }
    for (id, docnos) in &by_id {
        assert_eq!(segment.find(id, |_| false).unwrap(), docnos.last().copied());
        // The newest that is alive, as each of them dies.
        for (i, docno) in docnos.iter().enumerate() {
            let found = segment.find(id, |d| d >= *docno).unwrap();
            assert_eq!(found, i.checked_sub(1).map(|i| docnos[i]));
        }
    }
    for id in absent.iter().filter(|id| !by_id.contains_key(id)) {
        assert_eq!(segment.find(id, |_| false).unwrap(), None, "{id}");
    }
}

fn repeats(segments: &[&IdSegment]) -> Vec<(DocumentId, Vec<u64>)> {
    let mut all = Vec::new();
    duplicates(segments, &Progress::unseen(), &mut |id, docnos| {
        all.push((id.clone(), docnos.to_vec()));
        Ok(())
    })
    .unwrap();
    all.sort();
    all
}

fn strings(ids: impl IntoIterator<Item = String>) -> Vec<DocumentId> {
    ids.into_iter().map(DocumentId::String).collect()
}

/// Ids of many kinds, in any order, some of them more than once.
fn some_ids() -> impl Strategy<Value = (IdType, Vec<DocumentId>)> {
    let u64s = |numbers: BoxedStrategy<Vec<u64>>| {
        numbers
            .prop_map(|n| (IdType::U64, n.into_iter().map(DocumentId::U64).collect()))
            .boxed()
    };
    let texts = |texts: BoxedStrategy<Vec<String>>| {
        texts.prop_map(|t| (IdType::String, strings(t))).boxed()
    };
    let size = prop_oneof![0usize..40, 126usize..131, 200usize..400];
    let many = |number: BoxedStrategy<u64>| {
        let size = size.clone();
        size.prop_flat_map(move |n| prop::collection::vec(number.clone(), n))
            .boxed()
    };
    let run = (any::<u64>(), size.clone(), 0u64..5).prop_map(|(first, n, step)| {
        (0..n as u64)
            .map(|i| first.wrapping_add(i * step))
            .collect::<Vec<_>>()
    });
    let counted = |numbers: BoxedStrategy<Vec<u64>>, to: fn(u64) -> String| {
        texts(
            numbers
                .prop_map(move |n| n.into_iter().map(to).collect())
                .boxed(),
        )
    };
    let odd = |ids: BoxedStrategy<(IdType, Vec<DocumentId>)>| {
        (ids, "[a-z0-9é-]{1,20}", any::<prop::sample::Index>())
            .prop_map(|((id_type, mut ids), odd, at)| {
                if id_type == IdType::String && !ids.is_empty() {
                    let at = at.index(ids.len());
                    ids[at] = DocumentId::String(odd);
                }
                (id_type, ids)
            })
            .boxed()
    };
    let uuid = |n: u64| {
        let h = u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
        let h = format!("{h:032x}");
        format!(
            "{}-{}-{}-{}-{}",
            &h[..8],
            &h[8..12],
            &h[12..16],
            &h[16..20],
            &h[20..]
        )
    };
    let word = "[ab]{1,3}|[a-z]{1,12}|\\PC{1,20}|(wiki/en/[A-C]{1,4}_[a-z]{0,30})";
    let kinds = prop_oneof![
        u64s(many(any::<u64>().boxed())),
        u64s(many((0u64..300).boxed())),
        u64s(run.clone().boxed()),
        counted(run.boxed(), |n| format!("doc-{n}")),
        counted(many((0u64..2000).boxed()), |n| format!("{n}")),
        counted(many((0u64..2000).boxed()), |n| format!("wiki-{n:09}")),
        counted(many(any::<u64>().boxed()), |n| format!("{n:016x}")),
        counted(many(any::<u64>().boxed()), |n| format!("é{n:020}x")),
        counted(many(any::<u64>().boxed()), uuid),
        counted(many(any::<u64>().boxed()), |n| {
            let hex = format!("{n:016x}");
            hex.repeat(4)
        }),
        counted(many((0u64..500).boxed()), |n| {
            let long = format!("{n}").repeat(200);
            long[..long.len().min(512)].to_owned()
        }),
        texts(
            size.clone()
                .prop_flat_map(move |n| prop::collection::vec(word, n))
                .prop_map(|all| all
                    .into_iter()
                    .filter(|id| (1..=512).contains(&id.len()))
                    .collect())
                .boxed()
        ),
    ]
    .boxed();
    let kinds = prop_oneof![3 => kinds.clone(), 1 => odd(kinds)];
    (kinds, prop::bool::weighted(0.3)).prop_map(|((id_type, mut ids), sort)| {
        if sort {
            ids.sort();
        }
        (id_type, ids)
    })
}

/// Ids beside those of a list: a little longer, shorter, less or more.
fn near(ids: &[DocumentId]) -> Vec<DocumentId> {
    let mut near = vec![DocumentId::U64(0), DocumentId::U64(u64::MAX)];
    near.extend(strings(
        ["a", "0", "~", "wiki-", "doc-01"].map(String::from),
    ));
    for id in ids.iter().step_by(7) {
        match id {
            DocumentId::U64(n) => {
                near.push(DocumentId::U64(n.wrapping_add(1)));
                near.push(DocumentId::U64(n.wrapping_sub(1)));
            }
            DocumentId::String(text) => {
                let mut shorter = text.clone();
                shorter.pop();
                let other = text.replace(['1', 'a'], "2");
                near.extend(strings([
                    format!("{text}0"),
                    format!("0{text}"),
                    shorter,
                    other,
                ]));
            }
        }
    }
    near
}

fn keeps(seed: u64, weight: u64) -> impl Fn(u64) -> bool + Sync {
    move |docno: u64| (docno ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32 & 15 >= weight
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_segment_says_what_was_written((id_type, ids) in some_ids(), first in 0u64..1000) {
        let parts = Parts::new();
        let segment = parts.write(first, &ids, id_type);
        let model: Model = (first..).zip(ids.iter().cloned()).collect();
        prop_assert_eq!(segment.end(), first + ids.len() as u64);
        check(&segment, &model, &near(&ids));
    }

    #[test]
    fn a_join_says_what_its_segments_said(
        (id_type, ids) in some_ids(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..5),
        gaps in prop::collection::vec(0u64..3, 6),
        seed in any::<u64>(),
        weight in prop_oneof![Just(0u64), 1u64..15, Just(16u64)],
    ) {
        let parts = Parts::new();
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(ids.len() + 1)).collect();
        cuts.extend([0, ids.len()]);
        cuts.sort_unstable();
        let (mut segments, mut model, mut docno) = (Vec::new(), Model::new(), 3);
        for (cut, gap) in cuts.windows(2).zip(gaps) {
            docno += gap;
            let ids = &ids[cut[0]..cut[1]];
            segments.push(parts.write(docno, ids, id_type));
            for id in ids {
                model.insert(docno, id.clone());
                docno += 1;
            }
        }
        let segments: Vec<&IdSegment> = segments.iter().collect();
        let mut by_id: BTreeMap<&DocumentId, Vec<u64>> = BTreeMap::new();
        for (docno, id) in &model {
            by_id.entry(id).or_default().push(*docno);
        }
        let expected: Vec<(DocumentId, Vec<u64>)> = by_id
            .into_iter()
            .filter(|(_, docnos)| docnos.len() > 1)
            .map(|(id, docnos)| (id.clone(), docnos))
            .collect();
        prop_assert_eq!(repeats(&segments), expected);

        let keep = keeps(seed, weight);
        let joined = parts.join(&segments, id_type, &keep);
        let kept: Model = model
            .iter()
            .filter(|(docno, _)| keep(**docno))
            .map(|(docno, id)| (*docno, id.clone()))
            .collect();
        // What died before all that lives leaves no trace.
        let range = match kept.keys().next() {
            Some(first) => (*first, docno),
            None => (segments[0].first(), segments[0].first()),
        };
        prop_assert_eq!((joined.first(), joined.end()), range);
        check(&joined, &kept, &near(&ids));

        // Again, of what has gaps: with the same ids further up, every id at least twice.
        let again: Vec<DocumentId> = kept.values().cloned().collect();
        let above = parts.write(docno + 2, &again, id_type);
        let twice = repeats(&[&joined, &above]);
        let distinct: std::collections::BTreeSet<_> = kept.values().collect();
        prop_assert_eq!(twice.len(), distinct.len());
        let both = parts.join(&[&joined, &above], id_type, &keeps(!seed, weight / 2));
        let mut model = kept.clone();
        model.extend((docno + 2..).zip(again));
        model.retain(|docno, _| keeps(!seed, weight / 2)(*docno));
        check(&both, &model, &[]);
    }

    #[test]
    fn altered_bytes_give_errors_and_never_panic(
        (id_type, ids) in some_ids(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let parts = Parts::new();
        let mut chunk = IdsChunk::new(id_type);
        for id in &ids {
            chunk.push(id).unwrap();
        }
        chunk.write(&parts.dir, "whole", 5).unwrap();
        let whole = parts.dir.read("whole", 1 << 24).unwrap();
        let mut altered = whole.clone();
        for (at, byte) in changes {
            let at = at.index(altered.len());
            altered[at] = byte;
        }
        exercise(&parts, "plain", &altered, id_type, &ids, altered != whole);
        // With its checksums made right again, what is inside must be checked for itself.
        reseal(&mut altered);
        exercise(&parts, "sealed", &altered, id_type, &ids, false);
    }
}

/// The checksums of a frame with one tail of 128 bytes, whose other bytes were altered.
fn reseal(bytes: &mut [u8]) {
    use xxhash_rust::xxh3::{Xxh3, xxh3_64};
    let n = bytes.len();
    let body = u64::from_le_bytes(bytes[n - 32..n - 24].try_into().unwrap());
    let Some(body) = usize::try_from(body).ok().filter(|b| *b < n - 128) else {
        return;
    };
    let table: Vec<u8> = bytes[64..64 + body]
        .chunks(1 << 16)
        .flat_map(|block| xxh3_64(block).to_le_bytes())
        .collect();
    if 64 + body + table.len() + 128 != n {
        return;
    }
    bytes[64 + body..n - 128].copy_from_slice(&table);
    bytes[n - 24..n - 16].copy_from_slice(&xxh3_64(&table).to_le_bytes());
    let mut sum = Xxh3::new();
    sum.update(&bytes[..64]);
    sum.update(&bytes[n - 128..n - 8]);
    bytes[n - 8..].copy_from_slice(&sum.digest().to_le_bytes());
}

/// Everything that can be done with bytes that may be no segment.
fn exercise(
    parts: &Parts,
    name: &str,
    bytes: &[u8],
    id_type: IdType,
    ids: &[DocumentId],
    must_fail: bool,
) {
    parts.dir.write_part(name, bytes).unwrap();
    let map = parts.dir.map(name, bytes.len() as u64).unwrap();
    let Ok(segment) = IdSegment::open(map, id_type) else {
        return;
    };
    let verified = segment.verify(&Progress::unseen());
    assert!(verified.is_err() || !must_fail);
    let end = segment.end().min(segment.first().saturating_add(1000));
    let mut model = Model::new();
    for docno in segment.first()..end {
        let _ = segment.contains(docno);
        if let Ok(Some(id)) = segment.id(docno) {
            model.insert(docno, id);
        }
    }
    for id in ids {
        let _ = segment.find(id, |_| false);
    }
    if segment.end() - segment.first() < 100_000 {
        let _ = duplicates(&[&segment, &segment], &Progress::unseen(), &mut |_, _| {
            Ok(())
        });
        let name = parts.name();
        if let Ok(digest) = join_ids(
            &parts.dir,
            &name,
            &[&segment],
            &|d| d % 3 > 0,
            &Progress::unseen(),
        ) {
            let _ = parts.dir.map(&name, digest.length).unwrap();
        }
    }
    if verified.is_ok() && end == segment.end() {
        // Whatever was altered, it is a segment: of other ids, perhaps, but one in itself.
        check(&segment, &model, &[]);
    }
}

#[test]
fn sizes_around_a_block_and_the_longest_ids() {
    let parts = Parts::new();
    for n in [0usize, 1, 2, 15, 16, 17, 127, 128, 129, 256, 257] {
        let numbers: Vec<DocumentId> = (0..n as u64).map(|i| DocumentId::U64(i * 3)).collect();
        let segment = parts.write(7, &numbers, IdType::U64);
        check(
            &segment,
            &(7..).zip(numbers.clone()).collect(),
            &near(&numbers),
        );
        let long = strings((0..n).map(|i| format!("{}{i}", "é".repeat(254))));
        let segment = parts.write(7, &long, IdType::String);
        check(&segment, &(7..).zip(long.clone()).collect(), &near(&long));
    }
}

#[test]
fn prefixes_of_each_other_and_equal_ids() {
    let parts = Parts::new();
    let ids = strings((1..=300usize).map(|n| "ab".repeat(n / 2 + 1)[..n].to_owned()));
    let mut twice: Vec<DocumentId> = ids.iter().rev().cloned().collect();
    twice.extend(ids.clone());
    twice.extend(ids.iter().take(5).cloned());
    let segment = parts.write(0, &twice, IdType::String);
    check(&segment, &(0..).zip(twice.clone()).collect(), &near(&ids));
    let repeated = repeats(&[&segment]);
    assert_eq!(repeated.len(), 300);
    assert_eq!(
        repeated
            .iter()
            .filter(|(_, docnos)| docnos.len() == 3)
            .count(),
        5
    );
}

/// More ids than are in memory at once, many of them equal, some more often than fit there.
#[test]
fn long_segments_are_joined_and_searched_in_rounds() {
    let parts = Parts::new();
    let number = |n: u64| DocumentId::U64(n);
    let text = |n: u64| {
        DocumentId::from(format!(
            "{n:x}-{}",
            "lorem ipsum dolor".repeat(1 + n as usize % 2)
        ))
    };
    let kinds: [(IdType, &dyn Fn(u64) -> DocumentId); 2] =
        [(IdType::U64, &number), (IdType::String, &text)];
    for (id_type, make) in kinds {
        let mixed = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        let lists: [Vec<DocumentId>; 4] = [
            (0..9000).map(|n| make(mixed(n))).collect(),
            (0..9000)
                .map(|n| make(if n % 2 == 0 { 77 } else { mixed(n) }))
                .collect(),
            (0..3000).map(|n| make(n * 5000)).collect(),
            (0..5000).map(|_| make(77)).collect(),
        ];
        let (mut model, mut segments, mut docno) = (Model::new(), Vec::new(), 0);
        for ids in &lists {
            segments.push(parts.write(docno, ids, id_type));
            model.extend((docno..).zip(ids.iter().cloned()));
            docno += ids.len() as u64;
        }
        let segments: Vec<&IdSegment> = segments.iter().collect();
        let mut by_id: BTreeMap<DocumentId, Vec<u64>> = BTreeMap::new();
        for (docno, id) in &model {
            by_id.entry(id.clone()).or_default().push(*docno);
        }
        by_id.retain(|_, docnos| docnos.len() > 1);
        let expected: Vec<_> = by_id.into_iter().collect();
        assert_eq!(repeats(&segments), expected);

        let (name, mut found) = (parts.name(), Vec::new());
        let digest = join_and_find(
            &parts.dir,
            &name,
            &segments,
            &Progress::unseen(),
            &mut |id, docnos| {
                found.push((id.clone(), docnos.to_vec()));
                Ok(())
            },
        );
        found.sort();
        assert_eq!(found, expected);
        let joined = parts.open(&name, digest.unwrap(), id_type);
        joined.verify(&Progress::unseen()).unwrap();
        for (docno, id) in &model {
            assert_eq!(joined.id(*docno).unwrap().as_ref(), Some(id));
            assert!(joined.find(id, |_| false).unwrap() >= Some(*docno));
        }
        let kept = parts.join(&segments, id_type, &|docno| docno % 3 > 0);
        kept.verify(&Progress::unseen()).unwrap();
        assert!(
            kept.docnos()
                .eq(model.keys().copied().filter(|d| d % 3 > 0))
        );
    }
}

#[test]
fn each_kind_of_ids_gets_the_space_that_fits() {
    let space = |ids: &[&str]| Space::of_strings(|| ids.iter().map(|id| id.as_bytes())).code();
    assert_eq!(space(&["doc-9", "doc-10", "doc-11"]), 1);
    assert_eq!(space(&["18446744073709551615", "0"]), 1);
    // One above u64, and a zero in front, are no numbers.
    assert_eq!(space(&["18446744073709551616", "0"]), 4);
    assert_eq!(space(&["doc-09", "doc-1"]), 4);
    assert_eq!(space(&["wiki-000000001", "wiki-000000123"]), 2);
    // One other length is enough to miss.
    assert_eq!(
        space(&["wiki-000000001", "wiki-000000123", "wiki-0000001234"]),
        4
    );
    let uuids = [
        "5f0c2c5e-8d57-4a0b-b0f5-0e3f5c1d2a77",
        "c1b7a6d9-23e4-4f68-9a1b-7d8c9e0f1a2b",
        "0a9b8c7d-6e5f-4a3b-8c1d-2e3f4a5b6c7d",
    ];
    assert_eq!(space(&uuids), 2);
    let many: Vec<String> = (0..200u128)
        .map(|i| {
            format!(
                "{:032x}",
                (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835)
            )
        })
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert_eq!(space(&many), 3);
}

#[test]
fn what_a_store_refuses() {
    let mut chunk = IdsChunk::new(IdType::String);
    assert!(chunk.push(&DocumentId::U64(1)).is_err());
    assert!(chunk.push(&"".into()).is_err());
    assert!(chunk.push(&"x".repeat(513).into()).is_err());
    assert!(chunk.extend_u64(&[1]).is_err());
    let mut chunk = IdsChunk::new(IdType::U64);
    assert!(chunk.push(&"x".into()).is_err());
    assert!(chunk.is_empty());

    let parts = Parts::new();
    let a = parts.write(10, &[DocumentId::U64(1)], IdType::U64);
    let b = parts.write(11, &[DocumentId::U64(2)], IdType::U64);
    assert!(
        join_ids(
            &parts.dir,
            "backwards",
            &[&b, &a],
            &|_| true,
            &Progress::unseen()
        )
        .is_err()
    );
    let map = |name: &str| {
        let length = parts.dir.digest(name).unwrap().length;
        parts.dir.map(name, length).unwrap()
    };
    assert!(IdSegment::open(map("ids-1.seg"), IdType::String).is_err());
}
