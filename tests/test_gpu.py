"""On a GPU what the other tests check on a processor; skipped where there is none.

The reference is the processor, in float32: the same store, samples and seeds there and here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag import Store
from polyprag.encode import Recipe, add, encode
from polyprag.engine import Engine
from polyprag.generation import GenerationSettings, generate
from polyprag.models import BaseModel, load_base_model
from polyprag.recipes import recipe_of, with_settings
from polyprag.router import text_features
from polyprag.serving.decode import Batch, Row, check
from polyprag.trainer import train, train_loras
from routed import attach, draw_routes, logits, merged, some_ids
from test_decode import in_company, questions
from test_engine import DOCUMENTS, QUESTIONS, essence
from test_generation import PROMPTS, routed_model, texts
from test_trainer import FACTS, SMALL, facts, loss_under, stop_after
from test_trainer_forms import largest_difference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def base(build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    """The tiny model on the processor."""
    return BaseModel(build_model(std=0.5), tokenizer, "tiny")


def on_gpu(base: BaseModel, dtype: torch.dtype = torch.float32) -> BaseModel:
    """The same model there: the first is not touched."""
    return replace(base, model=copy.deepcopy(base.model).to("cuda", dtype))


# What a model computes under a route


@pytest.mark.parametrize("mixing", ["exact", "factors"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_computed_under_their_routes(tiny_base: BaseModel, dtype: torch.dtype, mixing: Any) -> None:
    here = on_gpu(tiny_base, dtype)
    routed, reference = attach(here.model, mixing=mixing), attach(tiny_base.model, mixing=mixing)
    routed.load_experts(reference.experts())
    reference.detach()
    w, ids = draw_routes(3, routed), some_ids(3, 9)
    with routed.route(w.to("cuda")):
        found = logits(here.model, ids.to("cuda")).double().cpu()
    for row in range(3):
        exact = logits(merged(tiny_base.model, reference, w[row], mixing), ids[row : row + 1])[0]
        near = 1e-4 if dtype == torch.float32 else 0.03
        assert (found[row] - exact).norm() < near * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "tokens", "inputs", "outputs", "n"),
    [
        (1, 1, 576, 1536, 32),
        (3, 3, 72, 136, 32),
        (2, 34, 40, 24, 10),
        (1, 5, 16, 260, 33),
        (4, 4, 130, 48, 1),
    ],
)
def test_the_kernel_computes_what_torch_does(
    rows: int, tokens: int, inputs: int, outputs: int, n: int, dtype: torch.dtype
) -> None:
    kernels = pytest.importorskip("polyprag.kernels")
    torch.manual_seed(0)
    shapes = (tokens, outputs), (tokens, inputs), (n, inputs), (n, outputs), (rows, n)
    y, x, A, B, gate = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
    exact = kernels.gated_pair(*(t.double() for t in (y, x, A, B, gate)))
    kernels.gated_pair_(y, x, A, B, gate)
    assert (y.double() - exact).norm() < (1e-5 if dtype == torch.float32 else 0.02) * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_computes_by_the_kernel_what_it_does_by_torch(
    tiny_base: BaseModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = pytest.importorskip("polyprag.kernels")
    here = on_gpu(tiny_base, dtype)
    routed = attach(here.model, dtype=dtype)
    w, ids = draw_routes(2, routed).to("cuda"), some_ids(2, 3).to("cuda")
    with routed.route(w):
        expected = logits(here.model, ids).double()
    routed.detach()
    routed = attach(here.model, dtype=dtype, kernels="triton")
    calls: list[int] = []
    by_kernel = kernels.gated_pair_
    monkeypatch.setattr(kernels, "gated_pair_", lambda *t: calls.append(1) or by_kernel(*t))
    with routed.route(w):
        found = logits(here.model, ids).double()
    assert len(calls) == len(routed.layers)
    assert (found - expected).norm() < (1e-4 if dtype == torch.float32 else 0.03) * expected.norm()


# Answers


def test_answers_are_those_of_a_processor(
    make_store: Callable[..., Path], tmp_path: Path, tiny_base: BaseModel
) -> None:
    path = make_store(tmp_path / "mills.polyprag", DOCUMENTS, unrouted=1)
    asked = [*QUESTIONS, "?!", "A mill of amber, or rather a mill of birch?"]
    with Engine.open(path, tiny_base) as engine:
        expected = [list(map(essence, engine.ask_batch(asked, k=k))) for k in (1, 3)]
    with Engine.open(path, on_gpu(tiny_base)) as engine:
        assert [list(map(essence, engine.ask_batch(asked, k=k))) for k in (1, 3)] == expected
        assert [essence(engine.ask(q, k=1)) for q in asked] == expected[0]


def test_a_model_is_loaded_to_where_it_computes_in_bf16(model_folder: Path) -> None:
    base = load_base_model(model_folder)
    assert base.device.type == "cuda"
    assert base.model.dtype == torch.bfloat16
    assert load_base_model(model_folder, device="cpu").device.type == "cpu"


def test_generation_is_that_of_a_processor(base: BaseModel) -> None:
    settings = GenerationSettings(max_new_tokens=12, stop=(), batch_size=2)
    routed, routes = routed_model(base, len(PROMPTS))
    expected = texts(base, PROMPTS, settings, routed=routed, routes=routes)
    experts = {name: a.clone() for name, a in routed.experts().items()}
    routed.detach()
    here = on_gpu(base)
    routed, _ = routed_model(here, len(PROMPTS))
    routed.load_experts(experts)
    assert texts(here, PROMPTS, settings, routed=routed, routes=routes) == expected


def test_steps_compiled_to_a_graph_give_the_same_texts(tiny_base: BaseModel) -> None:
    torch.compiler.reset()
    here = on_gpu(tiny_base)
    routed, routes = routed_model(here, len(PROMPTS))
    settings = GenerationSettings(8, (), compile=True)
    for more in (routes, routes.flip(0)):
        found = texts(here, PROMPTS, settings, routed=routed, routes=more)
        plain = replace(settings, compile=False)
        assert found == texts(here, PROMPTS, plain, routed=routed, routes=more)
    assert hasattr(here.model, "_compiled_call")


def test_a_server_decodes_rows_that_come_and_go_as_if_alone(tiny_base: BaseModel) -> None:
    here = on_gpu(tiny_base)
    routed = attach(here.model)
    check(here, routed)
    asked = questions(10, routed)
    rows, alone = [[Row(**q) for q in asked] for _ in range(2)]
    in_company(Batch(here, routed), rows, seed=1)
    for row in alone:
        in_company(Batch(here, routed), [row], seed=1)
    assert [row.new for row in rows] == [row.new for row in alone]
    assert len({tuple(row.new[:3]) for row in rows}) > 4, "the routes tell them apart"


def test_answers_with_sampling_repeat(tiny_base: BaseModel) -> None:
    here = on_gpu(tiny_base)
    settings = GenerationSettings(max_new_tokens=12, stop=(), temperature=1.0, top_p=0.9, seed=3)
    assert dict(generate(here, PROMPTS, settings)) == dict(generate(here, PROMPTS, settings))


# Training


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routing": "table"},
        {"phi": "softmax", "top_k": 2},
        {"mixing": "factors", "routing": "table"},
        {"checkpointing": True, "accumulation": 2},
        {"rows": "files"},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "code",
)
def test_training_puts_each_document_into_its_own_route(
    base: BaseModel, tmp_path: Path, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    settings = replace(SMALL, epochs=50, batch_size=4, expert_lr=0.02, **changes)
    if settings.mixing == "factors" and dtype == torch.float16:
        settings = replace(settings, expert_lr=0.005, epochs=100)  # the products of factors overflow
    here = on_gpu(base, dtype)
    encoding = train(here, facts(here), len(FACTS), settings, checkpoint=tmp_path / "c.pt")
    losses = np.array(encoding.losses)
    assert np.isfinite(losses).all()
    assert losses[-8:].mean() < 0.3 * losses[:8].mean()
    # What was trained there is judged here, in float32.
    encoding = replace(encoding, routes=np.array(encoding.routes))
    sample = facts(base)[0]
    own = loss_under(base, encoding, sample, 0)
    assert own + 0.5 < min(loss_under(base, encoding, sample, d) for d in range(1, 4))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks
@pytest.mark.parametrize("compile", [False, True])
def test_routes_of_added_documents_are_trained_as_on_a_processor(base: BaseModel, compile: bool) -> None:
    frozen = train(base, facts(base), 4, replace(SMALL, epochs=20, batch_size=4, expert_lr=0.02))
    new = facts(base, FACTS[::-1])
    expected = train(base, new, 4, SMALL, frozen=frozen)
    torch.compiler.reset()
    found = train(on_gpu(base), new, 4, replace(SMALL, compile=compile), frozen=frozen)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0.01)


def test_training_goes_on_here_or_there_from_where_it_was_stopped(base: BaseModel, tmp_path: Path) -> None:
    """The checkpoint of a GPU on a processor, and the other way round."""
    here = on_gpu(base)
    for number, (first, second) in enumerate([(here, here), (here, base), (base, here)]):
        at = tmp_path / f"{number}.pt"
        with pytest.raises(KeyboardInterrupt):
            train(first, facts(base), 4, SMALL, checkpoint=at, progress=stop_after(5))
        found = train(second, facts(base), 4, SMALL, checkpoint=at)
        # Experts are drawn where they are trained.
        expected = train(first, facts(base), 4, SMALL)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-3)
        assert largest_difference(found, expected) < 0.01


def test_loras_of_single_documents_are_trained(base: BaseModel) -> None:
    here = on_gpu(base)
    settings = replace(SMALL, routing="lora", lora_lr=0.02, clip=0.0, epochs=20)
    steps: list[float] = []
    rows = train_loras(here, facts(here), 4, settings, progress=lambda p: steps.append(p.loss))
    assert np.isfinite(rows).all()
    assert np.mean(steps[-8:]) < 0.5 * np.mean(steps[:8])


def test_a_router_reads_as_on_a_processor_and_learns(base: BaseModel) -> None:
    here = on_gpu(base)
    read = [f"{fact} " * 8 for fact in FACTS]
    features = text_features(here, read)
    np.testing.assert_allclose(features, text_features(base, read), rtol=1e-3, atol=1e-3)
    settings = replace(SMALL, router=True, router_lr=0.01, expert_lr=0.02, epochs=60, batch_size=4)
    encoding = train(here, facts(here), 4, settings, features=features)
    assert np.mean(encoding.losses[-8:]) < 0.5 * np.mean(encoding.losses[:8])


# From documents to answers


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("system", ["polyprag", "poly-prag", "prag", "dyprag"])
def test_documents_are_encoded_added_and_asked(
    model_folder: Path, tmp_path: Path, system: Any, dtype: str
) -> None:
    base = load_base_model(model_folder, dtype=dtype)
    recipe: Recipe = with_settings(recipe_of(system), ["train.epochs=1"])
    path = tmp_path / "mills.polyprag"
    encode(base, DOCUMENTS[:6], path, recipe, work=tmp_path)
    if system != "prag":
        add(base, DOCUMENTS[6:], path, work=tmp_path)
    with Store.open(path) as store:
        assert store.verify().documents == (6 if system == "prag" else 8)
    with Engine.open(path, base) as engine:
        answers = engine.ask_batch(QUESTIONS)
        assert len(answers) == len(QUESTIONS)
        assert all(a.documents for a in answers[:6])
