"""The routed layer in the families of models that people train, tiny and random, and in quantised layers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from polyprag.errors import InvalidInput
from polyprag.layers import DEFAULT_TARGETS, RoutedModel, find_targets, linear_shape
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
    rows_as_alone,
    some_ids,
)

GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MLPS = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma": GATED,
    "phi": ("mlp.fc1", "mlp.fc2"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "opt": ("fc1", "fc2"),
}
SHARED = tuple(f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down"))
Build = Callable[..., PreTrainedModel]


@pytest.fixture(params=MLPS)
def model(request: pytest.FixtureRequest, build_model: Build) -> PreTrainedModel:
    return build_model(request.param)


# What is routed when nothing is named


@pytest.mark.parametrize("family", [*MLPS, "qwen2_moe"])
def test_the_layers_of_the_mlps_are_found(build_model: Build, family: str) -> None:
    found = find_targets(build_model(family))
    blocks = [re.split(r"\.(\d+)\.", s.name)[1:] for s in found]
    assert blocks == [[str(block), name] for block in range(2) for name in MLPS.get(family, SHARED)]
    assert [s.group for s in found] == list(range(len(found)))


def test_auto_can_stand_beside_names(build_model: Build) -> None:
    model = build_model()
    both = [s.name for s in find_targets(model, ("q_proj", "auto"))]
    assert set(both) == {s.name for t in ("q_proj", "auto") for s in find_targets(model, (t,))}
    assert both == [name for name, _ in model.named_modules() if name in both]


@pytest.mark.parametrize(
    ("depth", "blocks"), [(0.0, "012"), (0.5, "12"), (0.66, "12"), (0.67, "2"), (0.99, "2")]
)
def test_auto_begins_at_a_share_of_the_depth(build_model: Build, depth: float, blocks: str) -> None:
    model = build_model(num_hidden_layers=3)
    found = find_targets(model, ("auto", "q_proj"), depth)
    assert [s.name.split(".")[2] for s in found if "mlp" in s.name] == [b for b in blocks for _ in range(3)]
    assert len([s for s in found if s.name.endswith("q_proj")]) == 3, "a name means every block"
    assert [s.group for s in found] == list(range(len(found)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.shared_expert_gate = nn.Linear(8, 1)
        self.feed_forward = nn.ModuleDict({"w1": nn.Linear(8, 16), "w2": nn.Linear(16, 8)})
        self.feed_forward["gate"] = nn.Linear(8, 2)


class SeesAndSpeaks(nn.Module):
    """With towers of the same build: only the language model's MLPs are meant."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.ModuleList([Block()])
        self.language = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})

    def get_decoder(self) -> nn.Module:
        return self.language


def test_auto_leaves_attention_routers_and_other_towers_alone() -> None:
    assert [s.name for s in find_targets(SeesAndSpeaks())] == [
        f"language.layers.{block}.feed_forward.{name}" for block in range(2) for name in ("w1", "w2")
    ]


def test_where_no_mlp_is_found_the_error_names_what_there_is() -> None:
    with pytest.raises(InvalidInput, match=r"told to be of an MLP.*it has: gate_proj"):
        find_targets(nn.ModuleDict({"attention": Attention()}))
    with pytest.raises(InvalidInput, match="it has: none at all"):
        find_targets(nn.ModuleList([nn.LayerNorm(4)]))


def test_every_target_has_to_match_something(build_model: Build) -> None:
    with pytest.raises(InvalidInput, match=r"no linear layer.* matches 'upproj'.*up_proj"):
        find_targets(build_model(), ("down_proj", "upproj"))


def test_experts_that_see_the_tokens_of_all_rows_are_refused() -> None:
    experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(4, 4)})])
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
    with pytest.raises(InvalidInput, match="a mixture of experts picks"):
        find_targets(model, ("w1",))


def test_layers_inside_a_wrapped_layer_are_not_layers_of_their_own() -> None:
    class Wrapped(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.inner = nn.Linear(4, 4)

    model = nn.ModuleDict({"mlp": nn.ModuleDict({"a": Wrapped(), "b": nn.Linear(4, 4)})})
    for targets in (("auto",), ("mlp.*",)):
        assert [s.name for s in find_targets(model, targets)] == ["mlp.a", "mlp.b"]


# What a route computes, in every family


def test_attached_and_untrained_it_is_the_base_model(model: PreTrainedModel) -> None:
    expected, before, modules = logits(model, some_ids(2)), layer_bytes(model), dict(model.named_modules())
    routed = RoutedModel.attach(model, experts=K, rank=R, alpha=ALPHA)
    with routed.route(draw_routes(2, routed)):
        assert torch.equal(logits(model, some_ids(2)), expected)
        model(input_ids=some_ids(2), labels=some_ids(2)).loss.backward()
    routed.detach()
    assert dict(model.named_modules()) == modules
    assert layer_bytes(model) == before
    assert torch.equal(logits(model, some_ids(2)), expected)


@pytest.mark.parametrize("mixing", ["exact", "factors"])
def test_each_row_is_as_its_merged_weights_and_as_alone(model: PreTrainedModel, mixing: str) -> None:
    pristine = copy.deepcopy(model)
    targets = DEFAULT_TARGETS if mixing == "exact" else ("auto", "*att*")
    routed = attach(model, targets, mixing=mixing)
    w, ids = draw_routes(3, routed), some_ids(3)
    together = rows_as_alone(model, routed, w, ids)
    for row in range(3):
        expected = logits(merged(pristine, routed, w[row], mixing), ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1].double(), expected, rtol=1e-3, atol=1e-4)
    assert (together - logits(pristine, ids)).abs().max() > 0.02


