"""Routes out as adapters and merged models, adapters in as stores: PEFT computes the same on both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

import polyprag
from polyprag import Document, Module, Store, StoreSpec, cli
from polyprag.augment import Augmentation
from polyprag.augment.base import Pair
from polyprag.augment.prag import read_prag
from polyprag.encode import Written, add
from polyprag.engine import Engine
from polyprag.errors import BaseModelMissing, InvalidInput, UnknownId, Unrouted
from polyprag.layers import find_targets
from polyprag.models import BaseModel, fingerprint
from routed import PackedLinear, layer_bytes, logits, some_ids

DOCUMENTS = [
    Document(f"d{i}", f"The {n} mill.", f"Mill {n}") for i, n in enumerate(["amber", "birch", "coral"])
]
IDS = some_ids(3)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def new_base(
    build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., BaseModel]:
    return lambda family="llama", **changes: BaseModel(build_model(family, **changes), tokenizer, "tiny")


def make_store(base: BaseModel, path: Path, targets: Any = ("auto",), **changes: Any) -> Path:
    """Three documents with routes, one without; four random experts of rank 2."""
    shapes = find_targets(base.model, targets)
    settings: dict[str, Any] = {
        "modules": [Module(m.name, m.in_features, m.out_features, m.group) for m in shapes],
        "experts": 4,
        "rank": 2,
        "alpha": 6.0,
        "codec": "f32",
        "base_model": fingerprint(base),
        **changes,
    }
    rng = np.random.default_rng(1)
    experts = {}
    for m in shapes:
        experts[f"{m.name}.A"] = rng.normal(0, 0.3, (4, 2, m.in_features)).astype(np.float32)
        experts[f"{m.name}.B"] = rng.normal(0, 0.3, (m.out_features, 4, 2)).astype(np.float32)
    with Store.create(path, StoreSpec(**settings), experts) as writer:
        writer.add(DOCUMENTS, rng.normal(0, 3, (3, len(shapes), 4)).astype(np.float32))
        writer.add([Document("bare", "No route.")])
    return path


def routed_logits(
    path: Path, base: BaseModel, ids: list[Any], weights: list[float] | None = None
) -> torch.Tensor:
    with Engine.open(path, base) as engine:
        route = torch.from_numpy(engine.store.combined_route(ids, weights)).unsqueeze(0)
        with engine.routed.route(route):
            return logits(base.model, IDS)


def peft_logits(base: BaseModel, folder: Path, **options: Any) -> torch.Tensor:
    model = peft.PeftModel.from_pretrained(base.model, folder)
    model.eval()
    found = logits(model, IDS, **options)
    model.unload()
    return found


def store_routes(path: Path) -> Any:
    with Store.open(path) as store:
        return store.routes(list(store))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- out: a LoRA --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
@pytest.mark.parametrize("mixing", ["exact", "factors"])
def test_peft_computes_with_an_exported_adapter_what_the_engine_does(
    new_base: Callable[..., BaseModel], tmp_path: Path, family: str, mixing: str
) -> None:
    base = new_base(family)
    path = make_store(base, tmp_path / "s", mixing=mixing)
    plain = logits(base.model, IDS)
    for number, (ids, weights) in enumerate(
        ((["d1"], None), (["d0", "d2"], [0.8, 0.2]), (["d0", "d1"], [1, 1]))
    ):
        adapter = polyprag.export_peft(path, ids, tmp_path / f"a{number}", weights=weights)
        assert (adapter.rank, adapter.exact_rank) == ((8, 8) if mixing == "exact" else (2, 2))
        assert adapter.error == 0
        found = peft_logits(new_base(family), adapter.path)
        same(found, routed_logits(path, base, ids, weights))
        assert not torch.allclose(found, plain, atol=1e-2), "the adapter does something"


def test_an_adapter_says_what_vllm_reads(new_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    path = make_store(new_base(), tmp_path / "s")
    polyprag.export_peft(path, ["d0"], tmp_path / "a", dtype="bf16", base_model="org/model")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"], config["use_dora"]) == (8, 8, "none", False)
    assert config["base_model_name_or_path"] == "org/model"
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    names = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    assert names == set(config["target_modules"])
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert all(t.shape[0 if ".lora_A." in key else 1] == 8 for key, t in tensors.items())


@pytest.mark.parametrize("rank", [1, 3, 7, 8, 50])
def test_a_smaller_rank_is_the_nearest_and_says_its_error(
    new_base: Callable[..., BaseModel], tmp_path: Path, rank: int
) -> None:
    path = make_store(new_base(), tmp_path / "s")
    exact = polyprag.export_peft(path, ["d0", "d1"], tmp_path / "exact")
    small = polyprag.export_peft(path, ["d0", "d1"], tmp_path / "small", rank=rank)
    assert small.rank == min(rank, 8)
    assert small.exact_rank == 8

    def changes(folder: Path) -> dict[str, torch.Tensor]:
        tensors = {k: t.double() for k, t in load_file(folder / "adapter_model.safetensors").items()}
        return {k: tensors[k.replace("lora_A", "lora_B")] @ t for k, t in tensors.items() if "lora_A" in k}

    whole, reduced = changes(exact.path), changes(small.path)
    lost, total, errors = 0.0, 0.0, []
    for key, change in whole.items():
        tail = torch.linalg.svdvals(change)[rank:].square().sum()
        found = (change - reduced[key]).square().sum()
        torch.testing.assert_close(found, tail, rtol=1e-4, atol=1e-8)
        lost, total = lost + float(tail), total + float(change.square().sum())
        errors.append((float(tail / change.square().sum())) ** 0.5)
    assert small.error == pytest.approx((lost / total) ** 0.5, rel=1e-4, abs=1e-6)
    assert small.worst_error == pytest.approx(max(errors), rel=1e-4, abs=1e-6)
    assert (small.error > 0) == (rank < 8)


def test_experts_without_a_weight_are_left_out(new_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = new_base()
    path = make_store(base, tmp_path / "s", top_k=1)
    for ids, rank in ((["d0"], 2), (["d0", "d1", "d2"], 6)):
        adapter = polyprag.export_peft(path, ids, tmp_path / f"a{rank}")
        assert adapter.rank <= rank
        same(peft_logits(new_base(), adapter.path), routed_logits(path, base, ids))


def test_what_cannot_be_exported_leaves_nothing_behind(
    new_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    path = make_store(new_base(), tmp_path / "s", alpha=1e6)
    dest = tmp_path / "out"
    refused: list[tuple[Any, dict[str, Any]]] = [
        (UnknownId, {"ids": ["nobody"]}),
        (Unrouted, {"ids": ["bare"]}),
        (InvalidInput, {"ids": []}),
        (InvalidInput, {"ids": ["d0"], "weights": [1, 2]}),
        (InvalidInput, {"ids": ["d0"], "rank": 0}),
        (InvalidInput, {"ids": ["d0"], "dtype": "int8"}),
        (InvalidInput, {"ids": ["d0"], "dtype": "fp16"}),
    ]
    for error, options in refused:
        with pytest.raises(error):
            polyprag.export_peft(path, dest=dest, **options)
    dest.mkdir()
    with pytest.raises(FileExistsError):
        polyprag.export_peft(path, ["d0"], dest)
    with pytest.raises(FileNotFoundError) as lost:
        polyprag.export_peft(path, ["d0"], tmp_path / "none" / "out")
    assert lost.value.filename == str(tmp_path / "none" / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s"]


# --- out: a merged model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("mixing", ["exact", "factors"])
def test_a_merged_model_computes_what_the_engine_does(
    new_base: Callable[..., BaseModel], tmp_path: Path, family: str, mixing: str
) -> None:
    base = new_base(family)
    path = make_store(base, tmp_path / "s", mixing=mixing)
    before = layer_bytes(base.model)
    merged = polyprag.export_merged(path, ["d0", "d2"], tmp_path / "m", base, weights=[0.8, 0.2])
    assert layer_bytes(base.model) == before
    assert (merged.dtype, merged.rounding < 1e-6) == ("float32", True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    same(logits(loaded.eval(), IDS), routed_logits(path, base, ["d0", "d2"], [0.8, 0.2]))
    assert AutoTokenizer.from_pretrained(tmp_path / "m")("mill").input_ids == base.tokenizer("mill").input_ids


def test_merged_weights_are_rounded_once(new_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = new_base()
    path = make_store(base, tmp_path / "s")
    base.model.to(torch.bfloat16)
    merged = polyprag.export_merged(path, ["d1"], tmp_path / "m", base)
    assert merged.dtype == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    lost = total = 0.0
    with Store.open(path) as store:
        route, experts = store.combined_route(["d1"]).astype(np.float64), store.experts
        for m in store.spec.modules:
            A, B = (experts[f"{m.name}.{side}"].astype(np.float64) for side in "AB")
            change = torch.from_numpy(np.einsum("okr,kri,k->oi", B, A, route[m.group]) * 3.0)
            exact = base.model.get_submodule(m.name).weight.double() + change
            found = loaded[f"{m.name}.weight"]
            assert found.dtype == torch.bfloat16
            # Half of the last of bfloat16's 8 binary digits, and what float32 adds to it.
            assert ((found.double() - exact).abs() <= exact.abs() * 2**-8 * (1 + 1e-4)).all()
            lost += float((found.double() - exact).square().sum())
            total += float(change.square().sum())
    assert merged.rounding == pytest.approx((lost / total) ** 0.5, rel=1e-3)


def test_what_cannot_be_merged(new_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = new_base(tie_word_embeddings=True)
    tied = make_store(base, tmp_path / "tied", targets=["lm_head"])
    with pytest.raises(InvalidInput, match="shares its weight"):
        polyprag.export_merged(tied, ["d0"], tmp_path / "m", base)
    base = new_base()
    path = make_store(base, tmp_path / "s")
    with Engine.open(path, base), pytest.raises(InvalidInput, match="routed layers"):
        polyprag.export_merged(path, ["d0"], tmp_path / "m", base)
    packed = PackedLinear(base.model.model.layers[0].mlp.up_proj)
    base.model.model.layers[0].mlp.up_proj = packed
    with pytest.warns(UserWarning, match="differ"), pytest.raises(InvalidInput, match="quantised"):
        polyprag.export_merged(path, ["d0"], tmp_path / "m", base, allow_base_mismatch=True)
    with pytest.raises(BaseModelMissing):
        polyprag.export_merged(path, ["d0"], tmp_path / "m")
    assert not (tmp_path / "m").exists()


# --- in: one LoRA a document --------------------------------------------------------------------------------


def save_adapter(base: BaseModel, folder: Path, seed: int, **config: Any) -> Path:
    """A random adapter, as PEFT saves it."""
    settings = {"r": 2, "lora_alpha": 32, "target_modules": ["gate_proj", "up_proj", "down_proj"], **config}
    torch.manual_seed(seed)
    model = peft.get_peft_model(base.model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    model.unload()
    return folder


def passages(*names: str) -> list[dict[str, Any]]:
    return [{"passage": f"The {name} mill stands in Ost.", "m_qa": [], "m_rewrite": ""} for name in names]


@pytest.fixture
def prag(new_base: Callable[..., BaseModel], tmp_path: Path) -> tuple[Path, Path]:
    """PRAG's folders for two questions that share a passage, and their data_aug file."""
    entries = [
        {"test_id": 0, "question": "Which?", "answer": "a", "augment": passages("amber", "birch")},
        {"test_id": 1, "question": "Where?", "answer": "b", "augment": passages("birch", "coral", "denim")},
    ]
    file = tmp_path / "total.json"
    file.write_text(json.dumps(entries))
    base = new_base()
    for seed, place in enumerate(
        ["data_0/passage_0", "data_0/passage_1", "data_1/passage_0", "data_1/passage_1"]
    ):
        save_adapter(base, tmp_path / "offline" / place, seed)
    return tmp_path / "offline", file


