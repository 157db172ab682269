//! A store through its life: created, added to, replaced, deleted from, reopened.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::*;
use polyprag_core::{
    Document, DocumentId, Dtype, Error, IdType, Kind, OnDuplicate, Recoding, RouteRows, Store,
};

#[test]
fn what_was_committed_is_read_in_another_opening() {
    for codec in ["f32", "f16", "q8", "code(3)"] {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("s.polyprag");
        small(&path, codec);
        let store = Store::open(&path).unwrap();
        assert_eq!(store.len().unwrap(), 5);
        let all: Vec<_> = store.ids().unwrap().map(Result::unwrap).collect();
        assert_eq!(all, ids(&["ada", "dan", "eve", "bob", "fay"]));
        assert!(store.contains(&id("bob")).unwrap() && !store.contains(&id("cyd")).unwrap());

        let documents = store.documents(&ids(&["bob", "eve"])).unwrap();
        assert_eq!(documents[0], passage("bob", "bob moved to the lighthouse"));
        assert_eq!(documents[1], passage("eve", "eve has no house"));

        let hits = store
            .search("Who moved to the LIGHTHOUSE?", 3, None)
            .unwrap();
        assert_eq!((hits[0].id.clone(), hits[0].docno), (id("bob"), 5));
        assert!(store.search("cyd", 10, None).unwrap().is_empty());
        assert!(store.search("?!: \" AND", 10, None).unwrap().is_empty());

        let w = store.routes(&ids(&["fay", "ada"]), Kind::Weights).unwrap();
        assert_eq!(w.shape, [2, GROUPS, EXPERTS]);
        for group in w.data.chunks(EXPERTS) {
            assert!(
                (group.iter().sum::<f32>() - 1.0).abs() < 1e-6 && group.iter().all(|x| *x >= 0.0)
            );
        }
        let report = store.verify().unwrap();
        assert_eq!(report.documents, 5);
        assert_eq!(report.bytes, store.info().unwrap().total_bytes);
    }
}

#[test]
fn routes_come_back_as_they_went_in() {
    let tmp = tempfile::tempdir().unwrap();
    let store = small(&tmp.path().join("a"), "f32");
    let z = store
        .routes(&ids(&["bob", "ada", "bob"]), Kind::Logits)
        .unwrap();
    assert_eq!(
        z.data,
        [route(10, LOGITS), route(0, LOGITS), route(10, LOGITS)].concat()
    );

    let store = small(&tmp.path().join("b"), "code(3)");
    let c = store.routes(&ids(&["ada", "fay"]), Kind::Code).unwrap();
    assert_eq!(c.shape, [2, CODE]);
    for (got, put) in c
        .data
        .iter()
        .zip([route(0, CODE), route(11, CODE)].concat())
    {
        assert!((got - put).abs() < 3.0 / 127.0, "{got} {put}");
    }
}

#[test]
fn a_question_about_a_route_that_is_not_there_says_so() {
    let tmp = tempfile::tempdir().unwrap();
    let store = small(&tmp.path().join("s"), "q8");
    let message = |r: polyprag_core::Result<polyprag_core::RouteArray>| r.unwrap_err().to_string();
    assert!(matches!(
        store.routes(&ids(&["eve"]), Kind::Weights),
        Err(Error::Unrouted { .. })
    ));
    assert!(!store.is_routed(&id("eve")).unwrap() && store.is_routed(&id("bob")).unwrap());
    assert!(message(store.routes(&ids(&["cyd"]), Kind::Weights)).contains("\"cyd\""));
    assert!(matches!(
        store.routes(&[7.into()], Kind::Weights),
        Err(Error::UnknownId { .. })
    ));
    assert!(message(store.routes(&ids(&["ada"]), Kind::Code)).contains("q8"));
    assert!(matches!(
        store.combined_route(&[], None),
        Err(Error::InvalidInput(_))
    ));
    assert!(matches!(
        store.combined_route(&ids(&["ada"]), Some(&[f64::NAN])),
        Err(Error::InvalidInput(_))
    ));
}

