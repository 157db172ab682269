"""Encoding and adding on a tiny model: the store keeps what was trained, and no failure costs the work."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import polyprag.augment.local
import polyprag.encode
import warm
from conftest import left_in
from machine import Mount, no_rights
from polyprag import Combination, Document, Store, cli
from polyprag.augment import Augmentation, AugmentSettings, Pair
from polyprag.augment.local import LocalAugmenter
from polyprag.encode import (
    BY_SCORE,
    Recipe,
    Silent,
    Written,
    add,
    encode,
    stored_routes,
    training_pairs,
    work_folder,
)
from polyprag.engine import Engine
from polyprag.errors import BaseModelMismatch, CorpusError, CorruptStore, DuplicateId, InvalidInput
from polyprag.models import BaseModel, fingerprint, passage_text
from polyprag.recoding import recode
from polyprag.router import Router, text_features
from polyprag.samples import Sample
from polyprag.trainer import Encoding, Progress, TrainSettings

NAMES = ["amber", "birch", "coral", "denim"]
DOCUMENTS = [Document(f"d{i}", f"The {n} mill stands in Ost.", f"Mill {n}") for i, n in enumerate(NAMES)]
NEW = [Document(f"n{i}", f"The {n} bridge spans the Tarn.", f"Bridge {n}") for i, n in enumerate(NAMES[:2])]
RECIPE = Recipe(
    augment=AugmentSettings(pairs=2, rewrite=False, sentences=2),
    train=TrainSettings(code_dim=6, experts=4, alpha=16.0, epochs=2, expert_lr=0.01, checkpoint_seconds=1e9),
    add_epochs=2,
)
TABLE = replace(RECIPE, train=replace(RECIPE.train, routing="table"))
SHARES = replace(TABLE, train=replace(TABLE.train, phi="sigmoid", from_depth=0.0))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "mills.polyprag"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Encoding]:
    """What the trainings of a test returned."""
    found: list[Encoding] = []
    train = polyprag.encode.train

    def spy(*arguments: Any, **more: Any) -> Encoding:
        found.append(train(*arguments, **more))
        return found[-1]

    monkeypatch.setattr(polyprag.encode, "train", spy)
    return found


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither augmentation nor training may begin."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(polyprag.encode, "train", refuse)
    monkeypatch.setattr(polyprag.encode, "augment", refuse)


def hashes(path: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in path.iterdir()
        if p.suffix == ".safetensors" or p.name.startswith(("experts", "decoder"))
    }


# --- what is trained is what is kept ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "codec", "kept_as", "kind", "bound"),
    [
        (RECIPE, None, "code(6,int4)", "code", 1 / 4),
        (RECIPE, "f16", "f16", "z", 1 / 1000),
        (TABLE, None, "q8", "z", 1 / 120),
        (TABLE, "f32", "f32", "z", 0.0),
        (RECIPE, "code(6)", "code(6)", "code", 1 / 120),
        (RECIPE, "q4", "q4", "z", 1 / 4),
        (SHARES, "sparse(4)", "sparse(4)", "w", 1 / 100),
    ],
)
def test_the_store_keeps_the_routes_that_were_trained(
    path: Path,
    tiny_base: BaseModel,
    trained: list[Encoding],
    recipe: Recipe,
    codec: str | None,
    kept_as: str,
    kind: Any,
    bound: float,
) -> None:
    before = [(name, id(module)) for name, module in tiny_base.model.named_modules()]
    encode(tiny_base, DOCUMENTS, path, recipe, codec=codec, combination=Combination(2, "score", 0.5))
    assert [(name, id(module)) for name, module in tiny_base.model.named_modules()] == before
    (encoding,) = trained
    with Store.open(path) as store:
        assert store.verify().documents == len(DOCUMENTS)
        assert (store.spec.codec, list(store)) == (kept_as, [d.id for d in DOCUMENTS])
        assert store.documents(["d2"]) == [DOCUMENTS[2]]
        expected = stored_routes(encoding, store.spec.codec)
        kept = store.routes(list(store), kind)
        np.testing.assert_allclose(kept, expected, rtol=0, atol=bound * np.abs(expected).max())
        assert len({row.tobytes() for row in kept}) == len(DOCUMENTS)
        for name, array in store.experts.items():
            np.testing.assert_array_equal(array, encoding.experts[name].astype(np.float16))
        assert (store.decoder is not None) == kept_as.startswith("code")
        assert store.spec.base_model == fingerprint(tiny_base)
        assert Recipe.from_json(store.spec.recipe) == recipe, "added documents are treated alike"
        combination = store.spec.combination
        assert (combination.k, combination.rule, combination.temperature) == (2, "score", 0.5)
    work = work_folder(path)
    assert left_in(work) == {"augmentation.jsonl", "metrics.jsonl"}, "the checkpoint is gone"
    lines = (work / "augmentation.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [d.id for d in DOCUMENTS]
    with Engine.open(path, tiny_base) as engine:
        assert engine.ask("the coral mill", k=1).documents[0].id == "d2"


def test_further_stores_have_the_routes_as_they_were_trained(
    path: Path, tmp_path: Path, tiny_base: BaseModel, trained: list[Encoding]
) -> None:
    """And not as the first store keeps them, in four bits."""
    also = {tmp_path / "exact": "f32", tmp_path / "bytes": "code(6)"}
    encode(tiny_base, DOCUMENTS, path, RECIPE, also=also)
    (encoding,) = trained
    with Store.open(path) as first, Store.open(tmp_path / "exact") as exact:
        assert first.spec.codec == "code(6,int4)"
        assert exact.spec.codec == "f32"
        assert list(exact) == list(first)
        kept = exact.routes(list(exact), "z")
        np.testing.assert_array_equal(kept, stored_routes(encoding, "f32"))
        assert np.abs(kept - first.routes(list(first), "z")).max() > 1e-3 * np.abs(kept).max()
        for name, array in first.experts.items():
            np.testing.assert_array_equal(exact.experts[name], array)
    with Store.open(tmp_path / "bytes") as store:
        assert store.spec.codec == "code(6)"
    with pytest.raises(FileExistsError):
        encode(tiny_base, DOCUMENTS, tmp_path / "new", RECIPE, also={tmp_path / "exact": "q8"})
    with pytest.raises(InvalidInput, match="codec"):
        encode(tiny_base, DOCUMENTS, tmp_path / "new", RECIPE, also={tmp_path / "other": "code(7)"})
    assert not (tmp_path / "new").exists()


def test_an_interrupt_between_two_stores_costs_neither(
    path: Path, tmp_path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    also, write = {tmp_path / "exact": "f32"}, polyprag.encode._write

    def stopped(writer: Any, *rest: Any) -> int:
        if (tmp_path / "exact").exists():
            raise KeyboardInterrupt
        return write(writer, *rest)

    monkeypatch.setattr(polyprag.encode, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        encode(tiny_base, DOCUMENTS, path, RECIPE, also=also)
    monkeypatch.undo()
    with pytest.raises(FileExistsError):
        encode(tiny_base, DOCUMENTS, path, RECIPE, also={tmp_path / "exact": "q8"})
    encode(tiny_base, DOCUMENTS, path, RECIPE, also=also)
    with Store.open(path) as first, Store.open(tmp_path / "exact") as exact:
        assert list(first) == list(exact)
        for name, array in first.experts.items():
            np.testing.assert_array_equal(exact.experts[name], array)
    assert left_in(work_folder(path)) == {"augmentation.jsonl", "metrics.jsonl"}


def test_logits_from_codes_are_those_of_the_decoder(trained: list[Encoding]) -> None:
    rng = np.random.default_rng(0)
    V, b, c = (rng.normal(size=s).astype(np.float32) for s in ((24, 6), (24,), (5, 6)))
    encoding = Encoding((), {}, (V, b), c, RECIPE.train)
    z = stored_routes(encoding, "f32")
    assert z.shape == (5, 6, 4)
    np.testing.assert_allclose(z.reshape(5, 24), c.astype(np.float64) @ V.T + b, atol=1e-5)
    assert stored_routes(encoding, "code(6)") is c


def test_numbers_as_ids_and_documents_without_title_or_text(path: Path, tiny_base: BaseModel) -> None:
    documents = [
        Document(2**64 - 1, "The amber mill stands in Ost.", ""),
        Document(0, "The birch mill stands in Ost.", None),
        Document(7, None, "A title alone"),
    ]
    augmentations = encode(tiny_base, documents, path, RECIPE)
    assert [a.id for a in augmentations] == [2**64 - 1, 0, 7]
    with Store.open(path) as store:
        assert store.spec.id_type == "u64"
        assert list(store) == [2**64 - 1, 0, 7]
        assert [store.search(q, 1)[0].id for q in ("amber", "birch", "title")] == [2**64 - 1, 0, 7]
        assert store.routes([7]).shape == (1, 3, 4)


def test_one_document_is_a_corpus(path: Path, tiny_base: BaseModel) -> None:
    encode(tiny_base, DOCUMENTS[:1], path, RECIPE, keep_text=False)
    with Engine.open(path, tiny_base) as engine:
        assert engine.ask("amber", k=3).documents[0].weight == 1
        assert engine.store.documents(["d0"])[0].text is None
        assert not engine.store.spec.keep_text


def test_other_scripts_are_encoded_and_found_by_their_questions(path: Path, tiny_base: BaseModel) -> None:
    texts = {
        "japanese": ("灯台は1874年に羽港で点灯されました。", "「灯台」はどこですか？"),
        "arabic": ("تقع المنارة في ميناء الريشة", "أين المنارة؟"),
        "greek": ("Ο φάρος βρίσκεται στο λιμάνι", "πού είναι ο ΦΆΡΟΣ;"),
        "thai": ("ประภาคารตั้งอยู่ที่ท่าเรือขนนก", "ประภาคารอยู่ที่ไหน"),
    }
    encode(tiny_base, [Document(name, text) for name, (text, _) in texts.items()], path, RECIPE)
    with Engine.open(path, tiny_base) as engine:
        answers = engine.ask_batch([question for _, question in texts.values()], k=1)
        assert [[(d.id, d.weight) for d in a.documents] for a in answers] == [[(name, 1.0)] for name in texts]


def test_a_huge_passage_costs_no_more_than_its_beginning(
    path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = " ".join(f"Word{i} lies at {i}" for i in range(50_000))[: 1 << 20]
    documents = [Document("huge", f"{words} quagga"), *DOCUMENTS[:2]]
    prompts: list[str] = []
    generate = polyprag.augment.local.generate

    def spy(base: BaseModel, given: list[str], *more: Any, **options: Any) -> Any:
        prompts.extend(given)
        return generate(base, given, *more, **options)

    monkeypatch.setattr(polyprag.augment.local, "generate", spy)
    begun = time.process_time()
    encode(tiny_base, documents, path, replace(RECIPE, augment=replace(RECIPE.augment, rewrite=True)))
    assert time.process_time() - begun < 30
    assert 0 < max(map(len, prompts)) < 2000
    with Store.open(path) as store:
        assert store.search("quagga", 1)[0].id == "huge"
        assert store.documents(["huge"])[0].text == f"{words} quagga"


# --- refused before any work ------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "folder", "dangling link"])
def test_what_is_there_is_left_alone(path: Path, tiny_base: BaseModel, no_work: None, what: str) -> None:
    if what == "file":
        path.write_text("precious")
    elif what == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.with_name("nowhere"))
    with pytest.raises(FileExistsError, match="already") as refused:
        encode(tiny_base, DOCUMENTS, path, RECIPE)
    assert refused.value.filename == str(path)
    assert list(path.parent.iterdir()) == [path]


def test_what_the_store_would_refuse_is_refused_first(
    path: Path, tiny_base: BaseModel, no_work: None
) -> None:
    def refuse(error: type[Exception], match: str, *, documents: Any = DOCUMENTS, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            encode(tiny_base, documents, path, **{"recipe": RECIPE, **changes})
        assert list(path.parent.iterdir()) == []

    refuse(CorpusError, "empty", documents=[])
    refuse(DuplicateId, "'d0' appears twice", documents=[*DOCUMENTS, DOCUMENTS[0]])
    refuse(InvalidInput, r"the id 3 is a number.*one kind", documents=[*DOCUMENTS, Document(3, "x")])
    refuse(InvalidInput, "trained as a table; use f32, f16, q8", recipe=TABLE, codec="code(6)")
    refuse(InvalidInput, r"codes of 6 numbers; use code\(6,int4\), code\(6\)", codec="code(64)")
    refuse(InvalidInput, "codec", codec="f12")
    refuse(InvalidInput, "expert_dtype: expected one of float32, .*, got 'f16'", expert_dtype="f16")
    nothing = replace(RECIPE, train=replace(RECIPE.train, targets=("nothing",)))
    refuse(InvalidInput, "no linear layer", recipe=nothing)
    dated = [*DOCUMENTS, Document("dated", "x", metadata={"year": "1990"})]
    refuse(InvalidInput, "'dated': metadata field 'year'.*'1990'", documents=dated, filters={"year": "i64"})


def test_a_store_is_filtered_by_what_was_declared(path: Path, tiny_base: BaseModel) -> None:
    dated = [Document(d.id, d.text, d.title, {"year": 1990 + number}) for number, d in enumerate(DOCUMENTS)]
    encode(tiny_base, dated, path, RECIPE, filters={"year": "i64"})
    with Store.open(path) as store:
        found = store.search(DOCUMENTS[1].title or "", filter={"year": 1991})
        assert [hit.id for hit in found] == [DOCUMENTS[1].id]
    late = Document("late", "The late mill stands in Ost.", "Late mill", {"year": "soon"})
    with pytest.raises(InvalidInput, match="'late': metadata field 'year'"):
        add(tiny_base, [late], path)
    assert (
        not path.with_name(f"{path.name}.work").joinpath("added.jsonl").exists()
    )  # nothing was written for it


def test_no_right_to_write(tmp_path: Path, tiny_base: BaseModel, no_work: None) -> None:
    fingerprint(tiny_base)  # so that nothing is left to be imported
    locked, free = tmp_path / "locked", tmp_path / "free"
    locked.mkdir()
    free.mkdir()
    free.chmod(0o777)
    with no_rights(locked):
        with pytest.raises(PermissionError) as refused:
            encode(tiny_base, DOCUMENTS, locked / "s", RECIPE)
        assert refused.value.filename == str(locked / "s.work")
        with pytest.raises(PermissionError, match="--work") as refused:
            encode(tiny_base, DOCUMENTS, free / "s", RECIPE, work=locked)
        assert refused.value.filename == str(locked)
        with pytest.raises(PermissionError, match="store cannot be written") as refused:
            encode(tiny_base, DOCUMENTS, locked / "s", RECIPE, work=free / "work")
        assert refused.value.filename == str(locked)
    assert list(locked.iterdir()) == []


def test_the_folder_of_a_new_store_is_made(
    tmp_path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    encode(tiny_base, DOCUMENTS, "a/b/s", RECIPE, work=Path("elsewhere"))
    assert len(Store.open("a/b/s")) == len(DOCUMENTS)
    assert (tmp_path / "elsewhere" / "augmentation.jsonl").exists()
    assert not (tmp_path / "a/b/s.work").exists()


# --- interrupted ------------------------------------------------------------------------------------

# Small steps, and slow ones: a tiny model is trained before somebody has pressed a key.
COMMAND = """
import time
import polyprag.augment.local, polyprag.cli
from polyprag.progress import Bars

