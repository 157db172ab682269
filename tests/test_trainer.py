"""Training on a tiny model: it learns, repeats to the bit, stops and goes on, and leaves no trace."""

from __future__ import annotations

import copy
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import warm
from polyprag import loss
from polyprag._polyprag import Document
from polyprag.augment import Augmentation, Pair
from polyprag.batches import Order
from polyprag.errors import CheckpointMismatch, InvalidInput
from polyprag.layers import RoutedModel
from polyprag.models import BaseModel
from polyprag.routing import Phi
from polyprag.samples import Sample, SampleSettings, build_samples
from polyprag.trainer import Encoding, Progress, TrainSettings, train
from polyprag.world import World

FACTS = ["amber", "birch", "coral", "denim"]
SMALL = TrainSettings(
    code_dim=6, experts=4, rank=2, alpha=16.0, epochs=3, batch_size=2, expert_lr=0.01, checkpoint_seconds=1e9
)


@pytest.fixture
def learner(build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    """A tiny model whose random output layer is large enough to be sure of a character."""
    return BaseModel(build_model(std=0.5), tokenizer, "learner")


def facts(base: BaseModel, answers: list[str] = FACTS) -> list[Sample]:
    """The same two questions of every document; the answers tell the documents apart."""
    samples = []
    for row, answer in enumerate(answers):
        for question in ("Q:", "What is it? A:"):
            head, tail = (tuple(base.tokenizer(t).input_ids) for t in (question, f" {answer}"))
            samples.append(Sample(row, head + tail + (base.tokenizer.eos_token_id,), len(head)))
    return samples


def arrays(encoding: Encoding) -> dict[str, np.ndarray[Any, Any]]:
    decoder = dict(zip(("V", "b"), encoding.decoder or (), strict=False))
    return {**encoding.experts, **decoder, "routes": encoding.routes, "losses": np.array(encoding.losses)}


def same(a: Encoding, b: Encoding) -> bool:
    x, y = arrays(a), arrays(b)
    return x.keys() == y.keys() and all(x[k].tobytes() == y[k].tobytes() for k in x)


def trace(model: PreTrainedModel) -> tuple[list[tuple[str, int]], dict[str, bytes]]:
    """Which modules a model has, which of its weights want a gradient or have one, and all its bytes."""
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    modules = [(name, id(m)) for name, m in model.named_modules()]
    return modules, {name: t.numpy().tobytes() for name, t in model.state_dict().items()}


@torch.no_grad()
def loss_under(base: BaseModel, encoding: Encoding, sample: Sample, document: int) -> float:
    """The loss of one sample under one document's route, from the arrays that training returned."""
    s = encoding.settings
    z = torch.from_numpy(encoding.routes[document]).double()
    if encoding.decoder is not None:
        V, b = (torch.from_numpy(a).double() for a in encoding.decoder)
        z = V @ z + b
    w = Phi(s.phi, s.top_k)(z.view(1, -1, s.experts)).float()
    routed = RoutedModel.attach(
        base.model,
        experts=s.experts,
        rank=s.rank,
        alpha=s.alpha,
        targets=encoding.modules,
        mixing=s.mixing,
    )
    try:
        routed.load_experts({k: torch.from_numpy(v) for k, v in encoding.experts.items()})
        ids = torch.tensor([sample.ids])
        labels = ids.clone()
        labels[:, : sample.loss_from] = -100
        with routed.route(w):
            return float(base.model(input_ids=ids, labels=labels).loss)
    finally:
        routed.detach()


def stop_after(step: int) -> Callable[[Progress], None]:
    def progress(p: Progress) -> None:
        if p.step == step:
            raise KeyboardInterrupt

    return progress


# Learning


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routing": "table"},
        {"phi": "softmax", "top_k": 2},
        {"mixing": "factors", "routing": "table"},
    ],
    ids=lambda c: "-".join(map(str, c.values())) or "code",
)
def test_training_puts_each_document_into_its_own_route(learner: BaseModel, changes: dict[str, Any]) -> None:
    samples = facts(learner)
    settings = replace(SMALL, epochs=50, batch_size=4, expert_lr=0.02, **changes)
    before = trace(learner.model)
    steps: list[Progress] = []
    encoding = train(learner, samples, len(FACTS), settings, progress=steps.append)
    assert trace(learner.model) == before

    losses = np.array(encoding.losses)
    assert len(losses) == 100
    assert [(p.step, p.steps, p.loss) for p in steps] == [(i + 1, 100, x) for i, x in enumerate(losses)]
    assert losses[-8:].mean() < 0.3 * losses[:8].mean()
    for document, sample in ((0, samples[0]), (3, samples[7])):
        own = loss_under(learner, encoding, sample, document)
        wrong = [loss_under(learner, encoding, sample, d) for d in range(4) if d != document]
        assert own < 1.0
        assert own + 0.5 < min(wrong)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_sampled_softmax_trains_and_goes_on_to_the_same_bits(
    learner: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int
) -> None:
    """Of the tiny model's 104 tokens, those of the samples and 30 more a step."""
    monkeypatch.setattr(loss, "DRAWN", 30)
    samples, settings = facts(learner), replace(SMALL, epochs=12, accumulation=accumulation)
    drawn = train(learner, samples, 4, settings)
    whole = train(learner, samples, 4, replace(settings, softmax="whole"))
    assert drawn.losses[0] != whole.losses[0]
    np.testing.assert_allclose(drawn.losses, whole.losses, rtol=0.5, atol=0.5)
    assert np.mean(drawn.losses[-4:]) < 0.5 * np.mean(drawn.losses[:4])
    with pytest.raises(KeyboardInterrupt):
        train(learner, samples, 4, settings, checkpoint=tmp_path / "c.pt", progress=stop_after(7))
    assert same(train(learner, samples, 4, settings, checkpoint=tmp_path / "c.pt"), drawn)


