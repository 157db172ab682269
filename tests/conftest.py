"""What several test modules need."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

_REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Path of a file of the real data, by its name there; skips the test where it is absent."""
    root = Path(os.environ.get("POLYPRAG_DATA", _REPOSITORY.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_file():
            pytest.skip(f"no real data: {name} is not under POLYPRAG_DATA (default ../shared/data)")
        return root / name

    return find
