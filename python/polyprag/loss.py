"""The losses of language modelling and their gradients, without the logits of what is not learnt.

The logits of a whole batch are its largest tensor: 49,152 numbers a token in the small model, kept twice by
autograd. Here the last hidden states of the tokens that are learnt go through the head some at a time, and
each part leaves its gradient with respect to these states behind and nothing else. And the softmax can be
over a sample of the vocabulary: a hundred passages of PopQA and their questions have 2,458 tokens of it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polyprag.models import BaseModel
from polyprag.samples import Sample
from polyprag.sharding import is_sharded

DRAWN = 8_192  # tokens of a sampled softmax beside those of the corpus
_PROBE = (1, 2, 3, 5)  # token ids that every vocabulary has
_LOGITS_BYTES = {"cpu": 24 << 20}  # at a time: near the processor; elsewhere as many as keep it busy


@dataclass(frozen=True)
class Losses:
    """Sums over tokens, in nats, and the gradient of their weighted sum.

    cross_entropy: of the tokens to be learnt. divergence: KL(taught || model), of their distributions; 0
    without a teacher. gradient: with respect to the outputs, in their shape and dtype.
    """

    cross_entropy: Tensor
    divergence: Tensor
    gradient: Tensor


class CausalLoss:
    """The next-token losses of a base model.

    Where the model's head is one matrix product (``plain``), hidden states and head are computed apart. A
    head that does more (Gemma caps its logits, Granite divides them) stays within the model, and is given
    the states of learnt tokens alone.

    compile: have torch compile the model.
    sampled: samples whose tokens the softmax is over, and 8,192 others that :meth:`draw` draws; None is a
    softmax over the whole vocabulary, as it is where the head is not plain.
    """

    def __init__(
        self, base: BaseModel, *, compile: bool = False, sampled: Sequence[Sample] | None = None
    ) -> None:
        model: Any = base.model
        self._head = model.get_output_embeddings()
        self.plain = _is_plain(base, self._head)
        model = model.base_model if self.plain else model
        self._model = torch.compile(model, dynamic=True) if compile else model
        self._classes = None if sampled is None or not self.plain else _Classes.of(self._head, sampled)

    def draw(self, seed: str) -> None:
        """Draw anew what a sampled softmax is over beside the tokens of the samples."""
        if self._classes is not None:
            self._classes.draw(seed)

    def outputs(self, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """What the model says of the n tokens to be learnt: last hidden states, or logits, [n, ...].

        ids, mask and targets [rows, longest] as of :func:`polyprag.batches.collate`: a target is the token to
        be learnt, or -100.
        """
        places = (targets.flatten() >= 0).nonzero().squeeze(1)

        def chosen(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (inputs[0].flatten(0, 1).index_select(0, places).unsqueeze(0), *inputs[1:])

        inside = None if self.plain or self._head is None else self._head.register_forward_pre_hook(chosen)
        try:
            said = self._model(input_ids=ids, attention_mask=mask, use_cache=False)
        finally:
            if inside is not None:
                inside.remove()
        found: Tensor = said[0] if self.plain else said.logits
        return found.squeeze(0) if inside is not None else found.flatten(0, 1).index_select(0, places)

    def losses(
        self,
        outputs: Tensor,
        targets: Tensor,
        scale: float,
        taught: Tensor | None = None,
        taught_scale: float = 0.0,
    ) -> Losses:
        """The losses of :meth:`outputs`, and the gradient of ``scale`` times the cross-entropy and
        ``taught_scale`` times the divergence from the outputs ``taught`` of a teacher.
        """
        wanted = targets.flatten()
        wanted = wanted[wanted >= 0]
        head = (self._head.weight, self._head.bias) if self.plain else None
        if self._classes is not None:
            wanted, head = self._classes.place[wanted], self._classes.head
        return head_losses(outputs.detach(), head, wanted, scale, taught, taught_scale)


class _Classes:
    """What a sampled softmax is over: the tokens of a corpus, and others that are drawn.

    A token that is drawn stands for all that could have been, so that the sum in the softmax is on average
    that of the whole vocabulary: the logarithm of how many it stands for is added to its logit (Jean et al.,
    arXiv 1412.2007, section 3).
    """

    def __init__(self, head: Any, own: Tensor, others: Tensor) -> None:
        self._head, self._own, self._others = head, own, others
        self.place = own.new_full((len(head.weight),), -1)  # of each of the corpus's tokens in the softmax
        self.place[own] = torch.arange(len(own), device=own.device)
        self.draw("")

    @classmethod
    def of(cls, head: Any, samples: Sequence[Sample]) -> _Classes | None:
        """None where the whole vocabulary is no larger."""
        own = torch.zeros(len(head.weight), dtype=torch.bool)
        own[list({token for s in samples for token in s.ids})] = True
        if int(own.sum()) + DRAWN >= len(own):
            return None
        own = own.to(head.weight.device)
        return cls(head, own.nonzero().squeeze(1), (~own).nonzero().squeeze(1))

    @torch.no_grad()
    def draw(self, seed: str) -> None:
        # On the CPU, so that every device and every process draws the same.
        generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
        drawn = torch.randperm(len(self._others), generator=generator)[:DRAWN].to(self._own.device)
        tokens = torch.cat([self._own, self._others[drawn]])
        weight, bias = self._head.weight[tokens], self._head.bias
        shift = weight.new_zeros(len(tokens)) if bias is None else bias[tokens]
        shift[len(self._own) :] += math.log(len(self._others) / len(drawn))
        self.head = weight, shift


@torch.no_grad()
def head_losses(
    outputs: Tensor,
    head: tuple[Tensor, Tensor | None] | None,
    targets: Tensor,
    scale: float,
    taught: Tensor | None = None,
    taught_scale: float = 0.0,
) -> Losses:
    """The losses of ``targets`` [n], computed in float32.

    head: weight [vocabulary, hidden] and bias that make logits of the outputs [n, hidden]; None where these
    are logits already. ``taught``: as the outputs, of a teacher.
    """
    gradient = torch.empty_like(outputs)
    entropy, divergence = torch.zeros((2,), device=outputs.device)
    vocabulary = outputs.shape[1] if head is None else len(head[0])
    rows = max(_LOGITS_BYTES.get(outputs.device.type, 256 << 20) // (4 * vocabulary), 1)
    for begin in range(0, len(outputs), rows):
        part = slice(begin, begin + rows)
        own = targets[part].unsqueeze(1)
        logits = _logits(outputs[part], head)
        if taught is None:
            weights, some = _softmax(logits, own)
            weights.mul_(scale)
        else:
            weights, some, other = _taught(logits, _logits(taught[part], head), own, scale, taught_scale)
            divergence += other
        entropy += some
        weights.scatter_add_(1, own, weights.new_full(own.shape, -scale))
        if head is None:
            gradient[part] = weights
        else:
            torch.mm(weights.to(outputs.dtype), head[0], out=gradient[part])
    return Losses(entropy, divergence, gradient)


def _logits(outputs: Tensor, head: tuple[Tensor, Tensor | None] | None) -> Tensor:
    """In float32, and nobody else's."""
    if head is None:
        return outputs.to(torch.float32, copy=True)
    return nn.functional.linear(outputs, *head).float()


