"""Predictions: the kernels have the operations of the method, and a measurement adds its columns."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.rates import GPUS, measured_rates
from benchmarks.step_time import __main__ as step_time
from benchmarks.step_time import prediction
from benchmarks.step_time.expected import FORMS, Form, Kernel, expected_kernels
from benchmarks.step_time.jobs import pretrain
from benchmarks.step_time.jobs.pretrain import MODELS
from benchmarks.step_time.ladder import BEST, ladder
from benchmarks.step_time.prediction import NEW_KERNELS, rung_seconds, step_seconds
from umt_fast import StudentConfig, TeacherConfig, VideoStudent
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
    if not form.math_attention:  # fused attention recomputes its forward pass in the backward pass
        expected["backward"] += 2 * 4 * SEEN**2 * student.width * student.depth
    for phase, flops in expected.items():
        assert found[phase] == pytest.approx(flops, rel=2e-5), phase


ROWS, SHOWN = 64 * 8 * 197, 64 * SEEN  # rows of the teacher and of the student, with 64 clips
OWN = "+ own int8 teacher"
# Model, rung, phase and kernel; then calls, bytes and operations of a call, from the shapes.
BY_HAND = {
    "two passes become one": ("umt_b16", BEST, "teacher", "QuickGELU", 11, ROWS * 3072 * 4, 0),
    "a matmul": (
        *("umt_b16", BEST, "teacher", "qkv", 11),
        *(2 * (ROWS * 768 + 768 * 2304 + ROWS * 2304), 2 * ROWS * 768 * 2304),
    ),
    "resize folded into 18 x 18 windows": (
        *("umt_l16", BEST, "teacher", "patch embedding", 1),
        *(2 * (64 * 1568 * 972 + 972 * 1024 + 64 * 1568 * 1024), 2 * 64 * 1568 * 972 * 1024),
    ),
    "keys and values of all rows": (
        *("umt_b16", BEST, "teacher", "last block: keys and values", 1),
        *(2 * (ROWS * 768 + 768 * 1536 + ROWS * 1536), 2 * ROWS * 768 * 1536),
    ),
    "queries of visible rows and class tokens": (
        *("umt_b16", BEST, "teacher", "last block: queries", 1),
        *(2 * (20992 * 768 + 768 * 768 + 20992 * 768), 2 * 20992 * 768 * 768),
    ),
    "the keys once": ("umt_b16", BEST, "teacher", "last block: class scores", 1, ROWS * 768 * 2, 0),
    "11 of 12 blocks, twice each": ("umt_b16", BEST, "teacher", "residual sums and norms", 22, ROWS * 768 * 8, 0),
    "rows of 8 bits": ("umt_b16", OWN, "teacher", "residual sums and norms", 22, ROWS * 768 * 7, 0),
    "8 bits in, 8 bits out": (
        *("umt_b16", OWN, "teacher", "MLP in", 11),
        *(ROWS * 768 + 768 * 3072 + ROWS * 3072, 2 * ROWS * 768 * 3072),
    ),
    "attention's output": ("umt_b16", OWN, "teacher", "quantisation of the inputs", 11, ROWS * 768 * 3, 0),
    "and both norms": ("umt_b16", "+ int8 teacher", "teacher", "quantisation of the inputs", 11, ROWS * 768 * 9, 0),
    "float32 residual, bf16 branch and norm": (
        *("umt_b16", BEST, "student forward", "residual sums and norms", 24, SHOWN * 768 * 12, 0),
    ),
    "5 read and 3 written, 5 products": (
        *("umt_b16", BEST, "backward", "attention", 12, 16 * SHOWN * 768, 10 * 64 * SEEN**2 * 768),
    ),
    "a weight's gradient": (
        *("umt_l16", BEST, "backward", "MLP in, weight", 24),
        *(2 * (SHOWN * 4096 + SHOWN * 1024 + 4096 * 1024), 2 * SHOWN * 4096 * 1024),
    ),
    "predictions, targets, gradient": (
        *("umt_l16", BEST, "loss", "norms, cosine and the gradient", 1, 6 * SHOWN * 768 * 6, 0),
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_kernels_counted_by_hand(name):
    model, rung, phase, kernel, calls, moved, flops = BY_HAND[name]
    (found,) = [k for k in prediction.kernels_of(model, 64, FORMS[rung]) if (k.phase, k.name) == (phase, kernel)]
    assert (found.calls, found.bytes, found.flops) == (calls, moved, flops)


def test_a_kernel_takes_the_longer_of_operations_and_bytes():
    found = {(k.phase, k.name): k for k in prediction.kernels_of("umt_b16", 64, FORMS[BEST])}
    assert found["teacher", "qkv"].bound(A100) == "matmul"
    gelu = found["teacher", "QuickGELU"]
    assert gelu.seconds(A100) == pytest.approx(11 * gelu.bytes / A100.copy)
    assert Kernel("teacher", "x", 3, bytes=A100.copy, flops=2 * A100.matmul).seconds(A100) == pytest.approx(6)


def test_the_optimiser_moves_every_parameter():
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VideoStudent(MODELS["umt_b16"][0]).parameters())
    (adamw,) = [k for k in prediction.kernels_of("umt_b16", 64, FORMS[BEST]) if k.name == "AdamW, fused"]
    assert adamw.bytes == 28 * parameters  # weight, gradient and two moments read, three written


def test_no_pass_over_the_hidden_layer_is_left_to_the_own_8_bit_teacher():
    kernels = prediction.kernels_of("umt_b16", 64, FORMS[OWN])
    assert not [k.name for k in kernels if k.phase == "teacher" and ("GELU" in k.name or "hidden" in k.name)]


class BytesMoved(TorchDispatchMode):
    """Bytes of the inputs and outputs of every call that is not a view, by phase."""

    def __init__(self):
        super().__init__()
        self.by_phase, self.since = Counter(), 0

    def mark(self, phase: str) -> None:
        self.by_phase[phase] += self.since
        self.since = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("aten::")
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not (view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view"))):
            written = sum(self.size(x) for x in tree_leaves(out) if isinstance(x, Tensor))
            chosen = name.startswith(("index.", "gather"))  # rows of the input
            read = [self.size(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.since += 2 * written if chosen else written + sum(read)
        return out

    @staticmethod
    def size(x: Tensor) -> int:
        """An expanded tensor is read once."""
        there = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0]
        return torch.Size(there).numel() * x.element_size()


@pytest.mark.parametrize(
    ("rung", "phases"),
    [
        ("baseline", ("teacher", "student forward", "backward")),
        ("+ lean math, eager", ("teacher", "student forward", "loss", "backward")),
    ],
)
def test_eager_steps_move_the_bytes_that_are_expected(rung, phases, monkeypatch):
    """Within 15%, because a CPU's autocast and attention make other copies than a GPU's."""
    student = StudentConfig(64, 16, 1, 2, 128, 3, 2, 0.0, 2, 64)
    teacher = TeacherConfig(64, 16, 1, 64, 128, 3, 2, 64, 2)
    monkeypatch.setitem(MODELS, "small", (student, teacher))
    work = pretrain.prepare("small", 4, torch.device("cpu"))
    (found,) = [r for r in ladder(torch.device("cpu")) if r.name == rung]
    step, counted = work.build(found), BytesMoved()
    step(True, lambda phase: None)
    with counted:
        step(True, counted.mark)
    expected = Counter()
    for kernel in expected_kernels(student, teacher, 4, work.visible[0].numel(), FORMS[rung]):
        expected[kernel.phase] += kernel.calls * kernel.bytes
    for phase in phases:
        assert counted.by_phase[phase] == pytest.approx(expected[phase], rel=0.15), phase


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("model", ["umt_b16", "umt_l16"])
def test_each_rung_is_expected_to_be_no_slower_and_each_kernel_to_save(model, gpu):
    rates = GPUS[gpu]
    compiled = [name for name, form in FORMS.items() if name != "+ lean math, eager" and not form.eight_bit]
    assert step_seconds(model, 64, FORMS[OWN], rates) < step_seconds(model, 64, FORMS["+ int8 teacher"], rates)
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
    for name in (*NEW_KERNELS, *prediction.KERNELS_BEFORE, *FORMS, "+ fp8 student"):
        assert f"| {name} |" in text
    for source in ("datasheet", "docs/design.md", "arXiv 2307.08691" if gpu == "a100" else "arXiv 2407.08608"):
        assert source in text
    rows = [line for line in text.splitlines() if line.startswith("| step |")]
    assert len(rows) == 2
    table = text.split("### Milliseconds by kernel")[1].split("###")[0].splitlines()
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|"))
    assert header[2:6] == ["calls", "GB", "TFLOP", "bound by"]
    for column in range(6, len(header)):  # the rows are the step, up to rounding
        milliseconds = [float(line[column] or 0) for line in lines]
        assert sum(milliseconds[:-1]) == pytest.approx(milliseconds[-1], abs=0.3), header[column]
    (line,) = [line for line in lines if line[:2] == ["teacher", "QuickGELU"]]
    assert line[2:6] == ["12", f"{(11 * ROWS + SHOWN) * 3072 * 4 / 1e9:.2f}", "", "memory"]
    assert {rung for rung in FORMS if "8" not in rung and rung != "+ fused kernels"} <= {*header}


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
    assert text.count("| measured in the same run |") == 2  # matmul and copy
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


def test_every_rung_has_a_form_or_says_why_not():
    assert {rung.name for rung in ladder(torch.device("cuda"))} - {*FORMS} == {"baseline, float32", "+ fp8 student"}


def test_forms_differ_by_one_thing():
    assert Form() == FORMS[BEST]
    assert sum(vars(FORMS["baseline"]).values()) == 3
