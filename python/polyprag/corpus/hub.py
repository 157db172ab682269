"""Rows of Hugging Face data sets: what ``save_to_disk`` wrote, or one of the hub by its name."""

from __future__ import annotations

import os
from typing import Any

from polyprag.corpus.ids import Place, Rows
from polyprag.errors import CorpusError, InvalidInput
from polyprag.extras import lacking

#: How a data set of the hub is written: ``hf://datasets/OWNER/NAME``, as the hub's own file system has it.
SCHEME = "hf://datasets/"


def is_saved_dataset(folder: str) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote this folder."""
    return any(os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))


def dataset_rows(path: str, *, split: str | None = None, subset: str | None = None) -> Rows:
    """The rows of one split; one from the hub is streamed, nothing of it is run.

    split: its name (``train``); None where there is only one. subset: the configuration of a set of the hub.
    Raises CorpusError if it cannot be read, InvalidInput for a split that is not there.
    """
    try:
        import datasets
    except ImportError as error:
        raise lacking("Hugging Face data sets", "datasets", "datasets") from error
    try:
        if path.startswith(SCHEME):
            found: Any = datasets.load_dataset(path.removeprefix(SCHEME), subset, streaming=True)
        else:
            found = datasets.load_from_disk(path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise Place(path).error(
            f"no data set can be read there ({reason})", "check its name and your connection"
        ) from error
    if isinstance(found, dict):
        names = list(found)
        if split is None and len(names) == 1:
            split = names[0]
        if split not in names:
            asked = "has several splits" if split is None else f"has no split {split!r}"
            raise InvalidInput(f"{path} {asked}: name one of {', '.join(names)} (--split)")
        found = found[split]
    elif split is not None:
        raise InvalidInput(f"{path} is one split alone: leave out the split {split!r}")
    where = path if split is None else f"{path} ({split})"
    number = 0
    try:
        for number, row in enumerate(found, 1):
            yield Place(where, "row", number), row
    except CorpusError:
        raise
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        place = Place(where, "row", number + 1)
        raise place.error(f"the row cannot be read ({error})", "mend it, or fetch the data again") from error
