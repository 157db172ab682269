"""Long calls into the core say how far they are, and end where they are told to."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from polyprag import Document, Store, Writer, errors
from polyprag.progress import Bars, WorkBar
from test_store import make_experts, make_logits, make_spec

Report = Callable[[int, int], object]
N = 3_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "island.polyprag"
    texts = [f"The {i}th net of Saltmarket, and {i % 7} drums" for i in range(N)]
    with Store.create(path, make_spec(codec="q8"), make_experts()) as writer:
        writer.add([Document(f"d{i}", text) for i, text in enumerate(texts)], make_logits(N))
    with Store.open(path).writer() as writer:
        writer.delete([f"d{i}" for i in range(0, N, 10)])
    Store.open(path).pack(tmp_path / "packed")
    Store.open(path).snapshot(tmp_path / "other")
    return path


def verify(path: Path, progress: Report | None) -> None:
    assert Store.open(path).verify(progress=progress).documents == N * 9 // 10


def search_many(path: Path, progress: Report | None) -> None:
    found = Store.open(path).search_many([f"net {i}" for i in range(500)], 3, progress=progress)
    assert len(found) == 500


def snapshot(path: Path, progress: Report | None) -> None:
    Store.open(path).snapshot(path.parent / "new", progress=progress)
    assert Store.open(path.parent / "new").digest() == Store.open(path).digest()


def pack(path: Path, progress: Report | None) -> None:
    Store.open(path).pack(path.parent / "new", progress=progress)
    assert (path.parent / "new").read_bytes() == (path.parent / "packed").read_bytes()


def unpack(path: Path, progress: Report | None) -> None:
    Store.unpack(path.parent / "packed", path.parent / "new", progress=progress)
    assert Store.open(path.parent / "new").digest() == Store.open(path).digest()


def recode(path: Path, progress: Report | None) -> None:
    Store.open(path).recode(path.parent / "new", codec="q4", progress=progress)
    assert Store.open(path.parent / "new").spec.codec == "q4"


def changing(
    change: Callable[[Writer, Report | None, Path], object],
) -> Callable[[Path, Report | None], None]:
    def work(path: Path, progress: Report | None) -> None:
        with Store.open(path).writer() as writer:
            change(writer, progress, path)

    return work


def commit(writer: Writer, progress: Report | None, path: Path) -> None:
    # Nothing but the call that is asked about calls back.
    ids = np.array([f"d{i}" for i in range(N)])
    writer.add_arrays(ids, make_logits(N, seed=2), on_duplicate="replace")
    writer.commit(progress=progress)


NEW = [Document(f"n{i}", f"drum {i}") for i in range(2_000)]
CHANGES: dict[str, Callable[[Writer, Report | None, Path], object]] = {
    "add": lambda writer, progress, path: writer.add(NEW, progress=progress),
    "add_arrays": lambda writer, progress, path: writer.add_arrays(
        [f"n{i}" for i in range(2_000)], make_logits(2_000), progress=progress
    ),
    "delete": lambda writer, progress, path: writer.delete([f"d{i}" for i in range(1, 9)], progress=progress),
    "merge": lambda writer, progress, path: writer.merge(
        Store.open(path.parent / "other"), on_duplicate="replace", progress=progress
    ),
    "commit": commit,
    "compact": lambda writer, progress, path: writer.compact(progress=progress),
    "reindex": lambda writer, progress, path: writer.reindex(progress=progress),
}
WORK: dict[str, Callable[[Path, Report | None], None]] = {
    "verify": verify,
    "search_many": search_many,
    "snapshot": snapshot,
    "pack": pack,
    "unpack": unpack,
    "recode": recode,
    **{name: changing(change) for name, change in CHANGES.items()},
}


def files(folder: Path) -> set[Path]:
    return {found for found in folder.rglob("*") if found.name != "LOCK"}


@pytest.mark.parametrize("name", WORK)
def test_progress_goes_up_to_the_total(name: str, path: Path) -> None:
    heard: list[tuple[int, int]] = []
    threads = set()

    def progress(done: int, total: int) -> None:
        heard.append((done, total))
        threads.add(threading.get_ident())

    WORK[name](path, progress)
    assert threads == {threading.get_ident()}
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    totals = {total for _, total in heard if total or name != "unpack"}
    assert totals == {heard[-1][0]}
    assert heard[0][0] == 0


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("end", ["first", "last"])
def test_what_progress_raises_ends_the_call(name: str, end: str, path: Path) -> None:
    class Enough(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if end == "first" or done == total > 0:
            raise Enough(name)

    before, digest = files(path.parent), Store.open(path).digest()
    with pytest.raises(Enough, match=name):
        WORK[name](path, progress)
    assert files(path.parent) == before
    assert Store.open(path).digest() == digest
    WORK[name](path, None)
    Store.open(path).verify()


@pytest.mark.parametrize("name", WORK)
def test_ctrl_c_within_a_call(name: str, path: Path) -> None:
    before, digest = files(path.parent), Store.open(path).digest()
    with pytest.raises(KeyboardInterrupt):
        WORK[name](path, lambda done, total: os.kill(os.getpid(), signal.SIGINT))
    assert files(path.parent) == before
    assert Store.open(path).digest() == digest


@pytest.mark.parametrize("begun", [True, False])
def test_ctrl_c_without_progress(begun: bool, path: Path, tmp_path: Path) -> None:
    """The child waits for the rest of a file that never comes, or for somebody who writes it."""
    whole = (tmp_path / "packed").read_bytes()
    pipe, new = tmp_path / "pipe", tmp_path / "new"
    os.mkfifo(pipe)
    code = """
        import signal, sys
        from polyprag import Store
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("waiting", flush=True)
        try:
            Store.unpack(*sys.argv[1:])
        except KeyboardInterrupt:
            print("stopped")
    """
    before = files(tmp_path)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(pipe), str(new)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    if begun:
        with pipe.open("wb", buffering=0) as end:  # as soon as the child has it open
            end.write(whole[: len(whole) // 2])
            child.send_signal(signal.SIGINT)
            out, _ = child.communicate(timeout=300)
    else:
        time.sleep(1)
        child.send_signal(signal.SIGINT)
        out, _ = child.communicate(timeout=60)
    assert (out, child.returncode) == ("stopped\n", 0)
    assert files(tmp_path) == before


def test_another_thread_is_told_there_and_hears_no_signal(path: Path) -> None:
    heard: list[tuple[int, int, int]] = []

    def work() -> None:
        verify(path, lambda done, total: heard.append((done, total, threading.get_ident())))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert {ident for *_, ident in heard} == {thread.ident}
    assert heard[-1][0] == heard[-1][1] > 0


@pytest.mark.parametrize("progress", [1, "bar", []])
def test_progress_must_be_callable(progress: Any, path: Path) -> None:
    with Store.open(path) as store, store.writer() as writer:
        for call in (
            lambda: store.verify(progress=progress),
            lambda: store.snapshot(path.parent / "new", progress=progress),
            lambda: writer.compact(progress=progress),
        ):
            with pytest.raises(errors.InvalidInput, match="progress: expected a callable or None"):
                call()
        assert writer.commit() == 2


def test_the_writer_is_not_called_by_what_it_calls(path: Path) -> None:
    refused = []

    def progress(done: int, total: int) -> None:
        assert "open" in repr(writer)
        for call in (writer.commit, writer.discard, lambda: writer.delete(["d1"])):
            with pytest.raises(errors.InvalidInput, match="the writer is at work"):
                call()
            refused.append(done)

    with Store.open(path).writer() as writer:
        assert writer.compact(progress=progress) == 3
        assert writer.delete(["d1"]) == 1
    assert refused
    assert Store.open(path).generation == 4


def test_a_writer_that_was_stopped_is_closed(path: Path) -> None:
    def progress(done: int, total: int) -> None:
        if done:
            raise ZeroDivisionError

    writer = Store.open(path).writer()
    with pytest.raises(ZeroDivisionError):
        writer.compact(progress=progress)
    with pytest.raises(errors.StoreClosed, match="as was asked"):
        writer.commit()
    assert Store.open(path).writer().compact() == 3


def test_a_log_gets_a_line_a_tenth() -> None:
    out = io.StringIO()
    with Bars(Console(file=out)) as bars:
        for done in range(0, 41, 2):
            bars.augmenting(done, 40)
        bars.reading(7, 7)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["Augmenting: 4 of 40 documents", "Augmenting: 8 of 40 documents"]
    assert lines[9:] == ["Augmenting: 40 of 40 documents", "Reading: 7 of 7 documents"]
    with Bars(Console(file=out), shown=False) as bars:
        bars.reading(1, 1)
    assert len(out.getvalue().splitlines()) == 11


def test_a_log_tells_of_a_second_work_as_of_the_first() -> None:
    out = io.StringIO()
    with Bars(Console(file=out)) as bars:
        for done in (5, 10, 1, 2, 20):
            bars.reading(done, 10 if done < 20 else 20)
    lines = [line.removesuffix(" documents") for line in out.getvalue().splitlines()]
    assert lines == [f"Reading: {done}" for done in ("5 of 10", "10 of 10", "1 of 10", "2 of 10", "20 of 20")]


def test_a_bar_is_drawn_on_a_terminal_alone(path: Path) -> None:
    def drawn(terminal: bool, shown: bool = True) -> str:
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=100)
        with WorkBar(console, "Looking", shown=shown) as bar:
            bar.step("at [everything]")
            verify(path, bar)
        return file.getvalue()

    assert drawn(terminal=False) == drawn(terminal=True, shown=False) == ""
    for words in ("Looking", "100%", "at [everything]"):
        assert words in drawn(terminal=True)
