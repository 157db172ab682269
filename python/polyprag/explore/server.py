"""The server of ``polyprag explore``: one page, one question at a time, for this machine alone.

A page of another site must not be able to ask through the user's browser. So the server listens on the
loopback interface, answers only where the Host header names that interface (no rebinding of names), takes
questions only as JSON from its own origin, and its page may load and run nothing but its own two files.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import TYPE_CHECKING, Any, cast

from polyprag._polyprag import Store
from polyprag.errors import InvalidInput, PolypragError, StoreClosed
from polyprag.inspection import facets, facets_json
from polyprag.jsonl import last_name

if TYPE_CHECKING:
    from polyprag.combining import CombinationRule
    from polyprag.engine import Engine

HOST = "127.0.0.1"
MAX_QUESTION = 2_000  # characters
MAX_DOCUMENTS = 20
_FORM = "send {question: text, k: number or null}"
_MAX_BODY = 16 << 10
_TIMEOUT = 30.0  # seconds that a connection may say nothing
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
}


class Explorer:
    """What the page shows of a store; answers too where there is an engine.

    Args:
        why_no_answers: what the page says where ``engine`` is None.
    """

    def __init__(self, store: Store, engine: Engine | None = None, why_no_answers: str | None = None) -> None:
        self._store, self._engine, self._why = store, engine, why_no_answers
        self._one_at_a_time = threading.Lock()  # two questions at once would only share the processor
        self._closed = False

    def about(self) -> dict[str, Any]:
        """What the page says of the store."""
        spec = self._store.spec
        return {
            "name": last_name(self._store.path),
            "documents": len(self._store),
            "base_model": spec.base_model.get("name"),
            "experts": spec.experts,
            "k": min(spec.combination.k, MAX_DOCUMENTS),
            "rule": spec.combination.rule,
            "answers": self._engine is not None,
            "why_no_answers": self._why,
        }

    def ask(self, question: str, k: int | None = None) -> dict[str, Any]:
        """Documents, their weights and routes, the combined route, and both answers.

        Args:
            k: how many documents are combined; None is what the store was trained for.

        Raises:
            InvalidInput: an empty or too long question, or a k that is not 1 to 20.
            StoreClosed: after :meth:`close`.
        """
        if not question.strip():
            raise InvalidInput("the question is empty")
        if len(question) > MAX_QUESTION:
            raise InvalidInput(f"the question has more than {MAX_QUESTION} characters")
        combination = self._store.spec.combination
        k = min(combination.k, MAX_DOCUMENTS) if k is None else k
        if not 1 <= k <= MAX_DOCUMENTS:
            raise InvalidInput(f"k is 1 to {MAX_DOCUMENTS}, not {k}")
        with self._one_at_a_time:
            self._go_on()
            started = time.perf_counter()
            hits = self._store.search(question, k)
            route, weights = self._combined(hits)
            answers: dict[str, str | None] = {"with_route": None, "without_route": None}
            if self._engine is not None:
                routes = [None] if route is None else [None, route]
                found = self._engine.answer([question] * len(routes), routes, on_text=self._go_on)
                answers = {"without_route": found[0], "with_route": found[1] if route is not None else None}
            seconds = time.perf_counter() - started
        documents = self._store.documents([hit.id for hit in hits])
        return {
            **answers,
            "seconds": seconds,
            "route": [] if route is None else facets_json(facets(self._store, route)),
            "documents": [
                {
                    "id": str(hit.id),
                    "title": document.title,
                    "text": document.text,
                    "score": hit.score,
                    "weight": weights.get(hit.id, 0.0),
                    "route": self._route(hit.id),
                }
                for hit, document in zip(hits, documents, strict=True)
            ],
        }

    def close(self) -> None:
        """End the question that is being answered, and take no other. The store and engine are left open.

        A thread in the middle of a model must not be there when the process ends: that would abort it.
        """
        self._closed = True
        with self._one_at_a_time:
            pass

    def _go_on(self, *piece: object) -> None:  # noqa: ARG002 - of a text, which is not shown before its end
        if self._closed:
            raise StoreClosed("polyprag explore has ended")

    def _combined(self, hits: list[Any]) -> tuple[Any, dict[Any, float]]:
        from polyprag.combining import combination_weights

        usable = [hit for hit in hits if self._store.is_routed(hit.id)]
        if not usable:
            return None, {}
        combination = self._store.spec.combination
        rule = cast("CombinationRule", combination.rule)
        weights = combination_weights([hit.score for hit in usable], rule, combination.temperature)
        ids = [hit.id for hit in usable]
        return self._store.combined_route(ids, weights), dict(zip(ids, map(float, weights), strict=True))

    def _route(self, id: str | int) -> list[dict[str, Any]]:
        if not self._store.is_routed(id):
            return []
        return facets_json(facets(self._store, self._store.routes([id])[0]))


class Server(ThreadingHTTPServer):
    """Serves one :class:`Explorer` until it is shut down."""

    daemon_threads = True

    def __init__(self, explorer: Explorer, port: int) -> None:
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{HOST}:{port}") from error
        self.explorer = explorer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing is said of a page that was closed before its answer came."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/"

    @property
    def hosts(self) -> set[str]:
        """What a Host header may be."""
        return {f"{name}:{self.server_port}" for name in (HOST, "localhost")}


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version = "polyprag"
    sys_version = ""
    timeout = _TIMEOUT

    def do_GET(self) -> None:
        if not self._is_for_us():
            return
        if self.path == "/about":
            self._json(HTTPStatus.OK, self.server.explorer.about())
        elif self.path in _FILES:
            name, kind = _FILES[self.path]
            self._send(HTTPStatus.OK, files("polyprag.explore").joinpath(name).read_bytes(), kind)
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})

    def do_POST(self) -> None:
        if not self._is_for_us():
            return
        if self.path != "/ask":
            self._json(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})
            return
        # A form of another site can send neither this kind nor its own name as ours.
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.server.hosts}:
            self._json(HTTPStatus.FORBIDDEN, {"error": "questions are taken from this page alone"})
            return
        if self.headers.get_content_type() != "application/json":
            self._json(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, {"error": "send JSON"})
            return
        length = self.headers.get("Content-Length", "")
        # More digits than any length has are no number: int() refuses thousands of them.
        if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > _MAX_BODY:
            self.close_connection = True
            self._json(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, {"error": "the question is too long"})
            return
        try:
            asked = json.loads(self.rfile.read(int(length)))
            question, k = asked["question"], asked.get("k")
            if not isinstance(question, str) or (k is not None and type(k) is not int):
                raise InvalidInput(_FORM)
            found = self.server.explorer.ask(question, k)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            said = (
                str(error) if isinstance(error, PolypragError) else "send {question: text, k: number or null}"
            )
            self._json(HTTPStatus.BAD_REQUEST, {"error": said})
        except PolypragError as error:
            self._json(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": str(error)})
        else:
            self._json(HTTPStatus.OK, found)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: what is asked is the user's own business."""

    def _is_for_us(self) -> bool:
        if self.headers.get("Host") in self.server.hosts:
            return True
        self._json(HTTPStatus.FORBIDDEN, {"error": "this server answers on this machine alone"})
        return False

    def _json(self, status: HTTPStatus, value: dict[str, Any]) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _send(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def open_server(explorer: Explorer, port: int = 0) -> Server:
    """A server on the loopback interface, which listens but does not serve yet; port 0 is any that is free.

    Raises:
        OSError: the port is taken.
    """
    return Server(explorer, port)
