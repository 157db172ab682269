"""Recoding: routes against numpy in float64, the figures that are told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from polyprag import Document, Store, errors, recode
from polyprag.recoding import LEAST_WEIGHT, fit_decoder
from test_store import GROUPS, K, make_experts, make_spec, sigmoid_route

COLUMNS = GROUPS * K
Floats = NDArray[np.floating[Any]]


def low_rank(n: int, rank: int, seed: int = 3) -> NDArray[np.float32]:
    """Logits [n, G, K] that differ in ``rank`` directions of very different weight."""
    rng = np.random.default_rng(seed)
    weights = 4.0 * 0.5 ** np.arange(rank)
    z = rng.normal(size=(n, rank)) * weights @ rng.normal(size=(rank, COLUMNS)) + rng.normal(size=COLUMNS)
    return z.reshape(n, GROUPS, K).astype(np.float32)


def make(
    path: Path, z: NDArray[np.float32], codec: str = "f32", *, unrouted: int = 0, **changes: Any
) -> Path:
    with Store.create(path, make_spec(codec=codec, **changes), make_experts()) as writer:
        writer.add([Document(f"d{i}", f"text {i}", metadata={"row": i}) for i in range(len(z))], z)
        if unrouted:
            writer.add([Document(f"u{i}", f"none {i}") for i in range(unrouted)])
    return path


def expected_figures(w: Floats, moved: Floats) -> dict[str, Any]:
    """As told, from weights [n, G, K] in float64."""
    kl = np.zeros(GROUPS)
    for document, other in zip(w, moved, strict=True):
        for group in range(GROUPS):
            for a, b in zip(document[group], other[group], strict=True):
                if a > 0:
                    kl[group] += a * np.log(a / max(b, LEAST_WEIGHT))
    kl /= len(w)
    dw = np.abs(moved - w)
    return {"max_dw": dw.max(), "mean_dw": dw.mean(), "mean_kl": kl.mean(), "group_kl": kl}


def weights(store: Store, ids: list[str]) -> Floats:
    return store.routes(ids).astype(np.float64)


# --- the decoder ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [200, 5], ids=["many", "fewer than columns"])
def test_the_fitted_decoder_is_that_of_the_svd(n: int) -> None:
    z = np.random.default_rng(0).normal(size=(n, COLUMNS)) * np.arange(1, COLUMNS + 1)
    d = 3
    found = fit_decoder(z, d)
    np.testing.assert_allclose(found.b, z.mean(0), rtol=1e-6)
    centred = z - z.mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    best = u[:, :d] * s[:d] @ vt[:d]
    codes = centred @ found.P.T.astype(np.float64)
    np.testing.assert_allclose(codes @ found.V.T.astype(np.float64), best, atol=1e-4 * np.abs(best).max())
    np.testing.assert_allclose(codes.std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(found.P @ found.V, np.eye(d), atol=1e-4)


def test_directions_beyond_the_rank_are_nothing() -> None:
    z = low_rank(50, 2).reshape(50, -1)
    found = fit_decoder(z, COLUMNS + 3)
    assert (found.V.shape, found.P.shape) == ((COLUMNS, COLUMNS + 3), (COLUMNS + 3, COLUMNS))
    assert not found.V[:, 2:].any()
    assert not found.P[2:].any()
    back = (z - found.b) @ found.P.T @ found.V.T + found.b
    np.testing.assert_allclose(back, z, atol=1e-4)
    for n in (0, 1):
        few = fit_decoder(z[:n], 4)
        assert np.isfinite(few.V).all()
        assert not few.V.any(), "one document differs from its mean in nothing"


# --- whole stores -----------------------------------------------------------------------------------


def test_codes_of_the_rank_keep_the_weights(tmp_path: Path) -> None:
    z = low_rank(300, 3)
    source = make(tmp_path / "old", z, unrouted=2)
    found = recode(source, tmp_path / "new", codec="code(3)")
    with Store.open(source) as old, Store.open(tmp_path / "new") as new:
        ids = [f"d{i}" for i in range(300)]
        assert list(new) == list(old)
        assert new.documents(list(new)) == old.documents(list(old))
        assert new.spec.codec == "code(3)"
        assert new.verify().documents == 302
        assert not new.is_routed("u0")
        assert [hit.id for hit in new.search("text 17", 1)] == [hit.id for hit in old.search("text 17", 1)]
        # A code is rounded by half a step at most, so a logit moves by no more than half a step of each.
        assert new.decoder is not None
        codes = new.routes(ids, "code").astype(np.float64)
        V = np.abs(new.decoder[0].astype(np.float64))
        bound = V @ ((codes.max(0) - codes.min(0)) / 254 * 0.51) + 1e-4
        moved = new.routes(ids, "z").astype(np.float64) - z
        assert (np.abs(moved).reshape(300, -1) <= bound).all()
        assert np.abs(new.routes(ids) - sigmoid_route(z)).max() <= bound.max() / 2
        wanted = expected_figures(weights(old, ids), weights(new, ids))
        fidelity = found.fidelity
        assert (fidelity.documents, fidelity.of, fidelity.sampled) == (300, 300, False)
        for name, value in wanted.items():
            np.testing.assert_allclose(getattr(fidelity, name), value, rtol=1e-9, atol=1e-15, err_msg=name)
        assert 0 < fidelity.mean_dw < fidelity.max_dw < 0.05
        assert (found.codec_before, found.codec, found.note) == ("f32", "code(3)", None)
        for store, total, routes in (
            (old, found.total_bytes_before, found.route_bytes_per_document_before),
            (new, found.total_bytes, found.route_bytes_per_document),
        ):
            assert total == store.info().total_bytes
            assert routes == store.info().route_bytes_per_document
    assert found.route_bytes_per_document < found.route_bytes_per_document_before / 3
    assert json.loads(json.dumps(found.to_json()))["fidelity"]["mean_kl"] == fidelity.mean_kl


def test_weights_of_any_sign_become_codes_and_have_no_divergence(tmp_path: Path) -> None:
    z = low_rank(300, 3)
    make(tmp_path / "old", z, phi="linear")
    found = recode(tmp_path / "old", tmp_path / "new", codec="code(3)")
    with Store.open(tmp_path / "new") as new:
        w = new.routes([f"d{i}" for i in range(300)])
    assert w.min() < 0
    np.testing.assert_allclose(w, (1 + z) / K, atol=found.fidelity.max_dw + 1e-6)
    assert 0 < found.fidelity.max_dw < 0.05
    assert (found.fidelity.mean_kl, found.fidelity.group_kl) == (None, None)
    with pytest.raises(errors.InvalidInput, match=r"sparse\(2\).*any sign"):
        recode(tmp_path / "old", tmp_path / "third", codec="sparse(2)")


def test_a_shorter_code_loses_what_the_svd_says(tmp_path: Path) -> None:
    z = low_rank(400, 5)
    make(tmp_path / "old", z)
    ids = [f"d{i}" for i in range(400)]
    flat = z.reshape(400, -1).astype(np.float64)
    u, s, vt = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    losses = []
    for d in (1, 2, 4):
        recode(tmp_path / "old", tmp_path / f"c{d}", codec=f"code({d})")
        best = (u[:, :d] * s[:d] @ vt[:d] + flat.mean(0)).reshape(z.shape)
        with Store.open(tmp_path / f"c{d}") as new:
            moved = new.routes(ids, "z").astype(np.float64)
            # What is left to rounding is small beside what is left out.
            assert np.abs(moved - best).max() < 0.15
            losses.append(np.abs(weights(new, ids) - sigmoid_route(z)).mean())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("codec", ["f16", "q8", "q4", "q2", "q1", "sparse(2)"])
def test_other_codecs(tmp_path: Path, codec: str) -> None:
    z = low_rank(40, 6)
    found = recode(make(tmp_path / "old", z), tmp_path / "new", codec=codec)
    ids = [f"d{i}" for i in range(40)]
    with Store.open(tmp_path / "old") as old, Store.open(tmp_path / "new") as new:
        wanted = expected_figures(weights(old, ids), weights(new, ids))
        for name, value in wanted.items():
            np.testing.assert_allclose(
                getattr(found.fidelity, name), value, rtol=1e-9, atol=1e-15, err_msg=name
            )
        assert new.spec.codec == codec
        assert new.verify().documents == 40
    with Store.open(tmp_path / "old") as old:
        rows = old.routes(ids, "w" if codec.startswith("sparse") else "z")
    with Store.open(make(tmp_path / "made", rows, codec)) as direct, Store.open(tmp_path / "new") as new:
        np.testing.assert_array_equal(direct.routes(ids), new.routes(ids))


def test_codes_are_requantised_with_the_same_decoder(tmp_path: Path) -> None:
    z = low_rank(60, 4)
    make(tmp_path / "old", z)
    recode(tmp_path / "old", tmp_path / "code", codec="code(4)")
    found = recode(tmp_path / "code", tmp_path / "small", codec="code(4,int4)")
    with Store.open(tmp_path / "code") as code, Store.open(tmp_path / "small") as small:
        assert code.decoder is not None
        assert small.decoder is not None
        for a, b in zip(code.decoder, small.decoder, strict=True):
            np.testing.assert_array_equal(a, b)
        ids = list(code)
        a, b = code.routes(ids, "code"), small.routes(ids, "code")
        # Half a step of at most 0.3352 deviations, or what a number lies beyond 7.5 of them from the mean.
        deviation, off = a.std(0), np.abs(a - a.mean(0))
        half = 0.3352 / 2 * deviation
        assert (np.abs(a - b) <= 1.001 * np.maximum(half, off - 15 * half)).all()
        assert (np.sqrt(np.mean((a - b) ** 2, 0)) <= 0.115 * deviation).all()
        assert (a != b).any()
    assert found.note is not None
    assert "code(4)" in found.note
    assert found.route_bytes_per_document < found.route_bytes_per_document_before


def test_codes_become_shorter_codes_and_logits_again(tmp_path: Path) -> None:
    z = low_rank(60, 2)
    make(tmp_path / "old", z)
    recode(tmp_path / "old", tmp_path / "long", codec="code(6)")
    recode(tmp_path / "long", tmp_path / "short", codec="code(2)")
    recode(tmp_path / "long", tmp_path / "table", codec="f32")
    ids = [f"d{i}" for i in range(60)]
    with Store.open(tmp_path / "long") as long, Store.open(tmp_path / "short") as short:
        assert short.routes(ids, "code").shape == (60, 2)
        np.testing.assert_allclose(short.routes(ids, "z"), long.routes(ids, "z"), atol=0.3)
    with Store.open(tmp_path / "long") as long, Store.open(tmp_path / "table") as table:
        assert table.decoder is None
        np.testing.assert_array_equal(table.routes(ids, "z"), long.routes(ids, "z"))


def test_weights_alone_give_no_logits(tmp_path: Path) -> None:
    make(tmp_path / "old", sigmoid_route(low_rank(5, 2)).astype(np.float32), "sparse(2)")
    for codec in ("f32", "q8", "code(2)"):
        with pytest.raises(errors.InvalidInput, match="weights"):
            recode(tmp_path / "old", tmp_path / "new", codec=codec)
    recode(tmp_path / "old", tmp_path / "less", codec="sparse(1)")
    with Store.open(tmp_path / "less") as less:
        assert less.routes(["d0"]).max(-1).tolist() == [[1.0] * GROUPS]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["less", "old"]


def test_a_sample_is_seeded_and_said(tmp_path: Path) -> None:
    source = make(tmp_path / "old", low_rank(200, 6), unrouted=3)
    results = [
        recode(source, tmp_path / f"n{i}", codec="code(3)", sample=50, seed=seed)
        for i, seed in enumerate((0, 0, 1))
    ]
    first, same, other = results
    assert (first.fidelity.documents, first.fidelity.of, first.fidelity.sampled) == (50, 200, True)
    assert first == same
    assert first.fidelity != other.fidelity
    assert Store.open(tmp_path / "n0").digest() == Store.open(tmp_path / "n1").digest()


def test_experts_of_another_dtype(tmp_path: Path) -> None:
    source = make(tmp_path / "old", low_rank(9, 3), "q4")
    found = recode(source, tmp_path / "new", expert_dtype="float16")
    assert (found.codec, found.fidelity.max_dw, found.fidelity.mean_kl) == ("q4", 0.0, 0.0)
    with Store.open(source) as old, Store.open(tmp_path / "new") as new:
        assert (old.expert_dtype, new.expert_dtype) == ("float32", "float16")
        for name, array in new.experts.items():
            np.testing.assert_array_equal(array, old.experts[name].astype(np.float16))
        ids = list(old)
        np.testing.assert_array_equal(old.records(ids), new.records(ids))
        assert found.total_bytes < found.total_bytes_before


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    source = make(tmp_path / "old", low_rank(5, 2))
    new = tmp_path / "new"
    for changes, match in (
        ({}, "codec"),
        ({"codec": "zip"}, "zip"),
        ({"codec": "code(0)"}, "code"),
        ({"codec": "sparse(99)"}, "sparse"),
        ({"expert_dtype": "float8"}, "float8"),
        ({"codec": "q8", "sample": 0}, "sample"),
    ):
        with pytest.raises(errors.InvalidInput, match=match):
            recode(source, new, **changes)  # type: ignore[arg-type]
    with pytest.raises(FileExistsError):
        recode(source, source, codec="q8")
    with pytest.raises(FileNotFoundError):
        recode(tmp_path / "none", new, codec="q8")
    with Store.open(source) as store:
        V, b = np.zeros((COLUMNS, 2), np.float32), np.zeros(COLUMNS, np.float32)
        P = np.zeros((2, COLUMNS), np.float32)
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"codec": "code(2)"}, "decoder"),
            ({"codec": "code(2)", "decoder": (V, b)}, "projection"),
            ({"codec": "q8", "projection": P}, "decoder"),
            ({"codec": "q8", "decoder": (V, b), "projection": P}, "takes no decoder"),
            ({"codec": "code(2)", "decoder": (V, b), "projection": P[:, :-1]}, "projection"),
            ({"codec": "code(2)", "decoder": (V, b), "projection": P.T}, "projection"),
            ({"codec": "code(2)", "decoder": (V[:-1], b), "projection": P}, "V"),
            ({"codec": "code(2)", "decoder": V, "projection": P}, "tuple"),
        ]
        for arguments, match in wrong:
            with pytest.raises(errors.InvalidInput, match=match):
                store.recode(new, **arguments)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(("codec", "logit"), [("f16", 1e5), ("q8", 1e38), ("q4", 1e38), ("q1", 1e38)])
def test_a_row_that_the_codec_cannot_keep_is_named(tmp_path: Path, codec: str, logit: float) -> None:
    z = low_rank(3, 2)
    z[1, 0, 0] = logit
    source = make(tmp_path / "old", z)
    with pytest.raises(errors.InvalidInput, match='route of document "d1"'):
        recode(source, tmp_path / "new", codec=codec)
    with Store.open(source) as store, pytest.raises(errors.InvalidInput, match='route of document "d0"'):
        V, b = np.ones((COLUMNS, 1), np.float32), np.zeros(COLUMNS, np.float32)
        P = np.full((1, COLUMNS), 3e38, np.float32)
        store.recode(tmp_path / "new", codec="code(1)", decoder=(V, b), projection=P)
    assert list(tmp_path.iterdir()) == [source]


def test_an_empty_store(tmp_path: Path) -> None:
    Store.create(tmp_path / "old", make_spec(), make_experts()).commit()
    for i, codec in enumerate(("q8", "code(3)", "sparse(1)")):
        found = recode(tmp_path / "old", tmp_path / f"n{i}", codec=codec)
        assert (found.fidelity.documents, found.fidelity.of) == (0, 0)
        assert (found.fidelity.max_dw, found.fidelity.mean_kl) == (0.0, 0.0)
        assert Store.open(tmp_path / f"n{i}").verify().documents == 0
