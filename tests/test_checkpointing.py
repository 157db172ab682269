"""Recomputed activations and compiled models: the route of each forward pass, whatever runs it again."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from polyprag.errors import InvalidInput
from polyprag.layers import RoutedModel
from polyprag.models import BaseModel
from routed import attach, draw_routes, logits, some_ids

Build = Callable[..., PreTrainedModel]
Grads = list[torch.Tensor]


def forward(routed: RoutedModel, w: torch.Tensor, seed: int = 0) -> torch.Tensor:
    ids = some_ids(2, seed=seed)
    with routed.route(w):
        return routed.model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(routed: RoutedModel, *routes: torch.Tensor) -> Grads:
    """Those of routes and experts, which are then forgotten."""
    found = []
    for tensor in (*routes, *routed.parameters()):
        assert tensor.grad is not None
        found.append(tensor.grad)
        tensor.grad = None
    return found


def same(found: Grads, expected: Grads) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Calls:
    """Counts what a module computes: once more for each checkpoint."""

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.count = 0
        model.get_submodule(name).register_forward_hook(self)

    def __call__(self, *_: object) -> None:
        self.count += 1

    def since(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", "model.layers.1.self_attn"),
        ("gemma", "model.layers.1.self_attn"),
        ("gpt_neox", "gpt_neox.layers.1.attention"),
        ("gpt2", "transformer.h.1.attn"),
    ],
)
def test_checkpointing_changes_no_gradient(build_model: Build, family: str, attention: str) -> None:
    model = build_model(family)
    calls, routed = Calls(model, attention), attach(model)
    w = draw_routes(2, routed).requires_grad_()
    forward(routed, w).backward()
    expected = gradients(routed, w)
    assert calls.since() == 1
    routed.enable_checkpointing()
    routed.enable_checkpointing()  # a second time does nothing
    forward(routed, w).backward()  # outside of the route
    assert calls.since() == 2
    assert same(gradients(routed, w), expected)
    routed.disable_checkpointing()
    forward(routed, w).backward()
    assert calls.since() == 1
    assert same(gradients(routed, w), expected)


def test_frozen_experts_leave_the_gradients_of_routes(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    for parameter in routed.parameters():
        parameter.requires_grad_(False)
    w = draw_routes(2, routed).requires_grad_()
    found = []
    for _ in range(2):
        forward(routed, w).backward()
        found.append(w.grad)
        w.grad = None
        routed.enable_checkpointing()
    assert found[0] is not None
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


def test_recomputation_has_its_own_route_in_any_thread_and_under_any_route(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    w, other = draw_routes(2, routed, 1).requires_grad_(), draw_routes(2, routed, 2)
    forward(routed, w).backward()
    expected = gradients(routed, w)
    routed.enable_checkpointing()

    loss = forward(routed, w)
    with routed.route(other):
        loss.backward()
        inside = logits(routed.model, some_ids(2))
    assert same(gradients(routed, w), expected)
    with routed.route(other):
        assert torch.equal(logits(routed.model, some_ids(2)), inside)  # the inner route had ended

    loss = forward(routed, w)
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert same(gradients(routed, w), expected)

    loss = forward(routed, w)
    loss.backward(retain_graph=True)
    assert same(gradients(routed, w), expected)
    loss.backward()
    assert same(gradients(routed, w), expected)


def test_interleaved_passes_keep_their_routes(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base.model)
    routes = [draw_routes(2, routed, seed).requires_grad_() for seed in (1, 2)]
    expected = []
    for seed, w in enumerate(routes):
        forward(routed, w, seed).backward()
        expected.append(gradients(routed, w))
    assert not same(*expected)
    routed.enable_checkpointing()
    losses = [forward(routed, w, seed) for seed, w in enumerate(routes)]
    for loss, w, wanted in zip(losses, routes, expected, strict=True):  # the second is made, the first goes
        loss.backward()
        assert same(gradients(routed, w), wanted)


def test_checkpointing_by_transformers_is_given_the_route(build_model: Build) -> None:
    model = build_model()
    routed = attach(model)
    w, other = draw_routes(2, routed, 1).requires_grad_(), draw_routes(2, routed, 2)
    forward(routed, w).backward()
    expected = gradients(routed, w)
    calls = Calls(model, "model.layers.0.self_attn")
    options = {"use_reentrant": False, "context_fn": routed.checkpoint_context}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)
    model.train()
    loss = forward(routed, w)
    with routed.route(other):
        loss.backward()
    assert calls.since() == 2
    assert same(gradients(routed, w), expected)


def test_what_is_not_differentiated_runs_as_ever(tiny_base: BaseModel) -> None:
    model, routed = tiny_base.model, attach(tiny_base.model)
    w, ids = draw_routes(2, routed), some_ids(2)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "pad_token_id": 0}
    with routed.route(w):
        expected = model.generate(ids, **options)
    routed.enable_checkpointing()
    with routed.route(w):
        assert torch.equal(model.generate(ids, **options), expected)
        with pytest.raises(InvalidInput, match="use_cache=False"):
            model(input_ids=ids, labels=ids, use_cache=True)


def test_detaching_ends_checkpointing(tiny_base: BaseModel) -> None:
    model, routed = tiny_base.model, attach(tiny_base.model)
    routed.enable_checkpointing()
    routed.detach()
    assert not any("forward" in module.__dict__ for module in model.modules())
    model(input_ids=some_ids(2), labels=some_ids(2), use_cache=True)
    again = attach(model)
    forward(again, draw_routes(2, again)).backward()


def test_a_forward_that_a_hook_replaced_comes_back(tiny_base: BaseModel) -> None:
    block = tiny_base.model.model.layers[0]
    before = block.forward
    hooked: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        hooked.append(1)
        return before(*args, **kwargs)

    block.forward = counting
    routed = attach(tiny_base.model)
    routed.enable_checkpointing()
    forward(routed, draw_routes(2, routed)).backward()
    assert len(hooked) == 2
    routed.detach()
    assert block.forward is counting


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(InvalidInput, match="no list of blocks"):
        attach(nn.ModuleDict({"up_proj": nn.Linear(4, 4)})).enable_checkpointing()


# Compiled


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Tiny(nn.Module):
    """Two residual MLPs: what a compiler sees of a language model, compiled in a second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(), Block()])
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.layers:
            x = block(x)
        return x


