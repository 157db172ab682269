"""Codes of many documents and their optimiser's state in files: time and memory of a step, by corpus size.

    python benches/rows.py --json benches/results/rows.json

Every row is really on disk (with --quick up to a million documents, else 10 million: 7.7 GB). A step reads
and updates the rows of 8 documents drawn from all, as training does; a checkpoint is made every 500 steps.
Memory is what the process has beyond files (RssAnon), under a limit of 2 GB on its data; the growth tells it
without torch. The order of the samples, which training keeps in memory, is not part of this.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import CODE, arguments, in_child, median, memory, report
from polyprag.rows import FileRows, Start, record

DOCUMENTS_A_STEP = 8
STEPS = 2_000
CHECKPOINT = 500
LIMIT = 2 << 30


def main() -> None:
    if "--child" in sys.argv:
        place = sys.argv.index("--child")
        print(json.dumps(child(Path(sys.argv[place + 1]), int(sys.argv[place + 2]))))
        return
    given = arguments(__doc__).parse_args()
    sizes = [10_000, 100_000, 1_000_000] if given.quick else [10_000, 1_000_000, 10_000_000]
    results = []
    for documents in sizes:
        work = Path(tempfile.mkdtemp(prefix="polyprag-rows-", dir=given.work))
        try:
            results.append(in_child(__file__, work, documents))
        finally:
            shutil.rmtree(work)
    first, last = results[0], results[-1]
    ratios = {
        f"step at {last['documents']:,} over {first['documents']:,}": round(
            last["step_microseconds"] / first["step_microseconds"], 2
        )
    }
    report(given.json, results, ratios)


def child(work: Path, documents: int) -> dict[str, Any]:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    torch.set_num_threads(1)
    rows = FileRows(work, documents, CODE, Start("normal", 0), key=bytes(16))
    rows.reset()
    fill(work / "rows-0-of-1.bin", documents)
    before = memory("RssAnon")
    draw = np.random.default_rng(0)
    steps, checkpoints = [], []
    for step in range(1, STEPS + 1):
        met = np.unique(draw.integers(0, documents, DOCUMENTS_A_STEP))
        gradients = torch.ones(len(met), CODE)
        started = time.perf_counter()
        rows.read(met)
        rows.update(met, gradients, 0.1)
        steps.append(time.perf_counter() - started)
        if step % CHECKPOINT == 0 or rows.full:
            started = time.perf_counter()
            rows.save(step)
            rows.saved(step)
            checkpoints.append(time.perf_counter() - started)
    return {
        "documents": documents,
        "bytes_on_disk": (work / "rows-0-of-1.bin").stat().st_blocks * 512,
        "step_microseconds": round(median(sorted(steps)) * 1e6, 1),
        "checkpoint_milliseconds": round(median(sorted(checkpoints)) * 1e3, 1),
        "grown_by_mb": round((memory("RssAnon") - before) / 1e6, 1),
        "anonymous_mb": round(memory("RssAnon") / 1e6, 1),
    }


def fill(path: Path, documents: int) -> None:
    """Give every row its bytes: as if each document had been met once."""
    block = np.zeros(65_536, dtype=record(CODE))
    block["value"] = 0.5
    block["steps"] = 1
    with path.open("r+b") as file:
        file.seek(16)
        for begin in range(0, documents, len(block)):
            file.write(block[: documents - begin].tobytes())
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
