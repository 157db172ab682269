"""The Triton kernel in Triton's interpreter, against the definition in torch; a GPU is not needed."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from polyprag.errors import InvalidInput
from polyprag.models import BaseModel
from routed import attach, draw_routes, logits, some_ids

pytest.importorskip("triton")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    from polyprag import kernels

    return importlib.reload(kernels)  # whoever imported it before had no interpreter


@pytest.mark.parametrize(
    ("rows", "tokens", "inputs", "outputs", "n"),
    [
        (1, 1, 64, 128, 32),
        (3, 3, 72, 136, 32),
        (2, 34, 40, 24, 10),  # several tokens a row, more than a block of them
        (1, 5, 16, 260, 33),  # one route for all; more than a power of two
        (4, 4, 130, 48, 1),
    ],
)
def test_the_kernel_computes_what_torch_does(
    kernels: Any, rows: int, tokens: int, inputs: int, outputs: int, n: int
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    A, B, gate = torch.randn(n, inputs), torch.randn(n, outputs), torch.rand(rows, n)
    exact = kernels.gated_pair(*(t.double() for t in (y, x, A, B, gate)))
    torch.testing.assert_close(kernels.gated_pair(y, x, A, B, gate).double(), exact, rtol=1e-4, atol=1e-3)
    assert kernels.gated_pair_(y, x, A, B, gate) is y
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-3)


def test_the_kernel_in_half_precision(kernels: Any) -> None:
    """Of float16 alone: of bfloat16, the interpreter (Triton 3.9) multiplies the bits as whole numbers."""
    torch.manual_seed(0)
    dtype = torch.float16
    shapes = (3, 40), (3, 64), (8, 64), (8, 40), (3, 8)
    y, x, A, B, gate = (torch.randn(shape).to(dtype) for shape in shapes)
    exact = kernels.gated_pair(*(t.double() for t in (y, x, A, B, gate)))
    kernels.gated_pair_(y, x, A, B, gate)
    assert y.dtype == dtype
    assert (y.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_kernel_compiles_for_gpus(dtype: str, capability: int) -> None:
    """Which needs no GPU; the interpreter takes what the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from polyprag import kernels

    kernel = importlib.reload(kernels)._kernel
    sizes = {"block_tokens": 16, "block_inputs": 64, "block_outputs": 128, "width": 32}
    signature = {
        name: f"*{dtype}" if name.endswith("_at") else "constexpr" if name in sizes else "i32"
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of defaults that Triton is about to change
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert "cubin" in compiled.asm


def test_a_model_computes_by_the_kernel_what_it_does_by_torch(
    tiny_base: BaseModel, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed = attach(tiny_base.model)
    w, ids = draw_routes(2, routed), some_ids(2, 3)
    with routed.route(w):
        expected = logits(tiny_base.model, ids)
    routed.detach()
    routed = attach(tiny_base.model, kernels="triton")  # the same experts, by their seed
    calls: list[torch.Size] = []
    monkeypatch.setattr(kernels, "usable", lambda x: calls.append(x.shape) is None)
    with routed.route(w):
        torch.testing.assert_close(logits(tiny_base.model, ids), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == len(routed.layers)


def test_on_a_processor_torch_computes(tiny_base: BaseModel, kernels: Any) -> None:
    assert not kernels.usable(torch.zeros(1, 1, 8))
    with FakeTensorMode(), torch.no_grad():
        x = torch.zeros(2, 3, 8, device="cuda")
        assert kernels.usable(x)
        assert not kernels.usable(x[..., :4]), "rows that do not lie together"
    routed = attach(tiny_base.model, kernels="triton")
    with routed.route(draw_routes(1, routed)):
        logits(tiny_base.model, some_ids(1))
    routed.detach()
    with pytest.raises(InvalidInput, match="torch"):
        attach(tiny_base.model, kernels="cuda")
