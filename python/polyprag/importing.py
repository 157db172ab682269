"""Stores from adapters that PEFT trained: one LoRA a document (PRAG), or a Poly checkpoint.

The store computes what the adapters compute. A LoRA becomes an expert of its own, chosen by its document
alone; a task of Poly becomes a document, and its factors stay mixed apart, cross terms included.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from polyprag._polyprag import Combination, Document, Module, Store, StoreSpec
from polyprag.augment.prag import PragSet
from polyprag.encode import BY_SCORE, OWN_EXPERT, ExpertDtype
from polyprag.engine import named_base_model
from polyprag.errors import InvalidInput
from polyprag.jsonl import absent
from polyprag.layers import linear_shape
from polyprag.models import BaseModel, fingerprint, load_base_model
from polyprag.routing import CombinationRule

_Array = NDArray[np.float32]
_Model = str | os.PathLike[str] | BaseModel | None

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_PRAG_FOLDER = re.compile(r"data_(\d+)/passage_(\d+)")
_DTYPES: Mapping[str, ExpertDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# What a configuration may say without changing what the layers compute at inference, or is read below.
_HARMLESS = frozenset(
    "alpha_pattern auto_mapping base_model_name_or_path bias ensure_weight_tying eva_config exclude_modules "
    "fan_in_fan_out inference_mode init_lora_weights init_weights layers_pattern layers_to_transform "
    "loftq_config lora_alpha lora_dropout megatron_core n_skills n_splits n_tasks peft_type peft_version "
    "poly_type qalora_group_size r rank_pattern revision target_modules task_type use_rslora".split()
)
# Ways to begin a LoRA that leave the base model's weights as they are; others train on changed ones.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Imported:
    """What came of an import.

    kind: of the adapters. documents: those in the store; unrouted: those of them without an adapter.
    repeated: adapters that were left out, since their passage had one already.
    """

    kind: Literal["lora", "poly"]
    documents: int
    unrouted: int
    experts: int
    rank: int
    repeated: int = 0


def import_peft(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    model: _Model = None,
    *,
    documents: Sequence[Document] | PragSet | None = None,
    codec: str | None = None,
    expert_dtype: ExpertDtype | None = None,
    k: int = BY_SCORE.k,
    rule: CombinationRule | None = None,
    device: str = "auto",
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Imported:
    """Make a new store at ``dest`` of what PEFT saved under ``source``.

    - **LoRAs**, a folder with ``adapter_config.json`` and ``adapter_model.safetensors`` for each document,
      at any depth, as PRAG's ``.../data_0/passage_2``: a store of as many experts, codec ``sparse(1)``. Ranks
      and scales may differ; smaller ranks are filled up with zeros. All are in memory once, in float32.
    - **A Poly checkpoint**, one such folder: a document for each task, ``mixing="factors"``. Checkpoints with
      ``n_splits`` above 1 (MHR) get an expert for each skill of each split.

    Args:
        model: the base model: a name, a path or a loaded one; None is the one that the adapters name, if it
            is installed or cached here.
        documents: with texts, so that questions find them. For LoRAs, ids are the folders' paths below
            ``source``, and documents without a folder get no route; a :class:`PragSet` says itself which
            passage is where. For Poly, one for each task, in order. None gives ids alone: those paths, or the
            tasks' numbers.
        codec: of a Poly store's logits; None is ``f32``.
        expert_dtype: None is that of the adapters.
        k, rule: how many documents the store combines when it is asked, and how; None is ``sum`` for LoRAs
            (PRAG, arXiv 2501.15915, eq. 6), ``score`` for Poly.
        progress: called with how many adapters were read, and of how many.

    Raises:
        FileNotFoundError, FileExistsError: there is no adapter at ``source``, or something at ``dest``.
        InvalidInput: an adapter that a store cannot keep (DoRA, biases, saved modules, ...), that does not
            fit the base model, or that belongs to no document.
        BaseModelMissing: no base model is given, and the one that the adapters name is not here.
    """
    root, target = Path(source), absent(dest)
    adapters = [_Adapter.read(folder) for folder in _folders(root)]
    kinds = {adapter.kind for adapter in adapters}
    if kinds == {"poly"} and len(adapters) == 1:
        return _import_poly(
            adapters[0],
            target,
            model,
            documents,
            codec,
            expert_dtype,
            _combination(k, rule or "score"),
            device,
            progress,
        )
    if kinds != {"lora"}:
        raise InvalidInput(
            f"{root}: a store is made of LoRAs, or of one Poly checkpoint; name one of the folders"
        )
    if codec not in (None, OWN_EXPERT):
        raise InvalidInput(f"codec {codec}: one LoRA a document is kept as {OWN_EXPERT}")
    return _import_lora(
        root,
        adapters,
        target,
        model,
        documents,
        expert_dtype,
        _combination(k, rule or "sum"),
        device,
        progress,
    )


# -- adapters as PEFT saves them -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapter:
    """One folder: its configuration, checked, and what its file holds.

    modules: name -> (in, out, r, scale of B A). dtypes: as the file names them.
    """

    folder: Path
    kind: Literal["lora", "poly"]
    config: Mapping[str, Any]
    modules: Mapping[str, tuple[int, int, int, float]]
    dtypes: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> _Adapter:
        config = _config(folder / CONFIG)
        kind: Literal["lora", "poly"] = "lora" if config["peft_type"] == "LORA" else "poly"
        with _weights(folder) as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            dtypes = frozenset(file.get_slice(key).get_dtype() for key in shapes)
        read = _lora_modules if kind == "lora" else _poly_modules
        modules = read(folder, config, shapes)
        if not modules:
            raise InvalidInput(f"{folder / WEIGHTS}: there is no layer in it")
        return cls(folder, kind, config, modules, dtypes)

    def tensors(self) -> dict[str, _Array]:
        """All tensors, in float32, by their names without PEFT's prefix."""
        with _weights(self.folder) as file:
            return {
                key.removeprefix(_PREFIX): file.get_tensor(key).float().numpy()
                for key in file.keys()  # noqa: SIM118
            }


