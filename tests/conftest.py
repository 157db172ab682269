"""What several test modules need."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from polyprag.models import BaseModel

_REPOSITORY = Path(__file__).resolve().parent.parent

# On a busy machine a case is slow without being wrong. `make proof` takes the second profile.
settings.register_profile("suite", parent=settings(), deadline=None)
settings.register_profile("proof", parent=settings(), deadline=None, max_examples=20_000)
settings.load_profile("suite")

# Started in the background of a script, as a CI may, the tests would inherit an ignored Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Path of a file of the real data, by its name there; skips the test where it is absent."""
    root = Path(os.environ.get("POLYPRAG_DATA", _REPOSITORY.parent / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_file():
            pytest.skip(f"no real data: {name} is not under POLYPRAG_DATA (default ../shared/data)")
        return root / name

    return find


def left_in(work: Path) -> set[str]:
    """What a work folder has in it, but TensorBoard's folder, which is there where that is installed."""
    return {path.name for path in work.iterdir()} - {"tensorboard"}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character: ASCII, some letters beyond it, an unknown, a padding and an end."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = "\n" + "".join(map(chr, range(32, 127))) + "éüß–"
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<end>", "<unk>", *characters])}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokens.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


@pytest.fixture
def bytewise() -> PreTrainedTokenizerFast:
    """One token a byte, as of a tokenizer that knows no letters of most scripts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<pad>", "<end>", *alphabet])}
    tokens = Tokenizer(models.BPE(vocabulary, [], unk_token=None))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")


_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 48, "num_key_value_heads": 2},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gemma": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
    "granite": {"intermediate_size": 48, "num_key_value_heads": 2},
    "phi": {"intermediate_size": 48},
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen2_moe": {
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    },
}


def make_model(family: str = "llama", *, seed: int = 0, std: float = 0.1, **changes: Any) -> PreTrainedModel:
    """A tiny random causal LM of a family of transformers, frozen and in evaluation mode."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {
        "vocab_size": 104,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": std,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        **_SIZES.get(family, {}),
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options))
    model.requires_grad_(False)
    model.eval()
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """See :func:`make_tokenizer`."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def build_model() -> Callable[..., PreTrainedModel]:
    """See :func:`make_model`."""
    return make_model


@pytest.fixture
def tiny_base(tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    """A new tiny base model of the Llama family that reads characters, in float32."""
    from polyprag.models import BaseModel

    return BaseModel(make_model(), tokenizer, "tiny")


@pytest.fixture(scope="session")
def model_folder(
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny base model as a folder, as ``--model`` takes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    build_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_store(
    build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """Writes a store for the tiny base model whose random experts make every route answer otherwise."""
    import numpy as np

    from polyprag import Document, Module, Store, StoreSpec
    from polyprag.layers import find_targets
    from polyprag.models import BaseModel, fingerprint

    def make(
        path: Path, documents: list[Document], *, unrouted: int = 0, expert_dtype: Any = None, **changes: Any
    ) -> Path:
        base = BaseModel(build_model(), tokenizer, "tiny")
        shapes = find_targets(base.model)
        settings: dict[str, Any] = {
            "modules": [Module(m.name, m.in_features, m.out_features, m.group) for m in shapes],
            "experts": 4,
            "rank": 2,
            "alpha": 16.0,
            "codec": "f32",
            "base_model": fingerprint(base),
            "id_type": "u64" if isinstance(documents[0].id, int) else "string",
            **changes,
        }
        rng = np.random.default_rng(0)
        experts = {}
        for m in shapes:
            experts[f"{m.name}.A"] = rng.normal(0, 0.3, (4, 2, m.in_features)).astype(np.float32)
            experts[f"{m.name}.B"] = rng.normal(0, 0.3, (m.out_features, 4, 2)).astype(np.float32)
        routed = documents[: len(documents) - unrouted]
        with Store.create(path, StoreSpec(**settings), experts, expert_dtype=expert_dtype) as writer:
            writer.add(routed, rng.normal(0, 4, (len(routed), len(shapes), 4)).astype(np.float32))
            if unrouted:
                writer.add(documents[len(routed) :])
        return path

    return make


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """``polyprag ...`` in this process: (exit code, standard output, standard error)."""

    from polyprag import cli

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polyprag", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return call


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Systems answer with four tokens: what they are asked is tested, not what random weights say."""
    from polyprag import engine
    from polyprag.generation import GenerationSettings
    from polyprag.systems import closed_book, rag

    for module in (engine, closed_book, rag):
        monkeypatch.setattr(module, "ANSWERS", GenerationSettings(max_new_tokens=4))
