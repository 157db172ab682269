"""A network that makes LoRAs of texts (DyPRAG): its losses, documents that it never met, its store."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag import Store
from polyprag._polyprag import Document
from polyprag.batches import collate
from polyprag.encode import Recipe, add, encode
from polyprag.engine import Engine
from polyprag.errors import InvalidInput
from polyprag.lora import parts_of
from polyprag.loss import CausalLoss
from polyprag.models import BaseModel
from polyprag.recipes import recipe_of, with_settings
from polyprag.router import Router, text_features
from polyprag.samples import Sample
from polyprag.teacher import Teacher
from polyprag.trainer import TrainSettings, train, train_loras
from routed import ALPHA, attach, delta, merged
from test_trainer import FACTS, SMALL, arrays, facts, loss_under, stop_after

DYPRAG = replace(
    SMALL, mixing="factors", router=True, router_alone=1.0, mse_weight=100.0, kl_weight=0.01, expert_lr=0.01
)
LORA = replace(SMALL, routing="lora", lora_lr=0.01, clip=0.0)


@pytest.fixture
def learner(build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    return BaseModel(build_model(std=0.5), tokenizer, "learner")


def loras_of(base: BaseModel, **changes: Any) -> np.ndarray:
    return train_loras(base, facts(base), 4, replace(LORA, **changes))


def under_lora(model: PreTrainedModel, routed: Any, lora: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The logits in float64 of one sample, the LoRA of a document merged into a copy of the base model."""
    reference = copy.deepcopy(model).double()
    for m, (a, b) in zip(routed.modules, parts_of(routed, lora.unsqueeze(0)), strict=True):
        change = ALPHA / routed.rank * b[0].double().T @ a[0].double()
        reference.get_submodule(m.name).weight.data += change
    return reference(input_ids=ids).logits[0]


def test_the_three_losses_are_those_of_a_reference_in_float64(tiny_base: BaseModel) -> None:
    """Two samples of two documents; whole LoRAs are merged into float64 copies of the base model."""
    samples = [
        Sample(i, tuple(tiny_base.tokenizer(t).input_ids), 3) for i, t in enumerate(("Q: amber?", "mill"))
    ]
    plain = copy.deepcopy(tiny_base.model)
    routed = attach(tiny_base.model, mixing="factors")
    try:
        draw = torch.Generator().manual_seed(0)
        width = sum(routed.rank * n for m in routed.modules for n in (m.in_features, m.out_features))
        loras = 0.2 * torch.randn(2, width, generator=draw)
        routes = torch.randn(2, *routed.route_shape, generator=draw)
        teacher, loss = Teacher(routed, loras.numpy()), CausalLoss(tiny_base)
        ids, mask, targets = collate(samples, 0)
        with torch.no_grad():
            with teacher.lent(loras, torch.eye(2)):
                taught = loss.outputs(ids, mask, targets)
            with routed.route(routes):
                outputs = loss.outputs(ids, mask, targets)
            errors = teacher.errors(routes, loras)
        found = loss.losses(outputs, targets, 1.0, taught, 1.0)

        entropy = divergence = 0.0
        for i, sample in enumerate(samples):
            own = torch.tensor([sample.ids])
            made = merged(plain, routed, routes[i], "factors")(input_ids=own).logits[0]
            trained = under_lora(plain, routed, loras[i], own)
            p, q = (x[2:-1].log_softmax(-1) for x in (made, trained))
            entropy += float(nn.functional.nll_loss(p, own[0, 3:], reduction="sum"))
            divergence += float((q.exp() * (q - p)).sum())
            error = 0.0
            for m, (a, b) in zip(routed.modules, parts_of(routed, loras[i : i + 1]), strict=True):
                experts, w = routed.experts(), routes[i, m.group].double()
                A = sum(w[k] * experts[f"{m.name}.A"][k].double() for k in range(len(w)))
                B = sum(w[k] * experts[f"{m.name}.B"][:, k].double() for k in range(len(w)))
                error += float(((A - a[0]) ** 2).mean() + ((B - b[0].T) ** 2).mean())
            assert float(errors[i]) == pytest.approx(error, rel=1e-5)
        assert float(found.cross_entropy) == pytest.approx(entropy, rel=1e-4)
        assert float(found.divergence) == pytest.approx(divergence, rel=1e-4)
        assert divergence > 0.1
    finally:
        routed.detach()


