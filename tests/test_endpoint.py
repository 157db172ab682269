"""Augmentation at an endpoint, against a real server: what is asked, kept, tried again and told."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from chat import Chat, Reply, chat, completion
from polyprag import Document, Store
from polyprag.augment import AugmentSettings, Pair, Prompts, augment, read_augmentations, read_pairs, summary
from polyprag.augment.endpoint import EndpointAugmenter, _seconds
from polyprag.cli import main
from polyprag.encode import Recipe, add, encode, training_pairs
from polyprag.errors import CorpusError, EndpointError, InvalidInput
from polyprag.jsonl import append_lines
from polyprag.models import BaseModel
from polyprag.trainer import TrainSettings

KEY = "sk-very-secret-1234"
DOCUMENTS = [Document(f"d{i}", f"The house of Reuter has {i + 20} rooms.", f"House {i}") for i in range(12)]
SETTINGS = AugmentSettings(pairs=4)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def message(request: dict[str, Any]) -> str:
    return str(request["messages"][-1]["content"])


def about(request: dict[str, Any]) -> int:
    """The number of the document that a request is about."""
    found = re.search(r"Title: House (\d+)", message(request))
    assert found
    return int(found.group(1))


def good(request: dict[str, Any], number: int = 0) -> Reply:
    i = about(request)
    pairs = [
        {"question": f"How many rooms does House {i} have?", "answer": f"{i + 20}"},
        {"question": f"Whose house is House {i}, of all houses?", "answer": "Reuter"},
    ]
    return completion(json.dumps({"pairs": pairs}))


def expected(i: int) -> tuple[Pair, ...]:
    return (
        Pair(f"How many rooms does House {i} have?", f"{i + 20}"),
        Pair(f"Whose house is House {i}, of all houses?", "Reuter"),
    )


def quick(server: Chat | str, **changes: Any) -> EndpointAugmenter:
    """An augmenter that waits for nothing for long."""
    url = server if isinstance(server, str) else server.url
    options: dict[str, Any] = {"retries": 3, "backoff": 0.01, "timeout": 20.0, **changes}
    return EndpointAugmenter(url, "strong", **options)


def ids(path: Path) -> list[Any]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


# --- what is asked, and what is kept ------------------------------------------------------------------


def test_every_document_is_asked_about_and_its_pairs_are_kept(tmp_path: Path) -> None:
    path, counts = tmp_path / "a.jsonl", []
    with chat(good) as server:
        found = augment(quick(server), DOCUMENTS, SETTINGS, path=path, progress=counts.append)
    assert [a.id for a in found] == [d.id for d in DOCUMENTS]
    assert [a.pairs for a in found] == [expected(i) for i in range(12)]
    assert not any(a.dropped or a.rewrite for a in found)
    assert sum(counts) == 12
    assert set(server.paths) == {"/v1/chat/completions"}
    request = next(r for r in server.asked if about(r) == 3)
    assert (request["model"], request["seed"], len(request["messages"])) == ("strong", 0, 1)
    assert "temperature" not in request, "the server knows best"
    assert "Write 5 questions" in message(request)
    assert "Passage: The house of Reuter has 23 rooms." in message(request)
    assert sorted(ids(path)) == sorted(d.id for d in DOCUMENTS)
    assert read_augmentations(path, DOCUMENTS) == (found, "strong")


def test_what_does_not_hold_is_dropped_and_counted() -> None:
    pairs = [
        *({"question": p.question, "answer": p.answer} for p in expected(1)),
        {"question": "How many rooms has House 1 got?", "answer": "99"},
        {"question": "Does House 1 have 21 rooms?", "answer": "21"},
        {"question": "How many rooms does it have?", "answer": "21"},
        {"question": "how many rooms does the House 1 have?", "answer": "21"},
        {"question": "Is House 1 a house?", "answer": "yes"},
        {"question": "Tell me of House 1.", "answer": "Reuter"},
        {"question": "What of House 1?", "answer": ["21"]},
    ]
    with chat(lambda request, number: completion(json.dumps(pairs))) as server:
        (found,) = augment(quick(server), DOCUMENTS[1:2], SETTINGS)
        assert found.pairs == expected(1)
        assert found.dropped == {
            "answer_not_in_passage": 2,
            "answer_in_question": 1,
            "off_subject": 1,
            "duplicate": 1,
            "malformed": 2,
        }
        assert "yes" not in message(server.asked[0])
        (asked,) = augment(quick(server), DOCUMENTS[1:2], replace(SETTINGS, yes_no=True))
        assert Pair("Is House 1 a house?", "yes") in asked.pairs
        assert 'are "yes" and "no" alone' in message(server.asked[1])
        (few,) = augment(quick(server), DOCUMENTS[1:2], replace(SETTINGS, pairs=1))
        assert few.pairs == expected(1)[:1]
    text = str(summary([found, asked]))
    assert "5 pairs and 0 rewrites of 2 documents, 0 of them without a pair; dropped:" in text
    assert "4 malformed" in text


def test_a_rewrite_comes_with_the_pairs_and_is_checked() -> None:
    said = {
        1: "Reuter has a house in which there are 21 rooms.",
        2: "Peter Quill of Ulm lived there in 1955.",
    }

    def answer(request: dict[str, Any], number: int) -> Reply:
        pairs = json.loads(good(request).body["choices"][0]["message"]["content"])["pairs"]
        answer = {"rewrite": said[about(request)], "pairs": pairs}
        return completion([{"type": "text", "text": json.dumps(answer)}])

    with chat(answer) as server:
        first, second = augment(quick(server), DOCUMENTS[1:3], replace(SETTINGS, rewrite=True))
    assert (first.rewrite, first.pairs, first.dropped) == (said[1], expected(1), {})
    assert (second.rewrite, second.pairs, second.dropped) == (None, expected(2), {"rewrite": 1})


def test_a_document_without_text_is_not_asked_about_and_a_long_one_is_cut() -> None:
    documents = [Document("none", None, "House 1"), Document("long", "quagga " * 10_000, "House 2")]
    with chat(good) as server:
        none, _ = augment(quick(server, passage_characters=100), documents, SETTINGS)
    assert none.pairs == ()
    assert len(server.asked) == 1
    assert message(server.asked[0]).count("quagga") == 14


def test_own_prompts_are_what_is_asked(tmp_path: Path) -> None:
    prompts = Prompts(endpoint_system="Be brief.", endpoint_pairs="$pairs for Title: $title, {$passage}")
    with chat(good) as server:
        augment(quick(server), DOCUMENTS[:1], replace(SETTINGS, prompts=prompts, temperature=0.5, seed=7))
    (request,) = server.asked
    assert [m["content"] for m in request["messages"]] == [
        "Be brief.", "5 for Title: House 0, {The house of Reuter has 20 rooms.}",
    ]  # fmt: skip
    assert (request["temperature"], request["seed"]) == (0.5, 7)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_are_asked_at_once_and_no_more(concurrency: int) -> None:
    together = threading.Barrier(concurrency)

    def answer(request: dict[str, Any], number: int) -> Reply:
        together.wait(20)  # passes only if so many are here
        return good(request)

    with chat(answer) as server:
        found = augment(quick(server, concurrency=concurrency), DOCUMENTS, SETTINGS)
    assert server.most == concurrency
    assert [a.pairs for a in found] == [expected(i) for i in range(12)]


def test_it_runs_beside_another_event_loop() -> None:
    async def notebook() -> list[Any]:
        return augment(quick(server), DOCUMENTS[:2], SETTINGS)

    with chat(good) as server:
        assert len(asyncio.run(notebook())) == 2


# --- what may pass, and what will not -----------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Reply({"error": {"message": "slow down"}}, 429),
        Reply({"error": "slow down"}, 429, (("Retry-After", "0.05"),)),
        Reply(b"<html>bad gateway</html>", 502),
        Reply(b"", 503, (("Retry-After", "soon"),)),
        Reply(b"", 500),
        Reply(b"\xff\x00 no JSON"),
        Reply(b'{"choices": ['),
        Reply({"choices": []}),
        Reply({"error": {"message": "overloaded"}}),
        Reply([1]),
        completion(None),
        completion("Sorry."),
    ],
)
def test_what_may_pass_is_tried_again(fault: Reply) -> None:
    seen: Counter[int] = Counter()

    def answer(request: dict[str, Any], number: int) -> Reply:
        seen[about(request)] += 1
        return fault if seen[about(request)] <= 2 else good(request)

    with chat(answer) as server:
        found = augment(quick(server), DOCUMENTS[:4], SETTINGS)
    assert [a.pairs for a in found] == [expected(i) for i in range(4)]
    assert set(seen.values()) == {3}


def test_a_server_that_hangs_or_hangs_up_is_asked_again() -> None:
    seen: Counter[int] = Counter()

    def answer(request: dict[str, Any], number: int) -> Reply:
        seen[about(request)] += 1
        if about(request) == 0 and seen[0] == 1:
            server.closing.wait(30)
        if about(request) == 1 and seen[1] == 1:
            raise ConnectionAbortedError  # closes the connection without an answer
        return good(request)

    with chat(answer) as server:
        server_errors = pytest.MonkeyPatch()
        server_errors.setattr("socketserver.BaseServer.handle_error", lambda *_: None)
        try:
            found = augment(quick(server, timeout=1.0), DOCUMENTS[:3], SETTINGS)
        finally:
            server_errors.undo()
    assert [a.pairs for a in found] == [expected(i) for i in range(3)]
    assert (seen[0], seen[1]) == (2, 2)


def test_nobody_asks_before_the_time_that_the_server_names() -> None:
    refused_at: list[float] = []
    came_at: list[float] = []

    def answer(request: dict[str, Any], number: int) -> Reply:
        came_at.append(time.monotonic())
        if number == 1:
            refused_at.append(time.monotonic())
            return Reply(b"", 429, (("Retry-After", "1"),))
        return good(request)

    with chat(answer) as server:
        augment(quick(server, concurrency=1), DOCUMENTS[:3], SETTINGS)
    assert min(came_at[1:]) - refused_at[0] >= 0.95


def test_retry_after_is_seconds_or_a_date() -> None:
    soon = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=100), usegmt=True)
    assert 90 < _seconds(soon) <= 100
    assert _seconds("2.5") == 2.5
    for nothing in (
        None,
        "",
        "soon",
        "-3",
        "nan",
        "inf",
        "Mon, 01 Jan 2001 00:00:00 GMT",
        "1 Jan 99999 00:00",
    ):
        assert _seconds(nothing) == 0


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "OPENAI_API_KEY is not set"),
        (403, "OPENAI_API_KEY is not set"),
        (404, "model's name, and at the URL, which mostly ends in /v1"),
        (402, "look at what the server says"),
        (308, "the server is elsewhere"),
    ],
)
def test_what_will_not_pass_ends_the_run_at_once(tmp_path: Path, status: int, said: str) -> None:
    with chat(lambda request, number: Reply({"error": {"message": "no such thing"}}, status)) as server:
        with pytest.raises(EndpointError) as caught:
            augment(quick(server, concurrency=2), DOCUMENTS, SETTINGS, path=tmp_path / "a.jsonl")
        message = str(caught.value)
        assert f"{server.url}/chat/completions (model strong)" in message
        assert f"status {status} (no such thing)" in message
        assert said in message
        assert len(server.asked) <= 2
    assert not (tmp_path / "a.jsonl").exists()


def test_a_long_wait_is_told_and_not_waited_for() -> None:
    reply = Reply(b"", 429, (("Retry-After", "7200"),))
    with (
        chat(lambda request, number: reply) as server,
        pytest.raises(EndpointError, match="again in 7200 seconds; run the same again then"),
    ):
        augment(quick(server), DOCUMENTS, SETTINGS)


def test_after_the_last_try_it_says_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def answer(request: dict[str, Any], number: int) -> Reply:
        return good(request) if about(request) < 5 else Reply({"detail": "out of memory"}, 500)

    with chat(answer) as server:
        with pytest.raises(EndpointError, match=r"gave up after 3 tries.*status 500 \(out of memory\)"):
            augment(quick(server, concurrency=1, retries=2), DOCUMENTS, SETTINGS, path=path)
        assert ids(path) == ["d0", "d1", "d2", "d3", "d4"], "what came before is kept"
        asked = len(server.asked)
        server.answer = good
        found = augment(quick(server), DOCUMENTS, SETTINGS, path=path)
        assert len(server.asked) == asked + 7, "and not asked for again"
    assert [a.pairs for a in found] == [expected(i) for i in range(12)]


def test_a_server_that_is_not_there_is_told_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=r"cannot connect.*is the server running there"):
            augment(quick(url, retries=20, backoff=10.0), DOCUMENTS, SETTINGS)


@pytest.mark.parametrize(
    ("reply", "reason", "said"),
    [
        (Reply({"error": {"message": "prompt too long"}}, 400), "refused", r"status 400 \(prompt too long\)"),
        (
            completion("I would rather not."),
            "unreadable_answer",
            "no pair in its answer 'I would rather not.'",
        ),
    ],
)
def test_one_document_may_come_to_nothing_but_not_the_first_ones_all(
    tmp_path: Path, reply: Reply, reason: str, said: str
) -> None:
    path = tmp_path / "a.jsonl"
    with chat(lambda request, number: reply if about(request) in (0, 1, 7) else good(request)) as server:
        found = augment(quick(server, concurrency=1), DOCUMENTS, SETTINGS, path=path)
        for i, augmentation in enumerate(found):
            assert augmentation.pairs == (() if i in (0, 1, 7) else expected(i))
            assert augmentation.dropped == ({reason: 1} if i in (0, 1, 7) else {})
        assert len(ids(path)) == 12

        path.unlink()
        server.answer = lambda request, number: reply
        for documents in (DOCUMENTS, DOCUMENTS[:1]):
            server.asked.clear()
            with pytest.raises(EndpointError, match=said):
                augment(quick(server, concurrency=1), documents, SETTINGS, path=path)
            assert len(server.asked) <= 4 * 3
            assert not path.exists()

        # With others done before, the last document's fault is its own.
        server.answer = good
        augment(quick(server), DOCUMENTS[:11], SETTINGS, path=path)
        server.answer = lambda request, number: reply
        assert augment(quick(server), DOCUMENTS, SETTINGS, path=path)[11].dropped == {reason: 1}


def test_quick_refusals_are_no_verdict_while_others_are_still_asked() -> None:
    refused = threading.Event()
    seen: list[int] = []

    def answer(request: dict[str, Any], number: int) -> Reply:
        if about(request) == 0:
            refused.wait(20)
            time.sleep(0.3)  # whoever is too hasty has given up by now
            return good(request)
        if about(request) < 6:
            seen.append(about(request))
            if len(seen) == 4:
                refused.set()
            return Reply({"error": "too long"}, 413)
        return good(request)

    with chat(answer) as server:
        found = augment(quick(server, concurrency=3), DOCUMENTS, SETTINGS)
    assert [bool(a.pairs) for a in found] == [True, *[False] * 5, *[True] * 6]


def test_a_parameter_that_the_server_does_not_take_is_left_out() -> None:
    def answer(request: dict[str, Any], number: int) -> Reply:
        if "max_tokens" in request:
            problem = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return Reply({"error": {"message": problem}}, 400)
        if "seed" in request:
            return Reply(
                {"detail": [{"loc": ["body", "seed"], "msg": "extra inputs are not permitted"}]}, 422
            )
        return good(request) if request["max_completion_tokens"] == 4096 else Reply(b"", 400)

    with chat(answer) as server:
        found = augment(quick(server, concurrency=1), DOCUMENTS[:5], SETTINGS)
        assert [a.pairs for a in found] == [expected(i) for i in range(5)]
        assert len(server.asked) == 2 + 5, "once for all"


# --- keys ---------------------------------------------------------------------------------------------


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    with chat(good) as server:
        augment(quick(server), DOCUMENTS[:1], SETTINGS, path=path)
        assert "authorization" not in server.headers[0]
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        augment(quick(server), DOCUMENTS[:2], SETTINGS, path=path)
        assert server.headers[1]["authorization"] == f"Bearer {KEY}"
        monkeypatch.setenv("MY_KEY", "another")
        mine = quick(server, key_variable="MY_KEY")
        augment(mine, DOCUMENTS[:3], SETTINGS, path=path)
        assert server.headers[2]["authorization"] == "Bearer another"
        assert len(server.asked) == 3, "which key was used makes no other pairs"

        for status in (401, 400, 500, 200):
            server.answer = lambda request, number, status=status: Reply(  # type: ignore[misc]
                {"error": {"message": f"Incorrect API key provided: {KEY}"}}, status
            )
            with pytest.raises(EndpointError) as caught:
                augment(quick(server, retries=1), DOCUMENTS[3:], SETTINGS)
            text = f"{caught.value!r} {caught.value.__cause__!r} {quick(server)!r}"
            assert KEY not in text
            assert "Incorrect API key provided: ***" in text
    assert KEY not in path.read_text()


@pytest.mark.parametrize(
    ("value", "said"), [(None, "not set"), ("  ", "not set"), ("sk a", "no key"), ("\x07", "no key")]
)
def test_a_key_that_is_none_is_told_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with chat(good) as server:
        with pytest.raises(InvalidInput, match=f"MY_KEY.*{said}"):
            augment(quick(server, key_variable="MY_KEY"), DOCUMENTS, SETTINGS)
        assert server.asked == []


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x/v1", "http://", "http://[x/v1", "http://x:99999999/v1", "http://u:secret@x/v1",
            "https://secret@x/v1", "http://x/v1?key=secret", "http://x/v1#secret", "http://exa mple\x00/v1"],
)  # fmt: skip
def test_a_url_that_is_none_or_holds_a_secret_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="URL") as caught:
        EndpointAugmenter(url, "m")
    assert "secret" not in str(caught.value)


def test_a_url_is_taken_with_or_without_its_end() -> None:
    for url in ("http://x:1/v1", "http://x:1/v1/", "http://x:1/v1/chat/completions"):
        assert EndpointAugmenter(url, "m").target == "http://x:1/v1/chat/completions"
    for wrong in ({"concurrency": 0}, {"timeout": float("nan")}, {"retries": -1}, {"model": ""}):
        with pytest.raises(InvalidInput):
            EndpointAugmenter(**{"url": "http://x/v1", "model": "m", **wrong})  # type: ignore[arg-type]


# --- resuming -----------------------------------------------------------------------------------------


def test_what_is_on_disk_is_not_asked_for_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with chat(good) as server:
        first = augment(quick(server), DOCUMENTS[:5], SETTINGS, path=path)
        assert augment(quick(server), DOCUMENTS, SETTINGS, path=path)[:5] == first
        assert len(server.asked) == 12, "to the document"
        content = path.read_bytes()
        assert len(ids(path)) == 12
        augment(quick(server, concurrency=1, retries=0), DOCUMENTS, SETTINGS, path=path)
        assert len(server.asked) == 12, "how it is asked makes no other pairs"
        assert path.read_bytes() == content
        other = replace(SETTINGS, prompts=Prompts(endpoint_pairs=Prompts().endpoint_pairs + "."))
        for augmenter, settings in (
            (quick(server), other),
            (quick(server), replace(SETTINGS, pairs=3)),
            (replace(quick(server), model="other"), SETTINGS),
        ):
            server.asked.clear()
            augment(augmenter, DOCUMENTS[:3], settings, path=path)
            assert len(server.asked) == 3, "what is made otherwise is made anew"


def test_what_came_while_ctrl_c_was_pressed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, appending = tmp_path / "a.jsonl", "polyprag.augment.run.append_lines"

    def press(*given: Any) -> None:
        monkeypatch.setattr(appending, append_lines)
        while any(thread.name == "polyprag-augment" for thread in threading.enumerate()):
            time.sleep(0.01)  # until all answers are there
        raise KeyboardInterrupt

    monkeypatch.setattr(appending, press)
    with chat(good) as server, pytest.raises(KeyboardInterrupt):
        augment(quick(server), DOCUMENTS, SETTINGS, path=path)
    assert set(ids(path)) == {d.id for d in DOCUMENTS}


def interrupt(program: str, *arguments: str, when: Callable[[], bool]) -> tuple[int, str]:
    child = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not when() and child.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        child.send_signal(2)
        begun = time.monotonic()
        _, err = child.communicate(timeout=60)
        assert time.monotonic() - begun < 20, "what hangs is not waited for"
        return child.returncode, err
    finally:
        child.kill()
        child.wait()


def test_ctrl_c_leaves_what_was_written(tmp_path: Path) -> None:
    corpus, path = tmp_path / "c.jsonl", tmp_path / "pairs.jsonl"
    corpus.write_text(
        "".join(json.dumps({"id": d.id, "title": d.title, "text": d.text}) + "\n" for d in DOCUMENTS)
    )

    def answer(request: dict[str, Any], number: int) -> Reply:
        if about(request) >= 6:
            server.closing.wait(120)
        return good(request)

    program = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from polyprag.cli import main\n"
        "try:\n    main()\nfinally:\n    assert 'torch' not in sys.modules, 'an endpoint needs none'\n"
    )
    with chat(answer) as server:
        command = ["augment", str(corpus), "--out", str(path), "--augment-url", server.url]
        command += ["--augment-model", "strong", "--augment-concurrency", "2"]
        six = lambda: path.exists() and len(path.read_bytes().splitlines()) == 6  # noqa: E731
        code, err = interrupt(program, *command, when=six)
        assert code == 130, err
        assert "the same command goes on from there" in err
        assert "Traceback" not in err
        assert set(ids(path)) == {f"d{i}" for i in range(6)}
        server.answer, asked = good, len(server.asked)
        done = subprocess.run(
            [sys.executable, "-c", program, *command],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert len(server.asked) == asked + 6
    assert "24 pairs and 0 rewrites of 12 documents" in done.stdout
    assert f"polyprag encode {corpus} STORE --augmentation {path}" in done.stdout


# --- on the way to a store ----------------------------------------------------------------------------

RECIPE = Recipe(
    augment=SETTINGS,
    train=TrainSettings(code_dim=6, experts=4, alpha=16.0, epochs=1, checkpoint_seconds=1e9),
    add_epochs=1,
)


def test_a_store_says_who_wrote_its_pairs_and_not_where(tmp_path: Path, tiny_base: BaseModel) -> None:
    path = tmp_path / "s"
    with chat(good) as server:
        found = encode(tiny_base, DOCUMENTS[:3], path, RECIPE, augmenter=quick(server))
        assert [a.pairs for a in found] == [expected(i) for i in range(3)]
        with Store.open(path) as store:
            assert Recipe.from_json(store.spec.recipe) == replace(RECIPE, augmenter="strong")
            assert "127.0.0.1" not in json.dumps(store.spec.recipe)
        asked = len(server.asked)
        with pytest.raises(InvalidInput, match=r"written by 'strong'.*--augment-url.*--augmentation"):
            add(tiny_base, DOCUMENTS[3:5], path)
        assert len(server.asked) == asked
        assert add(tiny_base, DOCUMENTS[3:5], path, augmenter=quick(server)) == 2
    trained = sorted((p.question, p.answer) for i in range(5) for p in expected(i))
    assert sorted(training_pairs(path) or []) == trained


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def call(*arguments: object) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyprag", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        code: Any = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_augment_look_encode_add(run: Callable[..., Any], tmp_path: Path, model_folder: Path) -> None:
    """The whole way, each step a command."""
    corpus, new, pairs, store = (tmp_path / n for n in ("c.jsonl", "n.jsonl", "p.jsonl", "s"))
    for path, documents in ((corpus, DOCUMENTS[:3]), (new, DOCUMENTS[3:5])):
        rows = ({"id": d.id, "title": d.title, "text": d.text} for d in documents)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = ["--model", model_folder, "--device", "cpu", "--dtype", "fp32"]
    small = ["--epochs", "1", "--experts", "4", "--code-dim", "6"]
    with chat(good) as server:
        there = ["--augment-url", server.url, "--augment-model", "strong"]
        code, out, err = run("augment", corpus, "--out", pairs, *there)
        assert code == 0, err
        assert "6 pairs and 0 rewrites of 3 documents, 0 of them without a pair; dropped: none" in out
        assert "".join(out.split()).endswith(f"STORE--augmentation{pairs}"), (
            "options are told where some were"
        )
        assert "How many rooms does House 0 have?  20" in out

        code, _, err = run("augment", corpus, "--out", pairs, *there, "--pairs", "3")
        assert code == 3
        assert "3 lines are of strong with other prompts" in err
        prompts = tmp_path / "prompts.toml"
        prompts.write_text("endpoint_pairs = 'Title: $title $passage $pairs'")
        code, _, err = run("augment", corpus, "--out", pairs, *there, "--prompts", prompts)
        assert code == 3, "a changed prompt is not mixed with the old"
        assert len(ids(pairs)) == 3

        # Changed by hand, as it may be.
        pairs.write_text(
            pairs.read_text().replace("How many rooms does House 0 have?", "What is in House 0?")
        )
        asked = len(server.asked)
        code, out, err = run("encode", corpus, store, *base, *small, "--augmentation", pairs)
        assert code == 0, err
        assert "p.jsonl: 6 pairs" in out
        assert len(server.asked) == asked
        assert ("What is in House 0?", "20") in (training_pairs(store) or [])

        code, _, err = run("add", new, store, *base)
        assert (code, "--augment-url" in err) == (3, True)
        code, _, err = run("add", new, store, *base, "--augment-url", server.url)
        assert code == 0, err
        assert server.asked[-1]["model"] == "strong", "as the store's were"
        code, out, err = run("encode", new, tmp_path / "t", *base, *small, *there, "--yes-no")
        assert code == 0, err
        assert "4 pairs and 0 rewrites of 2 documents" in out

    for arguments, said in (
        (
            ["encode", new, tmp_path / "u", "--augmentation", pairs],
            "nothing for 2 of 2 documents, 'd3' for one",
        ),
        (["encode", new, tmp_path / "u", "--augment-url", "http://x/v1"], "--augment-model"),
        (["encode", new, tmp_path / "u", "--augment-model", "m"], "--augment-url"),
        (["encode", new, tmp_path / "u", "--yes-no"], "--augment-url"),
        (["augment", new, "--out", tmp_path / "u", "--yes-no"], "--augment-url"),
        (["encode", corpus, tmp_path / "u", "--augmentation", pairs, *there], "leave out --augment-url"),
        (["encode", corpus, tmp_path / "u", "--augmentation", tmp_path / "none"], "none"),
    ):
        code, _, err = run(*arguments)
        assert code == 3
        assert said in err
    assert not (tmp_path / "u").exists()
    code, out, _ = run("augment", "--show-prompts")
    assert code == 0
    assert "endpoint_pairs = '''" in out


def test_pairs_of_another_form_of_a_document_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with chat(good) as server:
        augment(quick(server), DOCUMENTS[:2], SETTINGS, path=path)
    changed = [DOCUMENTS[0], Document("d1", "The house of Reuter burned down.", "House 1")]
    with pytest.raises(CorpusError, match=r"'d1' had another title or text"):
        read_augmentations(path, changed)
    assert len(read_pairs(path)) == 4
