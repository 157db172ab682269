"""How a store grows: built, opened and read at a thousand to a hundred million documents.

    python benches/store_scale.py --json benches/results/store_scale.json      (about half an hour, 40 GB)
    python benches/store_scale.py --quick

Codes are generated (64 bytes a document); ids are ``u64`` (0, 1, 2 ...), ``mixed`` (random u64),
``wiki`` (``wiki-%09d``) or ``uuid``; there are no texts and no BM25 index. Every store is built and
opened in a process of its own. "build" is from the first call of the writer to the end of the commit,
finding duplicates included; making ids and codes is not counted.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import CODE, arguments, create, in_child, median, memory, report, seconds, spec
from polyprag import Store

BATCH = 1_000_000
ROUTES = 10
KINDS = ("u64", "mixed", "wiki", "uuid")
NUMBERS = ("u64", "mixed")
SIZES = (1_000, 100_000, 10_000_000, 100_000_000)
QUICK = (1_000, 100_000, 1_000_000)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        verb, kind, size, path = sys.argv[2:]
        print(json.dumps({"build": build, "read": read}[verb](kind, int(size), Path(path))))
        return
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of documents")
    parser.add_argument("--ids", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    sizes = options.sizes or (QUICK if options.quick else SIZES)
    work = Path(tempfile.mkdtemp(prefix="polyprag-scale-", dir=options.work))
    results = []
    try:
        for kind in options.ids:
            for size in sizes:
                path = work / f"{kind}-{size}.polyprag"
                row = {"ids": kind, "documents": size}
                row |= in_child(__file__, "build", kind, size, path)
                row |= in_child(__file__, "read", kind, size, path)
                shutil.rmtree(path)
                print(json.dumps(row), file=sys.stderr)
                results.append(row)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    ratios = {}
    for kind in options.ids:
        rows = [row for row in results if row["ids"] == kind]
        first, last = rows[0], rows[-1]
        ratios[f"{kind}: open, {last['documents']:,} to {first['documents']:,}"] = (
            last["open_ms"] / first["open_ms"]
        )
        ratios[f"{kind}: {ROUTES} routes, {last['documents']:,} to {first['documents']:,}"] = (
            last["routes_us"] / first["routes_us"]
        )
    report(options.json, results, ratios)


def ids(kind: str, first: int, n: int) -> NDArray[Any]:
    """The ids of the documents from ``first`` on; any kind can be made again for one number."""
    numbers = np.arange(first, first + n, dtype=np.uint64)
    if kind == "u64":
        return numbers
    if kind == "mixed":
        return _mix(numbers)
    if kind == "wiki":
        text = np.empty((n, 14), dtype=np.uint8)
        text[:, :5] = np.frombuffer(b"wiki-", dtype=np.uint8)
        for place in range(9):
            text[:, 13 - place] = 48 + numbers % 10
            numbers //= np.uint64(10)
        return text.view("S14").ravel()
    # Two rounds of splitmix64 make 128 bits of a number.
    high, low = _mix(numbers * np.uint64(2)), _mix(numbers * np.uint64(2) + np.uint64(1))
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    text = np.full((n, 36), ord("-"), dtype=np.uint8)
    places = [i for i in range(36) if i not in (8, 13, 18, 23)]
    for at, place in enumerate(places):
        half = high if at < 16 else low
        text[:, place] = digits[(half >> np.uint64(60 - 4 * (at % 16))) & np.uint64(15)]
    return text.view("S36").ravel()


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def codes(n: int) -> NDArray[np.float32]:
    """Document i has row i modulo a batch."""
    return np.random.default_rng(7).standard_normal((n, CODE), dtype=np.float32)


def build(kind: str, size: int, path: Path) -> dict[str, Any]:
    block = codes(min(BATCH, size))
    taken = time.perf_counter()
    writer = create(path, spec("u64" if kind in NUMBERS else "string"))
    taken = time.perf_counter() - taken
    for first in range(0, size, BATCH):
        n = min(BATCH, size - first)
        batch = ids(kind, first, n)
        start = time.perf_counter()
        writer.add_arrays(batch, block[:n])
        taken += time.perf_counter() - start
    start = time.perf_counter()
    writer.commit()
    taken += time.perf_counter() - start
    return {
        "build_s": taken,
        "documents_per_s": size / taken,
        "build_peak_mb": memory("VmHWM") / 1e6,
    }


def read(kind: str, size: int, path: Path) -> dict[str, Any]:
    gc.collect()
    before = memory("VmRSS")
    start = time.perf_counter()
    store = Store.open(path)
    first_open = time.perf_counter() - start
    resident = memory("VmRSS") - before
    opened = seconds(lambda: Store.open(path).close(), 20)

    draw = np.random.default_rng(3)
    picked = [[int(i) for i in draw.integers(0, size, ROUTES)] for _ in range(2_000)]
    questions = [[_id(kind, i) for i in row] for row in picked]
    block = codes(min(BATCH, size))
    for row, question in list(zip(picked, questions, strict=True))[:100]:
        found = store.routes(question, kind="code")
        assert np.abs(found - block[np.array(row) % len(block)]).max() < 0.06, "not the codes that went in"
    taken = []
    for question in questions * 2:
        start = time.perf_counter()
        store.routes(question)
        taken.append(time.perf_counter() - start)
    taken = sorted(taken[len(questions) :])  # the first round has read their pages
    info = store.info()
    bytes_of = {p.role: p.bytes / size for p in info.parts}
    return {
        "first_open_ms": first_open * 1e3,
        "open_ms": median(opened) * 1e3,
        "open_resident_mb": resident / 1e6,
        "routes_us": median(taken) * 1e6,
        "routes_us_99": taken[len(taken) * 99 // 100] * 1e6,
        "bytes_per_document": info.bytes_per_document,
        "route_bytes_per_document": bytes_of["routes"],
        "id_bytes_per_document": bytes_of["ids"],
        "constant_bytes": sum(p.bytes for p in info.parts if p.role not in ("routes", "ids")),
        "disk_bytes": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        "load": os.getloadavg()[0],
    }


def _id(kind: str, number: int) -> int | str:
    one = ids(kind, number, 1)[0]
    return int(one) if kind in NUMBERS else one.decode()


if __name__ == "__main__":
    main()
