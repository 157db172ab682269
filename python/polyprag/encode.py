"""Encoding: documents in, store out. And adding: new documents into a store that exists."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from polyprag._polyprag import Combination, Document, Module, Store, StoreSpec, Writer
from polyprag.augment import (
    Augmentation,
    Augmenter,
    AugmentSettings,
    append_augmentations,
    augment,
    read_pairs,
)
from polyprag.augment.local import LocalAugmenter
from polyprag.engine import store_experts
from polyprag.errors import CorpusError, CorruptStore, DuplicateId, InvalidInput
from polyprag.features import document_features, features_in_file
from polyprag.fields import read_fields
from polyprag.filters import FilterKind
from polyprag.filters import check as check_filters
from polyprag.jsonl import absent, write_atomic
from polyprag.layers import ModuleShape
from polyprag.metrics import Metrics
from polyprag.models import BaseModel, check_fingerprint, fingerprint
from polyprag.router import Router, feature_size
from polyprag.routing import Phi
from polyprag.samples import Sample, SampleSettings, build_samples
from polyprag.trainer import forget, rows_folder, train, train_loras
from polyprag.training import Encoding, Progress, TrainSettings
from polyprag.world import World

AUGMENTATION = "augmentation.jsonl"
ADDED = "added.jsonl"
CHECKPOINT = "checkpoint.pt"
LORAS = "loras.pt"
FURTHER = "further.json"  # the stores that are written beside the one that was asked for, until all are there

# A document that BM25 ranks well above the others leads; ones that are as good count alike (docs/method.md).
BY_SCORE = Combination(k=3, rule="score", temperature=0.15)
SUMMED = Combination(k=3, rule="sum")  # PRAG (arXiv 2501.15915)
AVERAGED = Combination(k=3, rule="mean")  # DyPRAG (arXiv 2503.23895)
OWN_EXPERT = "sparse(1)"  # the codec of a store of one LoRA a document: the number of its expert

# What the LoRAs that are learnt from have in common with what learns.
_SAME_LAYERS = ("rank", "alpha", "targets", "from_depth", "shard")
_OF_LOGITS = ["f32", "f16", "q8", "q4", "q2", "q1", "sparse(k)"]
_BLOCK = 4_096  # documents that are written, or read and written, at a time
_SAMPLE = 4_096  # documents whose routes stand for all
_REACH = 1 << 20  # ids that are gone through to draw them: adding to a huge store must not read all
_COMMIT = 50_000  # documents of a commit, where nothing but reading would be lost

ExpertDtype: TypeAlias = Literal["float32", "bfloat16", "float16", "int8"]


@dataclass(frozen=True)
class Recipe:
    """All settings of an encoding; kept in the store, so that added documents are treated alike.

    ``add_samples``, ``add_epochs``, ``add_code_lr``: what the routes of added documents are trained on, how
    often, and how fast codes are. Experts that stay cannot learn the words of new questions, so a route's few
    numbers go to the answers alone; and nothing else moves, so that codes may move faster.
    ``teacher``: how one LoRA a document is trained before all else, where training learns from them (DyPRAG).
    Its routing, rank, alpha and layers count for nothing: they are those of ``train``.
    ``augmenter``: the model that wrote the pairs; None is the base model. :func:`encode` fills it in.
    """

    augment: AugmentSettings = AugmentSettings()
    samples: SampleSettings = SampleSettings()
    train: TrainSettings = TrainSettings()
    add_samples: SampleSettings = SampleSettings(with_passage=0, loss_on="answer")
    add_epochs: int = 12
    add_code_lr: float = 1.0
    teacher: TrainSettings | None = None
    augmenter: str | None = None

    def __post_init__(self) -> None:
        if self.add_epochs < 1:
            raise InvalidInput(f"add_epochs is at least 1, not {self.add_epochs}")
        if not (math.isfinite(self.add_code_lr) and self.add_code_lr >= 0):
            raise InvalidInput(f"add_code_lr is a number of at least 0, not {self.add_code_lr}")

    def seeded(self, seed: int) -> Recipe:
        """The same recipe, with one seed for the whole run."""
        return replace(
            self,
            augment=replace(self.augment, seed=seed),
            train=replace(self.train, seed=seed),
            teacher=None if self.teacher is None else replace(self.teacher, seed=seed),
        )

    @property
    def loras(self) -> TrainSettings | None:
        """How the LoRAs are trained from which training learns, if it does."""
        if not self.train.taught:
            return None
        same = {name: getattr(self.train, name) for name in _SAME_LAYERS}
        # Their weights and mixing are those of one LoRA alone, whatever is made of them.
        return replace(self.teacher or TrainSettings(), routing="lora", **same)

    @property
    def amortised(self) -> bool:
        """Whether the routes of the documents are made of their texts alone."""
        return self.train.router and self.train.router_alone == 1.0

    def amortises(self, store: Store) -> bool:
        """Whether the routes of documents that are added to a store of this recipe are made so, too: a router
        does not come along to every codec.
        """
        return self.amortised and store.router is not None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Recipe:
        """The recipe of a store; what it does not say, or says of a later version, is left at the default.

        Raises:
            InvalidInput: a setting is of another type than it takes, or out of its range.
        """
        return read_fields(cls(), value, "recipe")

    @classmethod
    def of(cls, store: Store) -> Recipe:
        """The recipe of a store. Raises CorruptStore if its manifest does not hold one."""
        try:
            return cls.from_json(store.spec.recipe)
        except InvalidInput as error:
            raise CorruptStore(
                f"{store.path}/manifest-{store.generation:08}.json: its recipe cannot be read ({error}); "
                "go back to the generation before (polyprag rollback), take a copy, or encode anew"
            ) from error


@dataclass(frozen=True)
class Written:
    """Augmentations that are there already, and the model that wrote them."""

    augmentations: Sequence[Augmentation]
    by: str

    def of(self, documents: Sequence[Document]) -> Written:
        """Those of ``documents``, in their order. Raises CorpusError if a document has none."""
        by_id = {a.id: a for a in self.augmentations}
        missing = next((d.id for d in documents if d.id not in by_id), None)
        if missing is not None:
            raise CorpusError(f"no augmentation is given for the document {missing!r}: add it")
        return replace(self, augmentations=[by_id[d.id] for d in documents])


class Reporter(Protocol):
    """What long work tells: the CLI draws bars from it."""

    def augmenting(self, done: int, total: int) -> None: ...

    def reading(self, done: int, total: int) -> None: ...

    def training(self, progress: Progress) -> None: ...


class Silent:
    """Reports nothing."""

    def augmenting(self, done: int, total: int) -> None:
        pass

    def reading(self, done: int, total: int) -> None:
        pass

    def training(self, progress: Progress) -> None:
        pass


def encode(
    base: BaseModel,
    documents: Sequence[Document],
    path: str | os.PathLike[str],
    recipe: Recipe = Recipe(),
    *,
    codec: str | None = None,
    also: Mapping[Path, str] = MappingProxyType({}),
    combination: Combination | None = None,
    expert_dtype: ExpertDtype = "float16",
    keep_text: bool = True,
    filters: Mapping[str, FilterKind] = MappingProxyType({}),
    work: Path | None = None,
    augmentation: Path | None = None,
    augmenter: Augmenter | None = None,
    written: Written | None = None,
    reporter: Reporter = Silent(),
) -> list[Augmentation]:
    """Augment, train, and write a new store; returns what the augmentation wrote.

    Args:
        codec: how the store keeps routes; None is ``code(d,int4)`` for code routing and ``q8`` for a table.
        also: further stores of the same routes, each with its codec, to compare what codecs cost: a codec of
            :func:`polyprag.recode` is made from what a store has kept, these are from what was trained.
        combination: how the routes of several documents become one when the store is asked; None is three
            documents by their BM25 scores, or as the papers have it where the recipe is PRAG's (their sum) or
            DyPRAG's (their mean).
        expert_dtype: how the store keeps the experts, which are trained in float32.
        filters: keys of the metadata on which searches can be filtered, each with the kind of its values;
            cannot be changed later.
        work: a folder for the augmentation and the checkpoint, from which an interrupted run goes on;
            None is ``<path>.work``. The augmentation stays there, the checkpoint goes once the store is
            committed.
        augmentation: the augmentation's file, if it is to be elsewhere than in ``work``.
        augmenter: who writes the pairs; None is ``base`` itself.
        written: pairs that are there already, a document each: nobody writes any.

    Raises:
        FileExistsError: there is something at ``path`` already.
        CorpusError: no document.
        DuplicateId, InvalidInput: two documents with one id; ids of two kinds, a codec for other routes,
            metadata of another kind than its filter.
        KeyboardInterrupt: on Ctrl-C; the same call goes on where it stopped.
    """
    target = absent(path)
    further = {os.path.abspath(other): theirs for other, theirs in also.items()}
    folder = work or work_folder(target)
    marks, checkpoint = folder / FURTHER, folder / CHECKPOINT
    # Where a run was stopped while it wrote them, those that are there are its own, and whole.
    going_on = marks.exists() and checkpoint.exists() and json.loads(marks.read_text()) == further
    if not documents:
        raise CorpusError("the corpus is empty: there is nothing to encode")
    _check_ids(documents, type(documents[0].id))
    check_filters(documents, filters)
    # Before the hours of training, so that what is refused is refused now.
    if expert_dtype not in get_args(ExpertDtype):
        known = ", ".join(get_args(ExpertDtype))
        raise InvalidInput(f"expert_dtype: expected one of {known}, got {expert_dtype!r}")
    augmenter = augmenter or LocalAugmenter(base)
    by = written.by if written is not None else augmenter.name
    recipe = replace(recipe, augmenter=None if by == base.name else by)
    # Last the store that was asked for: it is there when all are.
    stores = [
        (to, _spec(base, recipe, documents, kept_as, combination, keep_text, filters))
        for to, kept_as in [*((Path(other), theirs) for other, theirs in further.items()), (target, codec)]
    ]
    if not going_on:
        for other in further:
            absent(other)
    work = prepare_work(target, work)
    world = World.current()
    with world.one_by_one():
        augmentations = _augment(
            augmenter, written, documents, recipe, augmentation or work / AUGMENTATION, reporter
        )
    samples = build_samples(documents, augmentations, base.tokenizer, recipe.samples)
    # Before anything is trained, since training may leave the base model in parts.
    features = _features(base, documents, checkpoint, reporter) if recipe.train.router else None
    loras = None
    if recipe.loras is not None:
        with _told(reporter, work, "loras-metrics") as progress:
            loras = train_loras(
                base, samples, len(documents), recipe.loras, checkpoint=work / LORAS, progress=progress
            )
    with _told(reporter, work, "metrics") as progress:
        encoding = train(
            base,
            samples,
            len(documents),
            recipe.train,
            features=features,
            loras=loras,
            checkpoint=checkpoint,
            progress=progress,
        )
    if world.first:
        write_atomic(marks, json.dumps(further))
        for to, spec in stores:
            if going_on and to is not target and to.exists():
                continue
            # A router makes codes: it goes where the decoder goes.
            codes = spec.codec.startswith("code")
            decoder, router = (encoding.decoder, encoding.router) if codes else (None, None)
            with Store.create(
                to, spec, encoding.experts, decoder, router=router, expert_dtype=expert_dtype
            ) as writer:
                _write(writer, documents, samples, encoding, spec.codec)
        forget(checkpoint)
        forget(work / LORAS)
        marks.unlink()
    world.wait()
    return augmentations


def add(
    base: BaseModel,
    documents: Sequence[Document],
    path: str | os.PathLike[str],
    *,
    on_duplicate: Literal["error", "replace", "skip"] = "error",
    work: Path | None = None,
    augmenter: Augmenter | None = None,
    written: Written | None = None,
    amortised: bool | None = None,
    epochs: int | None = None,
    reporter: Reporter = Silent(),
) -> int:
    """Encode documents into a store that exists: only their routes are trained (Poly-z); returns how many.

    Nothing else in the store changes: experts, decoder and router stay as they are. ``augmenter`` and
    ``written`` are those of :func:`encode`.

    Args:
        amortised: the codes are what the store's router makes of title and text; nothing is augmented, and
            nothing trained. A document without a text gets no route. Every 50,000 documents are committed:
            after Ctrl-C, the same call goes on with ``on_duplicate="skip"``. None: if the routes of the
            store's own documents were made so (DyPRAG's are), their router is there, and no pairs are given.
        epochs: passes over the pairs; None is what the store's recipe says. Where the router makes the codes,
            nothing is trained and it counts for nothing.

    Raises:
        DuplicateId: an id is in the store already and ``on_duplicate`` is ``"error"``.
        InvalidInput: another model than ``base`` wrote the store's pairs, and nothing says who writes these;
            ``amortised``, and the store has no router, or pairs are given; metadata of another kind than
            the store's filter.
        BaseModelMismatch: ``base`` is not the model of the store.
    """
    if not documents:
        raise CorpusError("the corpus is empty: there is nothing to add")
    with Store.open(path) as store:
        check_fingerprint(store.spec.base_model, base)
        _check_ids(documents, int if store.spec.id_type == "u64" else str)
        check_filters(documents, cast(Mapping[str, FilterKind], store.spec.filters))
        recipe = Recipe.of(store)
        if recipe.train.routing == "lora":
            raise InvalidInput(
                f"{store.path} has one LoRA a document and shares nothing that a new one could use: "
                "encode anew"
            )
        if amortised is None:
            amortised = recipe.amortises(store) and augmenter is None and written is None
        if amortised and (augmenter is not None or written is not None):
            raise InvalidInput(
                "amortised: the router reads the texts alone, and no pairs are needed: give neither pairs "
                "nor who writes them"
            )
        router = router_of(base, store) if amortised else None
        # A store names no endpoint: whoever made it could have texts and keys sent anywhere.
        told = amortised or augmenter is not None or written is not None
        if recipe.augmenter not in (None, base.name) and not told:
            raise InvalidInput(
                f"the pairs of this store were written by {recipe.augmenter!r}: say where that model is "
                "(--augment-url), or give pairs that are there already (--augmentation)"
            )
        if on_duplicate != "replace":
            fresh = [d for d in documents if d.id not in store]
            if on_duplicate == "error" and len(fresh) < len(documents):
                # Before hours of training, not after.
                known = next(d.id for d in documents if d.id in store)
                raise DuplicateId(
                    f"the store has a document with id {known!r} already: leave it out, "
                    "or say on_duplicate='replace' or 'skip' (--on-duplicate)"
                )
            documents = fresh
            if written is not None:
                written = written.of(documents)
        if not documents:
            return 0
        world = World.current()
        if router is not None:
            added = 0
            world.wait()  # all have looked for ids that are there, before some more are
            if world.first:
                with store.writer() as writer:
                    added = _read_in(base, documents, writer, router, on_duplicate, reporter)
            world.wait()
            return added
        work = prepare_work(Path(path), work)
        with world.one_by_one():
            augmentations = _augment(
                augmenter or LocalAugmenter(base), written, documents, recipe, work / ADDED, reporter
            )
        samples = build_samples(documents, augmentations, base.tokenizer, recipe.add_samples)
        frozen = _frozen(store, recipe.train)
        if epochs is None:
            epochs = recipe.add_epochs
        settings = replace(frozen.settings, epochs=epochs, code_lr=recipe.add_code_lr)
        checkpoint = work / "added.pt"
        with _told(reporter, work, "added-metrics") as progress:
            encoding = train(
                base,
                samples,
                len(documents),
                settings,
                frozen=frozen,
                features=_features(base, documents, checkpoint, reporter) if settings.router else None,
                checkpoint=checkpoint,
                progress=progress,
            )
        added = 0
        if world.first:
            with store.writer() as writer:
                added = _write(
                    writer, documents, samples, encoding, store.spec.codec, on_duplicate=on_duplicate
                )
            forget(checkpoint)
        world.wait()
    return added


def _features(
    base: BaseModel, documents: Sequence[Document], checkpoint: Path, reporter: Reporter
) -> NDArray[np.float32]:
    """What an amortised router reads of each document, in a file beside the checkpoint."""
    progress = _counted(reporter.reading, len(documents))
    return features_in_file(base, documents, rows_folder(checkpoint), progress=progress)


def router_of(base: BaseModel, store: Store) -> Router:
    """The amortised router of a store. Raises InvalidInput if it has none that fits."""
    if store.router is None:
        raise InvalidInput(
            f"{store.path} has no amortised router: encode with "
            "--set train.router=true and a codec of codes, "
            "or add without --amortised, which trains the routes"
        )
    router = Router.of(store.router)
    found, codes = (router.hidden.in_features, router.out.out_features), store.spec.codec
    features = feature_size(base)
    if found[0] != features or codes not in (f"code({found[1]})", f"code({found[1]},int4)"):
        raise InvalidInput(
            f"{store.path}: its router makes {found[1]} numbers of {found[0]}, but the store keeps {codes} "
            f"and the base model has {features} to read"
        )
    return router.to(base.device)


def _read_in(
    base: BaseModel,
    documents: Sequence[Document],
    writer: Writer,
    router: Router,
    on_duplicate: Literal["error", "replace", "skip"],
    reporter: Reporter,
) -> int:
    """Documents with the codes that the router makes of them, a commit every so many."""
    added = 0
    progress = _counted(reporter.reading, len(documents))
    for begin in range(0, len(documents), _COMMIT):
        chunk = documents[begin : begin + _COMMIT]
        for start in range(0, len(chunk), _BLOCK):
            block = chunk[start : start + _BLOCK]
            if texts := [d for d in block if (d.text or "").strip()]:
                codes = router.codes(document_features(base, texts, progress))
                added += writer.add(texts, codes, on_duplicate=on_duplicate)
            if rest := [d for d in block if not (d.text or "").strip()]:
                added += writer.add(rest, on_duplicate=on_duplicate)
                progress(len(rest))
        writer.commit()
    return added


def _counted(report: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """What takes how many were done just now, and reports how many are done of all."""
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        report(done, total)

    return progress


@contextmanager
def _told(reporter: Reporter, work: Path, name: str) -> Iterator[Callable[[Progress], None]]:
    """What training calls after every step: the first process of all tells of it, and keeps it."""
    if not World.current().first:
        yield lambda progress: None
        return
    with Metrics(work, name) as metrics:

        def progress(step: Progress) -> None:
            metrics.step(step)
            reporter.training(step)

        yield progress


def _write(
    writer: Writer,
    documents: Sequence[Document],
    samples: Sequence[Sample],
    encoding: Encoding,
    codec: str,
    *,
    on_duplicate: Literal["error", "replace", "skip"] = "error",
) -> int:
    """Documents with their routes; one that gave no sample goes without, since nothing trained its route."""
    trained = np.unique([sample.document for sample in samples])
    added = 0
    for begin in range(0, len(trained), _BLOCK):
        some = trained[begin : begin + _BLOCK]
        routes = stored_routes(replace(encoding, routes=encoding.routes[some]), codec)
        added += writer.add([documents[i] for i in some], routes, on_duplicate=on_duplicate)
    if rest := sorted(set(range(len(documents))) - set(trained.tolist())):
        added += writer.add([documents[i] for i in rest], on_duplicate=on_duplicate)
    return added


def work_folder(store: str | os.PathLike[str]) -> Path:
    """Where the augmentation and the checkpoint of a store are, unless another folder was named."""
    target = Path(os.path.abspath(store))  # so that "." has a name
    return target.with_name(target.name + ".work")


def training_pairs(store: str | os.PathLike[str]) -> list[tuple[str, str]] | None:
    """The pairs that encoding and adding left in the work folder; None if the encoding's are not there."""
    folder = work_folder(store)
    if not (folder / AUGMENTATION).exists():
        return None
    return [pair for name in (AUGMENTATION, ADDED) for pair in read_pairs(folder / name)]


