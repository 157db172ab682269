"""A chat/completions server on this machine that does what a test tells it: answer, fail, wait, babble."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """What the server sends: bytes as they are, anything else as JSON."""

    body: Any
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


def completion(content: Any) -> Reply:
    """A reply in which the model says ``content``."""
    return Reply(
        {"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}]}
    )


class Chat:
    """Keeps what was asked, and how many asked at once."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply]) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.now = self.most = 0
        self.url = ""
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def begin(self, path: str, headers: dict[str, str], body: bytes) -> tuple[dict[str, Any], int]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            request = json.loads(body)
            self.asked.append(request)
            self.headers.append(headers)
            self.paths.append(path)
            return request, len(self.asked)

    def end(self) -> None:
        with self.lock:
            self.now -= 1


@contextmanager
def chat(answer: Callable[[dict[str, Any], int], Reply]) -> Iterator[Chat]:
    """Serve ``answer(request, number from 1)`` at ``chat.url``."""
    state = Chat(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request, number = state.begin(self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            try:
                reply = state.answer(request, number)
            finally:
                state.end()
            content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for name, value in reply.headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:  # nobody waits for it any more
                self.close_connection = True

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()  # for answers that wait
        server.shutdown()
        server.server_close()
        thread.join()
