"""Which form of an op runs: its Triton kernels called directly, the custom op around them, or the reference."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from umt_kernels import backend, launch
from umt_kernels.launch import Plan

COMPILED_KERNELS = frozenset({"sample_visible", "eight_bit"})
"""Ops whose kernels also run under torch.compile.

Inductor gets the plain form of the others and fuses it with what stands around it: a custom op would be a wall
between the two. An op joins this list when a measurement shows its kernel faster than Inductor's. `sample_visible` is
here because Inductor generates no code for top-k and sort, the 8-bit ops because their plain form computes in float32.
"""

_PLAIN = {Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", Tensor)}
_NUMBERS = {int, float}
_SETTINGS = {type(None), bool, int, float, str, torch.dtype}


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
    """An op's kernels, called with little overhead in eager mode and as a custom op everywhere else.

    A public function asks for the `key` of its arguments and for the plan kept under it. If there is one, an earlier
    call had the same shapes, strides, dtypes, devices and settings, and its checks hold for this call too:

        key = _forward.key(x, weight, eps)
        plan = PLANS.get(key)
        if plan is None:
            check(x, weight, eps)
        return _forward(x, weight, eps, key=key, plan=plan)

    prepare   inputs -> Plan: all that does not depend on the tensors' data. Tensors come first among the inputs.
    launch    (plan, *inputs) -> tensors; annotated, as torch.library.custom_op infers the schema from it. None may
              stand for an empty tensor, which costs a microsecond to make.
    fake      inputs without data -> tensors without data.
    save      (ctx, inputs, output): keep on `ctx` what `backward` wants. None: the op has no gradient.
    backward  (ctx, *gradients) -> a gradient for each input.
    again     the same from operations that PyTorch can differentiate once more, for create_graph=True.
    visible   how many outputs have a gradient; the others are for `save`. A call in eager mode returns only those.
    """

    def __init__(
        self,
        name: str,
        prepare: Callable[..., Plan],
        launch: Callable,
        fake: Callable,
        save: Callable | None = None,
        backward: Callable | None = None,
        again: Callable | None = None,
        visible: int = 1,
    ) -> None:
        self.name, self.prepare, self.launch, self.visible = name, prepare, launch, visible
        kinds = [str(kind) for name, kind in launch.__annotations__.items() if name not in ("plan", "return")]
        self.num_tensors = sum("Tensor" in kind for kind in kinds)
        assert all("Tensor" in kind for kind in kinds[: self.num_tensors])
        self.several = "tuple" in str(launch.__annotations__["return"])
        self.custom = torch.library.custom_op(f"umt_kernels::{name}", self._planned(), mutates_args=())
        self.custom.register_fake(fake)
        self.apply: Callable | None = None
        if save is not None and backward is not None:
            self.custom.register_autograd(backward, setup_context=save)
            # Not `function.apply`, which first looks for torch.func: `runs_kernel` has done so.
            self.apply = super(torch.autograd.Function, self._function(save, backward, again)).apply  # type: ignore[misc]

    def key(self, *arguments: Any) -> tuple | None:
        """All about the arguments but the tensors' data. None where plans are not kept: inside torch.compile,
        torch.func and forward mode, and for fake or distributed tensors."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return None
        if forward_ad._current_level >= 0 or backend.REFERENCE_ONLY:
            return None
        parts = [self.name, torch.is_grad_enabled(), backend.INTERPRETED]
        for x in arguments:
            kind = type(x)
            if kind in _SETTINGS:
                parts.append(x)
            elif kind in _PLAIN:
                parts += x.shape, x.is_contiguous() or x.stride(), x.dtype, x.device, x.requires_grad
            elif (kind is tuple or kind is list) and set(map(type, x)) <= _NUMBERS:
                parts.append(tuple(x))
            else:
                return None
        return tuple(parts)

    def __call__(self, *inputs: Any, key: tuple | None = None, plan: Plan | None = None) -> Any:
        if plan is None:
            if key is None:
                key = self.key(*inputs)
            if key is None:
                return self.custom(*inputs)
            plan = launch.PLANS.get(key) or self._keep(key, inputs)
        if not plan.differentiable:
            return self.launch(plan, *inputs)
        count = self.num_tensors  # autograd looks at each argument: settings go in one
        output = self.apply(*inputs[:count], inputs[count:], plan)  # type: ignore[misc]
        return (output,) if self.several and self.visible == 1 else output

    def _keep(self, key: tuple, inputs: Sequence[Any]) -> Plan:
        plan = launch.keep(key, self.prepare(*inputs))
        wanted = any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        plan.inputs = tuple(None if isinstance(x, Tensor) else x for x in inputs)
        plan.differentiable = wanted and self.apply is not None and torch.is_grad_enabled()
        return plan

    def _planned(self) -> Callable:
        """`launch` without its first parameter, for torch.library, which reads the signature."""

        def run(*inputs: Any) -> Any:
            key = self.key(*inputs)
            known = None if key is None else launch.PLANS.get(key) or self._keep(key, inputs)
            output = self.launch(known or self.prepare(*inputs), *inputs)
            if type(output) is not tuple:
                return output
            return tuple(inputs[0].new_empty(0, dtype=torch.float32) if x is None else x for x in output)

        whole = inspect.signature(self.launch)
        run.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])  # type: ignore[attr-defined]
        return run

    def _function(self, save: Callable, backward: Callable, again: Callable | None) -> Any:
        launch, several, visible, count = self.launch, self.several, self.visible, self.num_tensors

        def forward(ctx: Any, *arguments: Any) -> Any:
            *tensors, settings, plan = arguments
            inputs = (*tensors, *settings)
            output = launch(plan, *inputs)
            save(ctx, inputs, output)
            if not several:
                return output
            return output[0] if visible == 1 else output[:visible]  # the others would be wrapped for nothing

        def differentiate(ctx: Any, *gradients: Any) -> Any:
            function = again if again is not None and torch.is_grad_enabled() else backward
            return *function(ctx, *gradients)[:count], None, None

        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        return type(self.name, (torch.autograd.Function,), methods)


def differentiate_reference(
    reference: Callable[..., Any], inputs: Sequence[Tensor | None], gradients: Tensor | Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `reference(*inputs)` that can be differentiated again; None for inputs that require none.

    Of several outputs each has its gradient, or None where it was not used.
    """
    with torch.enable_grad():
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        outputs = reference(*inputs)
        if isinstance(outputs, Tensor):
            outputs, gradients = (outputs,), (gradients,)  # type: ignore[assignment]
        used = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
        if not used:
            return [None] * len(inputs)
        found = torch.autograd.grad(
            [output for output, _ in used], wanted, [gradient for _, gradient in used], create_graph=True,
            allow_unused=True,
        )  # fmt: skip
    results = iter(found)
    return [next(results) if x is not None and x.requires_grad else None for x in inputs]
