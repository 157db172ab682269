"""The HTTP side: an ASGI application in front of one engine."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import secrets
import signal
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polyprag import __version__
from polyprag.engine import ANSWERS, Engine
from polyprag.errors import InvalidInput, PolypragError, StoreError, UnknownId, Unrouted
from polyprag.jsonl import last_name
from polyprag.models import context_length
from polyprag.serving.decode import Finish, Sampling, check
from polyprag.serving.library import Found, Library
from polyprag.serving.meters import Meters
from polyprag.serving.protocol import EXTENSION, ApiError, ChatRequest, Head, parse
from polyprag.serving.scheduler import Full, Place, Scheduler, Stopped

_log = logging.getLogger(__name__)

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
_OPEN = ("/health",)  # may be asked without the key


@dataclass(frozen=True)
class ServeSettings:
    """How a store is served.

    Args:
        name: of the model, as requests give it; None is the store's folder without its suffix.
        max_batch: rows that are decoded together; an answer with n choices has n rows.
        max_waiting: rows that may wait for a place; more are refused with 429.
        max_tokens: the most that a request may ask for.
        max_choices: the largest n.
        max_body: bytes of a request.
        max_cached_tokens: rows of a batch times the longest of them, prompt and answer: what bounds the
            memory of keys and values, and the length of one request.
        timeout: seconds of one answer, waiting included.
        grace: seconds that running answers have when the server is told to stop.
        poll: seconds between two looks for a new generation of the store; 0: only on SIGHUP.
        api_key: what ``Authorization: Bearer`` has to hold; None lets everybody in who can connect.
        allowed_hosts: names that a Host header may have besides localhost and addresses in numbers;
            ``*`` for all.

    Raises:
        InvalidInput: a number that makes no sense.
    """

    name: str | None = None
    max_batch: int = 16
    max_waiting: int = 64
    max_tokens: int = 512
    max_choices: int = 8
    max_body: int = 1 << 20
    max_cached_tokens: int = 1 << 16
    timeout: float = 120.0
    grace: float = 30.0
    poll: float = 5.0
    api_key: str | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_tokens", "max_choices", "max_body", "max_cached_tokens", "timeout"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected more than 0")
        for name in ("max_waiting", "grace", "poll"):
            if not getattr(self, name) >= 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected 0 or more")


def create_app(engine: Engine, settings: ServeSettings = ServeSettings()) -> Starlette:
    """An ASGI application that answers from ``engine``, for a server of one's own: one process, one loop.

    The engine is the application's alone while that runs, and is left open. The server has to pass on
    lifespan events.

    Raises:
        InvalidInput: the base model cannot be decoded in batches that change.
    """
    return _Service(engine, settings).app


class _Service:
    def __init__(self, engine: Engine, settings: ServeSettings) -> None:
        check(engine.base, engine.routed)
        self.engine, self.settings = engine, settings
        self.library = Library(engine)
        self.name = settings.name or last_name(engine.store.path).removesuffix(".polyprag")
        self.meters = Meters()
        self.scheduler: Scheduler | None = None
        self.began = int(time.time())
        self.longest = min(
            context_length(engine.base) or settings.max_cached_tokens, settings.max_cached_tokens
        )
        self._reload = asyncio.Event()
        self._refused = ""
        follow = self.meters.follow
        follow(
            "running_rows",
            "Rows that are decoded now.",
            lambda: self.scheduler.running if self.scheduler else 0,
        )
        follow(
            "waiting_rows",
            "Rows that wait for a place.",
            lambda: self.scheduler.waiting if self.scheduler else 0,
        )
        follow("store_generation", "Generation that answers.", lambda: self.library.store.generation)
        follow("store_documents", "Documents of it.", lambda: len(self.library.store))
        routes = [
            Route(CHAT, self.chat, methods=["POST"]),
            Route(MODELS, self.models, methods=["GET"]),
            Route(MODELS + "/{id:path}", self.model, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]
        errors: dict[Any, Any] = {ApiError: _api_error, HTTPException: _http_error, Exception: _server_error}
        self.app = Starlette(routes=routes, exception_handlers=errors, lifespan=self.lifespan)
        self.app.add_middleware(_Guard, settings=settings, meters=self.meters)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:  # noqa: ARG002 - as called
        s = self.settings
        self.scheduler = Scheduler(
            self.engine.base,
            self.engine.routed,
            max_batch=s.max_batch,
            max_waiting=s.max_waiting,
            max_cached_tokens=s.max_cached_tokens,
            meter=self.meters,
        )
        loop = asyncio.get_running_loop()
        hung_up = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP")
        if hung_up:
            loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        watching = asyncio.create_task(self.watch())
        try:
            yield
        finally:
            watching.cancel()
            if hung_up:
                loop.remove_signal_handler(signal.SIGHUP)
            with suppress(asyncio.CancelledError):
                await watching
            # Who is still answered has been waited for, or has had its grace.
            await run_in_threadpool(self.scheduler.close, finish=False)

    async def watch(self) -> None:
        """Take over new generations of the store as they come."""
        while True:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._reload.wait(), self.settings.poll or None)
            self._reload.clear()
            try:
                new = await run_in_threadpool(self.library.reload)
            except (PolypragError, OSError) as error:
                self.meters.reloads.labels("refused").inc()
                if str(error) != self._refused:  # once, not at every look
                    _log.warning("the store was not loaded again: %s", error)
                self._refused = str(error)
            else:
                self._refused = ""
                if new:
                    self.meters.reloads.labels("done").inc()
                    _log.info("generation %d of the store", self.library.store.generation)

    # -- endpoints -------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type != "application/json":
            # What a page of another site can send without asking is never JSON.
            raise ApiError(415, "the body has to be application/json", code="unsupported_media_type")
        with anyio.move_on_after(self.settings.timeout) as scope:
            body = await _body(request, self.settings.max_body)
        if scope.cancelled_caught:
            raise ApiError(408, "the body did not come in time", code="timeout")
        asked = parse(body)
        if asked.model != self.name:
            raise ApiError(
                404,
                f"there is no model {asked.model!r} here, but {self.name!r}",
                code="model_not_found",
                param="model",
            )
        answer = _Answer(self, asked, time.perf_counter())
        if asked.stream:
            # What can be refused is refused before the first byte.
            await answer.begin()
            return _Stream(answer)
        return await self._unless_disconnected(request, answer)

    async def _unless_disconnected(self, request: Request, answer: _Answer) -> Response:
        """The whole answer; if nobody waits for it any more, its place is given up."""
        result: Response | None = None
        async with anyio.create_task_group() as tasks:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                tasks.cancel_scope.cancel()

            tasks.start_soon(watch)
            try:
                result = JSONResponse(await answer.whole())
            except ApiError as error:
                # Out of the group as itself, not as a group of errors.
                result = _error(error)
            tasks.cancel_scope.cancel()
        if result is None:
            raise ClientDisconnect
        return result

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["id"] != self.name:
            raise ApiError(404, f"there is no such model here, but {self.name!r}", code="model_not_found")
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        store = self.library.store
        more = {"base_model": self.engine.base.name, "documents": len(store), "generation": store.generation}
        return {
            "id": self.name,
            "object": "model",
            "created": self.began,
            "owned_by": "polyprag",
            "max_model_len": self.longest,
            EXTENSION: more,
        }

    async def health(self, request: Request) -> Response:  # noqa: ARG002
        scheduler, store = self.scheduler, self.library.store
        alive = scheduler is not None and scheduler.alive
        body = {
            "status": "ok" if alive else "failed",
            "version": __version__,
            "generation": store.generation,
            "documents": len(store),
            "running": scheduler.running if scheduler else 0,
            "waiting": scheduler.waiting if scheduler else 0,
        }
        return JSONResponse(body, status_code=200 if alive else 503)

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002
        return Response(self.meters.text(), media_type=self.meters.content_type)


class _Answer:
    """One request: its documents, its rows, and what they say."""

    def __init__(self, service: _Service, asked: ChatRequest, began: float) -> None:
        self.service, self.asked, self.began = service, asked, began
        self.head = Head(f"chatcmpl-{uuid.uuid4().hex}", service.name)
        self.rows: list[Place] = []
        self.found: Found | None = None
        self._said: asyncio.Queue[tuple[Place, str, Finish | None]] = asyncio.Queue()
        self._silent = True

    async def begin(self) -> None:
        """Find documents and take places. Raises ApiError."""
        service, asked = self.service, self.asked
        started = time.perf_counter()
        found, ids = await run_in_threadpool(self._find)
        self.found = found
        service.meters.find_seconds.observe(time.perf_counter() - started)
        limit = self._limit(len(ids))
        loop = asyncio.get_running_loop()

        def tell(row: Place, text: str, finish: Finish | None) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(self._said.put_nowait, (row, text, finish))

        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        rows = [
            Place(
                ids=ids,
                route=found.route,
                limit=limit,
                stop=asked.stops,
                sampling=Sampling(asked.temperature or 0.0, asked.top_p or 1.0, (seed + number) % (1 << 63)),
                tell=tell,
            )
            for number in range(self._choices())
        ]
        if service.scheduler is None:
            raise ApiError(503, "the server has not started", code="unavailable")
        try:
            service.scheduler.submit(rows)
        except Full as full:
            raise ApiError(
                429,
                "too many requests wait already; try again later",
                code="queue_full",
                headers={"Retry-After": str(full.retry_after)},
            ) from full
        except Stopped as stopped:
            raise ApiError(503, "the server is stopping", code="unavailable") from stopped
        self.rows = rows  # which have places now, that can be given up
        service.meters.tokens.labels("prompt").inc(len(ids))

    def _choices(self) -> int:
        n, most = self.asked.n or 1, self.service.settings.max_choices
        if n > most:
            raise ApiError(400, f"n is at most {most} here", code="invalid_value", param="n")
        return n

    def _limit(self, prompt: int) -> int:
        """The most tokens that are generated. Raises ApiError if that is too many."""
        longest, most = self.service.longest, self.service.settings.max_tokens
        limit = self.asked.limit or min(ANSWERS.max_new_tokens, most)
        if limit > most:
            raise ApiError(
                400, f"max_tokens is at most {most} here", code="invalid_value", param="max_tokens"
            )
        if prompt + limit > longest:
            raise ApiError(
                400,
                f"there is room for {longest} tokens, but the prompt has {prompt} and the answer {limit}",
                code="context_length_exceeded",
                param="messages",
            )
        return limit

    def _find(self) -> tuple[Found, list[int]]:
        asked = self.asked
        try:
            found = self.service.library.find(asked.question, asked.polyprag)
        except (UnknownId, Unrouted, InvalidInput) as error:
            raise ApiError(400, str(error), code="invalid_value", param=EXTENSION) from error
        except StoreError as error:
            _log.error("%s", error)
            raise ApiError(500, "the store cannot be read", code="store_error") from error
        return found, self.service.engine.base.tokenizer(asked.prompt(found.passages)).input_ids

    async def _saying(self) -> AsyncIterator[tuple[int, str, Finish | None]]:
        """(choice, new text, why it ended) until all choices have ended. Raises ApiError."""
        numbers = {row: number for number, row in enumerate(self.rows)}
        open_rows = len(self.rows)
        meters = self.service.meters
        while open_rows:
            left = self.began + self.service.settings.timeout - time.perf_counter()
            try:
                row, text, finish = await asyncio.wait_for(self._said.get(), max(left, 0.0))
            except asyncio.TimeoutError:
                raise ApiError(504, "the answer did not come in time", code="timeout") from None
            if finish == "error":
                raise ApiError(500, "the model failed on this request", code="model_error")
            if self._silent:
                self._silent = False
                meters.first_token_seconds.observe(time.perf_counter() - self.began)
            if finish is not None:
                open_rows -= 1
                meters.tokens.labels("generated").inc(len(row.new))
            yield numbers[row], text, finish

    def give_up(self) -> None:
        """Free the places, if any are taken still."""
        if self.service.scheduler is not None and any(row.finish is None for row in self.rows):
            self.service.scheduler.cancel(self.rows)
            self.service.meters.given_up.inc()

    async def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        try:
            await self.begin()
            reasons: list[Finish | None] = [None] * len(self.rows)
            async for number, _, finish in self._saying():
                reasons[number] = finish or reasons[number]
        finally:
            self.give_up()
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": row.text, "refusal": None},
                "finish_reason": reason,
                "logprobs": None,
            }
            for number, (row, reason) in enumerate(zip(self.rows, reasons, strict=True))
        ]
        return self.head.completion(choices, self._usage(), self._more())

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events, as it grows."""
        first = [_delta(number, {"role": "assistant", "content": ""}) for number in range(len(self.rows))]
        yield _event(self.head.chunk(first, self._more()))
        try:
            async for number, text, finish in self._saying():
                if text:
                    yield _event(self.head.chunk([_delta(number, {"content": text})]))
                if finish is not None:
                    yield _event(self.head.chunk([_delta(number, {}, finish)]))
        except ApiError as error:
            # The status has been sent; this is what clients look for.
            yield _event(error.to_json())
            return
        options = self.asked.stream_options
        if options is not None and options.include_usage:
            yield _event(self.head.chunk([], {"usage": self._usage()}))
        yield "data: [DONE]\n\n"

    def _usage(self) -> dict[str, int]:
        prompt, generated = len(self.rows[0].ids), sum(len(row.new) for row in self.rows)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}

    def _more(self) -> dict[str, Any]:
        if self.found is None:
            return {}
        generation = self.found.generation
        return {
            "system_fingerprint": f"polyprag-{__version__}-generation-{generation}",
            EXTENSION: {"documents": self.found.sources, "generation": generation},
        }


