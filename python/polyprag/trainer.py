"""The encoder: experts and routes trained together, or routes alone for added documents.

Poly-PRAG (arXiv 2511.17044) trains latent LoRA experts and per-document routing logits jointly, with the
base model frozen. Two learning rates matter: routing has to move about a hundred times as fast as the
experts.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyprag.batches import Order, collate, learnt
from polyprag.errors import CheckpointMismatch, InvalidInput
from polyprag.jsonl import sync_folder
from polyprag.loss import CausalLoss
from polyprag.models import BaseModel, check_length, fingerprint
from polyprag.parametrisation import Finish, attach
from polyprag.rows import BETAS, EPSILON, FileRows, MemoryRows, Rows, record
from polyprag.samples import Sample
from polyprag.sharding import is_sharded, shard
from polyprag.states import States
from polyprag.teacher import Teacher
from polyprag.training import Encoding, Progress, TrainSettings
from polyprag.world import World

__all__ = ["Encoding", "Progress", "TrainSettings", "forget", "rows_folder", "train", "train_loras"]

ROWS_IN_MEMORY = 1 << 30  # bytes


def train(
    base: BaseModel,
    samples: Sequence[Sample],
    documents: int,
    settings: TrainSettings = TrainSettings(),
    *,
    frozen: Encoding | None = None,
    features: NDArray[np.float32] | None = None,
    loras: NDArray[np.float32] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] = lambda p: None,
) -> Encoding:
    """Train experts and routes on ``samples``; with ``frozen`` (Poly-z), only the routes of new documents.

    Args:
        documents: how many documents the samples speak of (rows 0 to documents - 1).
        frozen: experts and decoder that stay as they are; its ``routes`` [any number, ...] are those of the
            documents that the store has: new ones start at their mean, or where its router puts them.
        features: [documents, f], what an amortised router reads of them; needed if ``settings.router``.
        loras: [documents, width], what :func:`train_loras` gives; needed if ``settings.taught``.
        checkpoint: a file to save to now and then, on Ctrl-C and at the end of training, and to resume from.
        progress: called after every step.

    Raises:
        CheckpointMismatch: ``checkpoint`` belongs to other samples or settings.
        KeyboardInterrupt: on Ctrl-C, after the checkpoint is saved.
    """
    if settings.router and (features is None or len(features) != documents):
        raise InvalidInput("a router needs the features of every document: give text_features of their texts")
    if settings.taught and (loras is None or len(loras) != documents):
        raise InvalidInput("mse_weight and kl_weight need a trained LoRA of every document: see train_loras")
    _check_samples(base, samples, documents)
    run = _Run(base, samples, documents, settings, frozen, features, loras, checkpoint)
    try:
        run.finish(progress)
        return run.encoding()
    finally:
        run.close()


def train_loras(
    base: BaseModel,
    samples: Sequence[Sample],
    documents: int,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] = lambda p: None,
) -> NDArray[np.float32]:
    """Train one LoRA a document (``routing`` is ``lora``), and give them as rows [documents, width] of
    :class:`polyprag.lora.Slots`: in memory, or in a file beside the checkpoint. Raises as :func:`train`.
    """
    if settings.routing != "lora":
        raise InvalidInput(f"routing is 'lora' for one LoRA a document, not {settings.routing!r}")
    _check_samples(base, samples, documents)
    run = _Run(base, samples, documents, settings, None, None, None, checkpoint)
    try:
        run.finish(progress)
        return run.gathered(lambda numbers, rows: rows, (run.kind.width,))
    finally:
        run.close()


def _check_samples(base: BaseModel, samples: Sequence[Sample], documents: int) -> None:
    if not samples:
        raise InvalidInput("no samples to train on")
    for sample in samples:
        if not 0 <= sample.document < documents:
            raise InvalidInput(f"a sample speaks of document {sample.document}, but there are {documents}")
        if len(sample.ids) <= max(sample.loss_from, 1):
            raise InvalidInput(f"a sample of document {sample.document} has no token to learn: {sample}")
    longest = max(samples, key=lambda sample: len(sample.ids))
    what = f"a sample of document {longest.document}: lower passage_tokens, or give shorter pairs"
    check_length(base, len(longest.ids), what)


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint and the rows beside it."""
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(rows_folder(checkpoint), ignore_errors=True)


