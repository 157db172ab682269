"""What a store takes, in bytes by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyprag._polyprag import Store


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a store, by part.

    route_bytes_per_document: of what a document has of its own: its route and, where a store has one LoRA a
    document, its LoRA. lora_bytes_per_document: what one LoRA a document would take. codec, recipe: how the
    store was made. digest: of all that it holds; "" is not known.
    """

    documents: int
    parts: Mapping[str, int]
    route_bytes_per_document: float
    lora_bytes_per_document: int
    codec: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    digest: str = ""

    @classmethod
    def of(cls, store: Store) -> Footprint:
        """From what a store tells of itself."""
        info, spec = store.info(), store.spec
        parts = {part.role: part.bytes for part in info.parts}
        own = info.route_bytes_per_document
        if spec.recipe.get("train", {}).get("routing") == "lora" and info.documents:
            own += parts.get("experts", 0) / info.documents
        return cls(
            info.documents, parts, own, info.lora_bytes_per_document, spec.codec, spec.recipe, store.digest()
        )

    @property
    def total_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def bytes_per_document(self) -> float:
        return self.each("all")

    def each(self, *roles: str) -> float:
        """Bytes a document of some parts, ``all`` of them, or of its ``route``."""
        if not self.documents:
            return 0.0
        sizes = {
            "all": self.total_bytes,
            "route": self.route_bytes_per_document * self.documents,
            **self.parts,
        }
        return sum(sizes.get(role, 0) for role in roles) / self.documents

    def to_json(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "parts": {
                role: {"bytes": size, "bytes_per_document": self.each(role)}
                for role, size in self.parts.items()
            },
            "total_bytes": self.total_bytes,
            "bytes_per_document": self.bytes_per_document,
            "route_bytes_per_document": self.route_bytes_per_document,
            "lora_bytes_per_document": self.lora_bytes_per_document,
            "codec": self.codec,
            "recipe": dict(self.recipe),
            "digest": self.digest,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Footprint:
        return cls(
            int(value["documents"]),
            {role: int(part["bytes"]) for role, part in value["parts"].items()},
            float(value["route_bytes_per_document"]),
            int(value["lora_bytes_per_document"]),
            str(value["codec"]),
            dict(value["recipe"]),
            str(value.get("digest", "")),
        )
