"""The pages say what is so: their code runs, their commands exist, their messages are ones that are said."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import polyprag
from polyprag import Document, Store, export_peft
from polyprag.cli import app
from polyprag.evaluation.data import Question
from polyprag.models import BaseModel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
# cli.md is made from the commands themselves.
PAGES = [REPOSITORY / "README.md", *sorted(p for p in DOCS.glob("*.md") if p.name != "cli.md")]
# Programs that the pages name beside ours.
OTHERS = {"pip", "make", "vllm", "torchrun", "python"}


# They end at Ctrl-C alone, depend on the machine, or need what others made.
NOT_RUN = {"serve", "explore", "doctor", "import"}


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        if (page.name, language) == ("serve.md", "python"):
            continue  # test_serve.py, which has a server for it
        for number, match in enumerate(
            re.finditer(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE), 1
        ):
            if match[1] == language:
                found.append(pytest.param(page, match[2], id=f"{page.name}-{number}"))
    return found


@pytest.fixture(scope="module")
def made(
    make_store: Callable[..., Path], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what the examples name."""
    folder = tmp_path_factory.mktemp("docs")
    documents = [
        Document("amber", "The Amber Mill stands in Ost. It was built in 1850.", "Amber Mill"),
        Document("Q7259", "Ada Lovelace was born in London.", "Ada Lovelace"),
        Document("Q11571", "Cristiano Ronaldo was born in Funchal.", "Cristiano Ronaldo"),
        Document("ilsabet", "Ilsabet Corrow was born in Druskin.", "Ilsabet Corrow"),
    ]
    (folder / "demo").mkdir()
    shutil.copytree(make_store(folder / "wiki.polyprag", documents), folder / "demo" / "island.polyprag")
    (folder / "adapters").mkdir()
    export_peft(folder / "wiki.polyprag", ["Q7259"], folder / "adapters" / "ada")
    shutil.copytree(model_folder, folder / "org" / "base-model")
    (folder / "docs").mkdir()
    (folder / "docs" / "mill.md").write_text("# Mill\n\nThe Amber Mill stands in Ost. It is old.\n")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: BaseModel) -> Path:
    """Inside of it; the tiny base model stands in for the one that a store names."""
    monkeypatch.chdir(made)
    for module in ("engine", "exporting"):
        monkeypatch.setattr(f"polyprag.{module}.base_model_of", lambda *_, **__: tiny_base)
    return made


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's
@pytest.mark.parametrize(("page", "code"), blocks("python"))
def test_python_runs(page: Path, code: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in re.findall(r"integrations\.(\w+)", code):
        pytest.importorskip(
            {"langchain": "langchain_core", "llama_index": "llama_index.core"}.get(package, package)
        )
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, page.name, "exec"), names)  # noqa: S102 - our own pages
    if "class Mine" in code:
        with Store.open("wiki.polyprag") as store:
            assert names["Mine"](store).answer([Question("1", "Where was Ada born?", ("London",))]) == [
                "Ada Lovelace"
            ]
    else:
        assert capsys.readouterr().out.strip(), "an example shows something"


@pytest.mark.parametrize(("page", "text"), blocks("toml"))
def test_toml_is_a_configuration(
    page: Path, text: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tomllib.loads(text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "handbook").mkdir()
    (tmp_path / "handbook" / "a.md").write_text("# Mill\n\nThe mill stands in Ost.\n")
    (tmp_path / "encode.toml").write_text(text)
    code, _, err = run("encode", "--config", "encode.toml", "--dry-run")
    assert code == 0, err


@pytest.mark.parametrize(("page", "text"), blocks("json"))
def test_json_is_json(page: Path, text: str) -> None:
    for line in filter(str.strip, [text] if page.name != "index.md" else text.splitlines()):
        json.loads(line)


@pytest.mark.parametrize(("page", "text"), blocks("console"))
def test_commands_are_ones_that_there_are(page: Path, text: str) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    joined = text.replace("\\\n", " ")
    lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    assert lines, "a console block shows a command"
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] != "polyprag":
            assert words[0] in OTHERS, line
            continue
        assert words[1] in commands, line
        command = commands[words[1]]
        options = {
            name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]
        }
        for word in words[2:]:
            if word.startswith("-"):
                assert word.partition("=")[0] in options, f"{line}: {word}"


