"""Who is decoded when: a bounded queue in front of one running batch, in a thread of its own.

First come, first served. After every token of the batch, rows that ended have left, and rows that wait have
joined as far as there is room.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import torch

from polyprag.layers import RoutedModel
from polyprag.models import BaseModel
from polyprag.serving.decode import Batch, Finish, Row

_log = logging.getLogger(__name__)

# Tokens of prompts, padding included, that are read between two tokens of the rows that run.
_READ_AT_ONCE = 2_048


class Full(Exception):
    """The queue is full; ``retry_after`` is when there may be room, in whole seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"try again in {retry_after} s")
        self.retry_after = retry_after


class Stopped(Exception):
    """The scheduler takes nothing any more."""


@dataclass(eq=False, kw_only=True)
class Place(Row):
    """A row of a request. ``told`` is how much of its text was passed on."""

    told: int = 0
    tell: Callable[[Place, str, Finish | None], None]
    since: float = field(default_factory=time.perf_counter)


class Meter(Protocol):
    """What the scheduler reports, in its own thread."""

    def admitted(self, waited: float) -> None: ...

    def stepped(self, rows: int, seconds: float) -> None: ...


class Scheduler:
    """Decodes the rows that are submitted, and tells each what it says as it goes on.

    ``Place.tell`` is called in the scheduler's thread, with new text and, at last, why the row ended
    ("error" if the model failed). A row that is cancelled is told nothing more.
    """

    def __init__(
        self,
        base: BaseModel,
        routed: RoutedModel,
        *,
        max_batch: int,
        max_waiting: int,
        max_cached_tokens: int,
        meter: Meter,
    ) -> None:
        self._batch = Batch(base, routed)
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._max_cached = max_cached_tokens
        self._meter = meter
        self._waiting: deque[Place] = deque()
        self._joining: list[Place] = []  # no longer waiting, and not yet in the batch
        self._cancelled: set[Place] = set()
        self._change = threading.Condition()
        self._stopping = False
        self._row_seconds = 1.0  # how long a row takes, of late
        self._thread = threading.Thread(target=self._work, name="polyprag-decode", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._batch.rows)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, rows: Sequence[Place]) -> None:
        """Queue the rows of a request, all or none.

        Raises Full, or Stopped: after :meth:`close`, or where the thread that decodes has ended.
        """
        with self._change:
            if self._stopping or not self.alive:
                raise Stopped
            # An empty queue takes any request, however many rows it has.
            if self._waiting and len(self._waiting) + len(rows) > self._max_waiting:
                ahead = len(self._waiting) / self._max_batch
                raise Full(max(1, math.ceil(ahead * self._row_seconds)))
            self._waiting.extend(rows)
            self._change.notify()

    def cancel(self, rows: Sequence[Place]) -> None:
        """Give up the places of rows, wherever they are; rows that have ended are let be."""
        with self._change:
            for row in rows:
                if row.finish is not None:
                    continue
                if row in self._waiting:
                    self._waiting.remove(row)
                else:
                    self._cancelled.add(row)
            self._change.notify()

    def close(self, *, finish: bool = True) -> None:
        """Take nothing more, and return once all rows have ended; ``finish=False`` drops them."""
        with self._change:
            self._stopping = True
            if not finish:
                self._cancelled.update(self._waiting, self._joining, self._rows())
                self._waiting.clear()
            self._change.notify()
        self._thread.join()

    def _rows(self) -> list[Place]:
        return self._batch.rows  # type: ignore[return-value]  # what joins are places

    def _work(self) -> None:
        while True:
            with self._change:
                while not (self._waiting or self._batch.rows or self._stopping):
                    self._cancelled.clear()
                    self._change.wait()
                if self._stopping and not self._waiting and not self._batch.rows:
                    return
                cancelled, self._cancelled = self._cancelled, set()
            try:
                self._batch.leave([row for row in self._rows() if row in cancelled])
                began, stepped = time.perf_counter(), len(self._batch.rows)
                if stepped:
                    self._batch.step()
                    self._meter.stepped(stepped, time.perf_counter() - began)
                self._report()
            except Exception:  # noqa: BLE001 - whoever asked is told, and others go on
                self._fail(self._rows(), "decoding failed")
                self._batch.clear()
            self._admit()

    def _admit(self) -> None:
        """Let rows join that wait, as many as there is room for."""
        with self._change:
            joining: list[Place] = []
            self._joining = joining
            while self._waiting and self._fits(self._waiting[0], joining):
                joining.append(self._waiting.popleft())
        if not joining:
            return
        now = time.perf_counter()
        for row in joining:
            self._meter.admitted(now - row.since)
        try:
            self._batch.join(joining)
            self._report()
        except Exception:  # noqa: BLE001
            # Those that were running are as they were: a batch takes rows in when all else is done.
            self._fail([row for row in joining if row not in self._batch.rows], "reading prompts failed")
            if any(row in self._batch.rows for row in joining):
                self._fail(self._rows(), "decoding failed")
                self._batch.clear()

    def _fits(self, row: Place, joining: list[Place]) -> bool:
        count = len(self._batch.rows) + len(joining) + 1
        if count > self._max_batch:
            return False
        longest = max(len(r.ids) + r.limit for r in (*self._batch.rows, *joining, row))
        if count > 1 and count * longest > self._max_cached:
            return False
        width = max(len(r.ids) for r in (*joining, row))
        return not joining or (len(joining) + 1) * width <= _READ_AT_ONCE

    def _report(self) -> None:
        """Pass on what the rows say, and let those go that have ended."""
        for row in self._rows():
            text = row.text[row.told :]
            row.told = len(row.text)
            if text or row.finish is not None:
                row.tell(row, text, row.finish)
            if row.finish is not None:
                took = time.perf_counter() - row.since
                self._row_seconds += 0.1 * (took - self._row_seconds)
        self._batch.leave()

    def _fail(self, rows: Sequence[Place], what: str) -> None:
        _log.exception(what)
        for row in rows:
            row.finish = "error"
            row.tell(row, "", "error")
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # an error of the device that lasts comes again here
                torch.cuda.empty_cache()
