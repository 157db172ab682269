"""What a document is while it is trained: how its row becomes a route, and what all share for that.

Three kinds: a document is its logits (:class:`Table`), a code that a decoder turns into them (:class:`Codes`,
where an amortised router may make the code of the text), or a LoRA of its own (:class:`Loras`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyprag.errors import InvalidInput
from polyprag.layers import RoutedModel
from polyprag.lora import Slots
from polyprag.models import BaseModel
from polyprag.router import Router
from polyprag.routing import Phi, RouteDecoder
from polyprag.rows import Rows, Start
from polyprag.training import Encoding, TrainSettings

_BLOCK = 4096  # documents whose features are read at a time

Finish: TypeAlias = Callable[[NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]]
Gather: TypeAlias = Callable[[Finish, tuple[int, ...]], NDArray[np.float32]]


class Parametrisation(Protocol):
    """A kind of document; its layers are attached to the base model.

    A step calls :meth:`begin` with the rows of its documents, then :meth:`routes` for each part of its batch,
    then :meth:`end`.
    """

    routed: RoutedModel
    width: int  # numbers of a document's row
    start: Start  # where rows begin

    def shared(self) -> list[dict[str, Any]]:
        """What the documents share and training moves: groups of an optimiser, each with its ``lr``."""
        ...

    def begin(self, rows: Tensor) -> None:
        """A step begins, whose documents have these rows [n, width]."""
        ...

    def routes(self, documents: NDArray[np.int64], rows: Tensor, step: int) -> Tensor:
        """The routes [n, G, K] of the step's documents [n]."""
        ...

    def end(self, rows: Tensor) -> None:
        """The gradients of the step are there: see that ``rows`` has its own."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of all that is shared."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go back to :meth:`state`."""
        ...

    def encoding(self, rows: Rows, documents: int, gather: Gather, losses: tuple[float, ...]) -> Encoding:
        """What training made.

        gather: takes what makes routes of documents' numbers and rows, and their shape; gives all of them.
        """
        ...


def attach(
    base: BaseModel,
    settings: TrainSettings,
    frozen: Encoding | None = None,
    features: NDArray[np.float32] | None = None,
) -> Parametrisation:
    """The kind that the settings name, attached to the base model; see :func:`polyprag.trainer.train`."""
    if settings.routing == "lora" and frozen is not None:
        raise InvalidInput("routing 'lora' shares nothing that could stay: encode all documents anew")
    targets = settings.layers(base.model) if frozen is None else frozen.modules
    experts = settings.experts
    if settings.routing == "lora":
        # As many as a batch can have documents, all modules of one under the same weight.
        experts = settings.batch_size * (settings.mixture_size if settings.mixture > 0 else 1)
        targets = [replace(m, group=0) for m in targets]
    routed = RoutedModel.attach(
        base.model,
        experts=experts,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=targets,
        mixing=settings.mixing,
    )
    try:
        if settings.routing == "lora":
            return Loras(routed, settings)
        if settings.routing == "table":
            return Table(routed, settings, frozen)
        return Codes(routed, settings, frozen, features if settings.router else None, base.device)
    except BaseException:
        routed.detach()
        raise


