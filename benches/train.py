"""Training speed against PEFT, on one machine in one run: samples a second of the same samples.

    pip install peft
    python benches/train.py --json benches/results/train.json

Three ways to put documents into weights, each on the same base model, documents and samples, in fp32:

- polyprag: shared latent experts and codes, batches of samples of like length, all epochs of the recipe: the
  blocks below the experts are computed in the first one alone. The same with experts in the upper third.
  On a GPU, which waits for its launches, or not with --quick, also in larger batches. Then one epoch with
  experts in every block, as the others have them; not with --quick, also with the model compiled by torch,
  without the time that this takes;
- PRAG with PEFT: one LoRA a document (r=2, AdamW, batches of one sample: arXiv 2501.15915, section 3.2), each
  made, trained and saved. Once with its samples as they are, and once padded to 3,000 tokens as its published
  code does (not with --quick; two steps are timed);
- PEFT's Poly tuner with the same K, r, batches and number of documents, in every block and in the upper half.

The base model alone, forward and backward to its inputs, says what a method pays that runs all of it. All
take turns, some rounds of them: a machine's pace drifts, so a ratio is one of a round.
Samples are generated: words of the vocabulary, as long as question-answer pairs are.
"""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from common import arguments, median, report, wait
from polyprag.batches import Order, collate
from polyprag.layers import find_targets
from polyprag.models import BaseModel, load_base_model
from polyprag.samples import Sample
from polyprag.trainer import Progress, TrainSettings, train

SAMPLES_A_DOCUMENT = 5
BATCH = 8

BARE = "base model alone"
OURS, THIRD = "polyprag", "polyprag, upper third"
LARGER = {size: f"polyprag, batches of {size}" for size in (32, 128)}
WHOLE, COMPILED = "polyprag, every block", "polyprag, compiled"
PRAG, PADDED = "PRAG with PEFT", "PRAG with PEFT, padded to 3,000"
POLY, POLY_UPPER = "PEFT Poly, every block", "PEFT Poly, upper half"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", help="base model; default: the small one")
    parser.add_argument("--dtype", default="fp32", help="bf16, fp16 or fp32, of the base model")
    parser.add_argument("--rounds", type=int, default=3, help="turns that each system has")
    parser.add_argument("--documents", type=int, help="default: 64; with --quick 8; PRAG has 8 of them")
    given = parser.parse_args()
    documents = given.documents or (8 if given.quick else 64)
    base = load_base_model(given.model, dtype=given.dtype)
    samples = make_samples(documents)
    batches = Order(samples, BATCH, 0, epochs=1)
    ours = [[samples[i] for i in batches.batch(step)] for step in range(batches.steps)]
    few = samples[: SAMPLES_A_DOCUMENT * min(documents, 8)]
    epochs = TrainSettings().epochs
    turns: dict[str, tuple[Callable[[], float], int]] = {
        BARE: (lambda: bare(base, ours), len(samples)),
        PRAG: (lambda: peft_prag(base, few), len(few)),
        OURS: (lambda: polyprag(base, samples, documents, epochs=epochs), len(samples) * epochs),
        THIRD: (
            lambda: polyprag(base, samples, documents, epochs=epochs, from_depth=2 / 3),
            len(samples) * epochs,
        ),
        POLY_UPPER: (lambda: peft_poly(base, ours, documents, 0.5), len(samples)),
        POLY: (lambda: peft_poly(base, ours, documents, 0.0), len(samples)),
        WHOLE: (lambda: polyprag(base, samples, documents, epochs=1, from_depth=0.0), len(samples)),
    }
    if base.device.type == "cuda" or not given.quick:
        for size, name in LARGER.items():
            turns[name] = (
                partial(polyprag, base, samples, documents, epochs=epochs, batch_size=size),
                turns[OURS][1],
            )
    if not given.quick:
        turns[COMPILED] = (lambda: compiled_polyprag(base, samples, documents), len(samples))
        turns[PADDED] = (lambda: peft_prag(base, few[:2], width=3000), 2)
    speeds: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(given.rounds):
        for name, (work, count) in turns.items():
            speeds[name].append(count / work())
            print(f"{name}: {speeds[name][-1]:.2f} samples a second", flush=True)
        results = [
            {"system": name, "samples": turns[name][1], "samples_a_second": [round(s, 3) for s in found]}
            for name, found in speeds.items()
        ]
        report(given.json, results, ratios_of(speeds))  # of every round: the next may not come to its end


