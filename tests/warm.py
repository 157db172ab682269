"""Processes that have torch when they begin, which takes a fresh Python ten seconds.

Each is forked from a server that has imported and does nothing else: nothing of the tests is in it, no
thread, no lock and no open file. It gets signals, dies and is killed as any other process.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["polyprag.encode", "polyprag.engine"])


class _Shared:
    """A descriptor of this process that the new one gets, too."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _received, (DupFd(self.number),)


def _received(shared: Any) -> int:
    return int(shared.detach())


def start(
    code: str, *arguments: str, env: Mapping[str, str] | None = None, **standard: int
) -> ForkServerProcess:
    """Run Python code, as ``python -c code arguments`` does, on one thread of torch.

    standard: descriptors to be its ``stdin``, ``stdout`` or ``stderr``.
    """
    shared = {name: _Shared(number) for name, number in standard.items()}
    process = _SERVER.Process(target=_run, args=(code, arguments, {**os.environ, **(env or {})}, shared))
    process.start()
    return process


def send(process: ForkServerProcess, number: int) -> None:
    """Send a signal to a process."""
    assert process.pid is not None
    os.kill(process.pid, number)


def ended(process: ForkServerProcess, seconds: float | None = None) -> int:
    """Wait for a process, so many seconds at most; its exit code, which is negative for a signal."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"still running after {seconds} s")
    return process.exitcode


def _run(code: str, arguments: tuple[str, ...], env: dict[str, str], standard: dict[str, int]) -> None:
    import torch

    for name, number in standard.items():
        place = ("stdin", "stdout", "stderr").index(name)
        os.dup2(number, place)
        os.close(number)
        setattr(sys, name, open(place, "w" if place else "r", buffering=1, closefd=False))  # noqa: SIM115 - for good
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<warm>", "exec"), {"__name__": "__main__"})  # noqa: S102 - what it is for
