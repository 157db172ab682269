"""All options of a command from one TOML file: ``--config FILE``.

Keys are the options' names and those of the arguments; a table is a part of the recipe, its keys what
``--set PART.NAME=VALUE`` takes. What stands on the command line goes before what stands in the file.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from polyprag.errors import InvalidInput

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_NOT_IN_A_FILE = {"config", "help", "settings"}
_META = "polyprag.config"


def configure(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of a file the defaults of this command. Raises InvalidInput that names key and line."""
    if path is None:
        return None
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
        content = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        remedy = "write the file as UTF-8, one KEY = VALUE a line"
        raise InvalidInput(f"{path}: no valid TOML ({error}); {remedy}") from error
    known = {str(p.name): p for p in context.command.params if p.name not in _NOT_IN_A_FILE}
    by_flag = {name: p.name for p in known.values() for name in _names(p)}
    values: dict[str, Any] = {}
    settings: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            settings += _flat(value, f"{key}.")
            continue
        name = by_flag.get(key.replace("_", "-"))
        if name is None:
            near = difflib.get_close_matches(key.replace("_", "-"), by_flag, 1)
            advice = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(by_flag))}"
            raise InvalidInput(f"{_place(path, text, key)}: there is no option {key!r}; {advice}")
        many = getattr(known[name], "multiple", False) or known[name].nargs != 1
        if isinstance(value, list) != many:
            form = 'a list, such as ["a"]' if many else "one value, not a list"
            raise InvalidInput(f"{_place(path, text, key)}: {key!r} takes {form}")
        values[name] = value
    context.default_map = values
    context.meta[_META] = (path, settings)
    return path


def settings_of(context: typer.Context) -> tuple[Path | None, list[str]]:
    """The file of ``--config``, and its tables as ``--set`` takes them."""
    found: tuple[Path | None, list[str]] = context.meta.get(_META, (None, []))
    return found


def as_toml(recipe: Mapping[str, Any]) -> str:
    """The tables of a recipe, to be kept in a file; what is None, or has tables of its own, is left out."""
    lines = []
    for part, values in recipe.items():
        if not isinstance(values, Mapping):
            continue
        lines.append(f"[{part}]")
        for name, value in values.items():
            if value is not None and not isinstance(value, Mapping):
                lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")  # such JSON is TOML too
        lines.append("")
    return "\n".join(lines).rstrip()


def _names(parameter: Any) -> list[str]:
    """How a parameter may be called in a file: by its long option without dashes, or an argument's name."""
    options = [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]
    return options or [str(parameter.name).replace("_", "-")]


def _flat(table: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for key, value in table.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={json.dumps(value, default=str)}")
    return found


def _place(path: Path, text: str, key: str) -> str:
    line = re.search(rf"^[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*=", text, re.MULTILINE)
    return f"{path}, line {text.count(chr(10), 0, line.start()) + 1}" if line is not None else str(path)


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=configure,
        is_eager=True,
        readable=False,
        help="A TOML file with any of these options (`experts = 16`), and settings of the recipe in tables "
        "(`[train]`, `code_lr = 0.2`).",
    ),
]
