"""The amortised router: what it reads, and that it routes documents that training never met."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag.errors import CheckpointMismatch, InvalidInput
from polyprag.models import BaseModel
from polyprag.router import Router, text_features
from polyprag.trainer import TrainSettings, train
from test_trainer import FACTS, SMALL, arrays, facts, loss_under, stop_after

WITH_ROUTER = replace(SMALL, router=True)


@pytest.fixture
def learner(build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    return BaseModel(build_model(std=0.5), tokenizer, "learner")


def test_features_are_means_of_hidden_states(tiny_base: BaseModel) -> None:
    texts = ["amber mill", "", "birch, coral and denim " * 60]
    found = text_features(tiny_base, texts, batch_size=2)
    size = tiny_base.model.config.hidden_size
    assert found.shape == (3, 3 * size)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    ids = torch.tensor([tiny_base.tokenizer(texts[0]).input_ids])
    with torch.no_grad():
        states = tiny_base.model(input_ids=ids, output_hidden_states=True).hidden_states
    last = len(states) - 1
    expected = torch.cat([states[round(d * last)][0].double().mean(0) for d in (1 / 3, 2 / 3, 1.0)])
    np.testing.assert_allclose(found[0], expected.numpy(), rtol=1e-4, atol=1e-5)
    seen: list[int] = []
    alone = text_features(tiny_base, texts[2:], progress=seen.append)
    np.testing.assert_allclose(alone[0], found[2], rtol=1e-4, atol=1e-5)
    assert seen == [1]


def test_a_model_of_texts_and_images_is_read_by_its_text_model(
    build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    sizes = {"intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 104, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 8}
    images = {**sizes, "hidden_size": 16, "image_size": 28, "patch_size": 14}
    model = build_model("gemma3", text_config=text, vision_config=images, mm_tokens_per_image=1)
    del model.config.hidden_size  # the builder's: no such model has it there
    found = text_features(BaseModel(model, tokenizer, "images"), ["The mill."])
    assert found.shape == (1, 3 * 32)
    assert found.any()


def test_a_router_is_its_arrays() -> None:
    router = Router(7, 3, hidden=5)
    again = Router.of(router.arrays())
    features = np.random.default_rng(0).standard_normal((4, 7), dtype=np.float32)
    assert np.array_equal(router.codes(features), again.codes(features))
    assert router.codes(features).shape == (4, 3)
    broken = router.arrays()
    for name in broken:
        with pytest.raises(InvalidInput, match="no router"):
            Router.of({k: v for k, v in broken.items() if k != name})
    with pytest.raises(InvalidInput, match="no router"):
        Router.of({**broken, "out.bias": np.zeros(4, dtype=np.float32)})


def test_text_alone_routes_a_document_that_training_never_met(learner: BaseModel) -> None:
    """Two documents with the same text get the same route; the router knows the second by its text alone."""
    texts = [f"{fact} " * 8 for fact in FACTS]
    features = text_features(learner, texts)
    settings = replace(WITH_ROUTER, epochs=60, batch_size=4, expert_lr=0.02, router_lr=0.01)
    encoding = train(learner, facts(learner), 4, settings, features=features)
    assert encoding.router is not None
    router = Router.of(encoding.router)
    twins = replace(encoding, routes=router.codes(text_features(learner, texts[::-1])))
    samples = facts(learner)
    for document in range(4):
        own = loss_under(learner, twins, samples[2 * document], 3 - document)
        wrong = [loss_under(learner, twins, samples[2 * document], d) for d in range(4) if d != 3 - document]
        assert own < 1.0
        assert own + 0.3 < min(wrong)
        assert loss_under(learner, encoding, samples[2 * document], document) < 1.0


def test_routes_are_the_routers_output_and_what_was_added(tiny_base: BaseModel) -> None:
    features = text_features(tiny_base, [f"{fact} mill" for fact in FACTS])
    still = replace(WITH_ROUTER, code_lr=0.0)
    encoding = train(tiny_base, facts(tiny_base), 4, still, features=features)
    assert encoding.router is not None
    np.testing.assert_allclose(
        encoding.routes, Router.of(encoding.router).codes(features), rtol=1e-5, atol=1e-6
    )
    moved = train(tiny_base, facts(tiny_base), 4, WITH_ROUTER, features=features)
    assert moved.router is not None
    assert np.abs(moved.routes - Router.of(moved.router).codes(features)).max() > 1e-3

    added = train(tiny_base, facts(tiny_base), 4, still, features=features, frozen=encoding)
    np.testing.assert_allclose(added.routes, encoding.routes, rtol=1e-5, atol=1e-6)
    assert added.router is not None
    assert all(np.array_equal(added.router[k], v) for k, v in encoding.router.items())


def test_a_checkpoint_is_of_the_features_and_the_router_that_it_began_with(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    features = text_features(tiny_base, [f"{fact} mill" for fact in FACTS])
    begun = train(tiny_base, facts(tiny_base), 4, WITH_ROUTER, features=features)
    other = {name: array + 1 for name, array in (begun.router or {}).items()}
    for checkpoint, frozen in ((tmp_path / "c.pt", None), (tmp_path / "d.pt", begun)):
        train(
            tiny_base,
            facts(tiny_base),
            4,
            WITH_ROUTER,
            features=features,
            frozen=frozen,
            checkpoint=checkpoint,
        )
        for changed, kept in ((features + 1, frozen), (features, frozen and replace(frozen, router=other))):
            if changed is not features or kept is not None:
                with pytest.raises(CheckpointMismatch):
                    train(
                        tiny_base,
                        facts(tiny_base),
                        4,
                        WITH_ROUTER,
                        features=changed,
                        frozen=kept,
                        checkpoint=checkpoint,
                    )


@pytest.mark.parametrize("rows", ["memory", "files"])
def test_training_with_a_router_goes_on_to_the_same_bits(
    tiny_base: BaseModel, tmp_path: Path, rows: Any
) -> None:
    features = text_features(tiny_base, [f"{fact} mill" for fact in FACTS])
    settings = replace(WITH_ROUTER, rows=rows, checkpoint_seconds=0.0)
    whole = train(tiny_base, facts(tiny_base), 4, WITH_ROUTER, features=features)
    with pytest.raises(KeyboardInterrupt):
        train(
            tiny_base,
            facts(tiny_base),
            4,
            settings,
            features=features,
            checkpoint=tmp_path / "c.pt",
            progress=stop_after(5),
        )
    resumed = train(tiny_base, facts(tiny_base), 4, settings, features=features, checkpoint=tmp_path / "c.pt")
    assert whole.router is not None
    assert resumed.router is not None
    assert all(resumed.router[k].tobytes() == v.tobytes() for k, v in whole.router.items())
    assert all(arrays(resumed)[k].tobytes() == v.tobytes() for k, v in arrays(whole).items())


def test_a_router_without_features_or_with_a_table_is_refused(tiny_base: BaseModel) -> None:
    with pytest.raises(InvalidInput, match="features of every document"):
        train(tiny_base, facts(tiny_base), 4, WITH_ROUTER)
    with pytest.raises(InvalidInput, match="features of every document"):
        train(tiny_base, facts(tiny_base), 4, WITH_ROUTER, features=np.zeros((3, 8), dtype=np.float32))
    with pytest.raises(InvalidInput, match="table"):
        TrainSettings(router=True, routing="table")
    without = train(tiny_base, facts(tiny_base), 4, replace(SMALL, epochs=1))
    features = text_features(tiny_base, FACTS)
    with pytest.raises(InvalidInput, match="without one"):
        train(tiny_base, facts(tiny_base), 4, WITH_ROUTER, features=features, frozen=without)
