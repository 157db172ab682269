"""Rows of documents: Adam against a float64 reference, memory and files to the same bits, and crashes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from polyprag.errors import CheckpointMismatch
from polyprag.rows import FileRows, MemoryRows, Rows, Start

WIDTH = 3
KEY = bytes(range(16))


def numbers(*documents: int) -> NDArray[np.int64]:
    return np.array(documents, dtype=np.int64)


def gradient(seed: int, documents: NDArray[np.int64]) -> torch.Tensor:
    return torch.randn(len(documents), WIDTH, generator=torch.Generator().manual_seed(seed))


def everything(rows: Rows) -> NDArray[np.float32]:
    blocks = list(rows.blocks())
    order = np.argsort(np.concatenate([n for n, _ in blocks]))
    return np.concatenate([b for _, b in blocks])[order]


def files(folder: Path, documents: int = 9, **more: Any) -> FileRows:
    return FileRows(folder, documents, WIDTH, Start("normal", 5), key=more.pop("key", KEY), **more)


def fresh(folder: Path, **more: Any) -> FileRows:
    rows = files(folder, **more)
    rows.reset()
    return rows


@given(
    st.lists(st.sets(st.integers(0, 4), min_size=1).map(lambda s: numbers(*sorted(s))), max_size=8),
    st.floats(1e-4, 1.0),
)
def test_a_row_moves_as_adam_moves_a_parameter_of_its_own(
    batches: list[NDArray[np.int64]], lr: float
) -> None:
    """The reference is torch's Adam in float64, one optimiser for each row, stepped when the row is met."""
    rows = MemoryRows(5, WIDTH, Start("normal", 1))
    rows.reset()
    parameters = [torch.nn.Parameter(torch.from_numpy(r).double()) for r in everything(rows)]
    optimisers = [torch.optim.Adam([p], lr=lr) for p in parameters]
    for step, documents in enumerate(batches):
        gradients = gradient(step, documents)
        rows.update(documents, gradients, lr)
        for place, document in enumerate(documents.tolist()):
            parameters[document].grad = gradients[place].double()
            optimisers[document].step()
    expected = torch.stack([p.detach() for p in parameters]).numpy()
    np.testing.assert_allclose(everything(rows), expected, rtol=1e-4, atol=1e-5)


def test_a_start_depends_on_seed_and_number_alone() -> None:
    start = Start("normal", 3)
    many = start.rows(np.arange(1000), 64)
    assert np.array_equal(start.rows(numbers(7, 999), 64), many[[7, 999]])
    assert not np.array_equal(Start("normal", 4).rows(numbers(7), 64), many[[7]])
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
    assert np.abs(np.corrcoef(many[:50]) - np.eye(50)).max() < 0.6, "rows are not copies of each other"
    low = Start("uniform", 3, scale=1e-3).rows(np.arange(100), 8)
    assert 0.9e-3 < np.abs(low).max() <= 1e-3
    value = np.array([1, 2, 3], dtype=np.float32)
    assert Start("value", value=value).rows(numbers(4, 5), 3).tolist() == [[1, 2, 3], [1, 2, 3]]


def test_files_hold_what_memory_holds_to_the_bit(tmp_path: Path) -> None:
    memory, file = MemoryRows(9, WIDTH, Start("normal", 5)), fresh(tmp_path)
    memory.reset()
    for step in range(12):
        documents = np.unique(np.random.default_rng(step).integers(0, 9, 4))
        for rows in (memory, file):
            rows.update(documents, gradient(step, documents), 0.1)
        if step % 5 == 4:
            file.save(step)
            file.saved(step)
        assert torch.equal(memory.read(documents), file.read(documents))
    assert everything(memory).tobytes() == everything(file).tobytes()


def test_processes_that_share_the_documents_hold_what_one_holds(tmp_path: Path) -> None:
    alone = fresh(tmp_path / "one")
    parts = [fresh(tmp_path / "three", part=part, parts=3) for part in range(3)]
    for step in range(6):
        documents = np.unique(np.random.default_rng(step).integers(0, 9, 4))
        for rows in (alone, *parts):
            rows.update(documents, gradient(step, documents), 0.1)
        assert torch.equal(sum(p.read(documents) for p in parts), alone.read(documents))  # type: ignore[arg-type]
    whole = np.empty((9, WIDTH), dtype=np.float32)
    for part in parts:
        for places, block in part.blocks():
            whole[places] = block
    assert whole.tobytes() == everything(alone).tobytes()


@pytest.mark.parametrize("died", ["before the checkpoint", "half applied", "applied, log left", "done"])
def test_after_a_crash_the_rows_are_those_of_the_checkpoint(tmp_path: Path, died: str) -> None:
    rows = fresh(tmp_path)
    first, second = numbers(0, 4, 8), numbers(0, 1, 2, 3)
    rows.update(first, gradient(1, first), 0.1)
    state = rows.save(1)
    rows.saved(1)
    at_first = everything(rows)
    rows.update(second, gradient(2, second), 0.1)
    at_second = everything(rows)
    kept, step, expected = state, 1, at_first
    log = tmp_path / "moved-0-2.bin"
    after = rows.save(2)
    lines = log.read_bytes()
    if died != "before the checkpoint":
        kept, step, expected = after, 2, at_second
    if died == "half applied":
        os.pwrite(rows._file, lines[8 : 8 + rows._dtype.itemsize], rows._place(0))
    elif died != "before the checkpoint":
        rows.saved(2)
        if died == "applied, log left":
            log.write_bytes(lines)
    del rows
    again = files(tmp_path)
    again.load(kept, step)
    assert everything(again).tobytes() == expected.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["rows-0-of-1.bin"]


def test_rows_of_another_run_or_none_are_refused(tmp_path: Path) -> None:
    rows = fresh(tmp_path)
    rows.update(numbers(1), gradient(1, numbers(1)), 0.1)
    state = rows.save(1)
    content = (tmp_path / "moved-0-1.bin").read_bytes()
    with pytest.raises(CheckpointMismatch, match="rows-0-of-1"):
        files(tmp_path, key=bytes(16)).load(state, 1)
    with pytest.raises(CheckpointMismatch, match="as many processes"):
        files(tmp_path, parts=2).load(state, 1)
    with pytest.raises(CheckpointMismatch, match="rows-0-of-1"):
        files(tmp_path / "gone").load(state, 1)
    for damaged in (content[:-1], content[:-16], bytes([content[0] ^ 1]) + content[1:], b""):
        (tmp_path / "moved-0-1.bin").write_bytes(damaged)
        with pytest.raises(CheckpointMismatch, match=r"moved-0-1\.bin: damaged"):
            files(tmp_path).load(state, 1)
    (tmp_path / "moved-0-1.bin").write_bytes(content)
    files(tmp_path).load(state, 1)
    os.truncate(tmp_path / "rows-0-of-1.bin", 100)
    with pytest.raises(CheckpointMismatch, match="shorter"):
        everything(files(tmp_path))


def test_rows_that_were_never_met_take_no_space_and_memory_is_bounded(tmp_path: Path) -> None:
    rows = fresh(tmp_path, documents=10_000_000, memory=20_000)
    file = tmp_path / "rows-0-of-1.bin"
    assert file.stat().st_size > 390_000_000
    step = 0
    for document in range(0, 9_999_999, 99_999):
        rows.update(numbers(document), gradient(document, numbers(document)), 0.1)
        if rows.full:
            step += 1
            rows.save(step)
            rows.saved(step)
    assert 1 <= step <= 5
    assert file.stat().st_blocks * 512 < 10_000_000
