//! Stores that somebody made to do harm: every checksum and hash in them is right, and what they say is not. Each is
//! refused, or read for what it is, with little memory and in little time; and the verbs that write leave the store
//! as it was, or one that can be read.
//!
//! Files of Tantivy's are left alone here: nothing is promised of crafted ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
mod crash;
mod proof;

use std::fs;
use std::os::unix::fs::{FileTypeExt, symlink};
use std::os::unix::net::UnixListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use common::*;
use crash::{Random, folder, full, seed};
use polyprag_core::{Error, OnDuplicate, Recoding, Result, Store};
use proof::answers::poke;
use proof::children::{self, Progress, count, job, told};
use proof::cores;
use proof::memory::{Counting, measured};
use proof::sealed::{Forge, Part};
use proof::zoo::{QUESTIONS, document, known, life};
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Beyond the size of the files; a block of documents may be unpacked as well.
const SOME: usize = 4 << 20;
const BLOCK: usize = 64 << 20;
const LIMIT_OF_A_CASE: Duration = Duration::from_secs(300);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    /// Opening it is an error.
    Refused,
    /// Opening or verifying it is one.
    Found,
    /// It may even be a store.
    Harmless,
}
use Expected::{Found, Harmless, Refused};

struct Case {
    name: String,
    base: &'static str,
    expected: Expected,
    make: Box<dyn Fn(&Forge)>,
    /// Bytes that reading may take beyond the files and some.
    room: usize,
    /// One of many alike, or slow: the short form takes some.
    is_alike: bool,
}

#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    fn add(
        &mut self,
        name: impl Into<String>,
        expected: Expected,
        make: impl Fn(&Forge) + 'static,
    ) -> &mut Case {
        self.on("q8 words", name, expected, make)
    }

    fn on(
        &mut self,
        base: &'static str,
        name: impl Into<String>,
        expected: Expected,
        make: impl Fn(&Forge) + 'static,
    ) -> &mut Case {
        self.0.push(Case {
            name: name.into(),
            base,
            expected,
            make: Box::new(make),
            room: 0,
            is_alike: false,
        });
        self.0.last_mut().unwrap()
    }

    fn manifest(
        &mut self,
        name: &str,
        expected: Expected,
        change: impl Fn(&mut Value) + 'static,
    ) -> &mut Case {
        self.add(format!("manifest: {name}"), expected, move |f| {
            f.alter(&change)
        })
    }
}

fn part_of<'m>(manifest: &'m mut Value, role: &str) -> &'m mut Value {
    let parts = manifest["parts"].as_array_mut().unwrap();
    parts.iter_mut().find(|p| p["role"] == role).unwrap()
}

const ROLES: [&str; 6] = ["experts", "scales", "routes", "ids", "documents", "dead"];

fn manifests(cases: &mut Cases) {
    for role in ROLES {
        for length in [0, 1, 1 << 40, u64::MAX >> 1, u64::MAX] {
            cases.manifest(&format!("{role} of {length} bytes"), Refused, move |m| {
                part_of(m, role)["length"] = length.into();
            });
        }
        let expected = match role {
            "routes" => Found,
            "documents" => Harmless,
            _ => Refused,
        };
        cases.manifest(&format!("no {role}"), expected, move |m| {
            m["parts"]
                .as_array_mut()
                .unwrap()
                .retain(|p| p["role"] != role);
        });
    }
    for name in [
        "",
        ".",
        "..",
        "/",
        "/etc/passwd",
        "../s/CURRENT",
        "a/b",
        "bm25/../CURRENT",
        "bm25/",
        "./x",
        ".hidden",
        "x\0y",
        "x\ny",
        "ünïcode",
        "bm25/x",
        "bm25",
        "a\\b",
        "CURRENT",
        "CURRENT.new",
        "LOCK",
        "manifest-00000006.json",
        "manifest-00000099.json",
    ] {
        for role in ["experts", "a role of later"] {
            cases.manifest(
                &format!("{role} named {name:?}"),
                Refused,
                move |m| match role {
                    "experts" => part_of(m, role)["file"] = name.into(),
                    _ => m["parts"].as_array_mut().unwrap().push(json!({
                        "role": role, "file": name, "length": 1, "blake3": "0".repeat(64)
                    })),
                },
            );
        }
    }
    cases.manifest("a name of 10,000 letters", Refused, |m| {
        part_of(m, "ids")["file"] = "x".repeat(10_000).into();
    });
    cases.manifest("a part of a later role that is not there", Found, |m| {
        m["parts"].as_array_mut().unwrap().push(json!({
            "role": "later", "file": "later-00000006.bin", "length": 1, "blake3": "0".repeat(64)
        }));
    });
    cases.manifest("one file for two roles", Refused, |m| {
        let file = part_of(m, "ids")["file"].clone();
        part_of(m, "documents")["file"] = file;
    });
    cases.manifest("the newest parts first", Refused, |m| {
        m["parts"].as_array_mut().unwrap().reverse()
    });
    cases.manifest("the same range twice", Refused, |m| {
        let again = part_of(m, "routes").clone();
        m["parts"].as_array_mut().unwrap().push(again);
    });
    for (field, value) in [
        ("documents", 0),
        ("documents", 5),
        ("documents", 1_000_000_000),
        ("documents", u64::MAX),
        ("next_docno", 0),
        ("next_docno", 5),
        ("generation", 7),
        ("generation", u64::MAX),
    ] {
        cases.manifest(&format!("{field} {value}"), Refused, move |m| {
            m[field] = value.into()
        });
    }
    for value in [0, 3, u64::MAX] {
        cases.manifest(
            &format!("{value} unrouted"),
            if value == u64::MAX { Refused } else { Found },
            move |m| {
                m["unrouted"] = value.into();
            },
        );
        cases.manifest(&format!("previous {value}"), Harmless, move |m| {
            m["previous"] = value.into()
        });
        cases.manifest(&format!("index_generation {value}"), Found, move |m| {
            m["index_generation"] = value.into()
        });
    }
    for next in [1 << 32, 1 << 40, u64::MAX - 1, u64::MAX] {
        cases.manifest(&format!("next_docno {next}"), Harmless, move |m| {
            m["next_docno"] = next.into()
        });
    }
    cases.manifest("itself before it", Harmless, |m| {
        m["previous"] = m["generation"].clone()
    });
    cases.add("generation u64::MAX, under its name", Harmless, |f| {
        let mut manifest = f.manifest();
        manifest["generation"] = u64::MAX.into();
        let name = format!("manifest-{}.json", u64::MAX);
        f.publish_bytes(&name, &serde_json::to_vec(&manifest).unwrap());
    });
    for (name, value) in [
        ("nothing", json!(null)),
        ("a number", json!(7)),
        ("a list", json!([])),
        ("a string", json!("x")),
        ("an empty object", json!({})),
    ] {
        cases.add(format!("manifest: {name}"), Refused, move |f| {
            f.publish(&value)
        });
    }
    for (name, json) in [
        ("no bytes", ""),
        ("half an object", "{\"format\": 1,"),
        ("noise", "\u{0}\u{1}"),
        ("a byte order mark", "\u{feff}{}"),
    ] {
        cases.add(format!("manifest: {name}"), Refused, move |f| {
            f.publish_bytes(&f.current(), json.as_bytes())
        });
    }
    cases.add("manifest: not UTF-8", Refused, |f| {
        f.publish_bytes(&f.current(), &[b'{', b'"', 0xff, b'"', b'}'])
    });
    for (from, to) in [
        ("\"format\":1", "\"format\":1,\"format\":1"),
        ("\"documents\":", "\"documents\":3,\"documents\":"),
        ("\"experts\":4", "\"experts\":4,\"experts\":4"),
        ("\"role\":\"ids\"", "\"role\":\"ids\",\"role\":\"routes\""),
        ("\"next_docno\":", "\"next_docno\":1e999,\"x\":"),
        ("\"next_docno\":", "\"next_docno\":-1,\"x\":"),
        ("\"next_docno\":", "\"next_docno\":40.5,\"x\":"),
        (
            "\"next_docno\":",
            "\"next_docno\":36893488147419103232,\"x\":",
        ),
        ("\"alpha\":", "\"alpha\":1e400,\"x\":"),
        ("\"rank\":2", "\"rank\":4294967296"),
    ] {
        cases.add(format!("manifest with {to}"), Refused, move |f| {
            let text = serde_json::to_string(&f.manifest()).unwrap();
            assert!(text.contains(from), "{from} in {text}");
            f.publish_bytes(&f.current(), text.replacen(from, to, 1).as_bytes());
        });
    }
    specs(cases);
}

