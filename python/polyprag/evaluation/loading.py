"""Systems of other people, by the name of their class: ``module:Class`` or ``file.py:Class``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from polyprag.errors import InvalidInput


def load_system(target: str, given: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Import a system and make it; returns it, and what it took of ``given``.

    target: ``file.py:Class`` or ``module:Class``, where modules of the current folder are found too. A
    function that returns a system does as well.
    given: what it is given of this (``base``, ``store``, ``engine``), if its parameters are called so; others
    need a default. A value of None is what there is not.

    Raises InvalidInput if there is no such class, or it cannot be made so; what its code raises goes on.
    """
    where, colon, name = target.rpartition(":")
    if not colon or not where or not name:
        raise InvalidInput(
            f"--system {target}: expected module:Class or file.py:Class; "
            "polyprag's own systems are chosen by --only"
        )
    module = _from_file(Path(where), target) if where.endswith(".py") else _from_module(where, target)
    try:
        made = getattr(module, name)
    except AttributeError:
        known = [n for n, v in vars(module).items() if inspect.isclass(v) and hasattr(v, "answer")]
        have = f"it has {', '.join(known)}" if known else "it has no class with answer(questions)"
        raise InvalidInput(f"--system {target}: there is no {name} in it; {have}") from None
    taken = _arguments(made, given, target) if inspect.isclass(made) or not _answers(made) else None
    system = made if taken is None else made(**taken)
    if not _answers(system):
        raise InvalidInput(f"--system {target}: it has no method answer(questions)")
    return system, taken or {}


def _answers(system: object) -> bool:
    return callable(getattr(system, "answer", None))


def _arguments(made: Any, given: Mapping[str, Any], target: str) -> dict[str, Any]:
    if not callable(made):
        raise InvalidInput(f"--system {target}: it is {type(made).__name__}, no class and no function")
    arguments = {}
    for parameter in inspect.signature(made).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        value = given.get(parameter.name)
        if value is not None:
            arguments[parameter.name] = value
        elif parameter.default is parameter.empty:
            why = (
                "needs a store or a model: name one"
                if parameter.name in given
                else f"can be given {', '.join(given)}, and others need a default"
            )
            raise InvalidInput(f"--system {target}: its parameter {parameter.name!r} {why}")
    return arguments


def _from_file(path: Path, target: str) -> ModuleType:
    if not path.is_file():
        raise InvalidInput(f"--system {target}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"polyprag_system_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"--system {target}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _from_module(name: str, target: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise  # the module is there, and something that it imports is not
        raise InvalidInput(
            f"--system {target}: there is no module {name} here; give file.py:Class"
        ) from error
