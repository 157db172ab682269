"""Generation in batches: the same text as one prompt at a time, without padding, prefix or cache."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polyprag.errors import InvalidInput
from polyprag.generation import GenerationSettings, Spent, generate, stream
from polyprag.layers import RoutedModel
from polyprag.models import BaseModel, chat_prompt
from polyprag.prefixes import groups_of

PROMPTS = ["Where is Ost?", "A", "Who built the mill of red brick, and when was it built?", "Why?", "1761 "]
PREFIX = "Title: Tarn Mill\nText: The mill stands in Ost.\n\n"
ALIKE = [
    "The red mill of Ost was built by Jan Reuter in 1761.\nWho?",
    "Where is Ost?",
    "The red mill of Ost was built by Jan Reuter in 1761.\nWhat is it that he built?",
    "The red mill of Ost was built by Jan Reuter in 1761.\nWhere",
    "The old house of Lindau has four rooms and no door.\nHow many rooms?",
    "The old house of Lindau has four rooms and no door.\nHow",
    "The old house of Lindau has four rooms and no door.\nHow",
    "Ab",
]
_GPT_NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16}
_LFM2 = {"intermediate_size": 48, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}
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


@contextmanager
def watched(base: BaseModel) -> Iterator[list[tuple[int, int]]]:
    """The shapes [rows, tokens] of what the model is given inside."""
    seen: list[tuple[int, int]] = []
    watch = base.model.base_model.register_forward_pre_hook(
        lambda _, args, named: seen.append(tuple((args[0] if args else named["input_ids"]).shape)),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        watch.remove()


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


@pytest.mark.parametrize(("batch_size", "prefix"), [(3, PREFIX), (8, "")])
def test_prompts_that_begin_alike_are_as_if_each_were_read_alone(
    base: BaseModel, batch_size: int, prefix: str
) -> None:
    settings = GenerationSettings(max_new_tokens=12, stop=(), batch_size=batch_size)
    expected = [by_hand(base, prefix + p) for p in ALIKE]
    assert texts(base, ALIKE, settings, prefix=prefix) == expected
    two = replace(settings, beams=2, sequences=2)
    found = list(generate(base, ALIKE, two, prefix=prefix))
    alone = [text for p in ALIKE for _, text in generate(base, [p], two, prefix=prefix)]
    assert sorted(found, key=lambda x: x[0]) == [(i // 2, text) for i, text in enumerate(alone)]
    short = [*"abcdefghijklmnopqrst", *ALIKE]
    assert texts(base, short, settings, prefix=prefix)[20:] == expected


@pytest.mark.parametrize(
    ("family", "sizes"), [("llama", {}), ("mistral", {"sliding_window": 2048}), ("gemma2", {})]
)
def test_what_prompts_share_is_read_once(
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    sizes: dict[str, Any],
) -> None:
    """Also where there are windows, as long as no prompt comes to their end."""
    base = BaseModel(build_model(family, **sizes), tokenizer, family)

    def tokens_read(prompts: list[str]) -> int:
        with watched(base) as inputs:
            texts(base, prompts, GenerationSettings(max_new_tokens=1, stop=()))
        return sum(rows * width for rows, width in inputs)

    sentence = "Text: " + "the red mill of Ost was built by Jan Reuter, and " * 8
    one = [f"{sentence}it was {word}\nQuestion:" for word in ("old", "big", "wet", "red")]
    assert tokens_read(one) < 1.5 * tokens_read(one[:1])


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mistral", {"sliding_window": 24}),
        ("gemma2", {"sliding_window": 90}),  # some prompts come to the end of it
        ("gpt_neo", _GPT_NEO),
        ("lfm2", _LFM2),
        ("mamba", {"state_size": 4, "intermediate_size": 64}),
        ("rwkv", {"attention_hidden_size": 32, "intermediate_size": 48, "context_length": 512}),
    ],
)
def test_models_that_keep_less_than_all_tokens_answer_as_alone(
    build_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    family: str,
    sizes: dict[str, Any],
) -> None:
    """Windows, states, and a state without a mask: with a prefix, in a batch, and with both."""
    base = BaseModel(build_model(family, std=0.5, **sizes), tokenizer, family)
    settings, prefix = replace(SETTINGS, max_new_tokens=6, batch_size=5), "Title: Tarn Mill.\n"
    expected = [by_hand(base, prefix + p, 6) for p in PROMPTS]
    assert texts(base, PROMPTS, settings, prefix=prefix) == expected
    assert texts(base, [prefix + p for p in PROMPTS], settings) == expected


@given(st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=12))
def test_groups_share_what_they_say(rows: list[list[int]]) -> None:
    groups = groups_of(rows)
    assert sorted(i for _, members in groups for i in members) == list(range(len(rows)))
    for shared, members in groups:
        beginnings = {tuple(rows[i][:shared]) for i in members}
        assert len(beginnings) == 1
        assert all(shared < len(rows[i]) or not rows[i] for i in members)
        assert len(members) == 1 or all(2 * shared >= len(rows[i]) for i in members)


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
def scripted(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BaseModel]:
    """The tiny model, or another, made to continue each prompt with a given text and then to end."""

    def script(answers: dict[str, str], base: BaseModel = tiny_base) -> BaseModel:
        tokenizer = base.tokenizer
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

        original = base.model.generate
        monkeypatch.setattr(
            base.model,
            "generate",
            lambda *args, **kwargs: original(*args, **{"logits_processor": [processor], **kwargs}),
        )
        return base

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


@pytest.mark.parametrize(("temperature", "with_routes"), [(None, False), (1.5, True)])
def test_rows_that_have_ended_are_taken_out_and_the_others_go_on_unchanged(
    base: BaseModel, temperature: float | None, with_routes: bool
) -> None:
    prompts = [f"{n} {prompt}" for n in "12" for prompt in (*PROMPTS, *ALIKE)]
    # Each letter ends a text, so that some have a token or two and some all that are allowed.
    settings = GenerationSettings(
        60, tuple("abcdefghijklm"), temperature=temperature, batch_size=len(prompts)
    )
    more: dict[str, Any] = {}
    if with_routes:
        routed, routes = routed_model(base, len(prompts))
        more = {"routed": routed, "routes": routes}
    spent: dict[int, Spent] = {}
    with watched(base) as inputs:
        together = texts(base, prompts, settings, spent=spent, **more)
    assert together == texts(base, prompts, replace(settings, batch_size=1), **more)
    assert len({s.new_tokens for s in spent.values()}) > 2
    # More than half of the rows of each step have not ended.
    made = sum(s.new_tokens for s in spent.values())
    if temperature is not None:  # greedy, the little models come to no end, or repeat themselves
        assert 2 * made < 60 * len(prompts)
    assert sum(rows for rows, width in inputs if width == 1) < 2 * made


def test_no_more_tokens_are_made_than_allowed(scripted: Callable[[dict[str, str]], BaseModel]) -> None:
    assert texts(scripted({"Q": "abcdefgh"}), ["Q"], GenerationSettings(max_new_tokens=3)) == ["abc"]


def test_greedy_ignores_what_the_model_recommends_for_chats(base: BaseModel) -> None:
    expected = texts(base, PROMPTS, SETTINGS)
    config = base.model.generation_config
    config.do_sample, config.temperature, config.top_k = True, 0.7, 20
    config.repetition_penalty, config.num_beams, config.no_repeat_ngram_size = 5.0, 2, 1
    config.suppress_tokens, config.max_time = [base.tokenizer(expected[0][0]).input_ids[0]], 1e-6
    config.exponential_decay_length_penalty, config.stop_strings = (1, 50.0), [expected[0][0]]
    config.cache_implementation, config.return_dict_in_generate = "static", True
    assert texts(base, PROMPTS, SETTINGS) == expected
    assert texts(base, PROMPTS, GenerationSettings(12, (), temperature=0.0, batch_size=2)) == expected


def test_a_model_that_was_trained_without_a_cache_reads_each_token_once(base: BaseModel) -> None:
    base.model.config.use_cache = base.model.generation_config.use_cache = False
    for prefix in ("", PREFIX):
        assert texts(base, ALIKE, SETTINGS, prefix=prefix) == [by_hand(base, prefix + p) for p in ALIKE]


def test_an_end_that_the_tokenizer_alone_knows_ends_a_text(tiny_base: BaseModel) -> None:
    tiny_base.model.generation_config.eos_token_id = None
    end = tiny_base.tokenizer.eos_token_id

    def ends(module: Any, args: Any, output: Any) -> Any:
        output.logits[..., end] = 1e4
        return output

    tiny_base.model.register_forward_hook(ends)
    for settings in (SETTINGS, GenerationSettings(12, (), beams=2)):
        spent: dict[int, Spent] = {}
        assert texts(tiny_base, ["Q"], settings, spent=spent) == [""]
        assert (spent[0].ended, spent[0].new_tokens) == (True, 1)


def test_what_a_table_of_positions_cannot_hold_is_refused(
    build_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = GenerationSettings(8, ())
    for family in ("gpt2", "llama"):
        base = BaseModel(build_model(family, max_position_embeddings=64), tokenizer, family)
        assert len(texts(base, ["Q", "x" * 57], settings)) == 2
        if family == "llama":  # whose positions go on
            texts(base, ["x" * 58], settings)
            continue
        with pytest.raises(InvalidInput, match="positions for 64 tokens, not for the 65 of prompt 2 of 2"):
            texts(base, ["Q", "x" * 58], settings)
        with pytest.raises(InvalidInput, match="positions for 64"):
            texts(base, ["x" * 28], settings, prefix="x" * 30)


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


def test_nothing_seeds_or_draws_from_the_global_generator(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the global generator is everybody's")

    for name in ("manual_seed", "seed", "set_rng_state"):
        monkeypatch.setattr(torch, name, refuse)
        monkeypatch.setattr(torch.random, name, refuse)
    before = torch.get_rng_state()
    for settings in (SETTINGS, GenerationSettings(3, (), temperature=1.0)):
        texts(base, PROMPTS, settings)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_is_the_same_in_every_batch(base: BaseModel) -> None:
    def sample(batch_size: int, sequences: int = 1) -> list[tuple[int, str]]:
        settings = GenerationSettings(
            8, (), temperature=1.5, top_k=30, seed=3, batch_size=batch_size, sequences=sequences
        )
        return sorted(generate(base, PROMPTS, settings), key=lambda found: found[0])

    expected = sample(5)
    assert sample(1) == sample(2) == expected
    several = sample(2, 3)
    assert [i for i, _ in several] == [i for i in range(len(PROMPTS)) for _ in range(3)]
    assert several[::3] == expected
    assert len({text for _, text in several}) > 2 * len(PROMPTS)


def test_samples_are_drawn_by_their_probabilities(
    scripted_scores: Callable[[list[float]], BaseModel],
) -> None:
    base = scripted_scores([0.5, 0.3, 0.15, 0.05])
    count = 2000

    def shares(**cuts: Any) -> list[float]:
        settings = GenerationSettings(1, (), temperature=1.0, batch_size=500, sequences=count, **cuts)
        found = [text for _, text in generate(base, ["Q"], settings)]
        return [found.count(letter) / count for letter in "abcd"]

    # Four standard deviations of a share are at most .045.
    assert shares(top_p=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.045)
    assert shares(top_p=1.0, top_k=2) == pytest.approx([0.625, 0.375, 0, 0], abs=0.045)
    assert shares(top_p=0.9) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.045)


@pytest.fixture
def scripted_scores(
    tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[float]], BaseModel]:
    """The tiny model, whose next token is always a, b, c ... with the given probabilities."""

    def script(probabilities: list[float]) -> BaseModel:
        letters = tiny_base.tokenizer("abcdefgh"[: len(probabilities)]).input_ids

        def fixed(module: Any, args: Any, output: Any) -> Any:
            output.logits = torch.full_like(output.logits, -1e9)
            output.logits[..., letters] = torch.tensor(probabilities).log()
            return output

        tiny_base.model.register_forward_hook(fixed)
        return tiny_base

    return script


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_beams_are_those_of_each_prompt_alone(base: BaseModel, prefix: str) -> None:
    settings = GenerationSettings(6, (), batch_size=3, beams=3, sequences=2)
    more: dict[str, Any] = {"prefix": prefix}
    routes = None
    if not prefix:
        more["routed"], more["routes"] = routed, routes = routed_model(base, len(PROMPTS))
    found = sorted(generate(base, PROMPTS, settings, **more), key=lambda pair: pair[0])
    expected = []
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([base.tokenizer(prefix + prompt).input_ids])
        options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False}
        with torch.no_grad(), routed.route(routes[i : i + 1]) if routes is not None else nullcontext():
            made = base.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, **options
            )
        decoded = base.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
        expected += [(i, text.lstrip()) for text in decoded]
    assert found == expected


def test_compiled_steps_give_the_same_texts(tiny_base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polyprag.generation.COMPILER", "eager")
    torch.compiler.reset()
    routed, routes = routed_model(tiny_base, len(PROMPTS))
    compiled = GenerationSettings(4, (), compile=True)
    for more in (routes, routes.flip(0)):
        found = texts(tiny_base, PROMPTS, compiled, routed=routed, routes=more)
        assert found == texts(
            tiny_base, PROMPTS, replace(compiled, compile=False), routed=routed, routes=more
        )
    assert hasattr(tiny_base.model, "_compiled_call")


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_k": -1},
        {"stop": ("\n", "")},
        {"beams": 2, "temperature": 1.0},
        {"sequences": 2},
        {"sequences": 3, "beams": 2},
        {"batch_size": 0},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        GenerationSettings(**wrong)


def test_prompts_may_be_tokens(base: BaseModel) -> None:
    tokens = [base.tokenizer(p).input_ids for p in PROMPTS]
    assert dict(generate(base, tokens, SETTINGS)) == dict(generate(base, PROMPTS, SETTINGS))
    with pytest.raises(InvalidInput, match="prompt 2 of 2 has no token"):
        dict(generate(base, [tokens[0], []], SETTINGS))
    with pytest.raises(InvalidInput, match="prompt 2 of 2 has no token"):
        texts(base, ["Who?", ""], SETTINGS, prefix=PREFIX)


# Streams


def pieces_of(base: BaseModel, prompts: list[str], settings: GenerationSettings) -> list[list[str]]:
    found: list[list[str]] = [[] for _ in prompts]
    for i, piece in stream(base, prompts, settings):
        assert piece
        found[i].append(piece)
    return found


def test_a_stream_gives_each_rows_text_in_pieces(base: BaseModel) -> None:
    routed, routes = routed_model(base, len(PROMPTS))
    expected = texts(base, PROMPTS, SETTINGS, routed=routed, routes=routes)
    found = [""] * len(PROMPTS)
    order = []
    for i, piece in stream(base, PROMPTS, SETTINGS, routed=routed, routes=routes):
        found[i] += piece
        order.append(i)
    assert found == expected
    assert order[:4] == [2, 0, 2, 0], "two rows of a batch, token by token; the longest first"


@pytest.mark.parametrize(
    ("said", "pieces"),
    [
        ("ab\nText: more", ["a", "b"]),
        ("ab\nTex", ["a", "b", "\nTex"]),
        ("a\nTe\nText:", ["a", "\nTe"]),
        ("\n\n ab", ["a", "b"]),
        ("", []),
    ],
)
def test_a_stream_holds_back_what_may_become_a_stop_string(
    scripted: Callable[..., BaseModel], said: str, pieces: list[str]
) -> None:
    base = scripted({"Q": said})
    settings = GenerationSettings(max_new_tokens=40, stop=("\nText:",))
    assert pieces_of(base, ["Q"], settings) == [pieces]
    assert texts(base, ["Q"], settings) == ["".join(pieces)]


def test_a_stream_gives_no_part_of_a_character(
    scripted: Callable[..., BaseModel],
    build_model: Callable[..., PreTrainedModel],
    bytewise: PreTrainedTokenizerFast,
) -> None:
    base = BaseModel(build_model(vocab_size=len(bytewise)), bytewise, "bytes")
    base = scripted({"Q": "é 東 🏝 a"}, base)
    assert pieces_of(base, ["Q"], GenerationSettings(40)) == [["é", " ", "東", " ", "🏝", " ", "a"]]
    assert pieces_of(base, ["Q"], GenerationSettings(5)) == [["é", " ", "\N{REPLACEMENT CHARACTER}"]]


def test_a_stream_gives_every_character_of_a_tokenizer_that_tidies_blanks(
    scripted: Callable[..., BaseModel], tiny_base: BaseModel
) -> None:
    tidy = copy.deepcopy(tiny_base.tokenizer)
    tidy.clean_up_tokenization_spaces = True
    base = scripted({"Q": "He did n't , and so"}, replace(tiny_base, tokenizer=tidy))
    whole = texts(base, ["Q"], GenerationSettings(40))
    assert ["".join(pieces) for pieces in pieces_of(base, ["Q"], GenerationSettings(40))] == whole
    assert whole == ["He did n't , and so"]


def test_closing_a_stream_ends_its_generation(base: BaseModel) -> None:
    steps = []
    base.model.register_forward_hook(lambda *_: steps.append(1))
    running = stream(base, ["Where is Ost?"], GenerationSettings(200, ()))
    next(running)
    running.close()
    assert not any(t.name == "polyprag-stream" for t in threading.enumerate())
    assert len(steps) < 100


def test_what_fails_in_a_stream_is_raised_where_it_is_read(base: BaseModel) -> None:
    routed, routes = routed_model(base, 2)
    with pytest.raises(InvalidInput, match="2 routes for 1 prompts"):
        list(stream(base, ["Q"], SETTINGS, routed=routed, routes=routes))
    with pytest.raises(InvalidInput, match="beams"):
        list(stream(base, ["Q"], GenerationSettings(beams=2)))


@pytest.mark.parametrize("pad", ["<pad>", "<end>"])
def test_what_a_text_took_says_whether_it_ended(
    scripted: Callable[..., BaseModel], tiny_base: BaseModel, pad: str
) -> None:
    """The end of a text is a token that was made, also where padding looks like it, as in many models."""
    base = replace(tiny_base, tokenizer=copy.deepcopy(tiny_base.tokenizer))
    base.tokenizer.pad_token = pad
    scripted({"Q1": "abcdef", "Q2": "ab\ncdef", "Q3": "abcd", "Q4": "abc\n", "Q5": "", "Q6": "ab"}, base)
    spent: dict[int, Spent] = {}
    texts(base, ["Q1", "Q2", "Q3", "Q4", "Q5", "Q6"], GenerationSettings(4), spent=spent)
    assert [spent[i].ended for i in range(6)] == [False, True, False, True, True, True]
    assert [spent[i].new_tokens for i in range(6)] == [4, 3, 4, 4, 1, 3]
    assert [spent[i].prompt_tokens for i in range(6)] == [2] * 6


def test_a_conversation_is_written_by_the_models_template(tiny_base: BaseModel) -> None:
    messages = [{"role": "user", "content": "Where is Ost?"}]
    with pytest.raises(InvalidInput, match="no chat template"):
        chat_prompt(tiny_base, messages)
    tokenizer = copy.deepcopy(tiny_base.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' else '' }}"
        "[{{ m.role }}]{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    chat = BaseModel(tiny_base.model, tokenizer, "chat")
    ids = chat_prompt(chat, messages)
    assert ids == tokenizer("[user]Where is Ost?\n[assistant]").input_ids
    assert texts(chat, [ids], SETTINGS) == texts(chat, ["[user]Where is Ost?\n[assistant]"], SETTINGS)  # type: ignore[list-item]
    with pytest.raises(InvalidInput, match="no system"):
        chat_prompt(chat, [{"role": "system", "content": "Be brief."}])
