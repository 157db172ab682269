"""Answers as they come, in a file from which a stopped evaluation goes on: a line a question and draw."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyprag._polyprag import __version__
from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.data import Prediction, Question
from polyprag.jsonl import append_lines, read_resumable


@dataclass(frozen=True, slots=True)
class Kept:
    """A prediction with what was measured around it: seconds of wall time, and peak bytes of its batch."""

    prediction: Prediction
    seconds: float
    peak_bytes: Mapping[str, int]


class Answers:
    """The answers of an evaluation, kept in ``path`` if there is one.

    An answer is found again under the key of its question (:func:`key_of`), which says all that it depends
    on: after another training, or with other wrong documents, the question is asked again.
    Raises CorpusError if ``path`` is another file.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        rows = read_resumable(path) if path is not None else []
        self._kept = dict(_kept(row, path, number) for number, row in enumerate(rows, start=1))

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: str) -> Kept | None:
        return self._kept.get(key)

    def add(self, system: str, draw: int, found: Mapping[str, tuple[Question, Kept]]) -> None:
        """Keep answers by their key. What an append of theirs is broken off in is asked again."""
        self._kept.update((key, kept) for key, (_, kept) in found.items())
        if self.path is not None:
            append_lines(self.path, [_row(key, system, draw, *each) for key, each in found.items()])


def key_of(
    system: object, name: str, draw: int, together: int, question: Question, made_of: Any = None
) -> str:
    """What an answer is kept under: a hash of the question, the system, and what it depends on.

    together: how many are asked at a time, on which at least the costs depend.

    A system without ``identity`` is known by its class, the source of its module, and ``made_of``: JSON
    values that tell what it was given to answer from.
    """
    identity = getattr(system, "identity", None)
    depends = identity(question) if callable(identity) else [*source_of(type(system)), made_of]
    try:
        text = json.dumps(
            [__version__, name, draw, together, question.id, question.question, depends], ensure_ascii=False
        )
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name}: identity gives what is no JSON ({error})") from error
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def source_of(kind: type) -> list[str]:
    """The name of a class and a hash of its module's source, which tell when it changed."""
    try:
        module = Path(inspect.getfile(kind)).read_bytes()
    except (OSError, TypeError):  # written at a prompt, or built in
        module = b""
    return [kind.__qualname__, hashlib.blake2b(module, digest_size=16).hexdigest()]


def _row(key: str, system: str, draw: int, question: Question, kept: Kept) -> dict[str, Any]:
    p = kept.prediction
    return {
        "key": key,
        "system": system,
        "draw": draw,
        "question": question.id,
        "answer": p.text,
        "documents": None if p.documents is None else list(p.documents),
        "stages": dict(p.seconds),
        "prompt_tokens": p.prompt_tokens,
        "new_tokens": p.new_tokens,
        "seconds": kept.seconds,
        "peak_bytes": dict(kept.peak_bytes),
    }


def _kept(row: Mapping[str, Any], path: Path | None, number: int) -> tuple[str, Kept]:
    try:
        documents = row["documents"]
        prediction = Prediction(
            str(row["answer"]),
            None if documents is None else tuple(documents),
            {str(stage): float(seconds) for stage, seconds in row["stages"].items()},
            row["prompt_tokens"],
            row["new_tokens"],
        )
        return str(row["key"]), Kept(prediction, float(row["seconds"]), dict(row["peak_bytes"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorpusError(
            f"{path}, line {number}: no line of answers that an evaluation keeps ({error!r}); "
            "name another file, or delete this one"
        ) from error


def checked(name: str, given: object, questions: Sequence[Question]) -> list[Prediction]:
    """What a system returned, as predictions. Raises InvalidInput for anything but one answer a question."""
    if not isinstance(given, list | tuple) or len(given) != len(questions):
        found = f"{len(given)} of them" if isinstance(given, list | tuple) else type(given).__name__
        raise InvalidInput(
            f"{name}: answer() has to return a list with one answer for each of its {len(questions)} "
            f"questions, in their order, not {found}"
        )
    predictions = []
    for question, each in zip(questions, given, strict=True):
        if not isinstance(each, str | Prediction):
            raise InvalidInput(
                f"{name}: the answer to question {question.id!r} is {type(each).__name__}, "
                "neither a string nor a Prediction"
            )
        prediction = Prediction(each) if isinstance(each, str) else each
        if (problem := _problem(prediction)) is not None:
            raise InvalidInput(f"{name}: the answer to question {question.id!r} cannot be kept: {problem}")
        predictions.append(prediction)
    return predictions


def _problem(p: Any) -> str | None:
    """What a line of JSON could not keep of a prediction, in which somebody else put what it holds."""
    if not isinstance(p.text, str):
        return f"its text is {type(p.text).__name__}, no string"
    try:
        p.text.encode()
    except UnicodeEncodeError:
        return "its text has half of a surrogate pair"
    if p.documents is not None:
        if not isinstance(p.documents, list | tuple):
            return f"its documents are {type(p.documents).__name__}, no list of ids"
        for id in p.documents:
            if type(id) not in (str, int):
                return f"its documents hold {type(id).__name__}, and an id is a string or an int"
    if not isinstance(p.seconds, Mapping):
        return f"its seconds are {type(p.seconds).__name__}, no mapping of stages"
    for stage, seconds in p.seconds.items():
        if not isinstance(seconds, int | float) or not math.isfinite(seconds):
            return f"its seconds of {stage} are {seconds!r}, no finite number"
    for tokens in (p.prompt_tokens, p.new_tokens):
        if tokens is not None and type(tokens) is not int:
            return f"its tokens are {type(tokens).__name__}, neither int nor None"
    return None