def test_what_is_public_is_in_the_reference() -> None:
    text = (DOCS / "api.md").read_text()
    listed = set()
    for module, members in re.findall(
        r"^::: ([\w.]+)(?:\n .*)*?\n +members: \[([^\]]*)\]", text, re.MULTILINE
    ):
        names = [name.strip() for name in members.split(",")]
        listed |= set(names)
        if ".integrations." not in module:  # what these need may not be here
            found = importlib.import_module(module)
            assert [name for name in names if not hasattr(found, name)] == [], module
    assert set(polyprag.__all__) - listed == {"__version__", "errors"}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name, and reports to compare."""
    folder = tmp_path_factory.mktemp("corpora")
    rows = [("Q7259", "Ada Lovelace", "London"), ("Q11571", "Grace Moss", "Ost"), ("Q3", "Ivo Stern", "Tarn")]

    def write(name: str, lines: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))

    documents = [
        {"id": id, "title": name, "text": f"{name} was born in {town}.", "lang": "en", "year": 1990 + number}
        for number, (id, name, town) in enumerate(rows)
    ]
    write("corpus.jsonl", documents[:2])
    write("new.jsonl", documents[2:])
    write(
        "questions.jsonl",
        [
            {"question": f"Where was {name} born?", "answers": [town], "documents": [id]}
            for id, name, town in (rows[0], rows[2])
        ],
    )
    (folder / "handbook").mkdir()
    (folder / "handbook" / "mill.md").write_text("# Mill\n\nThe Amber Mill stands in Ost. It is old.\n")
    return folder


@pytest.mark.parametrize("name", ["README.md", "index.md", "guides.md", "corpora.md", "export.md"])
def test_commands_run_one_after_the_other(
    name: str,
    corpora: Path,
    run: Callable[..., Any],
    tmp_path: Path,
    tiny_base: BaseModel,
    short_answers: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(corpora, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("polyprag.models.load_base_model", lambda *_, **__: tiny_base)
    monkeypatch.setattr("polyprag.models.load_tokenizer", lambda *_: tiny_base.tokenizer)
    for module in ("engine", "exporting"):
        monkeypatch.setattr(f"polyprag.{module}.base_model_of", lambda *_, **__: tiny_base)
    page = (REPOSITORY if name == "README.md" else DOCS) / name
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in re.findall(r"^```console\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        for line in re.findall(r"^\$ (polyprag .*)", block, re.MULTILINE)
    ]
    if not any(words[0] == "encode" and "wiki.polyprag" in words for words in commands):
        assert run("encode", "corpus.jsonl", "wiki.polyprag")[0] == 0
    for words in commands:
        if words[0] in NOT_RUN:
            continue
        if "--compare" in words:
            for report in words[2:]:
                shutil.copy("report.json", report)
        code, _, err = run(*words)
        assert code == 0, f"polyprag {shlex.join(words)}: {err}"


def test_the_quickstart_opens_the_store_that_it_makes() -> None:
    text = (DOCS / "index.md").read_text()
    made = set(re.findall(r"^\$ polyprag encode \S+ (\S+)$", text, re.MULTILINE))
    assert made
    assert set(re.findall(r"[\w./]+\.polyprag\b", text)) == made


def test_every_page_is_on_the_site() -> None:
    site = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())

    def pages(part: Any) -> list[str]:
        if isinstance(part, str):
            return [part]
        values = part.values() if isinstance(part, dict) else part
        return [page for value in values for page in pages(value)]

    assert sorted(pages(site["nav"])) == sorted(p.name for p in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_messages_of_the_troubles_are_said() -> None:
    source = "".join(
        path.read_text()
        for folder in ("python/polyprag", "rust/core/src")
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".rs")
    )
    # A message may be built of parts that stand on lines of their own, with names in braces.
    flat = re.sub(r'"\s*\n?\s*f?"', "", source)
    flat = re.sub(r"\{[^{}]*\}", "{}", flat)
    for message in re.findall(r"^\| `([^`]+)` \|", (DOCS / "faq.md").read_text(), re.MULTILINE):
        generic = message.replace("typer", "{}").replace("torch is", "{} is").replace("'text'", "{}")
        assert message in flat or generic in flat, message
