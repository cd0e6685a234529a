"""A case of the benchmark: an op at a model's shapes, its contenders, its minimum of bytes, its right result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.kernels.published import Inputs
from benchmarks.kernels.shapes import Shapes

TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 5e-2)}
"""Largest relative error, |out - truth| / |truth|, of an output and of a gradient."""


Outputs = Tensor | tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]


@dataclass(frozen=True, eq=False, repr=False)
class OpCase:
    """One op, direction and model. All contenders take the same `Inputs`."""

    op: str
    form: str
    """The use of the op: "rows", "visible tokens"..."""
    shapes: Shapes
    make: Callable[[torch.device], Inputs]
    """Makes random inputs; the `leaves` require grad if `backward`."""
    triton: Run
    eager: Run
    plain: Callable[[Inputs, torch.dtype], Outputs]
    """umt_kernels.reference's function with an output dtype: the right result, and the form for torch.compile."""
    read: int
    """Bytes of input that must be read, once in each direction."""
    written: int
    backward: bool = False
    flops: int = 0
    leaves: tuple[str, ...] = ()
    """Names of the inputs that get a gradient."""
    eager_leaves: dict[str, str] = field(default_factory=dict)
    """For a leaf that is the first row of a tensor of the eager form: the name of this tensor."""
    libraries: dict[str, Run] = field(default_factory=dict)
    """Contenders that may raise libraries.Unavailable when called."""
    tolerance: float | None = None
    """Largest error of an output, instead of TOLERANCE's."""

    def __repr__(self) -> str:
        return self.group

    @property
    def least_bytes(self) -> int:
        return self.read + self.written

    @property
    def direction(self) -> str:
        return "backward" if self.backward else "forward"

    @property
    def group(self) -> str:
        """ "op form model", or "op-backward form model" for forward and backward together."""
        return f"{self.op}{'-backward' if self.backward else ''} {self.form} {self.shapes.model}"

    @property
    def contenders(self) -> list[str]:
        return ["triton", "eager", "compiled", *self.libraries]

    def run(self, contender: str) -> Run:
        """The contender's function. Raises libraries.Unavailable if it does not run here."""
        if contender == "compiled":
            torch.compiler.reset()
            # On a CPU only the tracing matters, and generating C++ would take minutes.
            backend = "inductor" if torch.cuda.is_available() else "aot_eager"

            def plain(x: Inputs) -> Outputs:
                return self.plain(x, self.shapes.dtype)

            return torch.compile(plain, fullgraph=True, dynamic=False, backend=backend)
        return {"triton": self.triton, "eager": self.eager, **self.libraries}[contender]

    def step(self, run: Run, contender: str, x: Inputs) -> tuple[Tensor, ...]:
        """The timed call: the outputs and, for backward, the gradients of `leaves` from x["grad"], x["grad1"]."""
        given = run(x)
        outputs = given if isinstance(given, tuple) else (given,)
        if not self.backward:
            return outputs
        names = self.eager_leaves if contender == "eager" else {}
        leaves = [x[names.get(leaf, leaf)] for leaf in self.leaves]
        grads = [x.get(f"grad{index or ''}") for index in range(len(outputs))]
        return (*outputs, *torch.autograd.grad(outputs, leaves, grads))

    def truth(self, x: Inputs) -> tuple[Tensor, ...]:
        """The outputs of the reference in float64."""
        wide = {
            name: t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
            for name, t in x.items()
        }
        return self.step(lambda inputs: self.plain(inputs, torch.float64), "truth", wide)

    def fault(self, contender: str, results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> str | None:
        """The fault of a contender's results, or None."""
        if self.op == "sample_visible":
            ids = self.shapes.tokens if self.form == "whole clip" else self.shapes.patches
            return draw_fault(results[0], truth[0], ids)
        gradients = [f"gradient of {leaf}" for leaf in self.leaves] if self.backward else []
        names = [*["output"] * (len(truth) - len(gradients)), *gradients]
        for name, result, true in zip(names, results, truth, strict=True):
            if contender == "eager" and result.shape != true.shape and name != "output":
                result = result[:, 0]  # the eager form's tensor holds more rows; see eager_leaves
            if result.shape != true.shape:
                return f"{name} has shape {list(result.shape)}, not {list(true.shape)}"
            error = ((result.double() - true).norm() / true.norm()).item()
            tolerance = TOLERANCE[self.shapes.dtype][name != "output"]
            if name == "output" and self.tolerance is not None:
                tolerance = self.tolerance
            if not error <= tolerance:  # NaN included
                return f"{name} is off by {error:.2g} of its norm, over {tolerance:g}"
        return None


def draw_fault(drawn: Tensor, like: Tensor, ids: int) -> str | None:
    """The fault of a draw, or None. `drawn` must be [R, `ids`], ascending and distinct, or the published mask."""
    rows, count = like.shape
    expected = [rows, ids if drawn.dtype == torch.bool else count]
    if list(drawn.shape) != expected:
        return f"draw has shape {list(drawn.shape)}, not {expected}"
    if drawn.dtype == torch.bool:
        kept = (~drawn).sum(1)
        return None if (kept == count).all() else f"rows keep {kept.unique().tolist()} ids, not {count}"
    inside = (drawn >= 0) & (drawn < ids)
    return None if (drawn.diff(dim=1) > 0).all() and inside.all() else "ids are not ascending, different and in range"
