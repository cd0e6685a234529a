"""Every op as a part of PyTorch: opcheck, torch.compile, autocast, activation checkpointing, DDP, CUDA graphs."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from umt_kernels import (
    add_layer_norm,
    cls_scores,
    cosine_alignment_loss,
    dispatch,
    gather_layer_norm,
    gather_patches,
    linear,
    mlp,
    patch_embed,
    sample_visible,
)
from umt_kernels.backend import INTERPRETED, runs_triton

OPS = torch.ops.umt_kernels
on_a_gpu = pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def randn(device: torch.device, *shape: int, grad: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(grad)


def ids(device: torch.device, rows: int, kept: int, limit: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + kept)
    return torch.stack([torch.randperm(limit, generator=generator)[:kept] for _ in range(rows)]).to(device)


def uint8_clip(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 2, 8, 8, 3), generator=generator, dtype=torch.uint8).to(device)


def custom_op_cases(device: torch.device) -> dict[str, list[tuple]]:
    """Arguments of each custom op, as from the public functions."""

    def r(*shape, **settings):
        return randn(device, *shape, **settings)

    rows, places = ids(device, 2, 3, 5), ids(device, 2, 3, 7)
    clip, kept = uint8_clip(device), ids(device, 2, 3, 8)
    mean, std = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]
    x, w, w2 = r(2, 5, 6, grad=True), r(6, grad=True), r(2, 6, grad=True)
    settings, none = (1e-6, 0.5, 1e-12), (None,) * 5  # eps, beta, floor; what a matmul can do without
    return {
        "gather_patches": [
            (clip, kept, "BTHWC", [4, 4], 1, [0, 0], mean, std, torch.bfloat16, False),
            (clip, None, "BTHWC", [4, 2], 2, [1, 0], mean, std, torch.float32, False),
            (r(2, 3, 2, 8, 8).mT, kept.int(), "BCTHW", [4, 4], 1, [0, 0], [], [], torch.float32, True),
        ],
        "add_layer_norm": [
            (
                r(2, 5, 6, grad=True),
                r(2, 3, 6, grad=True),
                r(6, grad=True),
                r(6, grad=True),
                r(6, grad=True),
                r(2),
                rows,
                r(7, 6),
                places,
                1e-6,
                torch.bfloat16,
                False,
                False,
                1.0,
            ),
            (
                r(2, 5, 6, grad=True),
                r(2, 5, 6, grad=True),
                None,
                None,
                None,
                None,
                None,
                None,
                None,
                1e-6,
                torch.float32,
                True,
                False,
                1.0,
            ),
            (
                r(2, 5, 6, grad=True),
                r(2, 5, 6, grad=True),
                r(6, grad=True),
                r(6, grad=True),
                None,
                None,
                None,
                None,
                None,
                1e-6,
                torch.float32,
                False,
                True,
                1.5,
            ),
        ],
        "add_layer_norm_backward": [
            (
                r(2, 3, 6),
                r(2, 3, 6),
                r(2, 3, 6),
                None,
                r(6),
                r(6, dtype=torch.bfloat16),
                r(6),
                r(2),
                rows,
                r(2, 2, 3),
                [2, 5, 6],
                torch.bfloat16,
                False,
                False,
                1.0,
            ),
            (
                r(2, 5, 6),
                None,
                r(2, 5, 6),
                r(2, 5, 6),
                None,
                None,
                None,
                None,
                None,
                r(2, 2, 5),
                [2, 5, 6],
                torch.float32,
                True,
                True,
                0.5,
            ),
        ],
        "quantize_rows": [
            (r(2, 5, 6), None, None, None, 0.0, torch.int8, False),
            (r(5, 6, dtype=torch.bfloat16), r(5, 6), r(6), r(6), 1e-6, torch.int8, True),
        ],
        "matmul": [
            (r(5, 6), r(4, 6), *none, torch.float32, False, None, False, False),
            (r(5, 6), r(6, 4), r(4), r(5, 4), None, None, None, torch.bfloat16, True, "gelu", True, True),
            (r(5, 6), r(6, 4), None, None, r(5, 4), None, None, torch.float32, True, "quick_gelu", False, True),
            (r(5, 6).char(), r(4, 6).char(), *none[:3], r(1, 5), r(4), torch.int8, False, None, False, False),
        ],
        "linear": [
            (r(2, 5, 6, grad=True), r(4, 6, grad=True), r(4, grad=True), r(2, 5, 4, grad=True), "gelu", True),
            (r(5, 6, grad=True), r(4, 6, grad=True), None, None, None, True),
            (r(2, 5, 12)[..., :6], r(4, 6), r(4, dtype=torch.bfloat16), r(2, 5, 4), "quick_gelu", False),
        ],
        "mlp": [
            (
                r(2, 5, 6, grad=True),
                r(8, 6, grad=True),
                r(8, grad=True),
                r(4, 8, grad=True),
                r(4, grad=True),
                r(2, 5, 4, grad=True),
                "gelu",
                True,
            ),
            (r(5, 6), r(8, 6), None, r(4, 8), None, None, "quick_gelu", False),
        ],
        "gather_layer_norm": [
            (x, w, w + 1, rows, r(7, 6, grad=True), places, 1e-6, torch.float32, True, False),
            (r(2, 5, 12, grad=True)[..., ::2], r(12)[::2], None, None, None, None, 1e-6, torch.bfloat16, False, True),
            (r(3, 2, 5, 6, grad=True, dtype=torch.bfloat16), w, w, rows, None, None, 1e-6, torch.float32, False, False),
        ],
        "gather_layer_norm_backward": [
            (r(2, 3, 6), r(2, 5, 6), r(6), r(6), r(2, 2, 3), rows, False, False),
            (r(2, 5, 12)[..., ::2], r(5, 2, 6).transpose(0, 1), r(12)[::2], None, r(2, 2, 5), None, False, True),
        ],
        "cls_scores": [
            (r(2, 3, 4, grad=True), r(2, 3, 5, 4, grad=True), 1),
            (r(2, 4, 3, grad=True).mT, r(2, 5, 3, 4, grad=True).transpose(1, 2), 2),
            (r(2, 3, 4, grad=True, dtype=torch.float16), r(2, 3, 5, 4, grad=True, dtype=torch.float16), 1),
        ],
        "cls_scores_backward": [
            (r(2, 4), r(2, 3, 4), r(2, 3, 5, 4), 1),
            (r(3, 2).T, r(2, 4, 3).mT, r(2, 5, 3, 4).transpose(1, 2), 2),
        ],
        "sample_visible": [
            (r(4, 9).abs(), torch.tensor([5], device=device), None, 3),
            (r(9, 4).abs().T, torch.tensor([5], device=device), torch.tensor([0, 1, 2, 9], device=device), 9),
        ],
        "cosine_alignment_loss": [
            (r(2, 2, 3, 6, grad=True), r(2, 2, 3, 6), None, None, None, None, 0, *settings, False, 0.5, False, True),
            (r(2, 2, 3, 6, grad=True), r(2, 2, 7, 6), places, w2, w2, r(2, 3), 3, *settings, True, 1.0, False, True),
            (
                r(2, 3, 2, 6, grad=True, dtype=torch.bfloat16).transpose(1, 2),
                r(2, 2, 7, 6),
                places.int(),
                r(6, 2, grad=True).T,
                r(6, 2, grad=True).T,
                None,
                1,
                *settings,
                False,
                1.0,
                False,
                True,
            ),
            (r(2, 2, 3, 6), r(2, 2, 3, 6), None, w2, w2, r(2, 2, 3), 2, *settings, False, 1.0, True, False),
        ],
        "pixel_errors": [
            (
                r(2, 3, 48, grad=True),
                clip,
                kept,
                [4, 4],
                1,
                "channel",
                1e-6,
                True,
                [0.1, 0.2, 0.3],
                [0.0, 0.5, 1.0],
                "BTHWC",
                mean,
                mean,
            )
            for mean in (False, True)
        ],
        "pixel_errors_backward": [
            (
                r(2, 3, 48),
                clip,
                kept,
                r(*of),
                [4, 4],
                1,
                "channel",
                1e-6,
                True,
                [0.1, 0.2, 0.3],
                [0.0, 0.5, 1.0],
                "BTHWC",
                False,
                not of,
            )
            for of in ((2, 3), ())
        ],
        "cosine_alignment_loss_backward": [
            (r(2, 2, 3, 6), torch.tensor(0.3, device=device)),
            (r(2, 2, 3, 6, dtype=torch.float16), torch.tensor(0.3, device=device)),
        ],
    }


CUSTOM_OPS = list(custom_op_cases(torch.device("cpu")))


@pytest.mark.parametrize("name", CUSTOM_OPS)
def test_opcheck(device, needs_kernels, name):
    for arguments in custom_op_cases(device)[name]:
        tests = ["test_schema", "test_faketensor"]
        # The loss's outputs after the first are only for its own backward and are not differentiated.
        if name != "cosine_alignment_loss":
            tests += ["test_autograd_registration", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
        elif arguments[-1]:  # with gradients
            tests.append("test_autograd_registration")
        torch.library.opcheck(getattr(OPS, name).default, arguments, test_utils=tests)


def test_every_custom_op_is_checked():
    ops = (
        "add_layer_norm",
        "matmul",
        "linear",
        "mlp",
        "eight_bit",
        "gather_patches",
        "gather_layer_norm",
        "cls_scores",
        "sample_visible",
    )
    for name in (*ops, "cosine_alignment_loss"):
        importlib.import_module(f"umt_kernels.{name}")
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("umt_kernels::")}
    assert {name.removeprefix("umt_kernels::") for name in registered} == set(CUSTOM_OPS)


def public_cases(device: torch.device) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Each public op as a function of tensors; those that require a gradient get one."""

    def r(*shape, **settings):
        return randn(device, *shape, **settings)

    rows, places, kept = ids(device, 2, 3, 5), ids(device, 2, 3, 7), ids(device, 2, 3, 8)
    fastest = "triton" if runs_triton(rows) else "torch"
    return {
        "gather_patches": (
            lambda clip, kept: gather_patches(clip, 4, token_ids=kept, halo=1),
            [uint8_clip(device), kept],
        ),
        "patch_embed": (
            lambda clip, weight, bias, kept, position: patch_embed(
                clip, weight, bias, 4, token_ids=kept, position=position
            ),
            [uint8_clip(device), r(5, 3, 1, 4, 4, grad=True), r(5, grad=True), kept, r(8, 5)],
        ),
        "add_layer_norm": (
            lambda x, branch, weight, bias, shift, scale, rows, table, places: torch.cat(
                add_layer_norm(
                    x,
                    branch,
                    weight,
                    bias,
                    1e-6,
                    branch_bias=shift,
                    scale=scale,
                    row_ids=rows,
                    position=table,
                    position_ids=places,
                )
            ),
            [
                r(2, 5, 6, grad=True),
                r(2, 3, 6, grad=True),
                r(6, grad=True),
                r(6, grad=True),
                r(6, grad=True),
                r(2),
                rows,
                r(7, 6),
                places,
            ],
        ),
        "add_layer_norm, post-norm": (
            lambda x, branch, weight, bias: add_layer_norm(x, branch, weight, bias, 1e-6, post_norm=True)[0],
            [r(2, 5, 6, grad=True), r(2, 5, 6, grad=True), r(6, grad=True), r(6, grad=True)],
        ),
        "gather_layer_norm": (
            lambda x, weight, bias, rows, table, places: gather_layer_norm(
                x, weight, bias, 1e-6, row_ids=rows, position=table, position_ids=places
            ),
            [r(2, 5, 6, grad=True), r(6, grad=True), r(6, grad=True), rows, r(7, 6), places],
        ),
        "linear": (
            lambda x, weight, bias, residual: linear(
                x, weight, bias, activation="gelu", residual=residual, backend=fastest
            ),
            [r(2, 5, 6, grad=True), r(4, 6, grad=True), r(4, grad=True), r(2, 5, 4, grad=True)],
        ),
        "mlp": (
            lambda x, *parameters: mlp(x, *parameters, activation="quick_gelu", residual=x, backend=fastest),
            [r(2, 5, 6, grad=True), r(8, 6, grad=True), r(8, grad=True), r(6, 8, grad=True), r(6, grad=True)],
        ),
        "cls_scores": (cls_scores, [r(2, 3, 4, grad=True), r(2, 3, 5, 4, grad=True)]),
        "cosine_alignment_loss": (
            lambda x, targets, weight, bias, places: cosine_alignment_loss(
                x, targets, target_ids=places, weight=weight, bias=bias
            ),
            [r(2, 2, 3, 6, grad=True), r(2, 2, 7, 6), r(2, 6, grad=True), r(2, 6, grad=True), places],
        ),
        "cosine_alignment_loss, no norm": (
            lambda x, targets: cosine_alignment_loss(x, targets),
            [r(2, 2, 3, 6, grad=True), r(2, 2, 3, 6).flip(3)],
        ),
    }