def test_prags_folders_become_a_store(
    new_base: Callable[..., BaseModel], tmp_path: Path, prag: tuple[Path, Path]
) -> None:
    folders, file = prag
    base = new_base()
    found = polyprag.import_peft(folders, tmp_path / "s", base, documents=read_prag(file))
    assert vars(found) == {
        "kind": "lora", "documents": 4, "unrouted": 1, "experts": 3, "rank": 2, "repeated": 1
    }  # fmt: skip
    with Store.open(tmp_path / "s") as store:
        assert (store.spec.codec, store.spec.alpha, store.expert_dtype) == ("sparse(1)", 32, "float32")
        assert (store.spec.combination.k, store.spec.combination.rule) == (3, "sum")
        ids = [store.search(f"{name} mill", 1)[0].id for name in ("amber", "birch", "coral", "denim")]
        assert [store.is_routed(id) for id in ids] == [True, True, True, False]
    places = ["data_0/passage_0", "data_0/passage_1", "data_1/passage_1"]
    for id, place in zip(ids, places, strict=False):
        same(routed_logits(tmp_path / "s", base, [id]), peft_logits(base, folders / place))
    # PRAG adds them up: PEFT's `cat` with weights of 1.
    model = peft.PeftModel.from_pretrained(base.model, folders / places[0], adapter_name="0")
    for number, place in enumerate(places[1:], start=1):
        model.load_adapter(folders / place, adapter_name=str(number))
    model.add_weighted_adapter(["0", "1", "2"], [1.0, 1.0, 1.0], "all", combination_type="cat")
    model.set_adapter("all")
    together = logits(model.eval(), IDS)
    model.unload()
    same(routed_logits(tmp_path / "s", base, ids[:3], [1, 1, 1]), together)
    with pytest.raises(InvalidInput, match="encode anew"):
        add(base, [Document("new", "A new mill.")], tmp_path / "s")


