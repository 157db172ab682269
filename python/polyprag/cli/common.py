"""What several commands need: how they print, how they wait, and arguments that they share."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

OnDuplicate = Literal["error", "replace", "skip"]

# readable=False: opening a file says what is wrong with it; typer would call it a wrong use of the command.
StorePath = Annotated[
    Path, typer.Argument(help="The store, a folder such as `wiki.polyprag`.", readable=False)
]
NewStorePath = Annotated[
    Path, typer.Argument(help="The new store, a folder that is not there yet.", readable=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]

_T = TypeVar("_T")


def say(text: str, style: str | None = None, console: Console = out) -> None:
    """A line as it is: paths and answers hold brackets, and are copied from the terminal."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One line of JSON on standard output."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")


def working(what: str, work: Callable[[Callable[[str], None]], _T]) -> _T:
    """Run long work of the core; ``work`` may say what it is at.

    A call into the core ends before Python hears of Ctrl-C. So it runs in a thread of its own, and Ctrl-C
    ends the process, as a kill would: a store is made for that, and never has half of a change.
    """
    with err.status(what, spinner="line") as status:
        try:
            # Not in a with block: leaving that would wait for the work.
            thread = ThreadPoolExecutor(1)
            return thread.submit(work, lambda step: status.update(f"{what}: {step}")).result()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            status.stop()
            say("Stopped. Nothing is half done: what was not finished is not there", "yellow", err)
            sys.stdout.flush()
            os._exit(130)
