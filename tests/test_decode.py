"""Rows that join and leave a running batch say what they say alone, whoever is beside them."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag.errors import InvalidInput
from polyprag.generation import GenerationSettings, generate
from polyprag.layers import RoutedModel
from polyprag.models import BaseModel
from polyprag.serving.decode import Batch, Row, Sampling, check
from routed import attach, draw_routes

Bases = Callable[..., tuple[BaseModel, RoutedModel]]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {},  # positions that are learnt
    "mistral": {"sliding_window": 6},
    "qwen2_moe": {},
}


@pytest.fixture
def bases(build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Bases:
    def make(family: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[BaseModel, RoutedModel]:
        model = build_model(family, **FAMILIES[family]).to(dtype)
        return BaseModel(model, tokenizer, family), attach(model)

    return make


def questions(count: int, routed: RoutedModel, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of all lengths, each with a route of its own, one of them without."""
    rng = random.Random(seed)
    routes = draw_routes(count, routed, seed).numpy()
    return [
        {
            "ids": [rng.randrange(3, 100) for _ in range(rng.randrange(1, 25))],
            "route": None if number == 1 else routes[number],
            "limit": rng.randrange(1, 20),
        }
        for number in range(count)
    ]


def in_company(batch: Batch, rows: list[Row], seed: int, places: int = 4) -> None:
    """Decode rows that come at any time, while there is a place."""
    rng = random.Random(seed)
    waiting = list(rows)
    while waiting or batch.rows:
        coming = min(rng.randrange(3), places - len(batch.rows), len(waiting))
        if coming:
            batch.join(waiting[:coming])
            waiting = waiting[coming:]
            batch.leave()
        for _ in range(rng.randrange(1, 4)):
            if batch.rows:
                batch.step()
                batch.leave()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_row_is_decoded_as_if_alone(bases: Bases, family: str) -> None:
    base, routed = bases(family)
    asked = questions(10, routed)
    rows = [Row(**q) for q in asked]
    in_company(Batch(base, routed), rows, seed=1)
    # By transformers' own generation, one prompt at a time.
    for row, q in zip(rows, asked, strict=True):
        ids = torch.tensor([q["ids"]])
        route = torch.zeros(1, *row_shape(routed)) if q["route"] is None else torch.tensor(q["route"])[None]
        with routed.route(route), torch.no_grad():
            alone = base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=q["limit"], do_sample=False
            )[0, ids.shape[1] :].tolist()
        assert row.new == alone
        assert row.finish == ("stop" if alone[-1] == 1 else "length")
    assert len({tuple(row.new[:3]) for row in rows}) > 4, "the routes tell them apart"


def row_shape(routed: RoutedModel) -> tuple[int, int]:
    return routed.groups, next(iter(routed.experts().values())).shape[0]


def test_a_row_says_what_the_engines_generation_says(bases: Bases) -> None:
    base, routed = bases()
    prompts = [f"Question: Where is mill {n}?\nAnswer:" for n in range(5)]
    routes = draw_routes(5, routed)
    whole = dict(generate(base, prompts, GenerationSettings(24, ()), routed=routed, routes=routes))
    stop = "\n", whole[0][9]
    settings = GenerationSettings(max_new_tokens=24, stop=stop)
    expected = dict(generate(base, prompts, settings, routed=routed, routes=routes))
    rows = [
        Row(ids=base.tokenizer(p).input_ids, route=w.numpy(), limit=24, stop=stop)
        for p, w in zip(prompts, routes, strict=True)
    ]
    in_company(Batch(base, routed), rows, seed=2)
    assert [row.text for row in rows] == [expected[i].strip() for i in range(5)]
    assert rows[0].finish == "stop"
    assert len(rows[0].text) < len(whole[0])


