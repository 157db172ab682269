"""Questions with known answers, and the documents that hold them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, TypeAlias

from polyprag._polyprag import Document
from polyprag.corpus import DocumentId, Passage, UnifiedRow, read_unified
from polyprag.corpus.tables import csv_rows
from polyprag.errors import CorpusError, InvalidInput
from polyprag.jsonl import line_error, numbered_lines, open_binary, parse_object
from polyprag.text import contains_answer

_Path: TypeAlias = str | os.PathLike[str]
QuestionFormat: TypeAlias = Literal["jsonl", "csv", "tsv"]
Keep: TypeAlias = Literal["first", "gold", "all"] | Callable[[UnifiedRow], Sequence[Passage]]


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    answers: everything that counts as right (aliases); at least one.
    type: the relation or kind, where labelled. documents: the ids of its gold documents, where known.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    type: str | None = None
    documents: tuple[DocumentId, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """A system's answer to one question, and what it took.

    documents: ids that retrieval found, best first; None where nothing is retrieved.
    seconds: by stage (``retrieve``, ``route``, ``prefill``, ``decode``), its share of its batch's.
    prompt_tokens, new_tokens: None where nobody counted.
    """

    text: str
    documents: tuple[DocumentId, ...] | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    prompt_tokens: int | None = None
    new_tokens: int | None = None


class EvaluationSet(NamedTuple):
    """Documents, each once, in the order in which they were met; and the questions about them."""

    documents: tuple[Document, ...]
    questions: tuple[Question, ...]


# -- questions from files ------------------------------------------------------------------------------------

_SUFFIXES: dict[str, QuestionFormat] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv"}


def read_questions(
    path: _Path, *, format: QuestionFormat | None = None, separator: str = "|"
) -> list[Question]:
    """Questions from JSONL, CSV or TSV (also as ``.gz``), UTF-8.

    JSONL: ``question``, ``answers`` (array) or ``answer`` (string or array), and optionally ``id``, ``type``,
    ``documents`` (array of document ids); other fields are left alone. CSV and TSV: the same names in the
    header, several answers or documents in a cell parted by ``separator``. A row without ``id`` gets one made
    from its question.
    Raises OSError if the file cannot be opened, InvalidInput for a name that tells no format, and CorpusError
    with the line for a row that does not have this form, a duplicate id or an empty file.
    """
    chosen = format
    if chosen is None:
        suffix = os.path.splitext(os.fspath(path).removesuffix(".gz"))[1].lower()
        if suffix not in _SUFFIXES:
            known = ", ".join(_SUFFIXES)
            raise InvalidInput(
                f"{os.fspath(path)}: the name does not tell the format; use one of {known} or pass format="
            )
        chosen = _SUFFIXES[suffix]
    if chosen not in _SUFFIXES.values():
        raise InvalidInput(f'format is {format!r}; expected "jsonl", "csv" or "tsv"')
    questions: list[Question] = []
    seen: dict[str, int] = {}
    rows = (
        _json_rows(path)
        if chosen == "jsonl"
        else _csv_rows(path, "," if chosen == "csv" else "\t", separator)
    )
    for line, row in rows:
        question = question_of(row, partial(_malformed, path, line))
        first = seen.setdefault(question.id, line)
        if first != line:
            problem = f"the id {question.id!r} is already that of line {first}"
            raise line_error(path, line, problem, "give each row its own id, and ask nothing twice")
        questions.append(question)
    if not questions:
        raise CorpusError(f"{os.fspath(path)}: no question in the file; it needs one row a question")
    return questions


def _json_rows(path: _Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open_binary(path) as stream:
        for line, text in numbered_lines(stream, path):
            yield line, parse_object(text, path, line)


def _csv_rows(path: _Path, delimiter: str, separator: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """CSV rows as JSON rows. A quoted cell may span lines; the line named is where its row begins."""
    with open_binary(path) as stream:
        for place, cells in csv_rows(stream, os.fspath(path), delimiter=delimiter):
            if "question" not in cells or not {"answers", "answer"} & set(cells):
                raise line_error(
                    path, 1, "the header lacks question or answers", "begin with: question,answers"
                )
            row: dict[str, Any] = {name: cell for name, cell in cells.items() if cell.strip()}
            for name in ("answers", "answer", "documents"):
                if name in row:
                    row[name] = [part.strip() for part in row[name].split(separator) if part.strip()]
            yield place.number, row


def _malformed(path: _Path, line: int, problem: str) -> CorpusError:
    return line_error(
        path, line, problem, "a row needs question and answers, and may have id, type and documents"
    )


def question_of(row: Mapping[str, Any], fail: Callable[[str], CorpusError]) -> Question:
    """The question of a JSON row; ``fail`` makes an error of what is wrong with it."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        raise fail("question is missing, empty or no string")
    answers = row.get("answers", row.get("answer"))
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or not answers:
        raise fail("answers is missing or empty")
    if not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise fail("an answer is empty or no string")
    kind = row.get("type")
    if kind is not None and not isinstance(kind, str):
        raise fail("type is neither a string nor null")
    documents = row.get("documents")
    documents = [] if documents is None else documents
    if not isinstance(documents, list) or not all(type(id) in (str, int) for id in documents):
        raise fail("documents is no array of strings or numbers")
    id = row.get("id", row.get("_id"))
    if id is None:
        id = blake2b(question.encode("utf-8"), digest_size=16).hexdigest()
    elif type(id) is int:
        id = str(id)
    if not isinstance(id, str) or not id:
        raise fail("id is empty, or neither a string nor a whole number")
    return Question(id, question, tuple(answers), kind or None, tuple(documents))


