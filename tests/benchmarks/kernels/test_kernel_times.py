"""The kernels' times on tiny shapes, refusals, the clock, and the report."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch

from benchmarks import environment
from benchmarks.kernels import __main__ as kernels
from benchmarks.kernels import libraries, published, report, timing
from benchmarks.kernels.case import OpCase, draw_fault
from benchmarks.kernels.cases import cases
from benchmarks.kernels.shapes import TINY, UMT_B, UMT_L
from benchmarks.rates import GPUS

CONTENDERS = ("triton", "eager", "compiled")

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="tiny shapes on a CPU"
)


def case(op: str, backward: bool = False) -> OpCase:
    return next(case for case in cases(TINY) if case.op == op and case.backward == backward)


def test_every_case_is_right_and_timed_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(OpCase, "contenders", property(lambda _case: ["triton", "eager"]))
    kernels.main(["--out", str(tmp_path)])
    content = report.read(tmp_path / "kernels.json")
    found = {report.key_of(report.load(one)): one for one in content["results"]}
    assert set(found) == {(report.key(one), name) for one in cases(TINY) for name in ("triton", "eager")}
    assert all(one["seconds"] > 0 and one["least_bytes"] > 0 for one in found.values())
    assert content["facts"]["device"] == "cpu"
    assert (tmp_path / "kernels.png").read_bytes()[:4] == b"\x89PNG"
    text = (tmp_path / "kernels.md").read_text()
    assert "verdict" not in text  # a CPU gives no verdicts
    assert "cls_scores (last block) | backward | tiny" in text


def test_contenders_of_the_library_and_the_compiler():
    found = [
        kernels.measure(case("gather_layer_norm"), name, torch.device("cpu"), False) for name in ("compiled", "liger")
    ]
    assert found[0].seconds > 0
    assert found[1].not_run == "not run: liger-kernel needs a GPU"


def test_checking_times_nothing_and_a_second_call_repeats_nothing(tmp_path, monkeypatch, capsys):
    command = ["--check", "--resume", "--ops", "cls_scores", "--out", str(tmp_path)]
    kernels.main(command)
    (forward, backward) = report.read(tmp_path / "kernels.json")["results"]
    assert forward["not_run"] == backward["not_run"] == report.CHECKED
    monkeypatch.setattr(kernels, "measure", lambda *_: 1 / 0)
    kernels.main(command)
    assert capsys.readouterr().out.count("numbers right") == 2
    monkeypatch.setattr(kernels, "describe", lambda: {"device": "cpu", "torch": "x", "triton": "x", "sources": "x"})
    with pytest.raises(ZeroDivisionError):
        kernels.main(command)


def test_a_contender_with_wrong_numbers_is_not_timed(tmp_path, monkeypatch):
    right = published.cls_scores
    monkeypatch.setattr(published, "cls_scores", lambda x: 1.05 * right(x))
    monkeypatch.setattr(OpCase, "contenders", property(lambda _case: ["triton", "eager"]))
    with pytest.raises(SystemExit, match=r"cls_scores \(last block\) forward, eager: refused: output is off by 0.05"):
        kernels.main(["--ops", "cls_scores", "--out", str(tmp_path)])
    found = report.read(tmp_path / "kernels.json")["results"]
    assert [one["seconds"] is None for one in found] == [False, True, False, True]


def test_an_unwritten_element_is_detected(monkeypatch):
    one = dataclasses.replace(case("cls_scores"), triton=lambda x: torch.empty(4, 4).expand(4, 4))
    monkeypatch.setattr(OpCase, "truth", lambda _case, x: (torch.zeros(4, 4, dtype=torch.float64),))
    assert (
        kernels.measure(one, "triton", torch.device("cpu"), True).not_run
        == "refused: output is off by nan of its norm, over 0.0001"
    )


def test_a_contender_that_breaks_leaves_the_others():
    one = dataclasses.replace(case("cls_scores"), eager=lambda x: 1 / 0)
    assert kernels.measure(one, "eager", torch.device("cpu"), False).not_run == "failed: division by zero"


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


def test_the_clock_gives_seconds_per_call_with_a_lead_before_each_round(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")
            self.milliseconds = 2.0 * len(log)

        def elapsed_time(self, later: Event) -> float:
            return later.milliseconds - self.milliseconds

    class Buffer:
        def sum(self) -> None:
            log.append("lead")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing, "_buffer", lambda: (Buffer(), 0.001))
    monkeypatch.setattr(timing, "_round", lambda call: (2, 0.0021))
    seconds = timing.median_seconds(lambda: log.append("call"), torch.device("cuda"))
    assert seconds == pytest.approx(0.003)  # two calls and the later event, 2 ms each, over two calls
    assert log[:7] == ["lead", "lead", "lead", "event", "call", "call", "event"]
    assert len(log) == 7 * 150  # rounds of 1 ms behind 3 ms of lead in 0.6 s


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


def time_of(one: OpCase, contender: str, microseconds: float) -> dict:
    found = report.KernelTime(
        one.op, one.form, one.direction, one.shapes.model, contender, one.shapes.batch, one.least_bytes, one.flops
    )
    found.seconds = microseconds / 1e6
    return dataclasses.asdict(found)


def test_report_of_a_small_file(tmp_path):
    found = {(one.op, one.form, one.direction): one for one in cases(UMT_B)}
    norm = found["gather_layer_norm", "rows", "forward"]
    embed = found["patch_embed", "all tokens", "forward"]
    times = {"triton": 25.0, "eager": 250.0, "compiled": 30.0, "liger": 80.0, "quack": 20.0}
    entries = [time_of(norm, name, time) for name, time in times.items()] + [time_of(embed, "triton", 400.0)]
    facts = {"device": "NVIDIA H200", "torch": "2.11", "triton": "3.6", "commit": "abc", "copy_bytes_per_second": 4e12}
    content = {"facts": facts, "results": entries}
    report.write(content, tmp_path)
    text = (tmp_path / "kernels.md").read_text()
    assert "copy 4000 GB/s; torch 2.11, triton 3.6, commit abc" in text
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines() if line[:1] == "|"]
    table = {tuple(line[:3]): dict(zip(lines[0], line, strict=True)) for line in lines[2:]}
    assert len(table) == 2
    row = table["gather_layer_norm (rows)", "forward", "umt_b16"]
    assert [float(row[f"{name} us"]) for name in CONTENDERS] == [25.0, 250.0, 30.0]
    assert row["library us"] == "20.0 (quack)"
    assert [float(row[f"{name} / triton"]) for name in ("eager", "compiled")] == [10.0, 1.2]
    assert row["verdict"] == "delete: quack is 1.25x faster"
    assert float(row["predicted us"]) == pytest.approx(1e6 * norm.least_bytes / 4e12, abs=0.05)
    rate = norm.least_bytes / 25e-6
    assert float(row["GB/s"]) == pytest.approx(rate / 1e9, abs=0.05)
    assert float(row["% of copy"]) == pytest.approx(100 * rate / 4e12, abs=0.05)
    row = table["patch_embed (all tokens)", "forward", "umt_b16"]
    assert float(row["TFLOP/s"]) == pytest.approx(2 * 64 * 1568 * 768 * 768 / 400e-6 / 1e12, abs=0.05)
    assert float(row["predicted us"]) == pytest.approx(1e6 * embed.flops / GPUS["h200"].matmul, abs=0.05)
    assert row["eager us"] == row["eager / triton"] == ""
    assert row["verdict"] == "no rival measured"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"facts": {"device": "cpu"}, "results": [{"op": 1}]}'])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    path = Path(tmp_path / "kernels.json")
    path.write_text(text)
    with pytest.raises(SystemExit, match=r"kernels\.json is not a kernels\.json"):
        report.read(path)


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA A100-SXM4-80GB"])
def test_8_bit_products_are_predicted_at_their_own_rate(gpu):
    one = next(case for case in cases(UMT_L) if case.op == "linear_8bit")
    found = report.KernelTime(*report.key(one), "triton", 64, one.least_bytes, one.flops)
    sheet = GPUS[environment.gpu_name(gpu)]
    assert report.predicted_seconds(found, {"device": gpu}) == pytest.approx(one.flops / sheet.eight_bit)


def test_float8_is_not_run_on_a_gpu_without_it(monkeypatch):
    one = next(case for case in cases(TINY) if case.form == "teacher MLP, float8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    for run in (one.triton, one.eager):
        with pytest.raises(libraries.Unavailable, match="float8 matmuls need Ada"):
            run({"x": torch.zeros(1)})
