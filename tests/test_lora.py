"""One LoRA a document: trained together as if alone, and kept in a store like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyprag import Store
from polyprag._polyprag import Document
from polyprag.encode import Recipe, add, encode
from polyprag.engine import Engine
from polyprag.errors import InvalidInput
from polyprag.layers import RoutedModel
from polyprag.models import BaseModel
from polyprag.samples import Sample
from polyprag.systems.polyprag import combined
from polyprag.trainer import Encoding, train
from test_trainer import FACTS, SMALL, arrays, facts, stop_after

LORA = replace(SMALL, routing="lora", lora_lr=0.01, clip=0.0, from_depth=0.0)


def alone(base: BaseModel, sample: Sample, start: dict[str, torch.Tensor], epochs: int) -> RoutedModel:
    """One LoRA trained on one sample by torch's own Adam; detached when it comes back."""
    routed = RoutedModel.attach(base.model, experts=1, rank=LORA.rank, alpha=LORA.alpha)
    routed.load_experts(start)
    optimiser = torch.optim.Adam(routed.parameters())
    ids = torch.tensor([sample.ids])
    labels = ids.clone()
    labels[:, : sample.loss_from] = -100
    try:
        for step in range(epochs):
            for group in optimiser.param_groups:
                group["lr"] = LORA.lora_lr * (1 - step / epochs)
            optimiser.zero_grad()
            with routed.route(torch.ones(1, routed.groups, 1)):
                torch.autograd.backward(base.model(input_ids=ids, labels=labels).loss)
            optimiser.step()
    finally:
        routed.detach()
    return routed


def test_documents_trained_together_are_as_if_each_was_alone(tiny_base: BaseModel) -> None:
    samples = facts(tiny_base)[::2]  # one of every document, all in each batch
    epochs = 12
    settings = replace(LORA, epochs=epochs, batch_size=4)
    together = train(tiny_base, samples, 4, settings)
    untrained = train(tiny_base, samples, 4, replace(settings, lora_lr=0.0, epochs=1))
    for name, array in untrained.experts.items():
        same_for_all = array if name.endswith(".A") else array.swapaxes(0, 1)
        assert all(np.array_equal(same_for_all[0], a) for a in same_for_all)
        assert name.endswith(".A") or not array.any()

    def of(encoding: Encoding, document: int) -> dict[str, torch.Tensor]:
        """One document's LoRA as the only expert."""
        own = slice(document, document + 1)
        return {
            name: torch.from_numpy(a[own] if name.endswith(".A") else a[:, own])
            for name, a in encoding.experts.items()
        }

    for document in range(4):
        expected = alone(tiny_base, samples[document], of(untrained, document), epochs).experts()
        for name, found in of(together, document).items():
            torch.testing.assert_close(found, expected[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize("rows", ["memory", "files"])
def test_it_goes_on_to_the_same_bits(tiny_base: BaseModel, tmp_path: Path, rows: Any) -> None:
    settings = replace(LORA, rows=rows, checkpoint_seconds=0.0)
    whole = train(tiny_base, facts(tiny_base), 4, LORA)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, facts(tiny_base), 4, settings, checkpoint=tmp_path / "c.pt", progress=stop_after(5))
    resumed = train(tiny_base, facts(tiny_base), 4, settings, checkpoint=tmp_path / "c.pt")
    assert all(arrays(resumed)[k].tobytes() == v.tobytes() for k, v in arrays(whole).items())


def test_a_store_of_loras_answers_and_tells_its_size(tiny_base: BaseModel, tmp_path: Path) -> None:
    documents = [
        Document(f"d{i}", f"The {fact} mill stands in {fact}ost.", f"Mill {fact}")
        for i, fact in enumerate(FACTS)
    ]
    recipe = Recipe(train=LORA)
    encode(tiny_base, documents, tmp_path / "s", recipe, expert_dtype="float32")
    with Store.open(tmp_path / "s") as store:
        assert store.spec.codec == "sparse(1)"
        assert (store.spec.experts, store.spec.groups) == (4, 1)
        routes = store.routes([d.id for d in documents])
        assert np.array_equal(routes[:, 0], np.eye(4, dtype=np.float32))
        info = store.info()
        experts = next(part.bytes for part in info.parts if part.role == "experts")
        assert experts > 4 * info.lora_bytes_per_document
    with Engine.open(tmp_path / "s", tiny_base) as engine:
        assert engine.store.spec.combination.rule == "sum", "as PRAG does"
        assert np.array_equal(combined(engine.store, ["d0", "d1"], None), routes[:2].sum(0))
        assert engine.ask("Where does the amber mill stand?", k=2).documents
    with pytest.raises(InvalidInput, match="encode anew"):
        add(tiny_base, [Document("new", "A new mill.")], tmp_path / "s")
    with pytest.raises(InvalidInput, match="one LoRA a document"):
        encode(tiny_base, documents, tmp_path / "t", recipe, codec="q8")


def test_what_is_not_shared_cannot_stay(tiny_base: BaseModel) -> None:
    first = train(tiny_base, facts(tiny_base), 4, replace(LORA, epochs=1))
    with pytest.raises(InvalidInput, match="lora"):
        train(tiny_base, facts(tiny_base), 4, LORA, frozen=first)