def rows_folder(checkpoint: Path) -> Path:
    """Where what is too large for a checkpoint lies: rows of documents, features, routes."""
    return checkpoint.with_name(checkpoint.name + ".rows")


class _Run:
    """The state of one training: all that a checkpoint holds, and what a step does to it."""

    def __init__(
        self,
        base: BaseModel,
        samples: Sequence[Sample],
        documents: int,
        settings: TrainSettings,
        frozen: Encoding | None,
        features: NDArray[np.float32] | None,
        loras: NDArray[np.float32] | None,
        checkpoint: Path | None,
    ) -> None:
        self.base, self.samples, self.documents = base, samples, documents
        self.settings, self.frozen, self.checkpoint = settings, frozen, checkpoint
        self.world = World.current()
        self.key = _key(base, samples, documents, settings, frozen, features)
        self.order = Order(samples, settings.batch_size, settings.seed, settings.epochs)
        self.steps = self.order.steps
        self.step = 0
        self.losses: list[float] = []
        self.scale = _LossScale(base.model.dtype == torch.float16)
        if settings.shard:
            shard(base.model, self.world)
        with _seeded(settings.seed):
            self.kind = attach(base, settings, frozen, features)
        self.routed = self.kind.routed
        try:
            self.teacher = Teacher(self.routed, loras) if settings.taught and loras is not None else None
            if self.teacher is not None:
                mean = self.teacher.mean.tobytes()
                self.key = hashlib.blake2b(mean, digest_size=16, key=self.key.encode()).hexdigest()
                if frozen is None:
                    self.teacher.begin()
            self.rows = self._new_rows()
            self.shared, self.optimiser = self._new_optimiser()
            if settings.checkpointing:
                self.routed.enable_checkpointing()
            sampled = samples if settings.softmax == "sampled" else None
            self.loss = CausalLoss(base, compile=settings.compile, sampled=sampled)
            # A compiled model would be compiled anew for every batch whose lower blocks are skipped; and each
            # process computes the states of all samples, where else it has its share of them in every epoch.
            keep = settings.keep_states and settings.epochs > self.world.size and not settings.compile
            folder = None if checkpoint is None else checkpoint.parent
            self.states = States.of(base, self.routed, samples, folder) if keep else None
        except BaseException:
            self.routed.detach()
            raise

    def _new_rows(self) -> Rows:
        s, width, start = self.settings, self.kind.width, self.kind.start
        large = self.documents * record(width).itemsize > ROWS_IN_MEMORY and self.checkpoint is not None
        if s.rows == "memory" or (s.rows == "auto" and not large):
            return MemoryRows(self.documents, width, start)
        if self.checkpoint is None:
            raise InvalidInput("rows is 'files', but there is no checkpoint beside which they could be kept")
        return FileRows(
            rows_folder(self.checkpoint),
            self.documents,
            width,
            start,
            key=bytes.fromhex(self.key),
            part=self.world.rank,
            parts=self.world.size,
        )

    def _new_optimiser(self) -> tuple[list[nn.Parameter], torch.optim.AdamW | None]:
        """What the documents share, and what moves it."""
        groups = self.kind.shared()
        if not groups:
            return [], None
        for group in groups:
            group["top_lr"] = group["lr"]
        fused = self.base.device.type in ("cpu", "cuda")  # one pass over the memory instead of ten
        optimiser = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=fused)
        return [parameter for group in groups for parameter in group["params"]], optimiser

    def close(self) -> None:
        """Leave the base model as it was."""
        if self.states is not None:
            self.states.close()
        self.routed.detach()

    def finish(self, progress: Callable[[Progress], None]) -> None:
        """Train from the checkpoint, or from the start, to the end."""
        if self.checkpoint is not None and self.checkpoint.exists():
            self.load(self.checkpoint)
        else:
            self.rows.reset()
        saved = time.monotonic()
        asked: list[int] = []
        # A process that left the loop by itself would leave the others waiting for it in a sum.
        with _interrupts(asked):
            while self.step < self.steps:
                done = self.advance()
                try:
                    progress(done)
                except KeyboardInterrupt:
                    asked.append(signal.SIGINT)
                # All processes stop, or save, after the same step.
                if self.world.any(bool(asked)):
                    break
                late = time.monotonic() - saved > self.settings.checkpoint_seconds
                if self.checkpoint is not None and self.world.any(late or self.rows.full):
                    self.save(self.checkpoint)
                    saved = time.monotonic()
            if self.checkpoint is not None:
                self.save(self.checkpoint)
            if self.world.any(bool(asked)):
                raise KeyboardInterrupt

    def advance(self) -> Progress:
        """One optimiser step."""
        started = time.monotonic()
        batch = self.order.batch(self.step)
        self.loss.draw(f"{self.settings.seed}/{self.step}/softmax")
        documents, mixing = self._mixing(batch)
        rows = self.rows.read(documents).to(self.base.device)
        if isinstance(self.rows, FileRows):
            self.world.sum([rows])  # each process has some
        rows.requires_grad_()
        self.kind.begin(rows)
        value, mse, kl = self._backward(batch, documents, rows, mixing)
        gradients = [p.grad for p in (*self.shared, rows) if p.grad is not None]
        self.world.sum(gradients)
        if finite := self.scale.undo(gradients):
            self._move(documents, rows)
        self.scale.adapt(finite)
        decay = self.settings.decay(self.step, self.steps)
        self.step += 1
        self.losses.append(value)
        tokens = sum(len(self.samples[i].ids) for i in batch)
        lessons = (None, None) if self.teacher is None else (mse, kl)
        return Progress(self.step, self.steps, value, tokens, time.monotonic() - started, decay, *lessons)

    def _mixing(self, batch: Sequence[int]) -> tuple[NDArray[np.int64], Tensor]:
        """The documents whose routes a batch needs [n], ascending, and what part each has in each sample's
        route [samples, n].
        """
        s = self.settings
        rng = random.Random(f"{s.seed}/{self.step}/mixture")
        mixed = []
        for i in batch:
            own = self.samples[i].document
            others = min(s.mixture_size, self.documents) - 1
            if s.mixture > 0 and rng.random() < s.mixture:
                drawn = rng.sample(range(self.documents - 1), others)
                mixed.append([own, *(d + (d >= own) for d in drawn)])
            else:
                mixed.append([own])
        documents = np.unique(np.array([d for mix in mixed for d in mix], dtype=np.int64))
        parts = torch.zeros(len(batch), len(documents))
        for row, mix in enumerate(mixed):
            parts[row, np.searchsorted(documents, mix)] = 1.0 / len(mix)
        return documents, parts.to(self.base.device)

    def _backward(
        self, batch: Sequence[int], documents: NDArray[np.int64], rows: Tensor, mixing: Tensor
    ) -> tuple[float, float, float]:
        """Gradients of the batch's losses from this process's part of it; returns the losses of all of it: a
        token's cross-entropy, a document's squared error and a sample's divergence.
        """
        for parameter in self.shared:
            parameter.grad = None
        total = torch.zeros(3, device=self.base.device)
        count = sum(learnt(self.samples[i]) for i in batch)
        parts = self.world.size * self.settings.accumulation
        for part in range(self.settings.accumulation):
            # Every parts-th sample, so that all have their share of the long ones.
            places = range(self.world.rank * self.settings.accumulation + part, len(batch), parts)
            share = 1.0 if places else 0.0
            if not places and not is_sharded(self.base.model):
                continue
            # Blocks of a model in parts are put together by all processes: one without samples joins in.
            here = list(places) or [0]
            some = [batch[i] for i in here]
            with nullcontext() if self.states is None else self.states.of_batch(some):
                total += self._part(some, documents, rows, mixing[here], count, len(batch), share)
        self.kind.end(rows)
        for trained in (*self.shared, rows):
            if trained.grad is None:  # this process had no part of a small batch
                trained.grad = torch.zeros_like(trained)
        self.world.sum([total])
        value, mse, kl = total.tolist()
        if not math.isfinite(value):
            raise InvalidInput(
                f"the loss became {value} at step {self.step + 1}: "
                f"lower expert_lr ({self.settings.expert_lr}) or use dtype fp32"
            )
        return value, mse, kl

    def _part(
        self,
        numbers: Sequence[int],
        documents: NDArray[np.int64],
        rows: Tensor,
        mixing: Tensor,
        tokens: int,
        of: int,
        share: float,
    ) -> Tensor:
        """Gradients and losses [3] of some of a batch's ``of`` samples, in which ``tokens`` are learnt.

        numbers: of these samples. share: 1, or 0 for what counts for nothing.
        """
        pad = int(self.base.tokenizer.pad_token_id)
        samples = [self.samples[i] for i in numbers]
        ids, mask, targets = (t.to(self.base.device) for t in collate(samples, pad))
        routes = self.kind.routes(documents, rows, self.step)
        with self.routed.route(torch.einsum("bn,ngk->bgk", mixing, routes)):
            outputs = self.loss.outputs(ids, mask, targets)
        scale = self.scale.factor * share
        if self.teacher is None:
            found = self.loss.losses(outputs, targets, scale / tokens)
            torch.autograd.backward(outputs, found.gradient)
            return share * torch.stack([found.cross_entropy / tokens, *found.cross_entropy.new_zeros(2)])
        loras = self.teacher.read(documents)
        with torch.no_grad(), self.teacher.lent(loras, mixing):
            taught = self.loss.outputs(ids, mask, targets)
        s = self.settings
        found = self.loss.losses(outputs, targets, scale / tokens, taught, scale * s.kl_weight / of)
        # A document counts as often as samples speak of it, whichever process has them.
        mse = (mixing.sum(0) / of) @ self.teacher.errors(routes, loras)
        torch.autograd.backward([outputs, mse * (scale * s.mse_weight)], [found.gradient, None])
        return share * torch.stack([found.cross_entropy / tokens, mse.detach(), found.divergence / of])

    def _move(self, documents: NDArray[np.int64], rows: Tensor) -> None:
        s = self.settings
        if s.clip > 0:
            nn.utils.clip_grad_norm_([*self.shared, rows], s.clip)
        decay = s.decay(self.step, self.steps)
        if self.optimiser is not None:
            for group in self.optimiser.param_groups:
                group["lr"] = group["top_lr"] * decay
            self.optimiser.step()
        if rows.grad is not None:
            self.rows.update(documents, rows.grad, decay * s.row_lr)

    def encoding(self) -> Encoding:
        return self.kind.encoding(self.rows, self.documents, self.gathered, tuple(self.losses))

    def gathered(self, finish: Finish, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """What a function of numbers and rows makes of all rows, each of a shape; of files in a file."""
        if isinstance(self.rows, MemoryRows) or self.checkpoint is None:
            return finish(*next(self.rows.blocks()))
        path = rows_folder(self.checkpoint) / "routes.npy"
        if self.world.first:
            np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=(self.documents, *shape))
        self.world.wait()
        whole = np.lib.format.open_memmap(path, "r+")
        for numbers, rows in self.rows.blocks():
            whole[numbers] = finish(numbers, rows)
        whole.flush()
        self.world.wait()
        return np.lib.format.open_memmap(path, "r")

    def save(self, path: Path) -> None:
        """Save a checkpoint; all processes together."""
        state = {
            "key": self.key,
            "step": self.step,
            "losses": self.losses,
            "scale": self.scale.state(),
            "shared": self.kind.state(),
            "optimiser": self.optimiser.state_dict() if self.optimiser is not None else {},
            "rows": self.rows.save(self.step),
        }
        self.world.wait()  # every process's rows are on disk before the checkpoint names them
        if self.world.first:
            _save(state, path)
        self.world.wait()
        self.rows.saved(self.step)

    def load(self, path: Path) -> None:
        state = _load(path)
        if not isinstance(state, dict) or state.get("key") != self.key:
            raise CheckpointMismatch(
                f"{path}: made by a run with other documents, samples, settings or base model; "
                "delete it to start anew, or name another folder"
            )
        self.kind.load(state["shared"])
        if self.optimiser is not None:
            self.optimiser.load_state_dict(state["optimiser"])
        self.scale.load(state["scale"])
        self.step, self.losses = state["step"], list(state["losses"])
        self.rows.load(state["rows"], self.step)


