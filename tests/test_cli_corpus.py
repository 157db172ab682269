"""The command ``corpus``, and how the commands that encode read what is not JSONL."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyprag import Store
from polyprag.cli.corpus import CorpusOptions
from polyprag.corpus import read_corpus

TINY = [
    "--device",
    "cpu",
    "--dtype",
    "fp32",
    "--epochs",
    "1",
    "--pairs",
    "1",
    "--experts",
    "2",
    "--code-dim",
    "4",
]


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    folder = tmp_path / "handbook"
    folder.mkdir()
    (folder / "mill.md").write_text("# The mill\n\nIt stands in Ost. Its wheel is of oak.\n")
    (folder / "fjord.txt").write_text("The fjord is deep. Nobody crosses it.")
    (folder / "logo.png").write_bytes(b"\x89PNG")
    return folder


def test_a_folder_is_shown_without_a_model(run: Callable[..., Any], handbook: Path) -> None:
    code, out, err = run("corpus", handbook, "--chunk", "5", "--chunk-unit", "words", "--show", "1")
    assert code == 0, err
    assert f"{handbook}: 5 documents, all with a title, 18 words" in out
    assert "fjord.txt#chunk=1  fjord\nThe fjord is deep.\n" in out
    assert "chunk=2" not in out, "only the first is shown"
    assert "files of other kinds are left out: 1 .png" in err

    code, out, _ = run("corpus", handbook, "--chunk", "0", "--json")
    found = json.loads(out)
    assert (code, found["documents"], found["unit"]) == (0, 2, "words")
    assert found["left_out"] == {"duplicates": 0, "empty": 0, "files": {".png": 1}}
    assert found["first"][1]["text"].startswith("# The mill")


def test_the_documents_can_be_written_and_read_again(
    run: Callable[..., Any], handbook: Path, tmp_path: Path
) -> None:
    file = tmp_path / "corpus.jsonl"
    assert run("corpus", handbook, "--chunk", "4", "--chunk-unit", "words", "--out", file)[0] == 0
    again = [(d.id, d.title, d.metadata) for d in read_corpus(file)]
    assert again[0] == ("fjord.txt#chunk=1", "fjord", {"source": "fjord.txt", "chunk": 1, "start": 0})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    file.unlink()
    (handbook / "bad.txt").write_bytes(b"\xff")
    code, _, err = run("corpus", handbook, "--chunk", "0", "--out", file)
    assert code != 0
    assert "bad.txt" in err
    assert not file.exists(), "half a corpus is none"


def test_documents_are_written_where_a_link_leads_and_into_a_pipe(
    run: Callable[..., Any], handbook: Path, tmp_path: Path
) -> None:
    target, link, pipe = tmp_path / "target.jsonl", tmp_path / "link.jsonl", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    assert run("corpus", handbook, "--chunk", "0", "--out", link)[0] == 0
    assert link.is_symlink()
    assert [d.id for d in read_corpus(target)] == ["fjord.txt", "mill.md"]

    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert run("corpus", handbook, "--chunk", "0", "--out", pipe)[0] == 0
        assert pipe.is_fifo()
        assert os.read(reader, 1 << 16) == target.read_bytes()
    finally:
        os.close(reader)


def test_a_folder_that_is_not_there_is_named_as_it_was_given(
    run: Callable[..., Any], handbook: Path, tmp_path: Path
) -> None:
    file = tmp_path / "missing" / "corpus.jsonl"
    code, _, err = run("corpus", handbook, "--chunk", "0", "--out", file)
    assert (code, err) == (3, f"Error: {file}: No such file or directory\n")


def test_options_that_do_not_fit(run: Callable[..., Any], handbook: Path) -> None:
    rows = handbook / "rows.jsonl"
    rows.write_text('{"text": "x"}\n')
    for arguments, problem in (
        ([rows, "--chunk-overlap", "3"], "--chunk"),
        ([rows, "--format", "unified", "--chunk", "3"], "--chunk is not for --format unified"),
        ([rows, "--split", "train"], "splits"),
        ([handbook / "logo.png"], "tells no format"),
    ):
        code, out, err = run("corpus", *arguments)
        assert (code != 0, out) == (True, "")
        assert problem in err


def test_what_is_encoded_is_what_was_shown(
    run: Callable[..., Any], handbook: Path, tmp_path: Path, model_folder: Path
) -> None:
    store = tmp_path / "s"
    options = ["--model", model_folder, "--chunk", "30"]  # tokens, which are characters here
    shown = json.loads(run("corpus", handbook, *options, "--json")[1])
    assert (shown["unit"], shown["lengths"]["longest"] <= 30) == ("tokens", True)

    code, out, err = run(
        "encode", handbook, store, *options, *TINY, "--dry-run", "--set", "train.code_lr=0.5"
    )
    assert code == 0, err
    assert f"{shown['documents']} documents" in out
    assert "code_lr = 0.5" in out
    assert not store.exists()
    assert not list(tmp_path.glob("*.work")), "a dry run writes nothing"

    code, _, err = run("encode", handbook, store, *options, *TINY)
    assert code == 0, err
    with Store.open(store) as opened:
        assert len(opened) == shown["documents"]
        (document,) = opened.documents([shown["first"][0]["id"]])
        assert document.text == shown["first"][0]["text"]

    table = tmp_path / "new.parquet"
    pq.write_table(pa.table({"pid": ["n1", "n2"], "body": ["A new bridge.", "Left out."]}), table)
    fields = ["--id-field", "pid", "--text-field", "body", "--limit", "1"]
    code, _, err = run("add", table, store, "--model", model_folder, *TINY[:4], *fields)
    assert code == 0, err
    with Store.open(store) as opened:
        assert "n1" in opened
        assert "n2" not in opened


def test_options_of_a_corpus_as_one_types_them() -> None:
    assert CorpusOptions().as_typed() == ""
    options = CorpusOptions(text_field="the body", metadata=False, limit=2, chunk=0, skip_duplicates=True)
    typed = " --text-field 'the body' --no-metadata --limit 2 --chunk 0 --skip-duplicates"
    assert options.as_typed() == typed
