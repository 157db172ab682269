"""What answering by routes costs: against PRAG's way with PEFT, PEFT's Poly, and passages in the prompt.

    pip install peft
    python benches/engine.py --json benches/results/engine-upper.json      (an hour on two cores)
    python benches/engine.py --from-depth 0 --json benches/results/engine.json
    python benches/engine.py --quick

One base model, one machine, in these parts (``--parts`` chooses; a part that is run again takes the place
of its figures in the file):

- overhead: from retrieved ids to a model that is ready to generate, k = 3, for 1 to 1,000 questions: the
  combined route and its gates, against PRAG's published way: three LoRAs loaded from disk, ``cat``, unloaded;
- tokens: a step of decoding and a prompt, under one route a row (gates), one merged route, PEFT's Poly with
  the same K and r, and PRAG's combined LoRA, each beside the bare model in every round;
- compiled: the same step with a static cache and torch.compile, bare and with gates (not with --quick);
- rag: k = 3 passages in the prompt against the route of the same documents: time to the first token, time of
  all tokens, peak memory; each in a process of its own;
- throughput: whole answers by batches, every row under its own route;
- retrieve: from a question's text to the combined route of its three best passages, on one thread;
- growth: the same by number of documents in the store;
- profile: which operations a step of decoding under gates spends its time in.

Experts, and the LoRAs of others, are in the MLPs of the blocks from ``--from-depth`` on: the upper half, as
the recipe has them, or all. Routes, codes and experts are generated: nothing here depends on their values.
Passages and questions are real, from POLYPRAG_DATA (default ../shared/data); parts that need them are left
out where they are absent.
"""

from __future__ import annotations

import copy
import json
import os
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bm25 import DATA, read_passages, read_questions
from common import EXPERTS, RANK, arguments, in_child, kept, median, memory, report, seconds, wait
from polyprag import Document, Engine, Module, Store, StoreSpec
from polyprag.engine import attach_store
from polyprag.generation import GenerationSettings, Spent
from polyprag.layers import find_targets
from polyprag.models import BaseModel, fingerprint, load_base_model, passage_text, question_prompt
from polyprag.training import TrainSettings

K = 3
CODE = 128
DEPTH = TrainSettings().from_depth
CONTEXT = 64  # tokens before the steps of decoding
PARTS = ("overhead", "tokens", "compiled", "rag", "throughput", "retrieve", "growth", "profile")
SETTING = "setting"


