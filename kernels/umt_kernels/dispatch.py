"""Choice of an op's form: its Triton kernels called directly, a custom op around them, or the reference."""

from __future__ import annotations

import functools
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

Inductor gets the plain form of all other ops and fuses it with neighbouring operations, which a custom op would
prevent. An op joins this list when a measurement shows its kernel faster than Inductor's. `sample_visible` is here
because Inductor generates no code for top-k and sort, the 8-bit ops because their plain form computes in float32.
"""

_PLAIN = {Tensor, torch.nn.Parameter, getattr(torch.nn, "Buffer", Tensor)}
_NUMBERS = {int, float}
_SETTINGS = {type(None), bool, int, float, str, torch.dtype}


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary tensors of PyTorch, not fake, functional or distributed ones."""
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
    """Whether `op` runs its own kernels on these tensors; otherwise it runs the reference, which has no such limits."""
    if torch.compiler.is_compiling():  # where Dynamo handles transforms itself
        return op in COMPILED_KERNELS and backend.runs_triton(*tensors)
    return backend.runs_triton(*tensors) and not _is_transformed(tensors)


def _hashable(settings: tuple) -> tuple | None:
    """The settings, with lists of numbers as tuples of numbers and types; None if they contain other objects."""
    found: list[Any] = []
    for x in settings:
        if type(x) in _SETTINGS:
            found.append(x)
        elif type(x) in (tuple, list) and _NUMBERS.issuperset(map(type, x)):
            found.append((*x, *map(type, x)))
        else:
            return None
    return tuple(found)