#[test]
fn duplicates_are_refused_replaced_or_skipped() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let store = small(&path, "f32");
    let mut writer = store.writer().unwrap();
    let again = || passage("ada", "ada again");
    assert!(matches!(
        add(&mut writer, again(), 1, OnDuplicate::Error),
        Err(Error::DuplicateId { .. })
    ));
    assert_eq!(add(&mut writer, again(), 1, OnDuplicate::Skip).unwrap(), 0);
    assert_eq!(
        writer.commit().unwrap(),
        2,
        "nothing staged, no new generation"
    );
    let twice = [Document::new("new"), Document::new("new")];
    for on in [OnDuplicate::Error, OnDuplicate::Replace] {
        assert!(matches!(
            writer.add(&twice, None, on),
            Err(Error::DuplicateId { .. })
        ));
    }
    assert_eq!(writer.add(&twice, None, OnDuplicate::Skip).unwrap(), 1);
    // Replaced twice within one commit, and one that came and went.
    for seed in [20, 21] {
        assert_eq!(
            add(&mut writer, again(), seed, OnDuplicate::Replace).unwrap(),
            1
        );
    }
    add(
        &mut writer,
        passage("gus", "short life"),
        22,
        OnDuplicate::Error,
    )
    .unwrap();
    assert_eq!(writer.delete(&ids(&["gus", "gus"])).unwrap(), 1);
    assert!(matches!(
        writer.delete(&ids(&["gus"])),
        Err(Error::UnknownId { .. })
    ));
    assert_eq!(writer.commit().unwrap(), 3);
    assert!(store.refresh().unwrap() && !store.refresh().unwrap());
    assert_eq!(store.len().unwrap(), 6);
    assert_eq!(
        store.routes(&ids(&["ada"]), Kind::Logits).unwrap().data,
        route(21, LOGITS)
    );
    assert_eq!(store.search("ada", 9, None).unwrap().len(), 1);
    assert_eq!(store.info().unwrap().unrouted, 2);
    store.verify().unwrap();
}

#[test]
fn a_call_is_staged_whole_or_not_at_all() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, spec("f16"));
    let two = [Document::new("a"), Document::new("b")];
    let shape = [2, GROUPS, EXPERTS];
    let mut data = route(1, 2 * LOGITS);
    for bad in [f32::NAN, f32::INFINITY, 70_000.0] {
        data[LOGITS + 2] = bad;
        let rows = RouteRows {
            shape: &shape,
            data: &data,
        };
        let message = writer
            .add(&two, Some(rows), OnDuplicate::Error)
            .unwrap_err()
            .to_string();
        assert!(message.contains("\"b\""), "{message}");
    }
    data[LOGITS + 2] = 0.0;
    let wrong = RouteRows {
        shape: &[2, EXPERTS, GROUPS],
        data: &data,
    };
    let message = writer
        .add(&two, Some(wrong), OnDuplicate::Error)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("[2, 2, 4]") && message.contains("[2, 4, 2]"),
        "{message}"
    );
    for bad in [
        Document::new(""),
        Document::new("x".repeat(513)),
        Document::new(7),
    ] {
        let call = [Document::new("a"), bad];
        assert!(matches!(
            writer.add(&call, None, OnDuplicate::Error),
            Err(Error::InvalidInput(_))
        ));
    }
    let array = Document::new("m").with_metadata("[1]");
    assert!(matches!(
        writer.add(&[array], None, OnDuplicate::Error),
        Err(Error::InvalidInput(_))
    ));
    let huge = Document::new("h").with_text("x".repeat((16 << 20) + 1));
    assert!(
        writer
            .add(&[huge], None, OnDuplicate::Error)
            .unwrap_err()
            .to_string()
            .contains("16777216")
    );
    writer.commit().unwrap();
    assert_eq!(Store::open(&path).unwrap().len().unwrap(), 0);
}

