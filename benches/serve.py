"""`polyprag serve` under load: is an answer lost or mixed up, how long does one take, does memory grow?

    python benches/serve.py --json benches/results/serve.json              (a random model of two layers)
    python benches/serve.py --small --json benches/results/serve.json      (the small model)
    python benches/serve.py --quick

The server is a process of its own; clients are threads of this one. Requests are drawn from a pool in
which every one has its own question and documents: found by BM25 or given, with their texts in the prompt
or not, one choice or several, greedy or drawn by a seed, with stop strings, short and long. Its answer was
made beforehand, alone, in float32: by the engine, or token by token without a cache where it is drawn. Then
clients ask, some for streams, and some hang up in the middle. Counted are answers that

- are lost: no answer, a broken one, another status than 200 (429 is asked again, as clients do);
- are mixed up: another text, reason, number of tokens or document than alone.

The same requests one by one, by one client, are what throughput is compared with. Client and server share the
machine. ``--small`` needs the package of the small model.
"""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common import arguments, kept, median, memory, report
from engine import make_store
from polyprag import Engine
from polyprag.generation import GenerationSettings, Spent
from polyprag.models import BaseModel, load_base_model, passage_text, question_prompt
from polyprag.serving.decode import Row, Sampling

PATH, NAME = "/v1/chat/completions", "mills"
DOCUMENTS = 500
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass
class Request:
    """A body, and what the server has to make of it: for each choice (text, reason), and all in all."""

    body: dict[str, Any]
    choices: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    documents: list[int] = field(default_factory=list)


@dataclass
class Tally:
    """What became of the requests."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0
    count: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--seconds", type=float, help="how long the load lasts; default: 300, or 10")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--small", action="store_true", help="the small model instead of a random one")
    options = parser.parse_args()
    part = "small model" if options.small else "random model"
    seconds = options.seconds or (10 if options.quick else 300)
    with tempfile.TemporaryDirectory(prefix="polyprag-serve-", dir=options.work) as folder:
        row, ratio = measure(Path(folder), options.small, seconds, options.clients, options.quick)
    before, ratios = kept(options.json, [part])
    ratios[f"{part}: tokens a second under load over one by one"] = ratio
    report(options.json, [*before, {"part": part, **row}], ratios)
    if row["lost"] or row["mixed_up"] or row["left_behind"]:
        raise SystemExit(1)


def measure(
    work: Path, small: bool, seconds: float, clients: int, quick: bool
) -> tuple[dict[str, Any], float]:
    base, folder = (load_base_model(dtype="fp32", device="cpu"), None) if small else random_model(work)
    names = invented(DOCUMENTS)
    passages = [(i, f"Mill {n}", f"The {n} mill stands in {m}.") for i, (n, m) in enumerate(names)]
    store = make_store(work / f"{NAME}.polyprag", base, 0, passages, strength=20 if small else 300)
    draw = random.Random(0)
    count = (6 if small else 40) if quick else (48 if small else 160)
    with Engine.open(store, base) as engine:
        pool = [made(engine, names, draw, number, small) for number in range(count)]
    tell(f"{count} requests answered alone, {len({c for r in pool for c in r.choices})} different answers")
    with serving(store, folder) as (port, process):
        one_by_one = Tally()
        ask_for(port, pool, min(60.0, seconds / 5), one_by_one, random.Random(1), hang_up=0.0)
        alone = one_by_one.tokens / sum(one_by_one.seconds)
        tell(f"one by one: {alone:.1f} tokens a second")
        tallies = [Tally() for _ in range(clients)]
        resident: list[float] = []
        started = time.perf_counter()
        threads = [
            threading.Thread(target=ask_for, args=(port, pool, seconds, tally, random.Random(100 + n), 0.15))
            for n, tally in enumerate(tallies)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            resident.append(memory("VmRSS", process.pid) / 1e6)
            time.sleep(0.5)
        took = time.perf_counter() - started
        left = left_behind(port)
        metrics = get(port, "/metrics")
        process.send_signal(signal.SIGTERM)
        exit_code = process.wait(60)
    counts: Counter[str] = sum((tally.count for tally in (*tallies, one_by_one)), Counter())
    whole, first = (sorted(s for t in tallies for s in getattr(t, name)) for name in ("seconds", "first"))
    for line in [line for tally in tallies for line in tally.wrong][:5]:
        tell(line)
    tokens = sum(tally.tokens for tally in tallies)
    fifth = max(1, len(resident) // 5)
    row = {
        "seconds": round(took, 1),
        "clients": clients,
        "pool": count,
        "requests": sum(counts[name] for name in ("right", "lost", "mixed up", "hung up")),
        "answers": counts["right"],
        "choices": counts["choices"],
        "streamed": counts["streamed"],
        "hung_up": counts["hung up"],
        "asked_again_after_429": counts["refused"],
        "lost": counts["lost"],
        "mixed_up": counts["mixed up"],
        "left_behind": left,
        "given_up_by_server": int(value(metrics, "polyprag_given_up_total")),
        "p50_ms": round(1e3 * median(whole), 1),
        "p95_ms": round(1e3 * whole[len(whole) * 95 // 100], 1),
        "first_text_p50_ms": round(1e3 * median(first), 1),
        "first_text_p95_ms": round(1e3 * first[len(first) * 95 // 100], 1),
        "requests_a_second": round(sum(len(tally.seconds) for tally in tallies) / took, 2),
        "tokens_a_second": round(tokens / took, 1),
        "one_by_one_tokens_a_second": round(alone, 1),
        "one_by_one_p50_ms": round(1e3 * median(sorted(one_by_one.seconds)), 1),
        "rows_a_step": round(
            value(metrics, "polyprag_batch_rows_sum") / value(metrics, "polyprag_batch_rows_count"), 2
        ),
        "resident_mb": round(median(sorted(resident[-fifth:])), 1),
        "resident_growth_mb": round(
            median(sorted(resident[-fifth:])) - median(sorted(resident[fifth : 2 * fifth] or resident)), 1
        ),
        "exit_code": exit_code,
    }
    return row, round(tokens / took / alone, 3)


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- what is asked -------------------------------------------------------------------------------------


def random_model(work: Path) -> tuple[BaseModel, Path]:
    """That of the tests, which reads characters; and its folder."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
    from conftest import make_model, make_tokenizer

    base = BaseModel(make_model(), make_tokenizer(), "random")
    folder = work / "model"
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return base, folder


