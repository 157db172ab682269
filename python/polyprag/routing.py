"""Routes in torch: phi, the decoder of codes, and how several documents' routes become one.

The differentiable twin of what the Rust core computes for reading
(``rust/core/src/routes/phi.rs``); one fixture holds the two within 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from polyprag.combining import CombinationRule, combination_weights
from polyprag.errors import InvalidInput

__all__ = ["CombinationRule", "Phi", "PhiKind", "RouteDecoder", "combination_weights"]

PhiKind = Literal["sigmoid", "softmax", "linear"]


@dataclass(frozen=True)
class Phi:
    """The map from routing logits z to a route w.

    With ``sigmoid`` and ``softmax`` each group's K weights are >= 0 and sum to 1: ``sigmoid`` is normalised,
    as Poly does at evaluation (Ponti et al., "Combining Parameter-efficient Modules for Task-level
    Generalisation"); ``top_k`` keeps the k largest logits of a group.
    With ``linear``, w = (1 + z) / K has any sign and size, so that a route reaches all that experts span and
    not only what lies between them.
    """

    kind: PhiKind = "sigmoid"
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(PhiKind):
            raise InvalidInput(f"phi is one of {', '.join(get_args(PhiKind))}, not {self.kind!r}")
        if self.top_k is not None and self.top_k < 1:
            raise InvalidInput(f"top_k is at least 1, not {self.top_k}")
        if self.top_k is not None and self.kind == "linear":
            raise InvalidInput(
                "top_k: the weights of phi 'linear' have any sign, and the largest cannot stand for all"
            )

    def __call__(self, z: Tensor) -> Tensor:
        """z [..., K] -> w [..., K], in the dtype of z.

        In log space, so that a group whose logits are all very negative still has a route.
        """
        if self.kind == "linear":
            return (1.0 + z) / z.shape[-1]
        if self.top_k is not None and self.top_k < z.shape[-1]:
            # Stable sort: among equal logits the lower index stays, as in the Rust core.
            kept = z.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]
            dropped = torch.ones_like(z, dtype=torch.bool).scatter(-1, kept, False)
        else:
            dropped = None
        logits = nn.functional.logsigmoid(z) if self.kind == "sigmoid" else z
        if dropped is not None:
            logits = logits.masked_fill(dropped, float("-inf"))
        return torch.softmax(logits, dim=-1)


class RouteDecoder(nn.Module):
    """z = V c + b: a document's logits from its code of d numbers; V and b are shared by the corpus."""

    def __init__(self, groups: int, experts: int, code_dim: int) -> None:
        super().__init__()
        self.shape = (groups, experts)
        self.V = nn.Parameter(torch.randn(groups * experts, code_dim) / code_dim**0.5)
        self.b = nn.Parameter(torch.zeros(groups * experts))

    def forward(self, codes: Tensor) -> Tensor:
        """codes [n, d] -> z [n, G, K]."""
        return (codes @ self.V.T + self.b).view(-1, *self.shape)