@pytest.mark.parametrize("routing", ["code", "table"])
def test_an_encoding_has_the_shapes_that_the_store_takes(tiny_base: BaseModel, routing: Any) -> None:
    settings = replace(SMALL, routing=routing, epochs=1, from_depth=0.0)
    encoding = train(tiny_base, facts(tiny_base), 5, settings)
    assert encoding.settings == settings
    assert [m.group for m in encoding.modules] == list(range(6))
    for m in encoding.modules:
        assert encoding.experts[f"{m.name}.A"].shape == (4, 2, m.in_features)
        assert encoding.experts[f"{m.name}.B"].shape == (m.out_features, 4, 2)
    assert len(encoding.experts) == 12
    if routing == "code":
        assert encoding.decoder is not None
        assert [a.shape for a in encoding.decoder] == [(24, 6), (24,)]
        assert encoding.routes.shape == (5, 6)
    else:
        assert encoding.decoder is None
        assert encoding.routes.shape == (5, 6, 4)
    for array in arrays(encoding).values():
        assert np.isfinite(array).all()
        assert array.flags.c_contiguous
    assert all(a.dtype == np.float32 for a in [*encoding.experts.values(), encoding.routes])


def test_a_document_without_samples_keeps_its_starting_route(tiny_base: BaseModel) -> None:
    settings = replace(SMALL, routing="table", epochs=1)
    encoding = train(tiny_base, facts(tiny_base), 6, settings)
    assert np.abs(encoding.routes[4:]).max() <= 1e-3
    assert np.abs(encoding.routes[:4]).max(axis=(1, 2)).min() > 1e-2


