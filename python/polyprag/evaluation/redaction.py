"""Secrets are taken out of everything that is written to be shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"

_SECRET_NAME = re.compile(
    r"(?:(?:^|[^a-z])(?:key|auth|cookie|pwd)|(?:api|access|private)key|authorization|token|secret"
    r"|pass(?:word|wd|phrase)|credential|connection_string)s?$",
    re.IGNORECASE,
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Names of fields of ours that end so and are no secrets.
_HARMLESS = frozenset({"prompt_tokens", "new_tokens", "max_new_tokens", "passage_tokens"})
_FOLDER = "PWD"  # of a shell, and no secret
_SHORTEST = 8  # of a value that is looked for: "1" or "true" would be found everywhere

_FORMS = re.compile(
    r"(?:\bsk-[\w-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bxox[abpr]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bglpat-[\w-]{16,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|(?<=Bearer )[\w.~+/-]{8,}=*"
    # A port is no password. A password may hold any of the signs that ought to be escaped in it.
    r"|(?<=://)[^/\s:@]*:(?!\d{1,5}[/?#])[^\s@\"'<>]+(?:@[^/\s@\"'<>]+)*(?=@))"
)
# What stays, and the secret behind it. Of a bearer in prose the next word is no token.
_BEHIND = re.compile(
    r"(\bbearer +)(?=\S*\d|\S{20})[\w.~+/-]{8,}=*"
    r"|(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|digest|token|apikey)\s+)[^\s\"',\[][^\s\"',]*",
    re.IGNORECASE,
)
_PARAMETER = re.compile(r"(?<=[?&])([\w.-]+)=([^&\s#\"'<>]+)")
_SIGNATURE = re.compile(r"(?:^|[^a-z])sig(?:nature)?$", re.IGNORECASE)


def redacted(value: Any) -> Any:
    """A JSON value without secrets.

    Taken out are the values of environment variables that are named as secrets (``OPENAI_API_KEY``), texts in
    the form of well-known keys, passwords and keys in addresses, what an ``Authorization`` sends, and
    whatever stands under a name such as ``api_key`` or ``apiKey``.
    """
    secrets = sorted(
        {v for n, v in os.environ.items() if _named_secret(n) and n != _FOLDER and len(v) >= _SHORTEST},
        key=len,
        reverse=True,
    )
    known = re.compile("|".join(map(re.escape, secrets))) if secrets else None
    return _redacted(value, known)


def _redacted(value: Any, known: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        text = known.sub(HIDDEN, value) if known is not None else value
        text = _BEHIND.sub(lambda m: f"{m[1] or m[2]}{HIDDEN}", _FORMS.sub(HIDDEN, text))
        return _PARAMETER.sub(_parameter, text)
    if isinstance(value, Mapping):
        return {
            _redacted(name, known): HIDDEN if _is_secret(name, inner) else _redacted(inner, known)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(inner, known) for inner in value]
    return value


def _parameter(match: re.Match[str]) -> str:
    name = match[1]
    return f"{name}={HIDDEN}" if _named_secret(name) or _SIGNATURE.search(name) else match[0]


def _named_secret(name: str) -> bool:
    return _SECRET_NAME.search(_CAMEL.sub("_", name)) is not None


def _is_secret(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, str) and name not in _HARMLESS and _named_secret(name)
