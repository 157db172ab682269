"""The two forms in which a route is used, and the choice between them.

The gate form mixes the experts in every layer, for each token and each row anew; it is ready at once. The
merged form is one route added to the weights beforehand (:meth:`RoutedModel.merge`): making it takes as long
as some dozens of tokens, then the route costs nothing. So what pays depends on how many tokens come under one
route, and where that lies is measured on the machine itself.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from polyprag.errors import InvalidInput
from polyprag.layers import Merged, RoutedLinear, RoutedModel, mergeable

Form: TypeAlias = Literal["gates", "merged", "auto"]
FORMS: tuple[Form, ...] = ("gates", "merged", "auto")

#: Routes whose use is kept in mind, to see which of them come again.
_REMEMBERED = 4096
_PROMPT = 64  # tokens, with which the cost of a prompt's token is measured


class MergedRoutes:
    """The merged routes that were used last, as many as fit into ``budget`` bytes. For many threads."""

    def __init__(self, routed: RoutedModel, budget: int) -> None:
        self.routed = routed
        self.budget = budget
        weights = [mergeable(layer.base) for layer in routed.layers.values()]
        #: Bytes of one merged route; None where layers are quantised and cannot be merged.
        self.size = (
            None if any(w is None for w in weights) else sum(w.nbytes for w in weights if w is not None)
        )
        self._kept: OrderedDict[Hashable, Merged] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def fits(self) -> bool:
        """Whether there can be merged routes at all."""
        return self.size is not None and self.size <= self.budget

    def __len__(self) -> int:
        return len(self._kept)

    def kept(self, w: Tensor) -> Merged | None:
        """The merged form of w [groups, K], if it is there."""
        with self._lock:
            return self._find(self.key(w))

    def get(self, w: Tensor) -> Merged:
        """The merged form of w [groups, K], made where it is not there.

        Raises:
            InvalidInput: layers are quantised, or one merged route is larger than the budget.
        """
        if self.size is None:
            self.routed.merge(w)  # says which layer it is
        if not self.fits:
            raise InvalidInput(
                f"a merged route takes {self.size:,} bytes, and merged_bytes is {self.budget:,}: allow more, "
                "or use the form 'gates'"
            )
        key = self.key(w)
        with self._lock:  # another thread that wants the same route waits for it
            merged = self._find(key)
            if merged is None:
                while self._kept and (len(self._kept) + 1) * (self.size or 0) > self.budget:
                    self._kept.popitem(last=False)
                merged = self._kept[key] = self.routed.merge(w)
            return merged

    def clear(self) -> None:
        """Forget all, as is needed once experts or base weights have changed."""
        with self._lock:
            self._kept.clear()

    def key(self, w: Tensor) -> Hashable:
        return w.detach().to("cpu", torch.float32).numpy().tobytes()

    def _find(self, key: Hashable) -> Merged | None:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        return None


@dataclass(frozen=True)
class FormCosts:
    """Seconds, measured: of making a merged route, and what gates add to a step of decoding and to a token
    of a prompt.
    """

    merge: float
    step: float
    token: float

    def gates(self, prompt_tokens: int, new_tokens: int) -> float:
        """What the gate form costs more than the merged one, once that is there."""
        return self.step * new_tokens + self.token * prompt_tokens

    @property
    def break_even(self) -> float:
        """How many new tokens of one row pay for merging its route."""
        return self.merge / self.step if self.step > 0 else float("inf")


def measure_forms(routed: RoutedModel, rounds: int = 7) -> FormCosts:
    """Measure :class:`FormCosts` here and now, on one layer of every size; takes about as long as a merge."""
    groups, experts = routed.route_shape
    first = next(iter(routed.layers.values()))
    w = torch.full((1, groups, experts), 1 / experts, device=first.A.device)
    alike: dict[Any, list[RoutedLinear]] = {}
    for layer in routed.layers.values():
        alike.setdefault((tuple(layer.A.shape), tuple(layer.B.shape), layer.A.device), []).append(layer)
    merge = step = token = 0.0
    routes = routed.routes(w)
    for layers in alike.values():
        # Several layers in turn: one alone would stay in the processor's cache, as it does in no real step.
        sample = layers[: rounds + 1]
        merge += len(layers) * _least([partial(layer.merged, routes) for layer in sample])
        step += len(layers) * _added(routed, w, sample, 1)
        token += len(layers) * _added(routed, w, sample, _PROMPT) / _PROMPT
    return FormCosts(merge, step, token)


def _added(routed: RoutedModel, w: Tensor, layers: list[RoutedLinear], tokens: int) -> float:
    """The seconds that gates add to what a layer does with some tokens of one row."""
    weight = layers[0].A
    x = torch.zeros(1, tokens, weight.shape[1], dtype=_input_dtype(layers[0]), device=weight.device)
    with routed.route(w):
        gated = _least([partial(layer, x) for layer in layers])
    return max(0.0, gated - _least([partial(layer.base, x) for layer in layers]))


def _input_dtype(layer: RoutedLinear) -> torch.dtype:
    weight = mergeable(layer.base)
    return layer.A.dtype if weight is None else weight.dtype


@torch.no_grad()
def _least(works: list[Callable[[], Tensor]]) -> float:
    """The least seconds that one of them takes; the first is not counted, unless it is alone."""
    taken = []
    for work in works:
        started = time.perf_counter()
        _wait(work())
        taken.append(time.perf_counter() - started)
    return min(taken[1:] or taken)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class FormChoice:
    """Chooses the form of a batch's routes. For many threads.

    ``auto`` merges a route as soon as the gates would have cost as much as merging: by the tokens that this
    call is expected to take, and those that the same route took before. However the tokens fall, that is at
    most twice the least cost there could have been. What is expected of a call is the prompt, and that part
    of its limit of new tokens which answers have used lately.

    Merged weights are rounded once where gates round every product, so that in bfloat16 a token may differ
    between the forms. ``auto`` depends on times: where the same tokens are wanted again, name a form.
    """

    def __init__(self, routed: RoutedModel, form: Form, budget: int, costs: FormCosts | None = None) -> None:
        if form not in FORMS:
            raise InvalidInput(f"form is one of {', '.join(FORMS)}, not {form!r}")
        self.form = form
        self.merged = MergedRoutes(routed, budget)
        self._lock = threading.Lock()
        self._costs = costs
        self._spent: OrderedDict[Hashable, float] = OrderedDict()
        self._used = 1.0  # of the limit of new tokens, lately

    @property
    def costs(self) -> FormCosts:
        """Those that were given, or what is measured when they are first asked for."""
        with self._lock:
            if self._costs is None:
                self._costs = measure_forms(self.merged.routed)
            return self._costs

    def choose(self, routes: Tensor, prompt_tokens: int, limit: int) -> Tensor | Merged:
        """The routes [rows, groups, K] as they are, or merged, which needs one route for all rows.

        Args:
            prompt_tokens: of all rows together. limit: how many tokens may follow in each row.
        """
        if self.form == "gates" or not len(routes) or not bool((routes == routes[0]).all()):
            return routes
        w = routes[0]
        if self.form == "merged":
            return self.merged.get(w)
        if not self.merged.fits:
            return routes
        if (merged := self.merged.kept(w)) is not None:
            return merged
        key, costs = self.merged.key(w), self.costs
        with self._lock:
            spent = self._spent.pop(key, 0.0) + costs.gates(prompt_tokens, round(limit * self._used))
            if spent < costs.merge:
                self._spent[key] = spent
                if len(self._spent) > _REMEMBERED:
                    self._spent.popitem(last=False)
                return routes
        return self.merged.get(w)

    def took(self, new_tokens: float, limit: int) -> None:
        """Learn how many tokens a row took, of those that it might have."""
        with self._lock:
            self._used += 0.1 * (min(new_tokens / limit, 1.0) - self._used)
