"""The compile gate passes the kernels, and fails kernels that break its rules on purpose."""

import importlib
import json
import shutil

import pytest
import torch
from umt_kernels import backend

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from benchmarks.kernels import compile_report, gpu_code, launches, traffic  # noqa: E402

pytestmark = [
    pytest.mark.skipif(backend.INTERPRETED, reason="the interpreter takes the compiler's place"),
    pytest.mark.skipif(shutil.which(triton.knobs.nvidia.ptxas.path) is None, reason="triton without its assembler"),
]

FIRST = {
    "gather_patches": "UMT-B/16 student, i64 ids, u8->bf16",
    "gather_layer_norm": "UMT-B/16 student, position, i64, bf16",
    "add_layer_norm": "UMT-B/16 student, drop path, fp32+bf16",
    "matmul": "UMT-B/16 student, fc1",
    "eight_bit": "UMT-B/16 fp8 teacher, sum and norm",
    "cls_scores": "UMT-B/16 bf16",
    "sample_visible": "UMT-B/16 per frame, fp32",
    "cosine_alignment_loss": "UMT-B/16 norm, grad, i64 ids, bf16",
    "pixel_loss": "UMT-B/16 uint8 clip, per channel, bf16",
}


def find_case(op, name):
    return next(case for case in launches.cases() if (case.op, case.name) == (op, name))


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place * STEP, mask=place < n, other=0.0)
    tl.store(y_ptr + place, x, mask=place < n)


