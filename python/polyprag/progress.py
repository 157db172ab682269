"""Progress bars of long work, drawn from what encoding, evaluation and the core report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typing_extensions import Self

if TYPE_CHECKING:
    from polyprag.trainer import Progress as Step  # augmenting at an endpoint needs no torch


def _bars(console: Console, amount: ProgressColumn, shown: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        amount,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        disable=not (shown and console.is_terminal),  # a bar that does not move only litters a log
    )


class Bars:
    """A bar for the augmentation, one for the training, and one for what a router reads.

    Where the console is no terminal but a log, a line for each tenth instead.
    """

    def __init__(self, console: Console, shown: bool = True) -> None:
        self._progress = _bars(console, MofNCompleteColumn(), shown)
        self._tasks: dict[str, TaskID] = {}
        self._log = console if shown and not console.is_terminal else None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def augmenting(self, done: int, total: int) -> None:
        """``done`` of ``total`` documents have their pairs and rewrite."""
        self._update("Augmenting", done, total, "documents")
        self._progress.refresh()  # steps are few: each is shown

    def reading(self, done: int, total: int) -> None:
        """``done`` of ``total`` documents are read by the base model, for a router."""
        self._update("Reading", done, total, "documents")

    def training(self, progress: Step) -> None:
        """One step is done."""
        speed = f"steps, loss {progress.loss:.2f}, {progress.tokens_a_second:,.0f} tokens/s"
        self._update("Training", progress.step, progress.steps, speed)

    def _update(self, name: str, done: int, total: int, note: str) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note="")
        task = self._progress.tasks[self._tasks[name]]  # none is ever removed
        if done < task.completed:  # another of its kind: LoRAs to learn from, then what learns from them
            self._progress.reset(task.id)
        before = int(task.completed)
        if self._log is not None and 10 * done // max(1, total) > 10 * before // max(1, total):
            self._log.print(
                f"{name}: {done:,} of {total:,} {note}", markup=False, highlight=False, soft_wrap=True
            )
        self._progress.update(task.id, completed=done, total=total, note=note)


@contextmanager
def system_bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over the systems of an evaluation."""
    with _bars(console, MofNCompleteColumn()) as progress:
        task = progress.add_task("Answering", total=None, note="")

        def update(system: str, done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, note=system.replace("_", " "))

        yield update


class WorkBar:
    """A bar over one call into the core after another, which call it with what is done."""

    def __init__(self, console: Console, what: str, *, shown: bool = True) -> None:
        self._progress = _bars(console, TaskProgressColumn(), shown)
        self._task = self._progress.add_task(what, total=None, note="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        """``done`` of ``total`` is done; a total of 0 is not known yet."""
        self._progress.update(self._task, completed=done, total=total or None)

    def step(self, doing: str) -> None:
        """Something else begins."""
        self._progress.reset(self._task, total=None, note=doing)