def prepare_work(target: Path, work: Path | None) -> Path:
    """The work folder, made and found writable before hours are spent on what could not be kept."""
    folder = work or work_folder(target)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, "the work folder is not writable; name another (--work)", str(folder))
    written = target if target.exists() else Path(os.path.abspath(target)).parent
    written.mkdir(parents=True, exist_ok=True)
    if not os.access(written, os.W_OK | os.X_OK):
        raise PermissionError(13, "the store cannot be written here", str(written))
    return folder


def _check_ids(documents: Sequence[Document], kind: type) -> None:
    """Refuse ids that the store would refuse after the training."""
    seen: set[str | int] = set()
    for document in documents:
        if not isinstance(document.id, kind):
            raise InvalidInput(
                f"the id {document.id!r} is {'a number' if kind is str else 'a string'}, but this store has "
                f"{'strings' if kind is str else 'numbers'}: give all documents ids of one kind"
            )
        if document.id in seen:
            raise DuplicateId(f"the id {document.id!r} appears twice among the documents: leave one out")
        seen.add(document.id)


def stored_routes(encoding: Encoding, codec: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The routes as ``codec`` takes them: codes [n, d], or logits or weights [n, G, K]."""
    if encoding.settings.routing == "lora":
        experts = next(iter(encoding.experts.values())).shape[0]
        own = encoding.routes.astype(np.int64)
        return np.eye(experts, dtype=np.float32)[own][:, np.newaxis]
    if codec.startswith("code"):
        return encoding.routes
    z = encoding.routes
    if encoding.decoder is not None:
        V, b = encoding.decoder
        z = z @ V.T + b
    z = np.ascontiguousarray(z.reshape(len(z), -1, encoding.settings.experts), dtype=np.float32)
    if not codec.startswith("sparse"):
        return z
    phi = Phi(encoding.settings.phi, encoding.settings.top_k)
    return np.ascontiguousarray(phi(torch.from_numpy(z)).numpy())


def _augment(
    augmenter: Augmenter,
    written: Written | None,
    documents: Sequence[Document],
    recipe: Recipe,
    path: Path,
    reporter: Reporter,
) -> list[Augmentation]:
    if written is not None:
        found = [*written.of(documents).augmentations]
        append_augmentations(path, documents, found, written.by)  # for whoever asks what was trained
        return found
    progress = _counted(reporter.augmenting, len(documents))
    return augment(augmenter, documents, recipe.augment, path=path, progress=progress)


def _spec(
    base: BaseModel,
    recipe: Recipe,
    documents: Sequence[Document],
    codec: str | None,
    combination: Combination | None,
    keep_text: bool,
    filters: Mapping[str, FilterKind],
) -> StoreSpec:
    s = recipe.train
    fit = {
        "code": [f"code({s.code_dim},int4)", f"code({s.code_dim})", *_OF_LOGITS],
        "table": _OF_LOGITS,
        "lora": [OWN_EXPERT],
    }[s.routing]
    codec = codec or {"code": fit[0], "table": "q8", "lora": OWN_EXPERT}[s.routing]
    if codec not in fit and (s.routing == "lora" or codec.startswith("code")):
        made = {"code": f"codes of {s.code_dim} numbers", "table": "a table", "lora": "one LoRA a document"}
        raise InvalidInput(f"codec {codec}: the routes are trained as {made[s.routing]}; use {_any_of(fit)}")
    targets = s.layers(base.model)
    if s.routing == "lora":
        targets = [replace(m, group=0) for m in targets]
    return StoreSpec(
        modules=[Module(m.name, m.in_features, m.out_features, m.group) for m in targets],
        experts=len(documents) if s.routing == "lora" else s.experts,
        rank=s.rank,
        alpha=s.alpha,
        codec=codec,
        phi="sigmoid" if s.routing == "lora" else s.phi,  # the weights of its codec are of this kind
        top_k=s.top_k,
        mixing=s.mixing,
        combination=combination or _combination(recipe),
        id_type="u64" if isinstance(documents[0].id, int) else "string",
        keep_text=keep_text,
        filters=dict(filters),
        base_model=fingerprint(base),
        recipe=recipe.to_json(),
    )


def _combination(recipe: Recipe) -> Combination:
    if recipe.train.routing == "lora":
        return SUMMED
    return AVERAGED if recipe.amortised and recipe.train.taught else BY_SCORE


def _any_of(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def _frozen(store: Store, settings: TrainSettings) -> Encoding:
    """What the store's documents share as training takes it, and its routes for the starting point."""
    spec = store.spec
    decoder, router = store.decoder, store.router
    # The first documents may be alike: a corpus often comes in order.
    reach = min(len(store), _REACH)
    drawn = set(random.Random(0).sample(range(reach), min(reach, _SAMPLE)))
    ids = islice(store, reach)
    sample = [id for number, id in enumerate(ids) if number in drawn and store.is_routed(id)]
    if spec.codec.startswith("sparse"):
        # Logits that phi takes to these weights, as near as finite numbers can.
        w = store.routes(sample).clip(1e-4, 1 - 1e-4)
        routes = np.log(w) - np.log1p(-w) if spec.phi == "sigmoid" else np.log(w)
    else:
        routes = store.routes(sample, kind="code" if decoder is not None else "z")
    settings = replace(
        settings,
        routing="code" if decoder is not None else "table",
        code_dim=routes.shape[1] if decoder is not None else settings.code_dim,
        experts=spec.experts,
        rank=spec.rank,
        alpha=spec.alpha,
        phi=spec.phi,  # type: ignore[arg-type]
        top_k=spec.top_k,
        mixing=spec.mixing,  # type: ignore[arg-type]
        router=settings.router and router is not None,  # it does not come along to every codec
        mse_weight=0.0,  # there are no LoRAs of the new documents to learn from
        kl_weight=0.0,
    )
    return Encoding(
        modules=tuple(ModuleShape(m.name, m.in_features, m.out_features, m.group) for m in spec.modules),
        experts={name: t.numpy() for name, t in store_experts(store).items()},
        decoder=decoder,
        routes=routes,
        settings=settings,
        router=router,
    )
