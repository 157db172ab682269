"""Routed layers: latent LoRA experts around frozen linear layers, mixed per row of the batch.

A route is a gate between two small matmuls, y = W x + (alpha/r) B (w * (A x)), with A stacked as
[K*r, in] and B as [out, K*r]. Nothing is merged or loaded, and every row has its own route.
Knows nothing of stores and documents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from polyprag.errors import InvalidInput

Mixing = Literal["exact", "factors"]

DEFAULT_TARGETS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModuleShape:
    """One adapted layer: its dotted name in the base model, its sizes and its route group."""

    name: str
    in_features: int
    out_features: int
    group: int


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear-like layer: nn.Linear, its quantised forms, and GPT-2's Conv1D; else None."""
    sizes = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    weight = getattr(layer, "weight", None)
    if hasattr(layer, "nf") and isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0], weight.shape[1]
    return None


def find_targets(model: nn.Module, targets: Sequence[str] = DEFAULT_TARGETS) -> list[ModuleShape]:
    """The linear-like layers whose last name, or whose dotted name as a pattern, is in ``targets``.

    Every module is its own route group, in the order of the model.
    """
    found: list[ModuleShape] = []
    for name, layer in model.named_modules():
        if any(name.rsplit(".", 1)[-1] == t or fnmatchcase(name, t) for t in targets):
            shape = linear_shape(layer)
            if shape is not None:
                found.append(ModuleShape(name, *shape, group=len(found)))
    if not found:
        raise InvalidInput(
            f"no linear layer of {type(model).__name__} matches {list(targets)}; "
            "name its layers, e.g. ['fc1', 'fc2'] or ['*.mlp.*']"
        )
    return found