# -- questions and documents from unified rows ---------------------------------------------------------------


def _kept(row: UnifiedRow, keep: Keep) -> tuple[Sequence[Passage], Sequence[Passage]]:
    """(passages that become documents, those of them that are gold)."""
    gold = [passage for passage in row.passages if passage.gold]
    if keep == "all":
        return row.passages, gold
    if keep == "gold":
        return gold, gold
    chosen = row.passages[:1] if keep == "first" else keep(row)
    return chosen, chosen


def evaluation_set(rows: Iterable[UnifiedRow], keep: Keep = "gold") -> EvaluationSet:
    """Unique documents and their questions from unified rows.

    keep: which passages of a row become documents: ``"gold"`` (those labelled so), ``"first"`` (the first,
    taken as gold), ``"all"`` (gold are those labelled so, if any) or a function that picks the gold ones.
    Ids are made from the content, so a passage that several questions share is one document.
    Raises InvalidInput for a row of which no passage is kept.
    """
    documents: dict[str, Document] = {}
    questions = []
    for row in rows:
        passages, gold = _kept(row, keep)
        if not passages:
            raise InvalidInput(
                f'row {row.id!r} (line {row.line}) has no passage to keep; use keep="all" or leave it out'
            )
        for passage in passages:
            if passage.id not in documents:
                documents[passage.id] = passage.document()
        ids = tuple(dict.fromkeys(passage.id for passage in gold))
        questions.append(Question(row.id, row.question, row.answers, row.type, ids))
    return EvaluationSet(tuple(documents.values()), tuple(questions))


def read_unified_set(path: _Path, keep: Keep = "gold") -> EvaluationSet:
    """:func:`evaluation_set` of all rows of a file."""
    return evaluation_set(read_unified(path), keep)


def popqa_rows(path: _Path, matching: Literal["tokens", "substring"] = "tokens") -> list[UnifiedRow]:
    """The rows of a unified PopQA file whose first passage contains an answer (``gold`` is no label there).

    matching: ``"tokens"`` finds an answer as whole tokens after SQuAD normalisation; ``"substring"`` finds it
    anywhere in the lower-case words of the text, inside of others too ("pol" in "polish"): a few more rows.
    """
    if matching == "tokens":
        return [row for row in read_unified(path) if contains_answer(row.passages[0].text, row.answers)]
    if matching != "substring":
        raise InvalidInput(f'matching is {matching!r}; expected "tokens" or "substring"')
    return [row for row in read_unified(path) if _contains_words(row.passages[0].text, row.answers)]


def _contains_words(text: str, answers: Iterable[str]) -> bool:
    def words(string: str) -> str:
        spaced = (
            character if character.isalnum() or character == "_" else " " for character in string.lower()
        )
        return " ".join("".join(spaced).split())

    inside = words(text)
    return any(answer in inside for answer in map(words, answers) if answer)


def popqa_sample(
    path: _Path, n: int = 100, seed: int = 42, *, matching: Literal["tokens", "substring"] = "tokens"
) -> EvaluationSet:
    """``random.Random(seed).sample(rows, n)`` of :func:`popqa_rows`; the documents are their first passages.

    Raises InvalidInput if the file has fewer than n such rows.
    """
    rows = popqa_rows(path, matching)
    if n > len(rows):
        raise InvalidInput(f"n is {n}, but only {len(rows)} rows have an answer in their first passage")
    return evaluation_set(random.Random(seed).sample(rows, n), keep="first")