class Bench:
    """What the parts share: the model, a store, what was found."""

    def __init__(self, options: Any, work: Path) -> None:
        self.quick: bool = options.quick
        self.json: Path | None = options.json
        self.most: int = 10 if options.quick else options.questions
        self.model: str | None = options.model
        self.work = work
        self.results: list[dict[str, Any]] = []
        self.ratios: dict[str, float] = {}
        self.draw = np.random.default_rng(0)
        self.base = load_base_model(options.model)
        self.bare = copy.deepcopy(self.base.model)  # for PEFT, which changes the model that it is given
        real = (options.data / "corpus").is_dir()
        self.passages = read_passages(options.data) if real else []
        self.questions = read_questions(options.data, 400) if real else []
        self.from_depth: float = options.from_depth
        self.path = make_store(
            work / "store", self.base, 10_000, self.passages, from_depth=options.from_depth
        )
        self.setting = {
            "model": self.base.name,
            "dtype": str(self.base.model.dtype),
            "device": str(self.base.device),
            "attention": self.base.model.config._attn_implementation,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "quick": self.quick,
            "from_depth": self.from_depth,
        }

    def note(self, part: str, **row: Any) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        self.results.append({"part": part, **rounded})
        print(json.dumps(self.results[-1]), file=sys.stderr, flush=True)

    def save(self, part: str) -> None:
        """Put what was noted in place of the part's rows in the file: none is lost with what comes later."""
        setting = {"part": SETTING, **self.setting}
        rows, ratios = kept(self.json, [part])
        if any(row["part"] == SETTING and row != setting for row in rows):
            raise SystemExit(f"{self.json} has figures of another setting: name another file")
        rows = [row for row in rows if row["part"] != SETTING] + self.results
        rows.sort(key=lambda row: PARTS.index(row["part"]))
        ratios |= {name: round(ratio, 3) for name, ratio in self.ratios.items()}
        report(self.json, [setting, *rows], ratios)

    def targets(self) -> list[str]:
        """The layers that have experts, by name."""
        return [m.name for m in find_targets(self.bare, from_depth=self.from_depth)]

    def routes(self, rows: int) -> torch.Tensor:
        """Combined routes of three documents each [rows, groups, K], all of them different."""
        with Store.open(self.path) as store:
            found = [store.combined_route(ids(store, self.draw)) for _ in range(rows)]
        return torch.from_numpy(np.stack(found))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        part, *words = sys.argv[2:]
        print(json.dumps({"rag": rag_child, "retrieve": retrieve_child}[part](*words)))
        return
    parser = arguments(__doc__)
    parser.add_argument("--model", help="base model; default: the small one")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder of the shared data")
    parser.add_argument(
        "--questions", type=int, default=1_000, help="PRAG's, of the overhead; default: 1,000"
    )
    parser.add_argument(
        "--from-depth", type=float, default=DEPTH, help="0 is every block, 0.5 (default) the upper half"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all that the form has")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    parts = options.parts or [p for p in PARTS if not (options.quick and p == "compiled")]
    with tempfile.TemporaryDirectory(prefix="polyprag-engine-", dir=options.work) as folder:
        bench = Bench(options, Path(folder))
        for part in parts:
            if part in ("rag", "retrieve") and not bench.passages:
                print(f"{part}: no passages under {options.data}, left out", file=sys.stderr)
                continue
            bench.results, bench.ratios = [], {}
            started, load = time.perf_counter(), os.getloadavg()[0]
            globals()[part](bench)
            bench.note(part, seconds=time.perf_counter() - started, load_before=load)
            bench.save(part)


# --- stores --------------------------------------------------------------------------------------------


def make_store(
    path: Path,
    base: BaseModel,
    documents: int,
    passages: Sequence[tuple[int, str, str]] = (),
    strength: float = 1.0,
    from_depth: float = DEPTH,
) -> Path:
    """A store for the model, with generated experts and codes, and the texts of passages if there are any.

    Its routes change next to nothing in what the model says, unless ``strength`` is much above 1.
    """
    draw = np.random.default_rng(1)
    shapes = find_targets(base.model, from_depth=from_depth)
    modules = [Module(m.name, m.in_features, m.out_features, m.group) for m in shapes]
    spec = StoreSpec(
        modules=modules,
        experts=EXPERTS,
        rank=RANK,
        alpha=32.0,
        codec=f"code({CODE},int4)",
        phi="linear",
        id_type="u64",
        base_model=fingerprint(base),
    )
    experts = {}
    for m in modules:
        a = draw.standard_normal((EXPERTS, RANK, m.in_features), dtype=np.float32) / 30
        experts[f"{m.name}.A"] = a.astype(np.float16)
        b = draw.standard_normal((m.out_features, EXPERTS, RANK), dtype=np.float32) * (strength / 1000)
        experts[f"{m.name}.B"] = b.astype(np.float16)
    logits = spec.groups * EXPERTS
    V = draw.standard_normal((logits, CODE), dtype=np.float32) / CODE**0.5 / EXPERTS
    with Store.create(path, spec, experts, (V, np.zeros(logits, dtype=np.float32))) as writer:
        if passages:
            for at in range(0, len(passages), 10_000):
                some = passages[at : at + 10_000]
                codes = draw.standard_normal((len(some), CODE), dtype=np.float32)
                writer.add([Document(i, text, title) for i, title, text in some], codes)
        else:
            for at in range(0, documents, 100_000):
                n = min(100_000, documents - at)
                codes = draw.standard_normal((n, CODE), dtype=np.float32)
                writer.add_arrays(np.arange(at, at + n, dtype=np.uint64), codes)
    return path


def ids(store: Store, draw: np.random.Generator) -> list[str | int]:
    return [int(i) for i in draw.choice(len(store), K, replace=False)]


# --- overhead ------------------------------------------------------------------------------------------


def overhead(bench: Bench) -> None:
    """From retrieved ids to a model that is ready to generate."""
    counts = (1, 10, 100, 1_000)
    started = time.perf_counter()
    with Engine.open(bench.path, bench.base) as engine:
        bench.note("overhead", system="polyprag", stage="opening, once", ms=1e3 * elapsed(started))
        layer = next(iter(engine.routed.layers.values()))
        like = layer.A.detach()
        asked = [ids(engine.store, bench.draw) for _ in range(max(counts))]
        stages = {"combined route": 0.0, "gates": 0.0}

        def ready(found: Sequence[str | int]) -> None:
            started = time.perf_counter()
            route = engine.store.combined_route(list(found), [0.6, 0.3, 0.1])
            combined = time.perf_counter()
            w = torch.from_numpy(route).unsqueeze(0).to(bench.base.device)
            # What the first layer does for all of them, and for all tokens.
            engine.routed.routes(w).gate(0, 1, like)
            stages["combined route"] += combined - started
            stages["gates"] += time.perf_counter() - combined

        ready(asked[0])
        mine = marks(counts, lambda number: ready(asked[number]))
        whole = sum(stages.values())
        for name, taken in stages.items():
            bench.note("overhead", system="polyprag", stage=name, share=taken / whole)
    with prag_adapters(bench) as load:

        def theirs_ready(number: int) -> None:
            with load(number):
                pass

        theirs = marks([count for count in counts if count <= bench.most], theirs_ready)
    for system, taken in (("polyprag", mine), ("PRAG with PEFT", theirs)):
        for count, whole in taken.items():
            bench.note("overhead", system=system, questions=count, ms_a_question=1e3 * whole / count)
    for count, whole in theirs.items():
        bench.ratios[f"overhead of {count:,} questions, PRAG with PEFT over polyprag"] = whole / mine[count]


def marks(counts: Sequence[int], work: Callable[[int], object]) -> dict[int, float]:
    """Seconds from the beginning until so many questions were worked on."""
    taken = {}
    started = time.perf_counter()
    for number in range(max(counts)):
        work(number)
        if number + 1 in counts:
            taken[number + 1] = elapsed(started)
    return taken


def elapsed(since: float) -> float:
    return time.perf_counter() - since


@contextmanager
def prag_adapters(bench: Bench) -> Iterator[Callable[[int], Any]]:
    """LoRAs on disk, and a way to combine three of them in the model, as PRAG's published code does."""
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = bench.work / "adapters"
    count = 12
    targets = bench.targets()
    for number in range(count):
        config = LoraConfig(
            r=RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False
        )
        made = get_peft_model(bench.bare, config)
        made.save_pretrained(str(folder / str(number)))
        made.unload()

    @contextmanager
    def load(number: int) -> Iterator[Any]:
        paths = [str(folder / str((K * number + i) % count)) for i in range(K)]
        model: Any = PeftModel.from_pretrained(bench.bare, paths[0], adapter_name="0", is_trainable=False)
        for i in range(1, K):
            model.load_adapter(paths[i], adapter_name=str(i))
        model.add_weighted_adapter(
            adapters=[str(i) for i in range(K)],
            weights=[1.0] * K,
            adapter_name="merge",
            combination_type="cat",
        )
        model.set_adapter("merge")
        try:
            yield model
        finally:
            model.delete_adapter("merge")
            model.unload()

    with load(0):
        pass
    yield load


# --- tokens --------------------------------------------------------------------------------------------


@dataclass
class Way:
    """A model, and how it is called. ``prompts``: what reads the prompt, where that is another one."""

    model: Any
    route: Callable[[], Any] = nullcontext
    more: dict[str, Any] = field(default_factory=dict)
    cache: Callable[[], Any] | None = None
    prompts: Any = None


def tokens(bench: Bench) -> None:
    """A step of decoding, and a prompt of CONTEXT tokens a row: bare, gates, merged, Poly, PRAG's LoRA."""
    untouched = copy.deepcopy(bench.base.model)
    for batch, rounds, steps in (
        ((1, 3, 3), (8, 2, 2)) if bench.quick else ((1, 15, 8), (8, 7, 8), (32, 4, 4))
    ):
        with Engine.open(bench.path, bench.base) as engine, other_tuners(bench, batch) as others:
            several = bench.routes(batch).to(bench.base.device)
            merged = engine.routed.merge(several[0])
            ways = {
                "bare": Way(untouched),
                "gates": Way(bench.base.model, partial(engine.routed.route, several)),
                "merged": Way(bench.base.model, partial(engine.routed.route, merged)),
                **others,
            }
            if bench.base.device.type == "cuda":
                other = replace(bench.base, model=copy.deepcopy(untouched))
                by_kernel = attach_store(other, engine.store, kernels="triton")
                ways["gates, by our kernel"] = Way(other.model, partial(by_kernel.route, several))
            take_turns(bench, "tokens", ways, batch, rounds, steps)
    with Engine.open(bench.path, bench.base) as engine:
        found = engine.forms.costs
        bench.note(
            "tokens",
            merge_ms=1e3 * found.merge,
            gates_ms_a_step=1e3 * found.step,
            gates_ms_a_prompt_token=1e3 * found.token,
            break_even_tokens=found.break_even,
        )


def take_turns(bench: Bench, part: str, ways: dict[str, Way], batch: int, rounds: int, steps: int) -> None:
    """Prompts, and steps of decoding after each, of all ways in turn.

    Each is compared with the first one's prompt or step of the same turn, so that what else the machine does
    falls on both.
    """
    prompts: dict[str, list[float]] = {name: [] for name in ways}
    decoded: dict[str, list[float]] = {name: [] for name in ways}
    names, order = list(ways), random.Random(0)
    for number in range(rounds + 1):
        runs = {name: Run(way, batch, steps) for name, way in ways.items()}
        for turn in range(steps + 1):
            order.shuffle(names)  # so that none always finds what the same other one has left in caches
            for name in names:
                taken = runs[name].next()
                if number:  # in the first round all is warmed up
                    (decoded if turn else prompts)[name].append(taken)
    (bare, *_) = ways
    for name in ways:
        over = {}
        for what, times in (("prompt", prompts), ("step", decoded)):
            over[what] = statistics.median(a / b for a, b in zip(times[name], times[bare], strict=True))
        step = statistics.median(decoded[name])
        bench.note(
            part,
            system=name,
            batch=batch,
            step_ms=1e3 * step,
            prompt_ms=1e3 * statistics.median(prompts[name]),
            tokens_a_second=batch / step,
            step_over_bare=over["step"],
            prompt_over_bare=over["prompt"],
            steps=len(decoded[name]),
            prompts=len(prompts[name]),
        )
        if name != bare:
            for what, ratio in over.items():
                bench.ratios[f"{part}: {what} of {name}, batch {batch}, over {bare}"] = ratio


class Run:
    """A prompt of CONTEXT tokens in every row, and then steps of decoding."""

    def __init__(self, way: Way, batch: int, steps: int) -> None:
        from transformers import DynamicCache

        self.way = way
        self.device = next(way.model.parameters()).device
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(100, 1000, (batch, CONTEXT), generator=draw).to(self.device)
        self.cache = DynamicCache(config=way.model.config) if way.cache is None else way.cache()
        self.places = torch.arange(CONTEXT + steps, device=self.device).unsqueeze(0)
        self.begin = 0

    def next(self) -> float:
        """Seconds of the prompt, at the first call, or of a step."""
        model = self.way.model if self.begin or self.way.prompts is None else self.way.prompts
        ids = self.ids[:, : CONTEXT if self.begin == 0 else 1]
        places = self.places[:, self.begin : self.begin + ids.shape[1]]
        self.begin += ids.shape[1]
        with self.way.route():
            started = time.perf_counter()
            model(
                input_ids=ids,
                position_ids=places,
                cache=self.cache,
                use_cache=True,
                logits_to_keep=1,
                **self.way.more,
            )
            wait()
            return time.perf_counter() - started


@contextmanager
def other_tuners(bench: Bench, batch: int) -> Iterator[dict[str, Way]]:
    """PEFT's Poly of the same K and r, and PRAG's combination of three LoRAs."""
    from peft import LoraConfig, PolyConfig, get_peft_model

    targets = bench.targets()
    poly_model = copy.deepcopy(bench.bare)
    config = PolyConfig(
        r=RANK, n_tasks=100, n_skills=EXPERTS, n_splits=1, target_modules=targets, task_type="CAUSAL_LM"
    )
    poly: Any = get_peft_model(poly_model, config).eval()
    lora_config = LoraConfig(r=K * RANK, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    lora: Any = get_peft_model(bench.bare, lora_config).eval()
    try:
        yield {
            "PEFT Poly": Way(poly, more={"task_ids": torch.arange(batch, device=bench.base.device)}),
            "PRAG's LoRA with PEFT": Way(lora),
        }
    finally:
        lora.unload()


def compiled(bench: Bench) -> None:
    """With a static cache, every step one graph: the bare model, and with gates. Prompts are not compiled."""
    from transformers import StaticCache

    untouched: Any = copy.deepcopy(bench.base.model)
    cache = partial(StaticCache, config=untouched.config, max_cache_len=CONTEXT + 16)
    for batch, rounds, steps in ((1, 2, 3),) if bench.quick else ((1, 15, 8), (8, 7, 8)):
        torch.compiler.reset()
        several = bench.routes(batch).to(bench.base.device)
        with Engine.open(bench.path, bench.base) as engine:
            route = partial(engine.routed.route, several)
            bare, gates = (
                torch.compile(model, dynamic=False, fullgraph=True) for model in (untouched, bench.base.model)
            )
            ways = {
                "compiled bare": Way(bare, cache=cache, prompts=untouched),
                "compiled gates": Way(gates, route, cache=cache, prompts=bench.base.model),
                "bare": Way(untouched),
                "gates": Way(bench.base.model, route),
            }
            take_turns(bench, "compiled", ways, batch, rounds, steps)
        bench.save("compiled")  # compiling may take longer than one waits


# --- rag -----------------------------------------------------------------------------------------------


def rag(bench: Bench) -> None:
    """Passages in the prompt against their documents' route, each in a process of its own."""
    count, limit = (4, 8) if bench.quick else (20, 32)
    found = {}
    questions = bench.work / "questions.json"
    questions.write_text(json.dumps(bench.questions[:count]), encoding="utf-8")
    for way in ("route", "passages"):
        found[way] = in_child(__file__, "rag", way, bench.path, questions, limit, bench.model or "")
        bench.note("rag", way=way, questions=count, new_tokens=limit, k=K, **found[way])
    for what in ("first_token_ms", "total_ms", "peak_mb_above_model", "prompt_tokens"):
        if found["route"][what]:
            bench.ratios[f"rag: {what}, passages over route"] = found["passages"][what] / found["route"][what]


def rag_child(way: str, path: str, questions: str, limit: str, model: str) -> dict[str, Any]:
    base = load_base_model(model or None)
    base.model.generation_config.eos_token_id = None  # every answer takes as many tokens
    settings = GenerationSettings(max_new_tokens=int(limit), stop=())
    asked: list[str] = json.loads(Path(questions).read_text(encoding="utf-8"))
    first, total, prompts = [], [], []
    with Engine.open(path, base) as engine:

        def answer(question: str) -> None:
            started = time.perf_counter()
            hits = engine.store.search(question, K)
            if way == "route":
                route, _ = engine.combine(hits, "score", 0.15)
                prompt = question_prompt(question)
            else:
                route = None
                documents = engine.store.documents([hit.id for hit in hits])
                prompt = question_prompt(question, [passage_text(d.title, d.text or "") for d in documents])
            prepared = time.perf_counter() - started
            spent: dict[int, Spent] = {}
            engine.generate([prompt], [route], settings, spent=spent)
            first.append(prepared + spent[0].prefill)
            total.append(time.perf_counter() - started)
            prompts.append(spent[0].prompt_tokens)

        answer(asked[0])
        for times in (first, total, prompts):
            times.clear()
        resident = reset_peak(base)
        for question in asked:
            answer(question)
        peak = peak_memory(base)
    return {
        "first_token_ms": 1e3 * statistics.median(first),
        "total_ms": 1e3 * statistics.median(total),
        "prompt_tokens": statistics.median(prompts),
        "peak_mb": peak / 1e6,
        "peak_mb_above_model": (peak - resident) / 1e6,
    }


def reset_peak(base: BaseModel) -> int:
    """Begin to watch the peak of memory; returns what is in use now, in bytes."""
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return memory("VmRSS")


def peak_memory(base: BaseModel) -> int:
    return int(torch.cuda.max_memory_allocated()) if base.device.type == "cuda" else memory("VmHWM")


# --- throughput ----------------------------------------------------------------------------------------


def throughput(bench: Bench) -> None:
    """Whole calls of the engine, prompt and new tokens, by batch; every row under a route of its own."""
    limit = 8 if bench.quick else 32
    rounds = 1 if bench.quick else 4
    bench.base.model.generation_config.eos_token_id, ends = (
        None,
        bench.base.model.generation_config.eos_token_id,
    )
    asked = bench.questions or [f"Where was number {i} born, and when was that?" for i in range(32)]
    with Engine.open(bench.path, bench.base) as engine:
        for batch in (1, 8, 32):
            settings = GenerationSettings(max_new_tokens=limit, stop=(), batch_size=batch)
            prompts = [question_prompt(q) for q in asked[:batch]]
            several = [route.numpy() for route in bench.routes(batch)]
            taken: dict[str, list[float]] = {}
            for number in range(rounds + 1):
                for name, routes in (("bare", [None] * batch), ("gates", several)):
                    started = time.perf_counter()
                    engine.generate(prompts, routes, settings)
                    if number or bench.quick:
                        taken.setdefault(name, []).append(time.perf_counter() - started)
            for name, times in taken.items():
                middle = statistics.median(times)
                bench.note(
                    "throughput",
                    system=name,
                    batch=batch,
                    tokens_a_second=batch * limit / middle,
                    answers_a_second=batch / middle,
                )
            pairs = zip(taken["gates"], taken["bare"], strict=True)
            bench.ratios[f"throughput: time of gates over bare, batch {batch}"] = statistics.median(
                a / b for a, b in pairs
            )
    bench.base.model.generation_config.eos_token_id = ends


# --- retrieve and route --------------------------------------------------------------------------------


def retrieve(bench: Bench) -> None:
    questions = bench.work / "asked.json"
    questions.write_text(json.dumps(bench.questions), encoding="utf-8")
    found = in_child(__file__, "retrieve", bench.path, questions)
    bench.note("retrieve", documents=len(bench.passages), k=K, **found)


def retrieve_child(path: str, questions: str) -> dict[str, Any]:
    """On one thread: BM25, weights by score, the routes' codes decoded and combined."""
    from polyprag.routing import combination_weights

    asked: list[str] = json.loads(Path(questions).read_text(encoding="utf-8"))
    search, route = [], []
    with Store.open(path) as store:
        for number in range(2):
            for question in asked:
                started = time.perf_counter()
                hits = store.search(question, K)
                found = time.perf_counter()
                if hits:
                    weights = combination_weights([hit.score for hit in hits], "score", 0.15)
                    store.combined_route([hit.id for hit in hits], weights)
                if number:
                    search.append(found - started)
                    route.append(time.perf_counter() - found)
    both = sorted(a + b for a, b in zip(search, route, strict=True))
    return {
        "median_ms": 1e3 * median(both),
        "p95_ms": 1e3 * both[len(both) * 95 // 100],
        "search_median_ms": 1e3 * median(sorted(search)),
        "route_median_ms": 1e3 * median(sorted(route)),
    }


def growth(bench: Bench) -> None:
    """The overhead of a question by the number of documents: codes alone, and real passages with BM25."""
    sizes = (1_000, 100_000) if bench.quick else (1_000, 10_000, 100_000, 1_000_000)
    routes = {}
    for size in sizes:
        path = make_store(bench.work / f"codes-{size}", bench.base, size, from_depth=bench.from_depth)
        with Store.open(path) as store:
            asked = iter([ids(store, bench.draw) for _ in range(500)])
            times = seconds(lambda store=store, asked=asked: store.combined_route(next(asked)), 500)
        routes[size] = median(times)
        bench.note("growth", documents=size, route_us=1e6 * routes[size])
    bench.ratios[f"growth: route, {sizes[-1]:,} documents over {sizes[0]:,}"] = (
        routes[sizes[-1]] / routes[sizes[0]]
    )
    if not bench.passages:
        return
    questions = bench.work / "grown.json"
    questions.write_text(json.dumps(bench.questions[:200]), encoding="utf-8")
    whole = {}
    counts = [1_000, len(bench.passages)] if bench.quick else [1_000, 10_000, len(bench.passages)]
    for size in counts:
        path = make_store(
            bench.work / f"texts-{size}", bench.base, size, bench.passages[:size], from_depth=bench.from_depth
        )
        found = in_child(__file__, "retrieve", path, questions)
        whole[size] = found["median_ms"]
        bench.note("growth", documents=size, bm25=True, **found)
    bench.ratios[f"growth: retrieve and route, {counts[-1]:,} passages over {counts[0]:,}"] = (
        whole[counts[-1]] / whole[counts[0]]
    )


# --- profile -------------------------------------------------------------------------------------------


def profile(bench: Bench) -> None:
    """Self time of the operations of a step, under gates and bare, the largest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with Engine.open(bench.path, bench.base) as engine:
        route = bench.routes(1).to(bench.base.device)
        for name, way in (
            ("bare", Way(bench.base.model)),
            ("gates", Way(bench.base.model, partial(engine.routed.route, route))),
        ):
            run = Run(way, 1, 10)
            run.next()
            run.next()
            with watch(activities=[ProfilerActivity.CPU]) as seen:
                for _ in range(8):
                    run.next()
            events = sorted(seen.key_averages(), key=lambda e: -e.self_cpu_time_total)
            whole = sum(e.self_cpu_time_total for e in events)
            for event in events[:8]:
                bench.note(
                    "profile",
                    system=name,
                    operation=event.key,
                    calls_a_step=event.count / 8,
                    share=event.self_cpu_time_total / whole,
                    us_a_step=event.self_cpu_time_total / 8,
                )


if __name__ == "__main__":
    main()
