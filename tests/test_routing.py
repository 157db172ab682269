"""phi, its fixture that the Rust core is tested with too, routings, and combination weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyprag.errors import InvalidInput
from polyprag.routing import Phi, RouteDecoder, combination_weights

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "phi.json").read_text())


def reference(z: list[float], kind: str, top_k: int | None) -> list[float]:
    """phi in float64 with the standard library, by another road than a softmax of logs where it can be."""
    if kind == "linear":
        return [(1.0 + x) / len(z) for x in z]
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    kept = set(order[: top_k or len(z)])
    if kind == "softmax":
        top = max(z)
        raw = [math.exp(x - top) if i in kept else 0.0 for i, x in enumerate(z)]
    else:
        # sigmoid(x) times the same e^shift for all, so that very small ones do not all become zero.
        shift = max(0.0, -max(z[i] for i in kept))
        raw = []
        for i, x in enumerate(z):
            if i not in kept:
                raw.append(0.0)
            elif x < -30:
                raw.append(math.exp(x + shift))
            else:
                raw.append(math.exp(shift) / (1.0 + math.exp(-x)))
    return [r / math.fsum(raw) for r in raw]


logits = st.one_of(
    st.floats(-12, 12, width=32),
    st.sampled_from([-1e4, 1e4, 0.0, -0.0, 1.0, 1.0, -80.0, 80.0]),
)


@settings(max_examples=200, deadline=None)
@given(
    z=st.lists(logits, min_size=1, max_size=9),
    kind=st.sampled_from(["sigmoid", "softmax"]),
    top_k=st.one_of(st.none(), st.integers(1, 10)),
)
def test_phi_against_float64(z: list[float], kind: Any, top_k: int | None) -> None:
    w = Phi(kind, top_k)(torch.tensor(z))
    assert w.tolist() == pytest.approx(reference(z, kind, top_k), abs=1e-6)
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-6)
    assert int((w > 0).sum()) <= (top_k or len(z))
    assert (w >= 0).all()


@given(z=st.lists(logits, min_size=1, max_size=9))
def test_linear_phi_against_float64(z: list[float]) -> None:
    w = Phi("linear")(torch.tensor(z))
    assert w.tolist() == pytest.approx(reference(z, "linear", None), rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    z=st.lists(logits, min_size=2, max_size=6),
    kind=st.sampled_from(["sigmoid", "softmax"]),
    top_k=st.one_of(st.none(), st.integers(1, 4)),
)
def test_gradients_of_phi_are_finite(z: list[float], kind: Any, top_k: int | None) -> None:
    x = torch.tensor(z, requires_grad=True)
    (Phi(kind, top_k)(x) * torch.arange(len(z))).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("kind", "top_k"),
    [("sigmoid", None), ("sigmoid", 2), ("softmax", None), ("softmax", 2), ("linear", None)],
)
def test_the_gradient_of_phi_is_right(kind: Any, top_k: int | None) -> None:
    z = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(Phi(kind, top_k), (z,))


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_among_equal_logits_the_lower_index_is_kept(kind: Any) -> None:
    assert Phi(kind, 2)(torch.tensor([1.0, 2.0, 2.0, 2.0])).tolist() == [0.0, 0.5, 0.5, 0.0]
    assert Phi(kind, 1)(torch.zeros(40)).tolist() == [1.0] + [0.0] * 39
    w = Phi(kind, 2)(torch.tensor([[3.0, 3.0, 3.0], [0.0, -1e4, -1e4]]))
    assert (w > 0).tolist() == [[True, True, False], [True, False, False]]


@pytest.mark.parametrize("case", FIXTURE["cases"], ids=lambda c: f"{c['name']}-{c['phi']}-{c['top_k']}")
def test_phi_agrees_with_the_shared_fixture(case: dict[str, Any]) -> None:
    w = Phi(case["phi"], case["top_k"])(torch.tensor(case["z"]))
    np.testing.assert_allclose(w.numpy(), np.array(case["w"]), rtol=0, atol=FIXTURE["tolerance"])


@pytest.mark.parametrize("case", FIXTURE["combinations"], ids=lambda c: f"{c['phi']}-{c['top_k']}")
def test_codes_become_the_routes_of_the_shared_fixture(case: dict[str, Any]) -> None:
    n, d = np.shape(case["codes"])
    decoder = RouteDecoder(case["groups"], case["experts"], d)
    with torch.no_grad():
        for parameter, name in ((decoder.V, "V"), (decoder.b, "b")):
            parameter.copy_(torch.tensor(case[name]))
        z = decoder(torch.tensor(case["codes"]))
        w = Phi(case["phi"], case["top_k"])(z)
    assert z.shape == (n, case["groups"], case["experts"])
    np.testing.assert_allclose(z.flatten(1).numpy(), np.array(case["z"]), rtol=1e-5, atol=1e-5)
    weights = torch.tensor(case["weights"])
    # Logits of codes up to 127 are rounded at float32 before phi, which is what these allow for.
    np.testing.assert_allclose(w.numpy(), np.array(case["w"]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        torch.einsum("n,ngk->gk", weights, w).numpy(), np.array(case["weighted"]), rtol=0, atol=1e-5
    )
    np.testing.assert_allclose(w.mean(0).numpy(), np.array(case["mean"]), rtol=0, atol=1e-5)


def test_phi_keeps_shape_and_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        w = Phi(top_k=2)(torch.randn(2, 3, 4, dtype=dtype))
        assert w.dtype == dtype
        assert w.shape == (2, 3, 4)


@pytest.mark.parametrize(("kind", "top_k"), [("relu", None), ("sigmoid", 0), ("softmax", -1), ("linear", 2)])
def test_phi_that_does_not_exist_is_refused(kind: Any, top_k: int | None) -> None:
    with pytest.raises(InvalidInput):
        Phi(kind, top_k)


def test_codes_are_decoded_by_what_the_corpus_shares() -> None:
    decoder = RouteDecoder(2, 3, 5)
    codes = torch.randn(4, 5)
    with torch.no_grad():
        decoder.b.normal_()
        z = decoder(codes)
        for row in range(4):
            expected = decoder.V.double() @ codes[row].double() + decoder.b.double()
            torch.testing.assert_close(z[row].flatten().double(), expected, rtol=1e-5, atol=1e-6)
    assert {id(p) for p in decoder.parameters()} == {id(decoder.V), id(decoder.b)}


def test_the_rules_of_combination() -> None:
    scores = [8.0, 4.0, 2.0]
    assert combination_weights(scores, "mean").tolist() == pytest.approx([1 / 3] * 3)
    assert combination_weights(scores, "first").tolist() == [1.0, 0.0, 0.0]
    assert combination_weights(scores, "sum").tolist() == [1.0, 1.0, 1.0]
    raw = [math.exp((s - 8.0) / (0.5 * 8.0)) for s in scores]
    found = combination_weights(scores, "score", temperature=0.5)
    assert found.tolist() == pytest.approx([r / sum(raw) for r in raw], rel=1e-6)
    assert found.dtype == np.float32


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.floats(0, 100), min_size=1, max_size=8),
    rule=st.sampled_from(["mean", "score", "first"]),
    temperature=st.floats(0.01, 100),
)
def test_combinations_stay_in_the_simplex(scores: list[float], rule: Any, temperature: float) -> None:
    scores.sort(reverse=True)
    a = combination_weights(scores, rule, temperature)
    assert a.shape == (len(scores),)
    assert (a >= 0).all()
    assert float(a.sum()) == pytest.approx(1.0, abs=1e-6)
    assert (np.diff(a) <= 0).all()


def test_scores_are_compared_by_their_ratio() -> None:
    a = combination_weights([3.0, 1.0], "score")
    assert combination_weights([30.0, 10.0], "score").tolist() == pytest.approx(a.tolist(), rel=1e-5)
    assert combination_weights([0.0, 0.0], "score").tolist() == [0.5, 0.5]
    assert combination_weights(np.array([5.0], dtype=np.float32), "score").tolist() == [1.0]


@pytest.mark.parametrize(
    ("scores", "rule", "temperature"),
    [
        ([], "mean", 1.0),
        ([[1.0, 2.0]], "mean", 1.0),
        (3.0, "mean", 1.0),
        ([1.0], "median", 1.0),
        ([1.0], "score", 0.0),
        ([1.0], "score", -1.0),
        ([1.0], "score", math.nan),
        ([1.0], "score", math.inf),
        ([1.0, math.nan], "score", 1.0),
        ([math.inf, 1.0], "score", 1.0),
    ],
)
def test_combinations_of_nothing_or_nonsense_are_refused(scores: Any, rule: Any, temperature: float) -> None:
    with pytest.raises(InvalidInput):
        combination_weights(scores, rule, temperature)
