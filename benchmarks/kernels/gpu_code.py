"""Compile Triton kernels as a launch does, for a GPU that this machine may lack, and read the code."""

from __future__ import annotations

import contextlib
import functools
import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from umt_kernels import backend
from umt_kernels.launch import PLANS


@dataclass(frozen=True)
class Architecture:
    """Limits of the number of warps that run at once (CUDA C++ Programming Guide, table of compute capabilities)."""

    name: str
    shared_per_sm: int
    """Bytes."""
    shared_per_program: int
    """Bytes; the driver adds 1 KiB to each program."""
    registers: int = 65536
    warps: int = 64
    programs: int = 32


ARCHITECTURES = {
    80: Architecture("A100", 164 << 10, 163 << 10),
    90: Architecture("H100, H200", 228 << 10, 227 << 10),
    100: Architecture("B200", 228 << 10, 227 << 10),
}
"""Architectures by compute capability, times ten."""


@dataclass(frozen=True)
class Launch:
    """A kernel launch that was compiled but not run."""

    op: str
    """Module of the kernel."""
    kernel: str
    """The op, followed by the kernel's name if the op has several: `gather_layer_norm_backward`."""
    programs: int
    arguments: dict[str, Any]
    """Arguments of a real launch, by parameter; they include compile-time settings."""
    warps: int
    shared: int
    """Bytes per program."""
    cubin: bytes
    ptx: str


class _Absent:
    """Replaces a GPU's driver while kernels are compiled."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a device per architecture, as Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


@functools.cache
def _fresh_cache() -> tempfile.TemporaryDirectory[str]:
    """A new folder for compiled kernels: code in the user's cache may refer to the sources of another checkout."""
    return tempfile.TemporaryDirectory(prefix="umt-kernel-report-")


def kernel_name(module: str, function: str) -> tuple[str, str]:
    """The op of a kernel, and the kernel's name: the op's name and the function's name without `kernel`."""
    op, stem = module.rpartition(".")[2].removesuffix("_kernel"), function.removesuffix("kernel").strip("_")
    return op, f"{op}_{stem}" if stem else op


@contextlib.contextmanager
def compile_only(capability: int) -> Iterator[list[Launch]]:
    """Inside this context the ops use Triton kernels on CPU tensors; a launch is compiled and listed, but not run.

    Triton's own launch path chooses the specialisation (divisibility, ones, integer widths), so a GPU would run the
    same code. Results are uninitialised memory. Raises RuntimeError under TRITON_INTERPRET=1, and under
    TRITON_DISABLE_LINE_INFO=1, because line information links a load to its argument.
    """
    if backend.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 turns the compiler off; unset it")
    if triton.knobs.compilation.disable_line_info:
        raise RuntimeError("TRITON_DISABLE_LINE_INFO=1 hides which argument a load reads; unset it")
    launches: list[Launch] = []
    launch = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        op, name = kernel_name(self.fn.__module__, self.fn.__name__)
        meta, asm = compiled.metadata, compiled.asm
        launches.append(
            Launch(op, name, math.prod(grid), arguments, meta.num_warps, meta.shared, asm["cubin"], asm["ptx"])
        )

    try:
        before = driver.active
    except RuntimeError:  # without a GPU
        before = None
    driver.set_active(_Absent(capability))
    try:
        with (
            mock.patch.object(JITFunction, "run", record),
            mock.patch.object(backend, "INTERPRETED", True),
            mock.patch.dict(PLANS, clear=True),  # plans hold the tile sizes of another architecture
            triton.knobs.cache.scope(),
        ):
            triton.knobs.cache.dir = _fresh_cache().name
            yield launches
    finally:
        driver.set_active(before)


@dataclass(frozen=True)
class Code:
    """Resources of a compiled kernel, and its memory accesses."""

    registers: int
    """Per thread."""
    local_bytes: int
    """Stack and local memory per thread, where registers spill."""
    local_accesses: int
    """Instructions that access local memory."""
    loads: dict[str, Counter[int]] = field(default_factory=dict)
    """Global loads by argument, `?` if unknown: number of instructions by width in bits."""
    stores: dict[str, Counter[int]] = field(default_factory=dict)
    tensor: Counter[str] = field(default_factory=Counter)
    """Instructions of the matrix units, by name: HMMA, HGMMA, UTCHMMA..."""
    barriers: int = 0
    """Barrier instructions, where the warps of a program wait for each other."""


