"""``polyprag`` and ``python -m polyprag``."""

from __future__ import annotations

import sys

_OF_CLI = ("typer", "rich", "click", "shellingham")
_MISSING = 6  # as in polyprag.cli.exits, which cannot be imported where these are missing


def main() -> None:
    """The command line, or one line that says how to install what it needs."""
    try:
        from polyprag.cli import main as run
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in _OF_CLI:
            raise
        sys.stderr.write(
            f"Error: the command line needs the package {error.name}: pip install 'polyprag[cli]'\n"
        )
        raise SystemExit(_MISSING) from None
    run()


if __name__ == "__main__":
    main()
