"""`python -m benchmarks.kernels.compile_report`: the code of every kernel, also for GPUs that this machine lacks.

Each kernel is compiled in every form in which the models launch it, for each architecture. A row of the table has

    regs     registers per thread
    shared   bytes of shared memory per program
    spill    bytes of stack and local memory per thread
    loads    global load instructions by width in bits (how many x how wide)
    stores   global store instructions, in the same form
    tensor   instructions of the matrix units
    barr.    barriers, where the warps of a program wait for each other
    bulk     narrowest load of the bulk data / widest load for the layout, in bits (memory-bound kernels)
    moved    bytes requested from memory, before caches, as a multiple of the least possible
    occ.     share of a multiprocessor's warps that can be active

`--gate` exits with 1 if a kernel spills, needs too much shared memory, reads bulk data in loads under 16
bytes where the layout allows 16, or multiplies matrices without the matrix units.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import triton

from benchmarks.kernels.gpu_code import ARCHITECTURES, Launch, compile_only, occupancy, read_code
from benchmarks.kernels.launches import LaunchCase, cases
from benchmarks.kernels.traffic import BULK, MATRIX_UNITS, layout_bytes, traffic

PROCESSES = 2
"""Number of processes: each compiles on one core, and CI has two."""


_WIDE_DIVISION = re.compile(r"\b(?:div|rem)\.[su]64\b")


@dataclass(frozen=True)
class Row:
    """One kernel in one form on one architecture. Widths are bits, sizes bytes."""

    kernel: str
    case: str
    arch: int
    registers: int
    shared: int
    spill: int
    """Bytes per thread."""
    loads: dict[str, dict[int, int]]
    """Number of instructions by argument and width."""
    stores: dict[str, dict[int, int]]
    tensor: dict[str, int] | None
    """Instructions of the matrix units by name, for kernels that must use them."""
    barriers: int
    wide_divisions: int
    """Divisions of 64-bit integers. A GPU has no instruction for these: each takes dozens of others."""
    bulk: dict[str, tuple[int, int]]
    """For each bulk argument, its narrowest load (0: none was found) and the widest load for its layout."""
    moved: int
    least: int
    occupancy: float
    warps: int
    note: str

    def failures(self) -> list[str]:
        """The gate's rules that this kernel breaks."""
        found = []
        if self.spill:
            found.append(f"spills {self.spill} bytes per thread")
        limit = ARCHITECTURES[self.arch].shared_per_program
        if self.shared > limit:
            found.append(f"needs {self.shared} bytes of shared memory; the limit is {limit}")
        if self.tensor is not None and not self.tensor:
            found.append("has no instruction of the matrix units")
        for name, (narrowest, allowed) in self.bulk.items():
            if narrowest == 0:
                found.append(f"no global load of {name} was found")
            elif narrowest < 128 <= allowed:
                found.append(f"loads {name} {narrowest // 8} bytes at a time where 16 are possible")
        return [f"{self.kernel} [{self.case}] sm_{self.arch}: {reason}" for reason in found]


def report(case: LaunchCase, arch: int) -> list[Row]:
    """Compile the launches of a case for one architecture."""
    with compile_only(arch) as launches:
        case.run()
    if not launches:
        raise RuntimeError(f"{case.op} [{case.name}] launched no kernel")
    return [make_row(launch, case.name, arch) for launch in launches]


def make_row(launch: Launch, case: str, arch: int, bulk: tuple[str, ...] | None = None) -> Row:
    """Read a launch's code. `bulk` names the arguments that need wide loads; None: from the table of kernels."""
    code = read_code(launch.cubin, launch.ptx)
    widths = {}
    if bulk is None:  # reads by tensor descriptors are not load instructions
        bulk = () if launch.arguments.get("DESCRIPTORS") else BULK.get(launch.kernel, ())
    for name in bulk:
        widths[name] = (min(code.loads.get(name, {0: 0})), 8 * layout_bytes(launch, name))
    moved, least = traffic(launch)
    return Row(
        kernel=launch.kernel,
        case=case,
        arch=arch,
        registers=code.registers,
        shared=launch.shared,
        spill=code.local_bytes or 4 * code.local_accesses,
        loads={name: dict(counts) for name, counts in code.loads.items()},
        stores={name: dict(counts) for name, counts in code.stores.items()},
        tensor=dict(code.tensor) if launch.kernel in MATRIX_UNITS else None,
        barriers=code.barriers,
        wide_divisions=len(_WIDE_DIVISION.findall(launch.ptx)),
        bulk=widths,
        moved=moved,
        least=least,
        occupancy=occupancy(ARCHITECTURES[arch], code.registers, launch.shared, launch.warps),
        warps=launch.warps,
        note="halo: windows start off the 16-byte grid" if launch.arguments.get("HALO_WIDTH") else "",
    )


@cache
def _cases() -> dict[tuple[str, str], LaunchCase]:
    return {(case.op, case.name): case for case in cases()}


def _report(task: tuple[str, str, int]) -> list[Row]:
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    return report(_cases()[task[:2]], task[2])


def report_all(archs: list[int], op: str | None = None) -> list[Row]:
    """Rows of every case of all ops (or of `op`), in order."""
    tasks = [
        (case.op, case.name, arch) for arch in archs for case in cases() if op in (None, case.op) and arch >= case.arch
    ]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        rows = [row for found in pool.map(_report, tasks, chunksize=4) for row in found]
    return sorted(rows, key=lambda row: row.kernel)


def _widths(accesses: dict[str, dict[int, int]]) -> str:
    total: Counter[int] = Counter()
    for counts in accesses.values():
        total.update(counts)
    return " ".join(f"{total[width]}x{width}" for width in sorted(total))


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    header = (
        "kernel",
        "case",
        "arch",
        "regs",
        "shared",
        "spill",
        "loads",
        "stores",
        "tensor",
        "barr.",
        "bulk",
        "moved",
        "occ.",
        "note",
    )
    lines = [header]
    for row in rows:
        bulk = " ".join(f"{name} {narrowest}/{allowed}" for name, (narrowest, allowed) in row.bulk.items())
        lines.append(
            (
                row.kernel,
                row.case,
                f"sm_{row.arch}",
                f"{row.registers}",
                f"{row.shared}",
                f"{row.spill}",
                _widths(row.loads),
                _widths(row.stores),
                " ".join(f"{count}x{name}" for name, count in (row.tensor or {}).items()),
                f"{row.barriers}",
                bulk,
                f"{row.moved / row.least:.2f}",
                f"{row.occupancy:.0%}",
                row.note,
            )
        )
    wide = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, wide, strict=True)).rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.kernels.compile_report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops = sorted({case.op for case in cases()})
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="80, 90, 100; default: all")
    parser.add_argument("--kernel", choices=ops, help="only this op's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, loads and stores by argument")
    parser.add_argument("--gate", action="store_true", help="exit with 1 if a kernel breaks a rule")
    parser.add_argument("-q", "--quiet", action="store_true", help="no table")
    options = parser.parse_args(arguments)
    archs = options.arch or list(ARCHITECTURES)
    rows = report_all(archs, options.kernel)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if not options.quiet:
        print(table(rows))
    names = ", ".join(f"sm_{arch} ({ARCHITECTURES[arch].name})" for arch in archs)
    print(f"{len(rows)} kernels compiled with triton {triton.__version__} for {names}")
    if not options.gate:
        return 0
    failures = [failure for row in rows for failure in row.failures()]
    for failure in failures:
        print(f"FAIL {failure}")
    print(f"gate: {len(failures)} failures" if failures else "gate: passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
