"""What training keeps for each document: one row of numbers and their optimiser's state.

A row moves only in the steps that meet its document (lazy Adam with a step count a row: Kingma and Ba,
arXiv 1412.6980, algorithm 1, applied to the rows of a batch), so a step costs the same whatever the number
of documents, and a document learns as fast in a large corpus as in a small one. Dense Adam would move every
row at every step, and each the further the rarer its document is met.

Rows live in memory, or in a file where they would not fit. A row that was never met takes no space in it: its
start is a function of the seed and its number.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polyprag.errors import CheckpointMismatch
from polyprag.jsonl import sync_folder, write_at

BETAS = (0.9, 0.999)
EPSILON = 1e-8

_Records = np.ndarray[Any, np.dtype[np.void]]
_Numbers = NDArray[np.int64]
_BLOCK = 4096  # rows that are read or made at a time
_FIELDS = ("value", "first", "second", "steps")
_HEAD = 16  # bytes of the key at the front of a file, and of a log's digest at its end


@dataclass(frozen=True)
class Start:
    """Where rows begin: ``normal`` and ``uniform`` noise times ``scale``, or all at ``value`` [width]."""

    kind: Literal["normal", "uniform", "value"]
    seed: int = 0
    scale: float = 1.0
    value: NDArray[np.float32] | None = None

    def rows(self, documents: _Numbers, width: int) -> NDArray[np.float32]:
        """The starts of some documents [n, width]; each depends on its own number alone."""
        if self.value is not None:
            return np.tile(self.value.astype(np.float32), (len(documents), 1))
        out = np.empty((len(documents), width), dtype=np.float32)
        for place, document in enumerate(documents):
            # A counter-based generator: the document chooses the block of the stream.
            draw = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, int(document), 0]))
            if self.kind == "normal":
                out[place] = draw.standard_normal(width, dtype=np.float32)
            else:
                out[place] = draw.uniform(-1.0, 1.0, width)
        out *= np.float32(self.scale)
        return out


class Rows(Protocol):
    """``documents`` is always an array of different row numbers [n], ascending."""

    width: int

    def read(self, documents: _Numbers) -> Tensor:
        """Their rows [n, width], float32, on the CPU."""
        ...

    def update(self, documents: _Numbers, gradients: Tensor, lr: float) -> None:
        """One step of Adam on these rows."""
        ...

    def blocks(self) -> Iterator[tuple[_Numbers, NDArray[np.float32]]]:
        """The rows that this process keeps: numbers [n] and rows [n, width]."""
        ...

    @property
    def full(self) -> bool:
        """Whether the rows have to be saved now, for want of memory."""
        ...

    def reset(self) -> None:
        """Go back to the start of all rows. This or :meth:`load` comes before anything else."""
        ...

    def save(self, step: int) -> dict[str, Tensor]:
        """What a checkpoint of this step keeps; nothing is lost if that checkpoint is never finished."""
        ...

    def saved(self, step: int) -> None:
        """The checkpoint of this step is on disk."""
        ...

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """Go back to a checkpoint."""
        ...


def record(width: int) -> np.dtype[np.void]:
    """A row with its state: 12 bytes a number, and 4 for the count of its steps."""
    numbers = ("<f4", (width,))
    return np.dtype([("value", *numbers), ("first", *numbers), ("second", *numbers), ("steps", "<i4")])


def _adam(rows: _Records, gradients: Tensor, lr: float) -> None:
    """One step of Adam, in place; bias is corrected by each row's own count."""
    g = gradients.detach().to("cpu", torch.float32)
    rows["steps"] += 1
    steps = torch.from_numpy(rows["steps"].astype(np.float64)).unsqueeze(1)
    first, second = (torch.from_numpy(np.ascontiguousarray(rows[name])) for name in ("first", "second"))
    first.lerp_(g, 1 - BETAS[0])
    second.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
    corrected = (1 - BETAS[0] ** steps).float(), (1 - BETAS[1] ** steps).float()
    move = (first / corrected[0]) / ((second / corrected[1]).sqrt() + EPSILON)
    rows["value"] -= lr * move.numpy()
    rows["first"], rows["second"] = first.numpy(), second.numpy()


class MemoryRows:
    """All rows in memory. Processes that train together each have them all, and keep them equal."""

    def __init__(self, documents: int, width: int, start: Start) -> None:
        self.width = width
        self._start = start
        self._rows: _Records = np.zeros(documents, dtype=record(width))

    def read(self, documents: _Numbers) -> Tensor:
        return torch.from_numpy(self._rows["value"][documents])

    def update(self, documents: _Numbers, gradients: Tensor, lr: float) -> None:
        rows = self._rows[documents]
        _adam(rows, gradients, lr)
        self._rows[documents] = rows

    def blocks(self) -> Iterator[tuple[_Numbers, NDArray[np.float32]]]:
        yield np.arange(len(self._rows)), np.ascontiguousarray(self._rows["value"])

    @property
    def full(self) -> bool:
        return False

    def reset(self) -> None:
        self._rows[:] = np.zeros((), dtype=self._rows.dtype)
        for begin in range(0, len(self._rows), _BLOCK):
            numbers = np.arange(begin, min(begin + _BLOCK, len(self._rows)))
            self._rows["value"][begin : begin + _BLOCK] = self._start.rows(numbers, self.width)

    def save(self, step: int) -> dict[str, Tensor]:  # noqa: ARG002
        return {name: torch.from_numpy(np.ascontiguousarray(self._rows[name])) for name in _FIELDS}

    def saved(self, step: int) -> None:
        pass

    def load(self, state: Mapping[str, Tensor], step: int) -> None:  # noqa: ARG002
        for name in _FIELDS:
            self._rows[name] = state[name].numpy()


