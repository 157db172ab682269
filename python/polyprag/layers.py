"""Routed layers: latent LoRA experts around frozen linear layers, mixed per row of the batch.

A route is a gate between two small matmuls, y = W x + (alpha/r) B (w * (A x)), with A as [K*r, in] and B
as [K*r, out] in memory. Nothing is merged or loaded, and every row has its own route. Knows nothing of
stores and documents.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.pytorch_utils import Conv1D

from polyprag.errors import InvalidInput

Mixing = Literal["exact", "factors"]
Kernels = Literal["torch", "triton"]

AUTO = "auto"
DEFAULT_TARGETS = (AUTO,)

# By the names inside a block, which all families of transformers take from these few.
_MLP_PARTS = re.compile(r"mlp|ffn|feed_?forward|^ff$")
_MLP_LAYERS = re.compile(r"(gate|up|down|gate_up)_proj|fc1|fc2|fc_in|fc_out|c_fc|dense_(h_to_4h|4h_to_h)")
_NO_MLP_PARTS = re.compile(r"attn|attention|norm|router|^experts$|^gate$|_gate$")
_ONE_OF_MANY_EXPERTS = re.compile(r"(^|\.)experts\.\d+\.")


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


def find_targets(
    model: nn.Module, targets: Sequence[str] = DEFAULT_TARGETS, from_depth: float = 0.0
) -> list[ModuleShape]:
    """The linear-like layers that ``targets`` name, each its own route group, in the order of the model.

    A target is the last name of layers (``up_proj``), a pattern of whole dotted names (``*.mlp.*``), or
    ``auto``: the linear layers of the MLPs of the language model, told by their names, in the blocks from the
    share ``from_depth`` of its depth on (0 is every block, 0.5 the upper half).

    ``auto`` finds ``gate_proj``, ``up_proj`` and ``down_proj`` in Llama, Mistral, Qwen2, Qwen3 and Gemma,
    ``dense_h_to_4h`` and ``dense_4h_to_h`` in GPT-NeoX, ``fc1`` and ``fc2`` in Phi, ``gate_up_proj`` and
    ``down_proj`` in Phi-3, ``c_fc`` and ``mlp.c_proj`` in GPT-2; docs/method.md has more. Of a mixture of
    experts it finds dense MLPs and shared experts. Where nothing else is (Mixtral, Qwen3-MoE), and in
    models without MLPs (Mamba), layers have to be named.

    Raises:
        InvalidInput: a target that no linear layer matches; a layer that sees the tokens of no whole row.
    """
    layers = {
        name: shape for name, layer in model.named_modules() if (shape := linear_shape(layer)) is not None
    }
    if not targets:
        raise InvalidInput("no target: name layers, or give 'auto'")
    wanted: set[str] = set()
    for target in targets:
        if target == AUTO:
            matched = {n for n in _mlp_layers(model, layers) if _is_above(model, n, from_depth)}
        else:
            matched = {n for n in layers if n.rpartition(".")[2] == target or fnmatchcase(n, target)}
        if not matched:
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in layers)) or "none at all"
            lacking = "could be told to be of an MLP" if target == AUTO else f"matches {target!r}"
            raise InvalidInput(
                f"no linear layer of {type(model).__name__} {lacking}; name some of them as targets, or give "
                f"patterns of whole names such as '*.mlp.*'; it has: {known}"
            )
        wanted |= matched
    found: list[ModuleShape] = []
    for name, shape in layers.items():
        # A layer that is wrapped already has its inner layers behind it: they are not layers of their own.
        if name not in wanted or (found and name.startswith(f"{found[-1].name}.")):
            continue
        if _ONE_OF_MANY_EXPERTS.search(name):
            raise InvalidInput(
                f"{name} sees the tokens that a mixture of experts picks from all rows, so rows cannot have "
                "routes there: choose other targets"
            )
        found.append(ModuleShape(name, *shape, group=len(found)))
    return found


def _mlp_layers(model: nn.Module, names: Iterable[str]) -> set[str]:
    """The layers of MLPs, by their names; in a model that also sees or hears, those of its language model."""
    get_decoder = getattr(model, "get_decoder", None)
    language = get_decoder() if callable(get_decoder) else model
    if not any(isinstance(part, nn.ModuleList) for part in language.modules()):
        language = model  # a few families call their head so
    inside = {id(part) for part in language.modules()}
    return {name for name in names if id(model.get_submodule(name)) in inside and _is_mlp(name.split("."))}


def _is_mlp(parts: list[str]) -> bool:
    block = next((i + 1 for i, part in enumerate(parts) if part.isdecimal()), 0)
    parts = parts[block:]
    if any(_NO_MLP_PARTS.search(part) for part in parts):
        return False
    return any(map(_MLP_PARTS.search, parts)) or _MLP_LAYERS.fullmatch(parts[-1]) is not None


class Routes:
    """The routes of a call of the model, w [rows, groups, K], made ready for its layers.

    What a layer needs is made once for all layers, and for all tokens that are generated, where autograd
    and compilers let it: a step then costs each layer no more than a look.
    """

    def __init__(self, w: Tensor, rank: int, scale: float) -> None:
        self.w = w
        self.rank = rank
        self.scale = scale
        self._ready: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def weights(self, group: int, rows: int, like: Tensor) -> Tensor:
        """What each expert counts for in each row: [rows or 1, 1, K], in the dtype of ``like``."""
        return _rows(self.w[:, group], rows).to(like).unsqueeze(1)

    def gate(self, group: int, rows: int, like: Tensor) -> Tensor:
        """The factors of A x: every weight r times, and alpha / r: [rows or 1, 1, K*r]."""
        if torch.compiler.is_compiling() or (self.w.requires_grad and torch.is_grad_enabled()):
            return self._spread(self.weights(group, rows, like))
        key = rows, like.dtype, like.device
        ready = self._ready.get(key)
        if ready is None:
            with torch.inference_mode(mode=False), torch.no_grad():
                gates = self._spread(_rows(self.w, rows).transpose(0, 1))
                ready = gates.to(like.device, like.dtype).unsqueeze(2).unbind()
            self._ready[key] = ready
        return ready[group]

    def _spread(self, w: Tensor) -> Tensor:
        scaled = (w * self.scale).unsqueeze(-1)
        return scaled.expand(*w.shape, self.rank).flatten(-2)


@dataclass(frozen=True, eq=False)
class Merged:
    """One route in weights of its own, [out, in] by the name of a layer: see :meth:`RoutedModel.merge`."""

    weights: Mapping[str, Tensor]

    @property
    def bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())


class RoutedLinear(nn.Module):
    """A frozen linear layer plus K latent experts of rank r, gated by the route of each row.

    A [K*r, in] and B [K*r, out] are the experts one below the other; :meth:`RoutedModel.experts` gives them
    as on disk. B starts at zero, so that an untrained layer is the base layer.
    """

    def __init__(
        self,
        base: nn.Module,
        shape: ModuleShape,
        width: int,
        mixing: Mixing,
        route: ContextVar[Routes | Merged | None],
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.base = base
        self.shape = shape
        self.mixing = mixing
        self._route = route
        self._kernels = _triton_kernels() if kernels == "triton" else None
        #: The layer is its weight, and nothing else: its product may be made here.
        self._alone = mergeable(base) is not None and kernels == "torch"
        self._transposed = isinstance(base, Conv1D)
        bound = 1.0 / math.sqrt(shape.in_features)
        A = torch.empty(width, shape.in_features, device=_device(base)).uniform_(-bound, bound)
        self.A = nn.Parameter(A.to(dtype))
        self.B = nn.Parameter(torch.zeros(width, shape.out_features, dtype=dtype, device=A.device))

    def forward(self, x: Tensor) -> Tensor:
        routes = self._route.get()
        if isinstance(routes, Merged):
            bias: Any = self.base.bias
            return functional.linear(x, routes.weights[self.shape.name], bias)
        if routes is not None and self._alone and self.mixing == "exact" and not torch.is_grad_enabled():
            added = self._added_to(x, routes)
            if added is not None:
                return added
        y: Tensor = self.base(x)
        if routes is None:
            return y
        A, B, rows = self.A, self.B, x.shape[0]
        # Where nothing is differentiated, y is nobody else's: a layer has just made it.
        if (
            self.mixing == "exact"
            and A.dtype == x.dtype == y.dtype
            and y.is_contiguous()
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
        ):
            gate = routes.gate(self.shape.group, rows, y)
            x, flat = x.reshape(-1, self.shape.in_features), y.view(-1, self.shape.out_features)
            if self._kernels is not None and self._kernels.usable(x):
                self._kernels.gated_pair_(flat, x, A, B, gate.squeeze(1))
            else:
                h = torch.mm(x, A.T)
                h.view(rows, -1, h.shape[1]).mul_(gate)
                flat.addmm_(h, B)
            return y
        h = x.reshape(-1, self.shape.in_features) @ A.to(x.dtype).T
        if self.mixing == "exact":
            h = h.view(rows, -1, h.shape[1]) * routes.gate(self.shape.group, rows, h)
        else:
            # (sum w_k B_k)(sum w_k A_k) x: the cross terms of the published method.
            w = routes.weights(self.shape.group, rows, h).unsqueeze(-1)
            h = h.view(rows, -1, w.shape[2], routes.rank)
            h = (w * routes.scale) * (h * w).sum(2, keepdim=True)
        h = h.view(-1, B.shape[0]).to(y.dtype)
        return torch.addmm(y.reshape(-1, B.shape[1]), h, B.to(y.dtype)).view(y.shape)

    def _added_to(self, x: Tensor, routes: Routes) -> Tensor | None:
        """The experts' part first, to which the layer's own, large product is added.

        The other way round, the small product would go over all of the layer's output once more, which is a
        tenth to a fifth of what gates cost. None where it cannot be done: somebody watches the layer's calls
        or has replaced them, or dtypes differ (under autocast, become different).
        """
        # Not as attributes, for which a module looks in other places first.
        base, own = self._modules["base"], self._parameters
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")  # type: ignore[union-attr]
        A, B = own["A"], own["B"]
        if weight is None or A is None or B is None or not A.dtype == x.dtype == weight.dtype:
            return None
        if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:  # type: ignore[union-attr]
            return None
        gate = routes.gate(self.shape.group, x.shape[0], x)
        flat = x.reshape(-1, x.shape[-1])
        h = torch.mm(flat, A.T)
        if h.dtype != x.dtype:
            return None
        h.view(gate.shape[0], -1, h.shape[1]).mul_(gate)
        y = torch.mm(h, B) if bias is None else torch.addmm(bias, h, B)
        y.addmm_(flat, weight if self._transposed else weight.T)
        return y.view(*x.shape[:-1], -1)

    @torch.no_grad()
    def merged(self, routes: Routes) -> Tensor:
        """The weight [out, in] that does what the layer does under the one route that there is.

        The sum is added to the base weight in float32, and rounded once to its dtype.
        """
        weight = mergeable(self.base)
        if weight is None:
            raise InvalidInput(
                f"{self.shape.name} is a {type(self.base).__name__}, whose weights cannot be merged"
            )
        w = routes.w[0, self.shape.group].to(weight.device, torch.float32).view(-1, 1, 1)
        A, B = (p.float().view(len(w), routes.rank, -1) for p in (self.A, self.B))
        if self.mixing == "factors":
            A, B = (A * w).sum(0), (B * w).sum(0)
        else:
            A, B = A.flatten(0, 1), (B * w).flatten(0, 1)
        return torch.addmm(weight.float(), B.T, A, alpha=routes.scale).to(weight.dtype)


def mergeable(layer: nn.Module) -> Tensor | None:
    """The weight of a linear layer as [out, in], if it is kept as numbers that can be added to."""
    if type(layer) is nn.Linear:
        weight = layer.weight
    elif type(layer) is Conv1D:
        weight = layer.weight.T
    else:
        return None
    return weight if weight.is_floating_point() else None


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
    Outside ``route`` the model is the base model. ``torch.compile`` reads the variable as one more input
    of its graph: another route of as many rows does not compile anew.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, RoutedLinear],
        route: ContextVar[Routes | Merged | None],
        experts: int,
        rank: int,
        alpha: float,
    ) -> None:
        self.model = model
        self.layers = layers
        self.rank = rank
        self.scale = alpha / rank
        #: Groups and experts: what a route has weights for.
        self.route_shape = 1 + max(layer.shape.group for layer in layers.values()), experts
        self._route = route
        self._checkpointed: list[tuple[nn.Module, Callable[..., Any] | None]] = []

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
        dtype: torch.dtype = torch.float32,
        kernels: Kernels = "torch",
    ) -> RoutedModel:
        """Wrap the targets of ``model`` in place (see :func:`find_targets`).

        Args:
            dtype: of A and B; float32 to train them, the model's own to answer with, which saves a
                conversion in every layer of every token.
            kernels: ``triton`` computes steps of decoding on a GPU by a kernel of its own
                (:mod:`polyprag.kernels`); all else is torch's either way.
        """
        if experts < 1 or rank < 1:
            raise InvalidInput(f"experts and rank are at least 1, not {experts} and {rank}")
        if mixing not in ("exact", "factors"):
            raise InvalidInput(f"mixing is 'exact' or 'factors', not {mixing!r}")
        if kernels not in ("torch", "triton"):
            raise InvalidInput(f"kernels is 'torch' or 'triton', not {kernels!r}")
        if not math.isfinite(alpha):
            raise InvalidInput(f"alpha is a finite number, not {alpha}")
        if any(isinstance(m, RoutedLinear) for m in model.modules()):
            raise InvalidInput("the model has routed layers already: detach them first")
        shapes = _resolve(model, targets)
        route: ContextVar[Routes | Merged | None] = ContextVar("route", default=None)
        layers = {}
        for shape in shapes:
            base = model.get_submodule(shape.name)
            layers[shape.name] = RoutedLinear(base, shape, experts * rank, mixing, route, dtype, kernels)
        # All are made before the first is attached: what fails above leaves the model as it was.
        for name, layer in layers.items():
            _replace(model, name, layer)
        keep_layouts(model)
        return cls(model, layers, route, experts, rank, alpha)

    def detach(self) -> None:
        """Put the base layers back, and end checkpointing. A second call does nothing."""
        self.disable_checkpointing()
        for name, layer in self.layers.items():
            if self.model.get_submodule(name) is layer:
                _replace(self.model, name, layer.base)

    @property
    def modules(self) -> list[ModuleShape]:
        return [layer.shape for layer in self.layers.values()]

    @property
    def groups(self) -> int:
        return self.route_shape[0]

    def parameters(self) -> list[nn.Parameter]:
        """The experts' A [K*r, in] and B [K*r, out], in the order of the modules."""
        return [p for layer in self.layers.values() for p in (layer.A, layer.B)]

    @contextmanager
    def route(self, w: Tensor | Merged) -> Iterator[None]:
        """Calls of the model inside use the routes w [rows, groups, K], or one that is merged already."""
        token = self._route.set(w if isinstance(w, Merged) else self.routes(w))
        try:
            yield
        finally:
            self._route.reset(token)

    def routes(self, w: Tensor) -> Routes:
        groups, experts = self.route_shape
        if w.ndim != 3 or w.shape[0] < 1 or w.shape[1:] != (groups, experts):
            raise InvalidInput(
                f"a batch of routes is [rows, groups = {groups}, experts = {experts}], not {tuple(w.shape)}"
            )
        return Routes(w, self.rank, self.scale)

    def merge(self, w: Tensor) -> Merged:
        """The merged form of one route w [groups, K], to be used with :meth:`route`.

        It takes as much memory as the routed layers themselves, and then costs nothing more than the base
        model. The base model is not written to: there is nothing to restore, and other threads go on.
        Experts that are loaded or trained later are not in it.

        Raises:
            InvalidInput: a layer is quantised.
        """
        routes = self.routes(w.unsqueeze(0))
        return Merged({name: layer.merged(routes) for name, layer in self.layers.items()})

    def enable_checkpointing(self) -> None:
        """Keep no activations inside the model's blocks: the backward pass computes them again.

        Each block is recomputed under the route of its forward pass, whichever thread, and whatever route,
        the backward pass runs in. Modes are left alone: a model in evaluation mode, without dropout, is
        checkpointed too, which transformers' own ``activation_checkpointing_enable`` does not do. Calls
        that are to be differentiated need ``use_cache=False``; others, such as ``generate``, do as ever.
        """
        if self._checkpointed:
            return
        blocks = _blocks(self.model, self.layers)
        if not blocks:
            raise InvalidInput(
                f"{type(self.model).__name__} has no list of blocks around the routed layers to checkpoint"
            )
        for block in blocks:
            # Where a hook has replaced the method already, its replacement is what goes back.
            self._checkpointed.append((block, block.__dict__.get("forward")))
            block.__dict__["forward"] = _Checkpointed(block.forward, self.checkpoint_context)

    def disable_checkpointing(self) -> None:
        """Undo :meth:`enable_checkpointing`."""
        for block, forward in self._checkpointed:
            put_back(block, forward)
        self._checkpointed = []

    def checkpoint_context(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The ``context_fn`` with which checkpointing of one's own keeps routes.

        For ``torch.utils.checkpoint``, and for transformers' with
        ``{"use_reentrant": False, "context_fn": routed.checkpoint_context}``.
        """
        return nullcontext(), _Again(self._route)

    def experts(self) -> dict[str, Tensor]:
        """``{module}.A`` [K, r, in] and ``{module}.B`` [out, K, r], as on disk: views, detached."""
        state = {}
        for name, layer in self.layers.items():
            A, B = layer.A.detach(), layer.B.detach()
            state[f"{name}.A"] = A.view(-1, self.rank, A.shape[1])
            state[f"{name}.B"] = B.view(-1, self.rank, B.shape[1]).permute(2, 0, 1)
        return state

    @torch.no_grad()
    def load_experts(self, state: dict[str, Tensor]) -> None:
        """Copy A and B in, of any dtype, by the names and shapes of :meth:`experts`."""
        for key, parameter in self.experts().items():
            if key not in state or state[key].shape != parameter.shape:
                found = tuple(state[key].shape) if key in state else "nothing"
                raise InvalidInput(f"experts: {key} is {tuple(parameter.shape)}, found {found}")
            parameter.copy_(state[key])


class _Again(AbstractContextManager[None]):
    """The value that a context variable had when this was made; to enter often, and in any thread."""

    def __init__(self, variable: ContextVar[Routes | Merged | None]) -> None:
        self._variable = variable
        self._value = variable.get()
        self._entered = threading.local()

    def __enter__(self) -> None:
        tokens: list[Token[Routes | Merged | None]] = self._entered.__dict__.setdefault("tokens", [])
        tokens.append(self._variable.set(self._value))

    def __exit__(self, *_: object) -> None:
        self._variable.reset(self._entered.tokens.pop())


class _Checkpointed:
    """The ``forward`` of a block, whose activations are computed again when they are needed."""

    def __init__(
        self,
        forward: Callable[..., Any],
        context: Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]],
    ) -> None:
        self._forward = forward
        self._context = context

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._forward(*args, **kwargs)
        if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
            raise InvalidInput(
                "a block that is computed twice would fill its cache twice: pass use_cache=False"
            )
        # A compiler takes the route into its graph, whose recomputation then has it anyway.
        options: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": self._context}
        return checkpoint(self._forward, *args, use_reentrant=False, **options, **kwargs)


def put_back(block: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Give a block the ``forward`` of its own that it had, or none, and so that of its class."""
    if forward is None:
        del block.__dict__["forward"]
    else:
        block.__dict__["forward"] = forward


def place_in_blocks(model: nn.Module, name: str) -> tuple[nn.ModuleList, int] | None:
    """The outermost list of blocks that holds a layer, and the number of its block there."""
    part = model
    for step in name.split("."):
        if isinstance(part, nn.ModuleList):
            return part, int(step)
        part = part.get_submodule(step)
    return None


def _is_above(model: nn.Module, name: str, from_depth: float) -> bool:
    place = place_in_blocks(model, name)
    return place is None or place[1] >= int(from_depth * len(place[0]))


def _blocks(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """The members of the outermost module lists that hold the named layers."""
    places = (place_in_blocks(model, name) for name in names)
    lists = {id(place[0]): place[0] for place in places if place is not None}
    return [block for members in lists.values() for block in members]


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


def keep_layouts(model: nn.Module) -> None:
    """Have the 4-bit layers of bitsandbytes keep their weights as they are, for good.

    Where the CPU has AVX512-BF16, such a layer lays its weights out anew, in place and with some loss, when
    it is first called without gradients, and cannot be differentiated from then on: a model that has just
    written its own training data could not be trained.
    """
    for layer in model.modules():
        if layer.__dict__.get("support_avx512bf16_for_cpu"):
            layer.__dict__["support_avx512bf16_for_cpu"] = False
            layer.state_dict()  # brings the first layout back


def _triton_kernels() -> Any:
    try:
        from polyprag import kernels
    except ImportError as error:
        raise InvalidInput("kernels='triton' needs Triton: pip install 'polyprag[triton]' (Linux)") from error
    return kernels


def _device(layer: nn.Module) -> torch.device:
    # Quantised layers may keep their weights as buffers only.
    for tensor in (*layer.parameters(), *layer.buffers()):
        return tensor.device
    return torch.device("cpu")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
