"""What the benches share: the machine they ran on, quantiles, a store of the usual shape, the report."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from polyprag import Module, Store, StoreSpec, Writer
from polyprag import __version__ as version
from polyprag.evaluation.memory import cuda_in_use

#: PRAG's best on 100 documents of PopQA: 0.001 has F1 .520, 0.003 .613, 0.01 .490 (docs/benchmarks.md).
PRAG_RATE = "train.lora_lr=0.003"
CODE = 64
EXPERTS = 16
RANK = 2
#: SmolLM2-135M-Instruct: 30 layers with three adapted modules each, every one a group of its own.
WIDTHS = {"gate_proj": (576, 1536), "up_proj": (576, 1536), "down_proj": (1536, 576)}
MODULES = [
    Module(f"model.layers.{layer}.mlp.{name}", a, b, layer * len(WIDTHS) + group)
    for layer in range(30)
    for group, (name, (a, b)) in enumerate(WIDTHS.items())
]


def spec(id_type: str = "u64", codec: str = f"code({CODE})") -> StoreSpec:
    return StoreSpec(
        modules=MODULES,
        experts=EXPERTS,
        rank=RANK,
        alpha=32.0,
        codec=codec,
        id_type=id_type,  # type: ignore[arg-type]
    )


def create(path: Path, shape: StoreSpec, seed: int = 0) -> Writer:
    """A new store with generated experts (float16) and decoder."""
    draw = np.random.default_rng(seed)
    experts = {}
    for m in shape.modules:
        for end, size in (
            ("A", (EXPERTS, RANK, m.in_features)),
            ("B", (m.out_features, EXPERTS, RANK)),
        ):
            experts[f"{m.name}.{end}"] = draw.standard_normal(size, dtype=np.float32).astype(np.float16)
    logits = shape.groups * EXPERTS
    decoder = (
        draw.standard_normal((logits, CODE), dtype=np.float32) / 8,
        draw.standard_normal(logits, dtype=np.float32),
    )
    return Store.create(path, shape, experts, decoder if shape.codec.startswith("code") else None)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small form, in under a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--work", type=Path, help="a folder with room for what is built")
    return parser


def in_child(script: str, *words: object) -> dict[str, Any]:
    """Run a part of a bench in a process of its own, with one thread for numpy; its last line is its JSON."""
    command = [sys.executable, script, "--child", *map(str, words)]
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | threads)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory(field: str, process: int | str = "self") -> int:
    """A line of /proc/PROCESS/status in bytes: VmHWM is the peak, VmRSS what is resident now."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/{process}/status has no {field}: these benches need Linux")


def seconds(work: Callable[[], object], rounds: int) -> list[float]:
    """Wall time of each of some rounds, shortest first."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return sorted(taken)


def wait() -> None:
    """Until the GPU is done, if one is at work: it works after it was told."""
    cuda = cuda_in_use()
    if cuda is not None:
        cuda.synchronize()


def median(sorted_values: list[float]) -> float:
    return sorted_values[len(sorted_values) // 2]


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")]
    cuda = cuda_in_use()
    return {
        "polyprag": version,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        **({} if cuda is None else {"device": cuda.get_device_name()}),
    }


def kept(path: Path | None, parts: Collection[str]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows and ratios of other parts that the file has: a bench of parts may be run in pieces.

    A ratio's name begins with that of its part.
    """
    if path is None or not path.exists():
        return [], {}
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in found["results"] if row["part"] not in parts]
    return rows, {k: v for k, v in found["ratios"].items() if not k.startswith(tuple(parts))}


def report(path: Path | None, results: list[dict[str, Any]], ratios: dict[str, float]) -> None:
    figures = {"machine": machine(), "results": results, "ratios": ratios}
    text = json.dumps(figures, indent=1) + "\n"
    print(text, end="")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