def slowly(show):
    return lambda *what: (show(*what), time.sleep(0.5))

polyprag.augment.local.DOCUMENTS_A_STEP = 4
Bars.augmenting, Bars.training = slowly(Bars.augmenting), slowly(Bars.training)
polyprag.cli.main()
"""


def interrupt_at(text: str, *arguments: str) -> tuple[int, str]:
    """Run the command in a terminal, press Ctrl-C once it shows ``text``; exit code and all it showed."""
    master, slave = pty.openpty()
    terminal = {"TERM": "xterm", "COLUMNS": "300", "NO_COLOR": "1"}
    child = warm.start(COMMAND, *arguments, env=terminal, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    shown, sent = b"", False
    try:
        while True:
            try:
                piece = os.read(master, 65536)
            except OSError:  # how a terminal says that nobody is left
                break
            if not piece:
                break
            shown += piece
            if not sent and text.encode() in shown:
                warm.send(child, signal.SIGINT)
                sent = True
        return warm.ended(child, 60), shown.decode(errors="replace")
    finally:
        child.kill()
        os.close(master)


def test_ctrl_c_costs_nothing(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [
        {"id": f"{i}", "title": f"Mill {i}", "text": f"Mill {i} is old. It lies in Ost."} for i in range(16)
    ]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(store: Path) -> list[str]:
        options = f"--model {model_folder} --device cpu --dtype fp32 --epochs 20 --pairs 2 --code-dim 6"
        return ["encode", str(corpus), str(store), *options.split()]

    store = tmp_path / "s"
    augmentation, checkpoint = (work_folder(store) / name for name in ("augmentation.jsonl", "checkpoint.pt"))
    code, shown = interrupt_at("4/16", *command(store))
    assert code == 130, shown
    assert "the same command goes on from there" in shown
    assert "Traceback" not in shown
    first = augmentation.read_bytes()
    assert 4 <= first.count(b"\n") < 16
    assert not checkpoint.exists()

    code, shown = interrupt_at("Training", *command(store))
    assert code == 130, shown
    assert "Traceback" not in shown
    assert augmentation.read_bytes().startswith(first), "what was written is not written anew"
    assert augmentation.read_bytes().count(b"\n") == 16
    assert checkpoint.exists()
    assert not store.exists()

    monkeypatch.setattr(polyprag.augment.local, "DOCUMENTS_A_STEP", 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for path in (store, tmp_path / "at once"):
            monkeypatch.setattr(sys, "argv", ["polyprag", *command(path)])
            cli.main()
    finally:
        torch.set_num_threads(threads)
    assert not checkpoint.exists()
    with Store.open(store) as one, Store.open(tmp_path / "at once") as other:
        assert list(one) == list(other)
        ids = list(one)
        assert one.documents(ids) == other.documents(ids)
        for kind in ("code", "z", "w"):
            assert one.routes(ids, kind).tobytes() == other.routes(ids, kind).tobytes()
        assert {n: a.tobytes() for n, a in one.experts.items()} == {
            n: a.tobytes() for n, a in other.experts.items()
        }
        one.verify()


class Stop(Silent):
    """Presses Ctrl-C once so many documents or steps are done."""

    def __init__(self, *, documents: int | None = None, steps: int | None = None) -> None:
        self.documents, self.steps = documents, steps

    def augmenting(self, done: int, total: int) -> None:
        if done == self.documents:
            raise KeyboardInterrupt

    def training(self, progress: Progress) -> None:
        if progress.step == self.steps:
            raise KeyboardInterrupt


def test_a_run_with_other_settings_does_not_take_up_the_checkpoint(path: Path, tiny_base: BaseModel) -> None:
    with pytest.raises(KeyboardInterrupt):
        encode(tiny_base, DOCUMENTS, path, RECIPE, reporter=Stop(steps=1))
    other = replace(RECIPE, train=replace(RECIPE.train, epochs=3))
    with pytest.raises(polyprag.errors.CheckpointMismatch, match=r"checkpoint\.pt.*delete it"):
        encode(tiny_base, DOCUMENTS, path, other)
    encode(tiny_base, DOCUMENTS, path, RECIPE)
    assert len(Store.open(path)) == len(DOCUMENTS)


# --- a full disk ------------------------------------------------------------------------------------


class FillsUp(Silent):
    """Leaves no byte free on a disk once the augmentation or the training has come to its end."""

    def __init__(self, filler: Path, when: str) -> None:
        self.filler, self.when = filler, when

    def fill(self) -> None:
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 4096)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def augmenting(self, done: int, total: int) -> None:
        if (self.when, done) in (("augmentation", 0), ("checkpoint", total)):
            self.fill()

    def training(self, progress: Progress) -> None:
        if self.when == "store" and progress.step == progress.steps:
            self.fill()


@pytest.mark.parametrize("when", ["augmentation", "checkpoint", "store"])
def test_a_full_disk_costs_nothing_that_was_done(
    tmp_path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    at = tmp_path / "small"
    at.mkdir()
    with Mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", at=at):
        work = tmp_path / "work" if when == "store" else at / "work"
        with pytest.raises(OSError, match="No space left") as full:
            encode(tiny_base, DOCUMENTS, at / "s", RECIPE, work=work, reporter=FillsUp(at / "filler", when))
        assert full.value.errno == errno.ENOSPC
        assert not (at / "s").exists()
        augmentation = work / "augmentation.jsonl"
        done = augmentation.read_bytes() if augmentation.exists() else b""
        assert done.count(b"\n") == (0 if when == "augmentation" else len(DOCUMENTS))
        (at / "filler").unlink()

        steps: list[Progress] = []
        again = Silent()
        monkeypatch.setattr(again, "training", steps.append)
        encode(tiny_base, DOCUMENTS, at / "s", RECIPE, work=work, reporter=again)
        assert augmentation.read_bytes().startswith(done)
        assert (not steps) == (when == "store"), "a training that was done is not done again"
        with Store.open(at / "s") as store:
            store.verify()
            assert len(store) == len(DOCUMENTS)


# --- adding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "codec", "kind"), [(RECIPE, "code(6)", "code"), (TABLE, None, "z"), (SHARES, "sparse(4)", "w")]
)
def test_adding_changes_nothing_but_routes(
    path: Path, tiny_base: BaseModel, trained: list[Encoding], recipe: Recipe, codec: str | None, kind: Any
) -> None:
    encode(tiny_base, DOCUMENTS, path, recipe, codec=codec)
    before = hashes(path)
    with Store.open(path) as store:
        assert repr(store.spec.combination) == repr(BY_SCORE)
        ids = list(store)
        old = store.routes(ids, kind)
        epochs = 3 if recipe is TABLE else None
        assert add(tiny_base, NEW, path, epochs=epochs) == len(NEW)
        assert list(store) == ids, "who reads on keeps the generation"
        store.refresh()
        assert list(store) == [*ids, "n0", "n1"]
        assert store.routes(ids, kind).tobytes() == old.tobytes()
        new = store.routes(["n0", "n1"], kind)
        expected = stored_routes(trained[1], store.spec.codec)
        bound = np.abs(expected).max() / (40 if kind == "w" else 100)
        np.testing.assert_allclose(new, expected, rtol=0, atol=bound)
        assert np.abs(new - old.mean(0)).max() > 1e-3, "they were trained"
        assert trained[1].settings.epochs == (epochs or recipe.add_epochs)
        assert trained[1].settings.code_lr == recipe.add_code_lr
        assert store.search("amber bridge", 1)[0].id == "n0"
        store.verify()
    assert before
    assert hashes(path).items() >= before.items()
    left = {"augmentation.jsonl", "metrics.jsonl", "added.jsonl", "added-metrics.jsonl"}
    assert left_in(work_folder(path)) == left


def test_known_ids_are_refused_left_out_or_replaced(
    path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = Document("d1", "The birch mill burnt down.", "Mill birch")
    encode(tiny_base, DOCUMENTS, path, RECIPE)
    with monkeypatch.context() as forbidden:
        forbidden.setattr(polyprag.encode, "augment", lambda *_: pytest.fail("work was begun"))
        with pytest.raises(DuplicateId, match=r"'d1'.*replace.*skip"):
            add(tiny_base, [NEW[0], changed], path)
        assert add(tiny_base, [changed, DOCUMENTS[0]], path, on_duplicate="skip") == 0
        with pytest.raises(InvalidInput, match="the id 5 is a number, but this store has strings"):
            add(tiny_base, [Document(5, "x")], path)
        with pytest.raises(CorpusError, match="empty"):
            add(tiny_base, [], path)
    assert add(tiny_base, [NEW[0], changed], path, on_duplicate="skip") == 1
    with Store.open(path) as store:
        assert (store.generation, len(store)) == (2, 5)
        assert store.documents(["d1"]) == [DOCUMENTS[1]]
        others = store.routes(["d0", "n0"], "code")
    assert add(tiny_base, [changed], path, on_duplicate="replace") == 1
    with Store.open(path) as store:
        assert len(store) == 5
        assert store.documents(["d1"]) == [changed]
        assert [hit.id for hit in store.search("burnt")] == ["d1"]
        assert store.routes(["d0", "n0"], "code").tobytes() == others.tobytes()


def test_new_routes_start_where_the_whole_store_is(
    make_store: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where its first documents are: a corpus often comes in order."""
    monkeypatch.setattr(polyprag.encode, "_SAMPLE", 3)
    documents = [Document(i, f"Mill {i}.") for i in range(8)]
    with Store.open(make_store(tmp_path / "s", documents)) as store:
        routes = polyprag.encode._frozen(store, RECIPE.train).routes
        assert len(routes) == 3
        assert not np.array_equal(routes, store.routes([0, 1, 2], "z"))


