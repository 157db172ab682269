"""Features of documents in a file: computed once, stopped anywhere, and of these documents and this model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel

from polyprag import features as module
from polyprag._polyprag import Document
from polyprag.features import document_features, features_in_file
from polyprag.models import BaseModel

DOCUMENTS = [
    Document(i, f"{word} mill " * (i + 1), word) for i, word in enumerate("amber birch coral".split())
]
DOCUMENTS += [Document(3, None, None), Document(4, "denim")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 2)


def test_the_file_holds_what_is_computed_in_memory(tiny_base: BaseModel, tmp_path: Path) -> None:
    seen: list[int] = []
    found = features_in_file(tiny_base, DOCUMENTS, tmp_path / "work", progress=seen.append)
    np.testing.assert_allclose(found, document_features(tiny_base, DOCUMENTS), rtol=1e-5, atol=1e-6)
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    assert sum(seen) == len(DOCUMENTS)


def test_a_run_that_was_stopped_goes_on_with_the_next_block(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = features_in_file(tiny_base, DOCUMENTS, tmp_path / "whole")

    def stop(done: int) -> None:
        if done:
            raise KeyboardInterrupt

    computed: list[int] = []
    real = module.document_features

    def counting(base: BaseModel, documents: list[Document]) -> np.ndarray:
        computed.append(len(documents))
        return real(base, documents)

    monkeypatch.setattr(module, "document_features", counting)
    with pytest.raises(KeyboardInterrupt):
        features_in_file(tiny_base, DOCUMENTS, tmp_path / "w", progress=stop)
    assert computed == [2]
    seen: list[int] = []
    resumed = features_in_file(tiny_base, DOCUMENTS, tmp_path / "w", progress=seen.append)
    assert computed == [2, 2, 1]
    assert seen == [2, 2, 1]
    assert resumed.tobytes() == whole.tobytes()
    features_in_file(tiny_base, DOCUMENTS, tmp_path / "w")
    assert computed == [2, 2, 1], "all is there"


def test_what_was_read_of_others_is_read_anew(
    tiny_base: BaseModel, build_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    first = np.array(features_in_file(tiny_base, DOCUMENTS, tmp_path))
    others = [Document(d.id, d.text, "Mill") for d in DOCUMENTS]
    twin = BaseModel(build_model(seed=1), tiny_base.tokenizer, "tiny")
    for base, documents in ((tiny_base, others), (twin, DOCUMENTS), (tiny_base, DOCUMENTS[:3])):
        found = np.array(features_in_file(base, documents, tmp_path))
        np.testing.assert_allclose(found, document_features(base, documents), rtol=1e-5, atol=1e-6)
    assert np.array_equal(features_in_file(tiny_base, DOCUMENTS, tmp_path), first)
    (tmp_path / "features.npy").write_bytes(b"torn")
    assert np.array_equal(features_in_file(tiny_base, DOCUMENTS, tmp_path), first)