fn specs(cases: &mut Cases) {
    for (field, value) in [
        ("experts", json!(65_535)),
        ("experts", json!(0)),
        ("experts", json!(4_294_967_295_u32)),
        ("rank", json!(65_535)),
        ("rank", json!(0)),
        ("alpha", json!(0.0)),
        ("alpha", json!(-1.0)),
        ("modules", json!([])),
        ("modules", json!(null)),
        ("codec", json!("code(65536)")),
        ("codec", json!("code(4294967295)")),
        ("codec", json!("f32")),
        ("codec", json!("q4")),
        ("codec", json!("sparse(65535)")),
        ("codec", json!("sparse(2)")),
        ("codec", json!("x".repeat(1 << 20))),
        ("codec", json!(8)),
        ("phi", json!("none")),
        ("top_k", json!(0)),
        ("top_k", json!(4_294_967_295_u32)),
        ("id_type", json!("u64")),
        (
            "combination",
            json!({"k": 0, "rule": "mean", "temperature": 1.0}),
        ),
        ("analyser", json!({"name": "unicode-v2", "stemmer": null})),
        (
            "analyser",
            json!({"name": "unicode-v1", "stemmer": "klingon"}),
        ),
        (
            "filters",
            json!(vec![json!({"name": "x", "kind": "i64"}); 65]),
        ),
        (
            "filters",
            json!(vec![json!({"name": "x", "kind": "i64"}); 2]),
        ),
    ] {
        let name: String = format!("{field} {value}").chars().take(60).collect();
        cases.manifest(&name, Refused, move |m| m["spec"][field] = value.clone());
    }
    for (field, value) in [
        ("in_features", json!(0)),
        ("in_features", json!(u32::MAX)),
        ("out_features", json!(u32::MAX)),
        ("in_features", json!(u64::MAX)),
        ("group", json!(u32::MAX)),
        ("group", json!(2)),
        ("group", json!(-1)),
        ("name", json!("")),
        ("name", json!("layers.1.up")),
        ("name", json!("x".repeat(513))),
        ("name", json!("__metadata__")),
    ] {
        let name: String = format!("module with {field} {value}")
            .chars()
            .take(60)
            .collect();
        cases.manifest(&name, Refused, move |m| {
            m["spec"]["modules"][0][field] = value.clone()
        });
    }
    cases.manifest("a million groups of 65,535 experts", Refused, |m| {
        m["spec"]["experts"] = 65_535.into();
        let module = |i: u32| json!({"name": format!("m{i}"), "in_features": 1, "out_features": 1, "group": i});
        m["spec"]["modules"] = (0..100_000).map(module).collect();
    })
    .room = 256 << 20;
}

/// As long as a manifest may be, and longer.
fn large_manifests(cases: &mut Cases) {
    const LIMIT: usize = 64 << 20;
    let filled = |before: &str, unit: &str, after: &str, limit: usize| {
        let (before, unit, after) = (before.to_owned(), unit.to_owned(), after.to_owned());
        move |f: &Forge| {
            let text = serde_json::to_string(&f.manifest()).unwrap();
            let text = text.strip_suffix('}').unwrap();
            let n = (limit - text.len() - before.len() - after.len() - 1) / unit.len();
            let text = format!("{text}{before}{}{after}}}", unit.repeat(n));
            f.publish_bytes(&f.current(), text.as_bytes());
        }
    };
    cases
        .add(
            "a manifest of 64 MiB, most of it one string",
            Harmless,
            filled(",\"x\":\"", "y", "\"", LIMIT),
        )
        .room = BLOCK;
    cases.add(
        "a manifest above 64 MiB",
        Refused,
        filled(",\"x\":\"", "y", "\"", LIMIT + 2),
    );
    cases
        .add(
            "64 MiB of nothing that is known",
            Refused,
            filled(",\"x\":[0", ",0", "]", LIMIT),
        )
        .room = 0;
    cases.add(
        "64 MiB of brackets",
        Refused,
        filled(",\"x\":", "[", "", LIMIT),
    );
    cases.add("10,000 brackets that are read", Refused, |f| {
        let text = serde_json::to_string(&f.manifest()).unwrap();
        let deep = format!(
            "\"recipe\":{{\"x\":{}{}",
            "[".repeat(10_000),
            "]".repeat(10_000)
        );
        let text = text.replacen("\"recipe\":{", &format!("{deep}{}", ""), 1);
        f.publish_bytes(&f.current(), text.as_bytes());
    });
    // What a recipe is made of takes more memory than its text.
    let recipe = |unit: &'static str, last: &'static str| {
        move |f: &Forge| {
            let text = serde_json::to_string(&f.manifest()).unwrap();
            let n = (LIMIT - text.len() - 100) / unit.len();
            let long = format!("\"recipe\":{{\"x\":[{}{last}]", unit.repeat(n));
            f.publish_bytes(
                &f.current(),
                text.replacen("\"recipe\":{", &long, 1).as_bytes(),
            );
        }
    };
    cases
        .add("a recipe of a million numbers", Harmless, |f| {
            f.alter(|m| m["spec"]["recipe"]["x"] = vec![0; 1_000_000].into());
        })
        .room = 128 << 20;
    cases.add("a recipe of 32 million numbers", Refused, recipe("0,", "0"));
    cases.add("a recipe of 20 million lists", Refused, recipe("[],", "[]"));
    cases.add("20 million features", Refused, |f| {
        let text = serde_json::to_string(&f.manifest()).unwrap();
        let long = format!("\"reader_features\":[{}\"\"", "\"\",".repeat(20_000_000));
        f.publish_bytes(
            &f.current(),
            text.replacen("\"reader_features\":[", &long, 1).as_bytes(),
        );
    });
    cases.add("8 million parts", Refused, |f| {
        let text = serde_json::to_string(&f.manifest()).unwrap();
        let long = format!("\"parts\":[{}", "{},".repeat(8_000_000));
        f.publish_bytes(
            &f.current(),
            text.replacen("\"parts\":[", &long, 1).as_bytes(),
        );
    });
}

