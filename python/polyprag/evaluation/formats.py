"""Question sets in the files that they come in: the four benchmarks of PRAG and Poly-PRAG, and one's own.

Each reader gives unified rows: a question with its answers, its type, and the passages that its file has
beside it (none in PopQA and ComplexWebQuestions). JSON files of one array are read whole.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeAlias, get_args

from polyprag.corpus import Passage, UnifiedRow, read_unified
from polyprag.corpus.ids import Place
from polyprag.corpus.tables import csv_rows
from polyprag.errors import CorpusError, InvalidInput
from polyprag.evaluation.data import (
    EvaluationSet,
    Keep,
    Question,
    evaluation_set,
    question_of,
    read_questions,
)
from polyprag.jsonl import line_error, open_binary, read_jsonl

SetFormat: TypeAlias = Literal[
    "jsonl", "json", "csv", "tsv", "unified", "prag", "popqa", "2wiki", "hotpotqa", "cwq"
]

#: Formats of one's own, whose rows may name their gold documents and have no passages.
PLAIN: tuple[SetFormat, ...] = ("jsonl", "json", "csv", "tsv")

_Path: TypeAlias = str | os.PathLike[str]
_Fail: TypeAlias = Callable[[str], CorpusError]
_KNOWN = ", ".join(get_args(SetFormat))


def read_rows(
    path: _Path, format: SetFormat | None = None, *, aliases: _Path | None = None
) -> list[UnifiedRow]:
    """The rows of a question set, in the order of its file.

    Args:
        format: None is told by the content (:func:`format_of`).
        aliases: 2WikiMultihopQA's ``id_aliases.json``: aliases and demonyms of an answer count as right, too.

    Raises:
        OSError: a file cannot be read.
        CorpusError: it has not the form; the message names file, place and remedy.
        InvalidInput: the content tells no format, or aliases are given for another format.
    """
    chosen = format or format_of(path)
    if aliases is not None and chosen != "2wiki":
        raise InvalidInput(f"aliases belong to 2WikiMultihopQA, and {os.fspath(path)} is {chosen}")
    if chosen == "unified":
        return list(read_unified(path))
    if chosen == "prag":
        from polyprag.augment.prag import read_prag

        return list(read_prag(path).rows)
    if chosen == "popqa":
        rows = list(_popqa(path))
    elif chosen in ("jsonl", "csv", "tsv"):
        rows = [_without_passages(q) for q in read_questions(path, format=chosen)]
    elif chosen in get_args(SetFormat):
        read = {"2wiki": _multihop, "hotpotqa": _multihop, "cwq": _complex_web_questions, "json": _plain}[
            chosen
        ]
        rows = [read(entry, number, fail) for entry, number, fail in _entries(path)]
        if chosen == "2wiki" and aliases is not None:
            rows = _with_aliases(path, rows, aliases)
    else:
        raise InvalidInput(f"format is {format!r}; expected one of {_KNOWN}")
    if not rows:
        raise CorpusError(f"{os.fspath(path)}: no question in the file; it needs one row a question")
    where = "line" if chosen in ("popqa", "jsonl", "csv", "tsv") else "entry"
    _check_ids(path, ((row.id, row.line) for row in rows), where)
    return rows


def _check_ids(path: _Path, numbered: Iterable[tuple[str, int]], where: str) -> None:
    seen: dict[str, int] = {}
    for id, number in numbered:
        first = seen.setdefault(id, number)
        if first != number:
            raise CorpusError(
                f"{os.fspath(path)}, {where} {number}: the id {id!r} is already that of {where} "
                f"{first}; give each question its own id"
            )


def read_set(
    path: _Path, format: SetFormat | None = None, *, keep: Keep = "gold", aliases: _Path | None = None
) -> EvaluationSet:
    """The questions of a set, and the documents that its passages are.

    keep: which passages are documents, and gold, as in :func:`~polyprag.evaluation.data.evaluation_set`; of
    PRAG's files all are gold, since it answers with what it found. Sets without passages have no documents;
    rows of one's own may name them.
    Raises what :func:`read_rows` raises.
    """
    chosen = format or format_of(path)
    if chosen in ("jsonl", "csv", "tsv"):
        return EvaluationSet((), tuple(read_questions(path, format=chosen)))
    if chosen == "json":
        questions = tuple(question_of(entry, fail) for entry, _, fail in _entries(path))
        _check_ids(path, ((q.id, number) for number, q in enumerate(questions, start=1)), "entry")
        return EvaluationSet((), questions)
    rows = read_rows(path, chosen, aliases=aliases)
    if not any(row.passages for row in rows):
        return EvaluationSet((), tuple(Question(r.id, r.question, r.answers, r.type) for r in rows))
    return evaluation_set(rows, (lambda row: row.passages) if chosen == "prag" else keep)


def format_of(path: _Path) -> SetFormat:
    """The format of a file, by its content. Raises OSError, InvalidInput if it tells none, and CorpusError if
    the file is empty or UTF-16.
    """
    name = os.fspath(path)
    with open_binary(path) as stream:
        head = stream.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    if not head:
        raise CorpusError(f"{name}: the file is empty; it needs one row a question")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise line_error(path, 1, "the file is UTF-16", "save it as UTF-8")
    if head.startswith(b"["):
        return _format_of_array(path)
    first = head.split(b"\n", 1)[0].decode("utf-8", "replace")
    if first.startswith("{"):
        _, row = next(read_jsonl(path))
        return "unified" if "passages" in row else "jsonl"
    if "\t" in first and "possible_answers" in first:
        return "popqa"
    suffix = os.path.splitext(name.removesuffix(".gz"))[1].lower()
    if suffix in (".csv", ".tsv"):
        return "csv" if suffix == ".csv" else "tsv"
    raise InvalidInput(f"{name}: neither its content nor its name tells a format; name one of {_KNOWN}")


def _format_of_array(path: _Path) -> SetFormat:
    entry, _, _ = next(_entries(path))
    if "augment" in entry:
        return "prag"
    if "compositionality_type" in entry or ("ID" in entry and "webqsp_ID" in entry):
        return "cwq"
    if "supporting_facts" in entry and "context" in entry:
        return "2wiki" if "evidences" in entry or "evidences_id" in entry else "hotpotqa"
    return "json"


# -- JSON arrays -----------------------------------------------------------------------------------------


def _entries(path: _Path) -> Iterator[tuple[dict[str, Any], int, _Fail]]:
    """(entry, its place from 1, what makes an error of it) of a file of one JSON array of objects."""
    name = os.fspath(path)
    with open_binary(path) as stream:
        data = stream.read()
    try:
        text = data.decode("utf-8-sig")
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        said = error.msg.removesuffix(" starting at")
        raise line_error(path, error.lineno, f"no valid JSON ({said})", "copy the file again") from error
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{name}: no valid JSON ({error}); copy the file again") from error
    if not isinstance(entries, list) or not entries:
        raise CorpusError(f"{name}: no question in the file; it needs one JSON array of them")
    for number, entry in enumerate(entries, start=1):

        def fail(problem: str, number: int = number) -> CorpusError:
            return CorpusError(f"{name}, entry {number}: {problem}; copy the file again, or mend the entry")

        if not isinstance(entry, dict):
            raise fail("it is no object")
        if "\\u" in text:  # only an escape can bring a lone surrogate in
            try:
                json.dumps(entry, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise fail("half of a surrogate pair (\\ud800 to \\udfff)") from error
        yield entry, number, fail


def _plain(entry: Mapping[str, Any], number: int, fail: _Fail) -> UnifiedRow:
    return _without_passages(question_of(entry, fail), number)


def _without_passages(question: Question, line: int = 0) -> UnifiedRow:
    return UnifiedRow(question.id, question.type, question.question, question.answers, (), line)


def _multihop(entry: Mapping[str, Any], number: int, fail: _Fail) -> UnifiedRow:
    """HotpotQA (Yang et al., 2018) and 2WikiMultihopQA (Ho et al., 2020): ten paragraphs of sentences, gold
    those that the supporting facts name.
    """
    question, answer = _text(entry, "question", fail), _text(entry, "answer", fail)
    try:
        named = {str(title) for title, _ in entry["supporting_facts"]}
        passages = tuple(
            Passage(str(title), " ".join(s.strip() for s in sentences if s.strip()), str(title) in named)
            for title, sentences in entry["context"]
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise fail(
            "supporting_facts is no list of [title, sentence], or context no list of [title, [sentence, ...]]"
        ) from error
    kind = entry.get("type")
    return UnifiedRow(
        _id(entry, ("_id", "id"), fail),
        kind if isinstance(kind, str) and kind else None,
        question,
        (answer,),
        tuple(p for p in passages if p.text),
        number,
    )


def _with_aliases(path: _Path, rows: Sequence[UnifiedRow], aliases: _Path) -> list[UnifiedRow]:
    by_entity: dict[str, list[str]] = {}
    for line, entity in read_jsonl(aliases):
        try:
            names = [*entity["aliases"], *entity.get("demonyms", [])]
            by_entity[str(entity["Q_id"])] = [str(name) for name in names]
        except (KeyError, TypeError) as error:
            raise line_error(
                aliases, line, "no Q_id or no list aliases", "give 2WikiMultihopQA's id_aliases.json"
            ) from error
    found = []
    for row, (entry, _, _) in zip(rows, _entries(path), strict=True):
        others = by_entity.get(str(entry.get("answer_id")), [])
        answers = tuple(dict.fromkeys([*row.answers, *(a for a in others if a.strip())]))
        found.append(UnifiedRow(row.id, row.type, row.question, answers, row.passages, row.line))
    return found


def _complex_web_questions(entry: Mapping[str, Any], number: int, fail: _Fail) -> UnifiedRow:
    """ComplexWebQuestions (Talmor and Berant, 2018), version 1.1: every answer with all of its aliases."""
    question = _text(entry, "question", fail)
    try:
        given = [[a["answer"], *a.get("aliases", [])] for a in entry["answers"]]
    except (KeyError, TypeError) as error:
        raise fail("answers is no list of {answer, aliases}") from error
    answers = tuple(dict.fromkeys(a for names in given for a in names if isinstance(a, str) and a.strip()))
    if not answers:
        raise fail("there is no answer in it; the test set of the first release has none: take the dev set")
    kind = entry.get("compositionality_type")
    return UnifiedRow(
        _id(entry, ("ID", "id"), fail), kind if isinstance(kind, str) else None, question, answers, (), number
    )


def _text(entry: Mapping[str, Any], name: str, fail: _Fail) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value.strip():
        raise fail(f"{name} is missing, empty or no string")
    return value


def _id(entry: Mapping[str, Any], names: Sequence[str], fail: _Fail) -> str:
    value = next((entry[name] for name in names if name in entry), None)
    if type(value) not in (str, int) or value == "":
        raise fail(f"{names[0]} is missing or empty")
    return str(value)


# -- PopQA -----------------------------------------------------------------------------------------------


def _popqa(path: _Path) -> Iterator[UnifiedRow]:
    """PopQA (Mallen et al., 2023), ``popQA.tsv``: the type is the relation, answers a JSON list in a cell."""
    with open_binary(path) as stream:
        for place, row in csv_rows(stream, os.fspath(path), delimiter="\t"):
            yield _popqa_row(row, place, "give popQA.tsv as it was published")


def _popqa_row(row: Mapping[str, Any], place: Place, remedy: str) -> UnifiedRow:
    def fail(problem: str) -> CorpusError:
        return place.error(problem, remedy)

    if missing := sorted({"id", "prop", "question", "possible_answers"} - set(row)):
        raise line_error(place.path, 1, f"the header lacks {', '.join(missing)}", remedy)
    try:
        answers = json.loads(row["possible_answers"])
    except (ValueError, TypeError) as error:
        raise fail("possible_answers is no JSON list") from error
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise fail("possible_answers is no JSON list of strings")
    told = tuple(dict.fromkeys(a for a in answers if a.strip()))
    if not told:
        raise fail("possible_answers is empty")
    return UnifiedRow(
        _id(row, ("id",), fail), row["prop"] or None, _text(row, "question", fail), told, (), place.number
    )


def write_questions(path: _Path, questions: Sequence[Question]) -> None:
    """Write questions as JSONL, with the documents that they name. Atomic. Raises OSError."""
    from polyprag.jsonl import write_jsonl

    write_jsonl(path, ({name: value for name, value in asdict(q).items() if value} for q in questions))


def write_rows(path: _Path, rows: Sequence[UnifiedRow]) -> None:
    """Write rows as JSONL: unified ones, or questions where no row has passages. Atomic. Raises OSError."""
    from polyprag.jsonl import write_jsonl

    passages = any(row.passages for row in rows)
    write_jsonl(
        path,
        (
            {
                "id": row.id,
                "type": row.type,
                "question": row.question,
                "answers": list(row.answers),
                **(
                    {"passages": [{"title": p.title, "text": p.text, "gold": p.gold} for p in row.passages]}
                    if passages
                    else {}
                ),
            }
            for row in rows
        ),
    )