def test_only_what_comes_after_loss_from_counts(tiny_base: BaseModel) -> None:
    ids = tuple(tiny_base.tokenizer("Q: amber").input_ids)
    settings = replace(SMALL, epochs=1)
    with torch.no_grad():
        logits = tiny_base.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    per_token = [-float(logits[i - 1, ids[i]]) for i in range(1, len(ids))]
    for loss_from in (0, 1, 3, 7):
        encoding = train(tiny_base, [Sample(0, ids, loss_from)], 1, settings)
        expected = np.mean(per_token[max(loss_from, 1) - 1 :])
        assert encoding.losses[0] == pytest.approx(expected, rel=1e-4)


def test_padding_does_not_count(tiny_base: BaseModel) -> None:
    short = Sample(0, tuple(tiny_base.tokenizer("Q: amber").input_ids), 0)
    long = Sample(1, tuple(tiny_base.tokenizer("Question: what is it? Answer: birch").input_ids), 0)
    settings = replace(SMALL, epochs=1, batch_size=2)
    together = train(tiny_base, [short, long], 2, settings).losses[0]
    alone = [train(tiny_base, [s], 2, settings).losses[0] for s in (short, long)]
    n = [len(s.ids) - 1 for s in (short, long)]
    assert together == pytest.approx((alone[0] * n[0] + alone[1] * n[1]) / sum(n), rel=1e-4)


def test_every_sample_is_seen_once_an_epoch(tiny_base: BaseModel) -> None:
    texts = ["a" * n for n in range(2, 15)]
    samples = [Sample(i, tuple(tiny_base.tokenizer(t).input_ids), 0) for i, t in enumerate(texts)]
    seen: list[int] = []
    settings = replace(SMALL, epochs=2, batch_size=4)
    train(tiny_base, samples, len(samples), settings, progress=lambda p: seen.append(p.tokens))
    assert len(seen) == 8
    assert sum(seen[:4]) == sum(seen[4:]) == sum(len(s.ids) for s in samples)


# To the bit


@pytest.mark.parametrize("routing", ["code", "table"])
def test_two_runs_are_the_same_to_the_bit(tiny_base: BaseModel, routing: Any) -> None:
    settings = replace(SMALL, routing=routing)
    first = train(tiny_base, facts(tiny_base), 4, settings)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert same(train(tiny_base, facts(tiny_base), 4, settings), first)
    assert not same(train(tiny_base, facts(tiny_base), 4, replace(settings, seed=1)), first)