/// The generation before, to which a writer may go back.
fn before(cases: &mut Cases) {
    const NAME: &str = "manifest-00000005.json";
    let previous = |f: &Forge| -> Value { serde_json::from_slice(&f.read(NAME)).unwrap() };
    for role in ["experts", "scales", "routes", "ids", "documents"] {
        cases.add(
            format!("{role} of the generation before, cut"),
            Harmless,
            move |f| {
                let parts = previous(f)["parts"].as_array().unwrap().clone();
                let is_old = |p: &&Value| {
                    p["role"] == role && !f.manifest()["parts"].as_array().unwrap().contains(p)
                };
                if let Some(part) = parts.iter().find(is_old) {
                    fs::write(f.path.join(part["file"].as_str().unwrap()), "cut").unwrap();
                }
            },
        );
    }
    for (name, change) in [
        (
            "other alpha",
            (|m: &mut Value| m["spec"]["alpha"] = 7.0.into()) as fn(&mut Value),
        ),
        ("no parts", |m| m["parts"] = json!([])),
        ("parts that are not there", |m| {
            m["parts"][0]["file"] = "experts-00000099.safetensors".into()
        }),
        ("another generation", |m| m["generation"] = 4.into()),
    ] {
        cases.add(
            format!("the generation before with {name}"),
            Harmless,
            move |f| {
                let mut manifest = previous(f);
                change(&mut manifest);
                let json = serde_json::to_vec(&manifest).unwrap();
                fs::write(f.path.join(NAME), &json).unwrap();
                f.alter(|m| m["previous_blake3"] = blake3::hash(&json).to_hex().as_str().into());
            },
        );
    }
    cases.add("the generation before under another hash", Harmless, |f| {
        f.alter(|m| m["previous_blake3"] = "0".repeat(64).into());
    });
    cases.add("the generation before without a hash", Refused, |f| {
        f.alter(|m| m["previous_blake3"] = Value::Null);
    });
}

fn currents(cases: &mut Cases) {
    let hash = "0".repeat(64);
    for (name, text) in [
        ("empty", String::new()),
        ("one line", "polyprag store 1\n".into()),
        (
            "line ends of another kind",
            format!("polyprag store 1\r\nmanifest-00000006.json {hash}\r\n"),
        ),
        (
            "a path",
            format!("polyprag store 1\n../manifest-00000006.json {hash}\n"),
        ),
        (
            "another path",
            format!("polyprag store 1\n/manifest-00000006.json {hash}\n"),
        ),
        ("itself", format!("polyprag store 1\nCURRENT {hash}\n")),
        (
            "a signed number",
            format!("polyprag store 1\nmanifest-+0000006.json {hash}\n"),
        ),
        (
            "a short number",
            format!("polyprag store 1\nmanifest-6.json {hash}\n"),
        ),
        (
            "a number beyond 64 bits",
            format!("polyprag store 1\nmanifest-99999999999999999999.json {hash}\n"),
        ),
        (
            "a short hash",
            "polyprag store 1\nmanifest-00000006.json 00\n".into(),
        ),
        (
            "a line more",
            format!("polyprag store 1\nmanifest-00000006.json {hash}\n\n"),
        ),
        (
            "a zero byte",
            format!("polyprag store 1\nmanifest-00000006.json\0 {hash}\n"),
        ),
        (
            "a version of many digits",
            format!("polyprag store {}\n", "9".repeat(4000)),
        ),
        ("a megabyte", "x".repeat(1 << 20)),
    ] {
        cases.add(format!("CURRENT: {name}"), Refused, move |f| {
            fs::write(f.path.join("CURRENT"), &text).unwrap();
        });
    }
}

