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
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyprag.errors import CheckpointMismatch, InvalidInput
from polyprag.layers import DEFAULT_TARGETS, Mixing, ModuleShape, RoutedModel
from polyprag.models import BaseModel, fingerprint
from polyprag.routing import Phi, PhiKind, RouteCodes, RouteTable
from polyprag.samples import Sample


@dataclass(frozen=True)
class TrainSettings:
    """The recipe. ``alpha`` / ``rank`` scales the experts; ``table_lr`` is for z, ``code_lr`` for c."""

    routing: Literal["code", "table"] = "code"
    code_dim: int = 64
    experts: int = 16
    rank: int = 2
    alpha: float = 32.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    phi: PhiKind = "sigmoid"
    top_k: int | None = None
    mixing: Mixing = "exact"
    epochs: int = 4
    batch_size: int = 8
    expert_lr: float = 1e-3
    decoder_lr: float = 0.02
    code_lr: float = 0.05
    table_lr: float = 0.1
    clip: float = 1.0
    seed: int = 0
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.routing not in ("code", "table"):
            raise InvalidInput(f"routing is 'code' or 'table', not {self.routing!r}")
        for name in ("code_dim", "experts", "rank", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is at least 1, not {getattr(self, name)}")
        for name in ("expert_lr", "decoder_lr", "code_lr", "table_lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InvalidInput(f"{name} is a number of at least 0, not {getattr(self, name)}")


@dataclass(frozen=True)
class Progress:
    """One step done.

    ``loss``: its mean cross-entropy a token, in nats; ``tokens``: those of the batch, unpadded;
    ``step_seconds``: what it took.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    step_seconds: float


@dataclass(frozen=True)
class Encoding:
    """What training made, as the store takes it.

    experts: ``{module}.A`` [K, r, in] and ``{module}.B`` [out, K, r], float32.
    decoder: V [G*K, d] and b [G*K].
    routes: codes [n, d] where there is a decoder, else logits [n, G, K].
    """

    modules: tuple[ModuleShape, ...]
    experts: dict[str, NDArray[np.float32]]
    decoder: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    routes: NDArray[np.float32]
    settings: TrainSettings
    losses: tuple[float, ...] = field(repr=False, default=())


def train(
    base: BaseModel,
    samples: Sequence[Sample],
    documents: int,
    settings: TrainSettings = TrainSettings(),
    *,
    frozen: Encoding | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] = lambda p: None,
) -> Encoding:
    """Train experts and routes on ``samples``; with ``frozen`` (Poly-z), only the routes of new documents.

    Args:
        documents: how many documents the samples speak of (rows 0 to documents - 1).
        frozen: experts and decoder that stay as they are; its ``routes`` [any number, ...] are those of the
            documents that the store has: new ones start at their mean.
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
    run = _Run(base, samples, documents, settings, frozen)
    try:
        if checkpoint is not None and checkpoint.exists():
            run.load(checkpoint)
        saved = time.monotonic()
        while run.step < run.steps:
            try:
                with _interrupt_after():
                    done = run.advance()
                progress(done)
                if checkpoint is not None and time.monotonic() - saved > settings.checkpoint_seconds:
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


class _Run:
    """The state of one training: all that a checkpoint holds, and what a step does to it."""

    def __init__(
        self,
        base: BaseModel,
        samples: Sequence[Sample],
        documents: int,
        settings: TrainSettings,
        frozen: Encoding | None,
    ) -> None:
        self.base = base
        self.samples = samples
        self.settings = settings
        self.phi = Phi(settings.phi, settings.top_k)
        self.frozen = frozen
        self.key = _key(base, samples, documents, settings, frozen)
        self.batches_an_epoch = math.ceil(len(samples) / settings.batch_size)
        self.steps = self.batches_an_epoch * settings.epochs
        self.step = 0
        self.losses: list[float] = []
        self.seconds = 0.0
        with _seeded(settings.seed):
            self.routed = RoutedModel.attach(
                base.model,
                experts=settings.experts,
                rank=settings.rank,
                alpha=settings.alpha,
                targets=frozen.modules if frozen else settings.targets,
                mixing=settings.mixing,
            )
            try:
                self.routing = self._new_routing(documents).to(base.device)
                self.optimiser = torch.optim.AdamW(
                    self._parameter_groups(), betas=(0.9, 0.999), weight_decay=0.0
                )
            except BaseException:
                self.routed.detach()
                raise
        self._epoch_order: tuple[int, list[list[int]]] | None = None

    def _new_routing(self, documents: int) -> RouteTable | RouteCodes:
        s, groups = self.settings, self.routed.groups
        routing: RouteTable | RouteCodes
        if s.routing == "code":
            routing = RouteCodes(documents, groups, s.experts, s.code_dim)
        else:
            routing = RouteTable(documents, groups, s.experts)
        if self.frozen is None:
            return routing
        _check_frozen(self.frozen, s, groups)
        self.routed.load_experts({k: torch.from_numpy(np.array(v)) for k, v in self.frozen.experts.items()})
        with torch.no_grad():
            if self.frozen.decoder is not None and isinstance(routing, RouteCodes):
                routing.V.copy_(torch.from_numpy(np.array(self.frozen.decoder[0])))
                routing.b.copy_(torch.from_numpy(np.array(self.frozen.decoder[1])))
            start = torch.from_numpy(self.frozen.routes.mean(axis=0)) if len(self.frozen.routes) else None
            for parameter in routing.document_parameters():
                parameter.copy_(torch.zeros_like(parameter) if start is None else start.expand_as(parameter))
        return routing

    def _parameter_groups(self) -> list[dict[str, Any]]:
        s = self.settings
        rows = {
            "params": self.routing.document_parameters(),
            "lr": s.code_lr if s.routing == "code" else s.table_lr,
        }
        if self.frozen is not None:
            for parameter in [*self.routed.parameters(), *self.routing.shared_parameters()]:
                parameter.requires_grad_(False)
            return [rows]
        groups = [rows, {"params": self.routed.parameters(), "lr": s.expert_lr}]
        if shared := self.routing.shared_parameters():
            groups.append({"params": shared, "lr": s.decoder_lr})
        for group in groups:
            group["top_lr"] = group["lr"]
        return groups

    def advance(self) -> Progress:
        """One optimiser step."""
        started = time.monotonic()
        batch = [self.samples[i] for i in self._batch(self.step)]
        ids, mask, labels = _collate(batch, self.base)
        rows = torch.tensor([s.document for s in batch], device=self.base.device)
        w = self.phi(self.routing.logits(rows))
        with self.routed.route(w):
            output = self.base.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
        loss: Tensor = output.loss
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InvalidInput(
                f"the loss became {value} at step {self.step + 1}: "
                f"lower expert_lr ({self.settings.expert_lr}) or use dtype fp32"
            )
        decay = 1.0 - self.step / self.steps
        trained = []
        for group in self.optimiser.param_groups:
            group["lr"] = group.setdefault("top_lr", group["lr"]) * decay
            trained += group["params"]
        if self.settings.clip > 0:
            nn.utils.clip_grad_norm_(trained, self.settings.clip)
        self.optimiser.step()
        self.step += 1
        self.losses.append(value)
        step_seconds = time.monotonic() - started
        self.seconds += step_seconds
        return Progress(self.step, self.steps, value, int(mask.sum()), step_seconds)

    def _batch(self, step: int) -> list[int]:
        epoch, number = divmod(step, self.batches_an_epoch)
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = (
                epoch,
                _epoch(self.samples, self.settings.batch_size, self.settings.seed, epoch),
            )
        return self._epoch_order[1][number]

    def encoding(self) -> Encoding:
        decoder = None
        if isinstance(self.routing, RouteCodes):
            decoder = (_numpy(self.routing.V), _numpy(self.routing.b))
        return Encoding(
            modules=tuple(self.routed.modules),
            experts={name: _numpy(t) for name, t in self.routed.experts().items()},
            decoder=decoder,
            routes=_numpy(self.routing.document_parameters()[0]),
            settings=self.settings,
            losses=tuple(self.losses),
        )

    def save(self, path: Path) -> None:
        state = {
            "key": self.key,
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "experts": self.routed.experts() if self.frozen is None else {},
            "routing": self.routing.state_dict(),
            "optimiser": self.optimiser.state_dict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with scratch.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)

    def load(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                try:
                    state = torch.load(file, map_location=self.base.device, weights_only=True)
                except OSError as error:  # torch's word for some torn files
                    raise ValueError(str(error)) from error
        except OSError:
            raise
        except Exception as error:
            raise CheckpointMismatch(
                f"{path}: not a checkpoint ({error}); delete it to start anew"
            ) from error
        if not isinstance(state, dict) or state.get("key") != self.key:
            raise CheckpointMismatch(
                f"{path}: made by a run with other documents, samples, settings or base model; "
                "delete it to start anew, or name another folder"
            )
        if self.frozen is None:
            self.routed.load_experts(state["experts"])
        self.routing.load_state_dict(state["routing"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.losses = state["step"], state["seconds"], list(state["losses"])


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


def _epoch(samples: Sequence[Sample], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one epoch: samples of like length together, little padding, the batches in random order."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(samples)))
    rng.shuffle(order)
    # Sorted in coarse steps of length: a stable sort keeps the shuffle inside a step.
    order.sort(key=lambda i: len(samples[i].ids) // 4)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def _collate(batch: Sequence[Sample], base: BaseModel) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask and labels [rows, longest], padded on the right."""
    width = max(len(s.ids) for s in batch)
    ids = torch.full((len(batch), width), int(base.tokenizer.pad_token_id), dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(batch):
        n = len(sample.ids)
        ids[row, :n] = torch.tensor(sample.ids)
        mask[row, :n] = 1
        labels[row, sample.loss_from : n] = ids[row, sample.loss_from : n]
    return ids.to(base.device), mask.to(base.device), labels.to(base.device)


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = tensor.detach().float().cpu().numpy()
    return np.array(array, dtype=np.float32, order="C")


@contextmanager
def _interrupt_after() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done, so that what is saved is whole steps."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


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
    recipe = asdict(replace(settings, checkpoint_seconds=0.0))
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
