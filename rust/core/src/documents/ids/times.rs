//! Prints what ids take, in bytes and in nanoseconds of computing; checks nothing but that what is found is right.
//!
//! `IDS=10000000 cargo test --release -p polyprag-core --lib ids::times -- --ignored --nocapture`

use std::hint::black_box;

use crate::documents::DocumentId;
use crate::documents::ids::{IdSegment, IdsChunk, duplicates, join_and_find, join_ids};
use crate::files::Directory;
use crate::spec::IdType;
use crate::watch::Progress;

const CHUNK: u64 = 4_000_000;
const FINDS: u64 = 200_000;

/// Nanoseconds that this thread has computed, whatever else the machine does.
fn computed() -> u64 {
    let times = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    times.split(' ').next().unwrap().parse().unwrap()
}

/// A permutation of u64 that looks random (the finaliser of SplitMix64).
fn mixed(n: u64) -> u64 {
    let n = (n ^ n >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ n >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ n >> 31
}

fn uuid(n: u64) -> String {
    let (a, b) = (mixed(n + 1), mixed(!n));
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        a >> 32,
        a >> 16 & 0xffff,
        a & 0xfff,
        b >> 48 & 0x3fff | 0x8000,
        b & 0xffff_ffff_ffff
    )
}

type Make = fn(u64) -> DocumentId;

fn kinds() -> Vec<(&'static str, IdType, Make)> {
    vec![
        ("u64 dense", IdType::U64, |n| DocumentId::U64(n)),
        ("u64 random", IdType::U64, |n| DocumentId::U64(mixed(n))),
        ("doc-%d", IdType::String, |n| format!("doc-{n}").into()),
        ("wiki-%09d", IdType::String, |n| {
            format!("wiki-{n:09}").into()
        }),
        ("wiki-%09d mixed", IdType::String, |n| {
            format!("wiki-{:09}", mixed(n) % 1_000_000_000).into()
        }),
        ("UUID", IdType::String, |n| uuid(n).into()),
        ("URL", IdType::String, |n| {
            let path = mixed(n / 8);
            format!("https://example.org/{:x}/page-{}", path >> 40, n % 8 * 7).into()
        }),
        ("words mixed", IdType::String, |n| {
            let h = mixed(n);
            format!(
                "{}_{:x}",
                "lorem ipsum dolor".get(..(h % 17) as usize).unwrap(),
                h >> 20
            )
            .into()
        }),
    ]
}

#[test]
#[ignore = "prints times"]
fn of_ids() {
    let count: u64 = std::env::var("IDS").map_or(1_000_000, |n| n.parse().unwrap());
    let only = std::env::var("KIND").unwrap_or_default();
    println!("{count} ids; ns an id, and bytes an id");
    println!(
        "{:<16} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7}",
        "kind", "write", "repeats", "join", "both", "find", "absent", "id", "bytes"
    );
    for (name, id_type, make) in kinds() {
        if !name.contains(&only) {
            continue;
        }
        let folder = tempfile::tempdir().unwrap();
        let dir = Directory::open(folder.path()).unwrap();
        let nanos = |start: u64, n: u64| (computed() - start) as f64 / n as f64;
        let (mut segments, mut first, mut write) = (Vec::new(), 0, 0.0);
        while first < count {
            let end = (first + CHUNK).min(count);
            let mut chunk = IdsChunk::new(id_type);
            for n in first..end {
                chunk.push(&make(n)).unwrap();
            }
            let start = computed();
            let part = format!("run-{first}.seg");
            let digest = chunk.write(&dir, &part, first).unwrap();
            write += nanos(start, count);
            let map = dir.map(&part, digest.length).unwrap();
            segments.push(IdSegment::open(map, id_type).unwrap());
            first = end;
        }
        let segments: Vec<&IdSegment> = segments.iter().collect();
        let start = computed();
        let mut repeated = 0;
        duplicates(&segments, &Progress::unseen(), &mut |_, _| {
            repeated += 1;
            Ok(())
        })
        .unwrap();
        let repeats = nanos(start, count);
        let start = computed();
        join_ids(&dir, "alone.seg", &segments, &|_| true, &Progress::unseen()).unwrap();
        let join = nanos(start, count);
        dir.remove("alone.seg").unwrap();
        let start = computed();
        let digest = join_and_find(
            &dir,
            "joined.seg",
            &segments,
            &Progress::unseen(),
            &mut |_, _| Ok(()),
        )
        .unwrap();
        let both = nanos(start, count);
        let joined =
            IdSegment::open(dir.map("joined.seg", digest.length).unwrap(), id_type).unwrap();
        let asked: Vec<(u64, DocumentId)> = (0..FINDS)
            .map(|i| mixed(i) % count)
            .map(|n| (n, make(n)))
            .collect();
        let absent: Vec<DocumentId> = (0..FINDS).map(|i| make(count + i)).collect();
        let find = |ids: &mut dyn Iterator<Item = &DocumentId>| {
            let start = computed();
            for id in ids {
                black_box(joined.find(id, |_| false).unwrap());
            }
            nanos(start, FINDS)
        };
        find(&mut asked.iter().map(|(_, id)| id));
        let present = find(&mut asked.iter().map(|(_, id)| id));
        let missing = find(&mut absent.iter());
        let start = computed();
        for (n, id) in &asked {
            assert_eq!(joined.id(*n).unwrap().as_ref(), Some(id));
        }
        let id = nanos(start, FINDS);
        let bytes = digest.length as f64 / count as f64;
        println!(
            "{name:<16} {write:>7.1} {repeats:>7.1} {join:>7.1} {both:>7.1} {present:>7.0} {missing:>7.0} {id:>7.0} {bytes:>7.3} ({repeated} repeated)"
        );
    }
}
