"""Recipes by name, and settings by name: what the command line and the benches make recipes from."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args, get_type_hints

from polyprag.encode import Recipe
from polyprag.errors import InvalidInput
from polyprag.fields import fits, said
from polyprag.samples import SampleSettings
from polyprag.training import TrainSettings

System: TypeAlias = Literal["polyprag", "poly-prag", "prag", "dyprag"]

_T = TypeVar("_T")

# What differs from our defaults; besides, all of them have every document's passage in every epoch, experts
# in every block, and the softmax of the whole vocabulary. Poly-PRAG is arXiv 2511.17044, with the settings of
# its first author's code of the weeks before, since the paper's are not all known to us; PRAG is arXiv
# 2501.15915, section 3.2; DyPRAG is arXiv 2503.23895, and learns from the LoRAs of PRAG.
_TRAIN: Mapping[System, Mapping[str, Any]] = {
    "poly-prag": {
        "routing": "table",
        "phi": "sigmoid",
        "mixing": "factors",
        "experts": 20,
        "alpha": 1.0,  # the output is scaled by 1 / r
        "gumbel": True,
        "epochs": 1,
        "batch_size": 1,
        "expert_lr": 3e-4,
        "table_lr": 3e-4,
        "schedule": "constant",
        "clip": 0.0,
    },
    # Documents share nothing, so a batch of eight of them is eight batches of one.
    "prag": {"routing": "lora", "epochs": 1, "lora_lr": 3e-4, "schedule": "constant", "clip": 0.0},
    # Weights of the losses and K, its p, are the published ones. Rates and epochs are ours: a network that is
    # trained on hundreds of documents and not on thousands needs more of both.
    "dyprag": {
        "mixing": "factors",
        "experts": 32,
        "router": True,
        "router_alone": 1.0,
        "epochs": 4,
        "mse_weight": 100.0,
        "kl_weight": 0.01,
    },
}


def recipe_of(system: System = "polyprag") -> Recipe:
    """The recipe of a system.

    Ours, Poly-PRAG as first published, PRAG (one LoRA a document), or DyPRAG (a network that makes a
    document's LoRA of its text).
    """
    if system not in get_args(System):
        raise InvalidInput(f"system is one of {', '.join(get_args(System))}, not {system!r}")
    if system == "polyprag":
        return Recipe()
    whole = replace(TrainSettings(), from_depth=0.0, softmax="whole")
    train = replace(whole, **_TRAIN[system])
    teacher = replace(whole, **_TRAIN["prag"]) if system == "dyprag" else None
    return Recipe(samples=SampleSettings(with_passage=1.0), train=train, teacher=teacher)


def with_settings(recipe: _T, settings: Iterable[str]) -> _T:
    """The recipe with each ``part.name=value`` set (``train.epochs=8``), the value as JSON or else as text.

    Raises InvalidInput for a name that is no setting, with the nearest that is, or a value of another type.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise InvalidInput(f"{setting!r}: expected NAME=VALUE, such as train.epochs=8")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        recipe = _set(recipe, path.split("."), value, setting)
    return recipe


def _names(part: Any) -> list[str]:
    return [f.name for f in fields(part)] if is_dataclass(part) else []


def _set(part: Any, path: list[str], value: Any, setting: str) -> Any:
    known = [f.name for f in fields(part)]
    name, *rest = path
    if name not in known:
        inside = [f"{key}.{name}" for key in known if name in _names(getattr(part, key))]
        near = inside or difflib.get_close_matches(name, known, 1)
        advice = f"did you mean {' or '.join(map(repr, near))}?" if near else f"there are: {', '.join(known)}"
        raise InvalidInput(f"{setting!r}: there is no setting {name!r} here; {advice}")
    old = getattr(part, name)
    if name == "teacher" and old is None:
        raise InvalidInput(f"{setting!r}: this recipe learns from no LoRAs; that of --system dyprag does")
    if is_dataclass(old) != bool(rest):
        inner = f"{name}.{fields(old)[0].name}" if is_dataclass(old) else name
        raise InvalidInput(f"{setting!r}: expected the name of one setting, such as {inner}")
    if rest:
        return replace(part, **{name: _set(old, rest, value, setting)})
    if isinstance(value, list):
        value = tuple(value)
    hint = get_type_hints(type(part))[name]
    if type(value) is int and float in (hint, *get_args(hint)):
        value = float(value)
    if not fits(hint, value):
        like = "" if old is None else f" like {old!r}"
        raise InvalidInput(f"{setting!r}: expected a value{like}: {said(hint)}")
    return replace(part, **{name: value})
