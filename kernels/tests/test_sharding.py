"""The ops on DTensors over two processes: outputs and gradients of one process, or an error with the fix."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from umt_kernels import (
    add_layer_norm,
    alignment_loss,
    cls_scores,
    cosine_alignment_loss,
    gather_layer_norm,
    gather_rms_norm,
    linear,
    patch_embed,
    pixel_loss,
    sample_visible,
)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ids(rows: int, kept: int, limit: int, padded: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    found = torch.stack([torch.randperm(limit, generator=generator)[:kept] for _ in range(rows)])
    return found.masked_fill(found == 0, -1) if padded else found


CLIP = torch.randint(0, 256, (4, 2, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
WEIGHT, BIAS = drawn(6) + 2, drawn(7)[:6]
Case = tuple[Callable[..., Any], dict[str, Tensor], dict[str, int]]
"""A function of tensors, the tensors, and the axis over which each is sharded (the others are replicated)."""


def cases() -> dict[str, Case]:
    norm = {"x": drawn(4, 5, 6), "weight": WEIGHT, "bias": BIAS}
    loss = {"predictions": drawn(2, 4, 3, 6), "targets": drawn(2, 4, 7, 6), "target_ids": ids(4, 3, 7)}
    affine = {"weight": drawn(2, 6), "bias": drawn(2, 6) + 1}
    added = {"residual": drawn(4, 5, 6), "branch": drawn(4, 5, 6), "weight": WEIGHT, "bias": BIAS}
    both, samples = {"residual": 0, "branch": 0}, {"predictions": 1, "targets": 1, "target_ids": 0}
    pixels = {"predictions": drawn(4, 3, 48), "clip": CLIP, "token_ids": ids(4, 3, 8)}
    return {
        "norm of samples": (lambda **t: gather_layer_norm(**t, eps=1e-3), norm, {"x": 0}),
        "norm, uneven": (lambda **t: gather_layer_norm(**t, eps=1e-3), norm | {"x": drawn(3, 5, 6)}, {"x": 0}),
        "norm of rows": (lambda **t: gather_layer_norm(**t, eps=1e-3), norm, {"x": 1}),
        "norm replicated": (lambda **t: gather_layer_norm(**t, eps=1e-3), norm, {}),
        "norm, sharded weight": (lambda **t: gather_layer_norm(**t, eps=1e-3), norm, {"x": 0, "weight": 0, "bias": 0}),
        "norm of chosen rows": (
            lambda **t: gather_layer_norm(**t, eps=1e-3),
            norm | {"row_ids": ids(8, 3, 5), "position": drawn(7, 6), "position_ids": ids(8, 3, 7)},
            {"x": 0, "row_ids": 0, "position_ids": 0},
        ),
        "norm of layers": (
            lambda x, weight, row_ids: gather_rms_norm(x, weight, 1e-3, row_ids=row_ids, padded=True),
            {"x": drawn(2, 4, 5, 6), "weight": WEIGHT, "row_ids": ids(4, 3, 5, padded=True)},
            {"x": 1, "row_ids": 0},
        ),
        "sum and norm": (
            lambda **t: torch.cat(tuple(add_layer_norm(**t, eps=1e-3)), 2),
            added | {"scale": drawn(4), "branch_bias": drawn(8)[:6]},
            both | {"scale": 0},
        ),
        "sum and norm of rows": (
            lambda **t: add_layer_norm(**t, eps=1e-3, post_norm=True)[1],
            added | {"scale": drawn(4)},
            {"residual": 1, "branch": 1},
        ),
        "sum and norm of chosen rows": (
            lambda **t: add_layer_norm(**t, eps=1e-3, scale=0.5)[1],
            added | {"row_ids": ids(4, 3, 5), "branch": drawn(4, 3, 6)},
            both | {"row_ids": 0},
        ),
        "sum and norm of several sets": (
            lambda **t: add_layer_norm(**t, eps=1e-3, padded=True)[1],
            added | {"row_ids": ids(8, 3, 5, padded=True), "branch": drawn(8, 3, 6), "scale": drawn(8)},
            both | {"row_ids": 0, "scale": 0},
        ),
        "scores": (cls_scores, {"q": drawn(4, 2, 3), "k": drawn(4, 2, 5, 3)}, {"q": 0, "k": 0}),
        "loss": (lambda **t: cosine_alignment_loss(**t), loss | affine, samples),
        "loss of uneven samples": (
            lambda **t: cosine_alignment_loss(**t),
            {"predictions": drawn(2, 3, 2, 6), "targets": drawn(2, 3, 2, 6)},
            {"predictions": 1, "targets": 1},
        ),
        "weighted loss": (
            lambda **t: alignment_loss(**t, distance="mse", padded=True),
            loss | {"target_ids": ids(4, 3, 7, padded=True), "row_weights": drawn(4, 3).abs()},
            samples | {"row_weights": 0},
        ),
        "loss of rows": (lambda **t: cosine_alignment_loss(**t, reduction="none"), loss, samples),
        "loss replicated": (lambda **t: cosine_alignment_loss(**t), loss, {}),
        "embedding": (
            lambda **t: patch_embed(**t, patch_size=4),
            {"clip": CLIP, "weight": drawn(5, 3, 1, 4, 4), "bias": drawn(5), "token_ids": ids(4, 3, 8)},
            {"clip": 0, "token_ids": 0},
        ),
        "pixels": (
            lambda **t: pixel_loss(**t, patch_size=4, tubelet_size=1),
            pixels,
            {"predictions": 0, "clip": 0, "token_ids": 0},
        ),
        "weighted pixels": (
            lambda **t: pixel_loss(**t, patch_size=4, tubelet_size=1),
            pixels | {"weights": drawn(4, 3).abs()},
            {"predictions": 0, "clip": 0, "token_ids": 0, "weights": 0},
        ),
        "pixels of frames": (
            lambda **t: pixel_loss(**t, patch_size=(4, 2), tubelet_size=1, layout="BCHW", scale=(0.5, 1.0)),
            {"predictions": drawn(4, 3, 16), "clip": drawn(4, 2, 8, 8), "token_ids": ids(4, 3, 8)},
            {"predictions": 0, "clip": 0, "token_ids": 0},
        ),
        "pixels of several sets": (
            lambda **t: pixel_loss(**t, patch_size=4, tubelet_size=1, padded=True),
            pixels | {"predictions": drawn(8, 3, 48), "token_ids": ids(8, 3, 8, padded=True)},
            {"predictions": 0, "clip": 0, "token_ids": 0},
        ),
        "linear": (lambda x, weight, bias: linear(x, weight, bias, activation="gelu"),
                   {"x": drawn(4, 5, 6), "weight": drawn(3, 6), "bias": drawn(3)}, {"x": 0}),
    }  # fmt: skip


UNTRACKED = ("targets", "scale", "row_weights", "weights", "clip")


def value_and_gradients(function: Callable[..., Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The value, and gradients of the sum of its squares, which differ between elements."""
    leaves = {n: x.detach() for n, x in tensors.items()}
    for name, x in leaves.items():
        x.requires_grad_(x.is_floating_point() and name not in UNTRACKED)
    value = function(**leaves)
    (value.float() if value.dim() == 0 else value.square().sum()).backward()
    return {"value": value.detach(), **{n: x.grad for n, x in leaves.items() if x.requires_grad}}


