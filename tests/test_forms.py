"""Merged routes against float64, what they leave alone, and the choice between the forms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from polyprag.errors import InvalidInput
from polyprag.forms import FormChoice, FormCosts, MergedRoutes, measure_forms
from polyprag.layers import Merged
from polyprag.models import BaseModel
from routed import PackedLinear, attach, delta, draw_routes, layer_bytes, logits, merged, some_ids

Build = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("mixing", ["exact", "factors"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_merged_route_is_the_route(build_model: Build, family: str, mixing: str) -> None:
    model = build_model(family)
    pristine = copy.deepcopy(model)
    routed = attach(model, mixing=mixing)
    w, ids = draw_routes(1, routed)[0], some_ids(3)
    with routed.route(routed.merge(w)):
        found = logits(model, ids)
    torch.testing.assert_close(
        found.double(), logits(merged(pristine, routed, w, mixing), ids), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(logits(model, ids), logits(pristine, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_weight_is_rounded_once(build_model: Build, dtype: torch.dtype) -> None:
    model = build_model().to(dtype)
    routed = attach(model)
    w = draw_routes(1, routed)[0]
    for name, found in routed.merge(w).weights.items():
        experts, layer = routed.experts(), routed.layers[name]
        change = delta(experts[f"{name}.A"], experts[f"{name}.B"], w[layer.shape.group])
        exact = layer.base.weight.double() + change
        assert found.dtype == dtype
        # Half of the last digit, and what a sum in float32 may be off besides.
        digit = exact.abs() * torch.finfo(dtype).eps / 2
        assert ((found.double() - exact).abs() <= digit + 1e-6).all()


def test_a_thousand_merges_leave_every_bit_of_the_base_model(tiny_base: BaseModel) -> None:
    model = tiny_base.model.to(torch.bfloat16)
    before, expected = layer_bytes(model.float()), logits(model.to(torch.bfloat16), some_ids(1, 3))
    routed = attach(model)
    routes = draw_routes(1000, routed)
    for w in routes:
        kept = routed.merge(w)
    with routed.route(kept):
        assert not torch.equal(logits(model, some_ids(1, 3)), expected)
    routed.detach()
    assert torch.equal(logits(model, some_ids(1, 3)), expected)
    assert layer_bytes(model.float()) == before


def test_quantised_layers_are_not_merged(tiny_base: BaseModel) -> None:
    for layer in tiny_base.model.model.layers:
        layer.mlp.up_proj = PackedLinear(layer.mlp.up_proj)
    routed = attach(tiny_base.model)
    w = draw_routes(1, routed)
    with pytest.raises(InvalidInput, match=r"up_proj is a PackedLinear"):
        routed.merge(w[0])
    with pytest.raises(InvalidInput, match=r"up_proj is a PackedLinear"):
        MergedRoutes(routed, 1 << 30).get(w[0])
    assert FormChoice(routed, "auto", 1 << 30, PAYS).choose(w, 9, 9) is w


# What is kept


def test_the_routes_used_last_are_kept_within_the_budget(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    a, b, c = draw_routes(3, routed)
    one = routed.merge(a).bytes
    assert one == sum(layer.base.weight.nbytes for layer in routed.layers.values())
    kept = MergedRoutes(routed, 2 * one + 1)
    first = kept.get(a)
    kept.get(b)
    assert kept.get(a.clone()) is first
    kept.get(c)
    assert [kept.kept(w) is not None for w in (a, b, c)] == [True, False, True]
    assert len(kept) == 2
    kept.clear()
    assert len(kept) == 0
    with pytest.raises(InvalidInput, match="merged_bytes"):
        MergedRoutes(routed, one - 1).get(a)


# The choice

PAYS = FormCosts(merge=1.0, step=1.0, token=1.0)
NEVER = FormCosts(merge=1e9, step=1.0, token=1.0)
SOME = FormCosts(merge=100.0, step=1.0, token=0.1)


@pytest.fixture
def choice(tiny_base: BaseModel) -> Callable[..., FormChoice]:
    routed = attach(tiny_base.model)

    def make(form: Any = "auto", costs: FormCosts | None = SOME, budget: int = 1 << 20) -> FormChoice:
        return FormChoice(routed, form, budget, costs)

    return make


def is_merged(choice: FormChoice, w: torch.Tensor, prompt: int, limit: int) -> bool:
    return isinstance(choice.choose(w, prompt, limit), Merged)


def test_a_form_that_is_named_is_taken(choice: Callable[..., FormChoice]) -> None:
    w = draw_routes(1, choice().merged.routed)
    assert choice("gates", PAYS).choose(w, 1000, 1000) is w
    assert is_merged(choice("merged", NEVER), w, 1, 1)
    with pytest.raises(InvalidInput, match="gates, merged, auto"):
        choice("fast")


def test_rows_under_several_routes_keep_their_gates(choice: Callable[..., FormChoice]) -> None:
    routed = choice().merged.routed
    several, alike = draw_routes(3, routed), draw_routes(1, routed).expand(3, -1, -1)
    for form in ("merged", "auto"):
        assert choice(form, PAYS).choose(several, 1000, 1000) is several
        assert is_merged(choice(form, PAYS), alike, 1000, 1000)
    assert choice("auto", PAYS, budget=10).choose(alike, 1000, 1000) is alike, "it would not fit"


def test_a_route_is_merged_where_its_tokens_pay_for_it(choice: Callable[..., FormChoice]) -> None:
    w, other = draw_routes(2, choice().merged.routed).split(1)
    assert not is_merged(choice(), w, 100, 89)
    assert is_merged(choice(), w, 100, 90)
    assert is_merged(choice(), w, 1000, 1)
    assert not is_merged(choice(costs=NEVER), w, 1000, 1000)

    again = choice()
    assert [is_merged(again, w, 100, 20) for _ in range(5)] == [False, False, False, True, True]
    assert not is_merged(again, other, 100, 20)


def test_answers_that_end_early_count_for_what_they_take(choice: Callable[..., FormChoice]) -> None:
    auto = choice()
    w, other = draw_routes(2, auto.merged.routed).split(1)
    for _ in range(50):
        auto.took(4, 200)
    assert not is_merged(auto, w, 10, 200)
    for _ in range(50):
        auto.took(200, 200)
    assert is_merged(auto, other, 10, 200)


def test_costs_are_measured_here(choice: Callable[..., FormChoice]) -> None:
    costs = measure_forms(choice().merged.routed)
    assert 0 < costs.merge < 60
    assert costs.step >= 0
    assert costs.token >= 0
    measured = choice(costs=None)
    assert measured.costs is measured.costs