#[test]
fn integer_ids_and_nothing_kept() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let spec = polyprag_core::StoreSpec {
        id_type: IdType::U64,
        keep_title: false,
        keep_text: false,
        keep_metadata: false,
        ..spec("q8")
    };
    let mut writer = create(&path, spec);
    let numbers: Vec<DocumentId> = [9u64, 3, u64::MAX, 0].map(DocumentId::U64).to_vec();
    let data = route(4, 4 * LOGITS);
    let rows = RouteRows {
        shape: &[4, GROUPS, EXPERTS],
        data: &data,
    };
    assert_eq!(
        writer
            .add_arrays(&numbers, rows, OnDuplicate::Error)
            .unwrap(),
        4
    );
    let seen = Document::new(5).with_text("searchable, not kept \0\u{7}");
    writer.add(&[seen], None, OnDuplicate::Error).unwrap();
    writer.commit().unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(
        store.search("searchable", 1, None).unwrap()[0].id,
        DocumentId::U64(5)
    );
    assert_eq!(store.documents(&[5.into()]).unwrap()[0], Document::new(5));
    let z = store.routes(&numbers, Kind::Logits).unwrap();
    assert!(
        z.data
            .iter()
            .zip(&data)
            .all(|(a, b)| (a - b).abs() < 3.0 / 127.0)
    );
    assert!(!store.contains(&4.into()).unwrap() && !store.contains(&id("5")).unwrap());
    store.verify().unwrap();
}

#[test]
fn scales_are_shared_until_a_route_outgrows_them() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut writer = create(&path, spec("q8"));
    let mut put = |name: &str, size: f32| {
        let data = [[size; LOGITS], [-size; LOGITS]].concat();
        let rows = RouteRows {
            shape: &[2, GROUPS, EXPERTS],
            data: &data,
        };
        let both = [id(name), id(&format!("-{name}"))];
        writer.add_arrays(&both, rows, OnDuplicate::Error).unwrap();
        writer.commit().unwrap();
        let info = Store::open(&path).unwrap().info().unwrap();
        info.parts
            .iter()
            .find(|p| p.role == "scales")
            .unwrap()
            .files
    };
    assert_eq!(
        [put("a", 2.0), put("b", -1.0), put("c", 50.0), put("d", 3.0)],
        [1, 1, 2, 2]
    );
    let store = Store::open(&path).unwrap();
    let z = store
        .routes(&ids(&["a", "b", "c", "d"]), Kind::Logits)
        .unwrap();
    // Half a level: of 127 in 2, then of 127 in 50 and an eighth.
    for (row, (put, bound)) in
        z.data
            .chunks(LOGITS)
            .zip([(2.0, 0.0079), (-1.0, 0.0079), (50.0, 0.222), (3.0, 0.222)])
    {
        assert!(
            row.iter().all(|x: &f32| (x - put).abs() <= bound),
            "{row:?}"
        );
    }
    store.verify().unwrap();
}

#[test]
fn an_empty_store_is_a_store() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    assert_eq!(create(&path, spec("f32")).commit().unwrap(), 1);
    let store = Store::open(&path).unwrap();
    assert!(store.is_empty().unwrap() && store.search("x", 3, None).unwrap().is_empty());
    let info = store.info().unwrap();
    assert_eq!((info.documents, info.bytes_per_document), (0, 0.0));
    // (6 + 5) numbers, 3 modules, rank 2, 4 bytes.
    assert_eq!(info.lora_bytes_per_document, 264);
    store.verify().unwrap();
}

#[test]
fn experts_outlive_their_store() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let store = small(&path, "code(3)");
    let views = store.experts().unwrap();
    let (v, b) = store.decoder().unwrap().unwrap();
    store.close();
    assert!(store.is_closed());
    assert!(matches!(store.experts(), Err(Error::StoreClosed { .. })));
    assert!(matches!(store.refresh(), Err(Error::StoreClosed { .. })));
    std::fs::remove_dir_all(&path).unwrap();
    for (view, (name, shape, data)) in views.iter().zip(expert_data(&spec("f32"))) {
        assert_eq!(
            (&view.raw.name, &view.raw.shape, view.raw.bytes()),
            (&name, &shape, &data[..])
        );
    }
    assert_eq!((v.shape, b.shape), (vec![LOGITS, CODE], vec![LOGITS]));
}

