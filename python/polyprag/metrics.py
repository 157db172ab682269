"""The course of a training, kept: one JSON line a step, and TensorBoard's files where it is installed."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from typing_extensions import Self

from polyprag.jsonl import read_resumable, write_jsonl
from polyprag.trainer import Progress


class Metrics:
    """Keeps each step in ``folder/<name>.jsonl``, with the fields of :class:`~polyprag.trainer.Progress`.

    A run that goes on from a checkpoint takes back the steps that came after it.
    """

    def __init__(self, folder: Path, name: str = "metrics") -> None:
        self._path = folder / f"{name}.jsonl"
        self._board_folder = folder / "tensorboard" / name
        self._file: Any = None
        self._board: Any = None

    def step(self, progress: Progress) -> None:
        if self._file is None:
            self._open(progress.step)
        # A line at a time, whole: what was written is readable while training goes on.
        self._file.write(json.dumps(asdict(progress)) + "\n")
        self._file.flush()
        if self._board is not None:
            self._board.add_scalar("loss", progress.loss, progress.step)
            self._board.add_scalar("tokens a second", progress.tokens_a_second, progress.step)
            for name in ("mse", "kl"):
                if (value := getattr(progress, name)) is not None:
                    self._board.add_scalar(name, value, progress.step)
            self._board.add_scalar("decay of the learning rates", progress.decay, progress.step)

    def _open(self, first: int) -> None:
        if self._path.exists():
            write_jsonl(self._path, [row for row in read_resumable(self._path) if row["step"] < first])
        self._file = self._path.open("a", encoding="utf-8")
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._board_folder), purge_step=first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for open_one in (self._file, self._board):
            if open_one is not None:
                open_one.close()
