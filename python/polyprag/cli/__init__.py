"""The command line ``polyprag``.

Commands that need a base model are in ``model``, those that look after a store in ``store``, those that trade
with other software in ``exchange``.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from polyprag._polyprag import __version__
from polyprag.cli import augment, corpus, doctor, evaluate, exchange, explore, inspect, model, serve, store
from polyprag.cli.common import err, out, say
from polyprag.cli.exits import ExitCode, exit_code
from polyprag.errors import PolypragError
from polyprag.extras import remedied

app = typer.Typer(
    name="polyprag",
    help="A corpus in the weights: latent LoRA experts, and a route of a few bytes for each document.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "encode": model.encode,
    "add": model.add,
    "augment": augment.augment,
    "corpus": corpus.corpus,
    "ask": model.ask,
    "serve": serve.serve,
    "eval": evaluate.evaluate,
    "questions": evaluate.questions,
    "inspect": inspect.inspect,
    "verify": store.verify,
    "digest": store.digest,
    "delete": store.delete,
    "compact": store.compact,
    "merge": store.merge,
    "recode": store.recode,
    "reindex": store.reindex,
    "rollback": store.rollback,
    "snapshot": store.snapshot,
    "pack": store.pack,
    "unpack": store.unpack,
    "export": exchange.export,
    "import": exchange.import_,
    "demo": model.demo,
    "explore": explore.explore,
    "doctor": doctor.doctor,
}
_PANELS = {
    "encode": "Encode and ask",
    "inspect": "Look after a store",
    "export": "Trade with PEFT",
    "demo": "Look around",
}
_panel = ""
for _name, _command in _COMMANDS.items():
    _panel = _PANELS.get(_name, _panel)  # a panel goes on to the next that begins one
    app.command(name=_name, rich_help_panel=_panel)(_command)


def _version(value: bool) -> None:
    if value:
        out.print(f"polyprag {__version__}", highlight=False)
        raise typer.Exit


@app.callback(
    epilog="Exit codes: 0 done, 1 failed, 2 wrong use, 3 unusable input, 4 no store or a damaged one, 5 a "
    "locked store, 6 package or model missing (see `polyprag doctor`), 7 endpoint, 130 stopped."
)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A corpus in the weights: latent LoRA experts, and a route of a few bytes for each document."""


def main() -> None:
    """Entry point: known failures become one line and an exit code of :class:`ExitCode`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a sign shows another
    try:
        code = app(standalone_mode=False)
    except typer.Exit as leave:
        raise SystemExit(leave.exit_code) from None
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(ExitCode.STOPPED) from None
    except subprocess.CalledProcessError as error:
        raise SystemExit(exit_code(error)) from None  # the child has said what was wrong
    except BrokenPipeError:
        # Whoever read has had enough, as `head` has; nothing more can be said to it.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - else the interpreter fails to flush it at the end
        raise SystemExit(ExitCode.FAILED) from None
    except PolypragError as error:
        _fail(error, str(error))
    except OSError as error:
        _fail(error, _os_message(error))
    except ImportError as error:
        _fail(error, remedied(error))
    except Exception as error:
        # What typer itself raises for a wrong option knows how to show itself.
        if not hasattr(error, "format_message"):
            raise
        error.show()  # type: ignore[attr-defined]
        raise SystemExit(ExitCode.USAGE) from None
    if code:
        # Some versions of typer return the code of an exit, or 130 for Ctrl-C, and raise nothing.
        raise SystemExit(code)


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _fail(error: Exception, message: str) -> None:
    say(f"Error: {' '.join(message.split())}", "red", err)
    raise SystemExit(exit_code(error))