def _softmax(logits: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax in place, and the summed cross-entropy of the classes ``own`` [n, 1]."""
    aimed = logits.gather(1, own)
    highest = logits.amax(1, keepdim=True)
    weights = logits.sub_(highest).exp_()
    sums = weights.sum(1, keepdim=True)
    return weights.div_(sums), (sums.log() + highest - aimed).sum()


def _taught(
    logits: Tensor, taught: Tensor, own: Tensor, scale: float, taught_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient without what the classes ``own`` take from it, the cross-entropy, and the divergence."""
    logits, taught = logits.log_softmax(1), taught.log_softmax(1)
    entropy = -logits.gather(1, own).sum()
    aims = taught.exp()
    divergence = (aims * (taught - logits)).sum()
    return logits.exp_().mul_(scale + taught_scale).sub_(aims, alpha=taught_scale), entropy, divergence


@torch.no_grad()
def _is_plain(base: BaseModel, head: Any) -> bool:
    """Whether the logits are the head's product with the last hidden states and no more, by trying."""
    # The parameters of a model in parts are put together by its own forward pass alone.
    if type(head) is not nn.Linear or base.model.base_model is base.model or is_sharded(base.model):
        return False
    ids = torch.tensor([_PROBE], device=base.device)
    logits = base.model(input_ids=ids, use_cache=False).logits
    return torch.equal(head(base.model.base_model(input_ids=ids, use_cache=False)[0]), logits)