#[test]
fn experts_of_every_dtype() {
    let tmp = tempfile::tempdir().unwrap();
    let spec = spec("f32");
    let data = expert_data(&spec);
    // 3 modules of rank 2: 66 numbers, and for int8 12 scales.
    for (dtype, lora) in [
        (Dtype::F32, 264),
        (Dtype::Bf16, 132),
        (Dtype::F16, 132),
        (Dtype::Int8, 66 + 48),
    ] {
        let path = tmp.path().join(dtype.name());
        let given = tensors(&data);
        let mut writer = Store::create(&path, spec.clone(), &given, None, Some(dtype)).unwrap();
        add(&mut writer, passage("ada", "ada"), 1, OnDuplicate::Error).unwrap();
        writer.commit().unwrap();
        add(&mut writer, passage("bob", "bob"), 2, OnDuplicate::Error).unwrap();
        writer.commit().unwrap();
        let store = Store::open(&path).unwrap();
        assert_eq!(store.expert_dtype().unwrap(), dtype);
        assert_eq!(store.info().unwrap().lora_bytes_per_document, lora);
        store.verify().unwrap();
        for (tensor, (name, shape, raw)) in store.experts().unwrap().iter().zip(&data) {
            assert_eq!((&tensor.raw.name, &tensor.raw.shape), (name, shape));
            assert_eq!(
                (tensor.raw.dtype, tensor.scale.is_some()),
                (dtype, dtype == Dtype::Int8)
            );
            for (x, read) in raw.chunks(4).zip(tensor.to_f32()) {
                let x = f32::from_le_bytes(x.try_into().unwrap());
                // The numbers of the last module end at 2,019.75, of which 8 binary digits are kept.
                assert!((x - read).abs() <= 8.0, "{dtype}: {x} became {read}");
            }
        }
    }
    let mut large = expert_data(&spec);
    large[3].2[..4].copy_from_slice(&(-7e4f32).to_le_bytes());
    let path = tmp.path().join("large");
    let as_f16 = Store::create(
        &path,
        spec.clone(),
        &tensors(&large),
        None,
        Some(Dtype::F16),
    );
    let error = as_f16.unwrap_err().to_string();
    assert!(
        error.contains("\"layers.0.down.B\": -7e4 is too large for float16"),
        "{error}"
    );
    assert!(!path.exists());
    Store::create(&path, spec, &tensors(&large), None, Some(Dtype::Bf16)).unwrap();
}

#[test]
fn a_store_is_recoded_with_experts_of_another_dtype() {
    let tmp = tempfile::tempdir().unwrap();
    let store = small(&tmp.path().join("s"), "f32");
    let data = expert_data(&spec("f32"));
    for dtype in Dtype::ALL {
        let (path, direct) = (tmp.path().join(dtype.name()), tmp.path().join("direct"));
        let recoding = Recoding {
            codec: spec("f32").codec,
            decoder: None,
            expert_dtype: Some(dtype),
        };
        store.recode(&path, &recoding).unwrap();
        let recoded = Store::open(&path).unwrap();
        recoded.verify().unwrap();
        assert_eq!(recoded.expert_dtype().unwrap(), dtype);
        let known = ids(&["ada", "dan", "bob", "fay"]);
        let routes = |s: &Store| s.routes(&known, Kind::Logits).unwrap();
        assert_eq!(routes(&recoded), routes(&store));
        let given = tensors(&data);
        let mut writer = Store::create(&direct, spec("f32"), &given, None, Some(dtype)).unwrap();
        writer.commit().unwrap();
        drop(writer);
        let expected = Store::open(&direct).unwrap().experts().unwrap();
        for (tensor, expected) in recoded.experts().unwrap().iter().zip(&expected) {
            assert_eq!(tensor.raw.bytes(), expected.raw.bytes());
            assert_eq!(tensor.to_f32(), expected.to_f32());
        }
        std::fs::remove_dir_all(&direct).unwrap();
    }
}

