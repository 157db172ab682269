"""The server: real HTTP to a tiny model, by OpenAI's own client and by hand, alone and under load."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openai
import pytest
import torch
import uvicorn

import polyprag
import warm
from conftest import make_model, make_tokenizer
from polyprag import Document, Store
from polyprag.combining import strength_beside_passages
from polyprag.engine import Engine
from polyprag.errors import InvalidInput
from polyprag.models import BaseModel
from polyprag.serving import ServeSettings, api_key, create_app
from polyprag.serving.decode import Batch
from polyprag.serving.scheduler import Place, Scheduler, Stopped
from routed import attach

NAMES = ["amber", "birch", "coral", "denim", "ebony", "fjord", "grove", "haven"]
DOCUMENTS = [Document(f"d{i}", f"The {n} mill stands in Ost.", f"Mill {n}") for i, n in enumerate(NAMES)]
QUESTIONS = [f"Where is the {name}?" for name in NAMES]
MakeStore = Callable[..., Path]


@dataclass
class Served:
    """A server in a thread of this process."""

    engine: Engine
    port: int
    key: str = "unused"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.key, **{"max_retries": 0, **options})

    def send(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body of a request that is made by hand."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        connection.request(method, path, content, given)
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        found = {name.lower(): value for name, value in reply.getheaders()}
        return reply.status, found, json.loads(text) if text[:1] == "{" else text

    def health(self) -> dict[str, Any]:
        status, _, body = self.send("GET", "/health")
        assert status == 200
        return dict(body)

    def until(self, what: Callable[[dict[str, Any]], bool]) -> None:
        """Wait until the server says so of itself."""
        for _ in range(600):
            if what(self.health()):
                return
            time.sleep(0.05)
        raise AssertionError(f"it stays at {self.health()}")


@contextmanager
def serving(store: Path, **settings: Any) -> Iterator[Served]:
    base = BaseModel(make_model(), make_tokenizer(), "tiny")
    with Engine.open(store, base) as engine, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(engine, ServeSettings(**{"name": "mills", "poll": 0, **settings}))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield Served(engine, listening.getsockname()[1], settings.get("api_key", "unused"))
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def path(make_store: MakeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight documents, the last of them without a route."""
    return make_store(tmp_path_factory.mktemp("served") / "mills.polyprag", DOCUMENTS, unrouted=1)


@pytest.fixture(scope="module")
def served(path: Path) -> Iterator[Served]:
    with serving(path, max_batch=4, max_tokens=60, max_body=5_000) as found:
        yield found


