"""Routed models for tests, and the float64 reference: one route merged into the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from polyprag.layers import DEFAULT_TARGETS, RoutedModel

K, R, ALPHA = 5, 3, 7.0


def attach(model: nn.Module, targets: Any = DEFAULT_TARGETS, **changes: Any) -> RoutedModel:
    """Routed, with experts that do something: B starts at zero, so it is drawn."""
    torch.manual_seed(3)
    routed = RoutedModel.attach(
        model, **{"experts": K, "rank": R, "alpha": ALPHA, "targets": targets, **changes}
    )
    with torch.no_grad():
        for parameter in routed.parameters():
            parameter.normal_(0.0, 0.2)
    return routed


def draw_routes(rows: int, routed: RoutedModel, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(rows, *routed.route_shape, generator=generator)
    return w / w.sum(-1, keepdim=True)


def delta(a: torch.Tensor, b: torch.Tensor, w: torch.Tensor, mixing: str = "exact") -> torch.Tensor:
    """The change of the weight [out, in] that a route w [K] means, in float64, by loops over experts."""
    a, b, w = a.double(), b.double(), w.double()
    if mixing == "exact":
        total = sum(w[k] * (b[:, k] @ a[k]) for k in range(len(w)))
    else:
        total = sum(w[k] * b[:, k] for k in range(len(w))) @ sum(w[k] * a[k] for k in range(len(w)))
    return ALPHA / R * total


def merged(model: PreTrainedModel, routed: RoutedModel, w: torch.Tensor, mixing: str) -> PreTrainedModel:
    """A float64 copy of the base model, one route w [G, K] merged into its weights."""
    reference = copy.deepcopy(model).double()
    experts = routed.experts()
    for m in routed.modules:
        weight = reference.get_submodule(m.name).weight
        change = delta(experts[f"{m.name}.A"], experts[f"{m.name}.B"], w[m.group], mixing)
        weight += change.T if type(reference.get_submodule(m.name)).__name__ == "Conv1D" else change
    return reference


def logits(model: nn.Module, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def some_ids(rows: int, width: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 100, (rows, width), generator=torch.Generator().manual_seed(seed))


def layer_bytes(model: nn.Module) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in model.state_dict().items()}


def rows_as_alone(model: nn.Module, routed: RoutedModel, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The logits of all rows at once, each row found to be what it is alone under its route."""
    with routed.route(w):
        together = logits(model, ids)
    for row in range(len(ids)):
        with routed.route(w[row : row + 1]):
            alone = logits(model, ids[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
    return together


class PackedLinear(nn.Module):
    """As a quantised layer: whole numbers and scales in buffers, no parameter and no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed * self.scale).to(x.dtype).T