def _folders(root: Path) -> list[Path]:
    """The folders with an adapter, in the order of the numbers in their names."""
    if not root.is_dir():
        raise FileNotFoundError(2, "there is no such folder of adapters", str(root))
    found = [path.parent for path in root.rglob(CONFIG)]
    if not found:
        raise FileNotFoundError(2, f"there is no {CONFIG} in this folder or below it", str(root))
    return sorted(found, key=lambda folder: [_natural(part) for part in folder.relative_to(root).parts])


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _config(path: Path) -> dict[str, Any]:
    """adapter_config.json. Raises InvalidInput if it says what a store cannot keep."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidInput(f"{path}: no valid JSON ({error}); save the adapter again") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "POLY"):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise InvalidInput(f"{path}: peft_type is {kind!r}; a store can be made of LORA and of POLY")
    if config["peft_type"] == "POLY":
        for name in ("n_tasks", "n_skills", "n_splits"):
            if type(config.get(name)) is not int or config[name] < 1:
                raise InvalidInput(f"{path}: {name} is {config.get(name)!r}, expected a whole number above 0")
    unknown = {key: value for key, value in config.items() if key not in _HARMLESS and value}
    if config.get("bias", "none") != "none":
        unknown["bias"] = config["bias"]
    if config["peft_type"] == "LORA" and config.get("init_lora_weights") not in _PLAIN_STARTS:
        unknown["init_lora_weights"] = config["init_lora_weights"]
    if unknown:
        said = ", ".join(f"{key}={value!r}" for key, value in unknown.items())
        raise InvalidInput(
            f"{path}: a store cannot keep an adapter with {said}; it keeps A and B of plain LoRAs"
        )
    return config


@contextmanager
def _weights(folder: Path) -> Any:
    path = folder / WEIGHTS
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise InvalidInput(
            f"{folder}: the weights are pickled, which is not read; load them with PEFT and save them again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InvalidInput(f"{path}: no whole safetensors file ({error}); copy it again") from error


def _lora_modules(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int, int, float]]:
    found = {}
    for name, (a, b) in _sides(folder, shapes, ("lora_A.weight", "lora_B.weight")).items():
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] > 0:
            raise InvalidInput(f"{folder / WEIGHTS}: {name} has A {a} and B {b}: no LoRA of a linear layer")
        found[name] = (a[1], b[0], a[0], _lora_scale(config, name, a[0], folder))
    return found


def _lora_scale(config: Mapping[str, Any], name: str, rank: int, folder: Path) -> float:
    alpha = config.get("lora_alpha", 8)
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise InvalidInput(f"{folder / CONFIG}: alpha_pattern is an object, not {patterns!r}")
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", name)
        except (re.error, OverflowError) as error:
            raise InvalidInput(
                f"{folder / CONFIG}: alpha_pattern has {pattern!r}, no regular expression ({error}); mend it"
            ) from error
        if found:
            alpha = value
            break
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InvalidInput(f"{folder / CONFIG}: lora_alpha is a number, not {alpha!r}")
    return float(alpha / math.sqrt(rank)) if config.get("use_rslora") else float(alpha / rank)


_POLY = ("poly_lora_A", "poly_lora_B", "poly_router.module_logits")


def _poly_modules(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int, int, float]]:
    tasks, skills, splits = (int(config[name]) for name in ("n_tasks", "n_skills", "n_splits"))
    found = {}
    for name, (a, b, z) in _sides(folder, shapes, _POLY).items():
        fits = len(a) == len(b) == 4 and a[:2] == b[:2] == (splits, skills) and a[3] == b[2] > 0
        if not fits or z != (tasks, splits * skills):
            raise InvalidInput(
                f"{folder / WEIGHTS}: {name} has A {a}, B {b} and logits {z}, which do not fit "
                f"n_tasks={tasks}, n_skills={skills}, n_splits={splits}"
            )
        found[name] = (splits * a[2], splits * b[3], a[3], 1.0 / a[3])
    return found


def _sides(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], ends: Sequence[str]
) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of each layer's tensors, by the layer's name in the base model."""
    names: dict[str, None] = {}
    for key in shapes:
        end = next((end for end in ends if key.endswith(f".{end}")), None)
        if end is None or not key.startswith(_PREFIX):
            raise InvalidInput(f"{folder / WEIGHTS}: {key} is nothing that a store can keep")
        names[key.removeprefix(_PREFIX).removesuffix(f".{end}")] = None
    found = {}
    for name in names:
        missing = next((end for end in ends if f"{_PREFIX}{name}.{end}" not in shapes), None)
        if missing is not None:
            raise InvalidInput(f"{folder / WEIGHTS}: {name} has no {missing}")
        found[name] = [shapes[f"{_PREFIX}{name}.{end}"] for end in ends]
    return found


