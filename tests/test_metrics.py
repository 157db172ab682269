"""The course of a training on disk: every step once, whatever was interrupted."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from polyprag.metrics import Metrics
from polyprag.trainer import Progress


def step(number: int) -> Progress:
    return Progress(number, 9, 1.0 / number, 100, 0.5, 1 - number / 10)


def kept(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_every_step_is_a_line_and_is_there_at_once(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        for number in (1, 2, 3):
            metrics.step(step(number))
            assert kept(tmp_path) == [asdict(step(n)) for n in range(1, number + 1)]
    assert step(1).tokens_a_second == 200


@pytest.mark.parametrize("torn", ["", '{"step":4,"lo'])
def test_a_run_that_goes_on_takes_its_lost_steps_back(tmp_path: Path, torn: str) -> None:
    with Metrics(tmp_path) as metrics:
        for number in (1, 2, 3):
            metrics.step(step(number))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(torn)
    with Metrics(tmp_path) as metrics:  # from a checkpoint of step 1
        for number in (2, 3, 4):
            metrics.step(step(number))
    assert [row["step"] for row in kept(tmp_path)] == [1, 2, 3, 4]
    with Metrics(tmp_path) as metrics:  # anew
        metrics.step(step(1))
    assert [row["step"] for row in kept(tmp_path)] == [1]


def test_tensorboard_is_written_where_it_is_installed(tmp_path: Path) -> None:
    with Metrics(tmp_path) as metrics:
        metrics.step(step(1))
    installed = importlib.util.find_spec("tensorboard") is not None
    assert bool(list((tmp_path / "tensorboard").glob("metrics/events*"))) == installed
