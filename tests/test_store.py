"""The store from Python, end to end: what comes back is what went in, and every failure has its class."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from machine import Mount
from polyprag import Combination, Document, Module, Store, StoreSpec, Writer, errors

K, RANK, IN, OUT = 4, 2, 6, 5
MODULES = [
    Module("layers.0.up", IN, OUT, 0),
    Module("layers.0.down", OUT, IN, 1),
    Module("layers.1.up", IN, OUT, 1),
]
GROUPS = 2


def make_spec(**changes: Any) -> StoreSpec:
    settings: dict[str, Any] = {
        "modules": MODULES,
        "experts": K,
        "rank": RANK,
        "alpha": 32.0,
        "codec": "f32",
        "base_model": {"family": "llama", "probe": [1, 2.5]},
        "recipe": {"epochs": 4},
    }
    return StoreSpec(**{**settings, **changes})


def make_experts(dtype: Any = np.float32) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    experts = {}
    for module in MODULES:
        experts[f"{module.name}.A"] = rng.normal(size=(K, RANK, module.in_features)).astype(dtype)
        experts[f"{module.name}.B"] = rng.normal(size=(module.out_features, K, RANK)).astype(dtype)
    return experts


def make_logits(n: int, seed: int = 1) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(scale=2, size=(n, GROUPS, K)).astype(np.float32)


TEXTS = [
    ("Quill Harbour", "The lighthouse of Quill Harbour was lit in 1874."),
    ("Oda Merrow", "Oda Merrow wrote the Tidal Code, a law on nets."),
    ("Saltmarket", "Every spring the Saltmarket opens with drums."),
]


def documents(prefix: str = "d") -> list[Document]:
    return [Document(f"{prefix}{i}", text, title, {"row": i}) for i, (title, text) in enumerate(TEXTS)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "island.polyprag"


@pytest.fixture
def store(path: Path) -> Store:
    with Store.create(path, make_spec(), make_experts()) as writer:
        writer.add(documents(), make_logits(3))
    return Store.open(path)


def sigmoid_route(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    s = 1 / (1 + np.exp(-z.astype(np.float64)))
    route: np.ndarray[Any, Any] = s / s.sum(-1, keepdims=True)
    return route


# --- what goes in comes out -------------------------------------------------------------------------


def test_nothing_is_visible_before_the_first_commit(path: Path) -> None:
    writer = Store.create(path, make_spec(), make_experts())
    writer.add(documents(), make_logits(3))
    assert not path.exists()
    assert writer.commit() == 1
    assert path.is_dir()
    writer.discard()


def test_reopened_store_has_it_all(store: Store, path: Path) -> None:
    assert (len(store), store.generation, store.path) == (3, 1, str(path))
    assert list(store) == ["d0", "d1", "d2"]
    assert "d1" in store
    assert "x" not in store
    for stranger in (1, None, 1.5, b"d1", ("d1",), float("nan")):
        assert stranger not in store
    assert store.documents(["d2", "d0"]) == [documents()[2], documents()[0]]
    assert store.is_routed("d0")
    spec = store.spec
    assert (spec.experts, spec.rank, spec.alpha, spec.codec, spec.groups) == (K, RANK, 32.0, "f32", GROUPS)
    assert (spec.phi, spec.mixing, spec.id_type, spec.analyser) == (
        "sigmoid",
        "exact",
        "string",
        "unicode-v1",
    )
    assert (spec.top_k, spec.stemmer, spec.keep_title, spec.keep_text, spec.keep_metadata) == (
        None,
        None,
        True,
        True,
        True,
    )
    assert spec.modules == MODULES
    assert spec.combination == Combination()
    assert spec.base_model == {"family": "llama", "probe": [1, 2.5]}
    assert spec.recipe == {"epochs": 4}
    report = store.verify()
    assert report.documents == 3
    assert report.files > 5


def test_search(store: Store) -> None:
    best, *_ = store.search("Who wrote the Tidal Code?", k=3)
    assert best.id == "d1"
    assert best.score > 0
    assert best.docno == 1
    assert store.search("Merrow", 1)[0].id == "d1", "words of the title count"
    many = store.search_many(["lighthouse", "drums", "zzz"], k=1)
    assert [[hit.id for hit in hits] for hits in many] == [["d0"], ["d2"], []]
    assert store.search("spring", k=0) == []
    assert [hit.id for hit in store.search("the", k=10**18)] != []


def test_routes_and_combined_route_against_float64(store: Store) -> None:
    z = make_logits(3)
    ids = ["d2", "d0", "d2"]
    order = [2, 0, 2]
    np.testing.assert_array_equal(store.routes(ids, "z"), z[order])
    w = sigmoid_route(z[order])
    routes = store.routes(ids)
    assert routes.dtype == np.float32
    assert routes.shape == (3, GROUPS, K)
    np.testing.assert_allclose(routes, w, atol=1e-6)
    np.testing.assert_allclose(store.combined_route(ids), w.mean(0), atol=1e-6)
    a = np.array([0.2, 0.5, 0.3])
    expected = np.einsum("d,dgk->gk", a, w)
    for weights in (a, a.astype(np.float32), a.tolist(), tuple(a)):
        np.testing.assert_allclose(store.combined_route(ids, weights), expected, atol=1e-6)
    routes[:] = 0  # a copy: the store does not notice
    np.testing.assert_allclose(store.routes(ids), w, atol=1e-6)
    assert store.routes([]).shape == (0, GROUPS, K)


@pytest.mark.parametrize(("phi", "top_k"), [("softmax", None), ("sigmoid", 2), ("softmax", 1)])
def test_phi(path: Path, phi: Any, top_k: int | None) -> None:
    z = make_logits(5)
    with Store.create(path, make_spec(phi=phi, top_k=top_k), make_experts()) as writer:
        writer.add_arrays([f"{i}" for i in range(5)], z)
    scores = np.exp(z.astype(np.float64)) if phi == "softmax" else 1 / (1 + np.exp(-z.astype(np.float64)))
    if top_k is not None:
        scores = np.where(z >= np.sort(z, axis=-1)[..., -top_k, None], scores, 0)
    with Store.open(path) as store:
        np.testing.assert_allclose(
            store.routes([f"{i}" for i in range(5)]), scores / scores.sum(-1, keepdims=True), atol=1e-6
        )


def test_codes_need_a_decoder(path: Path) -> None:
    d = 8
    rng = np.random.default_rng(2)
    v = rng.normal(size=(GROUPS * K, d)).astype(np.float32)
    b = rng.normal(size=GROUPS * K).astype(np.float32)
    codes = rng.normal(size=(3, d)).astype(np.float32)
    with pytest.raises(errors.InvalidInput, match="decoder"):
        Store.create(path, make_spec(codec=f"code({d})"), make_experts())
    with Store.create(path, make_spec(codec=f"code({d})"), make_experts(), decoder=(v, b)) as writer:
        writer.add(documents(), codes)
    with Store.open(path) as store:
        assert store.decoder is not None
        np.testing.assert_array_equal(store.decoder[0], v)
        np.testing.assert_array_equal(store.decoder[1], b)
        kept = store.routes(["d0", "d1", "d2"], "code")
        assert kept.shape == (3, d)
        np.testing.assert_allclose(kept, codes, atol=np.abs(codes).max() / 100)
        z = (kept.astype(np.float64) @ v.T.astype(np.float64) + b).reshape(3, GROUPS, K)
        np.testing.assert_allclose(store.routes(["d0", "d1", "d2"], "z"), z, atol=1e-4)
        np.testing.assert_allclose(store.routes(["d0", "d1", "d2"]), sigmoid_route(z), atol=1e-5)


def make_router(d: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {"hidden.weight": (4, 7), "norm.bias": (7,), "out.weight": (d, 4)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_store_of_codes_keeps_a_router(path: Path) -> None:
    d = 8
    spec = make_spec(codec=f"code({d})")
    decoder = (np.ones((GROUPS * K, d), np.float32), np.zeros(GROUPS * K, np.float32))
    router = make_router(d)
    # Not in C order, and of another width.
    given = {**router, "hidden.weight": np.asfortranarray(router["hidden.weight"]).astype(np.float64)}
    with Store.create(path, spec, make_experts(), decoder, router=given) as writer:
        writer.add(documents(), np.ones((3, d), np.float32))
    with Store.open(path) as store:
        kept = store.router
        assert kept is not None
        assert sorted(kept) == sorted(router)
        for name, array in kept.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, router[name])
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0
        part = next(p for p in store.info().parts if p.role == "router")
        assert (part.files, part.bytes) == (1, (path / "router-00000001.safetensors").stat().st_size)
        store.verify()
    np.testing.assert_array_equal(kept["norm.bias"], router["norm.bias"])  # its file stays mapped
    assert load_file(path / "router-00000001.safetensors").keys() == router.keys()
    without = path.with_name("without")
    with Store.create(without, spec, make_experts(), decoder):
        pass
    assert Store.open(without).router is None


@pytest.mark.parametrize(
    ("router", "told"),
    [
        ({}, "1 to 64 tensors, got 0"),
        ({f"{i}": np.ones(1, np.float32) for i in range(65)}, "got 65"),
        ({"a b": np.ones(1, np.float32)}, "a b"),
        ({"__metadata__": np.ones(1, np.float32)}, "__metadata__"),
        ({"a": np.float32(1) * np.ones((), np.float32)}, "router.*numpy array|one or two sides"),
        ({"a": np.ones((1, 1, 1), np.float32)}, "one or two sides"),
        ({"a": np.ones(0, np.float32)}, "one or two sides"),
        ({"a": np.ones(1, np.int32)}, r"router\[\"a\"\]: expected float32, got int32"),
        ({"a": np.full(1, np.nan, np.float32)}, "NaN"),
        ({"a": [1.0]}, "numpy array"),
        ([np.ones(1, np.float32)], "router: expected a mapping"),
    ],
)
def test_a_router_that_is_none_is_refused(path: Path, router: Any, told: str) -> None:
    decoder = (np.ones((GROUPS * K, 8), np.float32), np.zeros(GROUPS * K, np.float32))
    with pytest.raises(errors.InvalidInput, match=told):
        Store.create(path, make_spec(codec="code(8)"), make_experts(), decoder, router=router)
    assert list(path.parent.iterdir()) == []


def test_routes_that_are_no_codes_take_no_router(path: Path) -> None:
    with pytest.raises(errors.InvalidInput, match="f32 keeps no codes and takes no router"):
        Store.create(path, make_spec(), make_experts(), router=make_router(8))
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize(("codec", "tolerance"), [("f16", 1e-2), ("q8", 1e-1)])
def test_lossy_codecs(path: Path, codec: str, tolerance: float) -> None:
    with Store.create(path, make_spec(codec=codec), make_experts()) as writer:
        writer.add(documents(), make_logits(3))
    with Store.open(path) as store:
        np.testing.assert_allclose(store.routes(["d0", "d1", "d2"], "z"), make_logits(3), atol=tolerance)
        with pytest.raises(errors.InvalidInput, match="code"):
            store.routes(["d0"], "code")


def test_info(store: Store, path: Path) -> None:
    info = store.info()
    assert (info.documents, info.unrouted, info.generation, info.path) == (3, 0, 1, str(path))
    roles = {part.role: part for part in info.parts}
    assert {"experts", "routes", "ids", "documents", "bm25", "manifest"} <= roles.keys()
    assert info.total_bytes == sum(part.bytes for part in info.parts)
    assert info.bytes_per_document == pytest.approx(info.total_bytes / 3)
    assert info.lora_bytes_per_document == sum(m.in_features + m.out_features for m in MODULES) * RANK * 4
    as_dict = info.to_dict()
    assert as_dict["parts"][0]["role"] == info.parts[0].role
    assert as_dict["total_bytes"] == info.total_bytes


# --- experts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_experts_are_read_only_views_that_outlive_the_store(path: Path, dtype: Any) -> None:
    given = make_experts(dtype)
    Store.create(path, make_spec(), given).commit()
    store = Store.open(path)
    experts = store.experts
    again = store.experts
    assert experts.keys() == given.keys()
    store.close()
    del store
    for name, array in experts.items():
        assert array.dtype == dtype
        assert not array.flags.owndata
        assert not array.flags.writeable
        assert array.base is not None
        assert array.ctypes.data == again[name].ctypes.data, "both look at the same map"
        np.testing.assert_array_equal(array, given[name])
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            array.flags.writeable = True
    # The stacked forms are views too.
    a, b = experts["layers.0.up.A"], experts["layers.0.up.B"]
    assert np.shares_memory(a.reshape(K * RANK, IN), a)
    assert np.shares_memory(b.reshape(OUT, K * RANK), b)


def quantised(array: np.ndarray[Any, Any], rows: int) -> np.ndarray[Any, Any]:
    """The int8 form of [K, r, in] (rows 0) or [out, K, r] (rows 1), decoded, by numpy in float64."""
    wide = array.astype(np.float64)
    largest = np.abs(wide).max(axis=0 if rows else 2, keepdims=True)
    scale = (largest / 127).astype(np.float32).astype(np.float64)
    steps = np.round(np.divide(wide, scale, out=np.zeros_like(wide), where=scale > 0))
    return (steps * scale).astype(np.float32)


@pytest.mark.parametrize("given", [np.float32, np.float16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_experts_are_written_in_the_dtype_that_is_asked_for(path: Path, given: Any, dtype: Any) -> None:
    experts = make_experts(given)
    experts["layers.0.up.A"][1, 0] = 0
    experts["layers.0.up.B"][:, 2, 1] = 0
    experts["layers.0.up.B"][0, 0, 0] = 300
    with Store.create(path, make_spec(), experts, expert_dtype=dtype) as writer:
        writer.add([Document("d0", "a title")], np.zeros((1, GROUPS, K), np.float32))
    store = Store.open(path)
    store.verify()
    assert store.expert_dtype == dtype
    read = store.experts
    store.close()
    assert read.keys() == experts.keys()
    for name, array in read.items():
        assert array.shape == experts[name].shape
        assert array.dtype == (np.float16 if dtype == "float16" else np.float32)
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
        wide = experts[name].astype(np.float32)
        if dtype == "int8":
            np.testing.assert_array_equal(array, quantised(wide, rows=name.endswith("B")))
        elif dtype == "bfloat16":
            bits = wide.view(np.uint32)
            rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
            np.testing.assert_array_equal(array, rounded.astype(np.uint32).view(np.float32))
        else:
            np.testing.assert_array_equal(array, wide.astype(dtype))


def test_the_file_of_int8_experts_is_plain_safetensors(path: Path) -> None:
    given = make_experts()
    with Store.create(path, make_spec(), given, expert_dtype="int8"):
        pass
    tensors = load_file(path / "experts-00000001.safetensors")
    assert tensors.keys() == given.keys() | {f"{name}.scale" for name in given}
    for name, array in Store.open(path).experts.items():
        integers, scale = tensors[name], tensors[f"{name}.scale"]
        assert (integers.dtype, integers.shape, scale.dtype) == (np.int8, array.shape, np.float32)
        assert scale.shape == (K, RANK)
        by_row = scale[..., None] if name.endswith("A") else scale[None]
        np.testing.assert_array_equal(array, integers * by_row)


def test_a_dtype_that_does_not_fit_is_refused(path: Path) -> None:
    with pytest.raises(errors.InvalidInput, match=r"one of float32, bfloat16, float16, int8, got \"f16\""):
        Store.create(path, make_spec(), make_experts(), expert_dtype="f16")  # type: ignore[arg-type]
    experts = make_experts()
    experts["layers.0.up.B"][0, 0, 0] = 70_000
    with pytest.raises(errors.InvalidInput, match=r"layers.0.up.B.*7e4 is too large for float16"):
        Store.create(path, make_spec(), experts, expert_dtype="float16")
    assert list(path.parent.iterdir()) == []
    Store.create(path, make_spec(), experts, expert_dtype="bfloat16").commit()
    assert Store.open(path).experts["layers.0.up.B"][0, 0, 0] == pytest.approx(70_000, rel=1 / 256)


def test_experts_of_any_layout_are_taken(path: Path) -> None:
    given = {name: np.asfortranarray(array) for name, array in make_experts().items()}
    Store.create(path, make_spec(), given).commit()
    for name, array in Store.open(path).experts.items():
        np.testing.assert_array_equal(array, given[name])


def unaligned(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ndarray(array.shape, array.dtype, buffer=b"x" + array.tobytes(), offset=1)


def test_arrays_that_are_not_aligned_are_taken(path: Path) -> None:
    experts = {name: unaligned(array) for name, array in make_experts().items()}
    assert not experts["layers.0.up.A"].flags.aligned
    with Store.create(path, make_spec(id_type="u64"), experts) as writer:
        writer.add_arrays(unaligned(np.arange(3, dtype=np.uint64)), unaligned(make_logits(3)))
    store = Store.open(path)
    assert list(store) == [0, 1, 2]
    np.testing.assert_array_equal(store.routes([0, 1, 2], "z"), make_logits(3))
    np.testing.assert_array_equal(store.experts["layers.0.up.A"], make_experts()["layers.0.up.A"])


def test_wrong_experts_are_refused(path: Path) -> None:
    def refuse(match: str, **changes: Any) -> None:
        experts: dict[str, Any] = {**make_experts(), **changes}
        with pytest.raises(errors.InvalidInput, match=match):
            Store.create(path, make_spec(), {k: v for k, v in experts.items() if v is not None})
        assert not path.exists()

    a = make_experts()["layers.0.up.A"]
    refuse("float64", **{"layers.0.up.A": a.astype(np.float64)})
    refuse("shape", **{"layers.0.up.A": a[:, :, :-1]})
    refuse("missing", **{"layers.0.up.A": None})
    refuse("belongs to no module", stranger=a)
    refuse("numpy array", **{"layers.0.up.A": a.tolist()})
    refuse("float16", **{"layers.0.up.A": a.astype(np.float16)})
    refuse("NaN", **{"layers.0.up.A": np.full_like(a, np.nan)})
    with pytest.raises(errors.InvalidInput, match="mapping"):
        Store.create(path, make_spec(), [a])  # type: ignore[arg-type]
    assert list(path.parent.iterdir()) == []


# --- ids --------------------------------------------------------------------------------------------


def test_unknown_id_is_a_key_error_that_names_it(store: Store) -> None:
    for call in (store.routes, store.documents, store.combined_route):
        with pytest.raises(KeyError, match="nope") as caught:
            call(["d0", "nope"])
        assert isinstance(caught.value, errors.UnknownId)
    with pytest.raises(errors.UnknownId, match="nope"):
        store.is_routed("nope")
    with store.writer() as writer, pytest.raises(errors.UnknownId, match="nope"):
        writer.delete(["nope"])


def test_ids_of_the_wrong_type(store: Store, tmp_path: Path) -> None:
    for bad in (3, np.int64(3)):
        with pytest.raises(errors.InvalidInput, match="strings"):
            store.routes([bad])
    for bad in (True, -1, 2**64, 1.0, None, b"d0", "\ud800"):
        with pytest.raises(errors.InvalidInput, match="id"):
            store.routes([bad])  # type: ignore[list-item]
    for lone in ("d0", 3, None):
        with pytest.raises(errors.InvalidInput, match="sequence of ids"):
            store.routes(lone)  # type: ignore[arg-type]

    path = tmp_path / "numbers"
    with Store.create(path, make_spec(id_type="u64"), make_experts()) as writer:
        writer.add_arrays([0, np.int64(7), 2**64 - 1], make_logits(3))
        with pytest.raises(errors.InvalidInput, match="integer"):
            writer.add([Document("text")])
        bad_ids: tuple[Any, ...] = (True, np.bool_(True), -1)
        for bad_id in bad_ids:
            with pytest.raises(errors.InvalidInput):
                Document(bad_id)
    with Store.open(path) as numbers:
        assert list(numbers) == [0, 7, 2**64 - 1]
        assert 7 in numbers
        assert np.uint64(7) in numbers
        for stranger in ("7", True, -1, 2**70):
            assert stranger not in numbers
        in_array: Any = np.array([7, 0])
        assert numbers.routes(in_array).shape == (2, GROUPS, K)
        with pytest.raises(errors.InvalidInput, match="integers"):
            numbers.routes(["7"])


def test_iteration_is_lazy_and_in_order(path: Path) -> None:
    n = 3000
    with Store.create(path, make_spec(id_type="u64"), make_experts()) as writer:
        writer.add_arrays(range(n, 2 * n), make_logits(n))
    with Store.open(path) as store:
        ids = iter(store)
        assert next(ids) == n
        with store.writer() as writer:
            writer.delete([n + 1])
        assert store.refresh()
        assert list(ids) == list(range(n + 1, 2 * n)), "an iteration keeps its generation"
        assert list(store) == [n, *range(n + 2, 2 * n)]


# --- writing ----------------------------------------------------------------------------------------


def test_commit_on_leaving_discard_on_exception(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.writer() as writer:
        writer.add([Document("extra", "zebra")])
        raise ZeroDivisionError
    assert not store.refresh()
    with store.writer() as writer:
        assert writer.add([Document("extra", "zebra")]) == 1
    assert "extra" not in store, "a reader keeps its generation"
    assert store.refresh()
    assert (store.generation, len(store)) == (2, 4)
    assert [hit.id for hit in store.search("zebra")] == ["extra"]
    assert not store.is_routed("extra")
    with pytest.raises(errors.Unrouted, match="extra"):
        store.routes(["extra"])
    assert store.info().unrouted == 1


def test_a_writer_goes_on_after_a_commit(store: Store) -> None:
    with store.writer() as writer:
        writer.add([Document("a", "alpha")])
        assert writer.commit() == 2
        writer.add([Document("b", "beta")])
        assert writer.commit() == 3
        writer.delete(["a"])
    store.refresh()
    assert store.generation == 4
    assert [hit.id for hit in store.search("alpha beta")] == ["b"]


def test_a_writer_is_closed_after_its_block(store: Store) -> None:
    with store.writer() as writer:
        pass
    for call in (
        writer.commit,
        lambda: writer.add(documents("x")),
        lambda: writer.delete(["d0"]),
        lambda: writer.add_arrays(["x"], make_logits(1)),
        writer.__enter__,
    ):
        with pytest.raises(errors.StoreClosed, match="with block"):
            call()
    with store.writer() as writer:
        writer.discard()
    with pytest.raises(errors.StoreClosed, match="discarded"):
        writer.commit()
    writer.discard()


def test_a_failed_call_in_the_block_discards(store: Store) -> None:
    with pytest.raises(errors.DuplicateId, match="d0"), store.writer() as writer:
        writer.add([Document("fine")])
        writer.add([Document("d0")])
    assert not store.refresh()


def test_one_writer_at_a_time(store: Store) -> None:
    with store.writer(), pytest.raises(errors.StoreLocked, match=str(os.getpid())):
        store.writer()
    with store.writer():
        pass


def test_all_or_none_of_a_call(store: Store) -> None:
    with store.writer() as writer:
        with pytest.raises(errors.DuplicateId, match="d1"):
            writer.add([Document("new"), Document("d1")])
        with pytest.raises(errors.DuplicateId, match="twin"):
            writer.add([Document("twin"), Document("twin")])
        with pytest.raises(errors.InvalidInput, match="Document"):
            writer.add([Document("new"), "d1"])  # type: ignore[list-item]
        for routes in (make_logits(2), make_logits(1)[0], make_logits(1)[..., :-1]):
            with pytest.raises(errors.InvalidInput, match=r"shape|routes"):
                writer.add([Document("new")], routes)
        with pytest.raises(errors.InvalidInput, match="int64"):
            writer.add([Document("new")], np.zeros((1, GROUPS, K), dtype=np.int64))
        with pytest.raises(errors.InvalidInput, match="on_duplicate"):
            writer.add([], on_duplicate="perhaps")  # type: ignore[arg-type]
    store.refresh()
    assert list(store) == ["d0", "d1", "d2"]


def test_duplicates_and_deletes(store: Store) -> None:
    z = make_logits(2, seed=9)
    with store.writer() as writer:
        assert writer.add([Document("d1", "kept out"), Document("n", "walrus")], z, on_duplicate="skip") == 1
        assert writer.add([Document("d0", "osprey")], z[:1], on_duplicate="replace") == 1
        assert writer.delete(["d2"]) == 1
    store.refresh()
    assert sorted(store) == ["d0", "d1", "n"]
    assert store.search("lighthouse Saltmarket drums") == []
    assert [hit.id for hit in store.search("osprey")] == ["d0"]
    np.testing.assert_array_equal(store.routes(["d0", "n"], "z"), z)
    np.testing.assert_array_equal(store.routes(["d1"], "z")[0], make_logits(3)[1])


def test_float64_and_strided_routes_are_taken(path: Path) -> None:
    z = make_logits(6)
    with Store.create(path, make_spec(), make_experts()) as writer:
        writer.add_arrays(["a", "b", "c"], z[::2])
        writer.add_arrays(["d", "e", "f"], z[1::2].astype(np.float64))
    with Store.open(path) as store:
        np.testing.assert_array_equal(store.routes(list("adbecf"), "z"), z)


# --- many ids at once -------------------------------------------------------------------------------


def in_order(store: Store, ids: Sequence[str | int], z: np.ndarray[Any, Any]) -> None:
    assert list(store) == ids
    np.testing.assert_array_equal(store.routes(ids, "z"), z)


@pytest.mark.parametrize(
    "numbers",
    [
        np.array([9, 3, 2**64 - 1, 0], dtype=np.uint64),
        np.array([9, 3, 2**63 - 1, 0], dtype=np.int64),
        np.array([9, 3, 255, 0], dtype=np.uint8),
        np.array([9, 3, 7, 0], dtype=">i4"),
        np.arange(8, dtype=np.uint64)[::-2],
    ],
    ids=["uint64", "int64", "uint8", "big endian", "strided"],
)
def test_integers_of_an_array_as_ids(path: Path, numbers: Any) -> None:
    z = make_logits(4)
    with Store.create(path, make_spec(id_type="u64"), make_experts()) as writer:
        assert writer.add_arrays(numbers, z) == 4
    with Store.open(path) as store:
        in_order(store, numbers.tolist(), z)
        np.testing.assert_array_equal(store.routes(numbers[1:], "z"), z[1:])
        with store.writer() as writer:
            assert writer.delete(numbers[:2]) == 2
        assert store.refresh()
        in_order(store, numbers.tolist()[2:], z[2:])


@pytest.mark.parametrize(
    "texts",
    [
        np.array(["a", "bö", "灯台", "d d"]),
        np.array(["a", "bö", "灯台", "d d"], dtype=">U9"),
        np.array(["a", "-", "bö", "-", "灯台", "-", "d d"])[::2],
        np.char.encode(np.array(["a", "bö", "灯台", "d d"]), "utf-8"),
        np.array(["a", "bö", "灯台", "d d"], dtype=object),
    ],
    ids=["U", "big endian", "strided", "S", "objects"],
)
def test_text_of_an_array_as_ids(path: Path, texts: Any) -> None:
    z = make_logits(4)
    with Store.create(path, make_spec(), make_experts()) as writer:
        assert writer.add_arrays(texts, z) == 4
    with Store.open(path) as store:
        in_order(store, ["a", "bö", "灯台", "d d"], z)
        np.testing.assert_array_equal(store.routes(texts, "z"), z)


def test_arrays_that_hold_no_ids(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    with Store.create(path, make_spec(id_type="u64"), make_experts()) as writer:
        refused: list[tuple[Any, str]] = [
            (np.array([0, -1]), "id -1"),
            (np.array(["7", "8"]), "integers"),
            (np.array([b"7", b"8"]), "integers"),
            (np.array([7.0, 8.0]), "id"),
            (np.array([True, False]), "id"),
            (np.array([[1, 2]]), "id"),
            (np.array(7), "sequence of ids"),
            (np.array([1, 2, 3]), "shape"),
        ]
        for ids, match in refused:
            with pytest.raises(errors.InvalidInput, match=match):
                writer.add_arrays(ids, make_logits(2))
        assert writer.add_arrays(np.array([], dtype=np.uint64), make_logits(0)) == 0
    assert len(Store.open(path)) == 0, "a refused call stages nothing"
    with store.writer() as writer:
        for ids, match in (
            (np.array([1, 2]), "strings"),
            (np.array([b"fine", b"\xff"]), r"\\xff.*UTF-8"),
            (np.array(["a", "\ud800"]), "Unicode"),
            (np.array(["a", ""]), "1 to 512"),
            (np.array(["", ""]), "1 to 512"),
            (np.array(["a", "x" * 600]), "1 to 512"),
        ):
            with pytest.raises(errors.InvalidInput, match=match):
                writer.add_arrays(ids, make_logits(2))
        z = make_logits(2)
        z[1, 0, 0] = np.nan
        with pytest.raises(errors.InvalidInput, match=r'document "b".*number 0 is NaN'):
            writer.add_arrays(np.array(["a", "b"]), z)
    assert not store.refresh()


def test_duplicates_of_what_came_in_bulk_are_found_later(store: Store) -> None:
    ids, z = np.array(["d1", "n", "n"]), make_logits(3, seed=9)
    with pytest.raises(errors.DuplicateId, match="d1"), store.writer() as writer:
        assert writer.add_arrays(ids[:2], z[:2]) == 2
    writer = store.writer()
    assert writer.add_arrays(ids[1:], z[1:]) == 2
    with pytest.raises(errors.DuplicateId, match='"n"'):
        writer.add([Document("later")])
    with pytest.raises(errors.StoreClosed, match="failed before"):
        writer.commit()
    assert not store.refresh()
    with store.writer() as writer:
        writer.add_arrays(ids, z, on_duplicate="skip")
    assert store.refresh()
    assert list(store) == ["d0", "d1", "d2", "n"]
    np.testing.assert_array_equal(store.routes(["d1", "n"], "z"), [make_logits(3)[1], z[1]])
    with store.writer() as writer:
        writer.add_arrays(ids, z, on_duplicate="replace")
    assert store.refresh()
    assert list(store) == ["d0", "d2", "d1", "n"]
    np.testing.assert_array_equal(store.routes(["d1", "n"], "z"), z[[0, 2]])
    assert store.search("Tidal") == [], "what was replaced is not found by its words any more"


# --- the whole store --------------------------------------------------------------------------------


def parts(store: Store) -> dict[str, int]:
    return {part.role: part.bytes for part in store.info().parts}


def test_compact(store: Store, path: Path) -> None:
    for i in range(3):
        with store.writer() as writer:
            writer.add([Document(f"x{i}", f"filler {i}")], make_logits(1, seed=i))
            writer.delete([f"d{i}"] if i < 2 else ["x0"])
    assert store.refresh()
    kept, before = list(store), store.info()
    assert kept == ["d2", "x1", "x2"]
    docnos = [hit.docno for hit in store.search("Saltmarket filler")]
    z = store.routes(kept, "z")
    with store.writer() as writer:
        assert writer.compact() == before.generation + 1
    assert list(store) == kept, "a reader keeps its generation"
    assert store.refresh()
    after = store.info()
    assert after.total_bytes < before.total_bytes
    assert "dead" not in parts(store)
    assert [part.files for part in after.parts if part.role in ("routes", "ids", "documents")] == [1, 1, 1]
    np.testing.assert_array_equal(store.routes(kept, "z"), z)
    assert [hit.docno for hit in store.search("Saltmarket filler")] == docnos
    assert store.documents(["d2"]) == documents()[2:]
    assert store.verify().documents == 3


def test_merge(store: Store, tmp_path: Path) -> None:
    store.snapshot(tmp_path / "sister")
    sister = Store.open(tmp_path / "sister")
    z = make_logits(2, seed=5)
    with sister.writer() as writer:
        writer.add([Document("s", "A sister ship.")], z[:1])
        writer.add([Document("d1", "Another Oda.")], z[1:], on_duplicate="replace")
        writer.delete(["d0"])
    sister.refresh()
    with pytest.raises(errors.DuplicateId, match="d2"), store.writer() as writer:
        assert writer.merge(sister) == 3
    with store.writer() as writer:
        assert writer.merge(sister, on_duplicate="skip") == 3
    store.refresh()
    assert list(store) == ["d0", "d1", "d2", "s"]
    np.testing.assert_array_equal(store.routes(["d1", "s"], "z"), [make_logits(3)[1], z[0]])
    assert [hit.id for hit in store.search("sister")] == ["s"]
    with store.writer() as writer:
        writer.merge(sister, on_duplicate="replace")
    store.refresh()
    assert sorted(store) == ["d0", "d1", "d2", "s"]
    np.testing.assert_array_equal(store.routes(["d1", "s"], "z"), z[::-1])
    assert store.documents(["d1"]) == [Document("d1", "Another Oda.")]
    assert store.verify().documents == 4


def test_equal_scales_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with Store.create(path, make_spec(codec="q8"), make_experts()) as writer:
        writer.add(documents(), make_logits(3))
    store = Store.open(path)
    store.snapshot(tmp_path / "sister")
    with Store.open(tmp_path / "sister") as sister, sister.writer() as writer:
        writer.add([Document("s", "A sister ship.")], make_logits(3)[:1])
    with store.writer() as writer:
        writer.add([Document("far", "Far away.")], 100 * make_logits(1))  # with scales of its own
    store.refresh()
    with store.writer() as writer, Store.open(tmp_path / "sister") as sister:
        writer.merge(sister, on_duplicate="skip")
    store.refresh()
    assert [part.files for part in store.info().parts if part.role == "scales"] == [2]
    np.testing.assert_array_equal(store.routes(["s"]), store.routes(["d0"]))

    stranger = Store.create(tmp_path / "stranger", make_spec(alpha=8.0), make_experts())
    stranger.commit()
    with store.writer() as writer:
        with pytest.raises(errors.InvalidInput, match="alpha"):
            writer.merge(Store.open(tmp_path / "stranger"))
        sister.close()
        with pytest.raises(errors.StoreClosed):
            writer.merge(sister)
        with pytest.raises(TypeError):
            writer.merge("sister")  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidInput, match="on_duplicate"):
            writer.merge(store, on_duplicate="perhaps")  # type: ignore[arg-type]
    assert not store.refresh()


def test_reindex_repairs_a_broken_index(store: Store, path: Path) -> None:
    postings = next((path / "bm25").glob("*.idx"))
    postings.write_bytes(postings.read_bytes()[:-1])
    broken = Store.open(path)
    with pytest.raises(errors.CorruptIndex, match="polyprag reindex STORE"):
        broken.search("Tidal")
    with broken.writer() as writer:
        assert writer.reindex() == 2
    assert broken.refresh()
    assert [hit.id for hit in broken.search("Tidal lighthouse")] in (["d1", "d0"], ["d0", "d1"])
    assert broken.verify().documents == 3

    without = path.with_name("without")
    Store.create(without, make_spec(keep_text=False), make_experts()).commit()
    with pytest.raises(errors.InvalidInput, match="keeps no text"), Store.open(without).writer() as writer:
        writer.reindex()


def test_rollback(store: Store) -> None:
    with pytest.raises(errors.InvalidInput, match="no generation before"), store.writer() as writer:
        writer.rollback()
    with store.writer() as writer:
        writer.delete(["d0", "d1"])
    with store.writer() as writer:
        assert writer.rollback() == 3
    assert store.refresh()
    assert list(store) == ["d0", "d1", "d2"]
    assert store.search("Tidal")[0].id == "d1"
    assert store.verify().documents == 3
    with store.writer() as writer:
        assert writer.rollback() == 4, "going back can be undone"
    store.refresh()
    assert list(store) == ["d2"]


def test_going_back_after_a_deletion_of_nothing(store: Store) -> None:
    """Deleting no ids stages nothing; what it looked at must not outlive the generation that is left."""
    with store.writer() as writer:
        writer.add([Document("late", "The zebra came late.")], make_logits(1))
    store.refresh()
    with store.writer() as writer:
        assert writer.delete([]) == 0
        writer.rollback()
        writer.add([Document("new", "A newcomer.")], make_logits(1))
    store.refresh()
    assert store.search("zebra") == []
    assert [hit.id for hit in store.search("newcomer")] == ["new"]
    store.verify()


def test_a_commit_of_nothing_takes_no_number(store: Store, path: Path) -> None:
    """What a killed writer left may lie under the next number, where the clean-up cannot remove it."""
    with store.writer() as writer:
        writer.add(documents("e"), make_logits(3))
    with (path / "manifest-00000001.json").open("ab") as file:
        file.write(b"damage")  # no clean-up without it
    (path / "ids-00000003.seg").write_bytes(b"left behind")
    store.refresh()
    with store.writer() as writer:
        assert writer.commit() == 2
        writer.add(documents("f"), make_logits(3))
        assert writer.commit() > 3
    assert len(Store.open(path)) == 9


def test_what_changes_the_whole_store_goes_by_what_is_committed(store: Store) -> None:
    with store.writer() as writer:
        writer.delete(["d0"])
        for call in (writer.compact, writer.reindex, writer.rollback):
            with pytest.raises(errors.InvalidInput, match="commit or discard"):
                call()
        writer.commit()
        writer.compact()
        writer.add([Document("more", "zebra")])
    assert store.refresh()
    assert (store.generation, list(store)) == (4, ["d1", "d2", "more"])
    for call in (writer.compact, writer.reindex, writer.rollback, lambda: writer.merge(store)):
        with pytest.raises(errors.StoreClosed, match="with block"):
            call()


def test_copies_have_the_digest_of_their_source(store: Store, tmp_path: Path) -> None:
    digest = store.digest()
    assert len(bytes.fromhex(digest)) == 32
    assert digest == digest.lower()
    store.snapshot(tmp_path / "copy")
    store.pack(tmp_path / "one.tar")
    store.pack(tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    Store.unpack(tmp_path / "one.tar", tmp_path / "unpacked")
    for name in ("copy", "unpacked"):
        with Store.open(tmp_path / name, expect_digest=digest) as same:
            assert same.digest() == digest
            assert same.verify().documents == 3
            np.testing.assert_array_equal(same.routes(list(same), "z"), make_logits(3))
            assert same.documents(list(same)) == documents()
            assert same.search("Tidal")[0].id == "d1"
    with store.writer() as writer:
        writer.delete(["d0"])
    assert store.digest() == digest, "a reader keeps its generation"
    with pytest.raises(errors.CorruptStore, match=digest):
        Store.open(store.path, expect_digest=digest)
    store.snapshot(tmp_path / "older")
    assert list(Store.open(tmp_path / "older", expect_digest=digest)) == ["d0", "d1", "d2"]


def test_copies_go_nowhere_else(store: Store, path: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    for call in (store.snapshot, store.pack):
        with pytest.raises(FileExistsError):
            call(tmp_path / "there")
        with pytest.raises(FileNotFoundError):
            call(tmp_path / "no" / "such")
    store.pack(tmp_path / "packed")
    whole = (tmp_path / "packed").read_bytes()
    with pytest.raises(FileExistsError):
        Store.unpack(tmp_path / "packed", path)
    with pytest.raises(FileNotFoundError):
        Store.unpack(tmp_path / "none", tmp_path / "new")
    middle = bytearray(whole)
    middle[len(whole) // 2] ^= 1
    for bad in (b"", b"x" * 2048, whole[: len(whole) // 2], bytes(middle)):
        (tmp_path / "packed").write_bytes(bad)
        with pytest.raises(errors.CorruptStore):
            Store.unpack(tmp_path / "packed", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["island.polyprag", "packed", "there"]


# --- other processes --------------------------------------------------------------------------------

COMPACTS = """
import sys
from polyprag import Document, Store
for i in range(3):
    with Store.open(sys.argv[1]).writer() as writer:
        writer.delete([f"d{i}"])
        writer.add([Document(f"new{i}", "zebra")])
    with Store.open(sys.argv[1]).writer() as writer:
        writer.compact()
