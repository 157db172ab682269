"""A model behind an OpenAI-compatible endpoint writes the pairs and the rewrite.

A strong model needs no help with spans: it is asked for everything about a passage in one JSON answer.
Several documents are asked about at once; what may pass is tried again, and what will not is told with its
remedy.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import queue
import random
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx2 as httpx

from polyprag._polyprag import Document
from polyprag.augment.answer import Answer, parse_answer
from polyprag.augment.base import Augmentation, AugmentSettings
from polyprag.augment.checks import checked_rewrite, keep
from polyprag.errors import EndpointError, InvalidInput, PolypragError

# Raised when the same prompts would give other pairs.
VERSION = 1
KEY_VARIABLE = "OPENAI_API_KEY"

_ANSWERS = 3  # so often is a document asked about until an answer can be read
_PATIENCE = 4  # so many documents may come to nothing before the first that does not
_LONGEST_REPLY = 8 << 20
_LONGEST_PAUSE = 60.0
_MAY_PASS = frozenset({408, 409, 425, 429})
_OF_THE_DOCUMENT = frozenset({400, 413, 422})
# What a request does without where a server does not take it, or takes it under another name.
_INSTEAD = {
    "seed": None,
    "temperature": None,
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": None,
}


@dataclass(frozen=True)
class EndpointAugmenter:
    """Asks ``model`` at ``url``, ``concurrency`` documents at a time.

    Args:
        url: what the server calls its base, ``http://localhost:8000/v1`` say. No key belongs in it.
        model: its name there.
        key_variable: the environment variable with the key. Only the default one may be unset: many servers
            want no key.
        retries: how often one request is tried again after 408, 409, 425, 429, 5xx, a time-out or a broken
            connection: after ``backoff`` seconds, then twice that and so on up to a minute, or as long as
            the server asks for in Retry-After, if that is no more than ``longest_wait``.
        timeout: seconds that one answer may take, waiting in the server's queue included.
        max_tokens: the longest answer.
        passage_characters: what is sent of a longer passage.

    Raises:
        InvalidInput: the URL is none, or holds a password or a query; a number makes no sense.
    """

    url: str
    model: str
    key_variable: str = KEY_VARIABLE
    concurrency: int = 8
    retries: int = 6
    backoff: float = 1.0
    longest_wait: float = 300.0
    timeout: float = 600.0
    max_tokens: int = 4096
    passage_characters: int = 24_000

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
            httpx.URL(self.url)
        except (ValueError, httpx.InvalidURL):
            host, parts = None, urlsplit("")
        # Not named in full: what is wrong with it may be a password.
        if parts.scheme not in ("http", "https") or not host:
            raise InvalidInput("the endpoint's URL is none; it looks like http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise InvalidInput(
                f"the endpoint's URL at {host} holds more than scheme, host, port and path; give a key by "
                "an environment variable alone"
            )
        if not self.model:
            raise InvalidInput("the endpoint's model has no name; give the one that the server knows it by")
        for name in ("concurrency", "max_tokens", "passage_characters", "timeout", "longest_wait"):
            if not getattr(self, name) > 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected more than 0")
        for name in ("retries", "backoff"):
            if not getattr(self, name) >= 0:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected 0 or more")

    @property
    def name(self) -> str:
        return self.model

    @property
    def target(self) -> str:
        """The URL that is asked."""
        base = self.url.rstrip("/")
        return base if base.endswith("/chat/completions") else f"{base}/chat/completions"

    def making(self, settings: AugmentSettings) -> tuple[object, ...]:
        s, p = settings, settings.prompts
        asked = p.endpoint_pairs_and_rewrite if s.rewrite else p.endpoint_pairs
        prompts = (p.endpoint_system, asked, p.endpoint_yes_no if s.yes_no else "")
        limits = (self.max_tokens, self.passage_characters)
        return ("endpoint", VERSION, self.model, s.pairs, s.rewrite, s.temperature, s.seed, limits, prompts)

    def write(
        self, documents: Sequence[Document], todo: Sequence[Document], settings: AugmentSettings
    ) -> Generator[Sequence[Augmentation], None, None]:
        run = _Run(self, settings, resumed=len(todo) < len(documents))
        thread = threading.Thread(target=run.work, args=(todo,), name="polyprag-augment", daemon=True)
        thread.start()
        try:
            while (first := run.results.get()) is not None:
                yield [first, *run.waiting()]
        except KeyboardInterrupt:
            run.stop()
            thread.join()
            if rest := [*run.waiting()]:
                yield rest  # it may have been paid for
            raise
        finally:
            run.stop()
            thread.join()
        if run.error is not None:
            raise run.error

    def key(self) -> str | None:
        """The key of the environment.

        Raises:
            InvalidInput: the variable is not set and not the default one, or can be no key.
        """
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            if self.key_variable != KEY_VARIABLE:
                raise InvalidInput(
                    f"the environment variable {self.key_variable} is not set; put the key there"
                )
            return None
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise InvalidInput(f"the environment variable {self.key_variable} holds no key; set it anew")
        return key


class _Reply(NamedTuple):
    status: int
    retry_after: str | None
    content: bytes


class _Refused(Exception):
    """The server takes other documents, but not this one."""


class _Run:
    """One call of ``write``: an event loop in a thread of its own, so that it runs beside any other loop."""

    def __init__(self, augmenter: EndpointAugmenter, settings: AugmentSettings, *, resumed: bool) -> None:
        self.augmenter, self.settings = augmenter, settings
        self.key = augmenter.key()
        self.results: queue.SimpleQueue[Augmentation | None] = queue.SimpleQueue()
        self.error: BaseException | None = None
        self.answered = False  # whether any answer came in this run
        self.proven = resumed  # whether any document has come to something
        self.held: list[Augmentation] = []  # those that came to nothing before that
        self.last_failure = ""
        self.asking = 0  # documents that are asked about just now
        self.settled = asyncio.Event()  # whether it is known that something comes, or that nothing does
        self.instead: dict[str, str | None] = {}
        self.not_before = 0.0
        self.begun = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.task: asyncio.Task[None] | None = None

    def waiting(self) -> Iterator[Augmentation]:
        """The results that are here already."""
        while True:
            try:
                result = self.results.get_nowait()
            except queue.Empty:
                return
            if result is None:
                self.results.put(None)  # for who waits for the end
                return
            yield result

    def work(self, todo: Sequence[Document]) -> None:
        try:
            asyncio.run(self._all(todo))
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked
            self._end(error)
        finally:
            self.begun.set()
            self.results.put(None)

    def stop(self) -> None:
        """Break off whatever is being asked."""
        self.begun.wait()
        if self.loop is not None and self.task is not None:
            with suppress(RuntimeError):  # it has ended by itself
                self.loop.call_soon_threadsafe(self.task.cancel)

    def _end(self, error: BaseException) -> None:
        """Remember the first failure; the others follow from it, or are the same."""
        if self.error is None:
            self.error = error

    async def _all(self, todo: Sequence[Document]) -> None:
        self.loop, self.task = asyncio.get_running_loop(), asyncio.current_task()
        self.begun.set()
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        count = min(self.augmenter.concurrency, len(todo))
        async with httpx.AsyncClient(
            headers=headers,
            timeout=httpx.Timeout(self.augmenter.timeout, connect=30.0),
            limits=httpx.Limits(max_connections=count, max_keepalive_connections=count),
        ) as client:
            pending = iter(todo)
            await asyncio.gather(*(self._worker(client, pending) for _ in range(count)))
        if self.held and self.error is None:
            raise self._nothing_useful()

    async def _worker(self, client: httpx.AsyncClient, pending: Iterator[Document]) -> None:
        for document in pending:
            if not (document.text or "").strip():
                self.results.put(Augmentation(document.id))  # there is nothing to ask about
                continue
            if len(self.held) >= _PATIENCE:
                # Refusals come fast: what the others have asked for will tell.
                await self.settled.wait()
            if self.error is not None:
                return
            self.asking += 1
            try:
                result = await self._document(client, document)
            except PolypragError as error:
                # What the others have asked for may still come; nobody asks for more.
                self._end(error)
            else:
                self._take(result)
            finally:
                self.asking -= 1
                self._settle()

    def _take(self, result: Augmentation) -> None:
        """Pass a result on; but not before one has come to something: the fault may not be the document's."""
        failed = not {"refused", "unreadable_answer"}.isdisjoint(result.dropped)
        if failed and not self.proven:
            self.held.append(result)
            return
        self.proven = True
        for ready in (*self.held, result):
            self.results.put(ready)
        self.held.clear()

    def _settle(self) -> None:
        if len(self.held) >= _PATIENCE and not self.asking:
            self._end(self._nothing_useful())
        if self.proven or self.error is not None:
            self.settled.set()

    def _nothing_useful(self) -> EndpointError:
        return EndpointError(
            f"{self.augmenter.target}: nothing came of the first {len(self.held)} documents "
            f"(model {self.augmenter.model}); the last time: {self.last_failure}"
        )

    async def _document(self, client: httpx.AsyncClient, document: Document) -> Augmentation:
        passage = (document.text or "").strip()
        answer: Answer | None = None
        for attempt in range(_ANSWERS):
            try:
                text = await self._ask(client, self._request(document, passage, attempt))
            except _Refused as refusal:
                self.last_failure = (
                    f"{refusal}; look at the model's name and the longest prompt that it takes"
                )
                return Augmentation(document.id, dropped={"refused": 1})
            answer = parse_answer(text)
            if answer is not None:
                break
            shown = " ".join(text.split())
            if len(shown) > 170:
                shown = f"{shown[:80]} ... {shown[-80:]}"
            self.last_failure = f"no pair in its answer {shown!r}; take a stronger model, or other prompts"
        if answer is None:
            return Augmentation(document.id, dropped={"unreadable_answer": 1})
        kept, dropped = keep(document, answer.pairs, self.settings)
        if answer.malformed:
            dropped["malformed"] = dropped.get("malformed", 0) + answer.malformed
        rewrite = None
        if self.settings.rewrite:
            rewrite = checked_rewrite(passage, answer.rewrite or "")
            dropped |= {"rewrite": 1} if rewrite is None else {}
        return Augmentation(document.id, tuple(kept), rewrite, dropped)

    def _request(self, document: Document, passage: str, attempt: int) -> dict[str, Any]:
        settings, prompts = self.settings, self.settings.prompts
        message = prompts.fill(
            "endpoint_pairs_and_rewrite" if settings.rewrite else "endpoint_pairs",
            title=document.title or "(none)",
            passage=passage[: self.augmenter.passage_characters],
            # A quarter more than are kept, since some will not hold.
            pairs=settings.pairs * 5 // 4,
        )
        if settings.yes_no:
            message = f"{message.rstrip()}\n\n{prompts.endpoint_yes_no}"
        messages = [{"role": "user", "content": message}]
        if prompts.endpoint_system.strip():
            messages.insert(0, {"role": "system", "content": prompts.endpoint_system})
        request = {
            "model": self.augmenter.model,
            "messages": messages,
            "max_tokens": self.augmenter.max_tokens,
            "seed": settings.seed + attempt,
        }
        if settings.temperature is not None:
            request["temperature"] = settings.temperature
        return request

    async def _ask(self, client: httpx.AsyncClient, request: dict[str, Any]) -> str:
        """The text of the model's answer.

        Raises:
            _Refused: not for this request.
            EndpointError: not for any, or not after all retries.
        """
        instead = dict(self.instead)
        tries, problem = 0, ""
        while tries <= self.augmenter.retries:
            if tries:
                pause = min(self.augmenter.backoff * 2 ** (tries - 1), _LONGEST_PAUSE)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            while (wait := self.not_before - time.monotonic()) > 0:  # noqa: ASYNC110 - it may move
                await asyncio.sleep(wait)
            if self.error is not None:
                raise EndpointError("stopped, because another request failed for good")
            tries += 1
            try:
                sent = _renamed(request, instead)
                reply = await asyncio.wait_for(self._post(client, sent), self.augmenter.timeout)
            except httpx.ConnectError as error:
                if not self.answered:
                    raise self._fails(f"cannot connect ({error})", "is the server running there?") from error
                problem = f"cannot connect ({error})"
                continue
            except httpx.RequestError as error:
                problem = f"the connection broke ({type(error).__name__}: {error})"
                continue
            except asyncio.TimeoutError:
                problem = f"no answer within {self.augmenter.timeout:g} seconds"
                continue
            if reply.status == 200:
                text, problem = _text_of(reply.content)
                if text is not None:
                    self.answered = True
                    return text
                problem = f"status 200, but {self._safe(problem)}"
                continue
            said = self._safe(_message(reply.content))
            problem = f"status {reply.status} ({said})"
            if reply.status in _MAY_PASS or reply.status >= 500:
                self._wait_as_asked(reply)
            elif reply.status in _OF_THE_DOCUMENT:
                unwanted = next((n for n in _INSTEAD if n in sent and _names(said, n)), None)
                if unwanted is None:
                    raise _Refused(problem)
                instead[unwanted] = _INSTEAD[unwanted]
                if not self.answered:
                    self.instead |= instead
                tries -= 1
            else:
                raise self._fails(problem, self._remedy(reply.status))
        raise self._fails(
            f"gave up after {tries} tries; the last time: {problem}",
            "look at the server, or ask for less at once; the same call goes on from here",
        )

    async def _post(self, client: httpx.AsyncClient, request: dict[str, Any]) -> _Reply:
        async with client.stream("POST", self.augmenter.target, json=request) as response:
            content = bytearray()
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > _LONGEST_REPLY:
                    break
            return _Reply(response.status_code, response.headers.get("retry-after"), bytes(content))

    def _wait_as_asked(self, reply: _Reply) -> None:
        """Nobody asks again before the time that the server named."""
        seconds = _seconds(reply.retry_after)
        if seconds > self.augmenter.longest_wait:
            raise self._fails(
                f"status {reply.status}, and to be asked again in {seconds:.0f} seconds",
                "run the same again then; what was written is kept",
            )
        self.not_before = max(self.not_before, time.monotonic() + seconds)

    def _fails(self, problem: str, remedy: str) -> EndpointError:
        return EndpointError(f"{self.augmenter.target} (model {self.augmenter.model}): {problem}; {remedy}")

    def _remedy(self, status: int) -> str:
        if status in (401, 403):
            held = "holds the key that was sent" if self.key else "is not set, so no key was sent"
            return f"the environment variable {self.augmenter.key_variable} {held}"
        if status in (404, 405):
            return "look at the model's name, and at the URL, which mostly ends in /v1"
        if 300 <= status < 400:
            return "the server is elsewhere: give its new URL"
        return "look at what the server says"

    def _safe(self, text: str) -> str:
        """A server's words, in which it may repeat the key."""
        return text.replace(self.key, "***") if self.key else text


