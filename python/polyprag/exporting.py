"""One route out of a store, in the forms that other software reads: a LoRA of PEFT, or a merged model.

The combined route of some documents changes the weight of every adapted layer by
(alpha / r) sum_k w_k B_k A_k, which is a LoRA of rank K r.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from polyprag._polyprag import Module, Store
from polyprag.engine import base_model_of
from polyprag.errors import InvalidInput
from polyprag.jsonl import absent
from polyprag.layers import RoutedLinear
from polyprag.models import BaseModel, check_fingerprint, quiet_transformers, resolve_dtype

_Array = NDArray[np.float64]

# Families whose layers keep their weight as [in, out], which PEFT wants to be told.
_TRANSPOSED = ("gpt2", "openai-gpt")


@dataclass(frozen=True)
class Adapter:
    """A LoRA that was written.

    rank: of every layer's A and B. exact_rank: the least that loses nothing of this route. error: the
    Frobenius norm of what the smaller rank loses, over that of the whole change, all layers taken together;
    worst_error and worst_module: the same of the layer that loses most. 0 where nothing is lost.
    """

    path: Path
    documents: tuple[str | int, ...]
    rank: int
    exact_rank: int
    error: float
    worst_error: float
    worst_module: str


@dataclass(frozen=True)
class Merged:
    """A merged model that was written.

    rounding: the Frobenius norm of what the rounding to ``dtype`` changed in the merged layers, over that of
    the change by the route; in bfloat16 some hundredths of the change are lost so.
    """

    path: Path
    documents: tuple[str | int, ...]
    dtype: str
    modules: int
    rounding: float


@dataclass(frozen=True)
class _Change:
    """B [out, R] A [R, in]: how a route changes the weight of one layer."""

    module: Module
    A: _Array
    B: _Array


def export_peft(
    store: str | os.PathLike[str] | Store,
    ids: Sequence[str | int],
    dest: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    dtype: str = "fp32",
    base_model: str | None = None,
) -> Adapter:
    """Write the combined route of documents as a LoRA that PEFT and vLLM load: a new folder ``dest``.

    It is exact: the adapter's layers are the routed layers of the engine, with the experts stacked. Experts
    that no layer gives a weight are left out. Needs no base model.

    Args:
        weights: of the documents' routes; None weighs all alike (1/n).
        rank: at most this rank, by the singular values of each layer's change: nothing of that rank is nearer
            (Eckart and Young, 1936). None is what an exact adapter takes, experts times their rank.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        base_model: what the adapter says it belongs to; None is the name in the store.

    Raises:
        UnknownId, Unrouted: a document is not there or has no route.
        InvalidInput: no document, a rank below 1, numbers too large for ``dtype``.
        FileExistsError: there is something at ``dest`` already.
    """
    if rank is not None and rank < 1:
        raise InvalidInput(f"the rank of an adapter is at least 1, not {rank}")
    if dtype not in ("fp32", "bf16", "fp16"):
        raise InvalidInput(f"the dtype of an adapter is fp32, bf16 or fp16, not {dtype!r}")
    number = resolve_dtype(dtype, torch.device("cpu"))
    with _opened(store) as opened, _new_folder(dest) as folder:
        route = _route(opened, ids, weights)
        exact = _exact_rank(opened, route)
        used = exact if rank is None else min(rank, exact)
        tensors: dict[str, torch.Tensor] = {}
        lost, whole, worst, worst_module = 0.0, 0.0, 0.0, ""
        for change in _changes(opened, route):
            A, B, dropped, total = _reduced(change, used)
            lost, whole = lost + dropped, whole + total
            error = (dropped / total) ** 0.5 if total else 0.0
            if error > worst:
                worst, worst_module = error, change.module.name
            for side, array in (("lora_A", A), ("lora_B", B)):
                tensor = torch.from_numpy(array).to(number).contiguous()
                if not torch.isfinite(tensor).all():
                    raise InvalidInput(
                        f"{change.module.name}: numbers too large for {dtype} in it; use fp32 or bf16"
                    )
                tensors[f"base_model.model.{change.module.name}.{side}.weight"] = tensor
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config = _lora_config(opened, used, base_model)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Adapter(
        path=Path(dest),
        documents=tuple(ids),
        rank=used,
        exact_rank=exact,
        error=(lost / whole) ** 0.5 if whole else 0.0,
        worst_error=worst,
        worst_module=worst_module,
    )


def export_merged(
    store: str | os.PathLike[str] | Store,
    ids: Sequence[str | int],
    dest: str | os.PathLike[str],
    model: str | os.PathLike[str] | BaseModel | None = None,
    *,
    weights: Sequence[float] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    allow_base_mismatch: bool = False,
) -> Merged:
    """Write the base model with the combined route of documents in its weights: a new folder ``dest``.

    By transformers' ``save_pretrained``, tokenizer included. Each weight is W + B A, added in float32 and
    rounded once to the dtype of the model. The model that is given is not changed.

    Args:
        weights: of the documents' routes; None weighs all alike (1/n).
        model: as in :meth:`polyprag.Engine.open`, without routed layers.
        dtype: of the model that is written, as it is loaded; ``bf16`` is what most are published in.

    Raises:
        InvalidInput: a layer is quantised, or shares its weight with another (tied embeddings); no document.
        BaseModelMissing, BaseModelMismatch, UnknownId, Unrouted, FileExistsError.
    """
    with _opened(store) as opened, _new_folder(dest) as folder:
        route = _route(opened, ids, weights)
        base = base_model_of(opened, model, device=device, dtype=dtype)
        check_fingerprint(opened.spec.base_model, base, allow_base_mismatch=allow_base_mismatch)
        state = base.model.state_dict()
        lost, whole = 0.0, 0.0
        for change in _changes(opened, route):
            key = f"{change.module.name}.weight"
            state[key], rounding, size = _merged_weight(base.model, change)
            lost, whole = lost + rounding, whole + size
        with quiet_transformers():
            base.model.save_pretrained(folder, state_dict=state)
        base.tokenizer.save_pretrained(folder)
        modules = len(opened.spec.modules)
    return Merged(
        path=Path(dest),
        documents=tuple(ids),
        dtype=str(base.model.dtype).removeprefix("torch."),
        modules=modules,
        rounding=(lost / whole) ** 0.5 if whole else 0.0,
    )


def _route(store: Store, ids: Sequence[str | int], weights: Sequence[float] | None) -> _Array:
    """The combined route [groups, K]."""
    if not ids:
        raise InvalidInput("no document: name those whose route is to be exported")
    if weights is not None and len(weights) != len(ids):
        raise InvalidInput(f"{len(weights)} weights for {len(ids)} documents: give one for each")
    return store.combined_route(list(ids), weights).astype(np.float64)


def _exact_rank(store: Store, route: _Array) -> int:
    spec = store.spec
    if spec.mixing == "factors":
        return spec.rank
    return spec.rank * max(1, int(np.count_nonzero(route, axis=1).max()))


def _changes(store: Store, route: _Array) -> Iterator[_Change]:
    """The change of every layer by a route [groups, K]; of its experts only those that have a weight."""
    spec, experts = store.spec, store.experts
    scale = spec.alpha / spec.rank
    for module in spec.modules:
        w = route[module.group]
        used = np.flatnonzero(w)
        # Taken out one by one: of narrow dtypes they are decoded copies.
        A = np.asarray(experts.pop(f"{module.name}.A")[used], dtype=np.float64)
        B = np.asarray(experts.pop(f"{module.name}.B")[:, used], dtype=np.float64)
        w = w[used]
        if spec.mixing == "factors":
            yield _Change(module, np.tensordot(w, A, 1), scale * np.tensordot(B, w, ((1,), (0,))))
        else:
            B *= scale * w[:, np.newaxis]
            yield _Change(module, A.reshape(-1, A.shape[-1]), B.reshape(len(B), -1))


def _reduced(change: _Change, rank: int) -> tuple[_Array, _Array, float, float]:
    """A [rank, in], B [out, rank], and the squares of what is lost and of what there was."""
    A, B = change.A, change.B
    if len(A) <= rank:
        return _rows(A, rank), _rows(B.T, rank).T, 0.0, float(np.sum((A @ A.T) * (B.T @ B)))
    # The singular values of B A are those of a small matrix between two orthogonal ones.
    left, r_b = np.linalg.qr(B)
    right, r_a = np.linalg.qr(A.T)
    u, s, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = np.sqrt(s[:rank])
    new_B, new_A = left @ u[:, :rank] * root, (root[:, np.newaxis] * v[:rank]) @ right.T
    return _rows(new_A, rank), _rows(new_B.T, rank).T, float(np.sum(s[rank:] ** 2)), float(np.sum(s**2))


def _rows(matrix: _Array, rows: int) -> _Array:
    """Filled up with zeros."""
    return np.pad(matrix, ((0, rows - len(matrix)), (0, 0)))


def _lora_config(store: Store, rank: int, base_model: str | None) -> dict[str, Any]:
    """adapter_config.json: what PEFT and vLLM read of it, and nothing else."""
    spec = store.spec
    structure = spec.base_model.get("structure")
    family = structure.get("family") if isinstance(structure, Mapping) else None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or spec.base_model.get("name"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # alpha / r is 1: B has the store's own scale in it
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family in _TRANSPOSED,
        "target_modules": [module.name for module in spec.modules],
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


@torch.no_grad()
def _merged_weight(model: nn.Module, change: _Change) -> tuple[torch.Tensor, float, float]:
    """The weight with the change in it, and the squares of what rounding lost and of the change."""
    name = change.module.name
    layer = model.get_submodule(name)
    if isinstance(layer, RoutedLinear):
        raise InvalidInput("the model has routed layers: detach them (close its engine) before merging")
    if type(layer) not in (nn.Linear, Conv1D):
        raise InvalidInput(
            f"{name} is a {type(layer).__name__}, whose weights cannot be added to: give the model as it was "
            "before it was quantised"
        )
    weight = cast(nn.Parameter, layer.weight)
    if any(other is weight for key, other in _all_parameters(model) if key != f"{name}.weight"):
        raise InvalidInput(f"{name} shares its weight with another layer: untie them before merging")
    A, B = (torch.from_numpy(side).to(weight.device, torch.float32) for side in (change.A, change.B))
    delta = B @ A
    if isinstance(layer, Conv1D):
        delta = delta.T
    exact = weight.float() + delta
    merged = exact.to(weight.dtype)
    lost = (merged.double() - exact.double()).square().sum()
    return merged.contiguous(), float(lost), float(delta.double().square().sum())


def _all_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return model.named_parameters(remove_duplicate=False)


@contextmanager
def _opened(store: str | os.PathLike[str] | Store) -> Iterator[Store]:
    if isinstance(store, Store):
        yield store
        return
    with Store.open(store) as opened:
        yield opened


@contextmanager
def _new_folder(dest: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder that takes the name ``dest`` once it is whole."""
    target = Path(os.path.abspath(absent(dest)))
    scratch = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    try:
        scratch.mkdir()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(dest)) from error  # as the caller knows it
    try:
        yield scratch
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
