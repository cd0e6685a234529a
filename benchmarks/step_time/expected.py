"""Every kernel of a stage-1 step with its floating-point operations and bytes, for the form of a rung.

Bytes assume that a kernel reads its inputs from memory and writes its outputs there. Under autocast the student's
residual stream, the norms and the gradients of weights are float32 (4 bytes); inputs and outputs of matmuls and the
teacher's residual stream take 2 bytes. `eager` means one kernel per PyTorch call, with its casts; otherwise pointwise
chains and norms are fused, as by Inductor. The loss is never compiled: it is eager PyTorch, or the op's kernel. Not
counted: gaps between kernels, mask drawing, scales of 8-bit rows and other work on tensors of a few MB.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.rates import Rates
from umt_fast.config import MLP_RATIO, StudentConfig, TeacherConfig
from umt_fast.run import costs


@dataclass(frozen=True)
class Form:
    """Differences between the rungs that change which kernels run."""

    published: bool = False
    """All tokens are embedded and projected; otherwise only the tokens that the method needs."""
    eager: bool = False
    math_attention: bool = False
    """The student's attention is matmul, softmax, matmul."""
    float32_residual: bool = False
    """The teacher's residual stream is float32, as before `add_layer_norm`."""
    plain_loss: bool = False
    """The loss runs in eager PyTorch; otherwise by the op's kernel. The published loss is always eager."""
    add_layer_norm: bool = False
    """The student's backward pass runs the op's own kernel."""
    epilogues: bool = False
    """GELU and its derivative are in the matmuls' epilogues."""
    bias_sums: bool = False
    """The epilogue also gives the bias gradient of the MLP's first layer, which Inductor's templates cannot do."""
    eight_bit: bool = False
    """The teacher's matmuls are in 8 bits, except queries, keys and values of the last block."""
    own_eight_bit: bool = False
    """umt_kernels' norms and first MLP product write 8 bits; otherwise every input is quantised in its own pass."""


FORMS = {
    "baseline": Form(published=True, eager=True, math_attention=True),
    "+ SDPA": Form(published=True, eager=True),
    "+ torch.compile": Form(published=True),
    "+ lean math, eager": Form(eager=True, plain_loss=True),
    "+ lean math": Form(plain_loss=True),
    "+ fused kernels": Form(),
    "+ CUDA graph": Form(),
    "+ max-autotune": Form(epilogues=True),
    "+ fp8 teacher": Form(eight_bit=True),
    "+ int8 teacher": Form(eight_bit=True),
    "+ own fp8 teacher": Form(eight_bit=True, own_eight_bit=True),
    "+ own int8 teacher": Form(eight_bit=True, own_eight_bit=True),
}
"""Form of each rung. Rungs of the same form differ only in uncounted costs: memory-bound ops move the same bytes
compiled as in Triton, and a CUDA graph closes the gaps between kernels. `+ fp8 student` is not predicted."""


@dataclass(frozen=True)
class Kernel:
    """Equal launches of one phase."""

    phase: str
    name: str
    calls: int
    bytes: float
    """Per call."""
    flops: float = 0
    """Per call; 0 for memory-bound kernels."""
    unit: str = "matmul"
    """The rate of `Rates` for its operations."""

    def seconds(self, rates: Rates) -> float:
        """Time of all calls: the longer of arithmetic and memory traffic, which overlap."""
        return self.calls * max(self.flops / getattr(rates, self.unit), self.bytes / rates.copy)

    def bound(self, rates: Rates) -> str:
        return self.unit if self.flops / getattr(rates, self.unit) > self.bytes / rates.copy else "memory"


