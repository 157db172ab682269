"""A few examples for systems that ask the bare base model: they show the form of an answer, and no facts.

Routed systems have learnt the form in training; without examples the comparison would flatter them.
"""

from __future__ import annotations

from polyprag.models import question_prompt

_EXAMPLES = (
    (
        "Marta Helm\nMarta Helm (1902 – 1971) was a German architect. She was born in Lindau.",
        "Where was Marta Helm born?",
        "Lindau",
    ),
    (
        "Tarn Mill\nTarn Mill is a mill in Ost. It was built of red brick in 1761.",
        "In what year was Tarn Mill built?",
        "1761",
    ),
    (
        "Jan Reuter\nJan Reuter was a Dutch painter and sailor who lived in Ost.",
        "What was Jan Reuter's occupation?",
        "painter",
    ),
)


def closed_book_examples() -> str:
    """Questions and answers, as a prefix of a prompt without passages."""
    return "".join(f"{question_prompt(q)} {a}\n\n" for _, q, a in _EXAMPLES)


def rag_examples() -> str:
    """Passages, questions and answers, as a prefix of a prompt with passages."""
    return "".join(f"{question_prompt(q, [p])} {a}\n\n" for p, q, a in _EXAMPLES)
