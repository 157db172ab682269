"""Generation in batches: the same text as one prompt at a time, without padding, prefix or cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag.errors import InvalidInput
from polyprag.generation import GenerationSettings, generate
from polyprag.layers import RoutedModel
from polyprag.models import BaseModel

PROMPTS = ["Where is Ost?", "A", "Who built the mill of red brick, and when was it built?", "Why?", "1761 "]
PREFIX = "Title: Tarn Mill\nText: The mill stands in Ost.\n\n"
SETTINGS = GenerationSettings(max_new_tokens=12, stop=(), batch_size=2)


@pytest.fixture(params=["llama", "gpt2"])
def base(
    request: pytest.FixtureRequest,
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> BaseModel:
    return BaseModel(build_model(request.param, std=0.5), tokenizer, "tiny")


def texts(base: BaseModel, prompts: list[str], settings: GenerationSettings, **more: Any) -> list[str]:
    found = dict(generate(base, prompts, settings, **more))
    assert sorted(found) == list(range(len(prompts)))
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def by_hand(base: BaseModel, prompt: str, tokens: int = 12) -> str:
    """Greedy continuation of one prompt, the whole text read anew for each token."""
    ids = list(base.tokenizer(prompt).input_ids)
    start = len(ids)
    for _ in range(tokens):
        ids.append(int(base.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == base.tokenizer.eos_token_id:
            break
    return str(base.tokenizer.decode(ids[start:], skip_special_tokens=True)).lstrip()


def routed_model(base: BaseModel, rows: int) -> tuple[RoutedModel, torch.Tensor]:
    torch.manual_seed(0)
    targets = ["*.mlp.*"]
    routed = RoutedModel.attach(base.model, experts=3, rank=2, alpha=4, targets=targets)
    with torch.no_grad():
        for parameter in routed.parameters():
            parameter.normal_(0, 0.5)
    return routed, torch.softmax(3 * torch.randn(rows, routed.groups, 3), -1)


def test_a_batch_gives_what_each_prompt_gives_by_hand(base: BaseModel) -> None:
    assert texts(base, PROMPTS, SETTINGS) == [by_hand(base, p) for p in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_shared_prefix_is_as_if_each_prompt_began_with_it(base: BaseModel, batch_size: int) -> None:
    settings = GenerationSettings(max_new_tokens=12, stop=(), batch_size=batch_size)
    assert texts(base, PROMPTS, settings, prefix=PREFIX) == [by_hand(base, PREFIX + p) for p in PROMPTS]


def test_each_prompt_of_a_batch_has_its_own_route(base: BaseModel) -> None:
    routed, routes = routed_model(base, len(PROMPTS))
    together = texts(base, PROMPTS, SETTINGS, routed=routed, routes=routes)
    alone = []
    for i, prompt in enumerate(PROMPTS):
        with routed.route(routes[i : i + 1]):
            alone.append(by_hand(base, prompt))
    assert together == alone
    assert texts(base, PROMPTS, SETTINGS, routed=routed, routes=routes.flip(0)) != together
    assert texts(base, PROMPTS, SETTINGS, routed=routed) == texts(base, PROMPTS, SETTINGS)


def test_one_question_under_many_routes(base: BaseModel) -> None:
    routed, routes = routed_model(base, 6)
    settings = GenerationSettings(max_new_tokens=12, stop=(), batch_size=4)
    found = texts(base, ["Where is Ost?"] * 6, settings, routed=routed, routes=routes)
    assert len(set(found)) > 1


def test_routes_that_do_not_fit_the_prompts_are_refused(base: BaseModel) -> None:
    routed, routes = routed_model(base, len(PROMPTS))
    for more in (
        {"routed": routed, "routes": routes[:-1]},
        {"routed": routed, "routes": torch.cat([routes, routes])},
        {"routes": routes},
        {"routed": routed, "routes": routes, "prefix": PREFIX},
    ):
        with pytest.raises(InvalidInput):
            texts(base, PROMPTS, SETTINGS, **more)


def test_no_prompts_give_nothing(base: BaseModel) -> None:
    assert texts(base, [], SETTINGS) == []
    assert texts(base, [], SETTINGS, prefix=PREFIX) == []


@pytest.fixture
def scripted(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], BaseModel]:
    """The tiny model, made to continue each prompt with a given text and then to end."""

    def script(answers: dict[str, str]) -> BaseModel:
        tokenizer = tiny_base.tokenizer
        table = {}
        for prompt, answer in answers.items():
            ids = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
            for n, token in enumerate(ids):
                table[tuple(tokenizer(prompt).input_ids) + tuple(ids[:n])] = token

        def processor(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            forced = torch.full_like(scores, -1e9)
            for row, ids in enumerate(input_ids.tolist()):
                text = tuple(i for i in ids if i != tokenizer.pad_token_id)
                forced[row, table.get(text, tokenizer("#").input_ids[0])] = 0.0
            return forced

        original = tiny_base.model.generate
        monkeypatch.setattr(
            tiny_base.model,
            "generate",
            lambda *args, **kwargs: original(*args, logits_processor=[processor], **kwargs),
        )
        return tiny_base

    return script


@pytest.mark.parametrize(
    ("said", "stop", "expected"),
    [
        ("red brick\nmore", ("\n",), "red brick"),
        ("\n\n red brick\nmore", ("\n",), "red brick"),
        ("red brick", ("\n",), "red brick"),
        ("one\ntwo\n\nthree", ("\n\n",), "one\ntwo"),
        ("one\nText: two\n\nthree", ("\n\n", "\nText:"), "one"),
        ("St. John's, 4.5", ("\n",), "St. John's, 4.5"),
        ("", ("\n",), ""),
        ("one\ntwo", (), "one\ntwo"),
        ("   ", ("\n",), ""),
    ],
)
def test_stop_strings_end_a_text_and_are_cut_off(
    scripted: Callable[[dict[str, str]], BaseModel], said: str, stop: tuple[str, ...], expected: str
) -> None:
    base = scripted({"Q": said})
    assert texts(base, ["Q"], GenerationSettings(max_new_tokens=40, stop=stop)) == [expected]


def test_rows_stop_one_by_one_and_keep_their_order(
    scripted: Callable[[dict[str, str]], BaseModel],
) -> None:
    answers = {"Q1": "a", "Question 2": "two words\nand more", "Q": "the longest of all answers\n", "Q44": ""}
    base = scripted(answers)
    for batch_size in (1, 3, 4):
        settings = GenerationSettings(max_new_tokens=40, batch_size=batch_size)
        assert texts(base, list(answers), settings) == ["a", "two words", "the longest of all answers", ""]


def test_no_more_tokens_are_made_than_allowed(scripted: Callable[[dict[str, str]], BaseModel]) -> None:
    assert texts(scripted({"Q": "abcdefgh"}), ["Q"], GenerationSettings(max_new_tokens=3)) == ["abc"]


def test_greedy_ignores_what_the_model_recommends_for_chats(base: BaseModel) -> None:
    expected = texts(base, PROMPTS, SETTINGS)
    config = base.model.generation_config
    config.do_sample, config.temperature, config.top_k = True, 0.7, 20
    config.repetition_penalty, config.num_beams, config.no_repeat_ngram_size = 5.0, 2, 1
    assert texts(base, PROMPTS, SETTINGS) == expected
    assert texts(base, PROMPTS, GenerationSettings(12, (), temperature=0.0, batch_size=2)) == expected


def test_sampling_is_drawn_from_its_seed(base: BaseModel) -> None:
    def sample(seed: int, temperature: float = 2.0) -> list[str]:
        settings = GenerationSettings(12, (), temperature=temperature, top_p=1.0, seed=seed, batch_size=2)
        return texts(base, PROMPTS, settings)

    first = sample(1)
    torch.rand(7)
    assert sample(1) == first
    assert sample(2) != first
    assert sample(1, 1e-6) == texts(base, PROMPTS, SETTINGS)


def test_sampling_leaves_the_callers_random_numbers_alone(base: BaseModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts(base, PROMPTS, GenerationSettings(3, (), temperature=1.0, seed=1))
    assert torch.equal(torch.rand(3), expected)
