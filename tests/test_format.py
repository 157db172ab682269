"""docs/format.md is enough to read a store: a reader that was written from it says what the core says."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from polyprag import Document, Module, Store, StoreSpec
from reader import Reader, roaring

K, GROUPS, CODE = 5, 2, 3
MODULES = [Module("up", 6, 4, 0), Module("down", 4, 6, 1)]
CODECS = ["f32", "f16", "q8", "q4", "q2", "q1", f"code({CODE})", f"code({CODE},int4)", "sparse(2)"]
FIXTURES = Path(__file__).parent.parent / "rust" / "core" / "tests" / "fixtures" / "v1"

# Each kind of ids leads to another of the encodings.
IDS = {
    "scattered": st.integers(0, 2**64 - 1),
    "counted": st.integers(10**9, 10**9 + 60),
    "decimals": st.integers(0, 2**64 - 1).map("doc-{}".format),
    "numbered": st.integers(0, 999).map("wiki-{:06d}#p".format),
    "hashes": st.integers(0, 2**256 - 1).map("{:064x}".format),
    "texts": st.text(min_size=1, max_size=40),
    "long texts": st.text("aé", min_size=80, max_size=200),
}
TEXT = st.none() | st.text(max_size=30)


def routes(codec: str, n: int, seed: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(seed)
    if codec.startswith("code"):
        return rng.normal(size=(n, CODE)).astype(np.float32)
    logits = rng.normal(scale=3, size=(n, GROUPS, K)).astype(np.float32)
    if codec.startswith("sparse"):
        logits = np.exp(logits)
        logits /= logits.sum(axis=2, keepdims=True)
    return logits


def experts(dtype: Any) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    shapes = {"A": lambda m: (K, 2, m.in_features), "B": lambda m: (m.out_features, K, 2)}
    return {
        f"{m.name}.{e}": rng.normal(size=shape(m)).astype(dtype)
        for m in MODULES
        for e, shape in shapes.items()
    }


def compare(path: Path) -> None:
    """All that the reader says of a store is what the core says, bit for bit where nothing is computed."""
    reader = Reader(path)
    with Store.open(path) as store:
        store.verify()
        ids = list(store)
        assert list(reader) == ids
        assert reader.docno("an id that nobody has" * 20) is None
        for name, tensor in store.experts.items():
            assert reader.experts[name][1] == list(tensor.shape)
            np.testing.assert_array_equal(np.ravel(tensor), reader.expert(name))
        assert (store.router is None) == (reader.router is None)
        for name, tensor in (store.router or {}).items():
            assert reader.router is not None
            assert reader.router[name][1] == list(tensor.shape)
            np.testing.assert_array_equal(np.ravel(tensor), reader.router[name][2])
        code = "code" in reader.codec
        kind: Any = "code" if code else "w" if "sparse" in reader.codec else "z"
        for id in ids:
            docno = reader.docno(id)
            assert docno is not None
            document, kept = store.documents([id])[0], reader.document(docno)
            assert (document.title, document.text) == (kept["title"], kept["text"])
            assert document.metadata == (kept["metadata"] and json.loads(kept["metadata"]))
            if not store.is_routed(id):
                assert reader.numbers(docno) is None
                continue
            found, numbers = reader.record(docno), reader.numbers(docno)
            assert found is not None
            assert found[0] == store.records([id])[0].tobytes()
            assert numbers is not None
            np.testing.assert_allclose(
                store.routes([id], kind)[0].ravel(), numbers, rtol=1e-7 if kind == "w" else 0
            )
            np.testing.assert_allclose(
                store.routes([id])[0].ravel(), reader.weights(docno), rtol=1e-4, atol=1e-6
            )


@st.composite
def lives(draw: st.DrawFn) -> tuple[str, str, list[list[tuple[Any, str | None, str | None, bool]]]]:
    codec, shape = draw(st.sampled_from(CODECS)), draw(st.sampled_from(sorted(IDS)))
    one = st.tuples(IDS[shape], TEXT, TEXT, st.booleans())
    few = st.lists(one, max_size=12, unique_by=lambda document: document[0])
    many = st.lists(one, min_size=100, max_size=200, unique_by=lambda document: document[0])
    commits = draw(st.lists(few | many if shape != "counted" else few, min_size=1, max_size=4))
    return codec, shape, commits


# Each case is a store that is written and read whole.
@settings(max_examples=settings().max_examples * 2 // 5)
@given(
    life=lives(),
    seed=st.integers(0, 1000),
    phi=st.sampled_from(["sigmoid", "softmax", "linear"]),
    top=st.none() | st.integers(1, K),
)
def test_the_reader_says_what_the_core_says(
    life: Any, seed: int, phi: Any, top: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    codec, shape, commits = life
    if phi == "linear":
        top = None
        codec = "f16" if codec.startswith("sparse") else codec
    path = tmp_path_factory.mktemp("format") / "s"
    spec = StoreSpec(
        modules=MODULES, experts=K, rank=2, alpha=4.0, codec=codec, phi=phi, top_k=top,
        id_type="u64" if shape in ("scattered", "counted") else "string",
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    v, b = rng.normal(size=(GROUPS * K, CODE)), rng.normal(size=GROUPS * K)
    decoder = (v.astype(np.float32), b.astype(np.float32)) if "code" in codec else None
    dtype: Any = [None, "float32", "float16", "bfloat16", "int8"][seed % 5]
    router = None
    if decoder is not None and seed % 2:
        router = {f"r.{i}": rng.normal(size=(i + 1, 2)[: 1 + i % 2]).astype(np.float32) for i in range(3)}
    writer = Store.create(path, spec, experts(np.float32), decoder, router=router, expert_dtype=dtype)
    for i, commit in enumerate(commits):
        for j, (id, title, text, routed) in enumerate(commit):
            metadata = {"n": j} if j % 3 else None
            document = Document(id, text, title, metadata)
            row = routes(codec, 1, 100 * i + j) if routed else None
            writer.add([document], row, on_duplicate="replace")
        if commit and seed % 3 == 0:
            writer.delete([commit[0][0]])
        writer.commit()
    if seed % 4 == 0:
        writer.compact()
    writer.discard()
    compare(path)


def fixtures() -> list[str]:
    return sorted(path.name.removesuffix(".json") for path in FIXTURES.glob("*.json"))


def test_there_are_fixtures() -> None:
    assert len(fixtures()) >= 5


@pytest.mark.parametrize("name", fixtures())
def test_the_reader_says_what_was_written_down(name: str, tmp_path: Path) -> None:
    packed = zstandard.ZstdDecompressor().stream_reader((FIXTURES / f"{name}.tar.zst").read_bytes()).read()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(tmp_path, filter="data")
    compare(tmp_path)
    reader = Reader(tmp_path)
    expected = json.loads((FIXTURES / f"{name}.json").read_text())
    assert reader.codec == expected["codec"]
    assert list(reader) == expected["ids"]
    for document in expected["documents"]:
        docno = reader.docno(document["id"])
        if document.get("missing"):
            assert docno is None
            continue
        assert docno is not None
        assert reader.document(docno) == {key: document[key] for key in ("title", "text", "metadata")}
        found = reader.record(docno)
        assert (found and found[0].hex()) == document.get("record")
        if found:
            np.testing.assert_allclose(reader.numbers(docno), document["kept"], rtol=1e-6)
            np.testing.assert_allclose(reader.weights(docno), document["weights"], rtol=1e-4, atol=1e-6)


def test_the_reader_knows_each_container_of_a_bitmap() -> None:
    few = b"\x01\0\0\0\0\0\0\0" + b"\x02\0\0\0" + b"\x3a\x30\0\0" + b"\x01\0\0\0"
    assert roaring(few + b"\x03\0\x01\0" + b"\x10\0\0\0" + b"\x05\0\x09\0") == {
        (2 << 32) + (3 << 16) + 5,
        (2 << 32) + (3 << 16) + 9,
    }
