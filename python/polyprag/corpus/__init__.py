"""Documents from what people have: tables, texts, PDF, folders and data sets, whole or in pieces."""

from polyprag.corpus.chunks import Chunker
from polyprag.corpus.ids import MAX_TEXT_BYTES, DocumentId, content_id
from polyprag.corpus.reader import (
    WHOLE_TEXTS,
    CorpusFormat,
    CorpusReader,
    LeftOut,
    OnEmpty,
    infer_format,
    read_corpus,
)
from polyprag.corpus.unified import Passage, UnifiedRow, read_unified

__all__ = [
    "MAX_TEXT_BYTES",
    "WHOLE_TEXTS",
    "Chunker",
    "CorpusFormat",
    "CorpusReader",
    "DocumentId",
    "LeftOut",
    "OnEmpty",
    "Passage",
    "UnifiedRow",
    "content_id",
    "infer_format",
    "read_corpus",
    "read_unified",
]
