"""What holds for the whole command line: exit codes, configuration, completion, colours, what is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polyprag import Document, Store, errors, extras
from polyprag.cli import app, doctor
from polyprag.cli.exits import ExitCode, exit_code
from polyprag.extras import remedied

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
EXTRAS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]


# --- exit codes -------------------------------------------------------------------------------------


def test_every_error_of_polyprag_has_a_code_of_its_own_meaning() -> None:
    def leaves(kind: type[errors.PolypragError]) -> list[type[errors.PolypragError]]:
        return [kind, *(leaf for below in kind.__subclasses__() for leaf in leaves(below))]

    kinds = [kind for kind in leaves(errors.PolypragError) if kind is not errors.PolypragError]
    codes = {kind.__name__: exit_code(kind("x")) for kind in kinds}
    assert ExitCode.FAILED not in codes.values(), codes
    assert codes["StoreLocked"] == ExitCode.LOCKED
    assert codes["CorruptIndex"] == codes["NotAStore"] == ExitCode.STORE
    assert codes["UnknownId"] == codes["CorpusError"] == ExitCode.INPUT
    assert exit_code(OSError(28, "No space left on device")) == ExitCode.FAILED
    assert exit_code(FileNotFoundError(2, "x")) == ExitCode.INPUT
    assert exit_code(ImportError("x")) == ExitCode.MISSING


def test_the_exit_codes_are_documented(run: Callable[..., Any]) -> None:
    table = (REPOSITORY / "docs" / "cli-guide.md").read_text()
    rows = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert rows == set(map(int, ExitCode))
    shown = " ".join(run("--help")[1].split())
    assert all(re.search(rf"\b{int(code)} \w", shown) for code in ExitCode)


def test_a_reader_that_has_had_enough_gets_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "A mill."}\n')
    for more in ("", "--json"):
        command = f'"{sys.executable}" -m polyprag corpus "{tmp_path}/c.jsonl" {more} | true'
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        assert (done.stdout, done.stderr) == ("", "")


# --- a configuration file ---------------------------------------------------------------------------


@pytest.fixture
def encoding(tmp_path: Path, model_folder: Path) -> Path:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "A mill."}\n{"id": "b", "text": "A fjord."}\n')
    file = tmp_path / "encode.toml"
    file.write_text(
        f"""
corpus = {json.dumps(str(tmp_path / "c.jsonl"))}
store = {json.dumps(str(tmp_path / "s"))}
model = {json.dumps(str(model_folder))}
experts = 3
code-dim = 4
epochs = 1
pairs = 1
device = "cpu"
targets = ["up_proj"]