# -- one LoRA a document -------------------------------------------------------------------------------------


def _import_lora(
    root: Path,
    adapters: list[_Adapter],
    target: Path,
    model: _Model,
    documents: Sequence[Document] | PragSet | None,
    expert_dtype: ExpertDtype | None,
    combination: Combination,
    device: str,
    progress: Callable[[int, int], object],
) -> Imported:
    routed, rest = _matched(root, adapters, documents)
    own = [adapter for _, adapter in routed]
    base = _base(model, own, device)
    modules = _modules(base, own, one_group=True)
    rank = max(r for adapter in own for _, _, r, _ in adapter.modules.values())
    # What most of them have, so that their numbers stay as they are.
    scales = Counter(s for adapter in own for _, _, _, s in adapter.modules.values() if s)
    scale = scales.most_common(1)[0][0] if scales else 1.0
    K = len(own)
    experts: dict[str, _Array] = {}
    for m in modules:
        experts[f"{m.name}.A"] = np.zeros((K, rank, m.in_features), dtype=np.float32)
        experts[f"{m.name}.B"] = np.zeros((m.out_features, K, rank), dtype=np.float32)
    for k, adapter in enumerate(own):
        tensors = adapter.tensors()
        for name, (_, _, r, own_scale) in adapter.modules.items():
            experts[f"{name}.A"][k, :r] = tensors[f"{name}.lora_A.weight"]
            experts[f"{name}.B"][:, k, :r] = tensors[f"{name}.lora_B.weight"] * np.float32(own_scale / scale)
        progress(k + 1, K)
    spec = _spec(
        base,
        modules,
        [document for document, _ in routed] + rest,
        experts=K,
        rank=rank,
        alpha=scale * rank,
        codec=OWN_EXPERT,
        combination=combination,
        recipe={"train": {"routing": "lora", "rank": rank, "alpha": scale * rank}},
    )
    with Store.create(target, spec, experts, expert_dtype=expert_dtype or _dtype(own)) as writer:
        block = max(1, (1 << 24) // K)
        for start in range(0, K, block):
            numbers = np.arange(start, min(start + block, K))
            routes = np.zeros((len(numbers), 1, K), dtype=np.float32)
            routes[np.arange(len(numbers)), 0, numbers] = 1.0
            writer.add([routed[i][0] for i in numbers], routes)
        if rest:
            writer.add(rest)
    return Imported("lora", K + len(rest), len(rest), K, rank, repeated=len(adapters) - K)


def _matched(
    root: Path, adapters: list[_Adapter], documents: Sequence[Document] | PragSet | None
) -> tuple[list[tuple[Document, _Adapter]], list[Document]]:
    """Each document with its adapter, and the documents without one."""
    by_path = {_place(root, adapter.folder): adapter for adapter in adapters}
    if documents is None:
        return [(Document(place), adapter) for place, adapter in by_path.items()], []
    if isinstance(documents, PragSet):
        by_id: dict[str, _Adapter] = {}
        for place, adapter in by_path.items():
            by_id.setdefault(_passage(documents, place, adapter), adapter)
        known: Sequence[Document] = documents.documents
    else:
        known, by_id = documents, by_path
        if strange := sorted(set(by_id) - {str(document.id) for document in known}):
            raise InvalidInput(
                f"{root}: no document has the id {strange[0]!r}, the path of a folder there; name the folder "
                "above, or give the documents these ids"
            )
    routed = [(d, by_id[str(d.id)]) for d in known if str(d.id) in by_id]
    return routed, [d for d in known if str(d.id) not in by_id]


def _place(root: Path, folder: Path) -> str:
    below = folder.relative_to(root).as_posix()
    return root.resolve().name if below == "." else below


def _passage(documents: PragSet, place: str, adapter: _Adapter) -> str:
    """The id of the passage that a folder of PRAG's belongs to."""
    found = _PRAG_FOLDER.fullmatch(place)
    if found is None:
        raise InvalidInput(
            f"{adapter.folder}: PRAG's folders are data_<question>/passage_<rank>; name the one above those"
        )
    question, rank = int(found[1]), int(found[2])
    if question >= len(documents.places) or rank >= len(documents.places[question]):
        raise InvalidInput(
            f"{adapter.folder}: the data_aug file has no passage {rank} of question {question}: give the "
            "one that these folders were trained from"
        )
    return documents.places[question][rank]


# -- Poly ----------------------------------------------------------------------------------------------------


def _import_poly(
    adapter: _Adapter,
    target: Path,
    model: _Model,
    documents: Sequence[Document] | PragSet | None,
    codec: str | None,
    expert_dtype: ExpertDtype | None,
    combination: Combination,
    device: str,
    progress: Callable[[int, int], object],
) -> Imported:
    tasks, skills, splits = (int(adapter.config[name]) for name in ("n_tasks", "n_skills", "n_splits"))
    given = documents.documents if isinstance(documents, PragSet) else documents
    known = [Document(task) for task in range(tasks)] if given is None else list(given)
    if len(known) != tasks:
        raise InvalidInput(
            f"{adapter.folder}: {tasks} tasks, but {len(known)} documents: give one for each, in their order"
        )
    base = _base(model, [adapter], device)
    modules = _modules(base, [adapter], one_group=False)
    ranks = {r for _, _, r, _ in adapter.modules.values()}
    rank, K = max(ranks), splits * skills
    tensors = adapter.tensors()
    experts: dict[str, _Array] = {}
    logits = np.zeros((tasks, len(modules), K), dtype=np.float32)
    for m in modules:
        a, b, z = (tensors.pop(f"{m.name}.{end}") for end in _POLY)
        experts[f"{m.name}.A"], experts[f"{m.name}.B"] = _poly_experts(a, b)
        logits[:, m.group] = _joint_logits(z.reshape(tasks, splits, skills)).reshape(tasks, K)
    # The weights of a split sum to 1/splits here, in A as in B.
    alpha = float(splits**2)
    spec = _spec(
        base,
        modules,
        known,
        experts=K,
        rank=rank,
        alpha=alpha,
        codec=codec or "f32",
        phi="sigmoid",
        mixing="factors",
        combination=combination,
        recipe={
            "train": {"routing": "table", "mixing": "factors", "experts": K, "rank": rank, "alpha": alpha}
        },
    )
    with Store.create(target, spec, experts, expert_dtype=expert_dtype or _dtype([adapter])) as writer:
        writer.add(known, logits)
    progress(1, 1)
    return Imported("poly", tasks, 0, K, rank)


def _poly_experts(a: _Array, b: _Array) -> tuple[_Array, _Array]:
    """A [splits, skills, in / splits, r] and B [splits, skills, r, out / splits] as experts [K, r, in] and
    [out, K, r]: each reads and writes the part of the layer that its split has, and is zero elsewhere.
    """
    splits, skills, inputs, rank = a.shape
    outputs = b.shape[3]
    A = np.zeros((splits, skills, rank, splits, inputs), dtype=np.float32)
    B = np.zeros((splits, outputs, splits, skills, rank), dtype=np.float32)
    for split in range(splits):
        A[split, :, :, split] = a[split].swapaxes(1, 2)
        B[split, :, split] = b[split].transpose(2, 0, 1)
    K = splits * skills
    return A.reshape(K, rank, splits * inputs), B.reshape(splits * outputs, K, rank)


def _joint_logits(z: _Array) -> _Array:
    """Logits [tasks, splits, skills] whose sigmoids, normalised over all splits at once, are 1/splits of what
    each split's are by itself. Those of one split are left as they are.
    """
    splits = z.shape[1]
    if splits == 1:
        return z
    w = torch.sigmoid(torch.from_numpy(z.astype(np.float64)))
    return torch.logit(w / w.sum(-1, keepdim=True) / splits).float().numpy()


# -- both ----------------------------------------------------------------------------------------------------


def _base(model: _Model, adapters: Iterable[_Adapter], device: str) -> BaseModel:
    if isinstance(model, BaseModel):
        return model
    if model is not None:
        return load_base_model(model, device=device, dtype="fp32")
    first = next(iter(adapters))
    named = first.config.get("base_model_name_or_path")
    return named_base_model(named, str(first.folder), device=device, dtype="fp32")


def _modules(base: BaseModel, adapters: Iterable[_Adapter], *, one_group: bool) -> list[Module]:
    """The layers of all adapters, in the order of the base model. Raises InvalidInput if it has them not."""
    wanted: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for name, (inputs, outputs, _, _) in adapter.modules.items():
            if wanted.setdefault(name, (inputs, outputs)) != (inputs, outputs):
                raise InvalidInput(f"{adapter.folder}: {name} has other sizes than in the adapters before it")
    found: list[Module] = []
    for name, layer in base.model.named_modules():
        if name not in wanted:
            continue
        shape, given = linear_shape(layer), wanted.pop(name)
        if shape != given:
            raise InvalidInput(
                f"{name} is {shape} in {base.name}, and {given} in the adapters: they are another model's"
            )
        found.append(Module(name, *given, 0 if one_group else len(found)))
    if wanted:
        raise InvalidInput(
            f"{base.name} has no {next(iter(wanted))}, which the adapters change: they are another model's"
        )
    return found


def _spec(
    base: BaseModel, modules: list[Module], documents: Sequence[Document], **settings: Any
) -> StoreSpec:
    return StoreSpec(
        modules=modules,
        id_type="u64" if isinstance(documents[0].id, int) else "string",
        keep_text=any(document.text is not None for document in documents),
        keep_title=any(document.title is not None for document in documents),
        keep_metadata=any(document.metadata is not None for document in documents),
        base_model=fingerprint(base),
        **settings,
    )


def _combination(k: int, rule: CombinationRule) -> Combination:
    return Combination(k, rule, BY_SCORE.temperature if rule == "score" else 1.0)


def _dtype(adapters: Iterable[_Adapter]) -> ExpertDtype:
    """The dtype that all adapters have; of several, float32."""
    dtypes = {dtype for adapter in adapters for dtype in adapter.dtypes}
    return _DTYPES.get(dtypes.pop(), "float32") if len(dtypes) == 1 else "float32"
