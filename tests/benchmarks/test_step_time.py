"""The step-time ladder on tiny models: every rung is the same step; what is reported follows from what is measured."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from benchmarks import step_time, step_time_report
from benchmarks.phases import PHASES, PhaseClock, no_mark
from benchmarks.rungs import build, ladder, missing, prepare

CPU = torch.device("cpu")
FLOAT, BASELINE, SDPA, COMPILED, LEAN, LEAN_COMPILED, FUSED, GRAPH, FP8 = ladder(CPU)


pytestmark = pytest.mark.usefixtures("one_thread")


def runnable():
    """The rungs that run on a CPU, less the compiled ones, which take minutes and compute the same."""
    return [FLOAT, BASELINE, SDPA, LEAN]


def test_every_rung_has_the_same_loss_for_twenty_steps():
    work = prepare("tiny", 2, CPU)
    losses = {}
    for rung in runnable():
        step = build(rung, work)
        losses[rung.name] = [float(step(work.visible, no_mark)) for _ in range(20)]
    expected = losses.pop(FLOAT.name)
    assert abs(expected[-1] - expected[0]) > 0.1  # it learns
    for name, got in losses.items():
        assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 0.02, name


@pytest.mark.timeout(450)  # it compiles them all
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the rungs of a GPU")
def test_every_rung_of_a_gpu_has_the_same_loss_for_twenty_steps():
    """A recorded step draws its own visible sets, so here it is not recorded; tests/test_acceleration.py does that."""
    device, losses = torch.device("cuda"), {}
    for rung in ladder(device):
        if missing(rung, device) is None:
            work = prepare("tiny", 2, device)
            step = build(rung, work)
            losses[rung.name] = [float(step(work.visible, no_mark)) for _ in range(20)]
            torch._dynamo.reset()
    expected = losses.pop(BASELINE.name)
    assert abs(expected[-1] - expected[0]) > 0.1  # it learns
    for name, got in losses.items():
        assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < 0.05, name


@pytest.mark.parametrize("rung", runnable(), ids=lambda rung: rung.name)
def test_every_phase_of_a_step_is_timed(rung):
    step = build(rung, prepare("tiny", 1, CPU))
    clock = PhaseClock(CPU)
    step(None, clock)
    spent = clock.seconds()
    assert set(spent) == set(PHASES)
    assert all(seconds > 0 for seconds in spent.values())


def test_what_cannot_run_says_what_it_needs():
    assert [missing(rung, CPU) for rung in (FLOAT, BASELINE, SDPA, COMPILED, LEAN, LEAN_COMPILED)] == [None] * 6
    assert [missing(rung, CPU) for rung in (FUSED, GRAPH, FP8)] == ["a CUDA GPU"] * 3


def test_a_rung_with_a_wrong_loss_is_refused(monkeypatch):
    def wrong(rung, work):
        step = build(rung, work)
        return lambda visible, mark: step(visible, mark) + (0.1 if rung is SDPA else 0.0)

    monkeypatch.setattr(step_time, "build", wrong)
    monkeypatch.setitem(step_time.GEMM_SIDE, "cpu", 64)
    first, second, third = step_time.measure_model("tiny", 1, [BASELINE, SDPA, LEAN], 1, CPU, {})
    assert first.seconds
    assert third.seconds
    assert second.seconds is None
    assert second.not_run.startswith("refused: its loss is")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The command's own files, from three rungs that are measured and one that is not."""
    folder = tmp_path_factory.mktemp("results")
    names = [FLOAT.name, BASELINE.name, SDPA.name, FP8.name]
    command = ["--models", "tiny", "--batch", "1", "2", "--repeats", "3", "--device", "cpu", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(step_time.GEMM_SIDE, "cpu", 256)
        step_time.main([*command, "--rungs", *names])
    return folder


def test_the_command_writes_what_it_measured(results):
    content = json.loads((results / "step_time.json").read_text())
    assert len(content["results"]) == 8
    for result in content["results"]:
        if result["rung"] == FP8.name:
            assert result["not_run"] == "not run: needs a CUDA GPU"
            assert result["seconds"] is None
            continue
        samples = sorted(result["samples"])
        assert len(samples) == 3
        assert result["seconds"] == samples[1]
        assert result["clips_per_second"] == pytest.approx(result["batch"] / samples[1])
        assert sum(result["phases"].values()) == pytest.approx(result["seconds"], rel=0.5)
        rate = content["gemm_flops_per_second"][result["precision"]]
        assert result["gemm_share"] == pytest.approx(result["model_flops"] / samples[1] / rate)
        assert result["peak_bytes"] is None
        assert result["k710_days"] == pytest.approx(658_000 * 200 / 32 / result["clips_per_second"] / 86400)


def test_the_page_and_the_plots_stand_alone(results):
    for name in ("ladder.png", "phases.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    page = (results / "step_time.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http" not in page
    assert 'src="ladder' not in page
    table = (results / "step_time.md").read_text()
    assert table.count("not run: needs a CUDA GPU") == 2
    assert "1.00x" in table


def test_resume_measures_only_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(step_time.GEMM_SIDE, "cpu", 64)
    monkeypatch.setattr(step_time, "describe", lambda: {"torch": "1", "triton": "1", "commit": "abc"})
    command = ["--models", "tiny", "--batch", "1", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    step_time.main([*command, "--rungs", FLOAT.name])
    first = json.loads((tmp_path / "step_time.json").read_text())["results"]
    built = []
    monkeypatch.setattr(step_time, "build", lambda rung, work: built.append(rung.name) or build(rung, work))
    step_time.main([*command, "--rungs", FLOAT.name, SDPA.name, "--resume"])
    both = json.loads((tmp_path / "step_time.json").read_text())["results"]
    assert built == [SDPA.name]
    assert [result["rung"] for result in both] == [FLOAT.name, SDPA.name]
    assert both[0]["samples"] == first[0]["samples"]
    monkeypatch.setattr(step_time, "describe", lambda: {"torch": "1", "triton": "1", "commit": "def"})
    step_time.main([*command, "--rungs", FLOAT.name, "--resume"])
    assert built == [SDPA.name, FLOAT.name]  # another commit: measured anew


@pytest.mark.parametrize("call", [0, 1, 2], ids=["when built", "at the first step", "when it is recorded"])
def test_a_rung_that_breaks_leaves_the_others(monkeypatch, call):
    def broken(rung, work):
        step, calls = build(rung, work), [0]

        def run(visible, mark):
            calls[0] += 1
            if calls[0] >= call:
                raise RuntimeError("no such kernel\nat all")
            return step(visible, mark)

        if rung is SDPA and call == 0:
            run(None, no_mark)
        return run if rung is SDPA else step

    monkeypatch.setattr(step_time, "build", broken)
    monkeypatch.setitem(step_time.GEMM_SIDE, "cpu", 64)
    first, second, third = step_time.measure_model("tiny", 1, [BASELINE, SDPA, LEAN], 1, CPU, {})
    assert second.not_run == "failed: no such kernel"
    assert second.seconds is None
    assert first.seconds
    assert third.seconds


def test_compare_flags_what_became_slower(results, monkeypatch):
    content = step_time_report.read(results / "step_time.json")
    assert step_time_report.regressions(content, content) == []
    slower = copy.deepcopy(content)
    slower["results"][1]["seconds"] *= 1.06
    slower["results"][2]["seconds"] *= 1.04
    slower["results"][5].update(seconds=None, not_run="not run: out of memory")
    first, second = step_time_report.regressions(content, slower)
    assert first.startswith("tiny, batch 1, baseline: ")
    assert first.endswith("(+6%)")
    assert "tiny, batch 2, baseline" in second
    monkeypatch.setattr(step_time, "measure", lambda _options, _folder: slower)
    with pytest.raises(SystemExit, match="slower than before"):
        step_time.main(["--out", str(results / "new"), "--compare", str(results / "step_time.json")])
    slower["device"] = "another"
    with pytest.raises(SystemExit, match="not compared"):
        step_time_report.regressions(content, slower)


def made_up_measurement() -> dict:
    """A step with 60 ms of arithmetic in two phases and 40 ms of other work, on a GPU of 500 TFLOP/s."""
    result = {
        "model": "umt_b16",
        "batch": 64,
        "rung": "+ lean math",
        "precision": "bf16",
        "seconds": 0.1,
        "phases": {"teacher": 0.05, "optimiser": 0.02, "backward": 0.03},
        "flops": {"teacher": 20 * 10**12, "backward": 10 * 10**12},
    }
    return {
        "device": "NVIDIA H200",
        "threads": 16,
        "torch": "2.13",
        "commit": "abc",
        "date": "2026-01-01",
        "gemm_flops_per_second": {"bf16": 500e12},
        "results": [result, {**result, "rung": "+ fp8 teacher"}, {**result, "seconds": None}],
    }


def test_predict_scales_arithmetic_and_memory_apart_and_says_that_it_is_a_prediction():
    text = step_time_report.predict(made_up_measurement(), "a100")
    expected = 60 * 989 / 312 + 40 * 4.8 / 2.039
    assert "not a measurement" in text
    assert f"| 100.0 | {expected:.1f} | {64e3 / expected:.1f} |" in text
    assert "no float8 on it" in text


def test_predict_treats_a_captured_step_as_one_phase():
    content = made_up_measurement()
    content["results"] = [{**content["results"][0], "phases": {}}]
    assert f"| {60 * 989 / 312 + 40 * 4.8 / 2.039:.1f} |" in step_time_report.predict(content, "a100")


def test_predict_refuses_a_cpu(results):
    with pytest.raises(SystemExit, match="cannot predict from"):
        step_time.main(["--from", str(results / "step_time.json"), "--predict", "a100"])


def test_mistakes_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no rung 'fast' on a cpu"):
        step_time.main(["--device", "cpu", "--rungs", "fast"])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"x.json is no step_time.json"):
        step_time.main(["--from", str(tmp_path / "x.json")])