@pytest.fixture(scope="module")
def alone(path: Path) -> Iterator[Engine]:
    """An engine of its own, which answers one question at a time."""
    with Engine.open(path, BaseModel(make_model(), make_tokenizer(), "tiny")) as engine:
        yield engine


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While this is cleared, rows join batches and no token comes."""
    event, step = threading.Event(), Batch.step
    event.set()

    def waiting(batch: Batch) -> None:
        if event.wait(0.01):
            step(batch)

    monkeypatch.setattr(Batch, "step", waiting)
    yield event
    event.set()


def user(question: str) -> list[Any]:
    return [{"role": "user", "content": question}]


def ask(client: openai.OpenAI, question: str, **options: Any) -> Any:
    return client.chat.completions.create(model="mills", messages=user(question), **options)


def streamed(client: openai.OpenAI, question: str, **options: Any) -> tuple[str, str | None, Any]:
    """The text of a stream, why it ended, and what the first chunk says of documents."""
    text, reason, found = "", None, None
    for chunk in ask(client, question, stream=True, **options):
        found = found or (chunk.model_extra or {}).get("polyprag")
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            reason = chunk.choices[0].finish_reason or reason
    return text, reason, found


# --- answers ------------------------------------------------------------------------------------------------


def test_the_code_of_the_page_runs(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "serve.md").read_text()
    codes = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert codes
    for code in codes:
        code = code.replace("127.0.0.1:8000", f"127.0.0.1:{served.port}").replace('"wiki"', '"mills"')
        exec(compile(code, "serve.md", "exec"), {})  # noqa: S102 - our own page
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_openais_client_gets_the_answers_of_the_engine(served: Served, alone: Engine) -> None:
    client = served.client()
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("mills", "polyprag")
    assert client.models.retrieve("mills").id == "mills"
    for question in (QUESTIONS[0], QUESTIONS[7], "?!", "Where is the zebra, or the amber?"):
        expected = alone.ask(question)
        answer = ask(client, question)
        (choice,) = answer.choices
        assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
        documents = answer.model_extra["polyprag"]["documents"]
        assert [(d["id"], d["title"], d["score"], d["weight"]) for d in documents] == [
            (s.id, s.title, pytest.approx(s.score), pytest.approx(s.weight)) for s in expected.documents
        ]
        text, reason, found = streamed(client, question)
        assert (text, reason, found["documents"]) == (expected.text, choice.finish_reason, documents)
        prompt = f"Question: {question}\nAnswer:"
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens
    assert answer.id != ask(client, question).id
    assert answer.model == "mills"


def test_what_is_asked_for_is_done(served: Served, alone: Engine) -> None:
    client = served.client()
    long = ask(client, QUESTIONS[0], max_tokens=60, stop=["\x7f"]).choices[0]
    assert long.finish_reason == "length"
    assert len(long.message.content) > 40
    part = long.message.content[10:12]
    short = ask(client, QUESTIONS[0], max_completion_tokens=60, stop=part).choices[0]
    assert (short.finish_reason, short.message.content) == (
        "stop",
        long.message.content[: long.message.content.index(part)].rstrip(),
    )
    few = ask(client, QUESTIONS[0], max_tokens=3)
    assert (few.choices[0].finish_reason, few.usage.completion_tokens) == ("length", 3)
    assert long.message.content.startswith(few.choices[0].message.content)

    drawn = {"temperature": 1.5, "top_p": 0.9, "n": 3, "max_tokens": 12}
    one, two, other = (ask(client, QUESTIONS[1], seed=seed, **drawn) for seed in (3, 3, 4))
    texts = [[c.message.content for c in answer.choices] for answer in (one, two, other)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 3
    assert [c.index for c in one.choices] == [0, 1, 2]
    by_choice = ["", "", ""]
    for chunk in ask(
        client, QUESTIONS[1], seed=3, stream=True, stream_options={"include_usage": True}, **drawn
    ):
        for choice in chunk.choices:
            by_choice[choice.index] += choice.delta.content or ""
    assert by_choice == texts[0]
    assert chunk.usage.completion_tokens == one.usage.completion_tokens == 36
    assert (
        ask(client, QUESTIONS[1], temperature=0, top_p=0.1).choices[0].message.content
        == alone.ask(QUESTIONS[1]).text
    )


def test_documents_by_the_field_of_ones_own(served: Served, alone: Engine) -> None:
    client, store = served.client(), alone.store
    question = "Where is the mill?"

    def extended(**field: Any) -> Any:
        return ask(client, question, extra_body={"polyprag": field})

    for field, route, passages in (
        ({"documents": ["d3"]}, store.combined_route(["d3"]), []),
        ({"documents": ["d3", "d5"]}, store.combined_route(["d3", "d5"]), []),
        ({"documents": ["d3", "d5"], "rule": "sum"}, store.combined_route(["d3", "d5"], [1, 1]), []),
        ({"documents": ["d5", "d3"], "rule": "first"}, store.combined_route(["d5"]), []),
        ({"documents": ["d3"], "strength": 0.25}, 0.25 * store.combined_route(["d3"]), []),
        (
            {"documents": ["d3"], "strength": 0.75, "combine": True},
            0.75 * store.combined_route(["d3"]),
            ["Mill denim\nThe denim mill stands in Ost."],
        ),
        (
            {"documents": ["d3", "d5"], "combine": True, "passages": 2},
            strength_beside_passages(store.spec.phi) * store.combined_route(["d3", "d5"]),
            ["Mill denim\nThe denim mill stands in Ost.", "Mill fjord\nThe fjord mill stands in Ost."],
        ),
    ):
        answer = extended(**field)
        expected = alone.answer([question], [route], passages=[passages])[0]
        assert answer.choices[0].message.content == expected
        assert [d["id"] for d in answer.model_extra["polyprag"]["documents"]] == field["documents"]
    answer = extended(k=3, rule="score", temperature=0.5)
    expected = alone.ask(question, k=3, rule="score", temperature=0.5)
    assert answer.choices[0].message.content == expected.text
    weights = [d["weight"] for d in answer.model_extra["polyprag"]["documents"]]
    assert weights == pytest.approx([s.weight for s in expected.documents])


def test_a_conversation_is_put_into_the_plain_form(served: Served, alone: Engine) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Where is the amber?"}]},
        {"role": "assistant", "content": "In Ost."},
        {"role": "user", "content": "And the birch?"},
    ]
    prompt = (
        "Be brief.\n\nQuestion: Where is the amber?\nAnswer: In Ost.\n\nQuestion: And the birch?\nAnswer:"
    )
    answer = served.client().chat.completions.create(model="mills", messages=messages, max_tokens=5)
    assert answer.usage.prompt_tokens == len(prompt)
    assert [d["id"] for d in answer.model_extra["polyprag"]["documents"]] == ["d1"]


def test_all_of_a_stream_is_of_one_answer(served: Served) -> None:
    chunks = list(ask(served.client(), "Where is the coral?", stream=True, max_tokens=5))
    assert len(chunks) > 2
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


def test_only_documents_that_a_filter_lets_through_answer(make_store: MakeStore, tmp_path: Path) -> None:
    documents = [Document(d.id, d.text, d.title, {"year": 1990 + i}) for i, d in enumerate(DOCUMENTS)]
    path = make_store(tmp_path / "years", documents, filters={"year": "i64"})
    with serving(path, name="mills") as served:
        field = {"k": 5, "filter": {"year": {"gte": 1996}}}
        answer = ask(served.client(), "Where is the mill?", extra_body={"polyprag": field})
        assert {d["id"] for d in answer.model_extra["polyprag"]["documents"]} == {"d6", "d7"}


# --- what is refused ----------------------------------------------------------------------------------------


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "assistant", "content": "hm"}]}, "messages"),
    ({"messages": user("  ")}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    ({"messages": user("x" * 600)}, "messages"),  # more than the model has positions for
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "messages.0.content",
    ),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 61}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"temperature": 2.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 9}, "n"),
    ({"n": True}, "n"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"logprobs": True}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"frequency_penalty": 0.5}, "frequency_penalty"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"best_of": 2}, "best_of"),
    ({"polyprag": {"ks": 3}}, "polyprag.ks"),
    ({"polyprag": {"k": 0}}, "polyprag.k"),
    ({"polyprag": {"rule": "best"}}, "polyprag.rule"),
    ({"polyprag": {"documents": []}}, "polyprag.documents"),
    ({"polyprag": {"documents": ["d0"], "k": 2}}, "polyprag"),
    ({"polyprag": {"documents": ["d0"], "filter": {"year": 1990}}}, "polyprag"),
    ({"polyprag": {"filter": {"year": 1990}}}, "polyprag"),  # which the store does not declare
    ({"polyprag": {"filter": ["year"]}}, "polyprag.filter"),
    ({"polyprag": {"documents": ["d0", "d0"]}}, "polyprag"),
    ({"polyprag": {"documents": ["nobody"]}}, "polyprag"),
    ({"polyprag": {"documents": ["d7"]}}, "polyprag"),  # it has no route
    ({"polyprag": {"documents": [3]}}, "polyprag"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=[str(change)[:60] for change, _ in REFUSED])
def test_bad_requests_are_told_what_is_wrong(served: Served, change: dict[str, Any], param: str) -> None:
    body = {"model": "mills", "messages": user("Where?"), **change}
    for stream in (False, True):
        status, _, reply = served.send("POST", "/v1/chat/completions", {**body, "stream": stream})
        assert status == 400
        error = reply["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["message"]
    assert served.health()["status"] == "ok"


def test_what_asks_for_nothing_is_let_be(served: Served) -> None:
    nothing = {
        "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "logprobs": False, "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"},
        "store": False, "service_tier": "auto", "stop": None, "n": None, "stream": None,
    }  # fmt: skip
    body = {"model": "mills", "messages": user("Where?"), "max_tokens": 2, **nothing}
    assert served.send("POST", "/v1/chat/completions", body)[0] == 200


def test_an_answer_can_be_sent_back_as_the_client_has_it(served: Served) -> None:
    client = served.client()
    first = ask(client, "Where?", max_tokens=4).choices[0].message
    conversation = [*user("Where?"), first.model_dump(), *user("And then?")]
    assert {"annotations", "audio", "function_call", "tool_calls"} <= conversation[1].keys()
    plain = [*user("Where?"), {"role": "assistant", "content": first.content}, *user("And then?")]
    found = [
        client.chat.completions.create(model="mills", messages=given, max_tokens=4)  # type: ignore[call-overload]
        for given in (conversation, plain)
    ]
    assert found[0].usage == found[1].usage
    conversation[1] |= {"annotations": [], "tool_calls": []}  # as OpenAI itself has them
    body = {"model": "mills", "messages": conversation, "max_tokens": 4}
    assert served.send("POST", "/v1/chat/completions", body)[0] == 200
    for what in ({"tool_calls": [{"id": "1"}]}, {"audio": {"id": "1"}}, {"annotations": [{}]}):
        body["messages"] = [*user("Where?"), {**conversation[1], **what}, *user("And then?")]
        status, _, reply = served.send("POST", "/v1/chat/completions", body)
        assert (status, reply["error"]["param"]) == (400, f"messages.1.{next(iter(what))}")


def test_a_store_that_is_the_folder_itself_has_its_name(
    path: Path, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path)
    with Store.open(".") as store:
        engine = SimpleNamespace(base=alone.base, routed=alone.routed, store=store)
        service = create_app(engine).routes[0].endpoint.__self__  # type: ignore[arg-type, attr-defined]
        assert service.name == "mills"


def test_other_refusals_have_the_same_form(served: Served) -> None:
    chat, good = "/v1/chat/completions", {"model": "mills", "messages": user("Where?"), "max_tokens": 2}
    for (method, path, body, headers), status, code in (
        (("POST", chat, {**good, "model": "gpt-4o"}, {}), 404, "model_not_found"),
        (("GET", "/v1/models/other", None, {}), 404, "model_not_found"),
        (("GET", "/v1/embeddings", None, {}), 404, "not_found"),
        (("GET", chat, None, {}), 405, "method_not_allowed"),
        (("POST", chat, b"{", {}), 400, "invalid_json"),
        (("POST", chat, b"[" * 4000, {}), 400, "invalid_json"),
        (("POST", chat, b'{"model": "\xff"}', {}), 400, "invalid_json"),
        (("POST", chat, {**good, "messages": user("\ud800")}, {}), 400, "invalid_json"),
        (("POST", chat, b"[]", {}), 400, "invalid_value"),
        (("POST", chat, good, {"Content_Type": "text/plain"}), 415, "unsupported_media_type"),
        (("POST", chat, b" " * 5001, {}), 413, "body_too_large"),
        (("POST", chat, good, {"Host": "evil.example"}), 403, "host_not_allowed"),
        (("GET", "/health", None, {"Host": "evil.example:80"}), 403, "host_not_allowed"),
    ):
        found, _, reply = served.send(method, path, body, **headers)
        assert (found, reply["error"]["code"]) == (status, code)
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:80", "10.1.2.3", "a.localhost"):
        assert served.send("GET", "/health", Host=host)[0] == 200
    # A body without a length is not read beyond the limit either.
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    parts = (b"x" * 1000 for _ in range(1000))
    try:
        connection.request("POST", chat, parts, {"Content-Type": "application/json"}, encode_chunked=True)
        status = connection.getresponse().status
    except (BrokenPipeError, ConnectionResetError):
        status = 413  # it hung up on us
    assert status == 413
    connection.close()


def test_a_key_and_a_name(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(path, api_key="s3cret", allowed_hosts=("mills.example",)) as served:
        assert ask(served.client(), QUESTIONS[0], max_tokens=2).choices
        with pytest.raises(openai.AuthenticationError):
            ask(served.client().with_options(api_key="s3cre"), QUESTIONS[0])
        for value in ("", "s3cret", "Basic s3cret", "Bearer", "Bearer s3cret2", "Bearer \xe9"):
            status, headers, reply = served.send("GET", "/metrics", Authorization=value)
            assert (status, reply["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
        assert (
            served.send("GET", "/v1/models", Authorization="bearer s3cret", Host="Mills.example:80")[0] == 200
        )
        assert served.health()["status"] == "ok", "who watches needs no key"
    assert "s3cret" not in repr(ServeSettings(api_key="s3cret"))
    monkeypatch.delenv("POLYPRAG_API_KEY", raising=False)
    assert api_key() is None
    monkeypatch.setenv("POLYPRAG_API_KEY", " one\n")
    assert api_key() == "one"
    (tmp_path / "key").write_text("two\n")
    assert api_key(tmp_path / "key") == "two"
    for bad in ("", "\n", "two words", "n\xf6"):
        (tmp_path / "key").write_text(bad)
        with pytest.raises(InvalidInput):
            api_key(tmp_path / "key")
    with pytest.raises(InvalidInput, match="max_batch"):
        ServeSettings(max_batch=0)


# --- load ---------------------------------------------------------------------------------------------------


def test_under_load_no_answer_is_lost_or_mixed_up(served: Served, alone: Engine) -> None:
    """Twelve clients, in streams and not, for documents of their own or found ones; some hang up."""
    ids = [d.id for d in DOCUMENTS[:-1]]
    asked: list[tuple[str, dict[str, Any], str]] = [(q, {}, alone.ask(q).text) for q in QUESTIONS]
    for i, (id, question) in enumerate(zip(ids, QUESTIONS, strict=False)):
        pair = [id, ids[(i + 3) % len(ids)]]
        text = alone.answer([question], [alone.store.combined_route(pair)], max_new_tokens=9)[0]
        asked.append((question, {"max_tokens": 9, "extra_body": {"polyprag": {"documents": pair}}}, text))
    assert len({text for _, _, text in asked}) > 12, "an answer tells whose it is"
    before = served.send("GET", "/metrics")[2]
    hung_up = 0

    def client(number: int) -> int:
        nonlocal hung_up
        rng, mine = random.Random(number), served.client(max_retries=100)
        for _ in range(4):
            question, options, expected = rng.choice(asked)
            if rng.random() < 0.2:
                events = ask(mine, question, stream=True, **options)
                next(iter(events))
                events.close()
                hung_up += 1
            elif rng.random() < 0.5:
                assert streamed(mine, question, **options)[0] == expected
            else:
                assert ask(mine, question, **options).choices[0].message.content == expected
        return 4

    with ThreadPoolExecutor(12) as pool:
        assert sum(pool.map(client, range(12))) == 48
    assert hung_up > 3
    served.until(lambda health: health["running"] == health["waiting"] == 0)
    status = 'polyprag_requests_total{path="/v1/chat/completions",status="200"}'
    after = served.send("GET", "/metrics")[2]
    assert value(after, status) - value(before, status) == 48
    assert value(after, 'polyprag_batch_rows_bucket{le="2.0"}') < value(after, "polyprag_batch_rows_count")
    assert value(after, "polyprag_store_documents") == len(DOCUMENTS)


def value(metrics: str, name: str) -> float:
    """A value of Prometheus' text; 0 where it was never counted."""
    return next(
        (float(line.rsplit(" ", 1)[1]) for line in metrics.splitlines() if line.startswith(name + " ")), 0.0
    )


