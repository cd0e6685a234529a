"""The int8 teacher on the CPU: near the exact one, and refused when it is not near enough."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from umt_fast import ClipTeacher, TeacherConfig
from umt_fast.acceleration import compile_models
from umt_fast.config import ConfigError, StudentConfig
from umt_fast.low_precision import lower_precision, quantize_teacher
from umt_fast.models.student import VideoStudent

pytest.importorskip("torchao")

CONFIG = TeacherConfig(64, 16, 1, None, 64, 3, 2, 32, 2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """These tensors are small: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def teacher() -> ClipTeacher:
    made = ClipTeacher(CONFIG).eval()
    made.store_matmul_weights(torch.bfloat16)
    return made


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)


def test_int8_stays_near_and_says_how_near(teacher, clip):
    line = lower_precision(teacher, "int8", clip, 0.999)
    assert line.startswith("int8 teacher: cosine of its targets with the exact ones: mean 0.99")
    kinds = {name: type(parameter).__name__ for name, parameter in teacher.named_parameters()}
    for name in ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"):
        assert kinds[f"transformer.resblocks.0.{name}"] == "Int8Tensor"
    assert kinds["transformer.resblocks.2.attn.in_proj_weight"] == "Parameter"  # it makes the scores
    assert kinds["proj"] == "Parameter"


def test_the_measured_cosine_is_that_of_the_targets(teacher, clip):
    visible = torch.arange(16).expand(2, 3, -1)

    def targets():
        with torch.autocast("cpu", torch.bfloat16):
            state = teacher.encode(clip)
            assert state.x.dtype == torch.float32
            assert state.k.dtype == torch.bfloat16
            return teacher.targets(state, visible).float()

    exact = targets()
    line = lower_precision(teacher, "int8", clip, 0.0)
    cosine = torch.nn.functional.cosine_similarity(exact, targets(), dim=-1)
    assert cosine.mean() < 1 - 1e-6
    assert f"mean {cosine.mean():.5f}" in line


def test_too_far_off_is_refused(teacher, clip):
    with pytest.raises(ConfigError, match=r"int8 is refused: .*least_teacher_cosine is 0.9999999"):
        lower_precision(teacher, "int8", clip, 0.9999999)


def test_a_quantised_teacher_compiles_as_one_graph(teacher, clip):
    quantize_teacher(teacher, "int8")
    visible = torch.arange(4).expand(2, 3, -1)

    def targets():
        with torch.autocast("cpu", torch.bfloat16):
            return teacher.targets(teacher.encode(clip), visible)

    eager = targets()
    student = VideoStudent(StudentConfig(64, 16, 1, 3, 32, 1, 2, 0.0, 1, 32))
    compile_models(student, teacher, backend="aot_eager")
    assert (targets() - eager).abs().max() < 1e-2
    torch._dynamo.reset()


def test_what_is_missing_is_named(monkeypatch, teacher):
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        quantize_teacher(teacher, "fp8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        quantize_teacher(teacher, "int8")
