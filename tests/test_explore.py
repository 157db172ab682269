"""``polyprag explore``: what it answers, whom it answers, and its page in a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyprag import Combination, Document, Engine, Store
from polyprag.errors import InvalidInput, StoreClosed
from polyprag.explore import Explorer, open_server
from polyprag.explore.server import MAX_DOCUMENTS, MAX_QUESTION, Server

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> & mill"
DOCUMENTS = [
    Document("a", "The amber mill stands in Ost.", "Amber"),
    Document("b", f"A mill. {HOSTILE}", HOSTILE),
    Document("c", "A mill that no route knows.", "Coral"),
]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")


@pytest.fixture(scope="module")
def store(make_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("explore") / "s<b>.polyprag", DOCUMENTS, unrouted=1)


@pytest.fixture(scope="module")
def server(store: Path, model_folder: Path) -> Iterator[Server]:
    with (
        Engine.open(store, model_folder, device="cpu", dtype="fp32") as engine,
        open_server(Explorer(engine.store, engine)) as serving,
    ):
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield serving
        finally:
            serving.shutdown()
            thread.join()


def ask(
    server: Server, body: Any, *, path: str = "/ask", method: str = "POST", **headers: str | None
) -> tuple[int, Any, dict[str, str]]:
    """(status, JSON or text, headers); a header given as None is not sent."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    sent = {"Host": f"127.0.0.1:{server.server_port}", "Content-Type": "application/json"}
    sent |= {"Content-Length": str(len(data))}
    sent = {**sent, **{name.replace("_", "-"): value for name, value in headers.items()}}  # type: ignore[dict-item]
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(data)
    reply = connection.getresponse()
    text = reply.read().decode()
    found = dict(reply.getheaders())
    connection.close()
    return reply.status, json.loads(text) if found["Content-Type"] == "application/json" else text, found