def test_a_full_queue_says_when_to_come_again(path: Path, held: threading.Event, alone: Engine) -> None:
    with serving(path, max_batch=2, max_waiting=3) as served, ThreadPoolExecutor(8) as pool:
        held.clear()
        client = served.client()
        first = [pool.submit(ask, client, question) for question in QUESTIONS[:2]]
        served.until(lambda health: health["running"] == 2)
        then = [pool.submit(ask, client, question) for question in QUESTIONS[2:5]]
        served.until(lambda health: health["waiting"] == 3)
        for stream in (False, True):
            body = {"model": "mills", "messages": user("Where?"), "stream": stream}
            status, headers, reply = served.send("POST", "/v1/chat/completions", body)
            assert (status, reply["error"]["code"]) == (429, "queue_full")
            assert reply["error"]["type"] == "rate_limit_error"
            assert int(headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            ask(client, "Where?")
        held.set()
        answers = [future.result().choices[0].message.content for future in first + then]
        assert answers == [alone.ask(question).text for question in QUESTIONS[:5]]
        assert value(served.send("GET", "/metrics")[2], "polyprag_given_up_total") == 0


def test_who_hangs_up_gives_the_place_away(path: Path, held: threading.Event, alone: Engine) -> None:
    with serving(path, max_batch=2, max_waiting=3) as served, ThreadPoolExecutor(4) as pool:
        held.clear()
        body = json.dumps({"model": "mills", "messages": user("Where?"), "max_tokens": 400}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\n\r\n"
        streaming = body[:-1] + b', "stream": true}'
        stream_head = head.replace(str(len(body)), str(len(streaming)))
        callers = []
        for text in (head.encode() + body, stream_head.encode() + streaming) * 2:
            caller = socket.create_connection(("127.0.0.1", served.port))
            caller.sendall(text)
            callers.append(caller)
            # One after the other, so that it is the first two that run.
            now = min(len(callers), 2), max(len(callers) - 2, 0)
            served.until(lambda health, now=now: (health["running"], health["waiting"]) == now)  # type: ignore[misc]
        for caller in callers[2:]:
            caller.close()
        served.until(lambda health: health["waiting"] == 0)
        for caller in callers[:2]:
            caller.close()
        asking = pool.submit(ask, served.client(), QUESTIONS[0])
        held.set()
        assert asking.result().choices[0].message.content == alone.ask(QUESTIONS[0]).text
        served.until(lambda health: health["running"] == 0)
        metrics = served.send("GET", "/metrics")[2]
        # None of the four came to its 400 tokens.
        assert value(metrics, "polyprag_given_up_total") == 4
        assert value(metrics, 'polyprag_tokens_total{kind="generated"}') <= 32


def test_what_takes_too_long_is_told_so(path: Path, held: threading.Event, alone: Engine) -> None:
    with serving(path, timeout=0.5) as served:
        held.clear()
        client = served.client()
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, QUESTIONS[0])
        assert (error.value.status_code, error.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match="in time"):
            streamed(client, QUESTIONS[0])
        # A body that does not come.
        with socket.create_connection(("127.0.0.1", served.port)) as slow:
            slow.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            )
            assert b" 408 " in slow.recv(100)
        held.set()
        served.until(lambda health: health["running"] == health["waiting"] == 0)
        assert ask(served.client(timeout=60), QUESTIONS[0], max_tokens=1).choices


