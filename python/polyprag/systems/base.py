"""The one interface of all systems, and what those of polyprag share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from polyprag._polyprag import Hit, Store
from polyprag.evaluation.data import Prediction, Question
from polyprag.generation import Spent
from polyprag.models import BaseModel, passage_text


class System(Protocol):
    """What the harness asks: an answer to each question, in order.

    Two attributes more are used where a system has them: ``name``, its key in the report (the name of its
    class, otherwise), and ``identity(question)``, whatever its answer depends on besides the question, as
    JSON values: an evaluation that goes on keeps answers only where that is the same.
    """

    def answer(self, questions: Sequence[Question]) -> Sequence[str | Prediction]: ...


def model_identity(base: BaseModel) -> list[Any]:
    """What an answer of the bare base model depends on."""
    return [base.digest, str(base.model.dtype)]


def passages_of(store: Store, hits: Sequence[Hit]) -> list[str]:
    """The texts of the documents that were found, as they stand in prompts."""
    return passage_texts(store, [hit.id for hit in hits])


def passage_texts(store: Store, ids: Sequence[str | int]) -> list[str]:
    """The texts of documents, as they stand in prompts."""
    return [passage_text(d.title, d.text or "") for d in store.documents(list(ids))]


def predictions(
    texts: Sequence[str],
    spent: Mapping[int, Spent],
    *,
    found: Sequence[Sequence[Hit]] | None = None,
    **seconds: float,
) -> list[Prediction]:
    """Answers with what they took. ``seconds``: of stages of all of them together, by name."""
    shared = {stage: whole / max(len(texts), 1) for stage, whole in seconds.items()}
    return [
        Prediction(
            text,
            None if found is None else tuple(hit.id for hit in found[place]),
            {**shared, "prefill": spent[place].prefill, "decode": spent[place].decode},
            spent[place].prompt_tokens,
            spent[place].new_tokens,
        )
        for place, text in enumerate(texts)
    ]