_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)")
_TENSOR = re.compile(r"(UTC)?[HIQ]G?MMA")
"""HMMA and IMMA of a warp (Ampere), HGMMA, IGMMA and QGMMA of four (Hopper), UTCHMMA... of the tensor memory (B200)."""
_PTX_LINE = re.compile(r'\s*//## File "\.nv_debug_ptx_txt[^"]*", line (\d+)')
_LOCATION = re.compile(r"\s*\.loc\s+(\d+) (\d+)")
_FILE = re.compile(r'^\s*\.file\s+(\d+) "([^"]+)"', re.MULTILINE)
_POINTER = re.compile(r"tl\.(?:load|store)\(\s*(\w+?)(?:_ptr)?\b")


@functools.cache
def read_code(cubin: bytes, ptx: str) -> Code:
    """Disassemble with the tools of the triton wheel. Raises CalledProcessError if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _tool("cuobjdump", "-res-usage", path)
        sass = _tool("nvdisasm", "-gp", "-c", path)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    arguments = _arguments(ptx)
    argument = "?"
    loads: dict[str, Counter[int]] = {}
    stores: dict[str, Counter[int]] = {}
    tensor: Counter[str] = Counter()
    local = barriers = 0
    for line in sass.splitlines():
        if found := _PTX_LINE.match(line):
            argument = arguments[int(found[1]) - 1]
        elif found := _INSTRUCTION.match(line):
            kind, *modifiers = found[1].split(".")
            if _TENSOR.fullmatch(kind):
                tensor[kind] += 1
            elif kind == "BAR":
                barriers += 1
            elif kind in ("LDL", "STL"):
                local += 1
            elif kind in ("LDG", "LDGSTS"):
                loads.setdefault(argument, Counter())[_bits(modifiers)] += 1
            elif kind == "STG":
                stores.setdefault(argument, Counter())[_bits(modifiers)] += 1
    return Code(resources["REG"], resources["STACK"] + resources["LOCAL"], local, loads, stores, tensor, barriers)


def _arguments(ptx: str) -> list[str]:
    """For each line of PTX the argument that its source line loads or stores, `?` for none.

    Within inline assembly only the first location is right, because LLVM increments the line number after it.
    """
    files = {int(number): path for number, path in _FILE.findall(ptx)}
    arguments, argument, inline, frozen = [], "?", False, False
    for line in ptx.splitlines():
        if "begin inline asm" in line:
            inline = True
        elif "end inline asm" in line:
            frozen = inline = False
        elif (found := _LOCATION.match(line)) and not frozen:
            argument = _pointer(files[int(found[1])], int(found[2]))
            frozen = inline
        arguments.append(argument)
    return arguments


def _tool(name: str, *arguments: str | Path) -> str:
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _bits(modifiers: list[str]) -> int:
    """Width of an access, as in `LDG.E.128` or `LDG.E.U8`; 32 if the instruction has none."""
    return next((int(m.lstrip("US")) for m in modifiers if m.lstrip("US") in ("8", "16", "64", "128", "256")), 32)


@functools.cache
def _pointer(path: str, line: int) -> str:
    """Argument that a source line loads or stores: `x` for `tl.load(x_ptr + ...)`."""
    found = _POINTER.search(_source(path)[line - 1])
    return found[1] if found else "?"


@functools.cache
def _source(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def occupancy(architecture: Architecture, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warps that programs of `warps` warps can fill."""
    per_warp = max(1, -(-registers * 32 // 256)) * 256  # allocated in units of 256
    by_registers = architecture.registers // per_warp // 4 * 4 // warps  # each of 4 schedulers has a quarter
    by_shared = architecture.shared_per_sm // (-(-shared // 128) * 128 + 1024)
    programs = min(architecture.programs, architecture.warps // warps, by_registers, by_shared)
    return programs * warps / architecture.warps


def nbytes(tensor: Any) -> int:
    """Bytes of a tensor, or of a tensor descriptor's tensor; 0 for None."""
    tensor = getattr(tensor, "base", tensor)
    return 0 if tensor is None else tensor.numel() * tensor.element_size()