/// Other things than files.
fn places(cases: &mut Cases) {
    type Damage = fn(&Forge) -> String;
    let named: [(&'static str, Damage); 9] = [
        ("CURRENT", |_| "CURRENT".into()),
        ("the manifest", Forge::current),
        ("experts", |f| f.parts("experts")[0].clone()),
        ("scales", |f| f.parts("scales")[0].clone()),
        ("routes", |f| f.parts("routes")[0].clone()),
        ("ids", |f| f.parts("ids")[0].clone()),
        ("documents", |f| f.parts("documents")[0].clone()),
        ("dead", |f| f.parts("dead")[0].clone()),
        ("a file of the index", |f| f.parts("bm25")[0].clone()),
    ];
    type Put = fn(&Path, &Path);
    let kinds: [(&'static str, Put); 6] = [
        ("a symlink to itself, moved", |file, moved| {
            symlink(moved, file).unwrap()
        }),
        ("a symlink to nothing", |file, _| {
            symlink("nothing", file).unwrap()
        }),
        ("a symlink to /dev/zero", |file, _| {
            symlink("/dev/zero", file).unwrap()
        }),
        ("a pipe", |file, _| {
            rustix::fs::mknodat(
                rustix::fs::CWD,
                file,
                rustix::fs::FileType::Fifo,
                0o666.into(),
                0,
            )
            .unwrap();
        }),
        ("a socket", |file, _| {
            drop(UnixListener::bind(file).unwrap())
        }),
        ("a folder", |file, _| fs::create_dir(file).unwrap()),
    ];
    for (what, name) in named {
        for (kind, put) in kinds {
            let expected = if what == "a file of the index" {
                Found
            } else {
                Refused
            };
            cases.add(format!("{kind} in place of {what}"), expected, move |f| {
                let file = f.path.join(name(f));
                let moved = f.path.join("moved");
                fs::rename(&file, &moved).unwrap();
                put(&file, &moved);
            });
        }
        // Only root may make devices, and not in every container.
        cases.add(format!("a device in place of {what}"), Found, move |f| {
            let file = f.path.join(name(f));
            fs::remove_file(&file).unwrap();
            let zero = rustix::fs::makedev(1, 5);
            let _ = rustix::fs::mknodat(
                rustix::fs::CWD,
                &file,
                rustix::fs::FileType::CharacterDevice,
                0o666.into(),
                zero,
            );
            assert!(fs::metadata(&file).map_or(true, |m| m.file_type().is_char_device()));
        });
    }
    cases.add(
        "a symlink in place of the folder of the index",
        Found,
        |f| {
            fs::rename(f.path.join("bm25"), f.path.join("moved")).unwrap();
            symlink("moved", f.path.join("bm25")).unwrap();
        },
    );
    cases.add("a file in place of the folder of the index", Found, |f| {
        fs::remove_dir_all(f.path.join("bm25")).unwrap();
        fs::write(f.path.join("bm25"), "x").unwrap();
    });
    for (kind, put) in kinds {
        cases.add(format!("{kind} in place of LOCK"), Harmless, move |f| {
            let file = f.path.join("LOCK");
            let _ = fs::remove_file(&file);
            put(&file, Path::new("moved"));
        });
    }
}

const NUMBERS: [u64; 11] = [
    0,
    1,
    63,
    0x8000,
    u32::MAX as u64,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 1,
    u64::MAX,
];

/// The fields of the tails, each with each number that is the end of some range.
fn fields(cases: &mut Cases) {
    for (base, codec) in [
        ("q8 words", true),
        ("code(3) numbered", true),
        ("f32 counted", false),
    ] {
        for (role, n) in [
            ("routes", 4),
            ("ids", 9),
            ("documents", 3),
            ("scales", 2),
            ("dead", 1),
        ] {
            if role == "scales" && !codec {
                continue;
            }
            for (i, which) in (0..n).flat_map(|i| [(i, "first"), (i, "last")]) {
                for value in NUMBERS {
                    let name = format!("{base}: field {i} of the {which} {role} is {value}");
                    cases.on(base, name, Harmless, move |f| match which {
                        "first" => f.edit_first(role, |p| p.set(i, value)),
                        _ => f.edit_last(role, |p| p.set(i, value)),
                    });
                }
                for (name, by) in [("more", 1), ("less", u64::MAX)] {
                    let name = format!("{base}: field {i} of the {which} {role} is one {name}");
                    cases.on(base, name, Harmless, move |f| {
                        let change = |p: &mut Part| p.set(i, p.field(i).wrapping_add(by));
                        match which {
                            "first" => f.edit_first(role, change),
                            _ => f.edit_last(role, change),
                        }
                    });
                }
            }
        }
    }
}

fn frames(cases: &mut Cases) {
    for role in ["scales", "routes", "ids", "documents", "dead"] {
        let mut head = |name: &str, expected, change: fn(&mut Part)| {
            cases.add(format!("{role}: {name}"), expected, move |f| {
                f.edit_first(role, change)
            });
        };
        head("of version 2", Refused, |p| p.head[8] = 2);
        head("of another kind", Refused, |p| p.head[3] = b'Q');
        head("blocks of 1 byte", Harmless, |p| {
            p.head[12..16].copy_from_slice(&1u32.to_le_bytes())
        });
        head("blocks of 4 GiB", Harmless, |p| {
            p.head[12..16].copy_from_slice(&u32::MAX.to_le_bytes())
        });
        head("no body", Found, |p| p.body.clear());
        head("a body of zeros", Harmless, |p| p.body.fill(0));
        head("a body of ones", Harmless, |p| p.body.fill(0xff));
        head("a mebibyte more", Refused, |p| {
            p.body.extend(vec![0; 1 << 20])
        });
        head("a tail of 4,096 bytes", Harmless, |p| {
            p.fields.resize(4096 - 32, 0)
        });
        head("a tail of 4,160 bytes", Refused, |p| {
            p.fields.resize(4160 - 32, 0)
        });
        head("no fields", Refused, |p| p.fields.fill(0));
        for field in ["N", "T", "sums"] {
            for value in NUMBERS {
                cases.add(format!("{role}: {field} is {value}"), Harmless, move |f| {
                    let name = f.parts(role)[0].clone();
                    let mut bytes = f.read(&name);
                    let end = bytes.len();
                    match field {
                        "N" => bytes[end - 32..end - 24].copy_from_slice(&value.to_le_bytes()),
                        "sums" => bytes[end - 24..end - 16].copy_from_slice(&value.to_le_bytes()),
                        _ => bytes[end - 16..end - 8].copy_from_slice(&value.to_le_bytes()),
                    }
                    reseal_tail(&mut bytes);
                    f.replace(&name, &bytes);
                });
            }
        }
    }
}

/// The checksum of head and tail, as far as there is a tail of the length that is given.
fn reseal_tail(bytes: &mut [u8]) {
    let end = bytes.len();
    let tail = u32::from_le_bytes(*bytes[end - 16..].first_chunk().unwrap()) as usize;
    let start = end.saturating_sub(tail).min(end - 8);
    let sum = xxhash_rust::xxh3::xxh3_64(&[&bytes[..64], &bytes[start..end - 8]].concat());
    bytes[end - 8..].copy_from_slice(&sum.to_le_bytes());
}

fn routes(cases: &mut Cases) {
    let presence = |p: &Part| (p.field(2) * p.field(3)).next_multiple_of(64) as usize;
    cases.add("a bitmap of ones", Found, move |f| {
        f.edit_first("routes", |p| {
            let at = presence(p);
            assert!(p.body.len() > at, "the range has gaps");
            p.body[at..at + 64].fill(0xff);
        });
    });
    for value in NUMBERS {
        if value == 0 {
            continue;
        }
        cases.add(format!("a rank directory of {value}"), Found, move |f| {
            f.edit_first("routes", |p| p.put(presence(p) + 64, value));
        });
    }
    for (name, x) in [
        ("NaN", f32::NAN),
        ("infinite", f32::INFINITY),
        ("negative", -1.0),
        ("large", f32::MAX),
    ] {
        cases.add(format!("{name} scales"), Refused, move |f| {
            f.edit_first("scales", |p| {
                p.body
                    .chunks_mut(4)
                    .for_each(|c| c.copy_from_slice(&x.to_le_bytes()))
            });
        });
        cases.on(
            "f32 counted",
            format!("{name} logits"),
            Harmless,
            move |f| {
                f.edit_first("routes", |p| {
                    let end = presence(p);
                    p.body[..end]
                        .chunks_mut(4)
                        .for_each(|c| c.copy_from_slice(&x.to_le_bytes()));
                });
            },
        );
    }
}

/// What scales are said to be fitted to.
fn fitted(cases: &mut Cases) {
    let numbers = |x: f64| (x as f32).to_le_bytes().to_vec();
    let wide = |x: f64| x.to_le_bytes().to_vec();
    for (name, x) in [
        ("NaN", f64::NAN),
        ("infinite", f64::INFINITY),
        ("minus infinite", f64::NEG_INFINITY),
        ("large", 3e38),
        ("as small", -3e38),
    ] {
        for (what, at, bytes) in [
            ("least numbers", 0, numbers(x)),
            ("greatest numbers", 4, numbers(x)),
            ("means", 8, wide(x)),
            ("deviations", 16, wide(x)),
        ] {
            cases.add(format!("{name} {what} of scales"), Refused, move |f| {
                f.edit_first("scales", |p| {
                    let first = 8 * p.field(0) as usize;
                    let columns = p.body[first..].chunks_mut(24);
                    columns.for_each(|c| c[at..at + bytes.len()].copy_from_slice(&bytes));
                });
            });
        }
    }
}

/// One block of documents, as it is kept: `unpacked` as the index says, `packed` as it lies there.
fn kept(first: u64, count: u64, packed: &[u8], unpacked: u64) -> Part {
    let mut body = packed.to_vec();
    body.resize(body.len().next_multiple_of(8), 0);
    for n in [0, 0, unpacked, count, packed.len() as u64, 0] {
        body.extend_from_slice(&n.to_le_bytes());
    }
    Part::new(b'D', body, &[first, count, 1])
}

fn documents(cases: &mut Cases) {
    fn one(f: &Forge, part: &Part) {
        f.replace(&f.parts("documents")[0], &part.seal());
    }
    let zstd = |bytes: &[u8]| zstd::bulk::compress(bytes, 19).unwrap();
    let zeros = |mib: usize| zstd(&vec![0; mib << 20]);
    // 64 MiB of documents of which nothing is kept, in some thousand bytes.
    let all = zeros(64);
    assert!(all.len() < 10_000, "{}", all.len());
    for (count, says) in [
        (1, 64 << 20),
        (30, 64 << 20),
        (1 << 26, 64 << 20),
        (30, 30),
        (30, (64 << 20) + 1),
        (30, u64::MAX),
    ] {
        let all = all.clone();
        cases
            .add(
                format!("a bomb of 64 MiB as {count} documents in {says} bytes"),
                Found,
                move |f| {
                    one(f, &kept(0, count, &all, says));
                },
            )
            .room = BLOCK;
    }
    for mib in [65, 1024] {
        let all = zeros(mib);
        cases
            .add(format!("a bomb of {mib} MiB"), Found, move |f| {
                one(f, &kept(0, 30, &all, 64 << 20))
            })
            .room = BLOCK;
    }
    let text = |n: usize| [&[2u8][..], &(n as u32).to_le_bytes(), &vec![b'x'; n]].concat();
    let long = zstd(&text(60 << 20));
    cases
        .add("one text of 60 MiB", Found, move |f| {
            one(f, &kept(0, 1, &long, (60 << 20) + 5))
        })
        .room = 2 * BLOCK;
    for (name, block) in [
        (
            "a text of 4 GiB",
            [&[2u8][..], &u32::MAX.to_le_bytes(), b"x"].concat(),
        ),
        ("unknown flags", vec![0xff; 30]),
        (
            "text that is no UTF-8",
            [&[2u8][..], &2u32.to_le_bytes(), &[0xff, 0xfe]].concat(),
        ),
        ("fewer documents than promised", vec![0; 3]),
        ("more documents than promised", vec![0; 300]),
        ("nothing", Vec::new()),
    ] {
        let packed = zstd(&block);
        cases.add(format!("a block of {name}"), Found, move |f| {
            one(f, &kept(0, 30, &packed, block.len() as u64))
        });
    }
    let plain = zstd(&[0; 30]);
    for (name, packed) in [
        ("two frames", [plain.clone(), plain.clone()].concat()),
        ("a frame and more", [&plain[..], b"more"].concat()),
        (
            "a skippable frame of 4 GiB",
            [&[0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff][..], b"x"].concat(),
        ),
        (
            "a frame that needs a dictionary",
            [&[0x28, 0xb5, 0x2f, 0xfd, 0x23, 7, 0, 0, 0, 30][..], b"x"].concat(),
        ),
        (
            "a frame of 2^63 bytes",
            [
                &[0x28, 0xb5, 0x2f, 0xfd, 0xe0][..],
                &(1u64 << 63).to_le_bytes(),
                b"x",
            ]
            .concat(),
        ),
        (
            "a window of 2 TiB",
            vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0x01, 0x00, 0x00],
        ),
        ("no frame", vec![7; 40]),
        ("nothing", Vec::new()),
    ] {
        cases.add(
            format!("{name} in place of a zstd frame"),
            Found,
            move |f| one(f, &kept(0, 30, &packed, 30)),
        );
    }
    for (first, count) in [
        (u64::MAX, 1),
        (u64::MAX - 3, 3),
        (5, u64::MAX),
        (0, 1 << 40),
        (0, 1_000_000_000),
    ] {
        let plain = plain.clone();
        cases.add(
            format!("documents {first} and {count} from there"),
            Refused,
            move |f| {
                one(f, &kept(first, count, &plain, 30));
            },
        );
    }
    // With room for all of them.
    let plain = zstd(&[0; 30]);
    // Also where the block says that it is large enough to be copied as it is.
    for (count, unpacked) in [(1_000_000_000, 30), (1 << 40, 1 << 20), (1 << 62, 1 << 62)] {
        let plain = plain.clone();
        cases.add(
            format!("{count} documents in a hundred bytes, which unpack to {unpacked}"),
            Found,
            move |f| {
                f.alter(|m| m["next_docno"] = count.into());
                one(f, &kept(0, count, &plain, unpacked));
            },
        );
    }
    for (at, value) in (0..6).flat_map(|at| NUMBERS.map(|value| (at, value))) {
        cases.add(
            format!("number {at} of the index of documents is {value}"),
            Harmless,
            move |f| {
                f.edit_first("documents", |p| {
                    let blocks = p.field(2) as usize;
                    let index = p.body.len() - 24 * (blocks + 1);
                    p.put(index + 8 * at, value);
                });
            },
        );
    }
}

/// A 64-bit Roaring bitmap of so many 32-bit ones, each full, in runs.
fn full_bitmaps(high: &[u32]) -> Vec<u8> {
    let mut body = (high.len() as u64).to_le_bytes().to_vec();
    for high in high {
        body.extend_from_slice(&high.to_le_bytes());
        let containers = 65_536u32;
        body.extend_from_slice(&(12_347 | (containers - 1) << 16).to_le_bytes());
        body.extend(vec![0xff; containers as usize / 8]);
        for key in 0..containers {
            body.extend_from_slice(&(key as u16).to_le_bytes());
            body.extend_from_slice(&u16::MAX.to_le_bytes());
        }
        let offset = 4 + containers / 8 + 4 * containers + 4 * containers;
        for i in 0..containers {
            body.extend_from_slice(&(offset + 6 * i).to_le_bytes());
        }
        for _ in 0..containers {
            for n in [1u16, 0, u16::MAX] {
                body.extend_from_slice(&n.to_le_bytes());
            }
        }
    }
    body
}

fn dead(cases: &mut Cases) {
    for (name, high) in [
        ("one", vec![0]),
        ("four", vec![0, 1, 2, 3]),
        ("two of the same", vec![0, 0]),
        ("descending", vec![1, 0]),
    ] {
        cases
            .add(
                format!("the dead as full bitmaps, {name}"),
                Refused,
                move |f| {
                    f.alter(|m| m["next_docno"] = (1u64 << 40).into());
                    let count = high.len() as u64 * (1 << 32);
                    let part = Part::new(b'X', full_bitmaps(&high), &[count]);
                    f.replace(&f.parts("dead")[0], &part.seal());
                },
            )
            .room = 8 << 20;
    }
    for (name, body) in [
        ("2^64 bitmaps", u64::MAX.to_le_bytes().to_vec()),
        ("2^32 bitmaps", (1u64 << 32).to_le_bytes().to_vec()),
        (
            "a bitmap of 2^32 containers",
            [
                &1u64.to_le_bytes()[..],
                &[0; 4],
                &12_346u32.to_le_bytes(),
                &u32::MAX.to_le_bytes(),
            ]
            .concat(),
        ),
        (
            "a bitmap of 65,536 containers",
            [
                &1u64.to_le_bytes()[..],
                &[0; 4],
                &12_346u32.to_le_bytes(),
                &65_536u32.to_le_bytes(),
            ]
            .concat(),
        ),
        (
            "another kind of bitmap",
            [&1u64.to_le_bytes()[..], &[0; 4], &[7; 40]].concat(),
        ),
        ("nothing", Vec::new()),
    ] {
        cases.add(format!("the dead as {name}"), Refused, move |f| {
            f.replace(
                &f.parts("dead")[0],
                &Part::new(b'X', body.clone(), &[2]).seal(),
            );
        });
    }
    cases.add("all are dead", Refused, |f| {
        let mut body = Vec::new();
        roaring::RoaringTreemap::from_iter(0..f.manifest()["next_docno"].as_u64().unwrap())
            .serialize_into(&mut body)
            .unwrap();
        let count = f.manifest()["next_docno"].as_u64().unwrap();
        f.replace(&f.parts("dead")[0], &Part::new(b'X', body, &[count]).seal());
    });
    cases.add("a docno that never was is dead", Refused, |f| {
        let mut body = Vec::new();
        roaring::RoaringTreemap::from_iter([3, u64::MAX])
            .serialize_into(&mut body)
            .unwrap();
        f.replace(&f.parts("dead")[0], &Part::new(b'X', body, &[2]).seal());
    });
}

fn tensor_files(cases: &mut Cases) {
    for (base, role) in [
        ("q8 words", "experts"),
        ("code(3) numbered", "experts"),
        ("code(3) numbered", "decoder"),
        ("code(3) numbered", "router"),
    ] {
        let header = move |f: &Forge, change: &dyn Fn(&mut Value)| {
            let name = f.parts(role)[0].clone();
            let bytes = f.read(&name);
            let n = u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
            let mut json: Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
            change(&mut json);
            let mut text = serde_json::to_vec(&json).unwrap();
            text.resize(text.len().next_multiple_of(8), b' ');
            let sealed = [
                &(text.len() as u64).to_le_bytes()[..],
                &text,
                &bytes[8 + n..],
            ]
            .concat();
            f.replace(&name, &sealed);
        };
        let mut of = |name: &str, change: fn(&mut Value)| {
            cases.on(
                base,
                format!("{base}: {role} with {name}"),
                Refused,
                move |f| header(f, &change),
            );
        };
        fn first(json: &mut Value) -> &mut Value {
            let tensors = json.as_object_mut().unwrap();
            tensors
                .values_mut()
                .find(|t| t.get("shape").is_some())
                .unwrap()
        }
        of("a huge shape", |j| {
            first(j)["shape"] = json!([u64::MAX, u64::MAX, u64::MAX])
        });
        of("a shape whose product is right modulo 2^64", |j| {
            first(j)["shape"] = json!([1u64 << 63, 2, 1])
        });
        of("a shape of a million sides", |j| {
            first(j)["shape"] = json!(vec![1; 1_000_000])
        });
        of("offsets outside", |j| {
            first(j)["data_offsets"] = json!([0, u64::MAX])
        });
        of("descending offsets", |j| {
            first(j)["data_offsets"] = json!([96, 0])
        });
        of("a number type of later", |j| {
            first(j)["dtype"] = json!("F7")
        });
        of("another number type", |j| first(j)["dtype"] = json!("I32"));
        of("negative offsets", |j| {
            first(j)["data_offsets"] = json!([-1, 96])
        });
        of("overlapping tensors", |j| {
            let offsets = first(j)["data_offsets"].clone();
            j.as_object_mut()
                .unwrap()
                .values_mut()
                .for_each(|t| t["data_offsets"] = offsets.clone());
        });
        of(
            "a tensor more",
            |j| j["more"] = json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        );
        of("no tensors", |j| *j = json!({}));
        for (name, bytes) in [
            ("no bytes", vec![]),
            ("a header of 2^64 bytes", vec![0xff; 40]),
            (
                "a header of 99 MB in 40 bytes",
                [&99_000_000u64.to_le_bytes()[..], &[b' '; 32]].concat(),
            ),
            (
                "brackets",
                [&40_000u64.to_le_bytes()[..], &[b'['; 40_000]].concat(),
            ),
            (
                "a header of 1 byte",
                [&1u64.to_le_bytes()[..], b"{"].concat(),
            ),
        ] {
            cases.on(
                base,
                format!("{base}: {role} of {name}"),
                Refused,
                move |f| f.replace(&f.parts(role)[0], &bytes),
            );
        }
        cases
            .on(
                base,
                format!("{base}: {role} of a million empty tensors"),
                Refused,
                move |f| {
                    let one = |i| {
                        format!(
                            "\"{i}\":{{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[0,0]}}"
                        )
                    };
                    let text = format!(
                        "{{{}}}",
                        (0..1_000_000).map(one).collect::<Vec<_>>().join(",")
                    );
                    let sealed = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
                    f.replace(&f.parts(role)[0], &sealed);
                },
            )
            .room = 0;
    }
}

fn routers(cases: &mut Cases) {
    let mut of = |name: &str, tensors: Vec<(String, &str, Vec<usize>)>| {
        let mut end = 0;
        let mut header = serde_json::Map::new();
        for (name, dtype, shape) in tensors {
            let start = end;
            end += 4 * shape.iter().product::<usize>();
            header.insert(
                name,
                json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}),
            );
        }
        let mut text = serde_json::to_vec(&header).unwrap();
        text.resize(text.len().next_multiple_of(8), b' ');
        let file = [&(text.len() as u64).to_le_bytes()[..], &text, &vec![0; end]].concat();
        cases.on(
            "code(3) numbered",
            format!("router of {name}"),
            Refused,
            move |f| f.replace(&f.parts("router")[0], &file),
        );
    };
    let one = |name: &str, dtype: &'static str, shape: &[usize]| {
        vec![(name.to_owned(), dtype, shape.to_vec())]
    };
    of("integers", one("a", "I32", &[2]));
    of("a tensor without sides", one("a", "F32", &[]));
    of("a tensor of three sides", one("a", "F32", &[1, 2, 1]));
    of("an empty tensor", one("a", "F32", &[2, 0]));
    of("a tensor without a name", one("", "F32", &[2]));
    of("a name of 129 bytes", one(&"a".repeat(129), "F32", &[2]));
    for name in ["a/b", "a b", "ä", "a\0", "../a"] {
        of(&format!("a tensor named {name:?}"), one(name, "F32", &[2]));
    }
    let many = (0..65).map(|i| (format!("t{i}"), "F32", vec![1]));
    of("65 tensors", many.collect());
    cases.on("code(3) numbered", "two routers", Refused, |f| {
        let bytes = f.read(&f.parts("router")[0]);
        fs::write(f.path.join("router-00000099.safetensors"), &bytes).unwrap();
        f.alter(|m| {
            let mut part = part_of(m, "router").clone();
            part["file"] = "router-00000099.safetensors".into();
            m["parts"].as_array_mut().unwrap().push(part);
        });
    });
    cases.manifest("a router beside routes that are no codes", Refused, |m| {
        let mut part = part_of(m, "experts").clone();
        part["role"] = "router".into();
        part["file"] = "router-00000001.safetensors".into();
        m["parts"].as_array_mut().unwrap().push(part);
    });
}