class _Latent(ABC):
    """Shared latent experts, and a route of logits; with ``frozen`` all that is shared stays."""

    width: int
    start: Start
    kept: tuple[int, ...]  # shape of a route as the store takes it

    def __init__(self, routed: RoutedModel, settings: TrainSettings, frozen: Encoding | None) -> None:
        self.routed, self.settings, self.frozen = routed, settings, frozen
        self.phi = Phi(settings.phi, settings.top_k)
        if frozen is not None:
            _check_frozen(frozen, settings, routed.groups)
            routed.load_experts({k: torch.from_numpy(np.array(v)) for k, v in frozen.experts.items()})

    @abstractmethod
    def parts(self) -> dict[str, tuple[nn.Module, float]]:
        """The networks beside the experts by name, each with its learning rate."""

    @abstractmethod
    def logits(self, documents: NDArray[np.int64], rows: Tensor, step: int) -> Tensor:
        """z [n, G, K]."""

    @abstractmethod
    def finished(self, numbers: NDArray[np.int64], rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """The routes of some documents as the store takes them, [n, ...], from their rows."""

    def shared(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = [{"params": self.routed.parameters(), "lr": self.settings.expert_lr}]
        groups += [{"params": list(part.parameters()), "lr": lr} for part, lr in self.parts().values()]
        if self.frozen is None:
            return groups
        for group in groups:
            for parameter in group["params"]:
                parameter.requires_grad_(False)
        return []

    def begin(self, rows: Tensor) -> None:  # noqa: B027
        """Nothing: routes are made of the rows themselves."""

    def routes(self, documents: NDArray[np.int64], rows: Tensor, step: int) -> Tensor:
        z = self.logits(documents, rows, step)
        if self.settings.gumbel:
            # Of seed and step alone, so that every process and a resumed run draw the same.
            draw = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + step) % (1 << 64))
            u = torch.rand(z.shape, generator=draw).clamp(1e-6, 1 - 1e-6).to(z)
            z = z + torch.logit(u)
        return self.phi(z)

    def end(self, rows: Tensor) -> None:  # noqa: B027
        """Nothing: autograd has given the rows their gradient."""

    def state(self) -> dict[str, Any]:
        experts = self.routed.experts() if self.frozen is None else {}
        return {"experts": experts, **{name: part.state_dict() for name, (part, _) in self.parts().items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        if self.frozen is None:
            self.routed.load_experts(state["experts"])
        for name, (part, _) in self.parts().items():
            part.load_state_dict(state[name])

    def encoding(self, rows: Rows, documents: int, gather: Gather, losses: tuple[float, ...]) -> Encoding:  # noqa: ARG002
        return Encoding(
            modules=tuple(self.routed.modules),
            experts={name: _numpy(t) for name, t in self.routed.experts().items()},
            decoder=None,
            routes=gather(self.finished, self.kept),
            settings=self.settings,
            losses=losses,
        )


class Table(_Latent):
    """A document is its logits (Poly-PRAG, arXiv 2511.17044)."""

    def __init__(self, routed: RoutedModel, settings: TrainSettings, frozen: Encoding | None) -> None:
        super().__init__(routed, settings, frozen)
        self.kept = routed.route_shape
        self.width = routed.groups * settings.experts
        self.start = (
            Start("uniform", settings.seed, scale=1e-3) if frozen is None else _mean(frozen, self.width)
        )

    def parts(self) -> dict[str, tuple[nn.Module, float]]:
        return {}

    def logits(self, documents: NDArray[np.int64], rows: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return rows.view(-1, *self.routed.route_shape)

    def finished(self, numbers: NDArray[np.int64], rows: NDArray[np.float32]) -> NDArray[np.float32]:  # noqa: ARG002
        return rows.reshape(-1, *self.routed.route_shape)


class Codes(_Latent):
    """A document is a code, from which a decoder makes its logits; ``features``: and a router the code.

    With a router, the row is what is added to its output.
    """

    def __init__(
        self,
        routed: RoutedModel,
        settings: TrainSettings,
        frozen: Encoding | None,
        features: NDArray[np.float32] | None,
        device: torch.device,
    ) -> None:
        super().__init__(routed, settings, frozen)
        self.width, self.kept = settings.code_dim, (settings.code_dim,)
        self.features = features
        self.decoder = RouteDecoder(routed.groups, settings.experts, settings.code_dim).to(device)
        if frozen is not None and frozen.decoder is not None:
            with torch.no_grad():
                for parameter, array in zip((self.decoder.V, self.decoder.b), frozen.decoder, strict=True):
                    parameter.copy_(torch.from_numpy(np.array(array)))
        self.router = None if features is None else _router(features, settings, frozen).to(device)
        if self.router is not None:
            self.start = Start("value", value=np.zeros(self.width, dtype=np.float32))
        elif frozen is not None:
            self.start = _mean(frozen, self.width)
        else:
            self.start = Start("normal", settings.seed)

    def parts(self) -> dict[str, tuple[nn.Module, float]]:
        found: dict[str, tuple[nn.Module, float]] = {"decoder": (self.decoder, self.settings.decoder_lr)}
        if self.router is not None:
            found["router"] = (self.router, self.settings.router_lr)
        return found

    def logits(self, documents: NDArray[np.int64], rows: Tensor, step: int) -> Tensor:
        z: Tensor = self.decoder(self._codes(documents, rows, step))
        return z

    def _codes(self, documents: NDArray[np.int64], rows: Tensor, step: int) -> Tensor:
        if self.router is None or self.features is None:
            return rows
        read = torch.from_numpy(np.asarray(self.features[documents])).to(rows.device)
        alone = 0.0 if self.frozen is not None else self.settings.router_alone
        draw = np.random.default_rng((self.settings.seed, step))
        added = torch.from_numpy(draw.random((len(documents), 1)) >= alone).to(rows)
        codes: Tensor = self.router(read) + added * rows
        return codes

    def finished(self, numbers: NDArray[np.int64], rows: NDArray[np.float32]) -> NDArray[np.float32]:
        if self.router is None or self.features is None:
            return rows
        routes: NDArray[np.float32] = rows.copy()
        for begin in range(0, len(numbers), _BLOCK):  # features may lie in a file, and not fit in memory
            some = slice(begin, begin + _BLOCK)
            routes[some] += self.router.codes(np.asarray(self.features[numbers[some]]))
        return routes

    def encoding(self, rows: Rows, documents: int, gather: Gather, losses: tuple[float, ...]) -> Encoding:
        return replace(
            super().encoding(rows, documents, gather, losses),
            decoder=(_numpy(self.decoder.V), _numpy(self.decoder.b)),
            router=None if self.router is None else self.router.arrays(),
        )


class Loras:
    """A document is a LoRA (PRAG, arXiv 2501.15915), and nothing is shared: see :mod:`polyprag.lora`."""

    def __init__(self, routed: RoutedModel, settings: TrainSettings) -> None:
        self.routed, self.settings = routed, settings
        self.slots = Slots(routed, settings.rank)
        self.width = self.slots.width
        self.start = Start("value", value=self.slots.start())

    def shared(self) -> list[dict[str, Any]]:
        return []

    def begin(self, rows: Tensor) -> None:
        self.slots.fill(rows)

    def routes(self, documents: NDArray[np.int64], rows: Tensor, step: int) -> Tensor:  # noqa: ARG002
        return self.slots.routes(len(documents))

    def end(self, rows: Tensor) -> None:
        rows.grad = self.slots.gradient(len(rows))

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        pass

    def encoding(self, rows: Rows, documents: int, gather: Gather, losses: tuple[float, ...]) -> Encoding:  # noqa: ARG002
        return Encoding(
            modules=tuple(self.routed.modules),
            experts=self.slots.experts(rows.blocks(), documents),
            decoder=None,
            routes=np.arange(documents, dtype=np.float32),
            settings=self.settings,
            losses=losses,
        )


def _mean(frozen: Encoding, width: int) -> Start:
    """Where routes begin that are added: at the mean of those that are there."""
    old = frozen.routes.reshape(len(frozen.routes), width)
    return Start("value", value=old.mean(axis=0) if len(old) else np.zeros(width, dtype=np.float32))


def _router(features: NDArray[np.float32], settings: TrainSettings, frozen: Encoding | None) -> Router:
    if frozen is None:
        return Router(features.shape[1], settings.code_dim)
    if frozen.router is None:
        raise InvalidInput("router: the experts were trained without one; use their settings")
    return Router.of(frozen.router)


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
