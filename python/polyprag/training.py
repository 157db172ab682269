"""What training is told, what it tells, and what it makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from torch import nn

from polyprag.errors import InvalidInput
from polyprag.layers import DEFAULT_TARGETS, Mixing, ModuleShape, find_targets
from polyprag.routing import Phi, PhiKind

Routing: TypeAlias = Literal["code", "table", "lora"]
Schedule: TypeAlias = Literal["linear", "cosine", "constant"]
Softmax: TypeAlias = Literal["sampled", "whole"]

_RATES = ("expert_lr", "decoder_lr", "code_lr", "table_lr", "lora_lr", "router_lr")


@dataclass(frozen=True)
class TrainSettings:
    """The recipe.

    ``routing``: what a document is: a ``code`` from which its routing logits are decoded, its logits in a
    ``table`` (as in the paper), or a ``lora`` of its own (PRAG's way: nothing is shared, and ``experts``
    counts for nothing).
    ``alpha`` / ``rank`` scales the experts; ``table_lr`` is for z, ``code_lr`` for c, which move only in the
    steps that meet their document (see :mod:`polyprag.rows`).
    ``targets``: the layers that get experts; ``auto`` is those of the MLPs in the blocks from the share
    ``from_depth`` of the model's depth on (see :func:`polyprag.layers.find_targets`). The blocks below the
    first of them say the same of a sample in every epoch: with ``keep_states`` it is computed once and kept
    in a file without a name (:mod:`polyprag.states`).
    ``batch_size``: samples a step, over all processes; a step works them off in ``accumulation`` parts.
    ``checkpointing``: keep no activations inside the blocks of the model, and compute them twice: less
    memory, a third more time. ``compile``: let torch compile the model, which takes a minute or more.
    ``shard``: spread the base model over the processes, for one that does not fit a device.
    ``softmax``: over the tokens of the samples and 8,192 others that every step draws (``sampled``), or over
    the ``whole`` vocabulary, which takes a third more time (:mod:`polyprag.loss`).
    ``warmup``: share of the steps in which the learning rates rise; then ``schedule`` lets them fall to 0.
    ``gumbel``: logistic noise on the logits while training, as Poly does (relaxed Bernoulli, temperature 1).
    ``mixture``: share of the samples that are trained under the mean route of their document and
    ``mixture_size`` - 1 others, as retrieval of several documents gives.
    ``router``: also train a network that maps a document's text to its code (an amortised router); a code
    is then its output and what the document's own steps add to it. In the share ``router_alone`` of cases
    nothing is added, so that the router learns to do without.
    ``mse_weight``, ``kl_weight``: of what a hypernetwork learns from LoRAs that were trained one a document
    (DyPRAG, :mod:`polyprag.teacher`): the squared error of the LoRA that a route makes, summed over matrices,
    and the divergence of what the model says, summed over the tokens of a sample.
    ``rows``: where codes or logits and their optimiser's state are: ``auto`` is memory, or beside the
    checkpoint where they would take more than 1 GiB.
    """

    routing: Routing = "code"
    code_dim: int = 128
    experts: int = 16
    rank: int = 2
    alpha: float = 32.0
    targets: tuple[str, ...] = DEFAULT_TARGETS
    from_depth: float = 0.5
    keep_states: bool = True
    phi: PhiKind = "linear"
    top_k: int | None = None
    mixing: Mixing = "exact"
    gumbel: bool = False
    mixture: float = 0.0
    mixture_size: int = 3
    router: bool = False
    router_alone: float = 0.5
    mse_weight: float = 0.0
    kl_weight: float = 0.0
    softmax: Softmax = "sampled"
    epochs: int = 6
    batch_size: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    compile: bool = False
    shard: bool = False
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
            ("softmax", get_args(Softmax)),
            ("rows", ("auto", "memory", "files")),
        ):
            if getattr(self, name) not in words:
                raise InvalidInput(f"{name} is one of {', '.join(words)}, not {getattr(self, name)!r}")
        for name in ("code_dim", "experts", "rank", "epochs", "batch_size", "accumulation", "mixture_size"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is at least 1, not {getattr(self, name)}")
        for name in (*_RATES, "clip", "mse_weight", "kl_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise InvalidInput(f"{name} is a number of at least 0, not {getattr(self, name)}")
        for name in ("warmup", "mixture", "router_alone"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInput(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 64:
            raise InvalidInput(f"seed is a whole number from 0 to 2**64 - 1, not {self.seed}")
        if not 0 <= self.from_depth < 1:
            raise InvalidInput(f"from_depth is a share from 0 to below 1, not {self.from_depth}")
        Phi(self.phi, self.top_k)
        if self.gumbel and self.phi == "linear":
            raise InvalidInput(
                "gumbel is noise of weights from 0 to 1: it goes with phi 'sigmoid' or 'softmax'"
            )
        if self.mse_weight > 0 and self.mixing != "factors":
            raise InvalidInput(
                "mse_weight compares the A and the B that a route mixes with those of a LoRA: it goes with "
                "mixing 'factors'"
            )
        if self.taught and self.routing == "lora":
            raise InvalidInput("mse_weight and kl_weight are of routes that learn from LoRAs, not of LoRAs")
        if self.router and self.routing != "code":
            raise InvalidInput("router makes codes: it goes with routing 'code', not 'table'")

    @property
    def taught(self) -> bool:
        """Whether training needs the LoRAs of documents to learn from."""
        return self.mse_weight > 0 or self.kl_weight > 0

    def layers(self, model: nn.Module) -> list[ModuleShape]:
        """The layers of a base model that get experts; raises InvalidInput where there are none."""
        return find_targets(model, self.targets, self.from_depth)

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
    ``mse``, ``kl``: of training that learns from LoRAs, unweighted: a document's squared error, and a
    sample's divergence, on average.
    """

    step: int
    steps: int
    loss: float
    tokens: int
    step_seconds: float
    decay: float = 1.0
    mse: float | None = None
    kl: float | None = None

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
