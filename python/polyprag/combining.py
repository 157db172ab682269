"""How several documents' routes become one; numpy alone, so that a store can be explored without torch."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from polyprag.errors import InvalidInput

CombinationRule = Literal["mean", "score", "first", "sum"]

# A whole route is loud: it answers by the habits of its training, whatever the passage says. At half of its
# strength it answers as well and lets the model read (docs/method.md, "A route beside a passage").
BESIDE_PASSAGES = 0.5


def strength_beside_passages(phi: str) -> float:
    """What a route is multiplied by where passages are in the prompt, too (Combine).

    phi: of the store. Weights that sum to 1 (``sigmoid``, ``softmax``: Poly-PRAG, PRAG and DyPRAG as
    published) stay whole.
    """
    return BESIDE_PASSAGES if phi == "linear" else 1.0


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
