"""Searching by BM25 against what people use for that: speed, size, and whether the same documents come back.

    python benches/bm25.py --json benches/results/bm25.json      (about half an hour)
    python benches/bm25.py --quick

Real Wikipedia passages (47,208), and, in the full form, a million, the others made of their sentences
(seeded); questions of HotpotQA, 2Wiki, CWQ and PopQA. Title and text are one field in each. A query is from
the text of a question to the ids of the best k documents, warm. The data is in POLYPRAG_DATA, which defaults
to ../shared/data beside the repository. Needs tantivy and bm25s (numba makes the latter faster); a peer that
is not installed is left out, and said so.
"""

from __future__ import annotations

import gc
import gzip
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import MODULES, arguments, create, report
from polyprag import Document, Store, StoreSpec

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("POLYPRAG_DATA", REPOSITORY.parent / "shared" / "data"))
QUESTIONS = (
    "hotpotqa/hotpot_dev_v1_simplified.json",
    "2wikimultihopqa/2wiki_dev_first1000_qa.jsonl",
    "cwq/cwq_test_3531.jsonl",
    "popqa/popqa_1000_unified.jsonl",
)
KS = (3, 10)
BATCH = 10_000

#: An id, a title, a text.
Passage = tuple[int, str, str]
Search = Callable[[str, int], list[int]]


@dataclass
class Built:
    """A system with its index, ready to be asked."""

    search: Search
    seconds: float
    bytes: int
    #: Many questions at once, where there is a way of its own for that.
    many: Callable[[Sequence[str], int], object] | None = None
    first: float | None = None


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the shared data")
    parser.add_argument("--passages", type=int, nargs="+", help="numbers of passages, real ones first")
    parser.add_argument("--questions", type=int)
    options = parser.parse_args()
    if not (options.data / QUESTIONS[0]).exists():
        raise SystemExit(
            f"{options.data}: no questions there: set POLYPRAG_DATA to the folder of the shared data"
        )
    real = read_passages(options.data)
    sizes = options.passages or ([len(real)] if options.quick else [len(real), 1_000_000])
    asked = read_questions(options.data, options.questions or (400 if options.quick else 2_000))
    results: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for size in sizes:
        rows = measure(recombined(real, size), asked, options.work, 2 if options.quick else 3)
        results += rows
        ratios |= compare(rows)
    report(options.json, results, ratios)


# --- what is asked, and of what ------------------------------------------------------------------------