#[test]
fn scales_are_not_fitted_to_no_routes() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    let mut writer = create(&at("f32"), spec("f32"));
    let unrouted = passage("eve", "eve has no house");
    writer.add(&[unrouted], None, OnDuplicate::Error).unwrap();
    writer.commit().unwrap();
    drop(writer);
    let recoding = Recoding {
        codec: spec("q8").codec,
        decoder: None,
        expert_dtype: None,
    };
    let store = Store::open(at("f32")).unwrap();
    store.recode(at("q8"), &recoding).unwrap();
    let mut writer = Store::open(at("q8")).unwrap().writer().unwrap();
    // Far from 0: with scales that reach from there, the error is hundreds of times as large.
    let z: Vec<f32> = route(1, 2 * LOGITS).iter().map(|x| 1000.0 + x).collect();
    let rows = RouteRows {
        shape: &[2, GROUPS, EXPERTS],
        data: &z,
    };
    let known = ids(&["ada", "dan"]);
    writer.add_arrays(&known, rows, OnDuplicate::Error).unwrap();
    writer.commit().unwrap();
    let store = Store::open(at("q8")).unwrap();
    store.verify().unwrap();
    let kept = store.routes(&known, Kind::Logits).unwrap();
    for (kept, given) in kept.data.iter().zip(&z) {
        assert!((kept - given).abs() < 3.0 / 127.0, "{kept} {given}");
    }
}

#[test]
fn a_store_that_is_replaced_and_compacted_again_and_again_does_not_grow() {
    const N: u64 = 5_000;
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let spec = polyprag_core::StoreSpec {
        id_type: IdType::U64,
        ..spec("q1")
    };
    let mut writer = create(&path, spec);
    let numbers: Vec<u64> = (0..N).collect();
    let rows = route(1, N as usize * LOGITS);
    let rows = RouteRows {
        shape: &[N as usize, GROUPS, EXPERTS],
        data: &rows,
    };
    let bytes_of_ids = || {
        let info = Store::open(&path).unwrap().info().unwrap();
        let ids = info.parts.iter().find(|part| part.role == "ids");
        ids.unwrap().bytes
    };
    let mut sizes = Vec::new();
    for _ in 0..6 {
        // All are replaced, and some that come after them go again.
        let after: Vec<u64> = (N..2 * N).collect();
        let batch = |ids: &[u64], writer: &mut polyprag_core::Writer| {
            writer.add_arrays(ids, rows, OnDuplicate::Replace).unwrap();
        };
        batch(&numbers, &mut writer);
        batch(&after, &mut writer);
        writer.commit().unwrap();
        let after: Vec<DocumentId> = after.into_iter().map(DocumentId::U64).collect();
        assert_eq!(writer.delete(&after).unwrap() as u64, N);
        writer.commit().unwrap();
        writer.compact().unwrap();
        let store = Store::open(&path).unwrap();
        assert_eq!(store.verify().unwrap().documents, N);
        let all = store.ids().unwrap().map(Result::unwrap);
        assert!(all.eq(numbers.iter().copied().map(DocumentId::U64)));
        sizes.push(bytes_of_ids());
    }
    assert!(sizes.iter().all(|size| *size == sizes[0]), "{sizes:?}");
}

#[test]
fn what_does_not_fit_the_spec_is_refused_at_creation() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let refused = |change: &dyn Fn(&mut polyprag_core::StoreSpec)| {
        let mut s = spec("f32");
        change(&mut s);
        let data = expert_data(&spec("f32"));
        let error = Store::create(&path, s, &tensors(&data), None, None).unwrap_err();
        assert!(matches!(error, Error::InvalidInput(_)), "{error:?}");
        error.to_string()
    };
    assert!(refused(&|s| s.experts = 0).contains("experts"));
    assert!(refused(&|s| s.experts = 65_536).contains("65535"));
    assert!(refused(&|s| s.rank = 3).contains("shape"));
    assert!(refused(&|s| s.alpha = f64::NAN).contains("alpha"));
    assert!(refused(&|s| s.top_k = Some(5)).contains("top_k"));
    assert!(refused(&|s| s.modules[1].group = 7).contains("groups"));
    assert!(refused(&|s| s.modules[1].name = s.modules[0].name.clone()).contains("twice"));
    assert!(refused(&|s| s.modules.truncate(2)).contains("belongs to no module"));
    assert!(refused(&|s| s.codec = "code(3)".parse().unwrap()).contains("decoder"));
    let mut broken = expert_data(&spec("f32"));
    broken[0].2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let error = Store::create(&path, spec("f32"), &tensors(&broken), None, None).unwrap_err();
    assert!(error.to_string().contains("NaN"));
    for codec in [
        "code(64,int8)",
        "sparse(0)",
        "q3",
        "code(0)",
        "code(064)",
        "",
    ] {
        let error = codec
            .parse::<polyprag_core::CodecName>()
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("f32, f16, q8, q4, q2, q1, code(d), code(d,int4), sparse(k)"),
            "{error}"
        );
    }
    assert_eq!(
        std::fs::read_dir(tmp.path()).unwrap().count(),
        0,
        "nothing is left behind"
    );
}

