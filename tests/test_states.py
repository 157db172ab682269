"""What the blocks below the experts say is computed once, and training is the same with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag.batches import collate
from polyprag.layers import RoutedModel, find_targets
from polyprag.models import BaseModel
from polyprag.samples import Sample
from polyprag.states import GROUP, States
from polyprag.trainer import Encoding, Progress, TrainSettings, train
from polyprag.world import World

FAMILIES = [
    "llama",
    "qwen2",
    "gpt2",
    "gpt_neox",
    "mistral",
    "qwen3",
    "gemma",
    "gemma2",
    "granite",
    "phi",
    "opt",
]
SETTINGS = TrainSettings(
    code_dim=6, experts=4, rank=2, alpha=16.0, epochs=3, batch_size=4, expert_lr=0.01, checkpoint_seconds=1e9
)


def samples_of(base: BaseModel, count: int = 20) -> list[Sample]:
    texts = [f"Q: what is {'so ' * (n % 7)}{n}? A: {n * n}" for n in range(count)]
    return [Sample(n % 5, tuple(base.tokenizer(text).input_ids), 0) for n, text in enumerate(texts)]


def attach(base: BaseModel, from_depth: float) -> RoutedModel:
    shapes = find_targets(base.model, from_depth=from_depth)
    return RoutedModel.attach(base.model, experts=4, rank=2, alpha=16.0, targets=shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_entered_in_the_middle_says_the_same(
    family: str, build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    base = BaseModel(build_model(family, num_hidden_layers=4), tokenizer, family)
    samples = samples_of(base)
    routed = attach(base, 0.5)
    states = States.of(base, routed, samples, None)
    assert states is not None
    batch = [7, 0, 19, 3]
    ids, mask, _ = collate([samples[i] for i in batch], 0)
    w = torch.randn(len(batch), *routed.route_shape)
    with torch.no_grad(), routed.route(w):
        whole = base.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        with states.of_batch(batch):
            entered = base.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        after = base.model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(entered, whole, rtol=1e-4, atol=1e-4)
    assert torch.equal(after, whole)
    states.close()
    routed.detach()


def close(a: Encoding, b: Encoding) -> bool:
    pairs = [(a.experts[name], b.experts[name]) for name in a.experts]
    pairs += [(a.routes, b.routes), (np.array(a.losses), np.array(b.losses))]
    return all(np.allclose(x, y, rtol=1e-3, atol=1e-4) for x, y in pairs)


@pytest.mark.parametrize(
    "changes", [{}, {"accumulation": 2}, {"checkpointing": True}, {"mixture": 0.5}], ids=str
)
def test_training_is_the_same_with_kept_states(tiny_base: BaseModel, changes: dict[str, Any]) -> None:
    samples = samples_of(tiny_base)
    kept = replace(SETTINGS, **changes)
    a = train(tiny_base, samples, 5, kept)
    b = train(tiny_base, samples, 5, replace(kept, keep_states=False))
    assert [m.name.split(".")[2] for m in a.modules] == ["1"] * 3
    assert close(a, b)
    assert a.losses[-1] < a.losses[0]


def test_a_run_whose_disk_filled_up_goes_on_without_kept_states(tiny_base: BaseModel, tmp_path: Path) -> None:
    samples, steps = samples_of(tiny_base), []

    def stop(progress: Progress) -> None:
        if progress.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, samples, 5, SETTINGS, checkpoint=tmp_path / "c.pt", progress=stop)
    without = replace(SETTINGS, keep_states=False)
    resumed = train(
        tiny_base, samples, 5, without, checkpoint=tmp_path / "c.pt", progress=lambda p: steps.append(p.step)
    )
    assert steps[0] == 3
    assert close(resumed, train(tiny_base, samples, 5, SETTINGS))


def test_the_lower_blocks_compute_each_group_once(tiny_base: BaseModel) -> None:
    samples = samples_of(tiny_base)
    calls: list[int] = []
    lowest = tiny_base.model.get_submodule("model.layers.0.self_attn")
    hook = lowest.register_forward_hook(lambda *call: calls.append(len(call[-1][0])))
    train(tiny_base, samples, 5, SETTINGS)
    hook.remove()
    tried = 3  # is the head plain: two passes of one row; can the model be entered: one of two rows, and one
    groups = -(-len(samples) // GROUP)
    assert len(calls) == groups + tried + 1
    assert sum(calls) == len(samples) + 1 + 1 + 2 + 2


def test_experts_in_the_first_block_leave_nothing_to_keep(tiny_base: BaseModel) -> None:
    routed = attach(tiny_base, 0.0)
    assert States.of(tiny_base, routed, samples_of(tiny_base), None) is None
    routed.detach()


def test_the_file_has_no_name_and_a_full_disk_is_told(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = attach(tiny_base, 0.5)
    states = States.of(tiny_base, routed, samples_of(tiny_base), tmp_path / "work")
    assert states is not None
    states.read([0])
    assert list((tmp_path / "work").iterdir()) == []
    monkeypatch.setattr(os, "pwrite", lambda *call: 1)
    with pytest.raises(OSError, match="disk full") as told:
        states.read(range(20))
    assert told.value.errno == errno.ENOSPC
    states.close()
    monkeypatch.setattr("polyprag.states.shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert States.of(tiny_base, routed, samples_of(tiny_base), None) is None
    routed.detach()


def test_the_files_of_all_processes_have_to_fit_the_disk(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed, samples = attach(tiny_base, 0.5), samples_of(tiny_base)
    needed = 4 * tiny_base.model.config.hidden_size * sum(len(s.ids) for s in samples)
    monkeypatch.setattr("polyprag.states.shutil.disk_usage", lambda folder: SimpleNamespace(free=3 * needed))
    for processes, kept in ((1, True), (2, False)):
        monkeypatch.setattr(World, "current", lambda processes=processes: World(0, processes))
        states = States.of(tiny_base, routed, samples, None)
        assert (states is not None) == kept
        if states is not None:
            states.close()
    routed.detach()