class Counting:
    """A compiler's backend that counts the graphs it is given."""

    def __init__(self, name: str) -> None:
        self.name, self.graphs = name, 0

    def __call__(self, module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend(self.name)(module, inputs)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_takes_every_route_without_compiling_anew(backend: str, checkpointing: bool) -> None:
    if backend == "inductor" and not (shutil.which("g++") and "POLYPRAG_PROOF" in os.environ):
        pytest.skip("inductor needs a C++ compiler and a minute: POLYPRAG_PROOF=1")
    torch.compiler.reset()
    model = Tiny()
    counting = Counting(backend)
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    routed = attach(model)
    if checkpointing:
        routed.enable_checkpointing()
    x = torch.randn(2, 5, 8)
    for seed in range(4):
        w = draw_routes(2, routed, seed).requires_grad_()
        found = []
        for run in (model, compiled):
            with routed.route(w):
                y = run(x)
            (y * torch.linspace(-1, 1, 8)).sum().backward()
            found.append([y.detach(), *gradients(routed, w)])
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert counting.graphs == 1
    torch.testing.assert_close(compiled(x), model(x))  # no route: the base model, with a graph of its own
    assert counting.graphs == 2
    routed.detach()
    torch.testing.assert_close(compiled(x), Tiny()(x))


def test_threads_keep_their_routes_in_a_compiled_model() -> None:
    torch.compiler.reset()
    model = Tiny()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    routed = attach(model)
    x = torch.randn(2, 5, 8)
    expected = []
    for seed in range(2):
        with routed.route(draw_routes(2, routed, seed)), torch.no_grad():
            expected.append((model(x), compiled(x))[0])
    barrier, equal = threading.Barrier(2), []

    def work(seed: int) -> None:
        with routed.route(draw_routes(2, routed, seed)), torch.no_grad():
            barrier.wait(60)
            equal.append(torch.equal(compiled(x), expected[seed]))
            barrier.wait(60)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True, True]