def _renamed(request: dict[str, Any], instead: dict[str, str | None]) -> dict[str, Any]:
    sent = dict(request)
    for name in _INSTEAD:  # in this order: one may be renamed twice
        if name in sent and name in instead:
            value, other = sent.pop(name), instead[name]
            if other is not None:
                sent[other] = value
    return sent


def _names(message: str, name: str) -> bool:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in message.lower())
    return name in words.split()


def _text_of(content: bytes) -> tuple[str | None, str]:
    """(the text of a chat completion, "") or (None, what is wrong)."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None, f"no JSON: {_message(content)}"
    try:
        text = value["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None, f"no chat completion: {_message(content)}"
    if isinstance(text, list):  # parts, each with a text
        text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
    return (text if isinstance(text, str) else ""), ""


def _message(content: bytes) -> str:
    """What a server says of an error, in one short line."""
    try:
        value = json.loads(content)
        error = value.get("error", value)
        said = error if isinstance(error, str) else error.get("message") or error.get("detail") or value
        text = said if isinstance(said, str) else json.dumps(said)
    except (ValueError, AttributeError, RecursionError):
        text = content[:2000].decode("utf-8", "replace")
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 300 else line[:300] + " ..."


def _seconds(retry_after: str | None) -> float:
    """Seconds in a Retry-After header, which has them or a date; 0 if it says nothing."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except (ValueError, TypeError, OverflowError):
            return 0.0
        zone = date.tzinfo or timezone.utc
        seconds = (date.replace(tzinfo=zone) - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, seconds) if math.isfinite(seconds) else 0.0