def test_an_interrupted_addition_goes_on_to_the_same_routes(tmp_path: Path, tiny_base: BaseModel) -> None:
    routes = []
    for name, stops in (("a", []), ("b", [Stop(documents=2), Stop(steps=1)])):
        encode(tiny_base, DOCUMENTS, tmp_path / name, RECIPE)
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                add(tiny_base, NEW, tmp_path / name, reporter=stop)
            assert len(Store.open(tmp_path / name)) == len(DOCUMENTS)
        assert add(tiny_base, NEW, tmp_path / name) == 2
        routes.append(Store.open(tmp_path / name).routes(["n0", "n1"], "code").tobytes())
    assert routes[0] == routes[1]


@pytest.mark.parametrize("own", [True, False])
def test_added_documents_are_trained_on_samples_of_their_own(
    path: Path, tiny_base: BaseModel, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = RECIPE if own else replace(RECIPE, add_samples=RECIPE.samples)
    encode(tiny_base, DOCUMENTS, path, recipe)
    seen: list[Sample] = []
    train = polyprag.encode.train

    def spy(base: BaseModel, samples: list[Sample], *arguments: Any, **more: Any) -> Encoding:
        seen.extend(samples)
        return train(base, samples, *arguments, **more)

    monkeypatch.setattr(polyprag.encode, "train", spy)
    pair = Pair("What spans the Tarn?", "a bridge")
    add(tiny_base, NEW, path, written=Written([Augmentation(d.id, (pair,)) for d in NEW], "somebody"))
    texts = [tiny_base.tokenizer.decode(list(s.ids[s.loss_from :])) for s in seen]
    if own:
        assert texts == [" a bridge<end>"] * 2, "answers alone, and none behind its passage"
    else:
        assert len(texts) == 4
        assert all(text.startswith(("Question:", "Bridge")) for text in texts), "every token counts"


def test_pairs_that_were_given_stay_when_others_are_added(path: Path, tiny_base: BaseModel) -> None:
    def given(documents: Sequence[Document], question: str) -> Written:
        return Written([Augmentation(d.id, (Pair(question, "x"),)) for d in documents], "somebody")

    recipe = replace(RECIPE, train=replace(RECIPE.train, epochs=1))
    work = work_folder(path)
    work.mkdir()
    paid = json.dumps({"id": "elsewhere", "pairs": [{"question": "Paid for?", "answer": "yes"}]}) + "\n"
    (work / "augmentation.jsonl").write_text(paid)
    encode(tiny_base, DOCUMENTS, path, recipe, written=given(DOCUMENTS, "First?"))
    assert (work / "augmentation.jsonl").read_text().startswith(paid)
    add(tiny_base, NEW[:1], path, written=given(NEW[:1], "Second?"), epochs=1)
    add(tiny_base, NEW[1:], path, written=given(NEW[1:], "Third?"), epochs=1)
    asked = [question for question, _ in training_pairs(path) or []]
    assert asked == ["Paid for?", *["First?"] * len(DOCUMENTS), "Second?", "Third?"]
    before = (work / "added.jsonl").read_text()
    add(tiny_base, NEW[1:], path, written=given(NEW[1:], "Third?"), epochs=1, on_duplicate="replace")
    assert (work / "added.jsonl").read_text() == before, "what is there is not written twice"
    add(tiny_base, NEW[1:], path, written=given(NEW[1:], "Fourth?"), epochs=1, on_duplicate="replace")
    assert [question for question, _ in training_pairs(path) or []] == [*asked[:-1], "Fourth?"]


def test_adding_from_inside_the_store(
    path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(tiny_base, DOCUMENTS, path, RECIPE)
    monkeypatch.chdir(path)
    assert add(tiny_base, NEW, ".") == 2
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".work"]
    assert work_folder(".") == work_folder(path)


def test_adding_with_another_model_is_refused(
    path: Path,
    tiny_base: BaseModel,
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    encode(tiny_base, DOCUMENTS, path, RECIPE)
    with pytest.raises(BaseModelMismatch):
        add(BaseModel(build_model(seed=1), tokenizer, "other"), NEW, path)
    with pytest.raises(FileNotFoundError):
        add(tiny_base, NEW, path.with_name("missing"))


def test_the_training_pairs_of_a_store(path: Path) -> None:
    assert training_pairs(path) is None
    work = work_folder(path)
    work.mkdir()
    row = {
        "id": "a",
        "pairs": [{"question": "Where is it?", "answer": "Ost"}],
        "rewrite": None,
        "dropped": {},
    }
    (work / "augmentation.jsonl").write_text(json.dumps(row) + "\n")
    assert training_pairs(path) == [("Where is it?", "Ost")]
    row["pairs"] = [{"question": "And since when?", "answer": "1902"}]
    (work / "added.jsonl").write_text(json.dumps(row) + "\n")
    assert training_pairs(path) == [("Where is it?", "Ost"), ("And since when?", "1902")]


# --- an amortised router ----------------------------------------------------------------------------

ROUTER = replace(RECIPE, train=replace(RECIPE.train, router=True))
TWINS = [Document(f"twin{i}", d.text, d.title) for i, d in enumerate([*NEW, *NEW])]


def router_codes(base: BaseModel, store: Store, documents: Sequence[Document]) -> np.ndarray[Any, Any]:
    assert store.router is not None
    texts = [passage_text(d.title, d.text or "") for d in documents]
    return Router.of(store.router).codes(text_features(base, texts))


def close(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any], bound: float = 1 / 100) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound * np.abs(expected).max())