def test_a_page_that_is_closed_before_its_answer_leaves_no_trace(
    server: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, closed, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(question: str, k: int | None = None) -> dict[str, Any]:
        asked.set()
        closed.wait(60)
        return {"question": question, "k": k}

    def shut(request: Any) -> None:
        Server.shutdown_request(server, request)
        ended.set()

    monkeypatch.setattr(server.explorer, "ask", slow)
    monkeypatch.setattr(server, "shutdown_request", shut)
    body = b'{"question": "Where?"}'
    with socket.create_connection(("127.0.0.1", server.server_port)) as page:
        page.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
        page.sendall(
            f"POST /ask HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert asked.wait(60)
    closed.set()
    assert ended.wait(60)
    assert capsys.readouterr().err == ""


# --- what is answered -------------------------------------------------------------------------------


def test_a_question(server: Server) -> None:
    status, found, _ = ask(server, {"question": "Where is the amber mill?", "k": 3})
    assert status == 200
    explorer = server.explorer
    engine, store = explorer._engine, explorer._store
    assert engine is not None
    ids = [document["id"] for document in found["documents"]]
    assert sorted(ids) == ["a", "b", "c"]
    weights = {document["id"]: document["weight"] for document in found["documents"]}
    assert (weights["a"], weights["b"], weights["c"]) == (0.5, 0.5, 0.0)
    route = np.concatenate([facet["weights"] for facet in found["route"]])
    expected = store.combined_route(["a", "b"])
    assert route.shape == expected.shape
    np.testing.assert_allclose(np.sort(route, None), np.sort(expected, None), atol=1e-4)
    assert next(d["route"] for d in found["documents"] if d["id"] == "c") == []
    without, with_route = engine.answer(["Where is the amber mill?"] * 2, [None, expected])
    assert (found["without_route"], found["with_route"]) == (without, with_route)

    status, found, _ = ask(server, {"question": "zebra"})
    assert (status, found["documents"], found["route"], found["with_route"]) == (200, [], [], None)
    assert found["without_route"] is not None


def test_a_store_that_is_the_folder_itself_has_its_name(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(store)
    with Store.open(".") as opened:
        assert Explorer(opened).about()["name"] == store.name


def test_a_store_that_combines_more_documents_than_a_page_shows(
    make_store: Callable[..., Path], tmp_path: Path
) -> None:
    path = make_store(tmp_path / "many", DOCUMENTS, combination=Combination(50, "mean", 1.0))
    explorer = Explorer(Store.open(path))
    assert explorer.about()["k"] == MAX_DOCUMENTS
    assert len(explorer.ask("mill")["documents"]) == 3


def test_without_a_model_documents_and_routes_are_shown(store: Path) -> None:
    with Store.open(store) as opened:
        explorer = Explorer(opened, None, "none here")
        assert explorer.about() == {
            "name": "s<b>.polyprag",
            "documents": 3,
            "base_model": "tiny",
            "experts": 4,
            "k": 1,
            "rule": "mean",
            "answers": False,
            "why_no_answers": "none here",
        }
        found = explorer.ask("amber")
        assert (found["with_route"], found["without_route"]) == (None, None)
        assert [d["id"] for d in found["documents"]] == ["a"]
        assert found["route"]
        for question, k in ((" ", 1), ("x" * (MAX_QUESTION + 1), 1), ("x", 0), ("x", MAX_DOCUMENTS + 1)):
            with pytest.raises(InvalidInput):
                explorer.ask(question, k)


# --- whom -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "evil.example:PORT", "0.0.0.0:PORT", "", None])
@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/about"), ("POST", "/ask")])
def test_another_host_gets_nothing(server: Server, host: str | None, method: str, path: str) -> None:
    name = None if host is None else host.replace("PORT", str(server.server_port))
    status, found, _ = ask(server, {"question": "amber"}, path=path, method=method, Host=name)
    assert (status, list(found)) == (403, ["error"])


def test_another_page_gets_nothing(server: Server) -> None:
    question = {"question": "amber"}
    port = server.server_port
    for origin in (
        "http://evil.example",
        "null",
        f"https://127.0.0.1:{port}",
        f"http://127.0.0.1:{port + 1}",
    ):
        assert ask(server, question, Origin=origin)[0] == 403, origin
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        assert ask(server, question, Content_Type=kind)[0] == 415, kind
    assert ask(server, question, method="OPTIONS")[0] == 501, "no other origin is ever allowed"
    assert ask(server, question, Origin=f"http://localhost:{port}", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 5000, {"question": 1}, {"question": "x", "k": "1"}, {"k": 1}],
)
def test_what_is_no_question(server: Server, body: Any) -> None:
    status, found, _ = ask(server, body)
    assert status == 400
    assert found["error"]


def test_long_questions_and_other_pages(server: Server) -> None:
    assert ask(server, {"question": "x" * (MAX_QUESTION + 1)})[0] == 400
    assert ask(server, b"", Content_Length=str(1 << 30))[0] == 413
    assert ask(server, b"", Content_Length="-1")[0] == 413
    assert ask(server, b"", Content_Length="1" * 5_001)[0] == 413
    assert ask(server, b"", Content_Length=None)[0] == 413
    for path in ("/../server.py", "/page.html", "/server.py", "//etc/passwd", "/?x"):
        assert ask(server, None, path=path, method="GET")[0] == 404, path


def test_pages_may_run_nothing_but_their_own(server: Server) -> None:
    for path in ("/", "/page.js", "/page.css", "/about", "/none"):
        _, _, headers = ask(server, None, path=path, method="GET")
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
    assert server.server_address[0] == "127.0.0.1"


# --- the page ---------------------------------------------------------------------------------------


@pytest.mark.skipif(BROWSER is None, reason="no browser here: apt install chromium")
def test_the_page_in_a_browser(server: Server, tmp_path: Path) -> None:
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path}",
            "--virtual-time-budget=30000",
            "--dump-dom",
            f"{server.url}#q=amber%20mill&k=3",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    page = done.stdout
    assert "<title>polyprag explore</title>" in page, "a hostile title has run"
    assert "<img" not in page, "a hostile title has become an element"
    assert page.count("<script") == 1
    assert HOSTILE in unescape(page)
    assert "s&lt;b&gt;.polyprag" in page
    found = server.explorer.ask("amber mill", 3)
    answer = re.search(r'id="with-route"[^>]*>(.*?)</p>', page, re.DOTALL)
    assert answer is not None
    assert unescape(answer[1]) == (found["with_route"] or "(nothing)")
    assert page.count("<svg") == len(found["route"]) == 3
    cells = sum(len(facet["weights"]) * len(facet["weights"][0]) for facet in found["route"])
    assert page.count("<rect") == cells
    assert 'hidden=""' not in page, "the answer is shown"


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(
    server: Server, store: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polyprag.engine", None)
    code, _, err = run("explore", store, "--port", str(server.server_port), "--no-browser")
    assert code == 1
    assert err.startswith(f"Error: 127.0.0.1:{server.server_port}: ")


def test_the_end_waits_for_no_answer_and_leaves_none_running(store: Path) -> None:
    class Endless:
        def answer(self, questions: list[str], routes: list[Any], *, on_text: Callable[..., None]) -> Any:
            while True:
                begun.set()
                on_text(0, "more")

    begun, said = threading.Event(), []

    def asking() -> None:
        try:
            explorer.ask("Where is the amber mill?")
        except StoreClosed as error:
            said.append(str(error))

    with Store.open(store) as opened:
        explorer = Explorer(opened, Endless())  # type: ignore[arg-type]
        thread = threading.Thread(target=asking, daemon=True)
        thread.start()
        assert begun.wait(60)
        explorer.close()
        thread.join(60)
        assert said == ["polyprag explore has ended"]
        with pytest.raises(StoreClosed):
            explorer.ask("Where?")


def test_the_command_leaves_none_running(
    store: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(server: Server) -> None:
        shown.append(server.explorer)
        raise KeyboardInterrupt

    shown: list[Explorer] = []
    monkeypatch.setattr(Server, "serve_forever", interrupted)
    assert run("explore", store, "--no-answers", "--no-browser")[0] == 130
    assert shown[0]._closed


def test_the_command_ends_at_ctrl_c(store: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "polyprag", "explore", store, "--no-answers", "--no-browser", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert child.stdout is not None
    said = json.loads(child.stdout.readline())
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", said["url"])
    assert (said["store"], said["answers"]) == (str(store), False)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (130, "")
    assert "Traceback" not in err
