"""The kernels' benchmark on tiny shapes, what it refuses, its clock, and its report."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from benchmarks import environment
from benchmarks.kernels import report, timing
from benchmarks.kernels.case import Case, draw_fault
from benchmarks.kernels.cases import cases
from benchmarks.kernels.shapes import TINY, UMT_B, UMT_L

ROOT = Path(__file__).parents[3]
CONTENDERS = ("triton", "eager", "compiled")


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Python code in the checkout, without a GPU."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def suite(path: Path, prelude: str = "", *arguments: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The suite after the code `prelude`, and what it measured."""
    code = f"import sys, pytest\n{prelude}\nsys.exit(pytest.main(sys.argv[1:]))"
    plugins = ("-p", "no:cacheprovider", "-p", "no:xdist")
    done = run(code, "benchmarks/kernels", "-q", *plugins, f"--benchmark-json={path}", *arguments)
    return done, json.loads(path.read_text())["benchmarks"] if path.is_file() and path.stat().st_size else []


def case(op: str, backward: bool = False) -> Case:
    return next(case for case in cases(TINY) if case.op == op and case.backward == backward)


def results_on_disk() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in report.RESULTS.rglob("*")}


def test_every_case_runs_on_the_cpu_and_writes_no_results(tmp_path):
    before = results_on_disk()
    done, measured = suite(tmp_path / "kernels.json")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    found = {(b["group"], b["extra_info"]["contender"]) for b in measured}
    assert found == {(one.group, name) for one in cases(TINY) for name in CONTENDERS}
    for benchmark in measured:
        info = benchmark["extra_info"]
        assert info["model"] == "tiny"
        assert info["device"] == "cpu"
        assert info["least_bytes"] > 0
        assert info["torch"] == torch.__version__
        assert "copy_bytes_per_second" not in info
        assert benchmark["stats"]["rounds"] == 2
    assert "node" not in json.loads((tmp_path / "kernels.json").read_text())["machine_info"]
    assert results_on_disk() == before


def test_a_contender_with_wrong_numbers_is_not_timed(tmp_path):
    prelude = (
        "from benchmarks.kernels import published\n"
        "right = published.cls_scores\n"
        "published.cls_scores = lambda x: 1.05 * right(x)"
    )
    done, measured = suite(tmp_path / "kernels.json", prelude, "-k", "cls_scores_last and not compiled")
    assert done.returncode == 1
    assert "refused: cls_scores last block tiny, eager: output is off by 0.05" in done.stdout
    assert [b["extra_info"]["contender"] for b in measured] == ["triton"]


def test_faults_are_named():
    loss = case("cosine_alignment_loss", backward=True)
    x = loss.make(torch.device("cpu"))
    truth = loss.truth(x)
    right = loss.step(loss.triton, "triton", x)
    assert loss.fault("triton", right, truth) is None
    for index, name in enumerate(("output", "gradient of predictions", "gradient of weight", "gradient of bias")):
        wrong = list(right)
        wrong[index] = right[index] * float("nan")
        assert loss.fault("triton", tuple(wrong), truth).startswith(f"{name} is off by nan")
    assert "shape [1]" in loss.fault("triton", (right[0][None], *right[1:]), truth)


@pytest.mark.parametrize(
    ("drawn", "fault"),
    [
        ([[0, 2], [1, 3]], None),
        ([[2, 0], [1, 3]], "ascending"),
        ([[0, 2], [3, 3]], "different"),
        ([[0, 2], [1, 4]], "range"),
        ([[-1, 2], [1, 3]], "range"),
        ([[0, 2, 3], [0, 1, 3]], "[2, 3]"),
        ([[True, False, False, True], [True, True, False, False]], None),
        ([[True, True, False, True], [True, True, False, False]], "[1, 2] ids, not 2"),
    ],
)
def test_draws_are_checked(drawn, fault):
    found = draw_fault(torch.tensor(drawn), torch.zeros(2, 2), 4)
    assert found is None if fault is None else fault in found


@pytest.mark.parametrize("contender", CONTENDERS[:2])
def test_contenders_are_right_in_bf16_too(contender):
    torch.manual_seed(0)
    for one in cases(dataclasses.replace(TINY, batch=3, frames=4, width=96, heads=3, dtype=torch.bfloat16)):
        x = one.make(torch.device("cpu"))
        assert one.fault(contender, one.step(one.run(contender), contender, x), one.truth(x)) is None, one.group


