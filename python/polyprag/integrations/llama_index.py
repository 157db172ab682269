"""LlamaIndex: a retriever over a store's BM25, and an LLM that answers from its routes.

Needs ``llama-index-core`` (``pip install 'polyprag[llama-index]'``); the LLM also what ``polyprag[train]``
brings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.base.llms.types import (
    CompletionResponse,
    CompletionResponseGen,
    LLMMetadata,
)
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.llms.custom import CustomLLM
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import PrivateAttr

from polyprag._polyprag import Store
from polyprag.integrations.common import found_texts


class PolypragRetriever(BaseRetriever):
    """The documents that BM25 finds in a store, best first, each as a node with its score.

    Args:
        store: an open store, which keeps texts; it is not closed here.
        k: at most so many documents.
        filter: as :meth:`polyprag.Store.search` takes it.
    """

    def __init__(self, store: Store, k: int = 4, filter: Mapping[str, Any] | None = None) -> None:
        self._store, self._k, self._filter = store, k, filter
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(id_=str(found.id), text=found.text, metadata=found.metadata), score=found.score
            )
            for found in found_texts(self._store, query_bundle.query_str, self._k, self._filter)
        ]


class PolypragLLM(CustomLLM):
    """Answers a question from the routes of a store's documents: no passage is in the prompt.

    What it is given is the question and nothing else: the engine makes the prompt that its store was
    trained for.

    Args:
        engine: an open :class:`polyprag.Engine`; it is not closed here.
        k: how many documents' routes are combined; None is what the store was trained for.
        max_new_tokens: the longest answer; None is the engine's own limit.
    """

    _engine: Any = PrivateAttr()
    _k: int | None = PrivateAttr()
    _max_new_tokens: int | None = PrivateAttr()

    def __init__(self, engine: Any, k: int | None = None, max_new_tokens: int | None = None) -> None:
        super().__init__()
        self._engine, self._k, self._max_new_tokens = engine, k, max_new_tokens

    @classmethod
    def class_name(cls) -> str:
        """The name under which LlamaIndex keeps it."""
        return "PolypragLLM"

    @property
    def metadata(self) -> LLMMetadata:
        """What LlamaIndex may know of the model."""
        return LLMMetadata(model_name=str(self._engine.base.name), is_chat_model=False)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:  # noqa: ARG002
        """The whole answer, with the documents that it came from in ``additional_kwargs``."""
        answer = self._engine.ask(prompt, k=self._k, max_new_tokens=self._max_new_tokens)
        return CompletionResponse(text=answer.text, additional_kwargs={"documents": _sources(answer)})

    @llm_completion_callback()
    def stream_complete(
        self,
        prompt: str,
        formatted: bool = False,  # noqa: ARG002 - of the interface
        **kwargs: Any,  # noqa: ARG002 - of the interface
    ) -> CompletionResponseGen:
        """The answer in pieces as they come."""

        def pieces() -> CompletionResponseGen:
            said = ""
            for piece in self._engine.stream(prompt, k=self._k, max_new_tokens=self._max_new_tokens):
                if isinstance(piece, str):
                    said += piece
                    yield CompletionResponse(text=said, delta=piece)

        return pieces()


def _sources(answer: Any) -> list[dict[str, Any]]:
    return [
        {"id": source.id, "title": source.title, "score": source.score, "weight": source.weight}
        for source in answer.documents
    ]
