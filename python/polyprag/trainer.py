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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyprag.batches import Order, collate, learnt
from polyprag.errors import CheckpointMismatch, InvalidInput
from polyprag.jsonl import sync_folder
from polyprag.layers import DEFAULT_TARGETS, Mixing, ModuleShape, RoutedModel, find_targets
from polyprag.lora import Slots
from polyprag.loss import CausalLoss
from polyprag.models import BaseModel, fingerprint
from polyprag.router import Router
from polyprag.routing import Phi, PhiKind, RouteDecoder
from polyprag.rows import BETAS, EPSILON, FileRows, MemoryRows, Rows, Start, record
from polyprag.samples import Sample
from polyprag.world import World

Routing: TypeAlias = Literal["code", "table", "lora"]
Schedule: TypeAlias = Literal["linear", "cosine", "constant"]

_RATES = ("expert_lr", "decoder_lr", "code_lr", "table_lr", "lora_lr", "router_lr")
ROWS_IN_MEMORY = 1 << 30  # bytes


@dataclass(frozen=True)
class TrainSettings:
    """The recipe.

    ``routing``: what a document is: a ``code`` from which its routing logits are decoded, its logits in a
    ``table`` (as in the paper), or a ``lora`` of its own (PRAG's way: nothing is shared, and ``experts``
    counts for nothing).
    ``alpha`` / ``rank`` scales the experts; ``table_lr`` is for z, ``code_lr`` for c, which move only in the
    steps that meet their document (see :mod:`polyprag.rows`).
    ``batch_size``: samples a step, over all processes; a step works them off in ``accumulation`` parts.
    ``checkpointing``: keep no activations inside the blocks of the model, and compute them twice: less
    memory, a third more time. ``compile``: let torch compile the model, which takes a minute or more.
    ``warmup``: share of the steps in which the learning rates rise; then ``schedule`` lets them fall to 0.
    ``gumbel``: logistic noise on the logits while training, as Poly does (relaxed Bernoulli, temperature 1).
    ``mixture``: share of the samples that are trained under the mean route of their document and
    ``mixture_size`` - 1 others, as retrieval of several documents gives.
    ``router``: also train a network that maps a document's text to its code (an amortised router); a code
    is then its output and what the document's own steps add to it. In the share ``router_alone`` of cases
    nothing is added, so that the router learns to do without.
    ``rows``: where codes or logits and their optimiser's state are: ``auto`` is memory, or beside the
    checkpoint where they would take more than 1 GiB.
    """

    routing: Routing = "code"
    code_dim: int = 128
    experts: int = 16
    rank: int = 2
    alpha: float = 32.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    phi: PhiKind = "linear"
    top_k: int | None = None
    mixing: Mixing = "exact"
    gumbel: bool = False
    mixture: float = 0.0
    mixture_size: int = 3
    router: bool = False
    router_alone: float = 0.5
    epochs: int = 4
    batch_size: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    compile: bool = False
    expert_lr: float = 1e-3
    decoder_lr: float = 0.02
    code_lr: float = 0.3
    table_lr: float = 0.6
    lora_lr: float = 1e-3
    router_lr: float = 1e-3
    schedule: Schedule = "linear"
    warmup: float = 0.0
    clip: float = 1.0
    seed: int = 0
    rows: Literal["auto", "memory", "files"] = "auto"
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name, words in (
            ("routing", get_args(Routing)),
            ("schedule", get_args(Schedule)),
            ("rows", ("auto", "memory", "files")),
        ):
            if getattr(self, name) not in words:
                raise InvalidInput(f"{name} is one of {', '.join(words)}, not {getattr(self, name)!r}")
        for name in ("code_dim", "experts", "rank", "epochs", "batch_size", "accumulation", "mixture_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is at least 1, not {getattr(self, name)}")
        for name in (*_RATES, "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InvalidInput(f"{name} is a number of at least 0, not {getattr(self, name)}")
        for name in ("warmup", "mixture", "router_alone"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        Phi(self.phi, self.top_k)
        if self.gumbel and self.phi == "linear":
            raise InvalidInput(
                "gumbel is noise of weights from 0 to 1: it goes with phi 'sigmoid' or 'softmax'"
            )
        if self.router and self.routing != "code":
            raise InvalidInput("router makes codes: it goes with routing 'code', not 'table'")

    @property
    def row_lr(self) -> float:
        """The learning rate of what each document has of its own."""
        return {"code": self.code_lr, "table": self.table_lr, "lora": self.lora_lr}[self.routing]

    def decay(self, step: int, steps: int) -> float:
        """What the learning rates are multiplied by in step number ``step`` (from 0) of ``steps``."""
        rising = self.warmup * steps
        if step < rising:
            return min((step + 1) / rising, 1.0)
        left = (steps - step) / (steps - rising)
        if self.schedule == "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left)
        return left if self.schedule == "linear" else 1.0


@dataclass(frozen=True)
class Progress:
    """One step done.

    ``loss``: its mean cross-entropy a token, in nats; ``tokens``: those of the batch, unpadded, over all
    processes; ``step_seconds``: what it took; ``decay``: what the learning rates were multiplied by.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    step_seconds: float
    decay: float = 1.0

    @property
    def tokens_a_second(self) -> float:
        return self.tokens / max(self.step_seconds, 1e-9)


@dataclass(frozen=True)
class Encoding:
    """What training made, as the store takes it.

    experts: ``{module}.A`` [K, r, in] and ``{module}.B`` [out, K, r], float32; of ``lora`` routing one
    for each document, K = n.
    decoder: V [G*K, d] and b [G*K].
    routes: codes [n, d] where there is a decoder, logits [n, G, K] of a table, and of ``lora`` routing the
    number of each document's own expert [n].
    router: the parameters of the amortised router by name, if one was trained (see :mod:`polyprag.router`).
    """

    modules: tuple[ModuleShape, ...]
    experts: dict[str, NDArray[np.float32]]
    decoder: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    routes: NDArray[np.float32]
    settings: TrainSettings
    router: dict[str, NDArray[np.float32]] | None = field(repr=False, default=None)
    losses: tuple[float, ...] = field(repr=False, default=())


def train(
    base: BaseModel,
    samples: Sequence[Sample],
    documents: int,
    settings: TrainSettings = TrainSettings(),
    *,
    frozen: Encoding | None = None,
    features: NDArray[np.float32] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] = lambda p: None,
) -> Encoding:
    """Train experts and routes on ``samples``; with ``frozen`` (Poly-z), only the routes of new documents.

    Args:
        documents: how many documents the samples speak of (rows 0 to documents - 1).
        frozen: experts and decoder that stay as they are; its ``routes`` [any number, ...] are those of the
            documents that the store has: new ones start at their mean, or where its router puts them.
        features: [documents, f], what an amortised router reads of them; needed if ``settings.router``.
        checkpoint: a file to save to now and then, on Ctrl-C and at the end of training, and to resume from.
        progress: called after every step.

    Raises:
        CheckpointMismatch: ``checkpoint`` belongs to other samples or settings.
        KeyboardInterrupt: on Ctrl-C, after the checkpoint is saved.
    """
    if not samples:
        raise InvalidInput("no samples to train on")
    for sample in samples:
        if not 0 <= sample.document < documents:
            raise InvalidInput(f"a sample speaks of document {sample.document}, but there are {documents}")
        if len(sample.ids) <= max(sample.loss_from, 1):
            raise InvalidInput(f"a sample of document {sample.document} has no token to learn: {sample}")
    if settings.router and (features is None or len(features) != documents):
        raise InvalidInput("a router needs the features of every document: give text_features of their texts")
    run = _Run(base, samples, documents, settings, frozen, features, checkpoint)
    try:
        if checkpoint is not None and checkpoint.exists():
            run.load(checkpoint)
        else:
            run.rows.reset()
        saved = time.monotonic()
        while run.step < run.steps:
            try:
                with _interrupts() as asked:
                    done = run.advance()
                    # All processes stop, or save, after the same step.
                    stop = run.world.any(bool(asked))
                if stop:
                    raise KeyboardInterrupt
                progress(done)
                late = time.monotonic() - saved > settings.checkpoint_seconds
                if checkpoint is not None and run.world.any(late or run.rows.full):
                    run.save(checkpoint)
                    saved = time.monotonic()
            except KeyboardInterrupt:
                if checkpoint is not None:
                    run.save(checkpoint)
                raise
        if checkpoint is not None:
            run.save(checkpoint)
        return run.encoding()
    finally:
        run.routed.detach()


def forget(checkpoint: Path) -> None:
    """Remove a checkpoint and the rows beside it."""
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(_rows_folder(checkpoint), ignore_errors=True)


def _rows_folder(checkpoint: Path) -> Path:
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
        checkpoint: Path | None,
    ) -> None:
        self.base, self.samples, self.documents = base, samples, documents
        self.settings, self.frozen, self.checkpoint = settings, frozen, checkpoint
        self.features = features if settings.router else None
        self.world = World.current()
        self.phi = Phi(settings.phi, settings.top_k)
        self.key = _key(base, samples, documents, settings, frozen)
        self.order = Order(samples, settings.batch_size, settings.seed)
        self.steps = self.order.batches_an_epoch * settings.epochs
        self.step = 0
        self.losses: list[float] = []
        self.scale = _LossScale(base.model.dtype == torch.float16)
        with _seeded(settings.seed):
            self.routed = self._attach()
            try:
                self.slots = Slots(self.routed, settings.rank) if settings.routing == "lora" else None
                self.decoder = self._new_decoder()
                self.router = self._new_router()
                self.rows = self._new_rows()
                self.shared, self.optimiser = self._new_optimiser()
                if settings.checkpointing:
                    self.routed.enable_checkpointing()
                self.loss = CausalLoss(base, compile=settings.compile)
            except BaseException:
                self.routed.detach()
                raise

    def _attach(self) -> RoutedModel:
        s = self.settings
        targets: Sequence[ModuleShape] = find_targets(self.base.model, s.targets)
        experts = s.experts
        if s.routing == "lora":
            if self.frozen is not None:
                raise InvalidInput("routing 'lora' shares nothing that could stay: encode all documents anew")
            # As many as a batch can have documents, all modules of one under the same weight.
            experts = s.batch_size * (s.mixture_size if s.mixture > 0 else 1)
            targets = [replace(m, group=0) for m in targets]
        return RoutedModel.attach(
            self.base.model,
            experts=experts,
            rank=s.rank,
            alpha=s.alpha,
            targets=self.frozen.modules if self.frozen else targets,
            mixing=s.mixing,
        )

    def _new_decoder(self) -> RouteDecoder | None:
        s, groups, frozen = self.settings, self.routed.groups, self.frozen
        decoder = RouteDecoder(groups, s.experts, s.code_dim) if s.routing == "code" else None
        if frozen is not None:
            _check_frozen(frozen, s, groups)
            self.routed.load_experts({k: torch.from_numpy(np.array(v)) for k, v in frozen.experts.items()})
            if decoder is not None and frozen.decoder is not None:
                with torch.no_grad():
                    decoder.V.copy_(torch.from_numpy(np.array(frozen.decoder[0])))
                    decoder.b.copy_(torch.from_numpy(np.array(frozen.decoder[1])))
        return None if decoder is None else decoder.to(self.base.device)

    def _new_router(self) -> Router | None:
        if self.features is None:
            return None
        if self.frozen is None:
            router = Router(self.features.shape[1], self.settings.code_dim)
        elif self.frozen.router is not None:
            router = Router.of(self.frozen.router)
        else:
            raise InvalidInput("router: the experts were trained without one; use their settings")
        return router.to(self.base.device)

    def _new_rows(self) -> Rows:
        s = self.settings
        width = s.code_dim if s.routing == "code" else self.routed.groups * s.experts
        if self.slots is not None:
            width, start = self.slots.width, Start("value", value=self.slots.start())
        elif self.router is not None:
            start = Start("value", value=np.zeros(width, dtype=np.float32))
        elif self.frozen is not None:
            old = self.frozen.routes.reshape(len(self.frozen.routes), width)
            start = Start("value", value=old.mean(axis=0) if len(old) else np.zeros(width, dtype=np.float32))
        elif s.routing == "code":
            start = Start("normal", s.seed)
        else:
            start = Start("uniform", s.seed, scale=1e-3)
        large = self.documents * record(width).itemsize > ROWS_IN_MEMORY and self.checkpoint is not None
        if s.rows == "memory" or (s.rows == "auto" and not large):
            return MemoryRows(self.documents, width, start)
        if self.checkpoint is None:
            raise InvalidInput("rows is 'files', but there is no checkpoint beside which they could be kept")
        return FileRows(
            _rows_folder(self.checkpoint),
            self.documents,
            width,
            start,
            key=bytes.fromhex(self.key),
            part=self.world.rank,
            parts=self.world.size,
        )

    def _new_optimiser(self) -> tuple[list[nn.Parameter], torch.optim.AdamW | None]:
        """What the corpus shares, and what moves it; with frozen experts nothing of it moves."""
        s = self.settings
        if self.slots is not None:
            return [], None
        groups: list[dict[str, Any]] = [{"params": self.routed.parameters(), "lr": s.expert_lr}]
        if self.decoder is not None:
            groups.append({"params": list(self.decoder.parameters()), "lr": s.decoder_lr})
        if self.router is not None:
            groups.append({"params": list(self.router.parameters()), "lr": s.router_lr})
        shared = [parameter for group in groups for parameter in group["params"]]
        if self.frozen is not None:
            for parameter in shared:
                parameter.requires_grad_(False)
            return [], None
        for group in groups:
            group["top_lr"] = group["lr"]
        fused = self.base.device.type in ("cpu", "cuda")  # one pass over the memory instead of ten
        return shared, torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON, weight_decay=0.0, fused=fused)

    def advance(self) -> Progress:
        """One optimiser step."""
        started = time.monotonic()
        batch = self.order.batch(self.step)
        documents, mixing = self._mixing(batch)
        rows = self.rows.read(documents).to(self.base.device)
        if isinstance(self.rows, FileRows):
            self.world.sum([rows])  # each process has some
        rows.requires_grad_()
        if self.slots is not None:
            self.slots.fill(rows)
        value = self._backward(batch, documents, rows, mixing)
        gradients = [p.grad for p in (*self.shared, rows) if p.grad is not None]
        self.world.sum(gradients)
        if finite := self.scale.undo(gradients):
            self._move(documents, rows)
        self.scale.adapt(finite)
        decay = self.settings.decay(self.step, self.steps)
        self.step += 1
        self.losses.append(value)
        tokens = sum(len(self.samples[i].ids) for i in batch)
        return Progress(self.step, self.steps, value, tokens, time.monotonic() - started, decay)

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
    ) -> float:
        """Gradients of the batch's loss from this process's part of it; returns the loss of all of it."""
        for parameter in self.shared:
            parameter.grad = None
        total = torch.zeros((), device=self.base.device)
        count = sum(learnt(self.samples[i]) for i in batch)
        parts = self.world.size * self.settings.accumulation
        for part in range(self.settings.accumulation):
            # Every parts-th sample, so that all have their share of the long ones.
            places = range(self.world.rank * self.settings.accumulation + part, len(batch), parts)
            if not places:
                continue
            pad = int(self.base.tokenizer.pad_token_id)
            tensors = collate([self.samples[batch[i]] for i in places], pad)
            ids, mask, targets = (t.to(self.base.device) for t in tensors)
            if self.slots is not None:
                routes = self.slots.routes(len(documents))
            else:
                routes = self.phi(self._logits(self._codes(documents, rows)))
            w = torch.einsum("bn,ngk->bgk", mixing[list(places)], routes)
            with self.routed.route(w):
                loss = self.loss.backward(ids, mask, targets, self.scale.factor / count)
            total += loss / count
        if self.slots is not None:
            rows.grad = self.slots.gradient(len(documents))
        for trained in (*self.shared, rows):
            if trained.grad is None:  # this process had no part of a small batch
                trained.grad = torch.zeros_like(trained)
        self.world.sum([total])
        value = float(total)
        if not math.isfinite(value):
            raise InvalidInput(
                f"the loss became {value} at step {self.step + 1}: "
                f"lower expert_lr ({self.settings.expert_lr}) or use dtype fp32"
            )
        return value

    def _codes(self, documents: NDArray[np.int64], rows: Tensor) -> Tensor:
        """The rows themselves, or what the router makes of the documents and the rows add to it."""
        if self.router is None or self.features is None:
            return rows
        read = torch.from_numpy(np.asarray(self.features[documents])).to(self.base.device)
        alone = 0.0 if self.frozen is not None else self.settings.router_alone
        draw = np.random.default_rng((self.settings.seed, self.step))
        added = torch.from_numpy(draw.random((len(documents), 1)) >= alone).to(rows)
        codes: Tensor = self.router(read) + added * rows
        return codes

    def _logits(self, rows: Tensor) -> Tensor:
        """z [n, G, K] of rows [n, width]."""
        if self.decoder is None:
            z = rows.view(-1, self.routed.groups, self.settings.experts)
        else:
            z = self.decoder(rows)
        if self.settings.gumbel:
            # Of seed and step alone, so that every process and a resumed run draw the same.
            draw = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + self.step)
            u = torch.rand(z.shape, generator=draw).clamp(1e-6, 1 - 1e-6).to(z)
            z = z + torch.logit(u)
        return z

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
        decoder = None
        if self.decoder is not None:
            decoder = (_numpy(self.decoder.V), _numpy(self.decoder.b))
        if self.slots is not None:
            experts = self.slots.experts(self.rows.blocks(), self.documents)
            routes = np.arange(self.documents, dtype=np.float32)
        else:
            experts = {name: _numpy(t) for name, t in self.routed.experts().items()}
            routes = self._routes()
        return Encoding(
            modules=tuple(self.routed.modules),
            experts=experts,
            decoder=decoder,
            routes=routes,
            settings=self.settings,
            router=None if self.router is None else self.router.arrays(),
            losses=tuple(self.losses),
        )

    def _routes(self) -> NDArray[np.float32]:
        """All routes [n, ...]; those that were trained in files are in a file."""
        s = self.settings
        shape = (s.code_dim,) if s.routing == "code" else (self.routed.groups, s.experts)
        if isinstance(self.rows, MemoryRows) or self.checkpoint is None:
            return self._finished(*next(self.rows.blocks())).reshape(-1, *shape)
        path = _rows_folder(self.checkpoint) / "routes.npy"
        if self.world.first:
            np.lib.format.open_memmap(path, "w+", dtype=np.float32, shape=(self.documents, *shape))
        self.world.wait()
        whole = np.lib.format.open_memmap(path, "r+")
        for numbers, block in self.rows.blocks():
            whole[numbers] = self._finished(numbers, block).reshape(-1, *shape)
        whole.flush()
        self.world.wait()
        return np.lib.format.open_memmap(path, "r")

    def _finished(self, numbers: NDArray[np.int64], rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.router is None or self.features is None:
            return rows
        return rows + self.router.codes(np.asarray(self.features[numbers]))

    def save(self, path: Path) -> None:
        """Save a checkpoint; all processes together."""
        state = {
            "key": self.key,
            "step": self.step,
            "losses": self.losses,
            "scale": self.scale.state(),
            "experts": self.routed.experts() if self.frozen is None else {},
            "decoder": self.decoder.state_dict() if self.decoder is not None else {},
            "router": self.router.state_dict() if self.router is not None else {},
            "optimiser": self.optimiser.state_dict() if self.optimiser is not None else {},
            "rows": self.rows.save(self.step),
        }
        self.world.wait()  # every process's rows are on disk before the checkpoint names them
        if self.world.first:
            _save(state, path)
        self.world.wait()
        self.rows.saved(self.step)

    def load(self, path: Path) -> None:
        state = _load(path, self.base.device)
        if not isinstance(state, dict) or state.get("key") != self.key:
            raise CheckpointMismatch(
                f"{path}: made by a run with other documents, samples, settings or base model; "
                "delete it to start anew, or name another folder"
            )
        if self.frozen is None:
            self.routed.load_experts(state["experts"])
        if self.decoder is not None:
            self.decoder.load_state_dict(state["decoder"])
        if self.router is not None:
            self.router.load_state_dict(state["router"])
        if self.optimiser is not None:
            self.optimiser.load_state_dict(state["optimiser"])
        self.scale.load(state["scale"])
        self.step, self.losses = state["step"], list(state["losses"])
        self.rows.load({name: t.cpu() for name, t in state["rows"].items()}, self.step)


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


def _load(path: Path, device: torch.device) -> Any:
    try:
        with path.open("rb") as file:
            try:
                return torch.load(file, map_location=device, weights_only=True)
            except OSError as error:  # torch's word for some torn files
                raise ValueError(str(error)) from error
    except OSError:
        raise
    except Exception as error:
        raise CheckpointMismatch(f"{path}: not a checkpoint ({error}); delete it to start anew") from error


def _check_frozen(frozen: Encoding, settings: TrainSettings, groups: int) -> None:
    """Routes can only be trained the way that the experts were."""
    if (settings.routing == "code") != (frozen.decoder is not None):
        raise InvalidInput(
            f"routing is {settings.routing!r}, but the experts were trained with "
            f"{'a table' if frozen.decoder is None else 'codes'}: use their settings"
        )
    row = (settings.code_dim,) if settings.routing == "code" else (groups, settings.experts)
    found = frozen.routes.shape[1:]
    if frozen.decoder is not None and frozen.decoder[0].shape != (
        groups * settings.experts,
        settings.code_dim,
    ):
        raise InvalidInput(
            f"the decoder has {frozen.decoder[0].shape} numbers, but the settings ask for "
            f"{(groups * settings.experts, settings.code_dim)}: use the settings of the experts"
        )
    if len(frozen.routes) and found != row:
        raise InvalidInput(f"the routes of the experts have {found} numbers each, but {row} were expected")


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return np.array(array, dtype=np.float32, order="C")


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Hold a Ctrl-C back, so that what is saved is whole steps; the list tells whether there was one."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked  # signals reach the main thread only
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield asked
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
) -> str:
    """Names a run by all that its result depends on."""
    digest = hashlib.blake2b(digest_size=16)
    # What changes memory and time, but nothing of the result beyond its rounding, may change on the way.
    recipe = asdict(
        replace(settings, checkpoint_seconds=0.0, accumulation=1, checkpointing=False, compile=False)
    )
    model = [fingerprint(base), str(base.model.dtype)]
    digest.update(json.dumps([model, documents, recipe], sort_keys=True).encode())
    for sample in samples:
        digest.update(repr((sample.document, sample.ids, sample.loss_from)).encode())
    if frozen is not None:
        for array in (
            *(frozen.experts[name] for name in sorted(frozen.experts)),
            *(frozen.decoder or ()),
            frozen.routes,
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