def read_passages(data: Path) -> list[Passage]:
    passages: list[Passage] = []
    for path in sorted((data / "corpus").glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                passages.append((len(passages), row["title"] or "", row["text"]))
    return passages


def read_questions(data: Path, n: int) -> list[str]:
    questions = []
    for name in QUESTIONS:
        text = (data / name).read_text(encoding="utf-8")
        rows = json.loads(text) if name.endswith(".json") else map(json.loads, text.splitlines())
        questions += [row["question"] for row in rows]
    return random.Random(42).sample(questions, n)


def recombined(real: list[Passage], n: int) -> list[Passage]:
    """The first n passages; past the real ones, titles and sentences of theirs, drawn."""
    if n <= len(real):
        return real[:n]
    sentences = [s for _, _, text in real for s in re.split(r"(?<=[.!?])\s+", text) if s]
    each = max(1, round(len(sentences) / len(real)))
    draw = random.Random(7)
    made = [
        (i, draw.choice(real)[1], " ".join(draw.choices(sentences, k=draw.randint(1, 2 * each - 1))))
        for i in range(len(real), n)
    ]
    return real + made


# --- the systems ---------------------------------------------------------------------------------------


def with_polyprag(path: Path, passages: list[Passage]) -> Built:
    shape = StoreSpec(
        modules=MODULES[:1],
        experts=16,
        rank=2,
        alpha=32.0,
        codec="f32",
        id_type="u64",
        keep_title=False,
        keep_text=False,
        keep_metadata=False,
    )
    started = time.perf_counter()
    with create(path, shape) as writer:
        for at in range(0, len(passages), BATCH):
            writer.add([Document(i, text, title) for i, title, text in passages[at : at + BATCH]])
    seconds = time.perf_counter() - started
    store = Store.open(path)
    size = sum(part.bytes for part in store.info().parts if part.role in ("bm25", "ids"))
    started = time.perf_counter()
    store.search("the first search opens the index")
    first = time.perf_counter() - started

    def search(text: str, k: int) -> list[int]:
        return [int(hit.id) for hit in store.search(text, k)]

    return Built(search, seconds, size, store.search_many, first)


def with_tantivy(path: Path, passages: list[Passage]) -> Built:
    import tantivy

    path.mkdir()
    builder = tantivy.SchemaBuilder()
    builder.add_unsigned_field("id", stored=True)
    builder.add_text_field("body", stored=False, index_option="freq")
    started = time.perf_counter()
    index = tantivy.Index(builder.build(), path=str(path))
    writer = index.writer(heap_size=64 << 20, num_threads=1)
    for i, title, text in passages:
        writer.add_document(tantivy.Document(id=i, body=[title, text]))
    writer.commit()
    writer.wait_merging_threads()
    seconds = time.perf_counter() - started
    index.reload()
    searcher = index.searcher()

    def search(text: str, k: int) -> list[int]:
        # Its query language would trip over a question's signs and capital words.
        query = index.parse_query(" ".join(re.findall(r"[^\W_]+", text)).lower(), ["body"])
        hits = searcher.search(query, k, count=False).hits
        return [searcher.doc(address)["id"][0] for _, address in hits]

    return Built(search, seconds, tree_bytes(path))


def with_bm25s(path: Path, passages: list[Passage], backend: str = "numpy") -> Built:
    import bm25s

    if backend == "numba":
        import numba  # noqa: F401

    def tokens(texts: list[str]) -> Any:
        # As the others do it, without a list of words to leave out.
        return bm25s.tokenize(texts, stopwords=None, show_progress=False)

    started = time.perf_counter()
    retriever = bm25s.BM25(method="lucene", k1=1.2, b=0.75, backend=backend)
    retriever.index(tokens([f"{title} {text}" for _, title, text in passages]), show_progress=False)
    seconds = time.perf_counter() - started
    retriever.save(str(path))

    def search(text: str, k: int) -> list[int]:
        found, _ = retriever.retrieve(tokens([text]), k=k, show_progress=False)
        return [int(i) for i in found[0]]

    def many(texts: Sequence[str], k: int) -> object:
        return retriever.retrieve(tokens(list(texts)), k=k, show_progress=False, n_threads=2)

    return Built(search, seconds, tree_bytes(path), many)


SYSTEMS: dict[str, Callable[[Path, list[Passage]], Built]] = {
    "polyprag": with_polyprag,
    "tantivy-py": with_tantivy,
    "bm25s": with_bm25s,
    "bm25s (numba)": lambda path, passages: with_bm25s(path, passages, "numba"),
}


def tree_bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


# --- measuring -----------------------------------------------------------------------------------------


def measure(
    passages: list[Passage], asked: list[str], work: Path | None, rounds: int
) -> list[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="polyprag-bm25-", dir=work))
    rows: list[dict[str, Any]] = []
    best: list[set[int]] = []
    try:
        for name, build in SYSTEMS.items():
            try:
                built = build(folder / str(len(rows)), passages)
            except ImportError as missing:
                print(f"{name} is left out: {missing}", file=sys.stderr)
                continue
            gc.collect()
            found = [set(built.search(text, 10)) for text in asked]  # the warm-up too
            best = best or found
            row: dict[str, Any] = {
                "system": name,
                "passages": len(passages),
                "build_s": built.seconds,
                "bytes_per_document": built.bytes / len(passages),
                "overlap_at_10": sum(len(a & b) / max(len(a), 1) for a, b in zip(best, found, strict=True))
                / len(asked),
            }
            if built.first is not None:
                row["first_search_s"] = built.first
            for k in KS:
                row[f"one_thread_k{k}_per_s"] = len(asked) / one_thread(built, asked, k, rounds)
                row[f"two_threads_k{k}_per_s"] = len(asked) / two_threads(built, asked, k, rounds)
                if (many := built.many) is not None:
                    row[f"many_k{k}_per_s"] = len(asked) / shortest(partial(many, asked, k), rounds)
            row["load"] = os.getloadavg()[0]
            print(json.dumps(row), file=sys.stderr)
            rows.append(row)
            del built
            gc.collect()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def shortest(work: Callable[[], object], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def one_thread(built: Built, asked: Sequence[str], k: int, rounds: int) -> float:
    return shortest(lambda: [built.search(text, k) for text in asked], rounds)


def two_threads(built: Built, asked: Sequence[str], k: int, rounds: int) -> float:
    with ThreadPoolExecutor(2) as pool:
        halves = [asked[::2], asked[1::2]]
        ask = lambda half: [built.search(text, k) for text in half]  # noqa: E731
        return shortest(lambda: list(pool.map(ask, halves)), rounds)


def compare(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many times as fast, and as small, polyprag is."""
    ours, ratios = rows[0], {}
    for row in rows[1:]:
        end = f"polyprag to {row['system']}, {row['passages']} passages"
        for key, value in row.items():
            if key.endswith("_per_s") and key in ours:
                ratios[f"{key}: {end}"] = ours[key] / value
            if key in ("build_s", "bytes_per_document"):
                ratios[f"{key}: {end}"] = ours[key] / value
    return ratios


if __name__ == "__main__":
    main()