def errors(mesh: Any) -> None:
    """Calls that cannot run on shards raise an error with the fix."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def put(x: Tensor, placement: Any) -> Tensor:
        return distribute_tensor(x, mesh, [placement])

    x, w = put(drawn(4, 5, 6), Shard(0)), put(WEIGHT, Replicate())
    with pytest.raises(ValueError, match="weight is an ordinary tensor, but x is a DTensor"):
        gather_layer_norm(x, WEIGHT, None, 1e-3)
    with pytest.raises(ValueError, match=r"x has the placement .*; redistribute it to Shard\(0\) or Shard\(1\)"):
        gather_layer_norm(x.redistribute(placements=[Shard(2)]), w, None, 1e-3)
    rows = put(ids(4, 3, 5), Shard(0))
    with pytest.raises(ValueError, match=r"redistribute it to Shard\(0\) or Replicate"):
        gather_layer_norm(x.redistribute(placements=[Shard(1)]), w, None, 1e-3, row_ids=rows)
    with pytest.raises(ValueError, match="x has 3 samples and row_ids 6 sets"):
        gather_layer_norm(put(drawn(3, 5, 6), Shard(0)), w, None, 1e-3, row_ids=put(ids(6, 3, 5), Shard(0)))
    with pytest.raises(ValueError, match="scores is a DTensor"):
        sample_visible(put(drawn(4, 9).abs(), Shard(0)), 3)


def one_of_two(rank: int, folder: str, expected: dict[str, dict[str, Tensor]]) -> None:
    """A process of the test below."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    failed = []
    for name, (function, tensors, axes) in cases().items():
        try:
            given = {
                n: distribute_tensor(x, mesh, [Shard(axes[n]) if n in axes else Replicate()])
                for n, x in tensors.items()
            }
            found = value_and_gradients(function, given)
            for what, theirs in expected[name].items():
                ours = found[what].full_tensor()
                assert ours.shape == theirs.shape, what
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-7, what
        except Exception:
            failed.append(f"{name}\n{traceback.format_exc()}")
    try:
        errors(mesh)
    except BaseException:
        failed.append(traceback.format_exc())
    Path(folder, f"{rank}.log").write_text("\n".join(failed))
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path):
    pytest.importorskip("torch.distributed.tensor", reason="a build of torch without distributed")
    expected = {name: value_and_gradients(function, tensors) for name, (function, tensors, _) in cases().items()}
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_of_two, args=(rank, str(tmp_path), expected)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for rank in range(2):
        assert (tmp_path / f"{rank}.log").read_text() == ""