@dataclass(eq=False, kw_only=True)
class Led(Row):
    """Keeps its logits, and goes on by tokens that were laid down before."""

    sampling: Sampling = Sampling(temperature=1.0)
    path: tuple[int, ...] = ()
    seen: list[torch.Tensor] = field(default_factory=list)

    def choose(self, logits: torch.Tensor) -> int:
        self.seen.append(logits.double())
        return self.path[len(self.new)]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_logits_are_those_of_the_row_alone_and_of_no_other_route(
    bases: Bases, dtype: torch.dtype, near: float
) -> None:
    base, routed = bases(dtype=dtype)
    path = tuple(range(10, 30))
    asked = [{**q, "path": path} for q in questions(8, routed)]
    rows = [Led(**q) for q in asked]
    in_company(Batch(base, routed), list(rows), seed=3)
    batch = Batch(base, routed)

    def distance(row: Led, other: Led) -> float:
        a, b = torch.stack(row.seen), torch.stack(other.seen)
        return float((a - b).norm() / b.norm())

    for number, (row, q) in enumerate(zip(rows, asked, strict=True)):
        alone = Led(**q)
        in_company(batch, [alone], seed=0)
        assert len(row.seen) == q["limit"]
        assert distance(row, alone) < near
        swapped = Led(**{**q, "route": asked[(number + 2) % len(asked)]["route"]})
        in_company(batch, [swapped], seed=0)
        assert distance(swapped, alone) > 4 * near, "another route would be told apart"


def test_rows_that_are_taken_out_leave_the_others_alone(bases: Bases) -> None:
    base, routed = bases()
    asked = [{**q, "limit": 12} for q in questions(4, routed)]
    rows, alone = [Row(**q) for q in asked], [Row(**q) for q in asked]
    batch = Batch(base, routed)
    batch.join(rows)
    batch.step()
    assert batch.leave([rows[0], rows[2]]) == [rows[0], rows[2]]
    while batch.rows:
        batch.step()
        batch.leave()
    for row in alone:
        in_company(batch, [row], seed=0)
    assert rows[1].new == alone[1].new
    assert rows[3].new == alone[3].new
    assert rows[0].new == alone[0].new[:2]


def test_numbers_that_are_none_end_their_row_alone(bases: Bases) -> None:
    base, routed = bases()
    good, bad = questions(2, routed)
    bad["route"] = np.full(row_shape(routed), np.inf, dtype=np.float32)
    rows = [Row(**good), Row(**bad), Row(**good)]
    batch = Batch(base, routed)
    batch.join(rows)
    assert batch.leave() == [rows[1]]
    assert rows[1].finish == "error"
    while batch.rows:
        batch.step()
        batch.leave()
    alone = Row(**good)
    in_company(batch, [alone], seed=0)
    assert rows[0].new == rows[2].new == alone.new


def test_a_row_that_cannot_choose_ends_alone(bases: Bases) -> None:
    base, routed = bases()
    good, bad = questions(2, routed)

    class Broken(Row):
        def choose(self, logits: torch.Tensor) -> int:
            raise RuntimeError("no such number")

    rows = [Row(**good), Broken(**bad, sampling=Sampling(1.0))]
    batch = Batch(base, routed)
    batch.join(rows)
    assert batch.leave() == [rows[1]]
    assert rows[1].finish == "error"
    assert len(rows[0].new) == 1


# --- how a token is chosen ----------------------------------------------------------------------------------


def row(**changes: Any) -> Row:
    return Row(ids=[5], route=None, limit=1000, **changes)


def test_tokens_are_drawn_as_temperature_and_top_p_say() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (1.0, 0.01)):
        p = torch.softmax(logits.double() / temperature, 0)
        kept = p.cumsum(0) - p < top_p  # the logits are in order
        p = torch.where(kept, p, 0)
        p /= p.sum()
        drawing = row(sampling=Sampling(temperature, top_p, seed=7))
        draws = torch.tensor([drawing.choose(logits) for _ in range(1500)])
        found = torch.bincount(draws, minlength=5).double() / 1500
        assert (found[~kept] == 0).all()
        assert ((found - p).abs() <= 5 * (p * (1 - p) / 1500).sqrt() + 1e-12).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-39, 5e-324])
