"""The Rust core.

Arrays are numpy, little endian, C order; those that come out are read-only views or fresh copies.

Long calls take ``progress``: it is called in the thread of the call, some times a second and at the end, with
how much is done and of how much. What is counted, the call says; what is gone through twice counts twice.
``done`` never goes back and ends at the total, which is 0 while it is not known. What it raises ends the call
and is raised by it; so is KeyboardInterrupt when Ctrl-C is pressed, in the main thread, with or without
``progress``. Then nothing of the call is there: no new store, and a writer is closed without a commit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

__version__: str
tantivy_version: str

__all__ = [
    "Combination",
    "Document",
    "Hit",
    "Module",
    "PartInfo",
    "Store",
    "StoreInfo",
    "StoreSpec",
    "VerifyReport",
    "Writer",
    "__version__",
    "tantivy_version",
]

@final
class Document:
    """One retrievable passage. Immutable, comparable, picklable."""

    def __new__(
        cls,
        id: str | int,
        text: str | None = None,
        title: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Self: ...
    @property
    def id(self) -> str | int: ...
    @property
    def title(self) -> str | None: ...
    @property
    def text(self) -> str | None: ...
    @property
    def metadata(self) -> dict[str, Any] | None: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Hit:
    """One document that BM25 found, best first in the list it comes in."""

    @property
    def id(self) -> str | int: ...
    @property
    def score(self) -> float: ...
    @property
    def docno(self) -> int: ...

@final
class Module:
    """One adapted linear layer of the base model and the route group that it belongs to."""

    def __new__(cls, name: str, in_features: int, out_features: int, group: int) -> Self: ...
    @property
    def name(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def group(self) -> int: ...

@final
class Combination:
    """How the routes of several documents become one: what training used, and the default when asking."""

    def __new__(
        cls,
        k: int = 1,
        rule: Literal["mean", "score", "first", "sum"] = "mean",
        temperature: float = 1.0,
    ) -> Self: ...
    @property
    def k(self) -> int: ...
    @property
    def rule(self) -> str: ...
    @property
    def temperature(self) -> float: ...

@final
class StoreSpec:
    """What is fixed when a store is created.

    ``codec``: ``"f32"``, ``"f16"``, ``"q8"``, ``"q4"``, ``"q2"``, ``"q1"`` keep routing logits z of shape
    [groups, experts]; ``"code(d)"`` and ``"code(d,int4)"`` keep a code of d numbers, in 8 or 4 bits, and need
    a decoder; ``"sparse(k)"`` keeps the k largest weights of each group, and takes weights for logits.
    ``base_model`` and ``recipe`` are JSON objects that the core carries and does not read.
    """

    def __new__(
        cls,
        *,
        modules: Sequence[Module],
        experts: int,
        rank: int,
        alpha: float,
        codec: str,
        phi: Literal["sigmoid", "softmax", "linear"] = "sigmoid",
        top_k: int | None = None,
        mixing: Literal["exact", "factors"] = "exact",
        combination: Combination = ...,
        id_type: Literal["string", "u64"] = "string",
        keep_title: bool = True,
        keep_text: bool = True,
        keep_metadata: bool = True,
        stemmer: Literal["english"] | None = None,
        filters: Mapping[str, Literal["string", "i64", "f64", "bool"]] = ...,
        base_model: Mapping[str, Any] = ...,
        recipe: Mapping[str, Any] = ...,
    ) -> Self: ...
    @property
    def modules(self) -> list[Module]: ...
    @property
    def groups(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def alpha(self) -> float: ...
    @property
    def codec(self) -> str: ...
    @property
    def phi(self) -> str: ...
    @property
    def top_k(self) -> int | None: ...
    @property
    def mixing(self) -> str: ...
    @property
    def combination(self) -> Combination: ...
    @property
    def id_type(self) -> str: ...
    @property
    def keep_title(self) -> bool: ...
    @property
    def keep_text(self) -> bool: ...
    @property
    def keep_metadata(self) -> bool: ...
    @property
    def stemmer(self) -> str | None: ...
    @property
    def analyser(self) -> str: ...
    @property
    def filters(self) -> dict[str, str]: ...
    @property
    def base_model(self) -> dict[str, Any]: ...
    @property
    def recipe(self) -> dict[str, Any]: ...

@final
class PartInfo:
    """Bytes of one role in the generation.

    Roles: ``experts``, ``decoder``, ``router``, ``scales``, ``routes``, ``ids``, ``documents``, ``dead``,
    ``bm25``, ``manifest``.
    """

    @property
    def role(self) -> str: ...
    @property
    def files(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def bytes_per_document(self) -> float: ...

@final
class StoreInfo:
    @property
    def path(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def documents(self) -> int: ...
    @property
    def unrouted(self) -> int: ...
    @property
    def total_bytes(self) -> int: ...
    @property
    def bytes_per_document(self) -> float: ...
    @property
    def route_bytes_per_document(self) -> float: ...
    @property
    def lora_bytes_per_document(self) -> int:
        """What one LoRA a document of this rank and these modules would take, in the dtype of the experts."""
    @property
    def parts(self) -> list[PartInfo]: ...
    def to_dict(self) -> dict[str, Any]: ...

@final
class VerifyReport:
    @property
    def files(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def documents(self) -> int: ...

@final
class Store:
    """One generation of a store, open for reading. Safe to share between threads."""

    @staticmethod
    def open(path: str | PathLike[str], *, expect_digest: str | None = None) -> Store:
        """The newest generation. With ``expect_digest``, CorruptStore unless it has that digest."""
    @staticmethod
    def unpack(
        file: str | PathLike[str],
        path: str | PathLike[str],
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Make a new store at ``path`` of a file that ``pack`` wrote, all of it checked.

        Progress in bytes.
        """
    @staticmethod
    def create(
        path: str | PathLike[str],
        spec: StoreSpec,
        experts: Mapping[str, NDArray[Any]],
        decoder: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
        *,
        router: Mapping[str, NDArray[np.float32]] | None = None,
        expert_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None,
    ) -> Writer:
        """A writer for a new store; nothing is visible at ``path`` before its first commit.

        experts: ``{module name}.A`` of shape [K, r, in] and ``{module name}.B`` of shape [out, K, r],
        all float32 or all float16. They are written as they are, or as ``expert_dtype``: ``int8`` has a
        scale for each of the K * r rows of a tensor. decoder: V [groups * K, d] and b [groups * K], float32.

        router: the parameters of an amortised router, which makes a document's code of its text; for codecs
        that keep codes alone. 1 to 64 arrays of one or two dimensions, under names of 1 to 128 ASCII
        letters, digits, ``.``, ``_`` or ``-``. The store carries them and does not compute with them.
        """
    def writer(self) -> Writer: ...
    @property
    def path(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def spec(self) -> StoreSpec: ...
    @property
    def experts(self) -> dict[str, NDArray[Any]]:
        """Read-only arrays. Of float32 and float16, views into the mapped file, which they keep alive; of
        bfloat16 and int8, float32 that is decoded at each call."""
    @property
    def expert_dtype(self) -> Literal["float32", "bfloat16", "float16", "int8"]: ...
    @property
    def decoder(self) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None: ...
    @property
    def router(self) -> dict[str, NDArray[np.float32]] | None:
        """The amortised router, if the store was created with one: read-only views into the mapped file,
        which they keep alive."""
    def search(self, text: str, k: int = 10, filter: Mapping[str, Any] | None = None) -> list[Hit]:
        """The best ``k`` documents for a text, best first. Any text is a question.

        filter: only documents that satisfy all of it, on fields that the spec declares. A value must be
        equal, of a list one, and a range has any of ``gte``, ``gt``, ``lte``, ``lt``:
        ``{"lang": "en", "kind": ["a", "b"], "year": {"gte": 1990, "lt": 2000}}``. A document without
        a value does not pass. Scores are those without a filter.
        """
    def search_many(
        self,
        texts: Sequence[str],
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> list[list[Hit]]:
        """As ``search`` for each text, all in one generation, on all processors. Progress in texts."""
    def routes(self, ids: Sequence[str | int], kind: Literal["w", "z", "code"] = "w") -> NDArray[np.float32]:
        """[n, groups, K] for ``w`` and ``z``, [n, d] for ``code``."""
    def records(self, ids: Sequence[str | int]) -> NDArray[np.uint8]:
        """The records as the codec keeps them, of shape [n, width]; see docs/format.md for their bytes."""
    def combined_route(
        self, ids: Sequence[str | int], weights: Sequence[float] | NDArray[np.floating[Any]] | None = None
    ) -> NDArray[np.float32]:
        """sum_d weights[d] * w_d, of shape [groups, K]; equal weights (1/n) when None."""
    def documents(self, ids: Sequence[str | int]) -> list[Document]: ...
    def is_routed(self, id: str | int) -> bool: ...
    def info(self) -> StoreInfo: ...
    def verify(self, *, progress: Callable[[int, int], object] | None = None) -> VerifyReport:
        """Read everything and compare it with every checksum. Progress in bytes."""
    def digest(self) -> str:
        """What this generation is: the BLAKE3 of its manifest, which names every file with its own.

        Copies (``snapshot``, ``pack``) have the digest of their source. Together with ``verify`` it vouches
        for every byte.
        """
    def snapshot(
        self, path: str | PathLike[str], *, progress: Callable[[int, int], object] | None = None
    ) -> None:
        """Copy this generation, and nothing of others, to a new store at ``path``. Progress in bytes."""
    def pack(
        self, path: str | PathLike[str], *, progress: Callable[[int, int], object] | None = None
    ) -> None:
        """Write this generation into one new file at ``path``, a tar archive of always the same bytes.

        Progress in bytes.
        """
    def recode(
        self,
        path: str | PathLike[str],
        *,
        codec: str,
        decoder: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
        projection: NDArray[np.float32] | None = None,
        expert_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Write a new store at ``path`` with the same documents, their routes in another codec.

        For codes that the store does not keep, decoder (V, b) and projection P [d, groups * K] make them: a
        code is P (z - b). ``polyprag.recode`` fits these. Without ``expert_dtype`` experts stay as they are.
        An amortised router is kept if its decoder is, for which it makes codes; else it is left out.
        Progress in bytes.
        """
    def refresh(self) -> bool:
        """Move on to the newest generation; True if there was one."""
    def close(self) -> None: ...
    @property
    def closed(self) -> bool: ...
    def __len__(self) -> int: ...
    def __contains__(self, id: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str | int]: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

@final
class Writer:
    """The one writer of a store. Leaving the ``with`` block cleanly commits; an exception discards.

    Progress is in documents.
    """

    def add(
        self,
        documents: Iterable[Document],
        routes: NDArray[np.float32] | None = None,
        *,
        on_duplicate: Literal["error", "replace", "skip"] = "error",
        progress: Callable[[int, int], object] | None = None,
    ) -> int:
        """Stage documents and their routes: [n, groups, K] logits (weights for ``sparse(k)``), [n, d] codes.

        None leaves them unrouted: searchable, never mixed. All or none of a call; returns how many
        were added.
        """
    def add_arrays(
        self,
        ids: Sequence[str | int] | NDArray[np.integer[Any] | np.bytes_ | np.str_],
        routes: NDArray[np.float32],
        *,
        on_duplicate: Literal["error", "replace", "skip"] = "error",
        progress: Callable[[int, int], object] | None = None,
    ) -> int:
        """Stage documents without title and text (reachable by id only), in bulk; returns how many.

        Arrays are fastest: integers, or text as ``S`` (UTF-8) or ``U``. Duplicates are looked for later: with
        ``"error"``, ``commit`` or the next ``add`` or ``delete`` raises DuplicateId and closes the writer.
        """
    def merge(
        self,
        store: Store,
        *,
        on_duplicate: Literal["error", "replace", "skip"] = "error",
        progress: Callable[[int, int], object] | None = None,
    ) -> int:
        """Stage the living documents of a store with the same experts, decoder and codec; returns how many.

        Their routes are copied bit for bit; an amortised router that the store has is not. Duplicates are
        looked for later, as after ``add_arrays``.
        """
    def delete(
        self,
        ids: Sequence[str | int] | NDArray[np.integer[Any] | np.bytes_ | np.str_],
        *,
        progress: Callable[[int, int], object] | None = None,
    ) -> int:
        """Stage deletions; all or none of a call. Returns how many documents it takes away."""
    def commit(self, *, progress: Callable[[int, int], object] | None = None) -> int:
        """Make everything staged the next generation and return its number; the writer stays open."""
    def compact(self, *, progress: Callable[[int, int], object] | None = None) -> int:
        """Take what died out of the files and join segments, as a new generation; returns its number.

        Documents keep their numbers and, bit for bit, their routes. Nothing may be staged. The bytes are free
        when the generation before goes, with a later commit.
        """
    def reindex(self, *, progress: Callable[[int, int], object] | None = None) -> int:
        """Build the BM25 index anew from kept title and text, as a new generation; returns its number."""
    def rollback(self) -> int:
        """Go back to what the generation before held, as a new generation; returns its number."""
    def discard(self) -> None:
        """Forget everything staged, and close the writer."""
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