fn all_cases() -> Vec<Case> {
    let mut cases = Cases::default();
    fields(&mut cases);
    frames(&mut cases);
    large_manifests(&mut cases);
    cases.0.iter_mut().for_each(|case| case.is_alike = true);
    manifests(&mut cases);
    before(&mut cases);
    currents(&mut cases);
    places(&mut cases);
    routes(&mut cases);
    fitted(&mut cases);
    documents(&mut cases);
    dead(&mut cases);
    tensor_files(&mut cases);
    routers(&mut cases);
    let mut random = Random(seed());
    cases
        .0
        .retain(|case| full() || !case.is_alike || random.below(8) == 0);
    cases.0
}

/// The stores that are altered, and what reading them as they are takes.
struct Bases {
    folder: tempfile::TempDir,
    peaks: Vec<(&'static str, usize)>,
}

impl Bases {
    fn new() -> Self {
        let folder = folder();
        let peak = |base: &'static str| {
            let (codec, shape) = base.split_once(' ').unwrap();
            life(&folder.path().join(base), codec, shape).unwrap();
            (base, measured(|| read(&folder.path().join(base), shape)).1)
        };
        let peaks = ["q8 words", "code(3) numbered", "f32 counted"]
            .map(peak)
            .to_vec();
        Self { folder, peaks }
    }

