"""What several commands need: how they print, how they wait, and arguments that they share."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from polyprag._polyprag import Store
from polyprag.errors import InvalidInput
from polyprag.progress import WorkBar

out = Console()
err = Console(stderr=True)

OnDuplicate = Literal["error", "replace", "skip"]

# readable=False: opening a file says what is wrong with it; typer would call it a wrong use of the command.
StorePath = Annotated[
    Path, typer.Argument(metavar="STORE", help="The store, a folder such as `wiki.polyprag`.", readable=False)
]
NewStorePath = Annotated[
    Path, typer.Argument(metavar="NEW", help="The new store, a folder that is not there yet.", readable=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]

# Titles and texts are other people's, and a terminal obeys what it is sent.
_CONTROLS = {n: None for n in (*range(32), *range(127, 160)) if chr(n) not in "\t\n"}

_T = TypeVar("_T")


def say(text: str, style: str | None = None, console: Console = out) -> None:
    """A line as it is, but for control characters: paths and answers hold brackets, and are copied from the
    terminal.
    """
    console.print(text.translate(_CONTROLS), style=style, markup=False, highlight=False, soft_wrap=True)


def counted(count: int, what: str) -> str:
    """A number of things, whose name has an s where there is not one of them."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    # Where the terminal is not Unicode's, escapes are as good.
    ascii_alone = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    sys.stdout.write(json.dumps(value, ensure_ascii=ascii_alone) + "\n")


def check_store(store: Path) -> None:
    """Say at once what is wrong with a store, and not when torch and the base model are loaded."""
    Store.open(store).close()


def working(what: str, work: Callable[[WorkBar], _T], *, shown: bool = True) -> _T:
    """Run long work of the core, which reports to a bar; ``work`` may say what it is at.

    Ctrl-C ends it where the core next asks, as a failure would: what it wrote so far is removed.
    """
    try:
        with WorkBar(err, what, shown=shown) as bar:
            return work(bar)
    except KeyboardInterrupt:
        say("Stopped. Nothing is half done: what was not finished is not there", "yellow", err)
        raise


def document_id(text: str, id_type: str) -> str | int:
    """An id as it is typed, of the kind that a store has. Raises InvalidInput for one that is no number."""
    if id_type == "string":
        return text
    if not (text.isascii() and text.isdigit()):
        raise InvalidInput(f"id {text!r}: the ids of this store are integers")
    return int(text)
