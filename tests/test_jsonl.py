from __future__ import annotations

import errno
import gzip
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyprag import jsonl
from polyprag.errors import CorpusError
from polyprag.jsonl import append_lines, read_jsonl, read_resumable, write_atomic, write_jsonl

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_ROWS = st.lists(st.dictionaries(st.text(), _VALUES, max_size=4), max_size=5)


@settings(max_examples=50)
@given(rows=_ROWS)
def test_what_is_written_is_read(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    assert [row for _, row in read_jsonl(path)] == rows
    append_lines(path, rows)
    assert read_resumable(path) == rows + rows


def test_rows_are_compressed_where_the_name_says_so(tmp_path: Path) -> None:
    rows = [{"n": n, "text": "Čapek " * n} for n in range(50)]
    path = tmp_path / "rows.jsonl.gz"
    write_jsonl(path, rows)
    assert [row for _, row in read_jsonl(path)] == rows
    assert path.stat().st_size < 1_000
    first = path.read_bytes()
    write_jsonl(path, rows)
    assert path.read_bytes() == first, "no time is in it"


@settings(max_examples=50)
@given(rows=_ROWS.filter(bool), data=st.data())
def test_a_torn_tail_costs_the_last_row_at_most(
    rows: list[dict[str, Any]], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    append_lines(path, rows)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])

    kept = read_resumable(path)
    assert kept == rows[: len(kept)]
    assert len(kept) >= whole[:cut].count(b"\n")

    append_lines(path, rows[len(kept) :])  # a resumed run ends with the same file
    assert path.read_bytes() == whole
    assert read_resumable(path) == rows


def test_resuming_from_nothing(tmp_path: Path) -> None:
    assert read_resumable(tmp_path / "none.jsonl") == []


def test_damage_that_no_crash_explains_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(CorpusError, match=r"rows\.jsonl, line 2: no valid JSON"):
        read_resumable(path)
    assert path.read_bytes().endswith(b'{"a": 3}\n')


def test_appending_to_a_torn_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"')
    with pytest.raises(CorpusError, match="resume"):
        append_lines(path, [{"a": 2}])


def test_a_full_disk_while_appending_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    append_lines(path, [{"a": 1}])
    before = path.read_bytes()

    def half(stream: Any, data: bytes) -> None:
        stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jsonl, "_write_all", half)
    with pytest.raises(OSError, match="No space left"):
        append_lines(path, [{"a": 2}, {"a": 3}])
    assert path.read_bytes() == before


def test_an_atomic_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_an_atomic_write_follows_links_and_keeps_ordinary_permissions(tmp_path: Path) -> None:
    target, link, plain = tmp_path / "target", tmp_path / "link", tmp_path / "plain"
    target.write_text("old")
    link.symlink_to(target)
    write_atomic(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    plain.write_text("")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_write_into_a_folder_that_is_not_there_names_the_file_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "rows.jsonl"
    with pytest.raises(FileNotFoundError) as raised:
        write_jsonl(path, [{"a": 1}])
    assert raised.value.filename == str(path)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"not json", "no valid JSON"),
        (b"[1, 2]", "found an array"),
        (b"null", "found null"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a": ' + b"[" * 100_000, "no valid JSON"),
        (b'{"a": "\xff"}', "byte 8 of the line is no valid UTF-8"),
        (b"", "the line is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, problem: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(CorpusError, match=r"rows\.jsonl, line 2: ") as caught:
        list(read_jsonl(path))
    assert problem in str(caught.value)


def test_line_ends_marks_and_a_missing_last_end_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": "\xe2\x80\xa8"}\r\n{"a": 2}\r\n\r\n')
    assert list(read_jsonl(path)) == [(1, {"a": "\u2028"}), (2, {"a": 2})]
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert len(list(read_jsonl(path))) == 2


def test_a_long_line_is_refused_before_it_fills_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"a": "x" * 5000}).encode()))
    with pytest.raises(CorpusError, match="line 1: the line is longer than 1000 bytes"):
        list(read_jsonl(path, max_line_bytes=1000))


def test_utf16_and_damaged_gzip_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n', encoding="utf-16")
    with pytest.raises(CorpusError, match="UTF-16"):
        list(read_jsonl(path))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-12])
    with pytest.raises(CorpusError, match="gzip data is damaged"):
        list(read_jsonl(packed))
    packed.write_bytes(b'{"a": 1}\n')
    with pytest.raises(CorpusError, match="gzip data is damaged"):
        list(read_jsonl(packed))