    fn path(&self, base: &str) -> PathBuf {
        self.folder.path().join(base)
    }

    fn peak(&self, base: &str) -> usize {
        self.peaks.iter().find(|(b, _)| *b == base).unwrap().1
    }

    /// A copy to alter.
    fn forge(&self, base: &str, at: &Path) -> Forge {
        copy(&self.path(base), at);
        Forge::new(at)
    }
}

/// Opens, asks everything, verifies: whether opening and verifying were errors.
fn read(path: &Path, shape: &str) -> (Option<Error>, Option<Error>) {
    let store = match Store::open(path) {
        Ok(store) => store,
        Err(e) => return (Some(e), None),
    };
    for e in poke(&store, &known(shape), &QUESTIONS) {
        assert!(is_typed_or_miss(&e), "{e:?}");
    }
    (None, store.verify().err())
}

/// Ends the process when one case takes too long.
#[derive(Debug)]
struct Watch(&'static Mutex<Instant>);

impl Watch {
    fn start() -> Self {
        let since: &'static Mutex<Instant> = Box::leak(Box::new(Mutex::new(Instant::now())));
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(500));
                if since.lock().unwrap().elapsed() > LIMIT_OF_A_CASE {
                    eprintln!("this takes longer than {LIMIT_OF_A_CASE:?}");
                    std::process::abort();
                }
            }
        });
        Self(since)
    }

    fn again(&self) {
        *self.0.lock().unwrap() = Instant::now();
    }
}