def test_training_leaves_the_callers_random_numbers_alone(tiny_base: BaseModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    train(tiny_base, facts(tiny_base), 4, replace(SMALL, epochs=1))
    assert torch.equal(torch.rand(2), expected)


def test_a_sample_that_is_longer_than_the_positions_is_refused_by_its_document(
    build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    base = BaseModel(build_model("gpt2", max_position_embeddings=16), tokenizer, "tiny")
    samples = [Sample(0, (5,) * 16, 0), Sample(1, (5,) * 17, 0)]
    with pytest.raises(InvalidInput, match="not for the 17 of a sample of document 1: lower passage_tokens"):
        train(base, samples, 2, SMALL)


# Stopping and going on


@pytest.mark.parametrize("step", [1, 4, 7, 12])
def test_an_interrupted_run_goes_on_to_the_same_bits(tiny_base: BaseModel, tmp_path: Path, step: int) -> None:
    samples, checkpoint = facts(tiny_base), tmp_path / "work" / "checkpoint.pt"
    whole = train(tiny_base, samples, 4, SMALL)
    before = trace(tiny_base.model)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, samples, 4, SMALL, checkpoint=checkpoint, progress=stop_after(step))
    assert trace(tiny_base.model) == before
    steps: list[int] = []
    resumed = train(
        tiny_base, samples, 4, SMALL, checkpoint=checkpoint, progress=lambda p: steps.append(p.step)
    )
    assert steps == list(range(step + 1, 13))
    assert same(resumed, whole)
    assert [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint.pt"]


def test_a_run_that_is_interrupted_at_every_step_ends_as_any_other(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    samples, settings = facts(tiny_base), replace(SMALL, routing="table", epochs=1)
    for step in range(1, 5):
        with pytest.raises(KeyboardInterrupt):
            train(tiny_base, samples, 4, settings, checkpoint=tmp_path / "c.pt", progress=stop_after(step))
    resumed = train(tiny_base, samples, 4, settings, checkpoint=tmp_path / "c.pt")
    assert same(resumed, train(tiny_base, samples, 4, settings))


def test_a_finished_checkpoint_gives_its_result_again(tiny_base: BaseModel, tmp_path: Path) -> None:
    first = train(tiny_base, facts(tiny_base), 4, SMALL, checkpoint=tmp_path / "c.pt")
    again = train(tiny_base, facts(tiny_base), 4, SMALL, checkpoint=tmp_path / "c.pt", progress=stop_after(1))
    assert same(first, again)


SCRIPT = """
import os, signal
from pathlib import Path
from test_trainer import BaseModel, SMALL, facts, replace, train
from conftest import make_model, make_tokenizer
base = BaseModel(make_model(), make_tokenizer(), "tiny")

def run(number, seconds, checkpoint):
    def progress(p):
        if p.step == 5:
            os.kill(os.getpid(), number)
    settings = replace(SMALL, checkpoint_seconds=seconds)
    train(base, facts(base), 4, settings, checkpoint=Path(checkpoint), progress=progress)

try:
    run(signal.SIGINT, 1e9, {interrupted!r})
except KeyboardInterrupt:
    run(signal.SIGKILL, 0.0, {killed!r})
"""


def test_a_real_interrupt_and_a_real_kill_cost_no_bit(tiny_base: BaseModel, tmp_path: Path) -> None:
    interrupted, killed = tmp_path / "interrupted.pt", tmp_path / "killed.pt"
    script = SCRIPT.format(interrupted=str(interrupted), killed=str(killed))
    assert warm.ended(warm.start(script)) == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(tiny_base, facts(tiny_base), 4, SMALL)
        # The interrupt came in step 5's report; the kill too, when step 4 was the last that was saved.
        for checkpoint, done in ((interrupted, 5), (killed, 4)):
            steps: list[Progress] = []
            resumed = train(
                tiny_base, facts(tiny_base), 4, SMALL, checkpoint=checkpoint, progress=steps.append
            )
            assert [p.step for p in steps] == list(range(done + 1, 13))
            assert same(resumed, whole)
    finally:
        torch.set_num_threads(threads)


def test_an_interrupt_of_one_process_waits_until_all_have_heard_of_it(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that comes, or is raised, while progress is reported: the others wait for this process."""
    told: list[int] = []
    asked: list[bool] = []

    def any_process(world: World, here: bool) -> bool:
        asked.append(here)
        return here

    def progress(p: Progress) -> None:
        if p.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        told.append(p.step)
        stop_after(4)(p)

    monkeypatch.setattr(World, "any", any_process)
    for step in (3, 4):
        with pytest.raises(KeyboardInterrupt):
            train(tiny_base, facts(tiny_base), 4, SMALL, checkpoint=tmp_path / "c.pt", progress=progress)
        assert told[-1] == step
        assert asked.pop(), "the last that was said before it was raised"


def test_an_interrupt_within_a_step_waits_for_its_end(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    forward = tiny_base.model.base_model.forward

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        if calls.count(True) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(*args, **kwargs)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(tiny_base.model.base_model, "forward", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, facts(tiny_base), 4, SMALL, checkpoint=tmp_path / "c.pt")
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is handler
    steps: list[int] = []
    resumed = train(
        tiny_base,
        facts(tiny_base),
        4,
        SMALL,
        checkpoint=tmp_path / "c.pt",
        progress=lambda p: steps.append(p.step),
    )
    assert steps[0] == 4
    assert same(resumed, train(tiny_base, facts(tiny_base), 4, SMALL))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"epochs": 4},
        {"code_lr": 0.06},
        {"batch_size": 3},
        {"alpha": 8.0},
        {"routing": "table"},
        {"clip": 0.5},
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    tiny_base: BaseModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    samples, checkpoint = facts(tiny_base), tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, samples, 4, SMALL, checkpoint=checkpoint, progress=stop_after(2))
    content, before = checkpoint.read_bytes(), trace(tiny_base.model)
    with pytest.raises(CheckpointMismatch, match=r"c\.pt"):
        train(tiny_base, samples, 4, replace(SMALL, **changes), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content
    assert trace(tiny_base.model) == before


def test_a_checkpoint_of_other_samples_or_another_model_is_refused(
    tiny_base: BaseModel,
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    samples, checkpoint = facts(tiny_base), tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, samples, 4, SMALL, checkpoint=checkpoint, progress=stop_after(2))
    content = checkpoint.read_bytes()
    twin = BaseModel(build_model(seed=1), tokenizer, "tiny")
    for base, others, documents in (
        (tiny_base, samples[:-1], 4),
        (tiny_base, samples[::-1], 4),
        (tiny_base, [replace(samples[0], loss_from=0), *samples[1:]], 4),
        (tiny_base, [replace(samples[0], document=1), *samples[1:]], 4),
        (tiny_base, facts(tiny_base, ["amber", "birch", "coral", "delta"]), 4),
        (tiny_base, samples, 5),
        (twin, samples, 4),
    ):
        with pytest.raises(CheckpointMismatch):
            train(base, others, documents, SMALL, checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content
    train(tiny_base, samples, 4, replace(SMALL, checkpoint_seconds=5), checkpoint=checkpoint)


def test_a_torn_or_foreign_checkpoint_is_refused(tiny_base: BaseModel, tmp_path: Path) -> None:
    samples, checkpoint = facts(tiny_base), tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, samples, 4, SMALL, checkpoint=checkpoint, progress=stop_after(2))
    whole, before = checkpoint.read_bytes(), trace(tiny_base.model)
    foreign = tmp_path / "foreign.pt"
    torch.save([1, 2], foreign)
    harmful = tmp_path / "harmful.pt"
    torch.save(Path, harmful)
    contents = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    for content in (*contents, b"no checkpoint", foreign.read_bytes(), harmful.read_bytes()):
        checkpoint.write_bytes(content)
        with pytest.raises(CheckpointMismatch, match="delete it"):
            train(tiny_base, samples, 4, SMALL, checkpoint=checkpoint)
        assert checkpoint.read_bytes() == content
        assert trace(tiny_base.model) == before


def test_a_failed_save_keeps_the_last_checkpoint(
    tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, checkpoint = facts(tiny_base), tmp_path / "c.pt"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, samples, 4, SMALL, checkpoint=checkpoint, progress=stop_after(2))
    content, before = checkpoint.read_bytes(), trace(tiny_base.model)

    def full(state: object, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_base, samples, 4, replace(SMALL, checkpoint_seconds=0.0), checkpoint=checkpoint)
    monkeypatch.undo()
    assert checkpoint.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]
    assert trace(tiny_base.model) == before
    resumed = train(tiny_base, samples, 4, SMALL, checkpoint=checkpoint)
    assert same(resumed, train(tiny_base, samples, 4, SMALL))


# Routes alone


@pytest.mark.parametrize("routing", ["code", "table"])
def test_with_frozen_experts_only_routes_are_trained(
    learner: BaseModel, tmp_path: Path, routing: Any
) -> None:
    settings = replace(SMALL, routing=routing, epochs=30, batch_size=4, expert_lr=0.02)
    first = train(learner, facts(learner), 4, settings)
    before = trace(learner.model)
    kept = {k: v.tobytes() for k, v in arrays(first).items()}
    samples = facts(learner, ["birch", "denim"])
    second = train(learner, samples, 2, settings, frozen=first)
    assert trace(learner.model) == before
    assert {k: v.tobytes() for k, v in arrays(first).items()} == kept
    assert len(second.routes) == 2
    for name in second.experts:
        assert second.experts[name].tobytes() == kept[name]
    for name, array in zip("Vb", second.decoder or (), strict=False):
        assert array.tobytes() == kept[name]
    assert (second.decoder is None) == (routing == "table")
    own = [loss_under(learner, second, samples[2 * d], d) for d in (0, 1)]
    wrong = [loss_under(learner, second, samples[2 * d], 1 - d) for d in (0, 1)]
    assert own[0] + 0.3 < wrong[0]
    assert own[1] + 0.3 < wrong[1]

    checkpoint = tmp_path / "added.pt"
    with pytest.raises(KeyboardInterrupt):
        train(learner, samples, 2, settings, frozen=first, checkpoint=checkpoint, progress=stop_after(3))
    other = replace(first, routes=first.routes + 1)
    with pytest.raises(CheckpointMismatch):
        train(learner, samples, 2, settings, frozen=other, checkpoint=checkpoint)
    with pytest.raises(CheckpointMismatch):
        train(learner, samples, 2, settings, checkpoint=checkpoint)
    resumed = train(learner, samples, 2, settings, frozen=first, checkpoint=checkpoint)
    assert same(resumed, second)


def test_new_routes_start_at_the_mean_of_the_old(tiny_base: BaseModel) -> None:
    for routing in ("code", "table"):
        first = train(tiny_base, facts(tiny_base), 4, replace(SMALL, routing=routing))
        still = replace(SMALL, routing=routing, epochs=1, code_lr=0.0, table_lr=0.0)
        second = train(tiny_base, facts(tiny_base), 4, still, frozen=first)
        np.testing.assert_allclose(second.routes, [first.routes.mean(0)] * 4, rtol=1e-5, atol=1e-6)
        none = replace(first, routes=first.routes[:0])
        third = train(tiny_base, facts(tiny_base), 4, still, frozen=none)
        assert not third.routes.any()


@pytest.mark.parametrize(
    "changes",
    [{"routing": "table"}, {"code_dim": 5}, {"experts": 3}, {"rank": 1}],
)
def test_routes_are_only_trained_the_way_that_the_experts_were(
    tiny_base: BaseModel, changes: dict[str, Any]
) -> None:
    first = train(tiny_base, facts(tiny_base), 4, replace(SMALL, epochs=1))
    before = trace(tiny_base.model)
    with pytest.raises(InvalidInput):
        train(tiny_base, facts(tiny_base), 4, replace(SMALL, **changes), frozen=first)
    assert trace(tiny_base.model) == before


def test_codes_cannot_be_trained_without_a_decoder(tiny_base: BaseModel) -> None:
    first = train(tiny_base, facts(tiny_base), 4, replace(SMALL, epochs=1, routing="table"))
    with pytest.raises(InvalidInput, match="table"):
        train(tiny_base, facts(tiny_base), 4, SMALL, frozen=first)


# What goes wrong


def test_the_model_is_as_before_after_any_failure(tiny_base: BaseModel) -> None:
    before = trace(tiny_base.model)

    def fail(p: Progress) -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        train(tiny_base, facts(tiny_base), 4, SMALL, progress=fail)
    assert trace(tiny_base.model) == before
    with pytest.raises(InvalidInput):
        train(tiny_base, facts(tiny_base), 4, replace(SMALL, phi="relu"))  # type: ignore[arg-type]
    with pytest.raises(InvalidInput):
        train(tiny_base, facts(tiny_base), 4, replace(SMALL, targets=("nothing",)))
    assert trace(tiny_base.model) == before
    train(tiny_base, facts(tiny_base), 4, replace(SMALL, epochs=1))


def test_a_loss_that_is_no_number_stops_the_run(tiny_base: BaseModel, tmp_path: Path) -> None:
    before = trace(tiny_base.model)
    settings = replace(SMALL, expert_lr=1e30, clip=0.0, epochs=10)
    with pytest.raises(InvalidInput, match=r"the loss became (nan|inf).*lower expert_lr"):
        train(tiny_base, facts(tiny_base), 4, settings, checkpoint=tmp_path / "c.pt")
    assert trace(tiny_base.model) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"routing": "router"},
        {"code_dim": 0},
        {"experts": 0},
        {"rank": -1},
        {"epochs": 0},
        {"batch_size": 0},
        {"expert_lr": -1e-3},
        {"code_lr": float("nan")},
        {"table_lr": float("inf")},
        {"clip": -1.0},
        {"softmax": "half"},
        {"seed": -1},
        {"seed": 1 << 64},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(changes))):
        TrainSettings(**changes)


@pytest.mark.parametrize(
    "samples",
    [
        [],
        [Sample(0, (), 0)],
        [Sample(0, (5,), 0)],
        [Sample(0, (5, 6), 2)],
        [Sample(-1, (5, 6), 0)],
        [Sample(2, (5, 6), 0)],
    ],
)
def test_samples_that_teach_nothing_are_refused(tiny_base: BaseModel, samples: list[Sample]) -> None:
    before = trace(tiny_base.model)
    with pytest.raises(InvalidInput):
        train(tiny_base, samples, 2, SMALL)
    assert trace(tiny_base.model) == before


# Samples


def test_samples_end_where_asking_ends_and_begin_there(tiny_base: BaseModel) -> None:
    document = Document("d", "Ost lies at the sea. It is old.", "Ost")
    pairs = (Pair("Where is Ost?", "the sea"), Pair("How is Ost?", "old"), Pair("What lies there?", "Ost"))
    augmentation = Augmentation("d", pairs, "At the sea lies old Ost.")
    decode = tiny_base.tokenizer.decode
    for loss_on in ("all", "answer"):
        settings = SampleSettings(with_passage=2, loss_on=loss_on)  # type: ignore[arg-type]
        samples = build_samples([document], [augmentation], tiny_base.tokenizer, settings)
        texts = [str(decode(s.ids)) for s in samples]
        assert texts == [
            "Ost\nOst lies at the sea. It is old.\n\nQuestion: Where is Ost?\nAnswer: the sea<end>",
            "Ost\nAt the sea lies old Ost.\n\nQuestion: How is Ost?\nAnswer: old<end>",
            "Question: Where is Ost?\nAnswer: the sea<end>",
            "Question: How is Ost?\nAnswer: old<end>",
            "Question: What lies there?\nAnswer: Ost<end>",
        ]
        heads = [str(decode(s.ids[: s.loss_from])) for s in samples]
        if loss_on == "all":
            assert heads == [""] * 5
        else:
            assert all(h.endswith("\nAnswer:") for h in heads)
    assert {s.document for s in samples} == {0}


def test_of_a_question_with_yes_or_no_only_the_answer_is_learnt(tiny_base: BaseModel) -> None:
    pairs = (Pair("Is Ost old?", "Yes"), Pair("Is Ost a mill?", "no"), Pair("How is Ost?", "old"))
    written = Augmentation("d", pairs)
    samples = build_samples([Document("d", "Ost is old.")], [written], tiny_base.tokenizer)
    learnt = [str(tiny_base.tokenizer.decode(s.ids[s.loss_from :])) for s in samples]
    assert learnt == [" Yes<end>", " Yes<end>", " no<end>", "Question: How is Ost?\nAnswer: old<end>"]


@pytest.mark.parametrize(("share", "times"), [(0.25, 1), (0, 0), (0.5, 2), (1, 4), (1.5, 6)])
def test_documents_take_turns_to_give_their_passage(tiny_base: BaseModel, share: float, times: int) -> None:
    documents = [Document(i, f"Ost {i} is old.") for i in range(8)]
    pairs = (Pair("How is Ost?", "old"), Pair("What is old?", "Ost"))
    written = [Augmentation(i, pairs) for i in range(8)]
    samples = build_samples(documents, written, tiny_base.tokenizer, SampleSettings(with_passage=share))
    passages = {i for i, s in enumerate(samples) if str(tiny_base.tokenizer.decode(s.ids)).startswith("Ost")}
    order = Order(samples, batch_size=3, seed=1, epochs=4)
    drawn = Counter(i for step in range(order.steps) for i in order.batch(step))
    assert {drawn[i] for i in range(len(samples)) if i not in passages} == {4}, "every pair in every epoch"
    assert [sum(drawn[i] for i in passages if samples[i].document == d) for d in range(8)] == [times] * 8
    an_epoch = Counter(i for step in range(order.steps // 4) for i in order.batch(step))
    assert sum(an_epoch[i] for i in passages) == 8 * share, "as many in one epoch as in another"
    with pytest.raises(InvalidInput, match="with_passage is a number of at least 0"):
        SampleSettings(with_passage=-1)


def test_a_run_whose_epochs_differ_goes_on_to_the_same_bits(tiny_base: BaseModel, tmp_path: Path) -> None:
    samples = [replace(s, share=(0.5, 1.0)[i % 2]) for i, s in enumerate(facts(tiny_base))]
    settings = replace(SMALL, batch_size=4)
    whole = train(tiny_base, samples, 4, settings)
    assert len(whole.losses) == 3 * 2, "6 of 8 samples an epoch"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, samples, 4, settings, checkpoint=tmp_path / "c.pt", progress=stop_after(3))
    assert same(train(tiny_base, samples, 4, settings, checkpoint=tmp_path / "c.pt"), whole)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, samples, 4, settings, checkpoint=tmp_path / "d.pt", progress=stop_after(3))
    with pytest.raises(CheckpointMismatch):
        train(tiny_base, facts(tiny_base), 4, settings, checkpoint=tmp_path / "d.pt")


def test_a_document_without_pairs_gives_its_passage_and_one_without_text_nothing(
    tiny_base: BaseModel,
) -> None:
    documents = [Document(i, text) for i, text in enumerate(["Ost is old.", "", None, "W" * 500])]
    nothing = [Augmentation(i) for i in range(4)]
    samples = build_samples(documents, nothing, tiny_base.tokenizer, SampleSettings(passage_tokens=100))
    assert [s.document for s in samples] == [0, 3]
    assert str(tiny_base.tokenizer.decode(samples[0].ids)) == "Ost is old.<end>"
    assert len(samples[1].ids) == 101
    begins = copy.deepcopy(tiny_base.tokenizer)
    begins._tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 2)])
    assert [s.document for s in build_samples(documents, nothing, begins)] == [0, 3]
    with pytest.raises(ValueError, match="zip"):
        build_samples(documents, nothing[:-1], tiny_base.tokenizer)


def test_a_passage_is_cut_between_characters_and_stays_as_it_is_before(
    tiny_base: BaseModel, bytewise: PreTrainedTokenizerFast
) -> None:
    tidy = copy.deepcopy(tiny_base.tokenizer)
    tidy.clean_up_tokenization_spaces = True
    for text, tokenizer in (("é東🏝" * 20, bytewise), ("Is n't it 's ? " * 20, tidy)):
        for tokens in range(20, 40):
            settings = SampleSettings(passage_tokens=tokens)
            (sample,) = build_samples([Document(0, text)], [Augmentation(0)], tokenizer, settings)
            kept = str(tokenizer.decode(sample.ids[:-1], clean_up_tokenization_spaces=False))
            assert text.startswith(kept)
            assert tokens - 4 < len(sample.ids) - 1 <= tokens
