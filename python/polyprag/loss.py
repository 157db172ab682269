"""The loss of language modelling and its gradient, without the logits of what is not learnt.

The logits of a whole batch are its largest tensor: 49,152 numbers a token in the small model, kept twice by
autograd. Here the last hidden states of the tokens that are learnt go through the head some at a time, and
each part leaves its gradient with respect to these states behind and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polyprag.models import BaseModel

_PROBE = (1, 2, 3, 5)  # token ids that every vocabulary has
_LOGITS_BYTES = {"cpu": 24 << 20}  # at a time: near the processor; elsewhere as many as keep it busy


class CausalLoss:
    """Cross-entropy of a base model's next tokens, summed.

    Where the model's head is one matrix product, hidden states and head are computed apart. A head that does
    more (Gemma scales its logits softly, Granite divides them) stays within the model, and is given the
    states of learnt tokens alone.

    compile: have torch compile the model.
    """

    def __init__(self, base: BaseModel, *, compile: bool = False) -> None:
        model: Any = base.model
        self._head = model.get_output_embeddings()
        self.plain = _is_plain(base, self._head)
        model = model.base_model if self.plain else model
        self._model = torch.compile(model, dynamic=True) if compile else model

    def backward(self, ids: Tensor, mask: Tensor, targets: Tensor, scale: float) -> Tensor:
        """Add the gradients of ``scale`` times the loss to the model's parameters; returns the loss alone.

        ids, mask and targets [rows, longest] as of :func:`polyprag.batches.collate`: a target is the token to
        be learnt, or -100.
        """
        places = (targets.flatten() >= 0).nonzero().squeeze(1)
        wanted = targets.flatten()[places]
        if not self.plain:
            loss = nn.functional.cross_entropy(
                self._logits(ids, mask, places).float(), wanted, reduction="sum"
            )
            torch.autograd.backward(loss * scale)
            return loss.detach()
        hidden = self._model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        states = hidden.flatten(0, 1).index_select(0, places)
        head = self._head
        loss, gradient = head_loss(states.detach(), head.weight, head.bias, wanted, scale)
        torch.autograd.backward(states, gradient)
        return loss

    def _logits(self, ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        """Those of some places of the flattened batch [n, vocabulary], from the model itself."""

        def chosen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0].flatten(0, 1).index_select(0, places).unsqueeze(0), *inputs[1:])

        if self._head is None:
            logits: Tensor = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits.flatten(0, 1).index_select(0, places)
        hook = self._head.register_forward_pre_hook(chosen)
        try:
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            hook.remove()
        return logits.squeeze(0)


@torch.no_grad()
def head_loss(
    states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of ``targets`` [n] under softmax(states W^T + b), computed in float32.

    states [n, hidden] and weight [vocabulary, hidden] of one dtype. Returns the loss, and ``scale`` times its
    gradient with respect to the states, in their dtype.
    """
    gradient = torch.empty_like(states)
    total = torch.zeros((), device=states.device)
    rows = max(_LOGITS_BYTES.get(states.device.type, 256 << 20) // (4 * len(weight)), 1)
    for begin in range(0, len(states), rows):
        part = slice(begin, begin + rows)
        logits = nn.functional.linear(states[part], weight, bias).float()
        own = targets[part].unsqueeze(1)
        aimed = logits.gather(1, own)
        highest = logits.amax(1, keepdim=True)
        weights = logits.sub_(highest).exp_()
        sums = weights.sum(1, keepdim=True)
        total += (sums.log() + highest - aimed).sum()
        weights.mul_(scale / sums)
        weights.scatter_add_(1, own, weights.new_full(own.shape, -scale))
        torch.mm(weights.to(states.dtype), weight, out=gradient[part])
    return total, gradient


@torch.no_grad()
def _is_plain(base: BaseModel, head: Any) -> bool:
    """Whether the logits are the head's product with the last hidden states and no more, by trying."""
    if type(head) is not nn.Linear or base.model.base_model is base.model:
        return False
    ids = torch.tensor([_PROBE], device=base.device)
    logits = base.model(input_ids=ids, use_cache=False).logits
    return torch.equal(head(base.model.base_model(input_ids=ids, use_cache=False)[0]), logits)