def test_a_model_that_fails_is_no_end(path: Path, monkeypatch: pytest.MonkeyPatch, alone: Engine) -> None:
    forward, left = Batch._forward, [3]

    def failing(batch: Batch, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("out of memory")
        return forward(batch, *arguments)

    def refuse() -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with serving(path) as served:
        client = served.client()
        monkeypatch.setattr(Batch, "_forward", failing)
        # An error of the device that lasts.
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
        with pytest.raises(openai.InternalServerError) as error:
            ask(client, QUESTIONS[0])
        assert error.value.code == "model_error"
        assert "out of memory" not in str(error.value), "what is inside is for the log"
        left[0] = 1  # now at reading a prompt
        with pytest.raises(openai.APIError, match="failed"):
            streamed(client, QUESTIONS[0])
        assert ask(client, QUESTIONS[0]).choices[0].message.content == alone.ask(QUESTIONS[0]).text


def test_a_scheduler_whose_thread_has_ended_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_work", lambda scheduler: None)
    scheduler = make_scheduler()
    scheduler._thread.join()
    with pytest.raises(Stopped):
        scheduler.submit([])


def test_closing_drops_rows_that_are_joining(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, join = make_scheduler(), Batch.join
    closing = threading.Thread(target=scheduler.close, kwargs={"finish": False})

    def closed_meanwhile(batch: Batch, rows: Any) -> None:
        closing.start()
        while not scheduler._stopping:
            time.sleep(0.01)
        join(batch, rows)

    monkeypatch.setattr(Batch, "join", closed_meanwhile)
    row = Place(ids=[5, 6, 7], route=None, limit=400, tell=lambda row, text, finish: None)
    scheduler.submit([row])
    scheduler._thread.join()
    closing.join()
    assert len(row.new) == 1


def make_scheduler() -> Scheduler:
    base = BaseModel(make_model(), make_tokenizer(), "tiny")
    meter: Any = SimpleNamespace(admitted=lambda waited: None, stepped=lambda rows, seconds: None)
    return Scheduler(
        base, attach(base.model), max_batch=1, max_waiting=1, max_cached_tokens=9_999, meter=meter
    )


# --- a store that moves on ----------------------------------------------------------------------------------


def add_routed(path: Path, name: str, seed: int) -> None:
    with Store.open(path) as store:
        shape = (1, store.spec.groups, store.spec.experts)
        with store.writer() as writer:
            routes = np.random.default_rng(seed).normal(0, 4, shape).astype(np.float32)
            writer.add([Document(name, f"The {name} mill stands in Ost.", f"Mill {name}")], routes)


def test_new_generations_are_taken_over_while_answers_run(
    make_store: MakeStore, tmp_path: Path, held: threading.Event, alone: Engine
) -> None:
    path = make_store(tmp_path / "mills.polyprag", DOCUMENTS, unrouted=1)
    with serving(path, poll=0.1) as served, ThreadPoolExecutor(4) as pool:
        held.clear()
        client = served.client()
        running = [pool.submit(ask, client, question) for question in QUESTIONS[:3]]
        served.until(lambda health: health["running"] == 3)
        with Store.open(path) as store, store.writer() as writer:
            writer.delete(["d0"])
        add_routed(path, "island", 5)
        served.until(lambda health: health["generation"] == 3)
        held.set()
        answers = [future.result() for future in running]
        # As of the generation in which they were asked, a document that is gone by now included.
        assert [a.choices[0].message.content for a in answers] == [alone.ask(q).text for q in QUESTIONS[:3]]
        assert [a.model_extra["polyprag"]["generation"] for a in answers] == [1, 1, 1]
        answer = ask(client, "Where is the island?")
        assert [d["id"] for d in answer.model_extra["polyprag"]["documents"]] == ["island"]
        assert answer.system_fingerprint.endswith("generation-3")
        with Engine.open(path, BaseModel(make_model(), make_tokenizer(), "tiny")) as engine:
            assert answer.choices[0].message.content == engine.ask("Where is the island?").text
        # A store with other experts in its place is not taken over, nor is none at all.
        path.rename(tmp_path / "away")
        served.until(lambda _: value(served.send("GET", "/metrics")[2], refused) > 0)
        make_store(path, DOCUMENTS[:2], expert_dtype="int8")
        time.sleep(0.3)
        assert (
            ask(client, "Where is the island?").choices[0].message.content
            == answer.choices[0].message.content
        )
        assert served.health()["generation"] == 3


refused = 'polyprag_reloads_total{result="refused"}'


# --- the process --------------------------------------------------------------------------------------------


def test_the_command_reloads_on_sighup_and_finishes_on_sigterm(
    make_store: MakeStore, tmp_path: Path, model_folder: Path, alone: Engine
) -> None:
    path = make_store(tmp_path / "mills.polyprag", DOCUMENTS, unrouted=1)
    command = ["serve", str(path), "--port", "0", "--poll", "0"]
    command += ["--model", str(model_folder), "--device", "cpu", "--dtype", "fp32", "--attention", "eager"]
    command += ["--log-level", "warning", "--json"]
    out, into = os.pipe()
    process = warm.start(
        "import polyprag.cli; polyprag.cli.main()", *command, env={"POLYPRAG_API_KEY": "k"}, stdout=into
    )
    os.close(into)
    try:
        with open(out) as lines:
            said = json.loads(lines.readline())
        address = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/v1", said["url"])
        assert address is not None
        assert said["store"] == str(path)
        port = int(address[1])
        served = Served(alone, port, "k")
        assert ask(served.client(), QUESTIONS[2]).choices[0].message.content == alone.ask(QUESTIONS[2]).text
        add_routed(path, "island", 5)
        warm.send(process, signal.SIGHUP)
        served.until(lambda health: health["generation"] == 2)
        # Told to stop in the middle of an answer, and with another that waits: both come to their end.
        events = ask(served.client(), QUESTIONS[3], stream=True, max_tokens=440, stop=["\x7f"])
        first = next(iter(events))
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(ask, served.client(), QUESTIONS[4], max_tokens=200, stop=["\x7f"])
            served.until(lambda health: health["running"] == 2)
            warm.send(process, signal.SIGTERM)
            chunks = [first, *events]
            assert chunks[-1].choices[0].finish_reason is not None
            assert sum(len(c.choices[0].delta.content or "") for c in chunks) > 200
            assert other.result().choices[0].finish_reason is not None
        assert warm.ended(process, 60) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port))
    finally:
        process.kill()


def test_a_level_of_logs_that_there_is_not_is_a_wrong_use(run: Callable[..., Any], path: Path) -> None:
    code, _, err = run("serve", path, "--model", "no such model", "--log-level", "loud")
    assert (code, "'loud'" in err) == (2, True)
    assert run("serve", path, "--model", "no such model", "--log-level", "INFO")[0] == 6


def test_an_address_in_use_is_told_before_a_model_is_loaded(path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        polyprag.serve(path, "no such model", port=taken.getsockname()[1])
