"""Routes in torch: phi, the decoder of codes, and how several documents' routes become one.

The differentiable twin of what the Rust core computes for reading
(``rust/core/src/routes/phi.rs``); one fixture holds the two within 1e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyprag.errors import InvalidInput

PhiKind = Literal["sigmoid", "softmax", "linear"]
CombinationRule = Literal["mean", "score", "first", "sum"]


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


def combination_weights(
    scores: NDArray[np.floating] | list[float], rule: CombinationRule = "mean", temperature: float = 1.0
) -> NDArray[np.float32]:
    """Weights a [n] of n documents' routes, from their BM25 scores [n], best first.

    ``mean`` and ``first`` ignore the scores; ``score`` is softmax((s - s_max) / (T * s_max));
    ``sum`` is PRAG's (arXiv 2501.15915, eq. 6) and leaves the simplex.
    """
    s = np.asarray(scores, dtype=np.float64)
    if s.ndim != 1 or not len(s):
        raise InvalidInput(f"scores is a non-empty list of numbers, not of shape {s.shape}")
    if rule == "mean":
        a = np.full(len(s), 1.0 / len(s))
    elif rule == "first":
        a = np.zeros(len(s))
        a[0] = 1.0
    elif rule == "sum":
        a = np.ones(len(s))
    elif rule == "score":
        if not (temperature > 0 and np.isfinite(temperature)):
            raise InvalidInput(f"the temperature of rule 'score' is a number above 0, not {temperature}")
        if not np.isfinite(s).all():
            raise InvalidInput(f"scores are finite numbers, not {s.tolist()}")
        top = max(float(s.max()), 1e-9)
        a = np.exp((s - s.max()) / (temperature * top))
        a /= a.sum()
    else:
        raise InvalidInput(f"rule is 'mean', 'score', 'first' or 'sum', not {rule!r}")
    return a.astype(np.float32)