def invented(count: int) -> list[tuple[str, str]]:
    """Names and places that are in no other document."""
    draw = random.Random(2)
    words: set[str] = set()
    while len(words) < 2 * count:
        words.add("".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(3)))
    found = sorted(words)
    draw.shuffle(found)
    return list(zip(found[:count], found[count:], strict=True))


def made(
    engine: Engine, names: list[tuple[str, str]], draw: random.Random, number: int, small: bool
) -> Request:
    """A request of the kind that its number says, and its answer alone."""
    (name, place), (other, _) = draw.sample(names, 2)
    question = draw.choice(
        [f"Where is the {name} mill?", f"Is {place} far from {other}?", f"Who saw {name}?"]
    )
    limit = draw.randrange(4, 25 if small else 60)
    body: dict[str, Any] = {"messages": [{"role": "user", "content": question}], "max_tokens": limit}
    own: dict[str, Any] = {}
    kind = number % 8
    if kind == 1:
        own = {"k": 3, "rule": "score", "temperature": 0.5}
    elif kind == 2:
        own = {"documents": draw.sample(range(DOCUMENTS), 2)}
    elif kind == 3:
        own = {"documents": [draw.randrange(DOCUMENTS)], "combine": True}
    elif kind in (4, 5):
        body |= {"temperature": 0.9, "top_p": 0.9 if kind == 4 else 1.0, "seed": draw.getrandbits(62)}
        body["n"] = 3 if kind == 4 else 1
    elif kind == 6:
        body["stop"] = draw.sample(["a", "e", ". ", "The"], 2)
    elif kind == 7:
        body |= {"max_tokens": 40 if small else 120, "stop": "\x7f"}
    if own:
        body["polyprag"] = own
    return answered_alone(engine, Request({"model": NAME, **body}), question)


def answered_alone(engine: Engine, asked: Request, question: str) -> Request:
    body = asked.body
    own = body.get("polyprag", {})
    combination = engine.store.spec.combination
    if "documents" in own:
        asked.documents = own["documents"]
        route: Any = engine.store.combined_route(asked.documents)
    else:
        hits = engine.store.search(question, own.get("k", combination.k))
        asked.documents = [int(hit.id) for hit in hits]
        rule, heat = own.get("rule", combination.rule), own.get("temperature", combination.temperature)
        route, _ = engine.combine(hits, rule, heat)
    passages = []
    if own.get("combine"):
        documents = engine.store.documents(asked.documents[:1])
        passages = [passage_text(d.title, d.text or "") for d in documents]
    prompt, limit = question_prompt(question, passages), body["max_tokens"]
    stop = body.get("stop", "\n")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "seed" in body:
        ids = engine.base.tokenizer(prompt).input_ids
        for number in range(body["n"]):
            sampling = Sampling(body["temperature"], body["top_p"], body["seed"] + number)
            row = Row(ids=ids, route=route, limit=limit, stop=stops, sampling=sampling)
            drawn(engine, row)
            asked.choices.append((row.text, str(row.finish)))
            asked.tokens += len(row.new)
        return asked
    spent: dict[int, Spent] = {}
    settings = GenerationSettings(max_new_tokens=limit, stop=stops)
    (text,) = engine.generate([prompt], [route], settings, spent=spent)
    asked.choices = [(text.rstrip(), "stop" if spent[0].ended else "length")]
    asked.tokens = spent[0].new_tokens
    return asked


