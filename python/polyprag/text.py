"""Text as answers are compared: folded case, no punctuation, no articles, tokens of any script.

The rules are those of the SQuAD v1.1 evaluation script (Rajpurkar et al., 2016), on which ASCII text comes
out the same, but that what they would erase altogether ("The The", "A", "!!!") keeps the part that would
have been lost: else such an answer would equal no answer.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable

_ARTICLES = frozenset({"a", "an", "the"})
_ASCII_PUNCTUATION = frozenset(string.punctuation)

# Scripts that are written without spaces between words: one token a character.
# Hangul and all others separate their words and are split at whitespace.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # ideographic iteration mark, closing mark, zero
    (0x3040, 0x312F),  # Hiragana, Katakana, Bopomofo
    (0x31F0, 0x31FF),  # Katakana extensions
    (0x3400, 0x4DBF),  # Han extension A
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),  # Han compatibility
    (0x20000, 0x3FFFF),  # Han extensions
)


def _fold(text: str) -> str:
    """Compatibility forms and case folded together, accents kept (the Unicode NFKC_Casefold recipe)."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFD", text).casefold())
    return unicodedata.normalize("NFKC", folded.casefold())


def _is_punctuation(character: str) -> bool:
    if character in _ASCII_PUNCTUATION:
        return True
    return character > "\x7f" and unicodedata.category(character).startswith("P")


def _is_unspaced(character: str) -> bool:
    point = ord(character)
    return point >= 0x0E00 and any(low <= point <= high for low, high in _UNSPACED)


def _split_word(word: str) -> list[str]:
    """A word without spaces as tokens: characters of unspaced scripts alone, everything else in runs."""
    if word.isascii():
        return [word]
    pieces: list[str] = []
    joins = False  # whether the next ordinary character belongs to the last piece
    for character in word:
        if pieces and unicodedata.category(character).startswith("M"):
            pieces[-1] += character  # a combining mark never stands alone
        elif _is_unspaced(character):
            pieces.append(character)
            joins = False
        elif joins:
            pieces[-1] += character
        else:
            pieces.append(character)
            joins = True
    return pieces


def tokens(text: str) -> list[str]:
    """The normalised tokens of a text, in order; empty only for a text without any visible character."""
    folded = _fold(text)
    bare = "".join(character for character in folded if not _is_punctuation(character))
    if not text.isascii():
        bare = unicodedata.normalize("NFKC", bare)  # a mark may have met its letter over a deleted sign
    words = bare.split() or folded.split()
    kept = [word for word in words if word not in _ARTICLES] or words
    return [piece for word in kept for piece in _split_word(word)]


def normalise(text: str) -> str:
    """The text as SQuAD compares it: folded case, no punctuation, no articles, single spaces.

    Unspaced scripts come out with a space after each character, so that equal strings are equal tokens.
    """
    return " ".join(tokens(text))


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether a text holds one of the answers as a run of whole tokens, both normalised.

    "pol" is not found in "politician"; an answer without a visible character is found nowhere.
    """
    inside = f" {normalise(text)} "
    return any(f" {answer} " in inside for answer in map(normalise, answers) if answer)
