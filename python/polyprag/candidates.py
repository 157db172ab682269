"""Candidate answers: the spans of a sentence that a question could ask for.

A small model that chooses its own answers asks "Who was X?" of every sentence; told the answer, it asks for
that. Dates, numbers, names and short runs of content words are found here by their form alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from polyprag.text import normalise

_MONTH = r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DATE = re.compile(rf"\d{{1,2}} {_MONTH}(?: \d{{4}})?|{_MONTH} (?:\d{{4}}|\d{{1,2}}(?:, \d{{4}})?)")
_WORD = re.compile(r"\d[\d,.:]*\d(?!\w)|\d\w*|[^\W\d_](?:[\w'’-]*\w)?")
_NUMBER_WORD = re.compile(
    r"two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    r"|eighteen|nineteen|(?:twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)(?:-\w+)?|hundred|thousand"
)
_CONNECTORS = frozenset(
    """
    of the de da di du des van von der den zu la le del della dos al el bin ibn and
    """.split()
)
# English words that belong to no run of content words.
_FUNCTION_WORDS = frozenset(
    """
    one a an the this that these those his her hers its their our my your he she it they we you i him
    them who whom whose which what where when why how and or but nor so yet if then than as at by for
    from in into of off on onto out over to up with within without under about after before between
    through during against among along across around near since until till while is are was were be been
    being am do does did done has have had having can could may might must shall should will would not
    no only also just very more most less least such same other another each every any some all both
    either neither few many much own once twice there here because although though whether born
    """.split()
)
# A run of content words is an answer only behind one of these: behind a subject it is a verb.
_BEFORE_A_RUN = frozenset(
    """
    a an the of from in for with by as to and or on at into
    """.split()
)


_NO_LONGER = frozenset("former retired late".split())
_MEMBERSHIP = frozenset("member native part former retired".split())
_BORN_IN = re.compile(r"\b[Bb]orn (?:[^.;()–]{0,40}? )?(?:in|at) (?=[^\W\d_a-z])")
_BRACKETED_IN = re.compile(r"\([^()–]*?\d{4}(?: in|,) (?=[^\W\d_a-z])")
_CALLED = re.compile(r"\b(?:is|was) (?:an?) ")


@dataclass(frozen=True)
class _Word:
    text: str
    start: int
    end: int

    @property
    def lower(self) -> str:
        return self.text.lower()

    @property
    def is_number(self) -> bool:
        return self.text[0].isdigit() or _NUMBER_WORD.fullmatch(self.lower) is not None

    @property
    def is_name(self) -> bool:
        head = re.sub(r"^[dl]['’]", "", self.text)  # d'Argent
        return head[:1].isupper() and not self.is_number

    @property
    def is_content(self) -> bool:
        return not (self.is_number or self.is_name or self.lower in _FUNCTION_WORDS)


def candidate_answers(
    sentence: str, title: str = "", limit: int = 6, kinds: Mapping[str, int] | None = None
) -> list[str]:
    """At most ``limit`` spans of ``sentence``.

    First where its subject was born and what it is said to be, then dates and numbers, then names, then runs
    of content words. ``kinds``: how many documents are said to be what :func:`kind` names; of "a peer and
    politician" the commoner comes first. What the title contains is left out, because a question has to
    name its subject.
    """
    common = kinds or {}
    called = sorted(_definition(sentence), key=lambda at: -common.get(kind(sentence[at[0] : at[1]]), 0))
    known = f" {normalise(_BRACKETS.sub('', title))} "
    subject = set(known.split())
    free = [True] * len(sentence)
    found: dict[str, str] = {}
    spans = [*_birthplace(sentence), *called, *_numbers(sentence), *_names(sentence)]
    for start, end in [*spans, *_runs(sentence)]:
        text = sentence[start:end]
        plain = normalise(text)
        names_subject = text[0].isupper() and not subject.isdisjoint(plain.split())
        if all(free[start:end]) and plain and f" {plain} " not in known and not names_subject:
            free[start:end] = [False] * (end - start)
            found.setdefault(plain, text)
    return list(found.values())[:limit]


def kinds(sentence: str) -> set[str]:
    """What the subject of ``sentence`` is said to be, by last words: {"mason", "actor"}."""
    return {kind(sentence[start:end]) for start, end in _definition(sentence)}


def kind(span: str) -> str:
    """The last word of a span, folded: "actor" of "film actor"."""
    return (normalise(span).split() or [""])[-1]


def _words(sentence: str) -> list[_Word]:
    return [_Word(m.group(), m.start(), m.end()) for m in _WORD.finditer(sentence)]


def _definition(sentence: str) -> Iterator[tuple[int, int]]:
    """What "is a" or "was an" calls the subject.

    "mason" and "stage actor" in "was an Irish mason and stage actor".
    """
    stretch = _CALLED.search(sentence)
    if stretch is None:
        return
    rest = sentence[stretch.end() :]
    runs: list[list[_Word]] = []
    before: _Word | None = None
    for word in _words(rest):
        joined = before is not None and rest[before.end : word.start] == " "
        if word.is_content and before is not None and before.is_content and joined:
            runs[-1].append(word)
        elif word.is_content:
            runs.append([word])
        elif word.is_name:
            if joined and before is not None and before.is_content:
                runs.pop()  # "retired professional" in "a retired professional Canadian player"
        elif word.lower not in ("and", "a", "an"):
            break
        before = word
    for run, following in zip_longest(runs, runs[1:]):
        # "stage and film actor": what "film" does to "actor", "stage" does too.
        adjective = len(run) == 1 and following and len(following) > 1
        if adjective and rest[run[0].end : following[0].start] == " and ":
            continue
        while len(run) > 1 and run[0].lower in _NO_LONGER:
            run = run[1:]
        if run[-1].lower not in _MEMBERSHIP:
            yield stretch.end() + run[0].start, stretch.end() + run[-1].end


def _birthplace(sentence: str) -> Iterator[tuple[int, int]]:
    """The place in "born in Lindau", "born on 4 May 1902 in Lindau" and "(4 May 1902 in Lindau - 1971)"."""
    for pattern in (_BORN_IN, _BRACKETED_IN):
        found = pattern.search(sentence)
        if found is not None:
            name = next((n for n in _names(sentence) if n[0] == found.end()), None)
            if name is not None:
                yield name
            return


def _numbers(sentence: str) -> Iterator[tuple[int, int]]:
    yield from (m.span() for m in _DATE.finditer(sentence))
    yield from ((w.start, w.end) for w in _words(sentence) if w.is_number)


def _names(sentence: str, *, from_start: bool = False) -> Iterator[tuple[int, int]]:
    """Runs of capitalised words, "of" and the like between them.

    A capital alone at the start proves nothing.
    """
    run: list[_Word] = []
    for place, word in enumerate([*_words(sentence), None]):
        joins = word is not None and (
            not run or sentence[run[-1].end : word.start] in (" ", ". ", "-", ' "', '" ')
        )
        begins = word is not None and word.is_name and not (place == 0 and word.lower in _FUNCTION_WORDS)
        if word is not None and joins and (begins or (run and word.lower in _CONNECTORS)):
            run.append(word)
        else:
            while run and not run[-1].is_name:
                run.pop()
            if run and (from_start or not (len(run) == 1 and run[0].start == 0)):
                yield run[0].start, run[-1].end
            run = [word] if word is not None and begins else []


def _runs(sentence: str) -> Iterator[tuple[int, int]]:
    words = _words(sentence)
    place = 0
    while place < len(words):
        end = place
        while (
            end < len(words)
            and words[end].is_content
            and (end == place or sentence[words[end - 1].end : words[end].start] == " ")
        ):
            end += 1
        if end > place:
            before = words[place - 1].lower if place else ""
            if before in _BEFORE_A_RUN and end - place <= 3 and words[end - 1].end - words[place].start > 2:
                yield words[place].start, words[end - 1].end
        place = max(end, place + 1)


_SUBJECTS = frozenset("he she it they".split())
_POSSESSIVES = frozenset("his her its their".split())
_PLACE_BEFORE = frozenset("in at on near from to into inside outside beside of".split())
_NAMING = frozenset("called named titled as".split())
_YEAR = re.compile(r"1\d{3}|20\d{2}")
_PERSON = re.compile(r"\b(?:he|she|his|her|who)\b|\(born ", re.IGNORECASE)
_BRACKETED = re.compile(r"\(([^()]*)\)")
_FOUR_DIGITS = re.compile(r"\d{4}")
_BRACKETS = re.compile(r" ?\([^()]*\)")


def is_person(text: str) -> bool:
    """Whether an English text speaks of a person, by its pronouns or by two years in brackets."""
    return _PERSON.search(text) is not None or any(_lifetime(m[1]) for m in _BRACKETED.finditer(text))


def _lifetime(text: str) -> bool:
    """Whether a text has a year, a dash and another year, in this order, whatever stands between."""
    years = [m.span() for m in _FOUR_DIGITS.finditer(text)]
    # No pattern for all three: where one of them is missing it would try all of the others with each other.
    return len(years) > 1 and re.search("[–-]", text[years[0][1] : years[-1][0]]) is not None


def with_subject(sentence: str, title: str, answer: str = "") -> str:
    """The sentence with the title in the place of the pronoun, or of another form of the name, at its start.

    What stands in brackets behind the name goes too, unless the answer is in it.
    """
    if not title:
        return sentence
    first, _, rest = sentence.partition(" ")
    if first.lower() in _SUBJECTS:
        return f"{title} {rest}"
    if first.lower() in _POSSESSIVES:
        return f"{title}'s {rest}"
    name = next(_names(sentence, from_start=True), None)
    if (
        name is None
        or name[0]
        or set(normalise(title).split()).isdisjoint(normalise(sentence[: name[1]]).split())
    ):
        return sentence
    rest = sentence[name[1] :]
    bracket = _BRACKETS.match(rest)
    if bracket is not None and (not answer or answer not in bracket.group()):
        rest = rest[bracket.end() :]
    return title + rest


def opener(sentence: str, answer: str, title: str = "", person: bool = False) -> str:
    """The words that a question for ``answer`` begins with; "" where the form of the span does not tell.

    Left to itself a small model begins every question alike; the right first words put it on the way.
    ``sentence`` begins with ``title`` where that is its subject. Only English has openers.
    """
    start = sentence.find(answer)
    words = _words(sentence)
    if start < 0 or not any(w.lower in _FUNCTION_WORDS for w in words):
        return ""
    before = [w.lower for w in words if w.end <= start]
    last = before[-1] if before else ""
    # "in Catania, Sicily": what stands before a list of names holds for each of them.
    lead = next((w.lower for w in reversed(words) if w.end <= start and not w.is_name), "")
    after = next((w for w in words if w.start >= start + len(answer)), None)
    is_subject = bool(title) and (sentence.startswith(title) or before[:1] == ["born"])
    born = is_subject and person and "born" in before
    if _DATE.fullmatch(answer) or _YEAR.fullmatch(answer):
        return _when(sentence, start, answer, title, last, born, is_subject and person)
    if answer[0].isdigit() or _NUMBER_WORD.fullmatch(answer.lower()):
        return "How many" if after is not None and after.is_content else "What"
    if set(before[-3:]) & _NAMING:
        return "What is the name of"
    if answer[0].isupper():
        if is_subject and person and start in {at for at, _ in _birthplace(sentence)}:
            return f"Where was {title} born"
        if last == "by":
            return "Who"
        return "Where" if lead in _PLACE_BEFORE else "What" if last in ("the", "a", "an") else "Who"
    called = _CALLED.search(sentence)
    if called is not None and is_subject and start in {at for at, _ in _definition(sentence)}:
        verb = called.group().split()[0]
        return f"What {verb} the profession of {title}" if person else f"What {verb} {title}"
    return "Who" if "by" in before[-2:] else "What"


def _when(sentence: str, start: int, answer: str, title: str, last: str, born: bool, of_person: bool) -> str:
    """The opener for a date or a year."""
    opened = sentence.rfind("(", 0, start)
    if of_person and opened >= 0 and ")" not in sentence[opened:start]:
        # (1902 - 1971), (born 1902): the first date in brackets behind a person's name, and the last.
        earlier = re.search(r"\d{4}", sentence[opened:start])
        if earlier is None:
            return f"When was {title} born"
        return f"When did {title} die" if sentence.startswith(")", start + len(answer)) else "When"
    if born:
        return f"In what year was {title} born" if _YEAR.fullmatch(answer) else f"When was {title} born"
    if _YEAR.fullmatch(answer):
        return "In what year" if last not in ("a", "has", "have", "about") else "How many"
    return "On what date"