class _LossScale:
    """The factor that keeps gradients of a float16 model above its smallest number (Micikevicius et al.,
    arXiv 1710.03740, section 3.2): halved when they overflow, doubled after 1,000 steps that they did not.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.factor = 2.0**14 if enabled else 1.0
        self.calm = 0

    def undo(self, gradients: Sequence[Tensor]) -> bool:
        """Divide by the factor, in place; False if the gradients overflowed and are of no use."""
        if not self.enabled:
            return True
        for gradient in gradients:
            gradient /= self.factor
        return all(bool(torch.isfinite(g).all()) for g in gradients)

    def adapt(self, finite: bool) -> None:
        if self.enabled:
            self.calm = self.calm + 1 if finite else 0
            if not finite:
                self.factor /= 2
            elif self.calm % 1000 == 0:
                self.factor *= 2

    def state(self) -> list[float]:
        return [self.factor, float(self.calm)]

    def load(self, state: Sequence[float]) -> None:
        self.factor, self.calm = state[0], int(state[1])


def _save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole, or leave the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        sync_folder(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _load(path: Path) -> Any:
    """What a checkpoint holds, in memory: the rows of all documents may be more than a GPU takes."""
    try:
        with path.open("rb") as file:
            try:
                return torch.load(file, map_location="cpu", weights_only=True)
            except OSError as error:  # torch's word for some torn files
                raise ValueError(str(error)) from error
    except OSError:
        raise
    except Exception as error:
        raise CheckpointMismatch(f"{path}: not a checkpoint ({error}); delete it to start anew") from error


@contextmanager
def _interrupts(asked: list[int]) -> Iterator[None]:
    """Hold a Ctrl-C back, so that what is saved is whole steps; ``asked`` gets an entry if there was one."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators for the parameters' start, and leave the caller's as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _key(
    base: BaseModel,
    samples: Sequence[Sample],
    documents: int,
    settings: TrainSettings,
    frozen: Encoding | None,
    features: NDArray[np.float32] | None,
) -> str:
    """Names a run by all that its result depends on."""
    digest = hashlib.blake2b(digest_size=16)
    # What changes memory and time, but nothing of the result beyond its rounding, may change on the way.
    how = {"accumulation": 1, "checkpointing": False, "compile": False, "shard": False, "keep_states": True}
    recipe = asdict(replace(settings, checkpoint_seconds=0.0, **how))  # type: ignore[arg-type]
    model = [fingerprint(base), str(base.model.dtype)]
    digest.update(json.dumps([model, documents, recipe], sort_keys=True).encode())
    for sample in samples:
        digest.update(repr((sample.document, sample.ids, sample.loss_from, sample.share)).encode())
    if frozen is not None:
        for array in (
            *(frozen.experts[name] for name in sorted(frozen.experts)),
            *(frozen.decoder or ()),
            frozen.routes,
            *((frozen.router or {})[name] for name in sorted(frozen.router or {})),
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
    if settings.router and features is not None:
        # Of some: those of all documents may fill a disk, and others differ everywhere.
        some = random.Random(0).sample(range(len(features)), min(len(features), 256))
        digest.update(np.ascontiguousarray(features[sorted(some)]).tobytes())
    return digest.hexdigest()
