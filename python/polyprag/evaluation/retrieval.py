"""How well documents were found: recall at k and mean reciprocal rank, as ir-measures has them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from polyprag.corpus import DocumentId

CUTOFFS = (1, 3, 5, 10, 20, 100)


def measured() -> bool:
    """Whether ir-measures is installed: ``pip install 'polyprag[eval]'``."""
    return importlib.util.find_spec("ir_measures") is not None


def retrieval_scores(
    gold: Sequence[Sequence[DocumentId]], found: Sequence[Sequence[DocumentId]]
) -> dict[str, float]:
    """``recall@k`` for each cutoff that a ranking reaches, and ``mrr``, all in [0, 1]; means over questions.

    gold: ids of each question's gold documents; questions without any are left out.
    found: for each question ids of different documents, best first.
    Empty without ir-measures, without gold documents, or if nothing was ever found.
    """
    asked = [n for n, ids in enumerate(gold) if ids]
    depth = max((len(ids) for ids in found), default=0)
    if not asked or not depth or not measured():
        return {}
    from ir_measures import RR, Qrel, R, ScoredDoc, calc_aggregate

    # Ids are text there, and the number 1 is another document than the text "1".
    qrels = [Qrel(str(n), repr(id), 1) for n in asked for id in gold[n]]
    run = [
        ScoredDoc(str(n), repr(id), float(depth - rank)) for n in asked for rank, id in enumerate(found[n])
    ]
    names = {f"recall@{k}": R @ k for k in CUTOFFS if k <= depth}
    # A question of which nothing was found is in the qrels alone, and counts 0.
    values = calc_aggregate([*names.values(), RR], qrels, run)
    return {**{name: float(values[m]) for name, m in names.items()}, "mrr": float(values[RR])}
