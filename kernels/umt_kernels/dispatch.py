"""Which form of an op runs: its Triton kernels called directly, the custom op around them, or the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from umt_kernels import backend

COMPILED_KERNELS = frozenset({"sample_visible"})
"""Ops whose kernels also run under torch.compile.

Inductor gets the plain form of the others and fuses it with what stands around it: a custom op would be a wall
between the two. An op joins this list when a measurement shows its kernel faster than Inductor's. `sample_visible` is
here because Inductor generates no code for top-k and sort.
"""

_PLAIN = {Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", Tensor)}


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are tensors of PyTorch itself: not fake, functional or distributed ones."""
    return all(x is None or type(x) in _PLAIN for x in tensors)


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether torch.func (grad, vmap, jvp) or forward-mode differentiation is active. The kernels support neither."""
    if torch.compiler.is_compiling():  # Dynamo handles both itself
        return False
    return _is_transformed(tensors)


def _is_transformed(tensors: Sequence[Tensor | None]) -> bool:
    if torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(
        x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors
    )


def runs_kernel(op: str, *tensors: Tensor | None) -> bool:
    """Whether `op` runs its own kernels on these tensors; else the reference, which can do all that PyTorch can."""
    if torch.compiler.is_compiling():  # where Dynamo handles transforms itself
        return op in COMPILED_KERNELS and backend.runs_triton(*tensors)
    return backend.runs_triton(*tensors) and not _is_transformed(tensors)


class KernelOp:
    """A launch function, called with little overhead in eager mode and as a custom op everywhere else.

    Of several outputs only the first has a gradient; with one, a call in eager mode returns that output alone, in a
    tuple. The others are for `save`.

    launch    tensors and settings -> tensors; annotated, as torch.library.custom_op infers the schema from it.
    fake      the same for tensors without data.
    save      (ctx, inputs, output): keep on `ctx` what `backward` wants. None: the op has no gradient.
    backward  (ctx, *gradients) -> a gradient for each input.
    again     the same from operations that PyTorch can differentiate once more, for create_graph=True.
    """

    def __init__(
        self,
        name: str,
        launch: Callable,
        fake: Callable,
        save: Callable | None = None,
        backward: Callable | None = None,
        again: Callable | None = None,
    ) -> None:
        self.launch = launch
        self.several = "tuple" in str(launch.__annotations__["return"])
        self.custom = torch.library.custom_op(f"umt_kernels::{name}", launch, mutates_args=())
        self.custom.register_fake(fake)
        self.apply: Callable | None = None
        if save is not None and backward is not None:
            self.custom.register_autograd(backward, setup_context=save)
            function = _function(name, launch, save, backward, again)
            # Not `function.apply`, which first looks for torch.func: `runs_kernel` has done so.
            self.apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def __call__(self, *inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.custom(*inputs)
        differentiable = False
        for x in inputs:
            if type(x) in _PLAIN:
                differentiable = differentiable or x.requires_grad
            elif isinstance(x, Tensor):
                return self.custom(*inputs)
        if differentiable and self.apply is not None and torch.is_grad_enabled():
            return (self.apply(*inputs),) if self.several else self.apply(*inputs)
        return self.launch(*inputs)


def _function(name: str, launch: Callable, save: Callable, backward: Callable, again: Callable | None) -> Any:
    def forward(ctx: Any, *inputs: Any) -> Any:
        output = launch(*inputs)
        save(ctx, inputs, output)
        return output[0] if type(output) is tuple else output  # the others would be wrapped for nothing

    def differentiate(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled() and again is not None:
            return again(ctx, *gradients)
        return backward(ctx, *gradients)

    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    return type(name, (torch.autograd.Function,), methods)


def differentiate_reference(
    reference: Callable[..., Tensor], inputs: Sequence[Tensor | None], gradient: Tensor
) -> list[Tensor | None]:
    """Gradients of `reference(*inputs)` that can be differentiated again; None for inputs that require none."""
    with torch.enable_grad():
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found = torch.autograd.grad(reference(*inputs), wanted, gradient, create_graph=True, allow_unused=True)
    gradients = iter(found)
    return [next(gradients) if x is not None and x.requires_grad else None for x in inputs]