@dataclass
class _Step:
    """Collects kernels."""

    form: Form
    kernels: list[Kernel] = field(default_factory=list)

    def passes(self, phase: str, name: str, elements: float, eager: float, fused: float, calls: int = 1) -> None:
        """Memory-bound work on `elements`: bytes per element as separate kernels (`eager`) and as one (`fused`)."""
        moved = eager if self.form.eager else fused
        if moved:
            self.kernels.append(Kernel(phase, name, calls, elements * moved))

    def matmul(
        self,
        phase: str,
        name: str,
        m: float,
        n: float,
        k: float,
        calls: int = 1,
        extra: float = 0,
        bits: int = 16,
        out_bits: int = 16,
    ) -> None:
        """[m, k] @ [k, n], with inputs of `bits`, an output of `out_bits` and `extra` bytes for the epilogue."""
        moved = bits // 8 * (m * k + k * n) + out_bits // 8 * m * n + extra
        unit = "eight_bit" if bits == 8 else "matmul"
        self.kernels.append(Kernel(phase, name, calls, moved, 2 * m * n * k, unit))

    def attention(self, phase: str, queries: float, keys: float, width: int, rows: int, calls: int) -> None:
        """Fused attention of `rows` sequences, forward."""
        moved = 2 * rows * width * (2 * queries + 2 * keys)
        self.kernels.append(Kernel(phase, "attention", calls, moved, 4 * rows * queries * keys * width, "attention"))

    def math_attention(self, phase: str, length: int, width: int, heads: int, rows: int, calls: int) -> None:
        """Two matmuls, and a softmax in float32 over [rows, heads, length, length] with its casts."""
        weights = rows * heads * length**2
        moved = 2 * (2 * rows * length * width) + 2 * weights
        flops = 2 * rows * length**2 * width
        backward = phase == "backward"
        self.kernels.append(Kernel(phase, "attention matmuls", calls * (4 if backward else 2), moved, flops))
        self.passes(phase, "softmax and casts", weights, 24 if backward else 20, 8 if backward else 6, calls)


def expected_kernels(student: StudentConfig, teacher: TeacherConfig, clips: int, seen: int, form: Form) -> list[Kernel]:
    """The kernels of one step. `seen` is the number of visible tokens per clip."""
    step = _Step(form)
    _teacher(step, student, teacher, clips, seen)
    _student(step, student, clips, seen)
    _loss(step, student, clips, seen)
    _optimiser(step, student)
    return step.kernels


def _teacher(step: _Step, student: StudentConfig, teacher: TeacherConfig, clips: int, seen: int) -> None:
    form, phase = step.form, "teacher"
    width, heads, patches = teacher.width, teacher.heads, teacher.grid**2
    frames = clips * student.token_frames
    length = patches + 1
    rows, pixels = frames * length, clips * 3 * student.frames * student.image_size**2
    bits = 8 if form.eight_bit else 16
    if form.published:
        own = clips * 3 * student.frames * teacher.image_size**2
        if teacher.clip_size != teacher.image_size:
            step.passes(phase, "bicubic resize", pixels, 8, 8)
        step.passes(phase, "cast of the clip", own, 6, 6)
        step.passes(phase, "cast of the weights", costs.teacher_parameters(teacher), 6, 6)
        window = teacher.patch_size
    else:
        window = costs.folded_window(teacher)
        # Eager: to float32, divided, shifted, scaled, padded or unfolded, cast; fused: read 1 byte, write the windows.
        step.passes(phase, "patch gather", pixels, 43, 1 + 2 * (window / teacher.clip_patch_size) ** 2)
    features = 3 * teacher.tubelet_size * window**2
    step.matmul(phase, "patch embedding", frames * patches, width, features)
    residual = 4 if form.float32_residual else 2
    # Eager: to one tensor 4, sum 4, norm with casts 20. Lean: the sum in float32 6, and the first block's norm 20 more.
    if form.published:
        step.passes(phase, "class token, positions, ln_pre", rows * width, 28, 2 + residual)
    else:
        normed = residual + 1 if form.own_eight_bit else 2  # a separate kernel, which reads the residual again
        step.passes(phase, "class token, positions, ln_pre, norm", rows * width, 44, 2 + residual + normed)
    full = teacher.depth if form.published else teacher.depth - 1
    _teacher_blocks(step, rows, width, full, bits)
    published_last = int(form.published)  # with attention weights of all pairs of tokens
    step.attention(phase, length, length, width, frames, full - published_last)
    if published_last:
        step.math_attention(phase, length, width, heads, frames, 1)
    layers, out = teacher.align_layers, teacher.target_width
    if form.published:
        finished = layers * frames * patches
        step.passes(phase, "stack and ln_post of all tokens", finished * width, 24, 6)
        step.matmul(phase, "projection", frames * patches, out, width, layers)
        step.passes(phase, "L2 norm of all targets", finished * out, 16, 8)
        step.passes("sampling", "targets by mask", finished * out, 4, 4)
        return
    shown = clips * seen
    step.matmul(phase, "last block: keys and values", rows, 2 * width, width)
    step.matmul(phase, "last block: queries", shown + frames, width, width)
    step.passes(phase, "last block: class scores", rows * width, 2, 2)
    step.attention(phase, shown / frames, length, width, frames, 1)
    _teacher_rest(step, "last block: ", shown, width, 1, bits)
    _teacher_norms(step, "last block: ", shown, width, 1, residual + 2)
    step.passes(phase, "ln_post of visible tokens", layers * shown * width, 14, residual + 2)
    step.matmul(phase, "projection", shown, out, width, layers)