def test_rows_keep_their_routes_where_a_mixture_flattens_them(build_model: Build) -> None:
    model = build_model("qwen2_moe")
    routed = attach(model)
    w, ids = draw_routes(3, routed), some_ids(3)
    together = rows_as_alone(model, routed, w, ids)
    with routed.route(w.flip(0)):
        assert (logits(model, ids) - together).abs().max() > 0.01


def test_beams_samples_and_left_padding_agree_with_one_by_one(model: PreTrainedModel) -> None:
    routed = attach(model)
    w = draw_routes(2, routed)
    long, short = some_ids(1, 7), some_ids(1, 4, seed=4)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1)])
    mask = (torch.arange(7)[None] >= torch.tensor([[0], [3]])).long()
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    options |= {"do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    with routed.route(w):
        together = model.generate(ids, attention_mask=mask, **options)
    for row, prompt in enumerate((long, short)):
        with routed.route(w[row : row + 1]):
            alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(together[2 * row : 2 * row + 2, 7:], alone[:, prompt.shape[1] :])


# Quantised base layers


def quantise(kind: str, linear: nn.Linear) -> nn.Module:
    if kind == "buffers":
        return PackedLinear(linear)
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes (the extra `quantised`) is not installed")
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer: nn.Module
    if kind == "8 bit":
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu").requires_grad_(False).eval()


@pytest.fixture(params=["buffers", "8 bit", "4 bit"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param != "buffers":
        pytest.importorskip("bitsandbytes", reason="bitsandbytes (the extra `quantised`) is not installed")
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_gradients_go_through_a_quantised_layer(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = quantise(kind, nn.Linear(64, 128))
    assert linear_shape(base) == (64, 128)
    x, up = torch.randn(2, 5, 64).to(dtype).requires_grad_(), torch.randn(2, 5, 128)
    plain = base(x)
    (plain.float() * up).sum().backward()
    plain_x, x.grad = x.grad, None

    routed = attach(nn.ModuleDict({"up_proj": base}))
    assert {p.device.type for p in routed.parameters()} == {"cpu"}
    w = draw_routes(2, routed).requires_grad_()
    with routed.route(w):
        y = routed.model["up_proj"](x)
    assert y.dtype == dtype
    (y.float() * up).sum().backward()

    layer = routed.layers["up_proj"]
    A, B, v, z = (t.detach().double().requires_grad_() for t in (*routed.experts().values(), w, x))
    change = torch.stack([z[row] @ delta(A, B, v[row, 0]).T for row in range(2)])
    (change * up).sum().backward()
    near = 0.02 if dtype == torch.bfloat16 else 1e-5
    loose = {"rtol": 0.05, "atol": 0.15} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close((y - plain).double(), change.detach(), **loose)
    assert plain_x is not None
    assert x.grad is not None
    torch.testing.assert_close((x.grad - plain_x).double(), z.grad, **(loose | {"atol": loose["atol"] * 4}))
    assert layer.A.grad is not None
    assert layer.B.grad is not None
    grads = layer.A.grad.view(A.shape), layer.B.grad.view(K, R, -1).permute(2, 0, 1), w.grad
    for ours, exact in zip(grads, (A, B, v), strict=True):
        assert ours is not None
        assert exact.grad is not None
        assert (ours - exact.grad).norm() < near * exact.grad.norm()


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_a_quantised_model_trains_after_it_has_written(build_model: Build, kind: str) -> None:
    model = build_model(hidden_size=64, intermediate_size=128)
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(block.mlp, name, quantise(kind, getattr(block.mlp, name)))
        block.self_attn.o_proj = quantise(kind, block.self_attn.o_proj)
    ids = some_ids(2)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "pad_token_id": 0}
    model.generate(ids, do_sample=False, **options)
    before = layer_bytes(model)

    routed = attach(model)
    assert len(routed.modules) == 6
    z = torch.zeros(2, 6, K, requires_grad=True)
    optimiser = torch.optim.AdamW([z, *routed.parameters()], lr=0.01)
    losses = []
    for _ in range(8):
        with routed.route(z.softmax(-1)):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    with routed.route(z.detach().softmax(-1)):
        model.generate(ids, num_beams=2, do_sample=False, **options)
    routed.detach()
    assert layer_bytes(model) == before