@torch.no_grad()
def drawn(engine: Engine, row: Row) -> None:
    """Token by token, the whole text anew for each."""
    end = engine.base.model.generation_config.eos_token_id
    route = torch.from_numpy(row.route).unsqueeze(0)
    while row.finish is None:
        with engine.routed.route(route):
            logits = engine.base.model(torch.tensor([row.ids + row.new]), use_cache=False).logits[0, -1]
        row.take(row.choose(logits), engine.base.tokenizer, frozenset({end}))


# --- the server ----------------------------------------------------------------------------------------


@contextmanager
def serving(store: Path, model: Path | None) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "polyprag", "serve", str(store), "--port", "0", "--log-level", "warning"]
    command += ["--device", "cpu", "--dtype", "fp32", *([] if model is None else ["--model", str(model)])]
    environment = {name: value for name, value in os.environ.items() if name != "POLYPRAG_API_KEY"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        found = re.search(r":(\d+)/v1$", line.strip())
        if found is None:
            raise SystemExit(f"the server did not start: {line!r}")
        yield int(found[1]), process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def value(metrics: str, name: str) -> float:
    lines = [line for line in metrics.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].rsplit(" ", 1)[1]) if lines else 0.0


def left_behind(port: int) -> int:
    """Rows that the server still has once nobody asks any more."""
    for _ in range(300):
        health = json.loads(get(port, "/health"))
        if not health["running"] + health["waiting"]:
            return 0
        time.sleep(0.1)
    return int(health["running"] + health["waiting"])


# --- clients -------------------------------------------------------------------------------------------


class HungUp(Exception):
    """By this client."""


def ask_for(
    port: int, pool: list[Request], seconds: float, tally: Tally, draw: random.Random, hang_up: float
) -> None:
    """One client: ask from the pool, one request after the other, until time is up."""
    until = time.perf_counter() + seconds
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=180)
    while time.perf_counter() < until:
        asked = draw.choice(pool)
        stream, leave = draw.random() < 0.5, draw.random() < hang_up
        try:
            reply = ask(connection, asked, stream, tally, draw.random() if leave else None)
        except HungUp:
            connection.close()
            tally.count["hung up"] += 1
            continue
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            connection.close()
            tally.count["lost"] += 1
            tally.wrong.append(f"lost: {type(error).__name__}: {error} of {asked.body}")
            continue
        expected = (asked.choices, asked.tokens, asked.documents)
        if reply == expected:
            tally.count["right"] += 1
            tally.count["choices"] += len(asked.choices)
            tally.count["streamed"] += stream
            tally.tokens += asked.tokens
        else:
            whose = [other.body for other in pool if other.choices == reply[0]]
            tally.count["mixed up"] += 1
            tally.wrong.append(f"mixed up: {reply} instead of {expected} of {asked.body}; it is of {whose}")
    connection.close()


def ask(
    connection: http.client.HTTPConnection,
    asked: Request,
    stream: bool,
    tally: Tally,
    leave: float | None,
) -> tuple[list[tuple[str, str]], int, list[int]]:
    """The answer in the form of what is expected. ``leave``: hang up, sooner or later (0 to 1)."""
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    content = json.dumps({**asked.body, **more}).encode()
    while True:
        began = time.perf_counter()
        connection.request("POST", PATH, content, {"Content-Type": "application/json"})
        if leave is not None and not stream:
            time.sleep(0.1 * leave)
            raise HungUp
        response = connection.getresponse()
        if response.status != 429:
            break
        tally.count["refused"] += 1
        wait = float(response.headers["Retry-After"])
        response.read()
        time.sleep(min(wait, 1.0))
    if response.status != 200:
        raise ValueError(f"{response.status}: {response.read()[:300]!r}")
    events = read_events(response) if stream else iter([json.loads(response.read())])
    texts, reasons = [""] * len(asked.choices), [""] * len(asked.choices)
    usage, documents = 0, None
    for number, event in enumerate(events):
        if "error" in event:
            raise ValueError(str(event))
        for choice in event["choices"]:
            said = choice["delta" if stream else "message"].get("content") or ""
            if said and stream and not any(texts):
                tally.first.append(time.perf_counter() - began)
            texts[choice["index"]] += said
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
        if event.get("usage"):
            usage = event["usage"]["completion_tokens"]
        if documents is None and "polyprag" in event:
            documents = [document["id"] for document in event["polyprag"]["documents"]]
        if leave is not None and number >= 6 * leave:
            raise HungUp
    tally.seconds.append(time.perf_counter() - began)
    return list(zip(texts, reasons, strict=True)), usage, documents or []


def read_events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The server-sent events of a stream, which has to come to its end."""
    while line := response.readline():
        data = line.decode().strip().removeprefix("data: ")
        if data == "[DONE]":
            response.read()
            return
        if data:
            yield json.loads(data)
    raise ValueError("the stream broke off")


if __name__ == "__main__":
    main()
