"""The process: a socket, uvicorn, and signals that end it well."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from polyprag._polyprag import Store
from polyprag.engine import Engine
from polyprag.errors import InvalidInput
from polyprag.models import BaseModel
from polyprag.serving.app import ServeSettings, create_app

KEY_VARIABLE = "POLYPRAG_API_KEY"
_CONNECTIONS = 1_024


def serve(
    store: str | os.PathLike[str] | Store,
    model: str | os.PathLike[str] | BaseModel | None = None,
    settings: ServeSettings = ServeSettings(),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    allow_base_mismatch: bool = False,
    log_level: str = "info",
    ready: Callable[[str], object] = lambda url: None,
) -> None:
    """Serve a store until SIGTERM or Ctrl-C, which let the answers that run come to their end.

    Args:
        model, device, dtype, attention, allow_base_mismatch: as in :meth:`polyprag.Engine.open`.
        host: an address of this machine; the default can be reached from it alone.
        port: 0 takes any that is free.
        ready: called with the URL once the socket is open.

    Raises:
        OSError: the address is in use, or not this machine's.
        InvalidInput: the base model cannot be decoded in batches that change.
        Whatever ``Engine.open`` raises.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Before a model is loaded, so that an address that is in use is told at once.
        try:
            listening.bind((host, port))
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        url = f"http://{shown}:{listening.getsockname()[1]}/v1"
        opening = Engine.open(
            store,
            model,
            device=device,
            dtype=dtype,
            attention=attention,
            allow_base_mismatch=allow_base_mismatch,
        )
        with opening as engine:
            config = uvicorn.Config(
                create_app(engine, settings),
                log_level=log_level,
                server_header=False,
                limit_concurrency=_CONNECTIONS,
                timeout_graceful_shutdown=max(1, round(settings.grace)),
                lifespan="on",
            )
            _Server(config, lambda: ready(url)).run(sockets=[listening])


def api_key(file: Path | None = None) -> str | None:
    """The key that clients have to give: from ``file``, else from POLYPRAG_API_KEY, else none.

    Raises InvalidInput if there is no key in the file, or one that no header can hold.
    """
    where = f"the environment variable {KEY_VARIABLE}" if file is None else str(file)
    key = os.environ.get(KEY_VARIABLE) if file is None else file.read_text(encoding="utf-8")
    if key is None:
        return None
    key = key.strip()
    if not key or not (key.isascii() and key.isprintable()) or " " in key:
        raise InvalidInput(f"{where} holds no key: one word of ASCII is expected")
    return key


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's own, which raises the signal again at the end: stopping when told to is no failure."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