def test_least_bytes_are_those_counted_by_hand():
    found = {(one.op, one.form, one.direction): one for one in cases(UMT_L)}
    rows = 64 * 8 * 40
    kept = found["gather_patches", "visible tokens", "forward"]
    assert (kept.read, kept.written) == (rows * (16 * 16 * 3 + 8), rows * 16 * 16 * 3 * 2)
    halo = found["gather_patches", "all tokens, halo", "forward"]
    assert (halo.read, halo.written) == (64 * 8 * 224 * 224 * 3, 64 * 1568 * 18 * 18 * 3 * 2)
    scores = found["cls_scores", "last block", "forward"]
    assert (scores.read, scores.written) == (512 * 16 * 198 * 64 * 2, 512 * 196 * 4)
    loss = found["cosine_alignment_loss", "with LayerNorm", "backward"]
    assert loss.least_bytes == 3 * 6 * rows * 768 * 2 + 2 * 2 * 6 * 768 * 2 + 4
    norm = found["gather_layer_norm", "rows", "backward"]
    assert norm.written == rows * 1024 * 2 + 512 * 197 * 1024 * 2 + 2 * 1024 * 2
    embed = found["patch_embed", "visible tokens", "forward"]
    assert embed.flops == 2 * rows * 768 * 1024


def test_the_clock_gives_seconds_and_leads_only_before_a_start(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")
            self.milliseconds = 2.0 * len(log)

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, later: Event) -> float:
            return later.milliseconds - self.milliseconds

    class Buffer:
        def sum(self) -> None:
            log.append("lead")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = timing.EventTimer()
    clock._buffer, clock._filler_seconds = Buffer(), 0.001
    clock.lead(0.0021)
    for _ in range(2):
        start = clock()
        log.append("call")
        assert clock() - start == pytest.approx(0.004)
    assert log == 2 * ["lead", "lead", "lead", "event", "call", "event"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_gpu_names(device, name):
    assert environment.gpu_name(device) == name


def test_no_gpu_no_results():
    done = run("import runpy; runpy.run_module('benchmarks.environment', run_name='__main__')")
    assert done.returncode == 1
    assert "no CUDA GPU" in done.stderr


def entry(one: Case, contender: str, microseconds: float) -> dict:
    info = {"op": one.op, "form": one.form, "direction": one.direction, "model": one.shapes.model}
    info |= {"contender": contender, "least_bytes": one.least_bytes, "flops": one.flops}
    info |= {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "abc", "copy_bytes_per_second": 4e12}
    return {"extra_info": info, "stats": {"median": microseconds / 1e6}}


def test_report_of_a_small_file(tmp_path, monkeypatch):
    found = {(one.op, one.form, one.direction): one for one in cases(UMT_B)}
    norm = found["gather_layer_norm", "rows", "forward"]
    embed = found["patch_embed", "all tokens", "forward"]
    times = {"triton": 25.0, "eager": 250.0, "compiled": 30.0, "liger": 80.0, "quack": 70.0}
    entries = [entry(norm, name, time) for name, time in times.items()] + [entry(embed, "triton", 400.0)]
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"benchmarks": entries}))
    monkeypatch.setattr(sys, "argv", ["report", str(path)])
    report.main()
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "kernels.md").read_text()
    assert "copy 4000 GB/s; torch 2.11, triton 3.6, commit abc" in text
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    table = {tuple(line[:3]): dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert len(table) == len(cases(UMT_B)) + len(cases(UMT_L))
    row = table["gather_layer_norm (rows)", "forward", "umt_b16"]
    assert [float(row[f"{name} us"]) for name in CONTENDERS] == [25.0, 250.0, 30.0]
    assert row["library us"] == "70.0 (quack)"
    assert [float(row[f"{name} / triton"]) for name in ("eager", "compiled")] == [10.0, 1.2]
    rate = norm.least_bytes / 25e-6
    assert float(row["GB/s"]) == pytest.approx(rate / 1e9, abs=0.05)
    assert float(row["% of copy"]) == pytest.approx(100 * rate / 4e12, abs=0.05)
    row = table["patch_embed (all tokens)", "forward", "umt_b16"]
    assert float(row["TFLOP/s"]) == pytest.approx(2 * 64 * 1568 * 768 * 768 / 400e-6 / 1e12, abs=0.05)
    assert row["eager us"] == row["eager / triton"] == "not measured"
    row = table["cls_scores (last block)", "backward", "umt_l16"]
    assert {row[f"{name} us"] for name in CONTENDERS} == {row["GB/s"], row["% of copy"]} == {"not measured"}


def test_report_refuses_results_of_two_machines(tmp_path):
    entries = [entry(case("cls_scores"), name, 1.0) for name in ("triton", "eager")]
    entries[0]["extra_info"]["device"] = "NVIDIA A100-SXM4-80GB"
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"benchmarks": entries}))
    with pytest.raises(ValueError, match="2 devices"):
        report.read(path)


def test_readme_of_the_results_is_up_to_date():
    assert (report.RESULTS / "README.md").read_text() == report.index(report.RESULTS), (
        "run `python -m benchmarks.kernels.report`"
    )


def test_a_gpu_without_results_has_a_table_of_nothing(tmp_path):
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "kernels.json").write_text("{}")
    text = report.index(tmp_path)
    assert "[h200/kernels.md](h200/kernels.md)" in text
    a100 = text.split("## a100")[1]
    assert "Not measured yet." in a100
    assert not any(character.isdigit() for line in a100.splitlines() for character in "".join(line.split("|")[4:]))
