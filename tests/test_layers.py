"""Routed layers, held against float64 references that are computed another way: by merging."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from polyprag.errors import InvalidInput
from polyprag.layers import ModuleShape, RoutedModel, find_targets, linear_shape
from polyprag.models import BaseModel
from routed import (
    ALPHA,
    K,
    PackedLinear,
    R,
    attach,
    delta,
    draw_routes,
    layer_bytes,
    logits,
    merged,
    some_ids,
)

FAMILIES = ("llama", "qwen2", "gpt2", "gpt_neox")
TARGETS = {
    "llama": ("gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "down_proj"),
    "gpt2": ("c_fc", "*.mlp.c_proj"),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h"),
}
Build = Callable[..., PreTrainedModel]


# What a route computes


@pytest.mark.parametrize("mixing", ["exact", "factors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_route_is_the_same_as_its_merged_weights(build_model: Build, family: str, mixing: str) -> None:
    model = build_model(family)
    pristine = copy.deepcopy(model)
    routed = attach(model, TARGETS[family], mixing=mixing)
    assert len(routed.modules) == 2 * len(TARGETS[family])
    w = draw_routes(3, routed)
    ids = some_ids(3)
    with routed.route(w):
        found = logits(model, ids)
    for row in range(3):
        expected = logits(merged(pristine, routed, w[row], mixing), ids[row : row + 1])
        torch.testing.assert_close(found[row : row + 1].double(), expected, rtol=1e-4, atol=1e-5)
    assert (found - logits(pristine, ids)).abs().max() > 0.05


@pytest.mark.parametrize("mixing", ["exact", "factors"])
@pytest.mark.parametrize("shape", [(4, 24), (4, 6, 24), (4, 2, 3, 24)])
def test_one_layer_against_a_float64_sum_over_experts(shape: tuple[int, ...], mixing: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"up_proj": nn.Linear(24, 16)})
    pristine = copy.deepcopy(model["up_proj"]).double()
    routed = attach(model, mixing=mixing)
    w, x = draw_routes(4, routed), torch.randn(shape)
    with routed.route(w), torch.no_grad():
        found = model["up_proj"](x)
    A, B = (routed.experts()[f"up_proj.{part}"] for part in "AB")
    for row in range(4):
        change = delta(A, B, w[row, 0], mixing)
        with torch.no_grad():
            expected = pristine(x[row].double()) + x[row].double() @ change.T
        torch.testing.assert_close(found[row].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    "kind",
    [
        lambda: nn.Linear(24, 16),
        lambda: nn.Linear(24, 16, bias=False),
        lambda: Conv1D(16, 24),
        lambda: PackedLinear(nn.Linear(24, 16)),
    ],
    ids=["linear", "no bias", "conv1d", "packed"],
)
def test_gradients_are_those_of_a_float64_sum_over_experts(kind: Callable[[], nn.Module], rows: int) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"up_proj": kind()}).requires_grad_(False)
    pristine = copy.deepcopy(model["up_proj"]).double()
    routed = attach(model)
    w, x = draw_routes(rows, routed).requires_grad_(), torch.randn(4, 6, 24, requires_grad=True)
    A, B = routed.parameters()
    leaves = [t.detach().double().requires_grad_() for t in (x, w, A, B)]
    dx, dw, dA, dB = leaves
    gate = dw[:, 0].repeat_interleave(R, 1).unsqueeze(1)
    expected = pristine(dx) + ALPHA / R * ((dx @ dA.T) * gate) @ dB
    weights = torch.randn(4, 6, 16)
    with routed.route(w):
        found = model["up_proj"](x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    found.backward(weights)
    expected.backward(weights.double())
    for got, leaf in zip((x, w, A, B), leaves, strict=True):
        torch.testing.assert_close(got.grad.double(), leaf.grad, rtol=1e-5, atol=1e-4)
    assert all(p.grad is None for p in model["up_proj"].base.parameters())


def test_exact_and_factors_agree_on_one_expert_and_differ_on_two() -> None:
    model = nn.ModuleDict({"up_proj": nn.Linear(8, 8)})
    exact = attach(model)
    x = torch.randn(2, 8)
    one = torch.zeros(1, 1, K)
    one[..., 2] = 1.0
    two = one.clone()
    two[..., 2] = two[..., 3] = 0.5
    outputs = []
    for mixing in ("exact", "factors"):
        exact.layers["up_proj"].mixing = mixing  # type: ignore[assignment]
        for w in (one, two):
            with exact.route(w), torch.no_grad():
                outputs.append(model["up_proj"](x))
    torch.testing.assert_close(outputs[0], outputs[2])
    assert (outputs[1] - outputs[3]).abs().max() > 0.01


def test_an_alpha_of_zero_changes_nothing_in_either_mixing() -> None:
    for mixing in ("exact", "factors"):
        model = nn.ModuleDict({"up_proj": nn.Linear(8, 8)})
        x = torch.randn(2, 8)
        expected = model["up_proj"](x)
        routed = attach(model, alpha=0.0, mixing=mixing)
        with routed.route(draw_routes(2, routed)):
            torch.testing.assert_close(model["up_proj"](x), expected)


def test_who_watches_a_base_layer_or_replaces_it_sees_every_call(tiny_base: BaseModel) -> None:
    """The fast way goes past the base layer, but not past what others have put there."""
    routed = attach(tiny_base.model)
    x, w = torch.randint(3, 99, (2, 5)), draw_routes(2, routed)
    with routed.route(w), torch.no_grad():
        expected = tiny_base.model(x).logits
        layers = [layer.base for layer in routed.layers.values()]
        seen: list[Any] = []
        handles = [layer.register_forward_hook(lambda *_: seen.append("hook")) for layer in layers[::2]]
        for layer in layers[1::2]:
            forward = layer.forward
            layer.forward = lambda x, forward=forward: (seen.append("own"), forward(x))[1]
        torch.testing.assert_close(tiny_base.model(x).logits, expected)
        assert sorted(seen) == ["hook"] * 3 + ["own"] * 3
        for handle in handles:
            handle.remove()
        for layer in layers[1::2]:
            del layer.forward
        assert torch.equal(tiny_base.model(x).logits, expected)
        assert len(seen) == 6
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(tiny_base.model(x).logits.float(), expected, rtol=0.1, atol=0.1)


def test_untrained_experts_change_nothing(tiny_base: BaseModel) -> None:
    expected = logits(tiny_base.model, some_ids(2))
    routed = RoutedModel.attach(tiny_base.model, experts=K, rank=R, alpha=ALPHA)
    with routed.route(draw_routes(2, routed)):
        assert torch.equal(logits(tiny_base.model, some_ids(2)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_their_dtype_and_come_close(build_model: Build, dtype: Any) -> None:
    model = build_model()
    pristine = copy.deepcopy(model)
    model.to(dtype)
    routed = attach(model)
    assert {p.dtype for p in routed.parameters()} == {torch.float32}
    w = draw_routes(1, routed)
    with routed.route(w):
        found = logits(model, some_ids(1))
    assert found.dtype == dtype
    expected = logits(merged(pristine, routed, w[0], "exact"), some_ids(1))
    assert (found.double() - expected).norm() / expected.norm() < 0.03


def test_modules_of_one_group_share_its_weights(build_model: Build) -> None:
    model = build_model()
    pristine = copy.deepcopy(model)
    shapes = [
        ModuleShape(s.name, s.in_features, s.out_features, group=i // 3)
        for i, s in enumerate(find_targets(model))
    ]
    routed = attach(model, shapes)
    assert routed.groups == 2
    assert routed.modules == shapes
    w = draw_routes(1, routed)
    with routed.route(w):
        found = logits(model, some_ids(1))
    expected = logits(merged(pristine, routed, w[0], "exact"), some_ids(1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


# Rows


@pytest.mark.parametrize("mixing", ["exact", "factors"])
def test_each_row_of_a_batch_has_its_own_route(tiny_base: BaseModel, mixing: str) -> None:
    routed = attach(tiny_base.model, mixing=mixing)
    w, ids = draw_routes(4, routed), some_ids(4)
    with routed.route(w):
        together = logits(tiny_base.model, ids)
    for row in range(4):
        with routed.route(w[row : row + 1]):
            alone = logits(tiny_base.model, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    with routed.route(w.flip(0)):
        assert (logits(tiny_base.model, ids) - together).abs().max() > 0.01


def test_one_route_serves_all_rows(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    w, ids = draw_routes(1, routed), some_ids(3)
    with routed.route(w):
        one = logits(tiny_base.model, ids)
    with routed.route(w.expand(3, -1, -1)):
        assert torch.equal(logits(tiny_base.model, ids), one)


def test_routes_expand_with_beams_and_samples(tiny_base: BaseModel) -> None:
    model, routed = tiny_base.model, attach(tiny_base.model)
    w, ids = draw_routes(2, routed), some_ids(2)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "pad_token_id": 0}
    for kind in (
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ):
        with routed.route(w):
            together = model.generate(ids, **options, **kind)
        rows = kind["num_return_sequences"]
        alone = []
        for row in range(2):
            one = {**options, "attention_mask": options["attention_mask"][row : row + 1]}
            with routed.route(w[row : row + 1]):
                alone.append(model.generate(ids[row : row + 1], **one, **kind))
        for row in range(2):
            width = min(together.shape[1], alone[row].shape[1])
            assert torch.equal(together[row * rows : (row + 1) * rows, :width], alone[row][:, :width])
    with routed.route(w.flip(0)):
        other = model.generate(ids, **options, **kind)
    assert other.shape != together.shape or not torch.equal(other, together)


def test_left_padding_and_the_cache_change_no_token(tiny_base: BaseModel) -> None:
    model, routed = tiny_base.model, attach(tiny_base.model)
    w = draw_routes(2, routed)
    long, short = some_ids(1, 9), some_ids(1, 5, seed=4)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1)])
    mask = (torch.arange(9)[None] >= torch.tensor([[0], [4]])).long()
    with routed.route(w):
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
        )
    for row, prompt in enumerate((long, short)):
        text = prompt
        for _ in range(8):  # no cache, no padding, one row
            with routed.route(w[row : row + 1]):
                last = logits(model, text, use_cache=False)[:, -1]
            last[:, 1] = -torch.inf  # min_new_tokens lets no row end
            text = torch.cat([text, last.argmax(-1, keepdim=True)], 1)
        assert torch.equal(made[row, 9:], text[0, prompt.shape[1] :])


@pytest.mark.parametrize("rows", [2, 4, 6])
def test_routes_that_fit_no_batch_are_refused(tiny_base: BaseModel, rows: int) -> None:
    routed = attach(tiny_base.model)
    with (
        routed.route(draw_routes(rows, routed)),
        pytest.raises(InvalidInput, match=rf"{rows} routes.*3 rows"),
    ):
        logits(tiny_base.model, some_ids(3))


def test_routes_of_another_shape_are_refused(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    w = draw_routes(2, routed)
    for wrong in (w[0], w[:, :-1], torch.cat([w, w], 1), w[..., :-1], w[:0], w[..., None]):
        with pytest.raises(InvalidInput, match="a batch of routes is"), routed.route(wrong):
            pass


# Scope


def test_outside_route_the_model_is_the_base_model(tiny_base: BaseModel) -> None:
    expected = logits(tiny_base.model, some_ids(2))
    routed = attach(tiny_base.model)
    assert torch.equal(logits(tiny_base.model, some_ids(2)), expected)
    with routed.route(draw_routes(2, routed)):
        assert not torch.equal(logits(tiny_base.model, some_ids(2)), expected)
    assert torch.equal(logits(tiny_base.model, some_ids(2)), expected)
    with pytest.raises(RuntimeError, match="boom"), routed.route(draw_routes(2, routed)):
        raise RuntimeError("boom")
    assert torch.equal(logits(tiny_base.model, some_ids(2)), expected)


def test_an_inner_route_ends_with_its_block(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    ids = some_ids(1)
    with routed.route(draw_routes(1, routed, 1)):
        outer = logits(tiny_base.model, ids)
        with routed.route(draw_routes(1, routed, 2)):
            assert not torch.equal(logits(tiny_base.model, ids), outer)
        assert torch.equal(logits(tiny_base.model, ids), outer)


def test_two_models_keep_their_own_routes(build_model: Build) -> None:
    first, second = build_model(), build_model(seed=1)
    one, two = attach(first), attach(second)
    expected = logits(second, some_ids(1))
    with one.route(draw_routes(1, one)):
        assert torch.equal(logits(second, some_ids(1)), expected)
    two.detach()


def test_threads_do_not_see_each_others_routes(tiny_base: BaseModel) -> None:
    model, routed, ids = tiny_base.model, attach(tiny_base.model), some_ids(2)
    expected = []
    for seed in range(3):
        with routed.route(draw_routes(2, routed, seed)):
            expected.append(logits(model, ids))
    barrier = threading.Barrier(3)
    wrong: list[str] = []

    def work(seed: int) -> None:
        try:
            for _ in range(8):
                with routed.route(draw_routes(2, routed, seed)):
                    barrier.wait(20)  # all three are inside their route now
                    same = torch.equal(logits(model, ids), expected[seed])
                    barrier.wait(20)
                if not same:
                    wrong.append(f"thread {seed} saw another route")
        except threading.BrokenBarrierError:
            wrong.append(f"thread {seed} was left alone")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Attach and detach


def test_attach_and_detach_leave_the_very_same_model(tiny_base: BaseModel) -> None:
    model = tiny_base.model
    modules, before = dict(model.named_modules()), layer_bytes(model)
    for _ in range(3):
        routed = attach(model)
        optimiser = torch.optim.AdamW(routed.parameters(), lr=0.1)
        with routed.route(draw_routes(2, routed)):
            model(input_ids=some_ids(2), labels=some_ids(2)).loss.backward()
        optimiser.step()
        with pytest.raises(InvalidInput), routed.route(draw_routes(2, routed)):
            logits(model, some_ids(3))
        routed.detach()
        routed.detach()  # a second time does nothing
        after = dict(model.named_modules())
        assert list(after) == list(modules)
        assert all(after[name] is module for name, module in modules.items())
        assert layer_bytes(model) == before
        assert all(p.grad is None for p in model.parameters())


def test_a_late_detach_leaves_the_routed_layers_of_another(tiny_base: BaseModel) -> None:
    expected = logits(tiny_base.model, some_ids(1))
    first = attach(tiny_base.model)
    first.detach()
    second = attach(tiny_base.model)
    first.detach()
    with second.route(draw_routes(1, second)):
        assert not torch.equal(logits(tiny_base.model, some_ids(1)), expected)


@pytest.mark.parametrize("targets", [TARGETS["llama"], ("*.mlp.*",), ("q_proj",)])
def test_attaching_twice_is_refused_and_changes_nothing(tiny_base: BaseModel, targets: Any) -> None:
    routed = attach(tiny_base.model)
    with pytest.raises(InvalidInput, match="detach them first"):
        attach(tiny_base.model, targets)
    with routed.route(draw_routes(1, routed)):
        logits(tiny_base.model, some_ids(1))


@pytest.mark.parametrize(
    "changes",
    [
        {"experts": 0},
        {"rank": 0},
        {"mixing": "both"},
        {"alpha": float("nan")},
        {"targets": ("no_such_layer",)},
        {"targets": ()},
        {"targets": ("norm", "embed_tokens")},
        {"targets": [ModuleShape("model.layers.0.mlp.up_proj", 31, 48, 0)]},
        {"targets": [ModuleShape("model.layers.9.mlp.up_proj", 32, 48, 0)]},
    ],
)
def test_what_cannot_be_attached_is_refused(tiny_base: BaseModel, changes: dict[str, Any]) -> None:
    modules = dict(tiny_base.model.named_modules())
    with pytest.raises(InvalidInput):
        attach(tiny_base.model, **changes)
    assert dict(tiny_base.model.named_modules()) == modules


def test_targets_are_last_names_or_patterns_of_the_whole_name(tiny_base: BaseModel) -> None:
    def names(*targets: str) -> list[str]:
        return [s.name for s in find_targets(tiny_base.model, targets)]

    assert names("up_proj") == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    assert names("*.1.mlp.*") == [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")]
    assert names("model.layers.0.self_attn.?_proj") == [f"model.layers.0.self_attn.{n}_proj" for n in "qkvo"]
    assert names("up_proj", "*.up_proj") == names("up_proj")
    assert [s.group for s in find_targets(tiny_base.model)] == list(range(6))


def test_any_linear_like_layer_can_be_routed(tiny_base: BaseModel) -> None:
    model = tiny_base.model
    for layer in model.model.layers:
        layer.mlp.up_proj = PackedLinear(layer.mlp.up_proj)
    reference = copy.deepcopy(model)
    for layer in reference.model.layers:
        packed = layer.mlp.up_proj
        layer.mlp.up_proj = nn.Linear(32, 48, bias=False)
        layer.mlp.up_proj.weight = nn.Parameter(packed.packed * packed.scale, requires_grad=False)
    before = layer_bytes(model)
    routed = attach(model, ("up_proj",))
    w = draw_routes(1, routed)
    with routed.route(w):
        found = logits(model, some_ids(1))
    expected = logits(merged(reference, routed, w[0], "exact"), some_ids(1))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    routed.detach()
    assert layer_bytes(model) == before


def test_shapes_of_layers(build_model: Build) -> None:
    block = build_model("gpt2").transformer.h[0]
    assert linear_shape(block.mlp.c_fc) == (32, 128)
    assert linear_shape(nn.Linear(3, 5)) == (3, 5)
    assert linear_shape(nn.LayerNorm(4)) is None
    assert linear_shape(nn.Embedding(4, 2)) is None


# Experts in and out


def test_experts_go_out_and_in_unchanged(build_model: Build) -> None:
    first, second = attach(build_model()), RoutedModel.attach(build_model(), experts=K, rank=R, alpha=ALPHA)
    state = {name: t.clone() for name, t in first.experts().items()}
    assert all(not t.requires_grad for t in first.experts().values())
    second.load_experts(state)
    w = draw_routes(1, first)
    with first.route(w), second.route(w):
        assert torch.equal(logits(first.model, some_ids(1)), logits(second.model, some_ids(1)))
    name = first.modules[0].name
    with pytest.raises(InvalidInput, match=f"{name}.A"):
        second.load_experts({**state, f"{name}.A": state[f"{name}.A"][:-1]})
    with pytest.raises(InvalidInput, match=f"{name}.B"):
        second.load_experts({k: v for k, v in state.items() if k != f"{name}.B"})


def test_gradients_reach_experts_and_routes_and_stop_there(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    w = draw_routes(2, routed).requires_grad_()
    with routed.route(w):
        tiny_base.model(input_ids=some_ids(2), labels=some_ids(2)).loss.backward()
    for tensor in (w, *routed.parameters()):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().max() > 0
    assert all(p.grad is None for n, p in tiny_base.model.named_parameters() if not n.endswith((".A", ".B")))