"""


def test_a_reader_keeps_its_generation_while_another_process_compacts(store: Store, path: Path) -> None:
    reading = Store.open(path)
    run_python(COMPACTS, str(path))
    assert (reading.generation, list(reading)) == (1, ["d0", "d1", "d2"])
    assert [hit.id for hit in reading.search("lighthouse")] == ["d0"]
    assert reading.documents(["d0", "d1", "d2"]) == documents()
    np.testing.assert_array_equal(reading.routes(["d2", "d0"], "z"), make_logits(3)[[2, 0]])
    assert reading.verify().documents == 3
    assert reading.refresh()
    assert (reading.generation, list(reading)) == (7, ["new0", "new1", "new2"])
    assert reading.verify().documents == 3
    assert not reading.search("lighthouse")
    assert len(reading.search("zebra")) == 3


SECOND = """
import sys
from polyprag import Store, errors
try:
    Store.open(sys.argv[1]).writer()
except errors.StoreLocked as error:
    print(error)
"""


def test_the_second_writer_is_told_of_the_first(store: Store, path: Path) -> None:
    with store.writer():
        told = run_python(SECOND, str(path))
    assert f"process {os.getpid()} on " in told
    assert str(path) in told
    assert run_python(SECOND, str(path)) == ""


# --- closing ----------------------------------------------------------------------------------------


def test_closed_store(store: Store) -> None:
    with store as same:
        assert same is store
    assert store.closed
    store.close()
    calls: list[Any] = [
        lambda: store.search("x"),
        lambda: store.search_many(["x"]),
        lambda: store.routes(["d0"]),
        lambda: store.combined_route(["d0"]),
        lambda: store.documents(["d0"]),
        lambda: store.is_routed("d0"),
        lambda: store.experts,
        lambda: store.decoder,
        lambda: store.spec,
        lambda: store.generation,
        lambda: len(store),
        lambda: iter(store),
        lambda: "d0" in store,
        store.writer,
        store.info,
        store.verify,
        store.refresh,
        store.digest,
        lambda: store.snapshot("copy"),
        lambda: store.pack("packed"),
        store.__enter__,
    ]
    for call in calls:
        with pytest.raises(errors.StoreClosed):
            call()
    with pytest.raises(ValueError, match="closed"):
        len(store)
    assert "closed" in repr(store)


def test_reprs(store: Store) -> None:
    assert "3 documents" in repr(store)
    assert "generation 1" in repr(store)
    writer = store.writer()
    assert "open" in repr(writer)
    writer.discard()
    assert "closed" in repr(writer)
    long = repr(Document("d", "x" * 1000, "t"))
    assert len(long) < 200
    assert "Document('d'" in long
    assert "d1" in repr(store.search("Tidal")[0])
    for thing in (store.info(), store.info().parts[0], store.verify(), store.spec, MODULES[0], Combination()):
        assert repr(thing).startswith(type(thing).__name__)


# --- values -----------------------------------------------------------------------------------------


def test_document_is_a_value() -> None:
    a = Document("d", "text", "title", {"b": [1, None, "é"], "a": {"deep": True}})
    b = Document("d", "text", "title", {"a": {"deep": True}, "b": [1, None, "é"]})
    assert a == b
    assert hash(a) == hash(b)
    assert a != Document("d", "text", "title")
    assert a != Document(1, "text")
    assert a != "d"
    assert list(a.metadata or ()) == ["b", "a"], "the order of keys is kept"
    metadata = a.metadata
    assert metadata is not None
    metadata["b"] = 0
    assert a == b, "what is handed out is a copy"
    with pytest.raises(AttributeError):
        a.text = "other"  # type: ignore[misc]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(a, protocol))  # noqa: S301
        assert back == a
        assert back.metadata == a.metadata
    assert copy.deepcopy(a) == a
    assert pickle.loads(pickle.dumps(Document(2**64 - 1))).id == 2**64 - 1  # noqa: S301
    for bad in ({"x": float("nan")}, {"x": object()}, ["x"], "x", {"x": "\ud800"}):
        with pytest.raises(errors.InvalidInput, match="metadata"):
            Document("d", metadata=bad)  # type: ignore[arg-type]
    with pytest.raises(errors.InvalidInput, match="Unicode"):
        Document("d", "\ud800")


def test_errors_are_picklable(store: Store) -> None:
    with pytest.raises(errors.UnknownId) as caught:
        store.routes(["nope"])
    back = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert type(back) is errors.UnknownId
    assert str(back) == str(caught.value)
    with pytest.raises(FileNotFoundError) as missing:
        Store.open("/nowhere/at/all")
    again = pickle.loads(pickle.dumps(missing.value))  # noqa: S301
    assert (type(again), again.errno, again.filename) == (FileNotFoundError, errno.ENOENT, "/nowhere/at/all")


def test_bad_specs() -> None:
    bad: list[dict[str, Any]] = [
        {"experts": 0},
        {"experts": -1},
        {"experts": True},
        {"rank": 0},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"codec": "f8"},
        {"codec": "code(0)"},
        {"phi": "relu"},
        {"top_k": 9},
        {"mixing": "stir"},
        {"id_type": "uuid"},
        {"stemmer": "klingon"},
        {"modules": []},
        {"base_model": {"x": object()}},
        {"modules": [Module("a", 1, 1, 1)]},
        {"combination": Combination(k=0)},
        {"experts": 2**40},
    ]
    for changes in bad:
        with pytest.raises(errors.InvalidInput):
            make_spec(**changes)
    with pytest.raises(errors.InvalidInput, match="rule"):
        Combination(rule="best")  # type: ignore[arg-type]
    spec = make_spec(combination=Combination(3, "score", 0.5), stemmer="english", keep_text=False)
    assert (spec.combination.k, spec.combination.rule, spec.combination.temperature) == (3, "score", 0.5)
    assert spec.stemmer == "english"
    assert not spec.keep_text


# --- questions --------------------------------------------------------------------------------------

SCRIPTS = {
    "arabic": ("تقع المنارة في ميناء الريشة", "أين المنارة؟"),
    "hebrew": ("המגדלור נמצא בנמל הנוצה", "איפה המגדלור?"),
    "greek": ("Ο φάρος βρίσκεται στο λιμάνι", "πού είναι ο ΦΆΡΟΣ;"),
    "cyrillic": ("Маяк стоит в гавани", "где МАЯК?"),
    "hindi": ("प्रकाशस्तंभ बंदरगाह में है", "प्रकाशस्तंभ कहाँ है?"),
    "thai": ("ประภาคารตั้งอยู่ที่ท่าเรือขนนก", "ประภาคารอยู่ที่ไหน"),
    "chinese": ("灯塔位于羽毛港。", "灯塔在哪里？"),
    "japanese": ("灯台は羽港にあります。", "「灯台」はどこですか？"),
    "korean": ("등대는 깃털 항구에 있다", "등대가 어디에 있나요?"),
    "accents": ("Le phare de Saint-Étienne brûle", "ou est le phare de saint-e\u0301tienne"),
    "full width": ("ＬＩＧＨＴ １８７４", "light 1874"),
}


def test_a_spec_that_could_not_be_read_again_is_refused_at_once(path: Path) -> None:
    nested: dict[str, Any] = {}
    for _ in range(125):
        nested = {"deeper": nested}
    for recipe in (nested, {"losses": [1] * 1_100_000}):
        with pytest.raises(errors.InvalidInput, match=r"recursion|values"):
            Store.create(path, make_spec(recipe=recipe), make_experts())
    assert list(path.parent.iterdir()) == []


def test_numbers_of_a_spec_come_back_as_they_were(path: Path) -> None:
    rng = np.random.default_rng(0)
    numbers = (rng.random(500) * 10.0 ** rng.integers(-20, 20, 500)).tolist()
    recipe = {
        "numbers": numbers,
        "seeds": [2**64 - 1, -(2**63)],
        "text": 'a "quoted" \\ 123456789012345678901',
    }
    spec = make_spec(recipe=recipe, alpha=90.88184001853247)
    Store.create(path, spec, make_experts()).commit()
    with Store.open(path) as store:
        assert (store.spec.recipe, store.spec.alpha) == (recipe, spec.alpha)
    for number in (2**64, -(2**63) - 1, 2**70):
        with pytest.raises(errors.InvalidInput, match=f"{number} has more than 64 bits"):
            make_spec(recipe={"seed": [1, {"a": number}]})


def test_other_scripts_are_found_by_their_own_questions(path: Path) -> None:
    with Store.create(path, make_spec(), make_experts()) as writer:
        writer.add([Document(name, text) for name, (text, _) in SCRIPTS.items()])
    with Store.open(path) as store:
        for name, (_, question) in SCRIPTS.items():
            hits = store.search(question)
            assert hits, name
            assert hits[0].id == name


def test_hostile_questions_are_text(store: Store) -> None:
    for nothing in ("", " ", "?!…", ":", '"', "*", "()", "\0", "\ud800", "~", "\\", "+-"):
        assert store.search(nothing) == []
    for question in (
        'title:"Tidal Code"',
        "Tidal AND",
        "NOT Tidal",
        "Tidal*",
        "(Tidal",
        'Tidal "',
        "Tidal~2",
        "[Tidal TO",
        "Tidal^5",
        "/Tidal/",
        "Tidal\ud800",
        "Tidal " * 100_000,
        "body:Tidal",
        "*:* Tidal",
    ):
        assert store.search(question)[0].id == "d1", question[:20]
    with pytest.raises(TypeError):
        store.search(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        store.search_many("one text")
    for k in (-1, 1.5, "3", True):
        with pytest.raises(errors.InvalidInput, match="k"):
            store.search("Tidal", k)  # type: ignore[arg-type]


# --- threads and processes --------------------------------------------------------------------------


def test_sixteen_threads_search_while_a_writer_commits(store: Store) -> None:
    stop = threading.Event()

    def search(_: int) -> int:
        n = 0
        while not stop.is_set() or n < 50:
            assert store.search("Tidal Code", 1)[0].id == "d1"
            assert store.routes(["d0", "d1"]).shape == (2, GROUPS, K)
            n += 1
        return n

    with ThreadPoolExecutor(16) as pool:
        running = [pool.submit(search, i) for i in range(16)]
        for i in range(12):
            with store.writer() as writer:
                writer.add([Document(f"more{i}", f"filler number {i}")], make_logits(1))
            assert store.refresh()
        stop.set()
        assert all(done.result() >= 50 for done in running)
    assert len(store) == 15
    assert store.verify().documents == 15


def _search_in_child(store: Store, queue: Any) -> None:
    queue.put([hit.id for hit in store.search("Tidal Code", 1)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_can_search(store: Store) -> None:
    store.search("Tidal")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    children = [context.Process(target=_search_in_child, args=(store, queue)) for _ in range(4)]
    for child in children:
        child.start()
    found = [queue.get() for _ in children]
    for child in children:
        child.join(30)
        assert child.exitcode == 0
    assert found == [["d1"]] * 4


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_leaves_the_writer_alone(tmp_path: Path) -> None:
    # A fresh interpreter: the child must end by the ordinary way, which collects its objects.
    out = run_python(
        """
        import os, sys
        from polyprag import Document, Store, errors
        from test_store import make_spec, make_experts
        def work():
            writer = Store.create(sys.argv[1], make_spec(), make_experts())
            writer.add([Document("a", "alpha")])
            if (child := os.fork()) == 0:
                try:
                    writer.commit()
                except errors.StoreClosed as error:
                    assert "fork" in str(error)
                    return
                os._exit(9)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            writer.commit()
            print([hit.id for hit in Store.open(sys.argv[1]).search("alpha")])
        work()
        """,
        str(tmp_path / "s"),
    )
    assert out.strip() == "['a']"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_keeps_no_lock(tmp_path: Path) -> None:
    out = run_python(
        """
        import os, signal, sys, time
        from polyprag import Document, Store
        from test_store import make_spec, make_experts
        writer = Store.create(sys.argv[1], make_spec(), make_experts())
        if (child := os.fork()) == 0:
            time.sleep(60)
            os._exit(9)
        writer.commit()
        writer.discard()
        with Store.open(sys.argv[1]).writer() as writer:
            writer.add([Document("a", "alpha")])
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(list(Store.open(sys.argv[1])))
        """,
        str(tmp_path / "s"),
    )
    assert out.strip() == "['a']"


# --- what the disk does -----------------------------------------------------------------------------


def run_python(code: str, *arguments: str, ok: bool = True) -> str:
    """A fresh interpreter that finds this file as ``test_store``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert not ok or done.returncode == 0, done.stderr
    return done.stdout


