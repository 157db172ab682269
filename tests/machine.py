"""What tests do to the machine: mount a file system, give up the rights of root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Mount:
    """A mount for the length of a test; skips where the machine does not allow one."""

    def __init__(self, *arguments: str, at: Path) -> None:
        self.arguments = arguments
        self.at = at

    def __enter__(self) -> Path:
        try:
            done = subprocess.run(
                ["mount", *self.arguments, str(self.at)], capture_output=True, text=True, check=False
            )
        except OSError as error:
            pytest.skip(f"no mount command: {error}")
        if done.returncode:
            pytest.skip(f"this machine allows no mount: {done.stderr.strip()}")
        return self.at

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "-l", str(self.at)], check=False, capture_output=True)


@contextmanager
def no_rights(path: Path) -> Iterator[None]:
    """Inside, this process may read ``path`` but not write there, whoever runs the tests."""
    mode = path.stat().st_mode
    path.chmod(0o555)
    root = os.geteuid() == 0
    if root:
        for parent in path.parents:
            if parent.stat().st_uid == 0 and parent.stat().st_mode & 0o005 != 0o005:
                parent.chmod(0o755)
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)
        path.chmod(mode)