def test_adapters_of_any_rank_and_scale_by_the_ids_of_a_corpus(
    new_base: Callable[..., BaseModel], tmp_path: Path
) -> None:
    base = new_base()
    configs: list[dict[str, Any]] = [
        {},
        {"r": 3, "lora_alpha": 5, "use_rslora": True},
        {"r": 1, "target_modules": ["up_proj", "q_proj"], "alpha_pattern": {"up_proj": 4}, "lora_alpha": 3},
        {"rank_pattern": {"down_proj": 4}, "init_lora_weights": "gaussian"},
    ]
    for number, config in enumerate(configs):
        save_adapter(base, tmp_path / "adapters" / str(number), number, **config)
    documents = [Document(number, f"Mill {number}.") for number in (3, 1, 0, 2, 7)]
    found = polyprag.import_peft(
        tmp_path / "adapters", tmp_path / "s", base, documents=documents, k=1, rule="first"
    )
    assert (found.rank, found.experts, found.unrouted) == (4, 4, 1)
    for number in range(4):
        expected = peft_logits(base, tmp_path / "adapters" / str(number))
        same(routed_logits(tmp_path / "s", base, [number]), expected)
    with Store.open(tmp_path / "s") as store:
        assert list(store) == [3, 1, 0, 2, 7]
        assert store.spec.combination.rule == "first"


