"""Keyed reads of routes, and their size, against what people use for that.

    python benches/store_peers.py --json benches/results/store_peers.json
    python benches/store_peers.py --quick

The same codes (64 bytes a document, ids ``wiki-%09d``) in a polyprag store, LMDB, SQLite, a safetensors
file, a numpy memmap, and one LoRA file a document (the way of PRAG; a thousand of them, and its size is
counted for all). Ten random ids at a time, warm, one thread:

(a) the bytes of the code, as they are kept;
(b) the weights w: peers decode the same codes with numpy (float32: scales, decoder, normalised sigmoid).

Outputs are compared. safetensors and memmap know no ids: they are given row numbers, and an array of the
ids beside them counts for their size. Experts and decoder count for none: every way needs them. Needs
lmdb and safetensors; a peer that is not installed is left out, and said so.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import CODE, EXPERTS, MODULES, RANK, arguments, create, in_child, median, report, spec
from polyprag import Store
from store_scale import ids as make_ids

Code = NDArray[np.uint8]
Read = Callable[[Sequence[int], Sequence[str]], Code]
AT_ONCE = 10
LORA_FILES = 1_000


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        results, ratios = measure(Path(sys.argv[2]), *map(int, sys.argv[3:]))
        print(json.dumps({"results": results, "ratios": ratios}))
        return
    parser = arguments(__doc__)
    parser.add_argument("--documents", type=int)
    options = parser.parse_args()
    n = options.documents or (100_000 if options.quick else 1_000_000)
    rounds = 300 if options.quick else 3_000
    work = Path(tempfile.mkdtemp(prefix="polyprag-peers-", dir=options.work))
    try:
        report(options.json, **in_child(__file__, work, n, rounds))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def measure(work: Path, n: int, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    names = make_ids("wiki", 0, n)
    keys = [name.decode() for name in names]
    codes = np.random.default_rng(7).standard_normal((n, CODE), dtype=np.float32).clip(-4, 4)
    codes[0], codes[1] = -4, 4  # one set of scales for all, which the peers' decoder below expects
    with create(work / "store", spec("string")) as writer:
        writer.add_arrays(names, codes)
    store = Store.open(work / "store")
    raw = np.concatenate([store.records(keys[i : i + 65_536]) for i in range(0, n, 65_536)])

    readers: dict[str, tuple[Read, int]] = {"polyprag": (lambda _, k: store.records(k), _routes_bytes(store))}
    for name, make in PEERS.items():
        try:
            readers[name] = make(work, keys, raw)
        except ImportError as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)

    rows = np.random.default_rng(3).integers(0, n, (rounds, AT_ONCE)).tolist()
    questions = [(row, [keys[i] for i in row]) for row in rows]
    decode = _decoder(store, keys)
    results = []
    for name, (read, size) in readers.items():
        weights: Read = (
            (lambda _, k: store.routes(k))
            if name == "polyprag"
            else (lambda r, k, read=read: decode(read(r, k)))  # type: ignore[misc]
        )
        for row, asked in questions[:50]:
            assert np.array_equal(read(row, asked), raw[row]), name
            assert np.allclose(weights(row, asked), store.routes(asked), atol=1e-5), name
        results.append(
            {
                "store": name,
                "documents": n,
                "bytes": size,
                "bytes_per_document": size / n,
                "raw_us": _time(read, questions) * 1e6,
                "weights_us": _time(weights, questions) * 1e6,
            }
        )
        print(json.dumps(results[-1]), file=sys.stderr)
    results.append(_lora(work, n))
    ours, ratios = results[0], {}
    for row in results[1:]:
        for what in ("raw_us", "weights_us", "bytes_per_document"):
            if what in row:
                ratios[f"{what}: {row['store']} to polyprag"] = row[what] / ours[what]
    return results, ratios


def _time(read: Read, questions: list[tuple[list[int], list[str]]]) -> float:
    """Seconds of one read, the median of the second round."""
    taken = []
    for row, keys in questions * 2:
        start = time.perf_counter()
        read(row, keys)
        taken.append(time.perf_counter() - start)
    return median(sorted(taken[len(questions) :]))


def _bytes(path: Path) -> int:
    return (
        sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        if path.is_dir()
        else path.stat().st_size
    )


def _routes_bytes(store: Store) -> int:
    return sum(p.bytes for p in store.info().parts if p.role not in ("experts", "decoder"))


def _decoder(store: Store, keys: list[str]) -> Callable[[Code], NDArray[np.float32]]:
    """w of codes as numpy does it: what a user of any other store would write."""
    assert store.decoder is not None
    v, b = (np.array(x) for x in store.decoder)
    level = store.records(keys[:1024]).view(np.int8).astype(np.float32)
    code = store.routes(keys[:1024], kind="code")
    # The scales, from what the store makes of the levels.
    scale = np.empty(CODE, dtype=np.float32)
    centre = np.empty(CODE, dtype=np.float32)
    for column in range(CODE):
        scale[column], centre[column] = np.polyfit(level[:, column], code[:, column], 1)

    def decode(records: Code) -> NDArray[np.float32]:
        z = (records.view(np.int8) * scale + centre) @ v.T + b
        s = 1.0 / (1.0 + np.exp(-z.reshape(len(z), -1, EXPERTS)))
        return s / s.sum(axis=-1, keepdims=True)

    return decode


def _lmdb(work: Path, keys: list[str], raw: Code) -> tuple[Read, int]:
    import lmdb

    path = work / "lmdb"
    environment = lmdb.open(str(path), map_size=64 << 30, readahead=False)
    with environment.begin(write=True) as transaction, transaction.cursor() as cursor:
        pairs = ((key.encode(), row.tobytes()) for key, row in zip(keys, raw, strict=True))
        cursor.putmulti(pairs, append=True)
    reader = environment.begin(buffers=True)

    def read(_: Sequence[int], asked: Sequence[str]) -> Code:
        return np.frombuffer(b"".join(reader.get(key.encode()) for key in asked), np.uint8).reshape(-1, CODE)

    return read, _bytes(path / "data.mdb")


def _sqlite(work: Path, keys: list[str], raw: Code) -> tuple[Read, int]:
    path = work / "sqlite.db"
    connection = sqlite3.connect(path)
    connection.execute("create table route (id text primary key, code blob) without rowid")
    connection.executemany(
        "insert into route values (?, ?)", ((k, row.tobytes()) for k, row in zip(keys, raw, strict=True))
    )
    connection.commit()
    connection.execute("pragma mmap_size = 68719476736")
    query = "select id, code from route where id in (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"

    def read(_: Sequence[int], asked: Sequence[str]) -> Code:
        found = dict(connection.execute(query, asked))
        return np.frombuffer(b"".join(found[key] for key in asked), np.uint8).reshape(-1, CODE)

    return read, _bytes(path)


def _safetensors(work: Path, keys: list[str], raw: Code) -> tuple[Read, int]:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    path = work / "codes.safetensors"
    save_file({"codes": raw}, path)
    part = safe_open(path, framework="numpy").__enter__().get_slice("codes")

    def read(rows: Sequence[int], _: Sequence[str]) -> Code:
        return np.concatenate([part[row : row + 1] for row in rows])

    return read, _bytes(path) + _ids_bytes(work, keys)


def _memmap(work: Path, keys: list[str], raw: Code) -> tuple[Read, int]:
    path = work / "codes.npy"
    np.save(path, raw)
    codes = np.load(path, mmap_mode="r")
    return (lambda rows, _: np.asarray(codes[rows])), _bytes(path) + _ids_bytes(work, keys)


def _ids_bytes(work: Path, keys: list[str]) -> int:
    path = work / "ids.npy"
    np.save(path, np.array(keys, dtype="S"))
    return _bytes(path)


PEERS: dict[str, Callable[[Path, list[str], Code], tuple[Read, int]]] = {
    "lmdb": _lmdb,
    "sqlite": _sqlite,
    "safetensors (by row)": _safetensors,
    "numpy memmap (by row)": _memmap,
}


def _lora(work: Path, n: int) -> dict[str, Any]:
    """One LoRA of the same rank a document, float16, each read whole: ten of them a question."""
    from safetensors.numpy import load_file, save_file

    folder = work / "lora"
    folder.mkdir()
    draw = np.random.default_rng(0)
    one = {}
    for m in MODULES:
        one[f"{m.name}.A"] = draw.standard_normal((RANK, m.in_features), dtype=np.float32).astype(np.float16)
        one[f"{m.name}.B"] = draw.standard_normal((m.out_features, RANK), dtype=np.float32).astype(np.float16)
    for i in range(LORA_FILES):
        save_file(one, folder / f"{i}.safetensors")
    rows = np.random.default_rng(3).integers(0, LORA_FILES, (100, AT_ONCE)).tolist()
    read: Read = lambda row, _: [load_file(folder / f"{i}.safetensors") for i in row]  # type: ignore[return-value] # noqa: E731
    size = _bytes(folder) / LORA_FILES
    taken = _time(read, [(row, []) for row in rows])
    return {
        "store": f"one LoRA a document ({LORA_FILES:,} files)",
        "documents": n,
        "bytes": size * n,
        "bytes_per_document": size,
        "raw_us": taken * 1e6,
        "weights_us": taken * 1e6,
    }


if __name__ == "__main__":
    main()