class RoutedLinear(nn.Module):
    """A frozen linear layer plus K latent experts of rank r, gated by the route of each row.

    A [K, r, in] and B [out, K, r] are as on disk; both reshape to the stacked form as views.
    B starts at zero, so that an untrained layer is the base layer.
    """

    def __init__(
        self,
        base: nn.Module,
        shape: ModuleShape,
        experts: int,
        rank: int,
        alpha: float,
        mixing: Mixing,
        route: ContextVar[Tensor | None],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.base = base
        self.shape = shape
        self.mixing = mixing
        self.scale = alpha / rank
        self._route = route
        bound = 1.0 / math.sqrt(shape.in_features)
        self.A = nn.Parameter(
            torch.empty(experts, rank, shape.in_features, device=device).uniform_(-bound, bound)
        )
        self.B = nn.Parameter(torch.zeros(shape.out_features, experts, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        route = self._route.get()
        if route is None:
            return y
        K, r, _ = self.A.shape
        w = _rows(route[:, self.shape.group], x.shape[0]).to(x)
        w = w.view(w.shape[0], *(1,) * (x.ndim - 2), K, 1)
        h = x @ self.A.to(x.dtype).flatten(0, 1).T
        h = h.view(*h.shape[:-1], K, r)
        if self.mixing == "exact":  # noqa: SIM108 - as two formulas
            h = h * (w * self.scale)
        else:
            # (sum w_k B_k)(sum w_k A_k) x: the cross terms of the published method.
            h = (w * self.scale) * (h * w).sum(-2, keepdim=True)
        delta: Tensor = h.flatten(-2) @ self.B.to(x.dtype).flatten(1).T
        return y + delta


def _rows(w: Tensor, rows: int) -> Tensor:
    """One route a row: routes expand with the rows that ``generate`` makes of beams and samples."""
    if w.shape[0] in (1, rows):
        return w
    if rows % w.shape[0]:
        raise InvalidInput(f"{w.shape[0]} routes for a batch of {rows} rows: give one, or one a row")
    return w.repeat_interleave(rows // w.shape[0], dim=0)


class RoutedModel:
    """A base model with routed layers attached.

    >>> routed = RoutedModel.attach(model, experts=16, rank=2, alpha=32)
    >>> with routed.route(w):          # w [rows, groups, K], or [1, groups, K] for all rows
    ...     model(input_ids)
    >>> routed.detach()                # the very layers of before; their weights were never touched

    The route lives in a context variable of this object, so threads and tasks do not see each other's.
    Outside ``route`` the model is the base model.
    """

    def __init__(self, model: nn.Module, layers: dict[str, RoutedLinear], route: ContextVar[Tensor | None]):
        self.model = model
        self.layers = layers
        self._route = route

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        *,
        experts: int,
        rank: int,
        alpha: float,
        targets: Sequence[str] | Sequence[ModuleShape] = DEFAULT_TARGETS,
        mixing: Mixing = "exact",
    ) -> RoutedModel:
        """Wrap the targets of ``model`` in place (see :func:`find_targets`)."""
        if experts < 1 or rank < 1:
            raise InvalidInput(f"experts and rank are at least 1, not {experts} and {rank}")
        if mixing not in ("exact", "factors"):
            raise InvalidInput(f"mixing is 'exact' or 'factors', not {mixing!r}")
        if not math.isfinite(alpha):
            raise InvalidInput(f"alpha is a finite number, not {alpha}")
        if any(isinstance(m, RoutedLinear) for m in model.modules()):
            raise InvalidInput("the model has routed layers already: detach them first")
        shapes = _resolve(model, targets)
        route: ContextVar[Tensor | None] = ContextVar("route", default=None)
        layers = {}
        for shape in shapes:
            base = model.get_submodule(shape.name)
            layers[shape.name] = RoutedLinear(base, shape, experts, rank, alpha, mixing, route, _device(base))
        # All are made before the first is attached: what fails above leaves the model as it was.
        for name, layer in layers.items():
            _replace(model, name, layer)
        return cls(model, layers, route)

    def detach(self) -> None:
        """Put the base layers back. A second call does nothing."""
        for name, layer in self.layers.items():
            if self.model.get_submodule(name) is layer:
                _replace(self.model, name, layer.base)

    @property
    def modules(self) -> list[ModuleShape]:
        return [layer.shape for layer in self.layers.values()]

    @property
    def groups(self) -> int:
        return 1 + max(shape.group for shape in self.modules)

    def parameters(self) -> list[nn.Parameter]:
        """The experts' A and B, in the order of the modules."""
        return [p for layer in self.layers.values() for p in (layer.A, layer.B)]

    @contextmanager
    def route(self, w: Tensor) -> Iterator[None]:
        """Calls of the model inside use the routes w [rows, groups, K]."""
        K = next(iter(self.layers.values())).A.shape[0]
        if w.ndim != 3 or w.shape[0] < 1 or w.shape[1:] != (self.groups, K):
            raise InvalidInput(
                f"a batch of routes is [rows, groups = {self.groups}, experts = {K}], not {tuple(w.shape)}"
            )
        token = self._route.set(w)
        try:
            yield
        finally:
            self._route.reset(token)

    def experts(self) -> dict[str, Tensor]:
        """``{module}.A`` [K, r, in] and ``{module}.B`` [out, K, r], detached."""
        state = {}
        for name, layer in self.layers.items():
            state[f"{name}.A"] = layer.A.detach()
            state[f"{name}.B"] = layer.B.detach()
        return state

    @torch.no_grad()
    def load_experts(self, state: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            for key, parameter in ((f"{name}.A", layer.A), (f"{name}.B", layer.B)):
                if key not in state or state[key].shape != parameter.shape:
                    found = tuple(state[key].shape) if key in state else "nothing"
                    raise InvalidInput(f"experts: {key} is {tuple(parameter.shape)}, found {found}")
                parameter.copy_(state[key])


def _resolve(model: nn.Module, targets: Sequence[str] | Sequence[ModuleShape]) -> list[ModuleShape]:
    shapes = [t for t in targets if isinstance(t, ModuleShape)]
    if not shapes:
        return find_targets(model, [str(t) for t in targets])
    for shape in shapes:
        try:
            found = linear_shape(model.get_submodule(shape.name))
        except AttributeError:
            found = None
        if found != (shape.in_features, shape.out_features):
            raise InvalidInput(
                f"{shape.name}: a linear layer of {shape.in_features} x {shape.out_features} was expected, "
                f"the model has {found}"
            )
    return shapes


def _device(layer: nn.Module) -> torch.device:
    # Quantised layers may keep their weights as buffers only.
    for tensor in (*layer.parameters(), *layer.buffers()):
        return tensor.device
    return torch.device("cpu")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
