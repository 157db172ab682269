"""Exit codes: what a script may want to tell apart."""

from __future__ import annotations

import subprocess
from enum import IntEnum

from polyprag.errors import (
    BaseModelMismatch,
    BaseModelMissing,
    CheckpointMismatch,
    CorpusError,
    DuplicateId,
    EndpointError,
    InvalidInput,
    StoreError,
    StoreLocked,
    UnknownId,
    Unrouted,
)


class ExitCode(IntEnum):
    """What the commands end with; docs/cli-guide.md has the same table."""

    DONE = 0
    FAILED = 1  # anything else: a full disk, a fault of polyprag's own
    USAGE = 2  # no such command, option or value
    INPUT = 3  # a file, setting, id or question that was given cannot be used
    STORE = 4  # the store is none, is damaged, or is not what was expected
    LOCKED = 5  # another process writes the store: try again later
    MISSING = 6  # a package or base model is not here: `polyprag doctor` says how to get it
    ENDPOINT = 7  # a model's endpoint refuses or cannot be reached
    STOPPED = 130  # Ctrl-C; nothing is half done


# The first that fits.
_CODES: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], ExitCode], ...] = (
    (KeyboardInterrupt, ExitCode.STOPPED),
    (StoreLocked, ExitCode.LOCKED),
    ((UnknownId, DuplicateId, Unrouted), ExitCode.INPUT),
    (StoreError, ExitCode.STORE),
    ((BaseModelMissing, ImportError), ExitCode.MISSING),
    (EndpointError, ExitCode.ENDPOINT),
    ((InvalidInput, CorpusError, BaseModelMismatch, CheckpointMismatch), ExitCode.INPUT),
    # What was given is not there, is there already, or may not be read.
    (
        (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError),
        ExitCode.INPUT,
    ),
)


def exit_code(error: BaseException) -> int:
    """The exit code of a command that this ended."""
    if isinstance(error, subprocess.CalledProcessError):
        return error.returncode if error.returncode > 0 else ExitCode.FAILED
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILED)