class _Stream(StreamingResponse):
    """The events of an answer, whose places are given up however it ends."""

    def __init__(self, answer: _Answer) -> None:
        super().__init__(
            answer.events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.give_up()


def _delta(number: int, delta: dict[str, Any], finish: Finish | None = None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "finish_reason": finish, "logprobs": None}


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _body(request: Request, most: int) -> bytes:
    """The body, as long as it is no longer than ``most``; what is too long is not read to its end."""
    too_long = ApiError(413, f"the body is longer than {most:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise too_long
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > most:
            raise too_long
    return bytes(read)


def _error(error: ApiError) -> Response:
    return JSONResponse(error.to_json(), status_code=error.status, headers=error.headers)


async def _api_error(request: Request, error: ApiError) -> Response:  # noqa: ARG001 - as called
    return _error(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    codes = {404: "not_found", 405: "method_not_allowed"}
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = codes.get(error.status_code, "http_error")
    return _error(ApiError(error.status_code, message, code=code, headers=error.headers))


async def _server_error(request: Request, error: Exception) -> Response:  # noqa: ARG001
    return _error(ApiError(500, "something went wrong here", code="internal_error"))


class _Guard:
    """Lets in who may ask, by Host and key, and counts what came of it."""

    def __init__(self, app: ASGIApp, *, settings: ServeSettings, meters: Meters) -> None:
        self.app, self.meters = app, meters
        self.hosts = {host.lower() for host in settings.allowed_hosts}
        self.key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 499

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        refusal = self._refusal(scope)
        try:
            if refusal is not None:
                await _error(refusal)(scope, receive, counting)
            else:
                await self.app(scope, receive, counting)
        except ClientDisconnect:
            pass
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in (CHAT, MODELS, "/health", "/metrics") else "other"
            self.meters.requests.labels(path, str(status)).inc()
            self.meters.request_seconds.labels(path).observe(time.perf_counter() - began)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._known(host):
            # A page elsewhere whose name was pointed at this address comes with that name.
            return ApiError(
                403, f"the Host {host[:100]!r} is not served here; allow it by name", code="host_not_allowed"
            )
        if self.key is None or scope["path"] in _OPEN:
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.key):
            return ApiError(
                401,
                "a key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _known(self, host: str) -> bool:
        if "*" in self.hosts:
            return True
        name, colon, port = host.rpartition(":")
        name = (name if colon and port.isdecimal() else host).lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or name in self.hosts:
            return True
        try:
            # Nobody can point an address in numbers at another one.
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True
