"""The step-time ladder on tiny models: every rung computes the same step, and reports follow the measurements."""

from __future__ import annotations

import copy
import functools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import umt_kernels.backend
from forked import run_ranks

from benchmarks.step_time import __main__ as step_time
from benchmarks.step_time import measure, overlap, page, plots, report
from benchmarks.step_time.jobs import JOBS, pretrain
from benchmarks.step_time.jobs.pretrain import PretrainWork, prepare
from benchmarks.step_time.ladder import ladder, missing
from benchmarks.step_time.memory import peak_on_cpu
from benchmarks.step_time.phases import PHASES, PhaseClock, no_mark
from umt_fast.run.world import World

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
JOB = JOBS["pretrain"]
BUILD = PretrainWork.build
FLOAT, BASELINE, SDPA, COMPILED, LEAN, LEAN_COMPILED, FUSED, GRAPH, TUNED, FP8, INT8, OWN_FP8, OWN_INT8, FP8_STUDENT = (
    ladder(CPU)
)


pytestmark = pytest.mark.usefixtures("one_thread")


def runnable():
    """The rungs that run on a CPU, without the compiled ones, which take minutes and compute the same."""
    return [FLOAT, BASELINE, SDPA, LEAN]


@pytest.fixture(autouse=True)
def _small_matmul(monkeypatch):
    monkeypatch.setitem(measure.GEMM_SIDE, "cpu", 64)


def test_every_rung_has_the_same_loss_for_twenty_steps():
    first, *others = measure.measure_model(JOB, "tiny", 2, runnable(), 1, CPU, {})
    assert len(first.losses) == 20
    assert abs(first.losses[-1] - first.losses[0]) > 0.1  # it learns
    for result in others:
        error = max(abs(a - b) for a, b in zip(result.losses, first.losses, strict=True))
        assert 0 < error == result.loss_error <= result.loss_tolerance == 0.02, result.rung


def in_place(clip_step, warm_ups=3):
    """Replaces CapturedStep on a CPU: every call makes the step."""
    return clip_step


class Stale:
    """A faulty recording: its replays return the loss of the first step without making a step."""

    def __init__(self, step):
        self.step, self.calls, self.loss = step, 0, None

    def __call__(self, clip):
        self.calls += 1
        if self.calls <= 4:
            self.loss = self.step(clip)
        return self.loss


@pytest.mark.parametrize("capture", [in_place, Stale])
def test_the_losses_of_a_recorded_rung_are_compared_as_it_will_be_timed(monkeypatch, capture):
    made = []
    monkeypatch.setattr(pretrain, "CapturedStep", lambda step: made.append(capture(step)) or made[-1])
    monkeypatch.setattr(measure, "missing", lambda _rung, _device: None)
    monkeypatch.setattr(measure, "peak_on_cpu", lambda _work, _rung: None)  # it builds the rung once more
    recorded = replace(LEAN, name="recorded", captured=True)
    _, result = measure.measure_model(JOB, "tiny", 1, [FLOAT, recorded], 1, CPU, {})
    if capture is Stale:
        assert result.seconds is None
        assert result.not_run.startswith("refused: the loss of step ")
        assert result.loss_error > result.loss_tolerance
        assert len(made) == 1
    else:
        assert result.seconds
        assert len(made) == 2  # one for the shared visible set, one that draws


def test_peak_memory_on_a_cpu_counts_what_lives_at_once():
    """A rung whose first step keeps 4 MiB, and whose every step needs 3 and then 2 MiB more."""

    class Steps:
        def build(self, _rung):
            kept = []

            def step(_shared, _mark):
                if not kept:
                    kept.append(torch.empty(4 << 20, dtype=torch.uint8))
                for size in (3, 2):
                    torch.empty(size << 20, dtype=torch.uint8)

            return step

    assert peak_on_cpu(Steps(), FLOAT) == pytest.approx(7 << 20, abs=4096)