def _teacher_blocks(step: _Step, rows: int, width: int, count: int, bits: int) -> None:
    phase = "teacher"
    step.matmul(phase, "qkv", rows, 3 * width, width, count, bits=bits)
    _teacher_rest(step, "", rows, width, count, bits)
    _teacher_norms(step, "", rows, width, count)


def _teacher_norms(step: _Step, prefix: str, rows: float, width: int, count: int, queries: float = 0) -> None:
    """Sums and norms of `count` blocks, and the quantisation of their matmuls' inputs.

    Each half of a block: eager, sum 6, to float32 6, norm 8, back 6; fused, two inputs read, residual and norm written.
    The last block has one such half, and a norm before its queries that moves `queries` bytes per element.
    """
    phase, form = "teacher", step.form
    fused = 12 if form.float32_residual else 7 if form.own_eight_bit else 8  # 7: rows of 8 bits for the next matmul
    norms = 1 if queries else 2
    step.passes(phase, f"{prefix}residual sums and norms", rows * width, 26, fused, norms * count)
    if queries:
        step.passes(phase, f"{prefix}norm before the queries", rows * width, 20, queries, count)
    if form.eight_bit:  # attention's output, and by torchao the norms' too
        moved = 3 if form.own_eight_bit else 3 + 3 * norms
        step.passes(phase, f"{prefix}quantisation of the inputs", rows * width, moved, moved, count)


def _teacher_rest(step: _Step, prefix: str, rows: float, width: int, count: int, bits: int) -> None:
    """Output projection and MLP."""
    phase, form, hidden = "teacher", step.form, MLP_RATIO * width
    step.matmul(phase, f"{prefix}attention's projection", rows, width, width, count, bits=bits)
    step.matmul(
        phase, f"{prefix}MLP in", rows, hidden, width, count, bits=bits, out_bits=8 if form.own_eight_bit else 16
    )
    step.matmul(phase, f"{prefix}MLP out", rows, width, hidden, count, bits=bits)
    if form.own_eight_bit:
        return  # the epilogue of the first product writes the input of the second
    if not form.epilogues:  # published: two products and a sigmoid; lean: two passes in place
        step.passes(phase, f"{prefix}QuickGELU", rows * hidden, 14 if form.published else 8, 4, count)
    if form.eight_bit:
        step.passes(phase, f"{prefix}quantisation of the hidden layer", rows * hidden, 3, 3, count)