def test_a_temperature_next_to_none_takes_the_likeliest(bases: Bases, temperature: float) -> None:
    logits = torch.tensor([-200.0, 1.0, 150.0, 149.0])
    assert row(sampling=Sampling(temperature)).choose(logits) == 2
    base, _ = bases()
    greedy = GenerationSettings(8, ())
    asked = ["Where is Ost?", "Who?"]
    cold = dict(generate(base, asked, replace(greedy, temperature=temperature)))
    assert cold == dict(generate(base, asked, greedy))


def test_rounding_does_not_decide_between_tokens_that_are_as_likely() -> None:
    """Which of two such tokens is the likelier one is not the same in every batch."""
    logits = torch.cat([torch.full((12,), 3.0), torch.linspace(0, -2, 30)])
    other = logits + torch.tensor([1e-6, -1e-6]).repeat(21)
    for top_p in (0.9, 1.0):
        for seed in range(50):
            drawn = [
                Row(ids=[1], route=None, limit=1, sampling=Sampling(1.0, top_p, seed)).choose(given)
                for given in (logits, other)
            ]
            assert drawn[0] == drawn[1]


def test_a_seed_means_the_same_in_any_company(bases: Bases) -> None:
    base, routed = bases()
    asked = questions(6, routed)
    sampled = [{**q, "limit": 12, "sampling": Sampling(1.5, 0.9, seed=n)} for n, q in enumerate(asked)]
    together, again = [Row(**q) for q in sampled], [Row(**q) for q in sampled]
    in_company(Batch(base, routed), together, seed=4)
    for r in again:
        in_company(Batch(base, routed), [r], seed=0)
    assert [r.new for r in together] == [r.new for r in again]
    other = Row(**{**sampled[0], "sampling": Sampling(1.5, 0.9, seed=99)})
    in_company(Batch(base, routed), [other], seed=0)
    assert other.new != together[0].new


# --- what is said of it -------------------------------------------------------------------------------------


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may be half there; 0 is the end."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return bytes(id for id in ids if id).decode("utf-8", "replace")


@example(text="aß", stops=["aß"], limit=3)
@given(
    text=st.text(alphabet="ab \nß€🏝", max_size=40),
    stops=st.lists(st.text(alphabet="ab \nß", min_size=1, max_size=4), max_size=3),
    limit=st.integers(1, 60),
)
def test_what_was_said_is_never_taken_back(text: str, stops: list[str], limit: int) -> None:
    going = Row(ids=[5], route=None, limit=limit, stop=tuple(stops))
    tokens = [*text.encode(), 0]
    said = ""
    for token in tokens:
        going.take(token, Bytes(), frozenset({0}))
        assert going.text.startswith(said)
        said = going.text
        if going.finish is not None:
            break
    # All at once: the first stop in the text without leading blanks ends it.
    whole = Bytes().decode(going.new).lstrip()
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    expected = whole[: min(ends)] if ends else whole
    assert said == expected.rstrip()
    if ends:
        assert going.finish == "stop"
    assert (going.finish == "length") == (not ends and going.new[-1] != 0 and len(going.new) == limit)


# --- models that cannot be decoded so -----------------------------------------------------------------------


def test_models_that_heed_no_mask_or_keep_a_state_are_refused(
    bases: Bases, tokenizer: PreTrainedTokenizerFast
) -> None:
    base, routed = bases()
    check(base, routed)
    forward = base.model.forward

    def deaf(attention_mask: Any = None, **options: Any) -> Any:
        return forward(**options)

    deaf.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    base.model.forward = deaf
    with pytest.raises(InvalidInput, match="something else in a batch"):
        check(base, routed)

    from transformers import MambaConfig, MambaForCausalLM

    with torch.random.fork_rng():
        config = MambaConfig(
            vocab_size=104, hidden_size=32, state_size=4, num_hidden_layers=1, pad_token_id=0
        )
        model = MambaForCausalLM(config).eval().requires_grad_(False)
    mamba = BaseModel(model, tokenizer, "mamba")
    with pytest.raises(InvalidInput, match="cannot be decoded in batches"):
        check(mamba, attach(model, targets=["x_proj"]))