/// What went wrong, case by case, to be told together.
#[derive(Debug, Default)]
struct Failures(Vec<String>);

impl Failures {
    fn gather<T>(&mut self, what: &str, work: impl FnOnce() -> T) -> Option<T> {
        match catch_unwind(AssertUnwindSafe(work)) {
            Ok(result) => Some(result),
            Err(panic) => {
                let words = panic.downcast_ref::<String>().cloned();
                let words = words.unwrap_or_else(|| "a panic".into());
                self.0.push(format!("{what}: {words}"));
                None
            }
        }
    }

    fn tell(self) {
        assert!(
            self.0.is_empty(),
            "{} failures:\n{}",
            self.0.len(),
            self.0.join("\n")
        );
    }
}

fn read_case(case: &Case, bases: &Bases) -> [usize; 3] {
    let tmp = folder();
    let forge = bases.forge(case.base, &tmp.path().join("s"));
    (case.make)(&forge);
    let size = written(&forge.path) as usize;
    let shape = case.base.split_once(' ').unwrap().1;
    let ((opened, verified), peak) = measured(|| read(&forge.path, shape));
    for e in opened.iter().chain(&verified) {
        assert!(is_typed(e), "{e:?}");
    }
    match case.expected {
        Refused => assert!(opened.is_some(), "it was opened; verify: {verified:?}"),
        Found => assert!(opened.is_some() || verified.is_some(), "it was not found"),
        Harmless => {}
    }
    let room = bases.peak(case.base) + size + SOME + case.room;
    assert!(
        peak <= room,
        "{peak} bytes taken for files of {size}, {room} at most"
    );
    let beyond = peak.saturating_sub(size + case.room);
    [
        usize::from(opened.is_some()),
        usize::from(verified.is_some()),
        beyond,
    ]
}

fn read_cases(lane: usize, lanes: usize) {
    let (bases, progress, watch) = (Bases::new(), Progress::open(), Watch::start());
    let mut failures = Failures::default();
    let (mut n, mut refused, mut found, mut most) = (0, 0, 0, 0);
    for case in all_cases().into_iter().skip(lane).step_by(lanes) {
        progress.at(&case.name);
        watch.again();
        n += 1;
        if let Some(done) = failures.gather(&case.name, || read_case(&case, &bases)) {
            refused += done[0];
            found += done[1];
            most = most.max(done[2]);
        }
    }
    failures.tell();
    count("hostile stores", n);
    count("refused", refused);
    count("found by verify", found);
    println!("at most {most} bytes beyond the files and the room for blocks");
}

type Verb = fn(&Path, &Bases, &str) -> Result<()>;

const VERBS: [(&str, Verb); 8] = [
    ("recode", |path, _, base| {
        let codec = if base.starts_with("f32") { "q8" } else { "f32" };
        let recoding = Recoding {
            codec: codec.parse()?,
            decoder: None,
            expert_dtype: None,
        };
        let recoded = path.with_file_name("recoded");
        Store::open(path)?.recode(&recoded, &recoding)?;
        Store::open(&recoded).map(drop)
    }),
    ("compact", |path, _, _| {
        Store::open(path)?.writer()?.compact().map(drop)
    }),
    ("reindex", |path, _, _| {
        Store::open(path)?.writer()?.reindex().map(drop)
    }),
    ("rollback", |path, _, _| {
        Store::open(path)?.writer()?.rollback().map(drop)
    }),
    ("add", |path, _, base| {
        let shape = base.split_once(' ').unwrap().1;
        let mut writer = Store::open(path)?.writer()?;
        writer.add(
            &[document(shape, 3, 50), document(shape, 50, 50)],
            None,
            OnDuplicate::Replace,
        )?;
        writer.commit().map(drop)
    }),
    ("merge", |path, bases, base| {
        let copied = path.with_file_name("into");
        let _ = fs::remove_dir_all(&copied);
        copy(&bases.path(base), &copied);
        let mut writer = Store::open(&copied)?.writer()?;
        writer.merge(&Store::open(path)?, OnDuplicate::Replace)?;
        writer.commit()?;
        Store::open(&copied)?;
        Ok(())
    }),
    ("snapshot", |path, _, _| {
        let copied = path.with_file_name("snapshot");
        Store::open(path)?.snapshot(&copied)?;
        Store::open(&copied).map(drop)
    }),
    ("pack", |path, _, _| {
        let packed = path.with_file_name("packed");
        Store::open(path)?.pack(&packed)?;
        let unpacked = path.with_file_name("unpacked");
        Store::unpack(&packed, &unpacked)?;
        Store::open(&unpacked).map(drop)
    }),
];

fn written(folder: &Path) -> u64 {
    let mut sum = 0;
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = fs::symlink_metadata(&path).unwrap();
        sum += if meta.is_dir() {
            written(&path)
        } else {
            meta.len()
        };
    }
    sum
}

fn write_cases(lane: usize, lanes: usize) {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let limit = Some(512 << 20);
    setrlimit(
        Resource::Fsize,
        Rlimit {
            current: limit,
            maximum: limit,
        },
    )
    .unwrap();
    let (bases, progress, watch) = (Bases::new(), Progress::open(), Watch::start());
    let mut random = Random(seed() + lane as u64);
    let mut failures = Failures::default();
    let (mut n, mut failed) = (0, 0);
    for case in all_cases().into_iter().skip(lane).step_by(lanes) {
        if !full() && random.below(40) > 0 {
            continue;
        }
        let tmp = folder();
        let forge = bases.forge(case.base, &tmp.path().join("made"));
        (case.make)(&forge);
        if Store::open(&forge.path).is_err() {
            continue;
        }
        for (verb, work) in VERBS {
            let what = format!("{verb} of {}", case.name);
            progress.at(&what);
            watch.again();
            n += 1;
            let ended = failures.gather(&what, || {
                let place = tmp.path().join(verb);
                fs::create_dir(&place).unwrap();
                let forge = bases.forge(case.base, &place.join("s"));
                (case.make)(&forge);
                let size = written(&forge.path);
                let ended = work(&forge.path, &bases, case.base);
                // What could be opened can be opened, whatever came of it.
                if let Err(e) = Store::open(&forge.path) {
                    panic!("{ended:?}, and left a store that cannot be opened: {e}");
                }
                let taken = written(&place);
                assert!(
                    taken <= 8 * size + (32 << 20),
                    "filled {taken} bytes for {size}"
                );
                fs::remove_dir_all(&place).unwrap();
                ended
            });
            failed += usize::from(matches!(ended, Some(Err(_))));
        }
    }
    failures.tell();
    count(
        "times a verb wrote to a hostile store that can be opened",
        n,
    );
    count("of them with an error", failed);
}

