"""The command line ``polyprag``.

Commands that need a base model are in ``model``, those that look after a store in ``store``.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Annotated

import typer

from polyprag._polyprag import __version__
from polyprag.cli import augment, corpus, model, store
from polyprag.cli.common import err, out, say
from polyprag.errors import PolypragError

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
    "eval": model.evaluate,
    "inspect": store.inspect,
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
    "demo": model.demo,
}
for _name, _command in _COMMANDS.items():
    app.command(name=_name)(_command)


def _version(value: bool) -> None:
    if value:
        out.print(f"polyprag {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A corpus in the weights: latent LoRA experts, and a route of a few bytes for each document."""


def main() -> None:
    """Entry point: known failures become one line and exit code 1, Ctrl-C exit code 130."""
    try:
        code = app(standalone_mode=False)
    except typer.Exit as leave:
        raise SystemExit(leave.exit_code) from None
    except (typer.Abort, KeyboardInterrupt):
        raise SystemExit(130) from None
    except subprocess.CalledProcessError as error:
        # The child has said what was wrong.
        raise SystemExit(error.returncode if error.returncode > 0 else 1) from None
    except PolypragError as error:
        _fail(str(error))
    except OSError as error:
        _fail(_os_message(error))
    except ImportError as error:
        _fail(f"{error}; install what this command needs: pip install 'polyprag[all]'")
    except Exception as error:
        # What typer itself raises for a wrong option knows how to show itself.
        if not hasattr(error, "format_message"):
            raise
        error.show()  # type: ignore[attr-defined]
        raise SystemExit(2) from None
    if code:
        # Some versions of typer return the code of an exit, or 130 for Ctrl-C, and raise nothing.
        raise SystemExit(code)


def _os_message(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def _fail(message: str) -> None:
    say(f"Error: {' '.join(message.split())}", "red", err)
    raise SystemExit(1)
