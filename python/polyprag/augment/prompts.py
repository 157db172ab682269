"""The prompts of augmentation, all of them: what a user may replace."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from string import Template
from typing import Any

from polyprag.errors import InvalidInput

# The examples are invented, so that they teach the form and no facts. Few and short: every row of a batch
# reads them at every step.
_QUESTION_EXAMPLES = """\
Text: Marta Helm was a German architect and painter.
Answer: architect
Question: What was the profession of Marta Helm?

Text: Marta Helm was born in Lindau and designed 14 bridges.
Answer: Lindau
Question: Where was Marta Helm born?

Text: Tarn Mill was built of red brick by Jan Reuter.
Answer: red brick
Question: What was Tarn Mill built of?

Text: Tarn Mill's owner kept a dog called Pepper.
Answer: Pepper
Question: What is the name of the dog that Tarn Mill's owner kept?

"""

_REWRITE_EXAMPLES = """\
Text: Marta Helm was a German architect. She was born in Lindau in 1902 and designed 14 bridges.
The same in other words: The German architect Marta Helm, born in 1902 in Lindau, was the designer of \
14 bridges.

Text: Tarn Mill is a brick mill in the village of Ost. It was built in 1761 to grind oats. Its owner was \
Jan Reuter.
The same in other words: In the village of Ost stands Tarn Mill, made of brick. Jan Reuter owned the mill, \
which was built in 1761 for grinding oats.

"""

_RULES = """\
Rules for the questions:
- Each is clear to someone who has never seen the passage: it names who or what it is about, and speaks of no "passage" or "text".
- Its answer stands in the passage: copy it from there word for word, as short as it can be (a name, a date, a number, a few words).
- It does not give its answer away, and no two ask for the same.
- Together they cover the whole passage, from its beginning to its end.
- Question and answer are in the language of the passage.
"""  # noqa: E501 - lines as the model reads them

_PAIRS = f"""\
Write $pairs questions about the passage below, each with its answer.

{_RULES}
Reply with one JSON object and nothing else:
{{"pairs": [{{"question": "...", "answer": "..."}}]}}

Title: $title
Passage: $passage
"""

_PAIRS_AND_REWRITE = f"""\
First say everything that the passage below says in other words: keep every name, number, date and fact, add
none, change the wording and the order. Then write $pairs questions about it, each with its answer.

{_RULES}
Reply with one JSON object and nothing else:
{{"rewrite": "...", "pairs": [{{"question": "...", "answer": "..."}}]}}

Title: $title
Passage: $passage
"""

_YES_NO = """\
Let about a quarter of the questions be ones that are answered by yes or by no, the one as often as the other.
The answers of those are "yes" and "no" alone.
"""

#: Prompt -> its placeholders, and those of them that it cannot do without. The others are taken as they are.
_PLACEHOLDERS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "question": (frozenset({"sentence", "answer"}), frozenset({"sentence", "answer"})),
    "rewrite": (frozenset({"title", "passage"}), frozenset({"passage"})),
    "endpoint_pairs": (frozenset({"title", "passage", "pairs"}), frozenset({"passage", "pairs"})),
    "endpoint_pairs_and_rewrite": (frozenset({"title", "passage", "pairs"}), frozenset({"passage", "pairs"})),
}


def _placeholders(name: str, text: str) -> set[str]:
    found = set()
    for match in Template.pattern.finditer(text):
        placeholder = match.group("named") or match.group("braced")
        if match.group("invalid") is not None:
            shown = text[match.start() : match.start() + 20].partition("\n")[0]
            raise InvalidInput(f"the prompt {name} has a lone dollar sign at {shown!r}: write it $$")
        if placeholder:
            found.add(placeholder)
    return found


@dataclass(frozen=True)
class Prompts:
    """All prompts. Those with placeholders are templates: ``$passage``, and ``$$`` for a dollar sign.

    A local model continues a text: the examples, then ``question`` with a sentence and a span of it, or
    ``rewrite``. An endpoint gets ``endpoint_system``, if it is not empty, and ``endpoint_pairs`` or
    ``endpoint_pairs_and_rewrite``, with ``endpoint_yes_no`` behind it where such questions are wanted.

    Raises:
        InvalidInput: a placeholder is missing or unknown.
    """

    question_examples: str = _QUESTION_EXAMPLES
    question: str = "Text: $sentence\nAnswer: $answer\nQuestion:"
    rewrite_examples: str = _REWRITE_EXAMPLES
    rewrite: str = "Text: $passage\nThe same in other words:"
    endpoint_system: str = ""
    endpoint_pairs: str = _PAIRS
    endpoint_pairs_and_rewrite: str = _PAIRS_AND_REWRITE
    endpoint_yes_no: str = _YES_NO

    def __post_init__(self) -> None:
        for name, (known, needed) in _PLACEHOLDERS.items():
            found = _placeholders(name, getattr(self, name))
            forms = ", ".join(f"${placeholder}" for placeholder in sorted(known))
            for placeholder in sorted(found - known):
                raise InvalidInput(
                    f"the prompt {name} has the unknown placeholder ${placeholder}; it may have {forms}, "
                    "and a dollar sign is written $$"
                )
            for placeholder in sorted(needed - found):
                raise InvalidInput(f"the prompt {name} lacks the placeholder ${placeholder}: put it in")

    def fill(self, name: str, **values: object) -> str:
        """The prompt ``name`` with its placeholders replaced."""
        return Template(getattr(self, name)).substitute({k: str(v) for k, v in values.items()})


def prompts_of(value: Mapping[str, Any]) -> Prompts:
    """Prompts from names and texts; those that are not named stay as they are.

    Raises:
        InvalidInput: a name is unknown, a text is no string, or what :class:`Prompts` raises.
    """
    names = [f.name for f in fields(Prompts)]
    for name, text in value.items():
        if name not in names:
            raise InvalidInput(f"there is no prompt {name!r}; there are {', '.join(names)}")
        if not isinstance(text, str):
            raise InvalidInput(f"the prompt {name} is no text: write it between quotes")
    return Prompts(**value)


def read_prompts(path: str | os.PathLike[str]) -> Prompts:
    """Prompts from a TOML file of names and texts; those that it does not name stay as they are.

    Raises:
        OSError: the file cannot be read.
        InvalidInput: it is no TOML, or what :func:`prompts_of` raises; both name the file.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        return prompts_of(tomllib.loads(Path(path).read_text(encoding="utf-8-sig")))
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{os.fspath(path)}: no valid UTF-8; save the file as UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(
            f"{os.fspath(path)}: no valid TOML ({error}); write name = '''text''', one below the other"
        ) from error
    except InvalidInput as error:
        raise InvalidInput(f"{os.fspath(path)}: {error}") from error


def prompts_as_toml(prompts: Prompts = Prompts()) -> str:
    """A file that :func:`read_prompts` reads: what to begin from."""
    return "\n".join(f"{f.name} = '''\n{getattr(prompts, f.name)}'''\n" for f in fields(prompts))