def test_a_folder_that_was_replaced_under_a_reader(store: Store, path: Path, tmp_path: Path) -> None:
    store.snapshot(tmp_path / "new")
    path.rename(tmp_path / "old")
    (tmp_path / "new").rename(path)
    store.refresh()
    assert store.search("Tidal")[0].id == "d1", "a reader keeps the folder that it has open"
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(errors.NotAStore, match="removed while it was open"):
        store.refresh()
    assert len(Store.open(path)) == 3


def test_paths_that_are_no_store(tmp_path: Path, store: Store) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        Store.open(tmp_path / "missing")
    assert missing.value.filename == str(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("empty", "file"):
        with pytest.raises(errors.NotAStore, match=name):
            Store.open(tmp_path / name)
    with pytest.raises((FileExistsError, errors.InvalidInput)):
        Store.create(store.path, make_spec(), make_experts())
    with pytest.raises(FileNotFoundError):
        Store.create(tmp_path / "no" / "such" / "place", make_spec(), make_experts())
    assert len(Store.open(store.path)) == 3


def test_the_clean_up_leaves_strangers_files(store: Store, path: Path) -> None:
    names = [
        *("eval-2024.json", "run-7.bin", "model-00001-of-00002.safetensors", "photo-20240101.jpg"),
        *("bm25-results.csv", "meta-12.json", "routes-1.seg", "notes-18446744073709551615.txt"),
    ]
    for name in names:
        (path / name).write_text("a stranger's")
    (path / "ids-00000007.seg").write_text("of a killed writer")
    (path / "bm25" / "folder").mkdir()
    for n in range(4):
        with store.writer() as writer:
            writer.add([Document(f"n{n}", "something new")], make_logits(1))
        store.refresh()
    assert {name for name in names if not (path / name).exists()} == set()
    assert store.generation == 5, "no number is above that of a stranger's file"
    assert not (path / "ids-00000007.seg").exists()
    assert len(list(path.glob("manifest-*.json"))) == 2
    assert len(list((path / "bm25").glob("meta-*.json"))) == 2, "a folder there stops no clean-up"


def test_a_new_store_leaves_strangers_files_beside_it(tmp_path: Path, store: Store) -> None:
    (tmp_path / ".s.tmp-notes").write_text("a stranger's")
    (tmp_path / ".s.tmp-backup").mkdir()
    (tmp_path / ".s.tmp-backup" / "thesis.txt").write_text("a stranger's")
    (tmp_path / ".s.tmp-123-abc").mkdir()  # of a process that was killed
    (tmp_path / ".polyprag-pack-old").write_text("a stranger's")
    Store.create(tmp_path / "s", make_spec(), make_experts()).discard()
    store.pack(tmp_path / "packed")
    left = {file.name for file in tmp_path.iterdir()} - {Path(store.path).name, "packed"}
    assert left == {".s.tmp-notes", ".s.tmp-backup", ".polyprag-pack-old"}
    assert (tmp_path / ".s.tmp-backup" / "thesis.txt").exists()


def test_a_store_half_written(store: Store, path: Path) -> None:
    store.close()
    # A commit that was cut off before CURRENT: its files are there, and nobody minds.
    for name in ("manifest-00000002.json", "routes-00000002-0.seg", "bm25/meta-2.json", "CURRENT.new"):
        (path / name).write_bytes(b"{")
    assert list(Store.open(path)) == ["d0", "d1", "d2"]
    with Store.open(path).writer() as writer:
        writer.add([Document("later", "zebra")])
    assert [hit.id for hit in Store.open(path).search("zebra")] == ["later"]
    # One whose CURRENT never came.
    (path / "CURRENT").unlink()
    with pytest.raises(errors.NotAStore):
        Store.open(path)


def test_damage_has_a_class_and_spares_the_routes(store: Store, path: Path) -> None:
    store.close()
    postings = next((path / "bm25").glob("*.idx"))
    whole = postings.read_bytes()
    postings.write_bytes(whole[:-1])
    broken = Store.open(path)
    with pytest.raises(errors.CorruptIndex, match=postings.name):
        broken.search("Tidal")
    with pytest.raises(errors.CorruptIndex):
        broken.verify()
    np.testing.assert_array_equal(broken.routes(["d1"], "z")[0], make_logits(3)[1])
    postings.write_bytes(whole)
    assert Store.open(path).search("Tidal")

    for part in sorted(path.glob("*.seg")) + sorted(path.glob("*.safetensors")):
        whole = part.read_bytes()
        part.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(errors.CorruptStore):
            Store.open(path)
        flipped = bytearray(whole)
        flipped[-1] ^= 1
        part.write_bytes(flipped)
        with pytest.raises(errors.CorruptStore):
            Store.open(path).verify()
        part.write_bytes(whole)
    Store.open(path).verify()


AS_NOBODY = """
import os, sys
from polyprag import Store, errors
os.setgid(65534); os.setuid(65534)
try:
    store = Store.open(sys.argv[1])
    print("read", len(store.search("Tidal")))
    store.writer()
except PermissionError as error:
    print("PermissionError", error.errno, error.filename)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become nobody")
def test_no_permission(store: Store, path: Path) -> None:
    for parent in path.parents:
        if parent.stat().st_uid == 0 and parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(0o755)
    assert run_python(AS_NOBODY, str(path)).splitlines()[0] == "read 1", "reading needs no right to write"
    assert "PermissionError" in run_python(AS_NOBODY, str(path))
    path.chmod(0o700)
    assert run_python(AS_NOBODY, str(path)).startswith(f"PermissionError {errno.EACCES} {path}")


def test_read_only_mount(store: Store, path: Path, tmp_path: Path) -> None:
    store.close()
    at = tmp_path / "mount"
    at.mkdir()
    with Mount("--bind", str(path), at=at):
        if subprocess.run(
            ["mount", "-o", "remount,ro,bind", str(at)], check=False, capture_output=True
        ).returncode:
            pytest.skip("this machine allows no read-only remount")
        with Store.open(at) as still:
            assert still.search("Tidal")[0].id == "d1"
            assert still.verify().documents == 3
            with pytest.raises(OSError, match=r"[Rr]ead-only") as refused:
                still.writer()
        assert refused.value.errno == errno.EROFS


def test_full_disk(tmp_path: Path) -> None:
    at = tmp_path / "small"
    at.mkdir()
    with Mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", at=at):
        path = at / "s"
        with Store.create(path, make_spec(), make_experts()) as writer:
            writer.add(documents(), make_logits(3))
        words = " ".join(f"w{i}" for i in range(20_000))
        for _ in range(2):
            with pytest.raises(OSError, match="No space left") as full, Store.open(path).writer() as writer:
                writer.add([Document(f"big{i}", f"{i} " + words[i:]) for i in range(60)])
            assert full.value.errno == errno.ENOSPC
            assert str(at) in str(full.value.filename)
        with Store.open(path) as store:
            assert (store.generation, list(store)) == (1, ["d0", "d1", "d2"])
            store.verify()
            assert store.search("Tidal")[0].id == "d1"
            with store.writer() as writer:
                writer.add([Document("small", "zebra")])
            assert store.refresh()
            assert store.search("zebra")[0].id == "small"


LIMITED = """
import resource, signal, sys
from polyprag import Document, Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
words = " ".join(f"w{i}" for i in range(20_000))
try:
    with Store.open(sys.argv[1]).writer() as writer:
        writer.add([Document(f"big{i}", f"{i} " + words[i:]) for i in range(20)])
except OSError as error:
    print(error.errno, error.filename)
"""


@pytest.mark.parametrize("limit", [10, 1_000, 20_000])
def test_files_that_may_not_grow(store: Store, path: Path, limit: int) -> None:
    pytest.importorskip("resource")
    number, filename = run_python(LIMITED, str(path), str(limit)).strip().split(" ", 1)
    assert int(number) == errno.EFBIG
    assert filename.startswith(str(path))
    assert not store.refresh()
    store.verify()
    with store.writer() as writer:
        writer.add([Document("later", "zebra")])
    assert store.refresh()
    assert store.search("zebra")[0].id == "later"


def test_writer_is_what_create_returns(path: Path) -> None:
    writer = Store.create(path, make_spec(), make_experts())
    assert isinstance(writer, Writer)
    del writer
    assert list(path.parent.iterdir()) == [], "dropped without a commit, it leaves no trace"