def test_a_float8_student_stays_within_what_is_allowed(monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr(pretrain, "convert_student", functools.partial(pretrain.convert_student, emulate=True))
    rung = replace(LEAN, name="emulated", fp8_student=True, loss_tolerance=FP8_STUDENT.loss_tolerance)
    _, exact, result = measure.measure_model(JOB, "tiny", 2, [FLOAT, LEAN, rung], 1, CPU, {})
    assert exact.losses != result.losses
    assert result.seconds, result.not_run


@pytest.mark.timeout(450)  # it compiles them all
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the rungs of a GPU")
def test_every_rung_of_a_gpu_has_the_same_loss_for_twenty_steps():
    """In their timed form: compiled, and replayed if recorded."""
    device = torch.device("cuda")
    for rung in ladder(device):
        if missing(rung, device) is None:
            work = prepare("tiny", 2, device)
            result = measure.RungResult("tiny", 2, rung.name, rung.precision)
            contender = measure.Contender(rung, work, result)
            if rung.precision == "fp32":
                assert contender.check([])
                reference = result.losses
                assert abs(reference[-1] - reference[0]) > 0.1  # it learns
            assert contender.check(reference), f"{rung.name}: {result.not_run}"
            torch._dynamo.reset()


@pytest.mark.parametrize("rung", runnable(), ids=lambda rung: rung.name)
def test_every_phase_of_a_step_is_timed(rung):
    step = prepare("tiny", 1, CPU).build(rung)
    clock = PhaseClock(CPU)
    step(False, clock)
    spent = clock.seconds()
    assert set(spent) == set(PHASES)
    assert all(seconds > 0 for seconds in spent.values())


def test_rungs_that_cannot_run_say_what_they_need(monkeypatch):
    assert [missing(rung, CPU) for rung in (FLOAT, BASELINE, SDPA, COMPILED, LEAN, LEAN_COMPILED)] == [None] * 6
    assert [missing(rung, CPU) for rung in ladder(CPU)[6:]] == ["a CUDA GPU"] * 8
    gpu = torch.device("cuda")
    monkeypatch.setattr(umt_kernels.backend, "triton", None)
    assert missing(FUSED, gpu) == "triton (pip install triton)"
    monkeypatch.setattr(umt_kernels.backend, "triton", object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    for rung in (FP8, OWN_FP8, FP8_STUDENT):
        assert missing(rung, gpu) == "a GPU with float8 matmuls: Ada, Hopper or later"


def test_the_rung_of_max_autotune_compiles_in_that_mode(monkeypatch):
    modes = []
    monkeypatch.setattr(pretrain, "compile_models", lambda *arguments: modes.append(arguments[2:]))
    for backend in ("inductor", "aot_eager"):
        rung = replace(LEAN_COMPILED, max_autotune=TUNED.max_autotune, backend=backend)
        prepare("tiny", 2, CPU).build(rung)
    assert modes == [("inductor", "max-autotune-no-cudagraphs"), ("aot_eager", None)]


def test_the_experiment_is_timed_only_where_it_is_asked_for():
    def chosen(*arguments):
        return step_time.choose_rungs(step_time.parse([*arguments]), CPU)

    assert [rung.name for rung in chosen()] == [rung.name for rung in ladder(CPU)[:-1]]
    assert [rung.name for rung in chosen("--fp8-student")] == [rung.name for rung in ladder(CPU)]
    assert chosen("--rungs", LEAN.name) == [replace(FLOAT, timed=False), LEAN]
    assert chosen("--rungs", LEAN.name, FLOAT.name) == [FLOAT, LEAN]
    assert not ladder(torch.device("cuda"))[0].timed


def test_a_rung_with_a_wrong_loss_is_refused(monkeypatch, no_decoding, tmp_path):
    def wrong(work, rung):
        step = BUILD(work, rung)
        return lambda shared, mark: step(shared, mark) + (0.1 if rung.name == SDPA.name else 0.0)

    monkeypatch.setattr(PretrainWork, "build", wrong)
    first, second, third = measure.measure_model(JOB, "tiny", 1, [BASELINE, SDPA, LEAN], 1, CPU, {})
    assert first.seconds
    assert third.seconds
    assert second.seconds is None
    assert second.not_run.startswith("refused: the loss of step 1 is ")
    assert second.not_run.endswith("; 0.02 apart are allowed")
    folder = ["--device", "cpu", "--models", "tiny", "--batch", "1", "--repeats", "1", "--out", str(tmp_path)]
    with pytest.raises(
        SystemExit, match=r"other losses than the reference:\ntiny, batch 1, \+ SDPA: refused: the loss"
    ):
        step_time.main([*folder, "--rungs", BASELINE.name, SDPA.name])
    assert (tmp_path / "step_time.md").read_text().count("refused: the loss of step 1") == 1
    assert "not timed: the reference of the losses" in (tmp_path / "step_time.html").read_text()


@pytest.fixture
def no_decoding(monkeypatch):
    monkeypatch.setattr(overlap, "decode_seconds", lambda *_: 0.25)
    monkeypatch.setattr(overlap, "_synthetic", lambda folder: write_list(folder))


def write_list(folder):
    (folder / "list.csv").write_text("a.mp4,0\n")
    return str(folder / "list.csv")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The command's files, from three measured rungs and one that is not measured."""
    folder = tmp_path_factory.mktemp("results")
    names = [FLOAT.name, BASELINE.name, SDPA.name, FP8.name]
    command = ["--models", "tiny", "--batch", "1", "2", "--repeats", "3", "--device", "cpu", "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(measure.GEMM_SIDE, "cpu", 256)
        step_time.main([*command, "--workers", "1", "--rungs", *names])
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
        assert set(result["phases"]) == set(PHASES)
        assert 0 < sum(result["phases"].values()) <= sum(samples) / 2  # medians of three, each of a part of the step
        rate = content["gemm_flops_per_second"][result["precision"]]
        assert result["gemm_share"] == pytest.approx(result["model_flops"] / samples[1] / rate)
        weights = result["peak_bytes"]  # at least float32 weights, gradients and two moments
        assert weights > 16 * 100_000
        assert len(result["losses"]) == 20
        if result["rung"] == FLOAT.name:
            assert result["loss_error"] is result["loss_tolerance"] is None
        else:
            assert 0 < result["loss_error"] <= result["loss_tolerance"] == 0.02
    assert report.k710_days(1.0) == pytest.approx(658_000 * 200 / 32 / 86400)


def test_report_has_the_work_beside_the_step(results):
    pytest.importorskip("av")
    content = report.read(results / "step_time.json")
    assert [(found["model"], found["batch"]) for found in content["beside"]] == [("tiny", 1), ("tiny", 2)]
    one = content["beside"][0]
    assert one["decode_seconds"] > 0
    assert one["decode"] == "pyav, 1 workers, 16 videos made for it"
    assert one["all_reduce_seconds"] is None
    for name in ("step_time.md", "step_time.html"):
        assert (results / name).read_text().count("needs several processes (torchrun)") == 2
    timed = content["results"][0]
    one["decode_seconds"] = timed["seconds"] + 0.125
    assert report.stall(content, timed) == pytest.approx(0.125)
    assert "125.0" in report.rows(content)[0]
    one["decode_seconds"] = timed["seconds"] / 2
    assert report.stall(content, timed) == 0


def test_a_data_stall_is_drawn_with_the_phases(results, monkeypatch, tmp_path):
    content = report.read(results / "step_time.json")
    content["beside"] = [{**found, "decode_seconds": 1.0, "all_reduce_seconds": 0.5} for found in content["beside"]]
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, *_: drawn.extend(figure.axes))
    plots.draw_phases(content, tmp_path / "phases.png")
    for panel in drawn:
        names = [label.get_text() for label in panel.get_yticklabels()]
        assert names == [FLOAT.name, BASELINE.name, SDPA.name, "beside: decode", "beside: all-reduce"]
        stalled = next(bars for bars in panel.containers if bars.get_label() == "data stall")
        assert [bar.get_x() + bar.get_width() for bar in stalled] == pytest.approx([1000] * 3, rel=0.1)


def test_files_of_the_first_format_load(results, tmp_path):
    """The first format has only the first loss, and no times of overlapping work."""
    content = report.read(results / "step_time.json")
    del content["beside"]
    for result in content["results"]:
        for name in ("losses", "loss_error", "loss_tolerance"):
            del result[name]
        result["loss"] = 2.0
    old = tmp_path / "old.json"
    old.write_text(json.dumps(content))
    step_time.main(["--from", str(old), "--compare", str(old)])
    step_time.main(["--from", str(results / "step_time.json"), "--compare", str(old)])
    page.write(content, tmp_path)
    assert "| loss error |" not in (tmp_path / "step_time.md").read_text()
    committed = ROOT / "benchmarks" / "results" / "cpu" / "pretrain" / "step_time.json"
    step_time.main(["--from", str(committed), "--compare", str(committed)])


def test_without_pyav_decoding_says_what_it_needs(no_decoding, monkeypatch):
    def without(_folder):
        raise ModuleNotFoundError("no", name="av")

    monkeypatch.setattr(overlap, "_synthetic", without)
    world = World(0, 1, CPU)
    found = overlap.measure("tiny", 1, pretrain.MODELS["tiny"][0], None, 1, 1, world)
    assert found.decode_seconds is None
    assert found.decode == "needs av (pip install av)"


def test_two_processes_time_their_all_reduce_and_the_first_reports(demo_videos, tmp_path):
    options = ["--device", "cpu", "--models", "tiny", "--batch", "2", "--repeats", "2", "--rungs", BASELINE.name]
    options += ["--workers", "1", "--videos", str(demo_videos), "--out", str(tmp_path)]
    printed = run_ranks(step_time.main, [options], timeout=180)
    assert printed.count("tiny x 2: baseline ...") == 1
    content = report.read(tmp_path / "step_time.json")
    (found,) = content["beside"]
    assert found["decode_seconds"] > 0
    assert found["decode"].startswith(f"pyav, 1 workers, 8 videos of {demo_videos}")
    assert found["all_reduce_seconds"] > 0
    assert found["all_reduce"].startswith("2 processes, gloo, ")
    assert [result["rung"] for result in content["results"]] == [FLOAT.name, BASELINE.name]


def test_the_page_and_the_plots_stand_alone(results):
    for name in ("ladder.png", "phases.png"):
        assert (results / name).read_bytes().startswith(b"\x89PNG")
    text = (results / "step_time.html").read_text()
    assert text.count("data:image/png;base64,") == 2
    assert "http" not in text
    assert 'src="ladder' not in text
    table = (results / "step_time.md").read_text()
    assert table.count("not run: needs a CUDA GPU") == 2
    assert "1.00x" in table


def test_without_matplotlib_there_are_no_plots_and_it_says_so(results, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page.write(report.read(results / "step_time.json"), tmp_path)
    assert capsys.readouterr().out == "no plots: matplotlib is missing (pip install matplotlib)\n"
    assert "<img" not in (tmp_path / "step_time.html").read_text()
    assert "![" not in (tmp_path / "step_time.md").read_text()


def test_resume_measures_only_what_is_missing(monkeypatch, no_decoding, tmp_path):
    monkeypatch.setattr(step_time, "describe", lambda: {"torch": "1", "triton": "1", "commit": "abc", "sources": "abc"})
    command = ["--models", "tiny", "--batch", "1", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    step_time.main([*command, "--rungs", FLOAT.name])
    first = json.loads((tmp_path / "step_time.json").read_text())["results"]
    built = []
    monkeypatch.setattr(PretrainWork, "build", lambda work, rung: built.append(rung.name) or BUILD(work, rung))
    step_time.main([*command, "--rungs", FLOAT.name, SDPA.name, "--resume"])
    both = json.loads((tmp_path / "step_time.json").read_text())["results"]
    assert built == [SDPA.name] * 2  # for the times, and for the memory
    assert [result["rung"] for result in both] == [FLOAT.name, SDPA.name]
    assert both[0]["samples"] == first[0]["samples"]
    monkeypatch.setattr(step_time, "describe", lambda: {"torch": "1", "triton": "1", "commit": "abc", "sources": "def"})
    step_time.main([*command, "--rungs", FLOAT.name, "--resume"])
    assert built == [SDPA.name] * 2 + [FLOAT.name] * 2  # other sources: measured anew


@pytest.mark.parametrize("call", [0, 1, 2], ids=["when built", "at the first step", "when it is recorded"])
def test_a_rung_that_breaks_leaves_the_others(monkeypatch, call):
    def broken(work, rung):
        step, calls = BUILD(work, rung), [0]

        def run(shared, mark):
            calls[0] += 1
            if calls[0] >= call:
                raise RuntimeError("no such kernel\nat all")
            return step(shared, mark)

        if rung is SDPA and call == 0:
            run(False, no_mark)
        return run if rung is SDPA else step

    monkeypatch.setattr(PretrainWork, "build", broken)
    first, second, third = measure.measure_model(JOB, "tiny", 1, [BASELINE, SDPA, LEAN], 1, CPU, {})
    assert second.not_run == "failed: no such kernel"
    assert second.seconds is None
    assert first.seconds
    assert third.seconds


def test_the_first_rung_that_runs_is_the_reference_and_says_so(monkeypatch):
    """For example when the float32 baseline does not fit in memory."""

    def narrow(work, rung):
        if rung is FLOAT:
            raise torch.OutOfMemoryError
        return BUILD(work, rung)

    monkeypatch.setattr(PretrainWork, "build", narrow)
    gemm: dict[str, list[float]] = {}
    results = measure.measure_model(JOB, "tiny", 1, [FLOAT, BASELINE, SDPA], 1, CPU, gemm)
    assert results[0].not_run == "not run: out of memory"
    content = {"job": "pretrain", "results": [{**asdict(result), "gemm_share": 0.5} for result in results]}
    errors = [row[report.HEADER.index("loss error")] for row in report.rows(content)]
    assert errors[1] == "reference"
    assert errors[2] == f"{results[2].loss_error:.4f}"


def test_a_reference_that_is_not_finite_is_refused(monkeypatch):
    monkeypatch.setattr(PretrainWork, "build", lambda work, rung: lambda shared, mark: float("nan"))
    (result,) = measure.measure_model(JOB, "tiny", 1, [FLOAT], 1, CPU, {})
    assert result.not_run.startswith("refused: the loss of step 1 is nan")


def test_an_interrupted_measurement_keeps_the_rounds_it_made(monkeypatch):
    """On a CPU the rungs are timed in turn, all to the end."""
    rounds = []
    monkeypatch.setattr(measure, "gemm_seconds", lambda *_: rounds.append(1) or (1.0 if len(rounds) < 5 else 1 / 0))
    saved = []
    with pytest.raises(ZeroDivisionError):
        measure.measure_model(
            JOB, "tiny", 1, [FLOAT, BASELINE], 9, CPU, {}, None, lambda r: saved.append(copy.deepcopy(r))
        )
    assert [len(result.samples) for result in saved[-1]] == [2, 2]
    assert all(result.seconds for result in saved[-1])


def test_compare_flags_what_became_slower(results, monkeypatch):
    content = report.read(results / "step_time.json")
    assert report.regressions(content, content) == []
    slower = copy.deepcopy(content)
    slower["results"][1]["seconds"] *= 1.06
    slower["results"][2]["seconds"] *= 1.04
    slower["results"][5].update(seconds=None, not_run="not run: out of memory")
    first, second = report.regressions(content, slower)
    assert first.startswith("tiny, batch 1, baseline: ")
    assert first.endswith("(+6%)")
    assert "tiny, batch 2, baseline" in second
    path = results / "step_time.json"

    def overwrite(_options, _folder):
        path.write_text(json.dumps(slower))
        return slower

    monkeypatch.setattr(step_time, "measure", overwrite)
    try:
        with pytest.raises(SystemExit, match="slower than before"):
            step_time.main(["--out", str(results), "--compare", str(path)])
    finally:
        path.write_text(json.dumps(content))
    slower["device"] = "another"
    with pytest.raises(SystemExit, match="not compared"):
        report.regressions(content, slower)


def test_mistakes_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no rung 'fast' on a cpu"):
        step_time.main(["--device", "cpu", "--rungs", "fast"])
    with pytest.raises(SystemExit):
        step_time.main(["--device", "cpu", "--repeats", "0"])
    assert "--repeats 0: must be an integer >= 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"error: cannot read the list .*none.csv"):
        step_time.main(["--device", "cpu", "--videos", str(tmp_path / "none.csv")])
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"x.json is not a step_time.json"):  # before anything is measured
        step_time.main(["--device", "cpu", "--models", "umt_l16", "--compare", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match=r"error: .*x\.json"):
        step_time.main(["--device", "cpu", "--models", "umt_l16", "--out", str(tmp_path / "x.json")])
    with pytest.raises(SystemExit, match=r"x.json is not a step_time.json"):
        step_time.main(["--from", str(tmp_path / "x.json")])