class FileRows:
    """Rows in a file, for more documents than memory holds.

    Rows that moved since the last checkpoint are kept apart, in memory. A checkpoint first writes them to a
    log of its own and syncs it; once the checkpoint itself is on disk, the log is applied to the file. So the
    file is always that of the last checkpoint, or becomes it by applying its log once more.

    key: 16 bytes that name the run. part, parts: this process keeps the documents whose number leaves
    ``part`` when divided by ``parts``. memory: bytes that moved rows may take before a checkpoint is due.
    """

    def __init__(
        self,
        folder: Path,
        documents: int,
        width: int,
        start: Start,
        *,
        key: bytes,
        part: int = 0,
        parts: int = 1,
        memory: int = 64 << 20,
    ) -> None:
        self.width = width
        self._start, self._part, self._parts = start, part, parts
        self._dtype = record(width)
        self._count = len(range(part, documents, parts))
        self._moved: dict[int, _Records] = {}
        # A row apart costs its record, its array and its place in the dictionary.
        self._most = max(memory // (self._dtype.itemsize + 250), 1)
        self._folder, self._key = folder, key
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"rows-{part}-of-{parts}.bin"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def owns(self, documents: _Numbers) -> NDArray[np.bool_]:
        mine: NDArray[np.bool_] = documents % self._parts == self._part
        return mine

    def read(self, documents: _Numbers) -> Tensor:
        """Zeros for those of other processes, so that the sum over all is the rows."""
        out = np.zeros((len(documents), self.width), dtype=np.float32)
        mine = self.owns(documents)
        out[mine] = self._records(documents[mine])["value"]
        return torch.from_numpy(out)

    def update(self, documents: _Numbers, gradients: Tensor, lr: float) -> None:
        mine = self.owns(documents)
        rows = self._records(documents[mine])
        _adam(rows, gradients.to("cpu")[torch.from_numpy(mine)], lr)
        for place, document in enumerate(documents[mine].tolist()):
            self._moved[document] = rows[place : place + 1].copy()

    def blocks(self) -> Iterator[tuple[_Numbers, NDArray[np.float32]]]:
        for begin in range(0, self._count, _BLOCK):
            places = np.arange(begin, min(begin + _BLOCK, self._count))
            numbers = places * self._parts + self._part
            yield numbers, np.ascontiguousarray(self._records(numbers)["value"])

    @property
    def full(self) -> bool:
        return len(self._moved) >= self._most

    def reset(self) -> None:
        self._moved.clear()
        os.ftruncate(self._file, 0)
        os.ftruncate(self._file, _HEAD + self._count * self._dtype.itemsize)  # holes, until rows are written
        self._write(0, self._key)
        self._discard_logs()

    def save(self, step: int) -> dict[str, Tensor]:
        digest = hashlib.blake2b(digest_size=_HEAD)
        with self._log(step).open("wb") as file:
            for document in sorted(self._moved):
                line = document.to_bytes(8, "little") + self._moved[document].tobytes()
                digest.update(line)
                file.write(line)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._folder)
        return {"parts": torch.tensor(self._parts)}

    def saved(self, step: int) -> None:
        for document in sorted(self._moved):
            self._write(self._place(document), self._moved[document].tobytes())
        os.fsync(self._file)
        self._moved.clear()
        self._log(step).unlink()

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        if int(state.get("parts", 0)) != self._parts or os.pread(self._file, _HEAD, 0) != self._key:
            raise CheckpointMismatch(
                f"{self._path}: not the rows of this checkpoint; go on with as many processes as before, "
                "or delete the checkpoint to start anew"
            )
        self._moved.clear()
        log = self._log(step)
        if log.exists():  # else it was applied whole
            self._apply(log)
        self._discard_logs()

    def _apply(self, log: Path) -> None:
        size = 8 + self._dtype.itemsize
        content = log.read_bytes()
        lines, digest = content[:-_HEAD], content[-_HEAD:]
        if len(lines) % size or hashlib.blake2b(lines, digest_size=_HEAD).digest() != digest:
            raise CheckpointMismatch(f"{log}: damaged; delete the checkpoint to start anew")
        for at in range(0, len(lines), size):
            document = int.from_bytes(lines[at : at + 8], "little")
            self._write(self._place(document), lines[at + 8 : at + size])
        os.fsync(self._file)

    def _discard_logs(self) -> None:
        for log in self._folder.glob(f"moved-{self._part}-*.bin"):
            log.unlink()

    def _log(self, step: int) -> Path:
        return self._folder / f"moved-{self._part}-{step}.bin"

    def _place(self, document: int) -> int:
        return _HEAD + document // self._parts * self._dtype.itemsize

    def _write(self, place: int, content: bytes) -> None:
        write_at(self._file, content, place, "a row", self._path)

    def _records(self, documents: _Numbers) -> _Records:
        size = self._dtype.itemsize
        out: _Records = np.zeros(len(documents), dtype=self._dtype)
        for place, document in enumerate(documents.tolist()):
            if document in self._moved:
                out[place] = self._moved[document][0]
                continue
            row = os.pread(self._file, size, self._place(document))
            if len(row) != size:
                raise CheckpointMismatch(
                    f"{self._path}: shorter than its documents; delete the checkpoint to start anew"
                )
            out[place] = np.frombuffer(row, dtype=self._dtype)[0]
        fresh = out["steps"] == 0
        out["value"][fresh] = self._start.rows(documents[fresh], self.width)
        return out
