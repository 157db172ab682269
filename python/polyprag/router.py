"""The amortised router: from a document's text to its code in one forward pass, without a gradient step.

A document's features are hidden states of the frozen base model, read once; the router is a small network on
them that is trained together with the experts. It encodes new documents at the speed of reading them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyprag.batches import padded
from polyprag.errors import InvalidInput
from polyprag.models import BaseModel

HIDDEN = 512
DEPTHS = (1 / 3, 2 / 3, 1.0)  # of the base model's layers, whose states are read
TOKENS = 256  # of a document


class Router(nn.Module):
    """Features [n, f] to codes [n, d]."""

    def __init__(self, features: int, code_dim: int, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.hidden = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, code_dim)

    def forward(self, features: Tensor) -> Tensor:
        codes: Tensor = self.out(nn.functional.gelu(self.hidden(self.norm(features))))
        return codes

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """Its parameters by name, as a store keeps them."""
        return {name: t.detach().float().cpu().numpy() for name, t in self.state_dict().items()}

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[np.floating]]) -> Router:
        """The router of :meth:`arrays`. Raises InvalidInput if they are none."""
        try:
            (hidden, features), (code_dim, _) = arrays["hidden.weight"].shape, arrays["out.weight"].shape
            router = cls(features, code_dim, hidden)
            router.load_state_dict({k: torch.from_numpy(np.array(v, np.float32)) for k, v in arrays.items()})
        except (KeyError, ValueError, RuntimeError) as error:
            raise InvalidInput(f"these arrays are no router: {error}") from error
        return router

    @torch.no_grad()
    def codes(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features [n, f] to codes [n, d], without gradients."""
        device = self.out.weight.device
        codes: NDArray[np.float32] = self(torch.from_numpy(features).to(device)).float().cpu().numpy()
        return codes


def feature_size(base: BaseModel) -> int:
    """How many numbers the router reads of a text: states of the model for texts, where it has others."""
    return len(DEPTHS) * int(base.model.config.get_text_config().hidden_size)


@torch.no_grad()
def text_features(
    base: BaseModel,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    progress: Callable[[int], None] = lambda done: None,
) -> NDArray[np.float32]:
    """What the router reads of each text: [n, 3 * hidden size], float32.

    The means over the first 256 tokens of the states at a third, two thirds and the end of the base model.
    progress: called with the number of texts that each batch finished.
    """
    model, tokenizer = base.model, base.tokenizer
    ids = [tokenizer(text, truncation=True, max_length=TOKENS).input_ids or [0] for text in texts]
    found = np.zeros((len(texts), feature_size(base)), dtype=np.float32)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        batch, mask = (t.to(base.device) for t in padded([ids[i] for i in places], 0))
        # The base model without its head: no logits are needed.
        read = model.base_model(
            input_ids=batch, attention_mask=mask, use_cache=False, output_hidden_states=True
        )
        states = read.hidden_states
        last = len(states) - 1
        part = mask.unsqueeze(-1).float() / mask.sum(1).view(-1, 1, 1)
        means = [(states[round(depth * last)].float() * part).sum(1) for depth in DEPTHS]
        found[places] = torch.cat(means, dim=1).cpu().numpy()
        progress(len(places))
    return found
