"""The gated pair of products as one kernel for GPUs, in Triton; and its definition in torch.

y += (gate * (x A^T)) B is two skinny products, a multiplication and an addition: four launches for each
layer and token, which take longer than what they compute. Here it is one. Needs Triton
(``pip install 'polyprag[triton]'``; torch for CUDA brings it).

Its numbers are tested on a GPU, and without one in the interpreter and by compiling it; its speed has not
been measured. So it is used only where :meth:`RoutedModel.attach` is told ``kernels="triton"``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tokens up to which the kernel is used; above, the products are large enough for torch's own.
MOST_TOKENS = 256

_TOKENS, _INPUTS, _OUTPUTS = 16, 64, 128  # sizes of blocks; a product of blocks takes at least 16


def usable(x: Tensor) -> bool:
    """Whether the kernel takes this input of a layer: few tokens that lie together, on a GPU, nothing to
    differentiate.
    """
    few = x.numel() // x.shape[-1] <= MOST_TOKENS
    return (
        few
        and x.is_contiguous()
        and x.is_cuda
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def gated_pair(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:  # noqa: N803 - as in the papers
    """What the kernel computes, in torch: y + (gate * (x A^T)) B.

    Args:
        y: [tokens, out]. x: [tokens, in]. A: [n, in]. B: [n, out].
        gate: [rows, n]; the tokens of a row lie together, tokens / rows each.
    """
    h = x @ A.T
    return y + (h * gate.repeat_interleave(len(h) // len(gate), 0).to(h.dtype)) @ B


def gated_pair_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, gate: Tensor) -> Tensor:  # noqa: N803
    """As :func:`gated_pair`, written into y, by the kernel. All tensors are contiguous."""
    (tokens, inputs), (n, outputs) = x.shape, B.shape
    grid = (-(-tokens // _TOKENS), -(-outputs // _OUTPUTS))
    width = max(16, 1 << (n - 1).bit_length())
    sizes = tokens, inputs, outputs, n, tokens // len(gate)
    _kernel[grid](y, x, A, B, gate, *sizes, _TOKENS, _INPUTS, _OUTPUTS, width)
    return y


# Blocks of powers of two, with what lies outside masked: any sizes will do. Triton's compiler reads the
# annotations: it takes none but its own.
@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    y_at,
    x_at,
    a_at,
    b_at,
    gate_at,
    tokens,
    inputs,
    outputs,
    n,
    tokens_a_row,
    block_tokens: tl.constexpr,
    block_inputs: tl.constexpr,
    block_outputs: tl.constexpr,
    width: tl.constexpr,
):
    token = tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)
    output = tl.program_id(1) * block_outputs + tl.arange(0, block_outputs)
    expert = tl.arange(0, width)
    # Every block of outputs computes h anew: cheaper than another launch, and a place to keep it.
    h = tl.full((block_tokens, width), 0.0, tl.float32)
    for begin in range(0, inputs, block_inputs):
        column = begin + tl.arange(0, block_inputs)
        x = tl.load(
            x_at + token[:, None] * inputs + column[None, :],
            mask=(token[:, None] < tokens) & (column[None, :] < inputs),
            other=0.0,
        )
        a = tl.load(
            a_at + expert[None, :] * inputs + column[:, None],
            mask=(expert[None, :] < n) & (column[:, None] < inputs),
            other=0.0,
        )
        h += tl.dot(x, a, input_precision="ieee")
    gate = tl.load(
        gate_at + (token // tokens_a_row)[:, None] * n + expert[None, :],
        mask=(token[:, None] < tokens) & (expert[None, :] < n),
        other=0.0,
    )
    b = tl.load(
        b_at + expert[:, None] * outputs + output[None, :],
        mask=(expert[:, None] < n) & (output[None, :] < outputs),
        other=0.0,
    )
    inside = (token[:, None] < tokens) & (output[None, :] < outputs)
    place = y_at + token[:, None] * outputs + output[None, :]
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    y += tl.dot((h * gate).to(b.dtype), b, input_precision="ieee")
    tl.store(place, y.to(y_at.dtype.element_ty), mask=inside)