def call_key(op: str, tensors: Sequence[Tensor | None], settings: tuple) -> tuple | None:
    """Key of a call's plan: everything about the call except the tensors' data. None where plans are not kept: inside
    torch.compile, torch.func and forward mode, and for fake or distributed tensors."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if forward_ad._current_level >= 0 or backend.REFERENCE_ONLY:
        return None
    kinds = tuple(map(type, settings))  # 4.0 equals 4, and True 1, but an op may refuse one of them
    if not _SETTINGS.issuperset(kinds):
        found = _hashable(settings)
        if found is None:
            return None
        settings = found
    parts: list[Any] = [op, torch.is_grad_enabled(), backend.INTERPRETED, settings, kinds]
    for x in tensors:
        if x is None:
            parts.append(None)
        elif type(x) in _PLAIN:
            parts += x.shape, x.is_contiguous() or x.stride(), x.dtype, x.device, x.requires_grad
        else:
            return None
    return tuple(parts)


class KernelOp:
    """An op's kernels, called with little overhead in eager mode and as a custom op everywhere else.

    A public function looks up the plan under the `key` of its arguments. If there is one, an earlier call had the same
    shapes, strides, dtypes, devices and settings, so this call needs no checks:

        key = _forward.key((x, weight), (eps,))
        plan = PLANS.get(key)
        if plan is None:
            check(x, weight, eps)
            return _forward(x, weight, eps, key=key)
        return _forward.planned(plan, x, weight)

    prepare   inputs -> Plan: all work that does not depend on the tensors' data. Tensors are the first inputs.
    launch    (plan, *inputs) -> tensors; annotated, because torch.library.custom_op infers the schema from it. It may
              return None for an empty tensor, which would take a microsecond to make.
    fake      inputs without data -> tensors without data.
    save      (ctx, inputs, output): keep on `ctx` what `backward` needs. None: the op has no gradient.
    backward  (ctx, *gradients) -> a gradient for each input. With several outputs a gradient may be None.
    again     `backward` from operations that PyTorch can differentiate once more, for create_graph=True.
    visible   number of outputs with a gradient, which a call in eager mode returns; the others are for `save`.
    strided   for each tensor that may be non-contiguous: a function that copies it if the kernel cannot read its
              strides. `prepare` and `launch` get all tensors in a form that the kernel reads.
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
        strided: dict[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.name, self.prepare, self.launch, self.visible = name, prepare, launch, visible
        self.key: Callable[[Sequence[Tensor | None], tuple], tuple | None] = functools.partial(call_key, name)
        kinds = {name: str(kind) for name, kind in launch.__annotations__.items() if name not in ("plan", "return")}
        tensors = [name for name, kind in kinds.items() if "Tensor" in kind]
        assert tensors == list(kinds)[: len(tensors)]
        self.num_tensors = len(tensors)
        self.readable = [(strided or {}).get(name, Tensor.contiguous) for name in tensors]
        self.several = "tuple" in str(launch.__annotations__["return"])
        self.custom = torch.library.custom_op(f"umt_kernels::{name}", self._planned(), mutates_args=())
        self.custom.register_fake(fake)
        self.apply: Callable | None = None
        if save is not None and backward is not None:
            self.custom.register_autograd(backward, setup_context=self._save_for_custom(save))
            # Not `function.apply`, which first looks for torch.func: `runs_kernel` has done so.
            self.apply = super(torch.autograd.Function, self._function(save, backward, again)).apply  # type: ignore[misc]

    def __call__(self, *inputs: Any, key: tuple | None = None) -> Any:
        tensors = inputs[: self.num_tensors]
        if key is None:
            key = self.key(tensors, inputs[self.num_tensors :])
        if key is None:
            return self.custom(*inputs)
        plan = launch.PLANS.get(key) or launch.keep(key, self._plan(inputs))
        if not plan.differentiable:
            return self._run(plan, tensors)
        output = self.apply(*tensors, plan)  # type: ignore[misc]
        return (output,) if self.several and self.visible == 1 else output

    def planned(self, plan: Plan, *tensors: Tensor | None) -> Any:
        """The visible outputs of a call by its kept plan."""
        if plan.differentiable:
            return self.apply(*tensors, plan)  # type: ignore[misc]
        output = self._run(plan, tensors)
        if not self.several:
            return output
        return output[0] if self.visible == 1 else output[: self.visible]

    def _plan(self, inputs: Sequence[Any]) -> Plan:
        tensors, settings = inputs[: self.num_tensors], inputs[self.num_tensors :]
        given = [x if x is None else copy(x) for x, copy in zip(tensors, self.readable, strict=True)]
        plan = self.prepare(*given, *settings)
        plan.inputs = tuple(settings)
        plan.copies = tuple((i, self.readable[i]) for i, x in enumerate(given) if x is not tensors[i])
        wanted = any(x is not None and x.requires_grad for x in tensors)
        plan.differentiable = wanted and self.apply is not None and torch.is_grad_enabled()
        return plan

    def _run(self, plan: Plan, tensors: Sequence[Any]) -> Any:
        if plan.copies:
            tensors = list(tensors)
            for place, copy in plan.copies:
                tensors[place] = copy(tensors[place])
        return self.launch(plan, *tensors, *plan.inputs)

    def _planned(self) -> Callable:
        """`launch` without its first parameter, for torch.library, which reads the signature."""

        def run(*inputs: Any) -> Any:
            key = self.key(inputs[: self.num_tensors], inputs[self.num_tensors :])
            plan = None if key is None else launch.PLANS.get(key)
            if plan is None:
                plan = self._plan(inputs) if key is None else launch.keep(key, self._plan(inputs))
            output = self._run(plan, inputs[: self.num_tensors])
            if type(output) is not tuple:
                return output
            return tuple(inputs[0].new_empty(0, dtype=torch.float32) if x is None else x for x in output)

        whole = inspect.signature(self.launch)
        run.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])  # type: ignore[attr-defined]
        return run

    def _save_for_custom(self, save: Callable) -> Callable:
        """`save` for the custom op, whose outputs are all visible to autograd. Unused ones get no gradient of zeros."""

        def save_all(ctx: Any, inputs: tuple, output: Any) -> None:
            save(ctx, inputs, output)
            ctx.set_materialize_grads(False)

        return save_all

    def _function(self, save: Callable, backward: Callable, again: Callable | None) -> Any:
        run, launch, several, visible, count = self._run, self.launch, self.several, self.visible, self.num_tensors

        def forward(ctx: Any, *arguments: Any) -> Any:  # settings are in the plan, as autograd inspects each argument
            plan = arguments[count]
            inputs = arguments[:count] + plan.inputs
            output = run(plan, arguments[:count]) if plan.copies else launch(plan, *inputs)
            save(ctx, inputs, output)
            if visible > 1:
                ctx.set_materialize_grads(False)
            if not several:
                return output
            return output[0] if visible == 1 else output[:visible]  # wrapping the others would cost time

        def differentiate(ctx: Any, *gradients: Any) -> Any:
            function = again if again is not None and torch.is_grad_enabled() else backward
            return *function(ctx, *gradients)[:count], None

        methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
        return type(self.name, (torch.autograd.Function,), methods)


def differentiate_reference(
    reference: Callable[..., Any], inputs: Sequence[Tensor | None], gradients: Tensor | Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of `reference(*inputs)` that can be differentiated again; None for inputs that require none.

    With several outputs, `gradients` has one for each; None if the output was not used.
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