def test_the_store_keeps_the_router(path: Path, tiny_base: BaseModel, trained: list[Encoding]) -> None:
    encode(tiny_base, DOCUMENTS, path, ROUTER)
    (encoding,) = trained
    assert encoding.router is not None
    with Store.open(path) as store:
        assert store.router is not None
        assert store.router.keys() == encoding.router.keys()
        for name, array in store.router.items():
            np.testing.assert_array_equal(array, encoding.router[name])
        assert Recipe.from_json(store.spec.recipe).train.router
        store.verify()


class Read(Silent):
    """Keeps how far reading was, and presses Ctrl-C once so many documents are read."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[tuple[int, int]] = []
        self.stop = stop

    def reading(self, done: int, total: int) -> None:
        self.seen.append((done, total))
        if done == self.stop:
            raise KeyboardInterrupt


def test_routes_that_are_added_start_where_the_router_puts_them(
    path: Path, tiny_base: BaseModel, trained: list[Encoding]
) -> None:
    still = replace(ROUTER, train=replace(ROUTER.train, code_lr=0.0), add_code_lr=0.0)
    encode(tiny_base, DOCUMENTS, path, still, codec="code(6)")
    before, read = hashes(path), Read()
    assert add(tiny_base, NEW, path, reporter=read) == 2
    assert read.seen[-1] == (2, 2)
    with Store.open(path) as store:
        expected = router_codes(tiny_base, store, NEW)
        np.testing.assert_allclose(trained[1].routes, expected, rtol=1e-5, atol=1e-6)
        close(store.routes(["n0", "n1"], "code"), expected)
        store.verify()
    assert hashes(path).items() >= before.items()


@pytest.mark.parametrize(("codec", "bound"), [("code(6)", 1 / 100), ("code(6,int4)", 1 / 4)])
def test_amortised_codes_are_the_routers(
    path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch, codec: str, bound: float
) -> None:
    encode(tiny_base, DOCUMENTS, path, ROUTER, codec=codec)
    before, read = hashes(path), Read()
    for name in ("train", "augment", "build_samples"):
        monkeypatch.setattr(polyprag.encode, name, lambda *_, **__: pytest.fail("work was begun"))
    textless = Document("t", None, "A title alone")
    assert add(tiny_base, [*TWINS, textless], path, amortised=True, reporter=read) == 5
    assert read.seen[-1] == (5, 5)
    assert read.seen == sorted(read.seen)
    with Store.open(path) as store:
        assert (store.generation, len(store)) == (2, len(DOCUMENTS) + 5)
        assert not store.is_routed("t")
        ids = [d.id for d in TWINS]
        expected, kept = router_codes(tiny_base, store, TWINS), store.routes(ids, "code")
        close(kept, expected, bound)
        close(kept[2:], kept[:2], 1 / 100)
        assert np.abs(expected[0] - expected[1]).max() > 1e-4, "other texts, other codes"
        assert store.documents(ids) == TWINS
        store.verify()
    assert hashes(path).items() >= before.items()
    assert left_in(work_folder(path)) == {"augmentation.jsonl", "metrics.jsonl"}


def test_an_interrupted_amortised_addition_keeps_what_it_committed(
    path: Path, tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(tiny_base, DOCUMENTS, path, ROUTER, codec="code(6)")
    monkeypatch.setattr(polyprag.encode, "_BLOCK", 1)
    monkeypatch.setattr(polyprag.encode, "_COMMIT", 2)
    with pytest.raises(KeyboardInterrupt):
        add(tiny_base, TWINS, path, amortised=True, reporter=Read(stop=4))
    with Store.open(path) as store:
        assert list(store)[len(DOCUMENTS) :] == ["twin0", "twin1"]
    with pytest.raises(DuplicateId, match="skip"):
        add(tiny_base, TWINS, path, amortised=True)
    read = Read()
    assert add(tiny_base, TWINS, path, amortised=True, on_duplicate="skip", reporter=read) == 2
    assert read.seen == [(1, 2), (2, 2)]
    with Store.open(path) as store:
        close(store.routes([d.id for d in TWINS], "code"), router_codes(tiny_base, store, TWINS))
        store.verify()
    changed = Document("twin0", "The amber bridge fell.", "Bridge amber")
    assert add(tiny_base, [changed], path, amortised=True, on_duplicate="replace") == 1
    with Store.open(path) as store:
        assert len(store) == len(DOCUMENTS) + len(TWINS)
        close(store.routes(["twin0"], "code"), router_codes(tiny_base, store, [changed]))


def test_what_amortised_adding_cannot_do_is_refused(path: Path, tiny_base: BaseModel) -> None:
    def refuse(match: str, at: Path, **more: Any) -> None:
        before = sorted(p.name for p in at.iterdir())
        with pytest.raises(InvalidInput, match=match):
            add(tiny_base, NEW, at, amortised=True, **more)
        assert sorted(p.name for p in at.iterdir()) == before

    plain, logits = path.with_name("plain"), path.with_name("logits")
    remedy = "no amortised router: encode with --set train.router=true"
    encode(tiny_base, DOCUMENTS, plain, RECIPE)
    refuse(remedy, plain)
    encode(tiny_base, DOCUMENTS, logits, ROUTER, codec="f16")
    assert Store.open(logits).router is None
    refuse(remedy, logits)
    assert add(tiny_base, NEW, logits) == 2, "they are trained as if there had never been a router"

    encode(tiny_base, DOCUMENTS, path, ROUTER)
    refuse("no pairs are needed", path, written=Written([], "somebody"))
    refuse("no pairs are needed", path, augmenter=LocalAugmenter(tiny_base))
    read = 3 * tiny_base.model.config.hidden_size
    with Store.open(path) as store:
        for name, router, match in [
            ("foreign", {"a": np.ones(2, np.float32)}, "these arrays are no router"),
            ("narrow", Router(7, 6).arrays(), "makes 6 numbers of 7"),
            ("long", Router(read, 7).arrays(), f"makes 7 numbers of {read}"),
        ]:
            other = path.with_name(name)
            with Store.create(other, store.spec, store.experts, store.decoder, router=router):
                pass
            refuse(match, other)


def test_a_router_is_recoded_with_its_decoder(path: Path, tiny_base: BaseModel) -> None:
    encode(tiny_base, DOCUMENTS, path, ROUTER)
    for codec, kept in (("code(6,int4)", True), ("code(3)", False), ("q8", False)):
        dest = path.with_name(codec)
        note = recode(path, dest, codec=codec).note
        assert note is not None
        assert ("router is left out" in note) != kept
        assert (Store.open(dest).router is not None) == kept


def test_without_the_router_that_made_its_routes_a_store_trains_those_of_new_documents(
    path: Path, tiny_base: BaseModel, trained: list[Encoding]
) -> None:
    dest = path.with_name("q8")
    encode(tiny_base, DOCUMENTS, path, replace(ROUTER, train=replace(ROUTER.train, router_alone=1.0)))
    recode(path, dest, codec="q8")
    assert add(tiny_base, NEW, path) == 2
    assert len(trained) == 1, "the router made their codes"
    assert add(tiny_base, NEW, dest) == 2
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"train": {"epochs": "four"}}, r"recipe\.train\.epochs: expected a whole number, found 'four'"),
        ({"train": {"epochs": True}}, r"recipe\.train\.epochs: expected a whole number"),
        ({"train": {"epochs": 0}}, r"recipe\.train: epochs is at least 1"),
        ({"train": []}, r"recipe\.train: expected an object"),
        ({"train": {"targets": ["up_proj", 3]}}, r"recipe\.train\.targets: expected a list of a text"),
        ({"samples": {"loss_on": "questions"}}, r"recipe\.samples\.loss_on: expected one of 'all', 'answer'"),
        ({"augment": {"prompts": {"rewrite": None}}}, r"recipe\.augment\.prompts"),
        ({"augment": None}, r"recipe\.augment: expected an object"),
        ({"add_epochs": "x"}, r"recipe\.add_epochs: expected a whole number"),
        ({"augmenter": 5}, r"recipe\.augmenter: expected a text or null"),
    ],
)
def test_a_damaged_recipe_is_named_with_its_file_and_what_to_do(
    make_store: Callable[..., Path], tiny_base: BaseModel, path: Path, damage: dict[str, Any], said: str
) -> None:
    make_store(path, DOCUMENTS, recipe=damage)
    with pytest.raises(CorruptStore, match=said) as raised:
        add(tiny_base, [Document("new", "A new mill.")], path)
    assert "manifest-00000001.json" in str(raised.value)
    assert "rollback" in str(raised.value)


@pytest.mark.parametrize("value", [{}, {"train": {"epochs": 7, "of a later version": 1}, "news": []}])
def test_a_recipe_of_another_version_is_read(value: dict[str, Any]) -> None:
    epochs = value.get("train", {}).get("epochs", TrainSettings.epochs)
    assert Recipe.from_json(value) == Recipe(train=TrainSettings(epochs=epochs))
