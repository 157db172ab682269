//! Many readers and one writer over the same store.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use common::*;
use polyprag_core::{Error, Kind, OnDuplicate, Store};

#[test]
fn nothing_is_at_the_path_before_the_first_commit() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let entries = || fs::read_dir(tmp.path()).unwrap().count();
    let mut writer = create(&path, spec("f32"));
    add(&mut writer, passage("ada", "text"), 0, OnDuplicate::Error).unwrap();
    assert!(!path.exists());
    writer.discard();
    assert_eq!(entries(), 0);
    assert!(matches!(writer.commit(), Err(Error::StoreClosed { .. })));

    let mut writer = create(&path, spec("f32"));
    writer.commit().unwrap();
    add(
        &mut writer,
        passage("ada", "a harbour"),
        0,
        OnDuplicate::Error,
    )
    .unwrap();
    assert_eq!(
        writer.commit().unwrap(),
        2,
        "the writer goes on where the store is now"
    );
    drop(writer);
    assert_eq!(entries(), 1);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.search("harbour", 1, None).unwrap().len(), 1);

    let data = expert_data(&spec("f32"));
    let error = Store::create(&path, spec("f32"), &tensors(&data), None, None).unwrap_err();
    assert_eq!(error.io_kind(), Some(std::io::ErrorKind::AlreadyExists));
}

#[test]
fn a_path_taken_meanwhile_is_left_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let mut first = create(&path, spec("f32"));
    let mut second = create(&path, spec("f32"));
    first.commit().unwrap();
    let error = second.commit().unwrap_err();
    assert_eq!(
        error.io_kind(),
        Some(std::io::ErrorKind::AlreadyExists),
        "{error}"
    );
    assert!(matches!(second.commit(), Err(Error::StoreClosed { .. })));
    drop((first, second));
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    Store::open(&path).unwrap().verify().unwrap();
}

#[test]
fn a_failed_commit_leaves_the_generation_before_it_in_force() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let store = small(&path, "q8");
    let before = files(&path);
    let mut writer = store.writer().unwrap();
    add(
        &mut writer,
        passage("gus", "gus is new"),
        1,
        OnDuplicate::Error,
    )
    .unwrap();
    // The last step, the swap of CURRENT, cannot be done.
    fs::create_dir(path.join("CURRENT.new")).unwrap();
    assert!(matches!(writer.commit(), Err(Error::Io { .. })));
    let again = writer.commit().unwrap_err();
    assert!(
        matches!(again, Error::StoreClosed { .. }) && again.to_string().contains("failed before"),
        "{again}"
    );
    drop(writer);
    fs::remove_dir(path.join("CURRENT.new")).unwrap();
    assert!(!store.refresh().unwrap());
    Store::open(&path).unwrap().verify().unwrap();

    // The next writer clears away what was left, and goes on.
    let mut writer = store.writer().unwrap();
    assert_eq!(files(&path), before);
    add(
        &mut writer,
        passage("gus", "gus is new"),
        1,
        OnDuplicate::Error,
    )
    .unwrap();
    writer.commit().unwrap();
    assert!(store.refresh().unwrap() && store.contains(&id("gus")).unwrap());
    store.verify().unwrap();
}

#[test]
fn a_second_writer_is_told_who_the_first_is() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let store = small(&path, "q8");
    let first = store.writer().unwrap();
    let error = store.writer().unwrap_err();
    assert!(matches!(error, Error::StoreLocked { .. }));
    assert!(
        error
            .to_string()
            .contains(&format!("process {}", std::process::id())),
        "{error}"
    );
    drop(first);
    store.writer().unwrap();
}

#[test]
fn a_reader_keeps_its_generation_until_it_refreshes() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let store = small(&path, "q8");
    let before = store.routes(&ids(&["ada", "bob"]), Kind::Weights).unwrap();
    let mut writer = store.writer().unwrap();
    for seed in 0..4 {
        add(
            &mut writer,
            passage("bob", "bob moved on"),
            seed,
            OnDuplicate::Replace,
        )
        .unwrap();
        writer.commit().unwrap();
    }
    // Its parts are still there: the clean-up passes over what is read.
    assert_eq!(store.generation().unwrap(), 2);
    assert_eq!(
        store.routes(&ids(&["ada", "bob"]), Kind::Weights).unwrap(),
        before
    );
    assert_eq!(
        store.search("lighthouse", 1, None).unwrap()[0].id,
        id("bob")
    );
    store.verify().unwrap();

    assert!(store.refresh().unwrap());
    assert_eq!(store.generation().unwrap(), 6);
    assert!(store.search("lighthouse", 1, None).unwrap().is_empty());
    store.verify().unwrap();

    // With nobody reading it, generation 2 goes; 5 and the newest stay.
    add(
        &mut writer,
        passage("bob", "bob stays"),
        9,
        OnDuplicate::Replace,
    )
    .unwrap();
    writer.commit().unwrap();
    let manifests: Vec<_> = files(&path)
        .into_iter()
        .filter(|n| n.starts_with("manifest"))
        .collect();
    assert_eq!(
        manifests,
        ["manifest-00000006.json", "manifest-00000007.json"]
    );
    store.refresh().unwrap();
    store.verify().unwrap();
}

#[test]
fn a_directory_without_write_permission_is_read() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    small(&path, "q8");
    let mode = |folder: u32, file: u32| {
        for name in files(&path) {
            fs::set_permissions(path.join(name), fs::Permissions::from_mode(file)).unwrap();
        }
        for dir in [path.join("bm25"), path.clone()] {
            fs::set_permissions(dir, fs::Permissions::from_mode(folder)).unwrap();
        }
    };
    mode(0o555, 0o444);
    let store = Store::open(&path).unwrap();
    assert_eq!(store.search("lighthouse", 1, None).unwrap().len(), 1);
    store.verify().unwrap();
    if !rustix::process::geteuid().is_root() {
        let kind = store.writer().unwrap_err().io_kind();
        assert_eq!(kind, Some(std::io::ErrorKind::PermissionDenied));
    }
    mode(0o755, 0o644);
}

#[test]
fn threads_read_while_a_writer_commits() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let store = small(&path, "code(3)");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    store.refresh().unwrap();
                    // Whatever generation it is, index, ids and routes are of one.
                    for hit in store.search("bob", 3, None).unwrap() {
                        assert_eq!(hit.id, id("bob"));
                    }
                    store.routes(&ids(&["bob"]), Kind::Weights).unwrap();
                    Store::open(&path)
                        .unwrap()
                        .documents(&ids(&["bob"]))
                        .unwrap();
                }
            });
        }
        let mut writer = store.writer().unwrap();
        for seed in 0..15 {
            add(
                &mut writer,
                passage("bob", "bob moved on"),
                seed,
                OnDuplicate::Replace,
            )
            .unwrap();
            writer.commit().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    store.refresh().unwrap();
    store.verify().unwrap();
}

#[test]
fn a_killed_creator_leaves_nothing_for_long() {
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("s");
    let abandoned = tmp.path().join(".s.tmp-1-abc");
    fs::create_dir(&abandoned).unwrap();
    fs::write(abandoned.join("LOCK"), "1 host 5\n").unwrap();
    let held = create(&path, spec("f32"));
    assert!(!abandoned.exists());
    let other = create(&path, spec("f32"));
    assert_eq!(
        fs::read_dir(tmp.path()).unwrap().count(),
        2,
        "those at work stay"
    );
    drop((held, other));
}