PUBLIC_OPS = list(public_cases(torch.device("cpu")))
MATRIX_PRODUCTS = ("patch_embed", "linear", "mlp")
"""Ops that multiply matrices in autocast's dtype."""


def value_and_gradients(function: Callable, inputs: list[Tensor], autocast: torch.dtype | None = None) -> list[Tensor]:
    """Runs the backward outside autocast, as PyTorch recommends."""
    with torch.autocast(inputs[0].device.type, autocast, enabled=autocast is not None):
        value = function(*inputs)
    differentiable = [x for x in inputs if x.requires_grad]
    if not differentiable:
        return [value]
    upstream = torch.linspace(0.5, 2, value.numel(), device=value.device).view_as(value).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, differentiable, upstream)]


@pytest.mark.parametrize("name", PUBLIC_OPS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", ["plain", "kernels"])
def test_compiled_whole(device, name, dynamic, form, assert_near, monkeypatch):
    if form == "kernels":  # also for ops that give Inductor their plain form
        every = {op.partition(",")[0] for op in PUBLIC_OPS}
        monkeypatch.setattr(dispatch, "COMPILED_KERNELS", dispatch.COMPILED_KERNELS | every)
    function, inputs = public_cases(device)[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    actual, expected = value_and_gradients(compiled, inputs), value_and_gradients(function, inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert_near(ours, theirs)


def test_a_draw_compiled_whole(device):
    scores = randn(device, 4, 9).abs()
    torch._dynamo.reset()
    drawn = torch.compile(lambda s: sample_visible(s, 3), fullgraph=True, backend="aot_eager")(scores)
    assert drawn.dtype == torch.int32
    assert drawn.shape == (4, 3)
    assert (drawn[:, 1:] > drawn[:, :-1]).all()
    assert drawn.min() >= 0
    assert drawn.max() < 9


@pytest.mark.parametrize("name", PUBLIC_OPS)
def test_activation_checkpointing(device, name):
    function, inputs = public_cases(device)[name]

    def recomputed(*inputs: Tensor) -> Tensor:
        return checkpoint(lambda *inputs: function(*inputs) * 2, *inputs, use_reentrant=False)

    actual = value_and_gradients(recomputed, inputs)
    expected = value_and_gradients(lambda *inputs: function(*inputs) * 2, inputs)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_activation_checkpointing_draws_the_same_again(device):
    scores, x = randn(device, 4, 9).abs(), randn(device, 4, 9, grad=True)
    seen = []

    def chosen(x: Tensor) -> Tensor:
        seen.append(sample_visible(scores, 3))
        return x.gather(1, seen[-1].long()).square()

    checkpoint(chosen, x, use_reentrant=False).sum().backward()
    assert len(seen) == 2
    assert torch.equal(*seen)
    assert torch.equal(x.grad != 0, torch.zeros_like(x, dtype=torch.bool).scatter(1, seen[0].long(), True))


class EveryOp(torch.nn.Module):
    """A small training step through all the ops."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator))

        self.patch, self.bias = parameter(8, 3, 1, 4, 4), parameter(8)
        self.norm, self.shift, self.query = parameter(8), parameter(8), parameter(2, 4)
        self.gain, self.offset = parameter(1, 8), parameter(1, 8)
        self.register_buffer("position", torch.randn(8, 8, generator=generator))

    def forward(self, clip: Tensor, targets: Tensor) -> Tensor:
        x = patch_embed(clip, self.patch, self.bias, 4, position=self.position)  # [B, 8, 8]
        keys = x.unflatten(2, (2, 4)).transpose(1, 2)
        scores = cls_scores(self.query.expand(len(x), -1, -1), keys)  # [B, 7]
        # All ids, because the draw must not depend on the number of processes.
        visible = sample_visible(scores.detach(), 7)
        y = gather_layer_norm(x, self.norm, self.shift, 1e-6, row_ids=visible)
        loss = cosine_alignment_loss(y[None], targets[None], target_ids=visible, weight=self.gain, bias=self.offset)
        return loss + scores.square().mean()


def step_inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    clips = torch.randint(0, 256, (4, 2, 8, 8, 3), generator=generator, dtype=torch.uint8)
    return clips, torch.randn(4, 8, 8, generator=generator)


def one_of_two(rank: int, folder: str) -> None:
    """A process of the test below: half the batch, on the CPU."""
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = EveryOp()
    clips, targets = step_inputs()
    parallel = torch.nn.parallel.DistributedDataParallel(model)  # which must outlive the backward
    parallel(clips[rank::2], targets[rank::2]).backward()
    torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_one(tmp_path, assert_near):
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['one_of_two'](int(sys.argv[2]), sys.argv[3])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, __file__, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    model = EveryOp()
    model(*step_inputs()).backward()
    for rank in range(2):
        for name, grad in torch.load(tmp_path / f"{rank}.pth", weights_only=True).items():
            assert_near(grad, model.get_parameter(name).grad, 1e-4)


@pytest.mark.parametrize("name", [name for name in PUBLIC_OPS if name not in MATRIX_PRODUCTS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(device, name, dtype):
    function, inputs = public_cases(device)[name]
    expected = value_and_gradients(function, inputs)
    actual = value_and_gradients(function, inputs, autocast=dtype)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@on_a_gpu
@pytest.mark.parametrize("name", PUBLIC_OPS)
def test_cuda_graph_replays_with_new_inputs(device, name):
    torch.utils.deterministic.fill_uninitialized_memory = False
    function, inputs = public_cases(device)[name]
    if name in MATRIX_PRODUCTS:
        inputs = [x.detach() for x in inputs]  # captured without a backward; cuBLAS has its own workspace
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        value_and_gradients(function, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = value_and_gradients(function, inputs)
    with torch.no_grad():
        for x in inputs:
            if x.is_floating_point():
                x.mul_(1.5)
    graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip(captured, value_and_gradients(function, inputs), strict=True):
        assert torch.allclose(ours, theirs)


@on_a_gpu
def test_a_captured_draw_is_new_at_every_replay(device):
    scores = torch.rand(50, 196, device=device)
    sample_visible(scores, 40)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample_visible(scores, 40)
    graph.replay()
    first = drawn.clone()
    graph.replay()
    assert not torch.equal(drawn, first)