/// Numbers and bytes of bodies, altered at random under the right checksums.
fn altered_bodies(lane: usize) {
    let (bases, progress, watch) = (Bases::new(), Progress::open(), Watch::start());
    let mut random = Random(seed() ^ (lane as u64) << 40);
    let rounds = if full() { 20_000 } else { 150 };
    for round in 0..rounds {
        watch.again();
        let base = ["q8 words", "code(3) numbered", "f32 counted"][round % 3];
        let shape = base.split_once(' ').unwrap().1;
        let path = bases.folder.path().join("altered");
        let forge = bases.forge(base, &path);
        let role = ["routes", "ids", "documents", "dead", "scales"][random.below(5)];
        let names = forge.parts(role);
        if names.is_empty() {
            continue;
        }
        let name = &names[random.below(names.len())];
        let mut what = format!("{base}, round {round}, {name}:");
        forge.edit(name, |part| {
            for _ in 0..1 + random.below(3) {
                let number = match random.below(3) {
                    0 => random.next(),
                    1 => NUMBERS[random.below(NUMBERS.len())],
                    _ => random.below(64) as u64,
                };
                match random.below(4) {
                    0 if part.fields.len() >= 8 => {
                        let i = random.below(part.fields.len() / 8);
                        what += &format!(" field {i} = {number}");
                        part.set(i, number);
                    }
                    1 if !part.body.is_empty() => {
                        let at = random.below(part.body.len());
                        what += &format!(" byte {at} = {}", number as u8);
                        part.body[at] = number as u8;
                    }
                    _ if part.body.len() >= 8 => {
                        let at = random.below(part.body.len() - 7) & !7;
                        what += &format!(" number at {at} = {number}");
                        part.put(at, number);
                    }
                    _ => {}
                }
            }
        });
        progress.at(&what);
        let size = written(&forge.path) as usize;
        let (_, peak) = measured(|| read(&path, shape));
        let room = bases.peak(base) + size + SOME + BLOCK;
        assert!(
            peak <= room,
            "{what}: {peak} bytes taken for files of {size}"
        );
        fs::remove_dir_all(&path).unwrap();
    }
    count("bodies altered under the right checksums", rounds);
}

#[test]
#[ignore = "done by the other tests, in processes of its own"]
fn child() {
    let Some(job) = job() else { return };
    let words: Vec<&str> = job.split(' ').collect();
    let (lane, lanes) = (words[1].parse().unwrap(), words[2].parse().unwrap());
    match words[0] {
        "read" => read_cases(lane, lanes),
        "write" => write_cases(lane, lanes),
        "alter" => altered_bodies(lane),
        _ => unpack_cases(),
    }
}

fn in_children(work: &str, lanes: usize) {
    let jobs = (0..lanes)
        .map(|lane| format!("{work} {lane} {lanes}"))
        .collect();
    let counts = children::all("child", jobs, Duration::from_secs(6 * 3600));
    println!("{}; seed {}", told(&counts), seed());
}

#[test]
fn a_hostile_store_is_refused_or_harmless() {
    in_children("read", 2 * cores());
}

#[test]
fn altered_bodies_under_the_right_checksums_harm_no_reader() {
    in_children("alter", cores());
}

#[test]
fn verbs_on_a_hostile_store_leave_one_that_can_be_read() {
    in_children("write", 2 * cores());
}

#[test]
fn a_hostile_packed_store_is_refused() {
    in_children("unpack", 1);
}

/// An entry of an archive: name, content, kind, and the size that the header claims.
type Entry = (String, Vec<u8>, tar::EntryType, Option<u64>);

fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, bytes, kind, size) in entries {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_size(size.unwrap_or(bytes.len() as u64));
        // By hand: the crate would refuse to write such names.
        let field = &mut header.as_old_mut().name;
        field
            .iter_mut()
            .zip(name.bytes())
            .for_each(|(to, from)| *to = from);
        if kind.is_symlink() || kind.is_hard_link() {
            let link = &mut header.as_old_mut().linkname;
            link.iter_mut()
                .zip(b"/etc/passwd")
                .for_each(|(to, from)| *to = *from);
        }
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(bytes);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn entries(packed: &[u8]) -> Vec<Entry> {
    let mut archive = tar::Archive::new(packed);
    let each = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        (name, bytes, tar::EntryType::Regular, None)
    });
    each.collect()
}

fn unpack_cases() {
    let (bases, progress, watch) = (Bases::new(), Progress::open(), Watch::start());
    let tmp = folder();
    let place = tmp.path().join("place");
    fs::create_dir(&place).unwrap();
    let file = tmp.path().join("packed");
    let store = Store::open(bases.path("q8 words")).unwrap();
    store.pack(&file).unwrap();
    let whole = fs::read(&file).unwrap();
    let good = entries(&whole);
    let n = std::cell::Cell::new(0);
    let refused = |name: &str, bytes: &[u8]| {
        progress.at(name);
        watch.again();
        n.set(n.get() + 1);
        fs::write(&file, bytes).unwrap();
        let (unpacked, peak) = measured(|| Store::unpack(&file, place.join("s")));
        let error = unpacked
            .err()
            .unwrap_or_else(|| panic!("{name} was unpacked"));
        assert!(
            is_typed(&error) || error.io_kind().is_some(),
            "{name}: {error:?}"
        );
        assert!(
            peak <= bytes.len() + SOME,
            "{name}: {peak} bytes taken for {}",
            bytes.len()
        );
        assert_eq!(
            fs::read_dir(&place).unwrap().count(),
            0,
            "{name} left something"
        );
        assert_eq!(
            fs::read_dir(tmp.path()).unwrap().count(),
            2,
            "{name} wrote elsewhere"
        );
    };
    // As it is, it can be unpacked.
    fs::write(&file, archive(&good)).unwrap();
    Store::unpack(&file, place.join("s")).unwrap();
    Store::open(place.join("s")).unwrap().verify().unwrap();
    fs::remove_dir_all(place.join("s")).unwrap();

    for i in 0..good.len() {
        for name in [
            "../escaped",
            "/tmp/escaped",
            "bm25/../../escaped",
            "CURRENT",
            "LOCK",
            "x",
            "",
            "bm25/x",
        ] {
            if name == good[i].0 {
                continue;
            }
            let mut other = good.clone();
            other[i].0 = name.into();
            refused(&format!("entry {i} named {name:?}"), &archive(&other));
        }
        for kind in [
            tar::EntryType::Symlink,
            tar::EntryType::Link,
            tar::EntryType::Directory,
            tar::EntryType::Fifo,
            tar::EntryType::Char,
            tar::EntryType::Block,
            tar::EntryType::GNUSparse,
            tar::EntryType::XHeader,
            tar::EntryType::XGlobalHeader,
            tar::EntryType::GNULongName,
            tar::EntryType::GNULongLink,
        ] {
            let mut other = good.clone();
            other[i].2 = kind;
            refused(&format!("entry {i} as {kind:?}"), &archive(&other));
        }
        for size in [0, 1, 1 << 40, i64::MAX as u64, u64::MAX] {
            let mut other = good.clone();
            other[i].3 = Some(size);
            refused(&format!("entry {i} of {size} bytes"), &archive(&other));
        }
        let mut other = good.clone();
        other.remove(i);
        refused(&format!("without entry {i}"), &archive(&other));
        let mut other = good.clone();
        other.insert(i, good[i].clone());
        refused(&format!("entry {i} twice"), &archive(&other));
        let mut other = good.clone();
        let at = other[i].1.len() / 2;
        other[i].1[at] ^= 1;
        refused(&format!("a bit of entry {i}"), &archive(&other));
        let mut other = good.clone();
        other.swap(i, (i + 1) % good.len());
        refused(&format!("entry {i} later"), &archive(&other));
    }
    let mut more = good.clone();
    more.push((
        "../escaped".into(),
        b"x".to_vec(),
        tar::EntryType::Regular,
        None,
    ));
    refused("an entry more", &archive(&more));
    refused("no bytes", &[]);
    refused("zeros", &[0; 4096]);
    refused("noise", &[0xa5; 4096]);
    let step = if full() { 1 } else { 97 };
    // The end of an archive is two blocks of zeros, which nobody needs.
    let content = archive(&good).len() - 1024;
    for cut in (0..content).step_by(step) {
        refused(&format!("cut to {cut}"), &whole[..cut.min(whole.len())]);
    }
    count("hostile packed stores refused", n.get());
}