/// Name, shape and bytes of a tensor.
type Given = (String, Vec<usize>, Vec<u8>);

/// What a store keeps of its router, as it was given.
fn kept_router(store: &Store) -> Option<Vec<Given>> {
    let views = store.router().unwrap()?;
    let owned = |t: &polyprag_core::TensorView| {
        assert_eq!(t.dtype, Dtype::F32);
        (t.name.clone(), t.shape.clone(), t.bytes().to_vec())
    };
    Some(views.iter().map(owned).collect())
}

#[test]
fn a_router_lives_as_long_as_its_decoder() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    let given = Some(router_data());
    let store = small(&at("s"), "code(3)");
    assert_eq!(kept_router(&store), given);
    let held = store.router().unwrap().unwrap();
    let part = |store: &Store| {
        let parts = store.info().unwrap().parts;
        parts.into_iter().find(|p| p.role == "router")
    };
    assert_eq!(part(&store).unwrap().files, 1);
    let file = std::fs::metadata(at("s").join("router-00000001.safetensors")).unwrap();
    assert_eq!(part(&store).unwrap().bytes, file.len());

    store.snapshot(at("snapshot")).unwrap();
    store.pack(at("packed")).unwrap();
    Store::unpack(at("packed"), at("unpacked")).unwrap();
    for name in ["snapshot", "unpacked"] {
        assert_eq!(kept_router(&Store::open(at(name)).unwrap()), given);
    }
    let mut writer = store.writer().unwrap();
    writer.compact().unwrap();
    writer.rollback().unwrap();
    writer.delete(&ids(&["ada"])).unwrap();
    writer.commit().unwrap();
    assert!(store.refresh().unwrap());
    assert_eq!(kept_router(&store), given);
    // What was handed out before is still there.
    assert_eq!(held[0].bytes(), router_data()[0].2);
    store.verify().unwrap();

    // A merge takes documents, and leaves the router of the store that takes them.
    let mut other = router_data();
    other[0].2[..4].copy_from_slice(&9f32.to_le_bytes());
    for (name, router) in [("with", Some(&other)), ("without", None)] {
        let (v, b) = Store::open(at("snapshot"))
            .unwrap()
            .decoder()
            .unwrap()
            .unwrap();
        let decoder = polyprag_core::DecoderInput {
            v: v.bytes(),
            v_shape: &v.shape,
            b: b.bytes(),
            b_shape: &b.shape,
        };
        let data = expert_data(&spec("code(3)"));
        let experts = tensors(&data);
        let mut writer =
            Store::create(at(name), spec("code(3)"), &experts, Some(&decoder), None).unwrap();
        if let Some(router) = router {
            writer.keep_router(&tensors(router)).unwrap();
        }
        writer.commit().unwrap();
        let taken = writer.merge(&store, OnDuplicate::Error).unwrap();
        assert_eq!(taken, store.len().unwrap());
        writer.commit().unwrap();
        drop(writer);
        let merged = Store::open(at(name)).unwrap();
        merged.verify().unwrap();
        assert_eq!(kept_router(&merged).as_ref(), router);
    }

    // The same decoder keeps it, another one does not, and neither do routes that are no codes.
    let (v, b) = store.decoder().unwrap().unwrap();
    let bytes_of = |tensor: &polyprag_core::TensorView| tensor.bytes().to_vec();
    let (same, moved) = (bytes_of(&v), {
        let mut bytes = bytes_of(&v);
        bytes[..4].copy_from_slice(&7f32.to_le_bytes());
        bytes
    });
    let project = vec![0.25f32; CODE * LOGITS];
    for (name, codec, decoder, keeps) in [
        ("as it is", "code(3)", None, true),
        ("four bits", "code(3,int4)", None, true),
        ("the decoder again", "code(3)", Some(&same), true),
        ("another decoder", "code(3)", Some(&moved), false),
        ("logits", "f32", None, false),
    ] {
        let decoder = decoder.map(|bytes| {
            let input = polyprag_core::DecoderInput {
                v: bytes,
                v_shape: &v.shape,
                b: b.bytes(),
                b_shape: &b.shape,
            };
            (input, project.as_slice())
        });
        let recoding = Recoding {
            codec: codec.parse().unwrap(),
            decoder,
            expert_dtype: Some(Dtype::F16),
        };
        store.recode(at(name), &recoding).unwrap();
        let recoded = Store::open(at(name)).unwrap();
        recoded.verify().unwrap();
        assert_eq!(
            kept_router(&recoded),
            given.clone().filter(|_| keeps),
            "{name}"
        );
    }
}