[train]
code_lr = 0.5
"""
    )
    return file


def plan(out: str) -> dict[str, Any]:
    return json.loads(out)["recipe"]


def test_a_file_holds_all_options(run: Callable[..., Any], encoding: Path) -> None:
    code, out, err = run("encode", "--config", encoding, "--dry-run", "--json")
    assert code == 0, err
    train = plan(out)["train"]
    assert (train["experts"], train["code_dim"], train["code_lr"], train["targets"]) == (
        3,
        4,
        0.5,
        ["up_proj"],
    )
    code, out, _ = run(
        "encode", "--config", encoding, "--dry-run", "--json", "--experts", "5", "--set", "train.code_lr=0.1"
    )
    train = plan(out)["train"]
    assert (train["experts"], train["code_dim"], train["code_lr"]) == (5, 4, 0.1), "what is typed goes first"

    code, out, err = run("encode", "--config", encoding, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["documents"], found["experts"], found["codec"]) == (2, 3, "code(4,int4)")
    with Store.open(found["store"]) as store:
        assert {module.name.rpartition(".")[2] for module in store.spec.modules} == {"up_proj"}


def test_what_a_dry_run_prints_is_a_configuration(
    run: Callable[..., Any], encoding: Path, tmp_path: Path
) -> None:
    shown = run("encode", "--config", encoding, "--dry-run", "--seed", "7")[1]
    tables = shown[shown.index("\n[") :]
    again = tmp_path / "again.toml"
    options = encoding.read_text().split("[train]")[0]
    again.write_text(options + tables)
    first = plan(run("encode", "--config", encoding, "--dry-run", "--seed", "7", "--json")[1])
    second = plan(run("encode", "--config", again, "--dry-run", "--json")[1])
    assert first == second


@pytest.mark.parametrize(
    ("change", "line", "problem"),
    [
        ("epoch = 2", 2, "there is no option 'epoch'; did you mean 'epochs'?"),
        ("config = 'x'", 2, "there is no option 'config'"),
        ("epochs = [1]", 2, "'epochs' takes one value"),
        ("targets = 'up_proj'", 2, "'targets' takes a list"),
        ("epochs = ", None, "no valid TOML"),
        ("[train]\ncode_lrr = 1", None, "did you mean 'code_lr'?"),
        ("[trian]\ncode_lr = 1", None, "did you mean 'train'?"),
        ("[train]\ncode_lr = 'fast'", None, "expected a value like"),
    ],
)
def test_what_does_not_belong_is_refused(
    run: Callable[..., Any], tmp_path: Path, change: str, line: int | None, problem: str
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "A mill."}\n')
    file = tmp_path / "encode.toml"
    file.write_text(f"seed = 1\n{change}\n")
    code, out, err = run("encode", corpus, tmp_path / "s", "--dry-run", "--config", file)
    assert (code, out) == (ExitCode.INPUT, "")
    assert f"Error: {file}" + (f", line {line}: " if line else ": ") in err
    assert problem in err


def test_a_configuration_may_begin_with_a_byte_order_mark(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "A mill."}\n')
    file = tmp_path / "encode.toml"
    file.write_text("experts = 3\n", encoding="utf-8-sig")
    command = ["encode", tmp_path / "c.jsonl", tmp_path / "s", "--dry-run", "--json", "--config", file]
    code, out, err = run(*command)
    assert code == 0, err
    assert plan(out)["train"]["experts"] == 3
    file.write_text("seed = 1\nepoch = 2\n", encoding="utf-8-sig")
    assert f"{file}, line 2: there is no option 'epoch'" in run(*command)[2]


def test_a_configuration_that_is_not_there(run: Callable[..., Any], tmp_path: Path) -> None:
    code, _, err = run("encode", "c", "s", "--config", tmp_path / "none.toml")
    assert code == ExitCode.INPUT
    assert str(tmp_path / "none.toml") in err


# --- the doctor -------------------------------------------------------------------------------------


def findings(out: str) -> dict[str, dict[str, Any]]:
    return {found["name"]: found for found in json.loads(out)["findings"]}


def test_the_doctor(run: Callable[..., Any], make_store: Callable[..., Path], tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", [Document("a", "x")])
    code, out, err = run("doctor", store, "--json")
    assert (code, err) == (0, "")
    found = findings(out)
    assert found["Python"]["detail"].startswith(".".join(map(str, sys.version_info[:3])))
    assert found["CPU"]["state"] == "ok"
    assert found[f"store {store}"] == {
        "name": f"store {store}",
        "state": "note",
        "detail": "1 document, base model tiny: it is not cached here",
        "remedy": "name its folder or file with --model",
    }
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "none"):
        code, out, _ = run("doctor", path)
        assert code == run("verify", path)[0] != ExitCode.MISSING
    assert f"✗ store {tmp_path / 'none'}: " in out


def test_the_doctor_where_torch_is_missing(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    find = doctor._there
    monkeypatch.setattr(doctor, "_there", lambda name: name != "torch" and find(name))
    monkeypatch.setattr(
        "importlib.metadata.requires",
        lambda _: ["numpy>=1", "nowhere>=2; extra == 'corpus'", "pip; extra == 'cli'"],
    )
    code, out, _ = run("doctor", "--json")
    assert code == ExitCode.MISSING
    found = findings(out)
    assert "polyprag[train]" in found["encoding and asking"]["remedy"]
    corpus = next(found[name] for name in found if name.startswith("extra corpus"))
    assert (corpus["state"], corpus["detail"]) == ("note", "not here: nowhere>=2")
    assert corpus["remedy"] == "pip install 'polyprag[corpus]'"
    assert next(found[name] for name in found if name.startswith("extra cli"))["state"] == "ok"


def test_the_doctor_reads_our_markers_without_packaging() -> None:
    from packaging.markers import Marker

    texts = [text for extra in EXTRAS.values() for text in extra if ";" in text]
    assert texts
    for text in texts:
        marker = text.partition(";")[2]
        for said in (marker, marker.replace("python_version", "python_full_version")):  # as maturin writes it
            assert doctor._applies(f"extra == 'x' and {said}") == Marker(said).evaluate(), text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "polyprag[train]' (without a GPU"),
        (
            ModuleNotFoundError("x", name="starlette.routing"),
            "package starlette is not installed: pip install",
        ),
        (ImportError("cannot import name 'y'", name="transformers"), "cannot import name 'y'; pip install"),
        (ModuleNotFoundError("No module named 'z'", name="z"), "'z'; pip install 'polyprag[all]'"),
        (ImportError("PDF files need pypdf: pip install 'p'"), "PDF files need pypdf: pip install 'p'"),
    ],
)
def test_what_is_said_of_a_missing_package(error: ImportError, said: str) -> None:
    assert said in remedied(error)


def test_every_package_of_which_that_is_said_is_in_its_extra() -> None:
    brought = {name: " ".join(packages).replace("-", "_") for name, packages in EXTRAS.items()}
    within = {"anyio": "starlette", "tokenizers": "transformers", "huggingface_hub": "transformers"}
    for package, extra in extras._EXTRA_OF.items():
        assert within.get(package, package) in brought[extra], package


def test_what_needs_torch_says_how_to_install_it() -> None:
    missing = "import sys; sys.modules['torch'] = None"
    code = f"{missing}; import polyprag; print('Engine' in dir(polyprag)); polyprag.Engine"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n"
    assert "polyprag.Engine: the package torch is not installed: pip install 'polyprag[train]'" in done.stderr


def test_looking_at_a_corpus_in_words_needs_no_model(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Mill\n\nA mill.\n")
    code, _, err = run("corpus", tmp_path / "a.md", "--model", tmp_path / "none")
    assert code == ExitCode.MISSING
    assert "with --chunk-unit words this command needs no model" in " ".join(err.split())
    assert run("corpus", tmp_path / "a.md", "--chunk-unit", "words")[0] == 0


# --- without, and around ----------------------------------------------------------------------------


def test_without_typer_one_line_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-m", "polyprag", "--version"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (ExitCode.MISSING, "")
    assert done.stderr == "Error: the command line needs the package typer: pip install 'polyprag[cli]'\n"


def test_the_shell_completes_commands_and_options() -> None:
    def complete(words: str) -> list[str]:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.argv = ['polyprag']; from polyprag.__main__ import main; main()",
            ],
            env={
                **os.environ,
                "_POLYPRAG_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.split()

    assert complete("polyprag enc") == ["encode"]


def test_every_command_has_examples_and_speaks_to_machines(run: Callable[..., Any]) -> None:
    import typer.main

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, command in commands.items():
        assert any("--json" in parameter.opts for parameter in command.params), name
        assert f"Example: `polyprag {name}" in command.help, name


def test_a_store_needs_numpy_alone_and_that_only_for_arrays(
    make_store: Callable[..., Path], tmp_path: Path
) -> None:
    store = make_store(tmp_path / "s", [Document("a", "The mill.")])
    code = """
import sys
known = set(sys.modules)
def new():
    names = {name.partition(".")[0] for name in set(sys.modules) - known}
    return names - set(sys.stdlib_module_names) - {"polyprag"}
import polyprag
assert new() == set(), new()
with polyprag.Store.open(sys.argv[1]) as store:
    (hit,) = store.search("mill")
    assert new() == set(), new()
    store.combined_route([hit.id])
    store.documents([hit.id]), store.info(), store.verify()
assert new() == {"numpy"}, new()
"""
    subprocess.run([sys.executable, "-c", code, str(store)], check=True)
