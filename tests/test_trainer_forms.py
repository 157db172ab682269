"""The forms of training: parts of a batch, several processes, files, mixtures, noise, half precision."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import warm
from polyprag.errors import InvalidInput
from polyprag.models import BaseModel
from polyprag.trainer import Progress, TrainSettings, forget, train
from polyprag.world import launched
from test_trainer import FACTS, SMALL, arrays, facts, loss_under, same, stop_after


def largest_difference(a: Any, b: Any) -> float:
    x, y = arrays(a), arrays(b)
    assert x.keys() == y.keys()
    return max(float(np.abs(x[k] - y[k]).max()) for k in x)


@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_a_batch_in_parts_is_the_same_batch(tiny_base: BaseModel, accumulation: int) -> None:
    settings = replace(SMALL, batch_size=4)
    whole = train(tiny_base, facts(tiny_base), 4, settings)
    parts = train(tiny_base, facts(tiny_base), 4, replace(settings, accumulation=accumulation))
    assert largest_difference(whole, parts) < 1e-4


def test_a_run_that_had_no_memory_left_goes_on_with_less(tiny_base: BaseModel, tmp_path: Path) -> None:
    settings = replace(SMALL, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, facts(tiny_base), 4, settings, checkpoint=tmp_path / "c.pt", progress=stop_after(2))
    leaner = replace(settings, accumulation=4, checkpointing=True)
    resumed = train(tiny_base, facts(tiny_base), 4, leaner, checkpoint=tmp_path / "c.pt")
    assert largest_difference(resumed, train(tiny_base, facts(tiny_base), 4, settings)) < 1e-4


@pytest.mark.parametrize(
    ("device", "rank", "match"), [("auto", "1", "--nproc-per-node=1"), ("cuda:0", "0", "one for each")]
)
def test_each_process_needs_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, device: str, rank: str, match: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(InvalidInput, match=match), launched(device):
        pass


PROCESSES = """
from pathlib import Path
from test_trainer import SMALL, facts, replace
from test_trainer_forms import keep
from conftest import make_model, make_tokenizer
from polyprag.models import BaseModel
from polyprag.trainer import train
from polyprag.world import launched
base = BaseModel(make_model(), make_tokenizer(), "tiny")
with launched("cpu") as world:
    for rows, size in (("memory", 3), ("files", 3), ("shard", 7)):
        settings = replace(SMALL, batch_size=size, epochs=21 // size, rows="memory" if size == 7 else rows)
        settings = replace(settings, shard=size == 7)
        done = train(base, facts(base), 4, settings, checkpoint=Path({folder!r}) / rows / "c.pt")
        if world.first:
            keep(done, Path({folder!r}) / (rows + ".npz"))
    parts = [p.to_local().numel() for p in base.model.parameters()]
    assert sum(parts) < 0.6 * sum(p.numel() for p in base.model.parameters())
    # It stays in parts, and trains again; the tied head of another one, too.
    train(base, facts(base), 4, replace(settings, epochs=1))
    tied = BaseModel(make_model(tie_word_embeddings=True), make_tokenizer(), "tied")
    done = train(tied, facts(tied), 4, replace(settings, epochs=1, checkpointing=True))
    if world.first:
        keep(done, Path({folder!r}) / "tied.npz")
"""


def keep(encoding: Any, path: Path) -> None:
    np.savez(path, **arrays(encoding))


def test_two_processes_train_what_one_trains(
    tiny_base: BaseModel, build_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """20 steps and more in fp32, the last batch of an epoch smaller than the others; and with the base model
    in parts, where one process has no sample of the last batch.
    """
    script = PROCESSES.format(folder=str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # What torchrun tells each; the command line is tested with torchrun itself.
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [warm.start(script, env={**world, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)]
    assert [warm.ended(process) for process in both] == [0, 0]
    tied = BaseModel(build_model(tie_word_embeddings=True), tiny_base.tokenizer, "tied")
    thirds, sevenths = replace(SMALL, batch_size=3, epochs=7), replace(SMALL, batch_size=7, epochs=3)
    alone = train(tiny_base, facts(tiny_base), 4, thirds)
    assert len(alone.losses) == 21
    runs = {"memory": alone, "files": alone, "shard": train(tiny_base, facts(tiny_base), 4, sevenths)}
    runs["tied"] = train(tied, facts(tied), 4, replace(sevenths, epochs=1))
    for run, expected in runs.items():
        with np.load(tmp_path / f"{run}.npz") as together:
            for name, array in arrays(expected).items():
                assert np.abs(together[name] - array).max() <= 1e-4, (run, name)


@pytest.mark.parametrize("routing", ["code", "table"])
def test_rows_in_files_train_to_the_same_bits(tiny_base: BaseModel, tmp_path: Path, routing: Any) -> None:
    settings = replace(SMALL, routing=routing, checkpoint_seconds=0.0)
    checkpoint = tmp_path / "c.pt"
    whole = train(tiny_base, facts(tiny_base), 4, settings)
    with pytest.raises(InvalidInput, match="checkpoint"):
        train(tiny_base, facts(tiny_base), 4, replace(settings, rows="files"))
    files = replace(settings, rows="files")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, facts(tiny_base), 4, files, checkpoint=checkpoint, progress=stop_after(5))
    steps: list[int] = []
    resumed = train(
        tiny_base, facts(tiny_base), 4, files, checkpoint=checkpoint, progress=lambda p: steps.append(p.step)
    )
    assert steps[0] == 6
    assert {n: a.tobytes() for n, a in arrays(resumed).items()} == {
        n: a.tobytes() for n, a in arrays(whole).items()
    }
    # Without the checkpoint a run starts anew, whatever the files hold.
    checkpoint.unlink()
    assert same(replace(resumed, settings=settings), train(tiny_base, facts(tiny_base), 4, settings))
    anew = train(tiny_base, facts(tiny_base), 4, files, checkpoint=checkpoint)
    assert arrays(anew)["routes"].tobytes() == whole.routes.tobytes()
    forget(checkpoint)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from test_trainer import BaseModel, SMALL, facts, replace, train
from conftest import make_model, make_tokenizer
base = BaseModel(make_model(), make_tokenizer(), "tiny")
samples = facts(base)

def until(last, path):
    calls = 0
    def count(function):
        def counted(*arguments, **named):
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)
        return counted
    os.fsync, os.replace, os.pwrite = count(os.fsync), count(os.replace), count(os.pwrite)
    train(base, samples, 4, replace(SMALL, rows="files", checkpoint_seconds=0.0), checkpoint=path)

# Forked, so that torch is imported once for all.
for call in {calls}:
    child = os.fork()
    if child == 0:
        until(call, Path({folder!r}) / str(call) / "c.pt")
        os._exit(3)
    _, status = os.waitpid(child, 0)
    if status != signal.SIGKILL:
        sys.exit(f"write {{call}}: ended with {{status}}")
"""


def test_a_kill_at_any_write_costs_no_bit(tiny_base: BaseModel, tmp_path: Path) -> None:
    """SIGKILL before syncs, renames and writes, spread over the run; then the same command again."""
    calls = range(1, 60) if "POLYPRAG_PROOF" in os.environ else (2, 23, 44, 46, 47, 48)
    script = KILLED.format(calls=tuple(calls), folder=str(tmp_path))
    assert warm.ended(warm.start(script)) == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = train(tiny_base, facts(tiny_base), 4, SMALL)
        settings = replace(SMALL, rows="files", checkpoint_seconds=0.0)
        for call in calls:
            checkpoint = tmp_path / str(call) / "c.pt"
            resumed = train(tiny_base, facts(tiny_base), 4, settings, checkpoint=checkpoint)
            assert all(arrays(resumed)[n].tobytes() == a.tobytes() for n, a in arrays(whole).items()), call
    finally:
        torch.set_num_threads(threads)


def test_activations_that_are_computed_twice_are_the_same(tiny_base: BaseModel) -> None:
    plain = train(tiny_base, facts(tiny_base), 4, SMALL)
    twice = train(tiny_base, facts(tiny_base), 4, replace(SMALL, checkpointing=True))
    assert all(arrays(twice)[name].tobytes() == a.tobytes() for name, a in arrays(plain).items())
    again = train(tiny_base, facts(tiny_base), 4, SMALL)
    assert same(again, plain), "nothing of it stays on the model"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks
@pytest.mark.skipif(
    shutil.which("g++") is None or "POLYPRAG_PROOF" not in os.environ,
    reason="torch.compile needs a C++ compiler and a minute: POLYPRAG_PROOF=1",
)
def test_a_compiled_model_trains_alike(tiny_base: BaseModel) -> None:
    plain = train(tiny_base, facts(tiny_base), 4, replace(SMALL, epochs=1))
    compiled = train(tiny_base, facts(tiny_base), 4, replace(SMALL, epochs=1, compile=True))
    assert largest_difference(plain, compiled) < 1e-3


def test_mixtures_teach_the_mean_of_several_routes(
    build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    base = BaseModel(build_model(std=0.5), tokenizer, "learner")
    samples = facts(base)
    settings = replace(SMALL, epochs=30, batch_size=4, expert_lr=0.02, routing="table")
    alone = train(base, samples, 4, settings)
    mixed = train(base, samples, 4, replace(settings, mixture=0.5, mixture_size=2))
    assert not same(alone, mixed)
    assert same(mixed, train(base, samples, 4, replace(settings, mixture=0.5, mixture_size=2)))
    for document in range(4):
        assert loss_under(base, mixed, samples[2 * document], document) < 1.5


def test_noise_is_drawn_anew_each_step_and_the_same_in_each_run(tiny_base: BaseModel, tmp_path: Path) -> None:
    settings = replace(SMALL, phi="sigmoid", gumbel=True)
    whole = train(tiny_base, facts(tiny_base), 4, settings)
    assert not same(whole, train(tiny_base, facts(tiny_base), 4, SMALL))
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, facts(tiny_base), 4, settings, checkpoint=tmp_path / "c.pt", progress=stop_after(5))
    assert same(train(tiny_base, facts(tiny_base), 4, settings, checkpoint=tmp_path / "c.pt"), whole)
    train(tiny_base, facts(tiny_base), 4, replace(settings, seed=(1 << 64) - 1, epochs=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_half_precision_learns(
    build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
) -> None:
    base = BaseModel(build_model(std=0.5).to(dtype), tokenizer, "learner")
    settings = replace(SMALL, epochs=30, batch_size=4, expert_lr=0.02)
    encoding = train(base, facts(base), len(FACTS), settings)
    losses = np.array(encoding.losses)
    assert losses[-8:].mean() < 0.5 * losses[:8].mean()
    assert all(np.isfinite(a).all() for a in arrays(encoding).values())


def test_gradients_that_overflow_cost_a_step_and_no_more(tiny_base: BaseModel, tmp_path: Path) -> None:
    base = BaseModel(tiny_base.model.half(), tiny_base.tokenizer, "tiny")
    from polyprag import trainer

    scale = trainer._LossScale(True)
    good, bad = [torch.ones(2)], [torch.tensor([1.0, float("inf")])]
    factor = scale.factor
    assert scale.undo(good)
    assert good[0].tolist() == [1 / factor] * 2
    scale.adapt(True)
    assert not scale.undo(bad)
    scale.adapt(False)
    assert scale.state() == [factor / 2, 0.0]
    for _ in range(1000):
        scale.adapt(True)
    assert scale.factor == factor
    with pytest.raises(KeyboardInterrupt):
        train(base, facts(base), 4, SMALL, checkpoint=tmp_path / "c.pt", progress=stop_after(3))
    whole = train(base, facts(base), 4, SMALL)
    assert same(train(base, facts(base), 4, SMALL, checkpoint=tmp_path / "c.pt"), whole)
    base.model.float()


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("linear", 0.0, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [0.5, 1.0, 1.0, 0.5]),
        ("cosine", 0.0, [1.0, 0.853553, 0.5, 0.146447]),
        ("constant", 0.25, [1.0, 1.0, 1.0, 1.0]),
        ("linear", 1.0, [0.25, 0.5, 0.75, 1.0]),
    ],
)
def test_learning_rates_follow_the_schedule(schedule: Any, warmup: float, expected: list[float]) -> None:
    settings = TrainSettings(schedule=schedule, warmup=warmup)
    assert [settings.decay(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [{"schedule": "steps"}, {"warmup": 1.5}, {"mixture": -0.1}, {"accumulation": 0}, {"rows": "disk"}],
)
def test_forms_that_do_not_exist_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(changes))):
        TrainSettings(**changes)


def test_progress_counts_the_whole_batch(tiny_base: BaseModel) -> None:
    samples = facts(tiny_base)
    seen: list[Progress] = []
    train(tiny_base, samples, 4, replace(SMALL, epochs=1, batch_size=4, accumulation=2), progress=seen.append)
    assert sum(p.tokens for p in seen) == sum(len(s.ids) for s in samples)
    assert json.dumps([p.loss for p in seen])
