"""The prompts of augmentation: replaced by a user, and what is wrong with a replacement is said."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from polyprag.augment import AugmentSettings, Prompts, prompts_as_toml, read_prompts
from polyprag.encode import Recipe
from polyprag.errors import InvalidInput


def test_what_is_printed_is_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(prompts_as_toml(), encoding="utf-8")
    assert read_prompts(path) == Prompts()
    changed = Prompts(rewrite="$passage, anders: für $$5\n\n", endpoint_system='Say "so".\\')
    path.write_text(prompts_as_toml(changed), encoding="utf-8")
    assert read_prompts(path) == changed


def test_those_that_a_file_does_not_name_stay(tmp_path: Path) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text('endpoint_system = "You are a teacher."\n')
    assert read_prompts(path) == Prompts(endpoint_system="You are a teacher.")


def test_braces_and_dollars_come_through() -> None:
    prompts = Prompts(endpoint_pairs='$pairs of ${passage}: {"pairs": []}, $$5')
    assert (
        prompts.fill("endpoint_pairs", pairs=3, passage="$x {y}", title="")
        == '3 of $x {y}: {"pairs": []}, $5'
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            'question = "$sentence $answer $titel"',
            r"question has the unknown placeholder \$titel.*\$sentence",
        ),
        ('question = "$sentence"', r"question lacks the placeholder \$answer"),
        ("endpoint_pairs = '$passage $pairs costs $5'", r"lone dollar sign at '\$5'.*\$\$"),
        ('questions = "x"', "no prompt 'questions'; there are question_examples, question"),
        ("question = 3", "question is no text"),
        ("question = ", "no valid TOML"),
        (b"question = '\xff'", "UTF-8"),
    ],
)
def test_what_is_wrong_is_said_with_the_file(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidInput, match=rf"mine\.toml: .*{said}"):
        read_prompts(path)
    with pytest.raises(FileNotFoundError):
        read_prompts(tmp_path / "none.toml")


def test_a_recipe_keeps_its_prompts() -> None:
    recipe = Recipe(augment=AugmentSettings(prompts=Prompts(endpoint_system="So.")), augmenter="strong")
    assert Recipe.from_json(recipe.to_json()) == recipe
    strange = recipe.to_json()
    strange["augment"]["prompts"]["of a later version"] = "x"
    assert Recipe.from_json(strange) == recipe
    strange["augment"]["prompts"]["question"] = "$else"
    with pytest.raises(InvalidInput, match=r"\$else"):
        Recipe.from_json(strange)


@pytest.mark.parametrize("name", [f.name for f in fields(Prompts)])
def test_a_changed_prompt_makes_another_augmentation(name: str) -> None:
    """Of all that write with it, and of no other."""
    from polyprag.augment.endpoint import EndpointAugmenter
    from polyprag.augment.local import LocalAugmenter
    from polyprag.models import BaseModel

    settings = AugmentSettings()
    changed = replace(settings.prompts, **{name: getattr(settings.prompts, name) + "."})
    augmenters = (EndpointAugmenter("http://x/v1", "m"), LocalAugmenter(BaseModel(None, None, "m")))  # type: ignore[arg-type]
    for augmenter in augmenters:
        of_it = name.startswith("endpoint_") == isinstance(augmenter, EndpointAugmenter)
        differs = []
        for yes_no in (False, True):
            for rewrite in (False, True):
                asked = replace(settings, yes_no=yes_no, rewrite=rewrite)
                making = augmenter.making(asked)
                differs.append(augmenter.making(replace(asked, prompts=changed)) != making)
        assert any(differs) == of_it
