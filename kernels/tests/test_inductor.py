"""Under torch.compile Inductor gets the plain form of an op and fuses it with neighbouring operations."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from umt_kernels import (
    add_layer_norm,
    backend,
    cls_scores,
    cosine_alignment_loss,
    gather_layer_norm,
    gather_patches,
    pixel_loss,
    sample_visible,
)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's CPU code needs a C++ compiler")

HALF = torch.bfloat16


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


IDS = torch.tensor([[1, 4, 0], [3, 2, 4]])
SHIFT, MATRIX = draw(7, 32), draw(16, 32, dtype=HALF)
WEIGHT, BIAS, GAIN, SCALE = draw(32), draw(32), draw(2, 32), torch.tensor([0.0, 1.5])
CLIP = torch.randint(0, 256, (2, 2, 8, 8, 3), dtype=torch.uint8)

# Each with a cast or a sum before and after, as in a model: function, inputs, kernels, calls of other libraries.
CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor], int, int]] = {
    "gather_layer_norm": (
        lambda x, branch: F.linear(
            gather_layer_norm(
                x + branch, WEIGHT, BIAS, 1e-6, row_ids=IDS, position=SHIFT, position_ids=IDS, out_dtype=HALF
            ),
            MATRIX,
        ),
        [draw(2, 5, 32), draw(2, 5, 32, dtype=HALF)],
        1,
        1,
    ),
    "add_layer_norm": (
        lambda x, branch: F.linear(
            add_layer_norm(x * 2, branch, WEIGHT, BIAS, 1e-6, scale=SCALE, out_dtype=HALF)[1], MATRIX
        ),
        [draw(2, 5, 32), draw(2, 5, 32, dtype=HALF)],
        1,
        1,
    ),
    "pixel_loss": (
        lambda x: pixel_loss(x * 2, CLIP, IDS, 4, 1),
        [draw(2, 3, 48, dtype=HALF)],
        2,
        0,
    ),
    "cls_scores": (
        lambda q, k: cls_scores(q, k).log(),
        [draw(4, 2, 8, dtype=HALF), draw(4, 2, 9, 8, dtype=HALF)],
        1,
        0,
    ),
    "gather_patches": (
        lambda clip: F.linear(gather_patches(clip, 4, token_ids=IDS, dtype=HALF), draw_matrix),
        [CLIP],
        1,
        1,
    ),
    "cosine_alignment_loss": (
        lambda x, t: cosine_alignment_loss(x * 2, t, target_ids=IDS, weight=GAIN, bias=GAIN),
        [draw(2, 2, 3, 32, dtype=HALF), draw(2, 2, 5, 32, dtype=HALF)],
        1,
        0,
    ),
}
draw_matrix = draw(16, 48, dtype=HALF)


@pytest.mark.parametrize("name", CASES)
def test_one_fused_kernel_and_no_custom_op(name, monkeypatch):
    """The number of kernels in Inductor's output code is the number of passes over memory."""
    from torch._inductor.utils import run_and_get_code

    if backend.triton is not None:  # as on a GPU: were the op's own kernel taken, it would be in the code
        monkeypatch.setattr(backend, "INTERPRETED", True)
    function, inputs, kernels, calls = CASES[name]
    torch._dynamo.reset()
    value, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), *inputs)
    assert "umt_kernels" not in code
    found = re.findall(r"^(\w+) = async_compile\.", code, re.MULTILINE)
    assert 1 <= len(found) <= kernels, found
    assert len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.(?:aten|mkldnn)[\w.]+\(", code)) <= calls
    with torch.no_grad():
        monkeypatch.setattr(backend, "INTERPRETED", False)
        expected = function(*inputs)
    assert (value.float() - expected.float()).abs().max() <= 0.05 * expected.float().abs().max()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[1][0].is_floating_point()])
def test_both_passes_are_plain(name, monkeypatch):
    """Checks the graphs for Inductor, without compiling them, which takes seconds each."""
    from torch._dynamo.backends.common import aot_autograd

    if backend.triton is not None:
        monkeypatch.setattr(backend, "INTERPRETED", True)
    function, inputs, *_ = CASES[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    graphs: list[str] = []

    def look(graph, _inputs):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=look, bw_compiler=look))
    compiled(*leaves).float().sum().backward()
    assert len(graphs) == 2
    assert not [graph for graph in graphs if "umt_kernels" in graph]
    assert leaves[0].grad is not None


def test_a_draw_keeps_its_kernel(needs_kernels):
    """Inductor generates no code for top-k and sort."""
    scores, seen = torch.rand(4, 9), []

    def look(graph, inputs):
        seen.append(str(graph.graph))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda s: sample_visible(s, 3), fullgraph=True, backend=look)(scores)
    assert "umt_kernels.sample_visible" in seen[0]
