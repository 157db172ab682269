"""The loss of learnt tokens and its gradients, against float64 and autograd through all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag import loss as module
from polyprag.loss import CausalLoss, head_losses
from polyprag.models import BaseModel
from polyprag.samples import Sample
from routed import attach, draw_routes, some_ids


@pytest.mark.parametrize(("bias", "teacher"), [(False, False), (True, False), (True, True)])
def test_the_head_in_parts_is_autograd_in_float64(
    monkeypatch: pytest.MonkeyPatch, bias: bool, teacher: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    states, taught = torch.randn(2, 23, 8, generator=draw)
    weight, shift = torch.randn(50, 8, generator=draw), torch.randn(50, generator=draw) if bias else None
    targets = torch.randint(0, 50, (23,), generator=draw)
    reference = states.double().requires_grad_()
    head = weight.double(), None if shift is None else shift.double()
    logits, others = (nn.functional.linear(x, *head) for x in (reference, taught.double()))
    entropy = nn.functional.cross_entropy(logits, targets, reduction="sum")
    q = others.log_softmax(1)
    divergence = (q.exp() * (q - logits.log_softmax(1))).sum() if teacher else 0 * entropy
    (expected,) = torch.autograd.grad(0.25 * entropy + 0.5 * divergence, [reference])
    for rows in (1, 7, 23, 100):
        monkeypatch.setattr(module, "_LOGITS_BYTES", {"cpu": 4 * 50 * rows})
        found = head_losses(states, (weight, shift), targets, 0.25, taught if teacher else None, 0.5)
        assert float(found.cross_entropy) == pytest.approx(float(entropy.detach()), rel=1e-5)
        assert float(found.divergence) == pytest.approx(float(divergence.detach()), rel=1e-5)
        torch.testing.assert_close(found.gradient.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "changes", "plain"),
    [
        ("llama", {}, True),
        ("llama", {"tie_word_embeddings": True}, True),
        ("gpt2", {}, True),
        ("gpt_neox", {}, True),
        ("phi", {}, True),
        ("opt", {}, True),
        ("gemma2", {"final_logit_softcapping": 1.0}, False),
        ("granite", {"logits_scaling": 3.0}, False),
    ],
)
def test_every_family_learns_by_the_gradient_of_its_own_logits(
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    changes: dict[str, Any],
    plain: bool,
) -> None:
    base = BaseModel(build_model(family, **changes), tokenizer, family)
    routed = attach(base.model)
    w = draw_routes(3, routed)
    ids = some_ids(3)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    targets = torch.full_like(ids, -100)
    targets[0, 2:-1], targets[1, 1:4], targets[2, 7] = ids[0, 3:], ids[1, 2:5], ids[2, 8]
    with routed.route(w):
        logits = base.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        expected = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
        )
    wanted = torch.autograd.grad(expected * 0.5, routed.parameters())
    loss = CausalLoss(base)
    assert loss.plain is plain
    with routed.route(w):
        outputs = loss.outputs(ids, mask, targets)
    found = loss.losses(outputs, targets, 0.5)
    torch.autograd.backward(outputs, found.gradient)
    torch.testing.assert_close(found.cross_entropy, expected.detach(), rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(routed.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_a_sampled_softmax_is_on_average_the_whole_one(
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    """A head without a bias, and one with."""
    base = BaseModel(build_model(family), tokenizer, family)
    ids = some_ids(2)
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    whole = CausalLoss(base)
    states = whole.outputs(ids, torch.ones_like(ids), targets)
    expected = whole.losses(states, targets, 0.5)
    samples = [Sample(0, tuple(row.tolist()), 0) for row in ids]

    monkeypatch.setattr(module, "DRAWN", 20)
    sampled = CausalLoss(base, sampled=samples)
    found = []
    for step in [*range(400), 0]:
        sampled.draw(str(step))
        found.append(sampled.losses(states, targets, 0.5))
    assert found[0].cross_entropy == found[-1].cross_entropy, "the same seed, the same draw"
    assert found[0].cross_entropy != found[1].cross_entropy
    mean = torch.stack([f.cross_entropy for f in found]).mean()
    torch.testing.assert_close(mean, expected.cross_entropy, rtol=0.01, atol=0.0)
    gradient = torch.stack([f.gradient for f in found]).mean(0)
    assert float((gradient - expected.gradient).norm()) < 0.05 * float(expected.gradient.norm())

    monkeypatch.setattr(module, "DRAWN", 100)
    all_of_them = CausalLoss(base, sampled=samples)
    all_of_them.draw("0")
    assert torch.equal(all_of_them.losses(states, targets, 0.5).gradient, expected.gradient)