@triton.jit
def greedy_kernel(x_ptr, y_ptr, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Keeps a large tile alive between a load and a loop that needs all of it."""
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row[:, None] * BLOCK + column[None, :])
    for _ in range(n):
        x = x * tl.sum(x, axis=1)[:, None] + tl.sum(x, axis=0)[None, :]
    tl.store(y_ptr + row[:, None] * BLOCK + column[None, :], x)


@triton.jit
def shared_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    """Keeps the tiles of `num_stages` steps in shared memory."""
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    total = tl.zeros((N, N), tl.float32)
    for step in range(n):
        tile = tl.load(x_ptr + step * N * N + place)
        total = tl.dot(tile, tl.load(x_ptr + (n + step) * N * N + place), total)
    tl.store(y_ptr + place, total)


def compile_row(monkeypatch, kernel, *arguments, bulk=(), arch=80, **settings):
    """The report's row of a kernel that does not belong to an op."""
    monkeypatch.setattr(compile_report, "traffic", lambda launch: (1, 1))
    with gpu_code.compile_only(arch) as launched:
        kernel[(1,)](*arguments, **settings)
    (launch,) = launched
    return compile_report.make_row(launch, "made to fail", arch, bulk)


@pytest.mark.parametrize("op", FIRST)
def test_kernels_pass_the_gate(op):
    rows = compile_report.report(find_case(op, FIRST[op]), 90)
    assert [failure for row in rows for failure in row.failures()] == []
    for row in rows:
        assert row.registers > 0
        assert 0 < row.occupancy <= 1
        assert row.moved >= row.least > 0
        assert "?" not in row.stores
        assert row.wide_divisions == 0  # indices have 32 bits; only address products have 64
        assert row.kernel in compile_report.table(rows)


def test_bulk_arguments_of_a_launch_are_found():
    """Bulk arguments are found in the code under their own names, in 16-byte loads."""
    rows = {
        row.kernel: row for row in compile_report.report(find_case("gather_layer_norm", FIRST["gather_layer_norm"]), 80)
    }
    assert set(rows) == {"gather_layer_norm_forward", "gather_layer_norm_backward", "reductions"}
    norm = importlib.import_module("umt_kernels.gather_layer_norm")
    norm_backward = importlib.import_module("umt_kernels.gather_layer_norm_backward")
    assert rows["gather_layer_norm_forward"].registers <= norm.FORWARD_REGISTERS
    assert rows["gather_layer_norm_backward"].registers <= norm_backward.BACKWARD_REGISTERS
    assert set(rows["gather_layer_norm_forward"].loads) == {"x", "w", "b", "position", "position_ids"}
    assert rows["gather_layer_norm_backward"].bulk == {"g": (128, 128), "x": (128, 128)}


def test_the_loss_and_the_norms_wait_seldom():
    """A change of layout between warps would add two barriers; the loss once had 33."""
    named = {
        ("cosine_alignment_loss", "UMT-B/16 norm, grad, i64 ids, bf16"): 12,
        ("add_layer_norm", "UMT-B/16 student, drop path, fp32+bf16"): 8,
        ("pixel_loss", FIRST["pixel_loss"]): 5,
    }
    for (op, name), most in named.items():
        for row in compile_report.report(find_case(op, name), 90):
            assert row.kernel in ("reductions", "cosine_alignment_loss_finish") or row.barriers <= most, row.kernel


def kernels_of(module: str) -> set[str]:
    found = vars(importlib.import_module(module)).items()
    names = [name for name, value in found if isinstance(value, triton.JITFunction) and name.endswith("kernel")]
    return {gpu_code.kernel_name(module, name)[1] for name in names}


def test_every_kernel_has_cases():
    """A new kernel of umt_kernels needs cases in the report."""
    kernels = set()
    for op in {case.op for case in launches.cases()}:
        package = "benchmarks.kernels" if op == "implicit_patch_embed" else "umt_kernels"
        kernels |= kernels_of(f"{package}.{op}")
    for part in (
        "add_layer_norm_backward",
        "cosine_alignment_loss_kernel",
        "gather_layer_norm_backward",
        "matmul_kernel",
        "reductions",
    ):
        kernels |= kernels_of(f"umt_kernels.{part}")
    assert kernels == set(traffic.TRAFFIC)
    assert set(traffic.BULK) < kernels


def test_halo_is_not_a_failure_and_the_table_says_why():
    (row,) = compile_report.report(find_case("gather_patches", "UMT-L/16 teacher, all, halo 1, u8->bf16"), 80)
    assert row.bulk == {"clip": (8, 8)}
    assert row.failures() == []
    assert "off the 16-byte grid" in compile_report.table([row])


def test_spill_fails(monkeypatch):
    x = torch.empty(256, 256)
    row = compile_row(monkeypatch, greedy_kernel, x, x.clone(), 3, ROWS=256, BLOCK=256)
    assert row.spill > 0
    (failure,) = row.failures()
    assert "spills" in failure
    assert "sm_80" in failure


def test_matrix_units_are_seen_and_asked_for(monkeypatch):
    found = {arch: compile_report.report(find_case("matmul", FIRST["matmul"]), arch)[0].tensor for arch in (80, 90)}
    assert {arch: next(iter(names)) for arch, names in found.items()} == {80: "HMMA", 90: "HGMMA"}
    x = torch.empty(4096)
    monkeypatch.setattr(compile_report, "MATRIX_UNITS", {"test_compile_report_copy"})
    row = compile_row(monkeypatch, copy_kernel, x, x.clone(), 4096, STEP=1, BLOCK=1024)
    assert "has no instruction of the matrix units" in row.failures()[0]


@triton.jit
def divide_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place)
    tl.store(y_ptr + place, x // n)


def test_divisions_in_64_bits_are_seen(monkeypatch):
    for dtype, found in ((torch.int64, True), (torch.int32, False)):
        x = torch.empty(1024, dtype=dtype)
        row = compile_row(monkeypatch, divide_kernel, x, x.clone(), 7, BLOCK=1024)
        assert (row.wide_divisions > 0) == found


def test_narrow_load_fails(monkeypatch):
    x = torch.empty(4096)
    wide = compile_row(monkeypatch, copy_kernel, x, x.clone(), 4096, bulk=("x",), STEP=1, BLOCK=1024)
    assert wide.bulk == {"x": (128, 128)}
    assert wide.failures() == []
    narrow = compile_row(monkeypatch, copy_kernel, x, x.clone(), 4095, bulk=("x",), STEP=1, BLOCK=1024)
    assert "loads x 4 bytes at a time where 16 are possible" in narrow.failures()[0]


def test_code_of_another_checkout_is_not_taken_from_the_cache(monkeypatch, tmp_path):
    """Triton's cache identifies a kernel by source and line, not by file, so a cached one may name a removed file."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(4096)
    compile_row(monkeypatch, copy_kernel, x, x.clone(), 4096, STEP=1, BLOCK=1024, num_warps=8)
    assert list(tmp_path.iterdir()) == []


def test_misplaced_data_may_be_read_narrowly(monkeypatch):
    x = torch.empty(4097)[1:]
    row = compile_row(monkeypatch, copy_kernel, x, x.clone(), 4096, bulk=("x",), STEP=1, BLOCK=1024)
    assert row.bulk == {"x": (32, 32)}
    assert row.failures() == []


def test_load_that_is_not_found_fails(monkeypatch):
    x = torch.empty(4096)
    row = compile_row(monkeypatch, copy_kernel, x, x.clone(), 4096, bulk=("y",), STEP=1, BLOCK=1024)
    assert "no global load of y" in row.failures()[0]


def test_too_much_shared_memory_fails(monkeypatch):
    x, y = torch.empty(16, 64, 64, dtype=torch.bfloat16), torch.empty(64, 64)
    rows = [compile_row(monkeypatch, shared_kernel, x, y, 8, N=64, num_stages=stages) for stages in (2, 16)]
    failures = [[failure for failure in row.failures() if "shared memory" in failure] for row in rows]
    assert failures[0] == []
    assert len(failures[1]) == 1


def test_occupancy():
    a100 = gpu_code.ARCHITECTURES[80]
    assert gpu_code.occupancy(a100, registers=32, shared=0, warps=4) == 1
    assert gpu_code.occupancy(a100, registers=128, shared=0, warps=4) == 0.25
    assert gpu_code.occupancy(a100, registers=32, shared=81 << 10, warps=4) == 8 / 64
    assert gpu_code.occupancy(a100, registers=32, shared=0, warps=1) == 0.5
    assert gpu_code.occupancy(a100, registers=255, shared=0, warps=16) == 0


def test_main_writes_json_and_answers_for_the_gate(tmp_path, monkeypatch, capsys):
    good = compile_report.report(find_case("cls_scores", FIRST["cls_scores"]), 90)
    monkeypatch.setattr(compile_report, "report_all", lambda archs, op: good)
    assert compile_report.main(["--gate", "--arch", "90", "--json", str(tmp_path / "rows.json")]) == 0
    assert "gate: passed" in capsys.readouterr().out
    assert {row["kernel"] for row in json.loads((tmp_path / "rows.json").read_text())} == {
        "cls_scores_forward",
        "cls_scores_backward",
    }
    bad = [compile_report.Row(**{**vars(good[0]), "spill": 16})]
    monkeypatch.setattr(compile_report, "report_all", lambda archs, op: bad)
    assert compile_report.main(["--gate", "-q"]) == 1
    assert "FAIL cls_scores_forward [UMT-B/16 bf16] sm_90: spills 16 bytes per thread" in capsys.readouterr().out
    assert compile_report.main(["-q"]) == 0
