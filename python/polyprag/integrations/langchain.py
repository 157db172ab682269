"""LangChain: a retriever over a store's BM25, and an LLM that answers from its routes.

Needs ``langchain-core`` (``pip install 'polyprag[langchain]'``); the LLM also what
``polyprag[train]`` brings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models.llms import LLM
from langchain_core.outputs import GenerationChunk
from langchain_core.retrievers import BaseRetriever
from pydantic import ConfigDict, Field, SkipValidation

from polyprag._polyprag import Store
from polyprag.integrations.common import found_texts
from polyprag.stops import begun, cut


class PolypragRetriever(BaseRetriever):
    """The documents that BM25 finds in a store, best first.

    Their ids are text; ``metadata`` has ``title``, ``score`` (BM25) and what the document has of its own.

    Args:
        store: an open store, which keeps texts; it is not closed here.
        k: at most so many documents.
        filter: as :meth:`polyprag.Store.search` takes it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    store: SkipValidation[Store]
    k: int = Field(default=4, ge=1)
    filter: Mapping[str, Any] | None = None

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - of the interface
    ) -> list[Document]:
        return [
            Document(page_content=found.text, metadata=found.metadata, id=str(found.id))
            for found in found_texts(self.store, query, self.k, self.filter)
        ]


class PolypragLLM(LLM):
    """Answers a question from the routes of a store's documents: no passage is in the prompt.

    What it is given is the question and nothing else: the engine makes the prompt that its store was
    trained for.

    Args:
        engine: an open :class:`polyprag.Engine`; it is not closed here.
        k: how many documents' routes are combined; None is what the store was trained for.
        max_new_tokens: the longest answer; None is the engine's own limit.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    engine: SkipValidation[Any]
    k: int | None = None
    max_new_tokens: int | None = None

    @property
    def _llm_type(self) -> str:
        return "polyprag"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        store: Store = self.engine.store
        return {"store": store.digest(), "k": self.k, "max_new_tokens": self.max_new_tokens}

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - of the interface
        **kwargs: Any,  # noqa: ARG002 - of the interface
    ) -> str:
        answer = self.engine.ask(prompt, k=self.k, max_new_tokens=self.max_new_tokens)
        return cut(answer.text, stop or ())

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,  # noqa: ARG002 - of the interface
    ) -> Iterator[GenerationChunk]:
        text, said, stops = "", 0, stop or ()
        for piece in self.engine.stream(prompt, k=self.k, max_new_tokens=self.max_new_tokens):
            last = not isinstance(piece, str)  # the whole answer, whose text has come
            if not last:
                text += piece
            whole = cut(text, stops)
            sure = len(text) - (0 if last else begun(text, stops))
            end = min(len(whole), sure)
            if end > said:
                chunk = GenerationChunk(text=whole[said:end])
                said = end
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk
            if last or end == len(whole) < len(text):
                return
