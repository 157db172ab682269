"""What requests may say, what answers and errors look like: OpenAI's chat completions, and one more field.

What is asked for is done or refused, never passed over: an unknown field is an error, and so is a known one
that has no meaning here, unless its value asks for nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel as Model
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from polyprag.models import question_prompt
from polyprag.routing import CombinationRule

#: What the extension is called in requests and answers.
EXTENSION = "polyprag"

# Fields of OpenAI's that have no meaning here, and the values of each, as JSON, that ask for nothing.
_NOTHING: Mapping[str, tuple[str, ...]] = {
    "audio": ("null",),
    "frequency_penalty": ("null", "0", "0.0"),
    "function_call": ("null", '"none"'),
    "functions": ("null", "[]"),
    "logit_bias": ("null", "{}"),
    "logprobs": ("null", "false"),
    "modalities": ("null", '["text"]'),
    "parallel_tool_calls": ("null", "true", "false"),
    "prediction": ("null",),
    "presence_penalty": ("null", "0", "0.0"),
    "reasoning_effort": ("null", '"none"'),
    "response_format": ("null", '{"type": "text"}'),
    "service_tier": ("null", '"auto"', '"default"'),
    "store": ("null", "false"),
    "tool_choice": ("null", '"none"', '"auto"'),
    "tools": ("null", "[]"),
    "top_logprobs": ("null", "0"),
    "verbosity": ("null", '"medium"'),
    "web_search_options": ("null",),
}
# Fields that say who asks, and change no answer.
_LABELS = frozenset({"metadata", "prompt_cache_key", "safety_identifier", "user"})


class ApiError(Exception):
    """An error as OpenAI's clients expect it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Strict(Model):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One turn. ``system`` (or ``developer``) is put before everything, as it is.

    The fields behind ``name`` come where an answer is sent back as OpenAI's client has it; they are empty.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    tool_calls: list[Any] | None = Field(default=None, max_length=0)

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class StreamOptions(_Strict):
    """Of a stream: whether a last chunk says how many tokens there were."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Extension(_Strict):
    """The field ``polyprag`` of a request: which documents answer, and how.

    k, rule, temperature: as in :meth:`polyprag.Engine.ask`; None is what the store was trained for. filter:
    only documents whose metadata satisfies it, as in :meth:`polyprag.Store.search`.
    documents: ids, whose routes are combined instead of those that BM25 finds, with equal weights (``mean``)
    unless ``rule`` is ``sum`` or ``first``. combine: the texts of the first ``passages`` documents are put
    into the prompt as well (Combine). strength: what the combined route is multiplied by; None is 1, and
    beside passages :func:`polyprag.combining.strength_beside_passages`.
    """

    k: int | None = Field(default=None, ge=1, le=1000)
    rule: CombinationRule | None = None
    temperature: float | None = Field(default=None, gt=0)
    filter: dict[str, Any] | None = None
    documents: list[str | int] | None = Field(default=None, min_length=1, max_length=1000)
    combine: bool = False
    passages: int = Field(default=1, ge=1, le=100)
    strength: float | None = Field(default=None, ge=0, le=10)

    @model_validator(mode="after")
    def _one_way(self) -> Extension:
        if self.documents is not None:
            searching = self.k, self.temperature, self.filter
            if self.rule == "score" or any(value is not None for value in searching):
                raise ValueError(
                    "documents are given: k, temperature, filter and the rule 'score' are for what BM25 finds"
                )
            if len(set(map(str, self.documents))) < len(self.documents):
                raise ValueError("a document is named twice")
        return self


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    polyprag: Extension = Extension()

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in _NOTHING:
                if json.dumps(value) not in _NOTHING[name]:
                    raise _unsupported(name)
            elif name not in _LABELS:
                kept[name] = value
        return kept

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > 4 or not all(1 <= len(s) <= 256 for s in strings):
            raise ValueError("at most 4 strings of 1 to 256 characters")
        return value

    @field_validator("messages")
    @classmethod
    def _ends_with_a_question(cls, value: list[Message]) -> list[Message]:
        if value[-1].role != "user" or not value[-1].text.strip():
            raise ValueError("the last message has to be the user's, and not empty: it is the question")
        return value

    @model_validator(mode="after")
    def _usage_of_a_stream(self) -> ChatRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for streams")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @property
    def question(self) -> str:
        return self.messages[-1].text

    @property
    def limit(self) -> int | None:
        """The most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer. By default its first line is the answer, as in training."""
        if self.stop is None:
            return ("\n",)
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def prompt(self, passages: list[str]) -> str:
        """The conversation in the plain form that routes are trained in, passages before the question."""
        *before, last = self.messages
        text = "".join(f"{m.text.strip()}\n\n" for m in before if m.role in ("system", "developer"))
        open_question = False
        for message in before:
            if message.role == "user":
                text += "\n\n" if open_question else ""
                text += question_prompt(message.text)
                open_question = True
            elif message.role == "assistant":
                text += f" {message.text.strip()}\n\n"
                open_question = False
        text += "\n\n" if open_question else ""
        return text + question_prompt(last.text, passages)


def _unsupported(name: str) -> ApiError:
    return ApiError(
        400, f"{name} is not supported here; leave it out", code="unsupported_parameter", param=name
    )


def parse(body: bytes) -> ChatRequest:
    """A request from its JSON. Raises ApiError (400) that names the field."""
    try:
        values = json.loads(body)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no valid JSON: {error}", code="invalid_json") from error
    try:
        return ChatRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        # The place of an error also has the names of alternatives, which are no fields.
        where = ".".join(str(part) for part in first["loc"] if not _is_type(part))
        unknown = first["type"] == "extra_forbidden"
        message = "unknown field; leave it out" if unknown else first["msg"].removeprefix("Value error, ")
        raise ApiError(
            400,
            f"{where}: {message}" if where else message,
            code="unknown_parameter" if unknown else "invalid_value",
            param=where or None,
        ) from error


def _is_type(part: str | int) -> bool:
    return part in ("str", "int", "TextPart") or str(part).startswith("list[")


@dataclass(frozen=True)
class Head:
    """What the body of an answer, or each event of a stream, says of the whole. ``created``: Unix seconds."""

    id: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(
        self, choices: list[dict[str, Any]], usage: dict[str, int], more: dict[str, Any]
    ) -> dict[str, Any]:
        """The body of an answer."""
        return {**vars(self), "object": "chat.completion", "choices": choices, "usage": usage, **more}

    def chunk(self, choices: list[dict[str, Any]], more: Mapping[str, Any] = {}) -> dict[str, Any]:
        """One event of a stream."""
        return {**vars(self), "object": "chat.completion.chunk", "choices": choices, **more}