def test_without_a_corpus_ids_are_the_paths(new_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = new_base()
    for seed, name in enumerate(["x/2", "x/10", "y"]):
        save_adapter(base, tmp_path / "adapters" / name, seed)
    polyprag.import_peft(tmp_path / "adapters", tmp_path / "s", base)
    polyprag.import_peft(tmp_path / "adapters" / "y", tmp_path / "one", base)
    with Store.open(tmp_path / "s") as store, Store.open(tmp_path / "one") as one:
        assert list(store) == ["x/2", "x/10", "y"]
        assert list(one) == ["y"]


def test_out_and_in_again(new_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = new_base()
    path = make_store(base, tmp_path / "s")
    polyprag.export_peft(path, ["d0", "d1"], tmp_path / "a", dtype="fp16")
    polyprag.import_peft(tmp_path / "a", tmp_path / "t", base)
    with Store.open(tmp_path / "t") as store:
        assert store.expert_dtype == "float16"
    found = routed_logits(tmp_path / "t", base, ["a"])
    torch.testing.assert_close(found, routed_logits(path, base, ["d0", "d1"]), rtol=1e-2, atol=1e-2)


# --- in: Poly -----------------------------------------------------------------------------------------------


def save_poly(base: BaseModel, folder: Path, splits: int) -> None:
    config = peft.PolyConfig(
        r=3,
        n_tasks=3,
        n_skills=4,
        n_splits=splits,
        target_modules=["gate_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(base.model, config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "poly_" in name:
            parameter.data.normal_(0, 3.0 if "router" in name else 0.2)
    model.save_pretrained(folder)
    model.unload()


@pytest.mark.parametrize("splits", [1, 4])
def test_a_poly_checkpoint_becomes_a_store(
    new_base: Callable[..., BaseModel], tmp_path: Path, splits: int
) -> None:
    base = new_base()
    save_poly(base, tmp_path / "poly", splits)
    found = polyprag.import_peft(tmp_path / "poly", tmp_path / "s", base, documents=DOCUMENTS)
    assert (found.kind, found.documents, found.experts, found.rank) == ("poly", 3, 4 * splits, 3)
    for task, document in enumerate(DOCUMENTS):
        expected = peft_logits(base, tmp_path / "poly", task_ids=torch.full((len(IDS),), task))
        same(routed_logits(tmp_path / "s", base, [document.id]), expected)
    before = store_routes(tmp_path / "s")
    new = Augmentation("new", (Pair("Where is the elder mill?", "Ost"),))
    assert add(base, [Document("new", "The elder mill.")], tmp_path / "s", written=Written([new], "me")) == 1
    np.testing.assert_array_equal(store_routes(tmp_path / "s")[:3], before)
    # A LoRA out of it has the rank of Poly's own factors.
    adapter = polyprag.export_peft(tmp_path / "s", ["d1"], tmp_path / "a")
    assert adapter.rank == 3
    same(peft_logits(base, adapter.path), routed_logits(tmp_path / "s", base, ["d1"]))
    polyprag.import_peft(tmp_path / "poly", tmp_path / "bare", base, codec="q8")
    with Store.open(tmp_path / "bare") as store:
        assert (list(store), store.spec.codec, store.spec.mixing) == ([0, 1, 2], "q8", "factors")


# --- in: what is refused ------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_imported(new_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = new_base()

    def refused(what: str, folder: Path, error: type[Exception] = InvalidInput, **options: Any) -> None:
        with pytest.raises(error, match=what):
            polyprag.import_peft(folder, tmp_path / "s", options.pop("model", base), **options)
        assert not (tmp_path / "s").exists()

    refused("no such folder", tmp_path / "nowhere", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused("adapter_config.json", tmp_path / "empty", FileNotFoundError)

    good = save_adapter(base, tmp_path / "good", 0)
    for changes, what in (
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"something_new": 3}, "something_new"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"alpha_pattern": {"up_proj": "much"}}, "lora_alpha is a number"),
        ({"alpha_pattern": {"(up": 4}}, "no regular expression"),
        ({"alpha_pattern": ["up_proj"]}, "alpha_pattern is an object"),
    ):
        bad = save_adapter(base, tmp_path / f"bad-{what}", 0)
        edit(bad, **changes)
        refused(what, bad)
    refused("no document has the id 'good'", good, documents=DOCUMENTS)
    refused("another model's", good, model=new_base(intermediate_size=64))
    refused("another model's", good, model=new_base("gpt2"))
    refused("codec q8", good, codec="q8")
    refused("was made for None", good, BaseModelMissing, model=None)
    edit(good, base_model_name_or_path=str(tmp_path))
    refused("--model", good, BaseModelMissing, model=None)

    broken = save_adapter(base, tmp_path / "broken", 0)
    weights = broken / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({k: t for k, t in tensors.items() if not k.endswith("0.mlp.up_proj.lora_B.weight")}, weights)
    refused("layers.0.mlp.up_proj has no lora_B", broken)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    refused("lm_head.weight", broken)
    flat = {k: t[:0] if "lora_A" in k else t[:, :0].contiguous() for k, t in tensors.items()}
    save_file(flat, weights)
    refused("no LoRA of a linear layer", broken)
    save_file(tensors, weights)
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("no whole safetensors file", broken)
    weights.rename(broken / "adapter_model.bin")
    refused("pickled", broken)

    save_poly(base, tmp_path / "mixed" / "poly", 1)
    refused("3 tasks, but 2 documents", tmp_path / "mixed", documents=DOCUMENTS[:2])
    edit(tmp_path / "mixed" / "poly", n_skills=7)
    refused("n_skills=7", tmp_path / "mixed")
    edit(tmp_path / "mixed" / "poly", n_skills=4)
    save_adapter(base, tmp_path / "mixed" / "lora", 0)
    refused("one Poly checkpoint", tmp_path / "mixed")


def test_prags_folders_and_another_file(
    new_base: Callable[..., BaseModel], tmp_path: Path, prag: tuple[Path, Path]
) -> None:
    folders, file = prag
    base = new_base()
    file.write_text(json.dumps(json.loads(file.read_text())[:1]))
    with pytest.raises(InvalidInput, match="no passage 0 of question 1"):
        polyprag.import_peft(folders, tmp_path / "s", base, documents=read_prag(file))
    with pytest.raises(InvalidInput, match="name the one above"):
        polyprag.import_peft(folders / "data_0", tmp_path / "s", base, documents=read_prag(file))


# --- the commands -------------------------------------------------------------------------------------------


def test_commands(
    new_base: Callable[..., BaseModel], tmp_path: Path, prag: tuple[Path, Path], model_folder: Path
) -> None:
    folders, file = prag

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    store = tmp_path / "prag.polyprag"
    out = run("import", folders, store, "--corpus", file, "--format", "prag", "--model", model_folder)
    assert "4 documents, a LoRA each; 3 experts of rank 2" in out
    assert "1 adapters left out" in out
    with Store.open(store) as opened:
        a, b = (opened.search(name, 1)[0].id for name in ("amber", "birch"))
    assert "rank 4, exact" in run("export", store, tmp_path / "lora", a, b, "--weight", 1, "--weight", 1)
    written = json.loads(run("export", store, tmp_path / "small", a, b, "--rank", 3, "--json"))
    assert (written["rank"], written["exact_rank"], written["documents"]) == (3, 4, [a, b])
    assert 0 < written["error"] < 1
    assert f"of 4 that would be exact: {written['error']:.2%}" in run(
        "export", store, tmp_path / "again", a, b, "--rank", 3
    )
    options = ["--merged", "--model", model_folder, "--dtype", "fp32", "--device", "cpu"]
    assert "6 layers merged, as float32" in run("export", store, tmp_path / "merged", a, *options)
    base = new_base()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    same(logits(merged, IDS), peft_logits(base, folders / "data_0" / "passage_0"))
    with pytest.raises(InvalidInput, match="--rank"):
        run("export", store, tmp_path / "no", a, "--merged", "--rank", 2)
    listed = json.loads(run("import", folders, tmp_path / "by-path", "--model", model_folder, "--json"))
    assert listed == {"kind": "lora", "documents": 4, "unrouted": 0, "experts": 4, "rank": 2, "repeated": 0}