def _student(step: _Step, student: StudentConfig, clips: int, seen: int) -> None:
    form, width, depth = step.form, student.width, student.depth
    rows, hidden = clips * seen, MLP_RATIO * student.width
    forward, backward = "student forward", "backward"
    features = 3 * student.tubelet_size * student.patch_size**2
    embedded = clips * (student.tokens if form.published else seen)
    step.passes(forward, "cast of the weights", costs.student_parameters(student), 6, 6)
    if form.published:
        step.passes(forward, "cast of the clip", embedded * features, 6, 6)
        step.passes(forward, "positions, tokens by mask", embedded * width, 12, 8)
    else:
        step.passes(forward, "patch gather", embedded * features, 43, 3)
    step.matmul(forward, "patch embedding", embedded, width, features)
    step.matmul(backward, "patch embedding", width, features, embedded)
    if form.published:
        step.passes(backward, "scatter of the tokens' gradients", embedded * width, 8, 4)
    shapes = {
        "qkv": (3 * width, width),
        "attention's projection": (width, width),
        "MLP in": (hidden, width),
        "MLP out": (width, hidden),
    }
    for name, (out, into) in shapes.items():
        pre = 2 * rows * hidden if form.epilogues and name == "MLP in" else 0  # the input of GELU, for the backward
        step.matmul(forward, name, rows, out, into, depth, pre)
        read = 2 * rows * hidden if form.epilogues and name == "MLP out" else 0
        step.matmul(backward, f"{name}, input", rows, into, out, depth, read)
        step.matmul(backward, f"{name}, weight", out, into, rows, depth)
        if not (form.bias_sums and name == "MLP in"):
            step.passes(backward, "bias gradients", rows * out, 2, 2, depth)
    if not form.epilogues:
        step.passes(forward, "GELU", rows * hidden, 4, 4, depth)
        step.passes(backward, "GELU", rows * hidden, 6, 6, depth)
    if form.math_attention:
        step.math_attention(forward, seen, width, student.heads, clips, depth)
        step.math_attention(backward, seen, width, student.heads, clips, depth)
    else:
        step.attention(forward, seen, seen, width, clips, depth)
        flops = 10 * clips * seen**2 * width  # including a recomputed forward pass
        step.kernels.append(Kernel(backward, "attention", depth, 16 * rows * width, flops, "attention"))
    step.passes(forward, "residual sums and norms", rows * width, 24, 12, 2 * depth)
    # Fused: read the gradients of norm and residual and the residual, write two gradients; 6 more bytes in two kernels.
    # The op needs one kernel, and covers a block's second norm; the sum before the first is in the preceding block.
    by_op = depth if form.add_layer_norm else 0
    step.passes(backward, "residual sums and norms", rows * width, 38, 22, 2 * depth - by_op)
    if by_op:
        step.passes(backward, "residual sums and norms by the op", rows * width, 38, 16, by_op)
    step.passes(backward, "casts of weight gradients", costs.student_parameters(student), 6, 6)


def _loss(step: _Step, student: StudentConfig, clips: int, seen: int) -> None:
    rows, layers, width, out = clips * seen, student.align_layers, student.width, student.target_width
    step.passes("student forward", "norm and positions of the heads", rows * width, 26, 6, layers)
    step.matmul("student forward", "heads", rows, out, width, layers)
    _cosine(step, layers * rows * out)
    step.matmul("backward", "heads, input", rows, width, out, layers)
    step.matmul("backward", "heads, weight", out, width, rows, layers)
    step.passes("backward", "norms of the heads", rows * width, 38, 16, layers)


def _cosine(step: _Step, elements: float) -> None:
    """Norms, cosine and their gradients, for `elements` predictions in 2 bytes.

    Eager, a pass for each call, in float32: cast 6, LayerNorm and its two vectors 24, or 8 published; lengths 4 to 12,
    division and mask 8 to 16, product with the targets 12, sum 4, and about as many for the gradients.
    """
    form = step.form
    if form.published:
        step.passes("student forward", "norms of the predictions", elements, 34, 6)
        step.passes("loss", "cosine", elements, 16, 16)
        step.passes("backward", "product of the cosine", elements, 8, 8)
        step.passes("backward", "norms of the predictions", elements, 72, 8)
    elif form.plain_loss:
        step.passes("loss", "norms and cosine, plain", elements, 92, 92)
        step.passes("backward", "norms and cosine, plain", elements, 114, 114)
    else:  # predictions and targets read, the gradient written; the backward pass scales nothing
        step.passes("loss", "norms, cosine and the gradient", elements, 6, 6)


def _optimiser(step: _Step, student: StudentConfig) -> None:
    """AdamW: 20 passes over 4-byte numbers if foreach, 7 if fused. The published step also unscales gradients."""
    parameters = costs.student_parameters(student)
    if step.form.published:
        step.passes("optimiser", "unscaling, norms", parameters, 12, 12)
        step.passes("optimiser", "AdamW, foreach", parameters, 80, 80)
    else:
        step.passes("optimiser", "gradient norm", parameters, 4, 4)
        step.passes("optimiser", "AdamW, fused", parameters, 28, 28)