def test_a_lent_model_is_given_back(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    before, shape = routed.parameters(), routed.route_shape
    width = sum(routed.rank * n for m in routed.modules for n in (m.in_features, m.out_features))
    teacher = Teacher(routed, np.zeros((3, width), dtype=np.float32))
    with pytest.raises(KeyboardInterrupt), teacher.lent(torch.zeros(3, width), torch.eye(3)):
        assert routed.route_shape == (shape[0], 3)
        raise KeyboardInterrupt
    assert all(a is b for a, b in zip(before, routed.parameters(), strict=True))
    assert routed.route_shape == shape
    with pytest.raises(InvalidInput, match="loras"):
        Teacher(routed, np.zeros((3, width + 1), dtype=np.float32))
    routed.detach()


def test_training_begins_at_the_mean_of_the_loras(tiny_base: BaseModel) -> None:
    """With equal weights, the experts are that mean; so is what the network first makes, nearly."""
    loras = (
        np.random.default_rng(0)
        .normal(0, 1, loras_of(tiny_base, epochs=1, from_depth=0.0).shape)
        .astype(np.float32)
    )
    still = replace(
        DYPRAG, from_depth=0.0, expert_lr=0.0, decoder_lr=0.0, router_lr=0.0, code_lr=0.0, epochs=1
    )
    features = text_features(tiny_base, FACTS)
    encoding = train(tiny_base, facts(tiny_base), 4, still, features=features, loras=loras)
    routed = attach(tiny_base.model, experts=SMALL.experts, rank=SMALL.rank)
    parts = list(parts_of(routed, torch.from_numpy(loras)))
    for m, (a, b) in zip(routed.modules, parts, strict=True):
        np.testing.assert_allclose(encoding.experts[f"{m.name}.A"].mean(0), a.mean(0), atol=1e-5)
        np.testing.assert_allclose(encoding.experts[f"{m.name}.B"].mean(1), b.mean(0).T, atol=1e-5)
    routed.detach()


def test_a_text_that_training_never_met_gets_a_lora_that_answers(learner: BaseModel) -> None:
    texts = [f"{fact} " * 8 for fact in FACTS]
    loras = loras_of(learner, epochs=40, batch_size=4)
    settings = replace(
        DYPRAG, epochs=60, batch_size=4, expert_lr=0.02, router_lr=0.01, mse_weight=1.0, kl_weight=0.01
    )
    steps: list[Any] = []
    features = text_features(learner, texts)
    encoding = train(
        learner, facts(learner), 4, settings, features=features, loras=loras, progress=steps.append
    )
    assert encoding.router is not None
    assert np.mean([s.kl for s in steps[-8:]]) < 0.5 * np.mean([s.kl for s in steps[:8]])
    assert np.mean([s.mse for s in steps[-8:]]) < np.mean([s.mse for s in steps[:8]])
    # Other words around the same fact: no text of training.
    new = text_features(learner, [f"{fact} " * 7 for fact in FACTS])
    made = replace(encoding, routes=Router.of(encoding.router).codes(new))
    assert len({row.tobytes() for row in made.routes}) == 4
    samples = facts(learner)
    for document in range(4):
        own = loss_under(learner, made, samples[2 * document], document)
        wrong = [loss_under(learner, made, samples[2 * document], d) for d in range(4) if d != document]
        assert own + 0.3 < min(wrong)


@pytest.mark.parametrize("rows", ["memory", "files"])
def test_it_goes_on_to_the_same_bits(tiny_base: BaseModel, tmp_path: Path, rows: Any) -> None:
    features = text_features(tiny_base, FACTS)
    whole_loras = loras_of(tiny_base)
    with pytest.raises(KeyboardInterrupt):
        train_loras(
            tiny_base,
            facts(tiny_base),
            4,
            replace(LORA, rows=rows),
            checkpoint=tmp_path / "l.pt",
            progress=stop_after(5),
        )
    loras = train_loras(
        tiny_base, facts(tiny_base), 4, replace(LORA, rows=rows), checkpoint=tmp_path / "l.pt"
    )
    assert loras.tobytes() == whole_loras.tobytes()
    options: dict[str, Any] = {"features": features, "loras": loras}
    whole = train(tiny_base, facts(tiny_base), 4, DYPRAG, **options)
    options["checkpoint"] = tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, facts(tiny_base), 4, DYPRAG, progress=stop_after(5), **options)
    resumed = train(tiny_base, facts(tiny_base), 4, DYPRAG, **options)
    assert all(arrays(resumed)[k].tobytes() == v.tobytes() for k, v in arrays(whole).items())
    parts = train(
        tiny_base, facts(tiny_base), 4, replace(DYPRAG, accumulation=2), features=features, loras=loras
    )
    for name, array in arrays(whole).items():
        np.testing.assert_allclose(arrays(parts)[name], array, atol=1e-4)