def ratios_of(speeds: dict[str, list[float]]) -> dict[str, float]:
    """What some systems are over others: the median round's, and the least and greatest."""
    ratios = {}
    for name in (OURS, THIRD, *LARGER.values(), WHOLE, COMPILED):
        for other in (BARE, PRAG, POLY_UPPER, POLY, PADDED):
            if name in speeds and other in speeds:
                each = sorted(a / b for a, b in zip(speeds[name], speeds[other], strict=True))
                for which, ratio in (("", median(each)), (", least", each[0]), (", greatest", each[-1])):
                    ratios[f"{name} over {other}{which}"] = round(ratio, 2)
    return ratios


def make_samples(documents: int) -> list[Sample]:
    """Five a document, as PRAG makes: one behind a passage of 96 tokens, four questions of 20 to 36."""
    rng = random.Random(0)
    return [
        Sample(document, tuple(rng.randrange(1000, 30_000) for _ in range(length)), 0)
        for document in range(documents)
        for length in (128, *(rng.randrange(20, 37) for _ in range(SAMPLES_A_DOCUMENT - 1)))
    ]


def collated(base: BaseModel, batch: Sequence[Sample]) -> tuple[torch.Tensor, ...]:
    """Ids, mask and targets of a batch, where the model is."""
    return tuple(tensor.to(base.device) for tensor in collate(batch, 0))


def bare(base: BaseModel, batches: Sequence[Sequence[Sample]]) -> float:
    """Forward and backward of the frozen model, with gradients to its first layer's input and no further."""
    embed = base.model.get_input_embeddings()

    def step(batch: Sequence[Sample]) -> None:
        ids, mask, targets = collated(base, batch)
        inputs = embed(ids).detach().requires_grad_()
        logits = base.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        torch.autograd.backward(loss)

    step(batches[0])
    return seconds_of(lambda: [step(b) for b in batches])


def polyprag(base: BaseModel, samples: Sequence[Sample], documents: int, **changes: Any) -> float:
    settings = TrainSettings(**{"batch_size": BATCH, **changes})
    # As for the others, one batch before the clock runs; and every batch counts: they differ in size.
    train(base, samples[: settings.batch_size], documents, replace(settings, epochs=1))
    steps: list[Progress] = []
    train(base, samples, documents, settings, progress=steps.append)
    return sum(p.step_seconds for p in steps)


def compiled_polyprag(base: BaseModel, samples: Sequence[Sample], documents: int) -> float:
    settings = TrainSettings(epochs=2, batch_size=BATCH, compile=True)
    steps: list[Progress] = []
    train(base, samples, documents, settings, progress=steps.append)
    # The compiler is at work in the first epoch.
    return sum(p.step_seconds for p in steps[len(steps) // 2 :])


def peft_prag(base: BaseModel, samples: Sequence[Sample], width: int | None = None) -> float:
    """One adapter a document: made, trained sample by sample, saved, taken off again."""
    from peft import LoraConfig, get_peft_model

    def document(own: Sequence[Sample], folder: str) -> None:
        targets = [m.name for m in find_targets(base.model)]
        config = LoraConfig(r=2, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(base.model, config)
        model.train()
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)
        for sample in own:
            ids, mask, targets = collated(base, [sample])
            if width is not None:
                pad = (0, width - ids.shape[1])
                ids, mask = (torch.nn.functional.pad(t, pad) for t in (ids, mask))
                targets = torch.nn.functional.pad(targets, pad, value=-100)
            step(model, optimiser, ids, mask, targets)
        model.save_pretrained(folder)
        model.unload()

    grouped: dict[int, list[Sample]] = {}
    for sample in samples:
        grouped.setdefault(sample.document, []).append(sample)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if width is None:
            document(next(iter(grouped.values())), folder)
        return seconds_of(lambda: [document(own, folder) for own in grouped.values()])


def peft_poly(
    base: BaseModel, batches: Sequence[Sequence[Sample]], documents: int, from_depth: float
) -> float:
    from peft import PolyConfig, get_peft_model

    settings = TrainSettings()
    config = PolyConfig(
        r=settings.rank,
        n_tasks=documents,
        n_skills=settings.experts,
        n_splits=1,
        target_modules=[m.name for m in find_targets(base.model, from_depth=from_depth)],
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(base.model, config)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4)

    def one(batch: Sequence[Sample]) -> None:
        ids, mask, targets = collated(base, batch)
        tasks = torch.tensor([s.document for s in batch], device=base.device)
        step(model, optimiser, ids, mask, targets, task_ids=tasks)

    one(batches[0])
    try:
        return seconds_of(lambda: [one(b) for b in batches])
    finally:
        model.unload()


def step(
    model: Any,
    optimiser: torch.optim.Optimizer,
    ids: torch.Tensor,
    mask: torch.Tensor,
    targets: torch.Tensor,
    **more: Any,
) -> None:
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    optimiser.zero_grad()
    torch.autograd.backward(loss)
    optimiser.step()


def seconds_of(work: Callable[[], object]) -> float:
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
