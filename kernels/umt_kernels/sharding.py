"""The ops on DTensors: the shardings that an op supports, and the shardings of its outputs.

An op treats samples, and mostly rows, independently, so each process runs it on its part. Tensors without samples, such
as weights, are gathered; their gradients are summed over the processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Axes = tuple[int | None, ...] | None
"""Axes of a tensor that can be sharded: (samples, rows), in this order for all tensors of an op. None in a place: the
tensor lacks this axis; None alone: it has neither, such as a weight."""


def is_distributed(*tensors: Any) -> bool:
    """Whether an argument is a DTensor. None can exist until the module of DTensor is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in tensors)


def on_shards(op: Callable[..., Any], axes: dict[str, Axes], outputs: tuple[Axes, ...], **arguments: Any) -> Any:
    """`op(**arguments)` on DTensors that are sharded or replicated over each dimension of their mesh.

    axes     for every tensor argument; the first tensor decides how the op is sharded.
    outputs  axes of each output; None: a sum over samples and rows, of which each process has a part.

    Raises ValueError if only some tensors are DTensors, for two meshes, and for an axis that cannot be sharded.
    """
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    given = {name: arguments[name] for name in axes if arguments.get(name) is not None}
    for name, x in given.items():
        if not isinstance(x, DTensor):
            other = next(name for name, x in given.items() if isinstance(x, DTensor))
            raise ValueError(
                f"{name} is an ordinary tensor, but {other} is a DTensor. Give {other}.full_tensor(), distribute both, "
                f"or call the op in a module whose parameters FSDP2's hooks gather, as umt_kernels.GatherLayerNorm"
            )
    first = next(iter(given))
    mesh = given[first].device_mesh
    order = [_sharded_axis(first, placement, axes[first] or ()) for placement in given[first].placements]

    def placements(found: Axes, otherwise: Any) -> list[Any]:
        """The first tensor's placements, with `otherwise` where it is sharded along an axis that this tensor lacks."""
        result = []
        for place in order:
            axis = None if place is None or found is None else found[place]
            result.append(Shard(axis) if axis is not None else Replicate() if place is None else otherwise)
        return result

    local = {}
    for name, x in given.items():
        if x.device_mesh != mesh:
            raise ValueError(f"{name} is on {x.device_mesh}, but {first} is on {mesh}; bring them together")
        for placement in x.placements if axes[name] is not None else ():
            _sharded_axis(name, placement, axes[name])
        moved = x.redistribute(mesh, placements(axes[name], Replicate()))
        local[name] = moved.to_local(grad_placements=placements(axes[name], Partial()))
    _check_parts(given, local, axes)

    def whole(result: Tensor, found: Axes) -> DTensor:
        shape = list(result.shape)
        for place, axis in enumerate(found or ()):
            if axis is not None:
                shape[axis] = max(
                    x.shape[a[place]] for name, x in given.items() if (a := axes[name]) and a[place] is not None
                )
        strides = torch.empty(shape, device="meta").stride()
        result = result.contiguous()
        return DTensor.from_local(
            result, mesh, placements(found, Partial()), run_check=False, shape=torch.Size(shape), stride=strides
        )

    results = op(**{**arguments, **local})
    if isinstance(results, tuple):
        return tuple(whole(result, found) for result, found in zip(results, outputs, strict=True))
    return whole(results, outputs[0])


def _sharded_axis(name: str, placement: Any, allowed: Any) -> int | None:
    """Index of the sharded axis among the allowed axes; None if no axis is sharded."""
    if placement.is_replicate():
        return None
    possible = [axis for axis in allowed if axis is not None]
    if placement.is_shard() and placement.dim in possible:
        return list(allowed).index(placement.dim)
    fix = " or ".join([*(f"Shard({axis})" for axis in possible), "Replicate()"])
    raise ValueError(f"{name} has the placement {placement}; redistribute it to {fix}")


def _check_parts(given: dict[str, Any], local: dict[str, Tensor], axes: dict[str, Axes]) -> None:
    """Raise if the samples of one tensor and the sets of another are split at different places."""
    sizes = [(n, x.shape[a[0]], local[n].shape[a[0]]) for n, x in given.items() if (a := axes[n]) and a[0] is not None]
    name, whole, part = sizes[0]
    for other, all_sets, sets in sizes[1:]:
        if sets * whole != part * all_sets:
            raise ValueError(
                f"{name} has {whole} samples and {other} {all_sets} sets, which this mesh splits into {part} and "
                f"{sets}; give a number of samples that the mesh divides"
            )
