"""Predictions: the kernels hold the operations of the method, and a measurement adds its columns."""

from __future__ import annotations

import json

import pytest

from benchmarks.rates import GPUS, measured_rates
from benchmarks.step_time import __main__ as step_time
from benchmarks.step_time import prediction
from benchmarks.step_time.expected import FORMS, Form, Kernel, expected_kernels
from benchmarks.step_time.jobs.pretrain import MODELS
from benchmarks.step_time.ladder import BEST
from benchmarks.step_time.prediction import NEW_KERNELS, rung_seconds, step_seconds
from umt_fast.run import costs

A100 = GPUS["a100"]
SEEN = 320


@pytest.mark.parametrize("model", ["umt_b16", "umt_l16"])
@pytest.mark.parametrize("form", [*FORMS.values(), *NEW_KERNELS.values()], ids=str)
def test_the_kernels_make_the_operations_of_the_step(model, form):
    student, teacher = MODELS[model]
    kernels = expected_kernels(student, teacher, 4, SEEN, form)
    found: dict[str, float] = {}
    for kernel in kernels:
        found[kernel.phase] = found.get(kernel.phase, 0) + kernel.calls * kernel.flops
    count = costs.published_flops if form.published else costs.lean_flops
    expected = count(student, teacher, 4, SEEN).by_phase()
    if not form.math_attention:  # fused attention makes its forward pass again in the backward one
        expected["backward"] += 2 * 4 * SEEN**2 * student.width * student.depth
    for phase, flops in expected.items():
        assert found[phase] == pytest.approx(flops, rel=2e-5), phase


def test_bytes_of_two_kernels_counted_by_hand():
    student, teacher = MODELS["umt_b16"]
    rows = 64 * 8 * 197
    found = {(k.phase, k.name): k for k in expected_kernels(student, teacher, 64, SEEN, FORMS[BEST])}
    gelu = found["teacher", "QuickGELU"]
    assert (gelu.calls, gelu.bytes) == (11, rows * 3072 * 4)  # read and written once, 2 bytes each
    qkv = found["teacher", "qkv"]
    assert (qkv.flops, qkv.bytes) == (2 * rows * 768 * 2304, 2 * (rows * 768 + 768 * 2304 + rows * 2304))
    assert qkv.bound(A100) == "matmul"
    assert gelu.seconds(A100) == pytest.approx(11 * gelu.bytes / A100.copy)
    assert Kernel("teacher", "x", 3, bytes=A100.copy, flops=2 * A100.matmul).seconds(A100) == pytest.approx(6)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", ["umt_b16", "umt_l16"])
def test_each_rung_is_expected_to_be_no_slower_and_each_kernel_to_save(model, gpu):
    rates = GPUS[gpu]
    compiled = [name for name, form in FORMS.items() if name != "+ lean math, eager" and not form.eight_bit]
    predicted = [step_seconds(model, 64, FORMS[name], rates) for name in compiled]
    assert predicted == sorted(predicted, reverse=True)
    best = step_seconds(model, 64, FORMS[BEST], rates)
    for name, form in NEW_KERNELS.items():
        assert 0.5 * best < step_seconds(model, 64, form, rates) < best, name
    # Within what pure arithmetic and the whole of the peak allow.
    student, teacher = MODELS[model]
    assert best > costs.lean_flops(student, teacher, 64, SEEN).total / rates.matmul
    assert step_seconds(model, 128, FORMS[BEST], rates) > 1.9 * best


def test_float8_is_not_predicted_for_a_gpu_without_it():
    assert rung_seconds("umt_b16", 64, "+ fp8 teacher", A100) is None
    assert rung_seconds("umt_b16", 64, "baseline, float32", A100) is None
    assert rung_seconds("umt_b16", 64, "+ fp8 teacher", GPUS["h100"]) > 0
    assert rung_seconds("umt_b16", 64, "+ int8 teacher", A100) > 0


@pytest.mark.parametrize("gpu", ["a100", "h100"])
def test_the_command_needs_no_measurement(gpu, capsys, monkeypatch):
    monkeypatch.setattr(prediction, "find_measurement", lambda _target: None)
    step_time.main(["--predict", gpu, "--device", "cpu"])
    text = capsys.readouterr().out
    assert "arithmetic, not a measurement" in text
    assert "measured ms" not in text
    for model in ("umt_b16", "umt_l16"):
        assert f"## {model}, batch 64" in text
    for name in (*NEW_KERNELS, *FORMS):
        assert f"| {name} |" in text
    rows = [line for line in text.splitlines() if line.startswith("| step |")]
    kernels = [line for line in text.split("## umt_l16")[0].splitlines() if line.count("|") == 9][2:]
    column = [float(line.split("|")[6] or 0) if line.split("|")[6].strip() else 0.0 for line in kernels]
    assert sum(column[:-1]) == pytest.approx(column[-1], abs=0.2)  # the rows are the step, up to rounding
    assert len(rows) == 2


def measurement(device: str, factor: float) -> dict:
    seconds = factor * step_seconds("umt_b16", 64, FORMS[BEST], GPUS["h200"])
    result = {"model": "umt_b16", "batch": 64, "rung": BEST, "precision": "bf16", "seconds": seconds}
    result |= {"phases": {"teacher": 0.02}, "not_run": None}
    content = {"device": device, "job": "pretrain", "copy_bytes_per_second": GPUS["h200"].copy, "results": [result]}
    return {**content, "gemm_flops_per_second": {"bf16": GPUS["h200"].matmul}}


def test_a_measurement_of_the_gpu_adds_its_time_and_the_error(tmp_path):
    found = measurement("NVIDIA H200", 1.25)
    text = prediction.predict("h200", ["umt_b16"], 64, found)
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {BEST} |") and line.count("|") == 7]
    assert line.endswith("| -20% |")
    assert f"| {BEST} | teacher |" in text
    assert "as measured in the same run" in text
    folder = tmp_path / "h200" / "pretrain"
    folder.mkdir(parents=True)
    (folder / "step_time.json").write_text(json.dumps(found))
    assert prediction.find_measurement("h200", tmp_path) == found
    assert prediction.find_measurement("a100", tmp_path) is None
    (tmp_path / "h100").mkdir()
    (tmp_path / "h100" / "session.json").write_text(json.dumps({"step_time": found}))
    assert prediction.find_measurement("h100", tmp_path) == found


def test_a_measurement_of_another_gpu_corrects_the_prediction():
    text = prediction.predict("a100", ["umt_b16"], 64, measurement("NVIDIA H200", 1.25))
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {BEST} |")]
    plain = 1e3 * step_seconds("umt_b16", 64, FORMS[BEST], A100)
    assert line.endswith(f"| {1.25 * plain:.1f} |")


def test_measurements_that_cannot_be_used_are_refused(capsys):
    with pytest.raises(SystemExit, match="no datasheet of Xeon"):
        prediction.predict("a100", ["umt_b16"], 64, measurement("Xeon", 1.0))
    assert measured_rates({**measurement("NVIDIA H200", 1.0), "copy_bytes_per_second": None}) is None
    with pytest.raises(SystemExit):
        step_time.main(["--predict", "mi300"])
    assert "invalid choice: 'mi300'" in capsys.readouterr().err


def test_forms_differ_by_one_thing():
    assert Form() == FORMS[BEST]
    assert sum(vars(FORMS["baseline"]).values()) == 3
