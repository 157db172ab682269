"""The model for lm-evaluation-harness, asked as the harness asks, against the base model and its logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polyprag import Document
from polyprag.errors import InvalidInput

pytest.importorskip("lm_eval")

NAMES = ["amber", "birch", "coral"]
DOCUMENTS = [Document(f"d{i}", f"The {n} mill is in Ost.", f"Mill {n}") for i, n in enumerate(NAMES)]


@pytest.fixture(scope="module")
def lm(make_store: Callable[..., Path], model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from lm_eval.api.registry import get_model

    import polyprag.evaluation.lm_eval_model  # noqa: F401 - registers itself

    store = make_store(tmp_path_factory.mktemp("store") / "s", DOCUMENTS)
    words = f"store={store},model={model_folder},k=1,dtype=fp32,gen_toks=4"
    model = get_model("polyprag").create_from_arg_string(words, {"batch_size": 2, "device": "cpu"})
    yield model
    model.engine.close()


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def reference(lm: Any, text: str, continuation: str, document: str | None) -> tuple[float, bool]:
    """In float64, one token after the other."""
    ids = lm.tok_encode(text) + lm.tok_encode(continuation)
    new = len(lm.tok_encode(continuation))
    model = lm.engine.base.model
    with torch.no_grad():
        if document is None:
            logits = model(torch.tensor([ids])).logits[0]
        else:
            with lm.engine.routed.route(torch.from_numpy(np.array(lm.engine.store.routes([document])))):
                logits = model(torch.tensor([ids])).logits[0]
    logprobs = logits.double().log_softmax(-1)
    places = range(len(ids) - new, len(ids))
    greedy = all(int(logits[p - 1].argmax()) == ids[p] for p in places)
    return sum(float(logprobs[p - 1, ids[p]]) for p in places), greedy


def test_loglikelihood_is_that_of_the_routed_model(lm: Any) -> None:
    asked = [
        ("Where is the amber mill?", " Ost", "d0"),
        ("An example about coral.\n\nWhere is the birch mill?", " In the town of Ost", "d1"),
        ("?!", " x", None),
        ("Where is the coral mill?", " O", "d2"),
    ]
    found = lm.loglikelihood(instances("loglikelihood", *[(c, r) for c, r, _ in asked]), disable_tqdm=True)
    for (logprob, greedy), (context, rest, document) in zip(found, asked, strict=True):
        expected, as_greedy = reference(lm, context, rest, document)
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert greedy == as_greedy
    bare, _ = reference(lm, *asked[0][:2], None)
    assert abs(found[0][0] - bare) > 1e-3, "the route counts"


def test_rolling_counts_every_token_once(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The amber mill is in Ost."
    (whole,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    ids = [lm.prefix_token_id, *lm.tok_encode(text)]
    with torch.no_grad(), lm.engine.routed.route(torch.from_numpy(np.array(lm.engine.store.routes(["d0"])))):
        logprobs = lm.engine.base.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    assert whole == pytest.approx(sum(float(logprobs[i, t]) for i, t in enumerate(ids[1:])), abs=1e-3)
    monkeypatch.setattr(lm, "max_length", 8)
    (parts,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    assert np.isfinite(parts)
    assert parts != whole


def test_generation_stops_where_the_task_says(lm: Any) -> None:
    prompts = [f"Where is the {n} mill?" for n in NAMES]
    limits = {"until": ["\n\n"], "max_gen_toks": 6}
    found = lm.generate_until(instances("generate_until", *[(p, limits) for p in prompts]), disable_tqdm=True)
    expected = [a.text for a in lm.engine.ask_batch(prompts, k=1, max_new_tokens=6)]
    assert len(found) == len(expected) == 3
    first = next(text for text in found if text.strip())
    mark = first.strip()[-1]
    cut = lm.generate_until(
        instances("generate_until", *[(p, {**limits, "until": [mark]}) for p in prompts]), disable_tqdm=True
    )
    assert all(mark not in text for text in cut)
    short = lm.generate_until(instances("generate_until", (prompts[0], {"until": []})), disable_tqdm=True)
    assert len(lm.tok_encode(short[0])) <= 4
    with pytest.raises(InvalidInput, match="raise max_length"):
        lm.generate_until(
            instances("generate_until", (prompts[0], {"max_gen_toks": 5_000})), disable_tqdm=True
        )


def test_arguments_are_checked(lm: Any) -> None:
    with pytest.raises(InvalidInput, match="there is no 'stor'"):
        type(lm)(store="x", stor="y")