def test_a_store_keeps_what_the_network_makes_and_adds_in_one_pass(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    documents = [
        Document(f"d{i}", f"The {fact} mill stands in {fact}ost.", f"Mill {fact}")
        for i, fact in enumerate(FACTS)
    ]
    path = tmp_path / "s"
    recipe = Recipe(train=DYPRAG, teacher=replace(LORA, epochs=1))
    encode(tiny_base, documents, path, recipe, codec="code(6)", expert_dtype="float32")
    assert sorted(p.name for p in (tmp_path / "s.work").glob("*.pt*")) == []
    with Store.open(path) as store:
        assert Recipe.of(store) == recipe
        assert (store.spec.mixing, store.spec.phi, store.spec.experts) == ("factors", "linear", 4)
        assert store.router is not None
        info = store.info()
        routes = next(part.bytes for part in info.parts if part.role == "routes")
        assert routes < 4 * info.lora_bytes_per_document / 2
        trained = store.routes([d.id for d in documents], kind="code")
    new = [Document("n0", "The ochre mill stands in ochreost."), Document("n1", "Slate is a stone.")]
    assert add(tiny_base, new, path) == 2
    with Store.open(path) as store:
        assert np.array_equal(store.routes([d.id for d in documents], kind="code"), trained)
        codes = store.routes(["n0", "n1"], kind="code")
        expected = Router.of(store.router).codes(text_features(tiny_base, [str(d.text) for d in new]))
        np.testing.assert_allclose(codes, expected, atol=np.abs(expected).max() / 50)
        first, second = torch.from_numpy(store.routes(["n0", "n1"]))
        m = store.spec.modules[0]
        A, B = (torch.from_numpy(np.array(store.experts[f"{m.name}.{end}"])) for end in "AB")
        one, other = (delta(A, B, w[m.group], "factors") for w in (first, second))
        assert float((one - other).norm()) > 1e-3 * float(one.norm())
    with Engine.open(path, tiny_base) as engine:
        assert engine.store.spec.combination.rule == "mean"
        assert engine.ask("Where does the ochre mill stand?", k=2).documents[0].id == "n0"


def test_what_does_not_fit_is_refused(tiny_base: BaseModel) -> None:
    features = text_features(tiny_base, FACTS)
    for loras in (None, loras_of(tiny_base, epochs=1)[:3]):
        with pytest.raises(InvalidInput, match="a trained LoRA of every document"):
            train(tiny_base, facts(tiny_base), 4, DYPRAG, features=features, loras=loras)
    with pytest.raises(InvalidInput, match="mixing 'factors'"):
        TrainSettings(mse_weight=1.0)
    with pytest.raises(InvalidInput, match="not of LoRAs"):
        TrainSettings(routing="lora", kl_weight=1.0)
    with pytest.raises(InvalidInput, match="'lora'"):
        train_loras(tiny_base, facts(tiny_base), 4, SMALL)


def test_its_recipe_learns_from_prags() -> None:
    recipe = recipe_of("dyprag")
    assert recipe.amortised
    assert recipe.loras is not None
    assert (recipe.loras.routing, recipe.loras.rank, recipe.loras.epochs) == ("lora", recipe.train.rank, 1)
    assert with_settings(recipe, ["teacher.epochs=2"]).loras == replace(recipe.loras, epochs=2)
    assert with_settings(recipe, ["train.rank=4"]).loras == replace(recipe.loras, rank=4)
    assert recipe.seeded(3).teacher == replace(recipe.teacher, seed=3)  # type: ignore[type-var]
    assert recipe_of().loras is None
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(InvalidInput, match="dyprag"):
        with_settings(recipe_of(), ["teacher.epochs=2"])
