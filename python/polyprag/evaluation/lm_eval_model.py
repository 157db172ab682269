"""polyprag as a model of lm-evaluation-harness: its tasks, answered with a store attached.

    python -m polyprag.evaluation.lm_eval_model --model polyprag --model_args store=W.polyprag --tasks nq_open

Each request is answered under the route of the documents that BM25 finds for it; one for which nothing is
found, under none. ``pip install 'polyprag[lm-eval]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from polyprag.engine import Engine
from polyprag.errors import InvalidInput
from polyprag.generation import GenerationSettings, generate
from polyprag.models import context_length
from polyprag.routing import CombinationRule

_Route = NDArray[np.float32] | None
_SAMPLING = ("temperature", "top_p", "top_k")


@register_model("polyprag")
class PolypragLM(TemplateLM):  # type: ignore[misc]
    """A store and its base model.

    Args:
        store: path of the store. model: its base model, where it is not installed or cached.
        k: how many documents' routes are combined; 0 asks the bare base model. Default: the store's own.
        max_length: tokens of a prompt with its answer. Default: what the base model was made for.
        gen_toks: tokens of an answer where a task sets no limit.
        batch_size: requests at a time; ``auto`` is 16.
    """

    def __init__(
        self,
        store: str,
        model: str | None = None,
        k: int | None = None,
        batch_size: int | str | None = 16,
        max_length: int | None = None,
        gen_toks: int = 64,
        device: str | None = None,
        dtype: str = "auto",
        attention: str = "auto",
        **unknown: Any,
    ) -> None:
        super().__init__()
        ignored = {"max_batch_size", "trust_remote_code"}  # what the harness gives every model
        if others := sorted(set(unknown) - ignored):
            raise InvalidInput(
                f"model_args: there is no {others[0]!r}; there are store, model, k, max_length ..."
            )
        self.engine = Engine.open(store, model, device=device or "auto", dtype=dtype, attention=attention)
        self.tokenizer: Any = self.engine.base.tokenizer
        self._device = self.engine.base.device
        combination = self.engine.store.spec.combination
        self._k = combination.k if k is None else int(k)
        self._rule, self._temperature = cast(CombinationRule, combination.rule), combination.temperature
        self.batch_size = 16 if batch_size is None or not str(batch_size).isdigit() else int(batch_size)
        self._gen_toks = int(gen_toks)
        self.max_length = int(max_length or context_length(self.engine.base) or 2048)

    # -- what the harness needs to know ------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special).input_ids)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -- requests ----------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        texts = [""] * len(requests)
        routes = self._routes([request.args[0] for request in requests])
        kinds = [(self._settings(r.args[1]), routes[i] is not None) for i, r in enumerate(requests)]
        order = sorted(range(len(requests)), key=lambda i: repr(kinds[i]))
        for (settings, routed), group in groupby(order, key=lambda i: kinds[i]):
            places = list(group)
            limit = self.max_length - settings.max_new_tokens
            if limit < 1:
                raise InvalidInput(
                    f"max_gen_toks is {settings.max_new_tokens}, but prompt and answer have "
                    f"{self.max_length} tokens together: raise max_length, or lower it in the task"
                )
            # Too long a prompt loses its beginning, as in the harness's own models.
            prompts = [self.tok_encode(requests[i].args[0])[-limit:] for i in places]
            batch = torch.from_numpy(np.stack([cast(Any, routes[i]) for i in places])) if routed else None
            done = generate(
                self.engine.base,
                prompts,
                settings,
                routed=self.engine.routed if routed else None,
                routes=batch,
            )
            for place, text in done:
                texts[places[place]] = text
        return texts

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        found = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            scored = self._loglikelihood_tokens([((text, ""), context, rest) for context, rest in pairs])
            found.append(sum(logprob for logprob, _ in scored))
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether it is greedy) of each continuation behind its context."""
        routes = self._routes([context for (context, _), _, _ in requests])
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for routed in (True, False):
            places = [i for i in range(len(requests)) if (routes[i] is not None) == routed]
            places.sort(key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            for begin in range(0, len(places), self.batch_size):
                some = places[begin : begin + self.batch_size]
                scores = self._score([requests[i][1:] for i in some], [routes[i] for i in some])
                for i, score in zip(some, scores, strict=True):
                    found[i] = score
        return found

    @torch.no_grad()
    def _score(
        self, pairs: Sequence[tuple[list[int], list[int]]], routes: Sequence[_Route]
    ) -> list[tuple[float, bool]]:
        rows = [(context + rest)[-(self.max_length + 1) :][:-1] for context, rest in pairs]
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=self._device)
        model: Any = self.engine.base.model
        if routes[0] is None:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        else:
            w = torch.from_numpy(np.stack([cast(Any, route) for route in routes])).to(self._device)
            with self.engine.routed.route(w):
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        scores = []
        for row, (_, rest), own in zip(rows, pairs, logits, strict=True):
            kept = min(len(rest), len(row))
            target = torch.tensor(rest[len(rest) - kept :], device=self._device)
            part = own[len(row) - kept : len(row)].float()
            logprobs = torch.log_softmax(part, dim=-1)
            chosen = logprobs.gather(1, target.unsqueeze(1)).sum()
            scores.append((float(chosen), bool((part.argmax(-1) == target).all())))
        return scores

    def _routes(self, texts: Sequence[str]) -> list[_Route]:
        """The combined route of what BM25 finds for each text's last paragraph: those before are examples."""
        if self._k < 1:
            return [None] * len(texts)
        asked = [text.strip().rpartition("\n\n")[2] for text in texts]
        hits = self.engine.store.search_many(asked, self._k)
        return [self.engine.combine(found, self._rule, self._temperature)[0] for found in hits]

    def _settings(self, given: dict[str, Any]) -> GenerationSettings:
        until = given.get("until") or []
        stop = (until,) if isinstance(until, str) else tuple(s for s in until if s)
        settings = GenerationSettings(
            max_new_tokens=int(given.get("max_gen_toks") or given.get("max_new_tokens") or self._gen_toks),
            stop=stop,
            batch_size=self.batch_size,
        )
        if not given.get("do_sample"):
            return settings
        return replace(settings, **{name: given[name] for name in _SAMPLING if given.get(name) is not None})


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