#[test]
fn a_router_that_cannot_be_kept_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let refusal = |error: Error| {
        assert!(matches!(error, Error::InvalidInput(_)), "{error:?}");
        error.to_string()
    };
    let mut writer = create(&path, spec("q8"));
    let error = writer.keep_router(&tensors(&router_data())).unwrap_err();
    assert!(refusal(error).contains("q8 keeps no codes"));
    drop(writer);

    let (v, b) = (vec![0; 4 * LOGITS * CODE], vec![0; 4 * LOGITS]);
    let decoder = polyprag_core::DecoderInput {
        v: &v,
        v_shape: &[LOGITS, CODE],
        b: &b,
        b_shape: &[LOGITS],
    };
    let data = expert_data(&spec("code(3)"));
    let experts = tensors(&data);
    let mut writer = Store::create(&path, spec("code(3)"), &experts, Some(&decoder), None).unwrap();
    let one = |name: &str, shape: &[usize]| {
        let n: usize = shape.iter().product();
        (name.to_owned(), shape.to_vec(), vec![0u8; 4 * n])
    };
    let mut refused = |router: &[Given], word: &str| {
        let message = refusal(writer.keep_router(&tensors(router)).unwrap_err());
        assert!(message.contains(word), "{message}");
    };
    refused(&[], "1 to 64 tensors, got 0");
    let many: Vec<_> = (0..65).map(|i| one(&format!("t{i}"), &[1])).collect();
    refused(&many, "got 65");
    for name in ["", "a b", "a/b", "ä", "__metadata__", &"a".repeat(129)] {
        refused(&[one(name, &[1])], "names of 1 to 128");
    }
    for shape in [&[][..], &[1, 1, 1], &[0], &[2, 0]] {
        refused(&[one("a", shape)], "one or two sides");
    }
    refused(&[one("a", &[1]), one("a", &[1])], "twice");
    let mut nan = one("a", &[1]);
    nan.2.copy_from_slice(&f32::NAN.to_le_bytes());
    refused(&[nan], "NaN");
    let mut short = one("a", &[2]);
    short.2.pop();
    refused(&[short], "bytes");
    let f16 = polyprag_core::Tensor {
        name: "a".into(),
        dtype: Dtype::F16,
        shape: vec![1],
        data: &[0, 0],
    };
    assert!(refusal(writer.keep_router(&[f16]).unwrap_err()).contains("float32"));

    // After all these the writer is as good as new; but a store has one router, from the beginning.
    let longest = "a".repeat(128);
    let side = |i: usize| [1 + i, 2];
    let most: Vec<_> = (0..64)
        .map(|i| one(&format!("{}{i:02}", &longest[2..]), &side(i)[i % 2..]))
        .collect();
    writer.keep_router(&tensors(&most)).unwrap();
    let again = writer.keep_router(&tensors(&most)).unwrap_err();
    assert!(refusal(again).contains("given once"));
    writer.commit().unwrap();
    let late = writer.keep_router(&tensors(&most)).unwrap_err();
    assert!(refusal(late).contains("before its first commit"));
    drop(writer);
    let store = Store::open(&path).unwrap();
    assert_eq!(kept_router(&store), Some(most));
    store.verify().unwrap();
}
