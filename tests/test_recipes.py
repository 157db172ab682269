"""Recipes by name, and single settings by theirs."""

from __future__ import annotations

from typing import Any

import pytest

from polyprag.encode import Recipe
from polyprag.errors import InvalidInput
from polyprag.recipes import recipe_of, with_settings
from polyprag.samples import SampleSettings


def test_a_recipe_by_name_is_that_system() -> None:
    assert recipe_of() == recipe_of("polyprag") == Recipe()
    published = recipe_of("poly-prag").train
    assert (published.routing, published.mixing, published.gumbel) == ("table", "factors", True)
    assert published.alpha / published.rank == 1 / published.rank
    assert published.expert_lr == published.table_lr
    assert recipe_of("prag").train.routing == "lora"
    assert {recipe_of(system).train.softmax for system in ("poly-prag", "prag", "dyprag")} == {"whole"}
    with pytest.raises(InvalidInput, match="polyprag, poly-prag, prag"):
        recipe_of("rag")  # type: ignore[arg-type]


def test_settings_are_set_by_name() -> None:
    recipe = with_settings(
        Recipe(),
        [
            "train.epochs=8",
            "train.code_lr=1",
            "train.phi=softmax",
            "train.top_k=4",
            'train.targets=["fc1","fc2"]',
            "train.gumbel=true",
            "samples.loss_on=answer",
            "augment.temperature=1",
            "add_epochs=2",
        ],
    )
    train = recipe.train
    assert (train.epochs, train.code_lr, train.phi, train.top_k) == (8, 1.0, "softmax", 4)
    assert isinstance(train.code_lr, float)
    assert train.targets == ("fc1", "fc2")
    assert train.gumbel
    assert recipe.samples.loss_on == "answer"
    assert recipe.add_epochs == 2
    assert isinstance(recipe.augment.temperature, float)
    assert with_settings(recipe, ["augment.temperature=null"]).augment.temperature is None
    assert with_settings(recipe, []) == recipe


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epochs", "NAME=VALUE"),
        ("train.epoch=6", "did you mean 'epochs'"),
        ("epochs=6", "did you mean 'train.epochs'?"),
        ("seed=6", "did you mean 'augment.seed' or 'train.seed'?"),
        ("trian.epochs=8", "did you mean 'train'"),
        ("train.xyzzy=6", "there are: routing"),
        ("train=6", "train.routing"),
        ("train.epochs.more=6", "such as epochs"),
        ("train.epochs=six", "a value like 6"),
        ("train.epochs=8.5", "a value like 6"),
        ("train.epochs=true", "a value like 6"),
        ("train.phi=1", "a value like 'linear'"),
        ("train.epochs=0", "at least 1"),
        ("add_epochs=0", "add_epochs is at least 1"),
        ("train.top_k=two", "expected a value: a whole number or null"),
        ("train.targets=[1]", "a list of a text"),
        ("augment.temperature=hot", "expected a value: a number or null"),
        ("samples.loss_on=answers", "one of 'all', 'answer'"),
        ("augmenter=5", "a text or null"),
    ],
)
def test_what_is_no_setting_is_refused(setting: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        with_settings(Recipe(), [setting])


def test_samples_know_what_their_loss_is_on() -> None:
    with pytest.raises(InvalidInput, match="loss_on is one of all, answer"):
        SampleSettings(loss_on="answers")  # type: ignore[arg-type]
