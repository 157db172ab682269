"""Secrets are taken out of everything that is written to be shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[redacted]"

_SECRET_NAME = re.compile(
    r"(?:(?:^|[^a-z])(?:key|auth|cookie)|token|secret|pass(?:word|wd|phrase)|credential|connection_string)s?$",
    re.IGNORECASE,
)
# Names of fields of ours that end so and are no secrets.
_HARMLESS = frozenset({"prompt_tokens", "new_tokens", "max_new_tokens", "passage_tokens"})
_SHORTEST = 8  # of a value that is looked for: "1" or "true" would be found everywhere

_FORMS = re.compile(
    r"(?:\bsk-[\w-]{16,}|\bhf_[A-Za-z0-9]{16,}|\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bxox[abpr]-[\w-]{10,}|\bAKIA[0-9A-Z]{16}\b|\bAIza[\w-]{30,}|\bglpat-[\w-]{16,}"
    r"|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|(?<=Bearer )[\w.~+/-]{8,}=*|(?<=://)[^/\s:@]+:[^/\s:@]+(?=@))"
)


def redacted(value: Any) -> Any:
    """A JSON value without secrets.

    Taken out are the values of environment variables that are named as secrets (``OPENAI_API_KEY``), texts in
    the form of well-known keys, passwords in addresses, and whatever stands under a name such as ``api_key``.
    """
    secrets = sorted(
        {v for name, v in os.environ.items() if _SECRET_NAME.search(name) and len(v) >= _SHORTEST},
        key=len,
        reverse=True,
    )
    known = re.compile("|".join(map(re.escape, secrets))) if secrets else None
    return _redacted(value, known)


def _redacted(value: Any, known: re.Pattern[str] | None) -> Any:
    if isinstance(value, str):
        text = known.sub(HIDDEN, value) if known is not None else value
        return _FORMS.sub(HIDDEN, text)
    if isinstance(value, Mapping):
        return {
            _redacted(name, known): HIDDEN if _is_secret(name, inner) else _redacted(inner, known)
            for name, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(inner, known) for inner in value]
    return value


def _is_secret(name: object, value: object) -> bool:
    return (
        isinstance(name, str)
        and isinstance(value, str)
        and name not in _HARMLESS
        and _SECRET_NAME.search(name) is not None
    )
