"""The int8 teacher and the float8 student on the CPU: close to the exact ones, and refused if not close enough."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from umt_fast import ClipTeacher, TeacherConfig, alignment_step
from umt_fast.config import ConfigError, LowPrecisionConfig, OptimConfig, PretrainConfig, StudentConfig
from umt_fast.models.heads import VideoStudent
from umt_fast.run import compute as acceleration
from umt_fast.run.compute import accelerate, compile_models
from umt_fast.run.low_precision import (
    FLOAT8_CAPABILITY,
    OWN,
    convert_student,
    lower_precision,
    lower_student_precision,
    quantize_teacher,
)
from umt_fast.run.optim import build_optimizer
from umt_fast.run.world import World

pytest.importorskip("torchao", exc_type=ImportError)  # torchao 0.18 raises it on torch before 2.10

CONFIG = TeacherConfig(64, 16, 1, None, 64, 3, 2, 32, 2)
STUDENT = StudentConfig(64, 16, 1, 4, 64, 3, 2, 0.0, 2, 32)


pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize(("precision", "least"), [("int8-triton", 0.999), ("fp8-triton", 0.998)])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_our_own_8_bit_teacher_stays_near_and_says_how_near(precision, least, activation, clip):
    teacher = ClipTeacher(replace(CONFIG, activation=activation)).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    teacher.store_matmul_weights(torch.bfloat16)
    line = lower_precision(teacher, precision, clip, least)
    print(line)
    assert line.startswith(f"{precision} teacher: cosine of its targets with the exact ones: mean 0.99")
    kept = {name for name, parameter in teacher.named_parameters() if parameter.dim() > 1}
    last = f"transformer.resblocks.{CONFIG.depth - 1}"
    outside = {"conv1.weight", "positional_embedding", "proj"}
    assert kept == {*outside, f"{last}.attn.in_proj_weight"}  # which makes the scores
    dtypes = {name: buffer.dtype for name, buffer in teacher.named_buffers() if name.endswith("values")}
    assert len(dtypes) == 4 * CONFIG.depth - 1
    assert set(dtypes.values()) == {OWN[precision]}
    with pytest.raises(ConfigError, match=rf"{precision} is refused: .*least_teacher_cosine is 0.9999999"):
        lower_precision(ClipTeacher(CONFIG), precision, clip, 0.9999999)


def test_our_own_8_bit_teacher_compiles_as_one_graph(teacher, clip):
    quantize_teacher(teacher, "int8-triton")
    visible = torch.arange(4).expand(2, 3, -1)

    def targets():
        with torch.autocast("cpu", torch.bfloat16):
            return teacher.targets(teacher.encode(clip), visible)

    eager = targets()
    compile_models(VideoStudent(StudentConfig(64, 16, 1, 3, 32, 1, 2, 0.0, 1, 32)), teacher, backend="aot_eager")
    assert (targets() - eager).norm() < 1e-2 * eager.norm()
    torch._dynamo.reset()


def test_the_measured_cosine_is_that_of_the_targets(teacher, clip):
    visible = torch.arange(16).expand(2, 3, -1)

    def targets():
        with torch.autocast("cpu", torch.bfloat16):
            state = teacher.encode(clip)
            assert state.x.dtype == torch.bfloat16
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
    # torch 2.13 gives the very same; 2.11 rounds to bf16 in other places, and is off by 0.6% of the norm.
    assert (targets() - eager).norm() < 1e-2 * eager.norm()
    torch._dynamo.reset()


def test_errors_name_the_missing_gpu_or_package(monkeypatch, teacher):
    with pytest.raises(ConfigError, match="fp8 needs a GPU"):
        quantize_teacher(teacher, "fp8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ConfigError, match="pip install torchao"):
        quantize_teacher(teacher, "int8")


# the float8 student, with its multiplications emulated


def loss_and_gradients(student: VideoStudent, teacher: ClipTeacher) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    clip = torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8)
    visible = torch.rand(2, 4, 16).topk(4).indices.sort().values
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_step(student, teacher, clip, None, visible).loss
    student.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in student.named_parameters()}


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_float8_student_keeps_its_keys_and_is_near_in_loss_and_gradients(teacher, recompute):
    student = VideoStudent(STUDENT)
    with torch.no_grad():
        for block in student.encoder.blocks:
            block.attn.q_bias.normal_()
            block.attn.v_bias.normal_()
    keys, parameters = list(student.state_dict()), list(student.parameters())
    loss, exact = loss_and_gradients(student, teacher)
    convert_student(student, 2, 16, emulate=True)
    student.set_recompute(recompute)
    kinds = {
        name: type(module).__name__ for name, module in student.named_modules() if "Linear" in type(module).__name__
    }
    assert sum(kind == "Float8Linear" for kind in kinds.values()) == 4 * STUDENT.depth
    assert {name for name, kind in kinds.items() if kind == "Linear"} == {"clip_decoder.0.head", "clip_decoder.1.head"}
    assert list(student.state_dict()) == keys
    assert all(a is b for a, b in zip(student.parameters(), parameters, strict=True))
    rounded_loss, rounded = loss_and_gradients(student, teacher)
    assert 0 < abs(rounded_loss - loss) < 0.01
    for name, gradient in exact.items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), rounded[name].flatten(), dim=0)
        assert cosine > 0.97, name
    optimizer = build_optimizer(student, OptimConfig(lr=1e-3))
    optimizer.step()
    assert loss_and_gradients(student, teacher)[0] < rounded_loss


def test_a_float8_student_compiles_as_one_graph(teacher):
    student = VideoStudent(STUDENT)
    convert_student(student, 2, 16, emulate=True)
    loss, eager = loss_and_gradients(student, teacher)
    compile_models(student, teacher, backend="aot_eager")
    compiled_loss, compiled = loss_and_gradients(student, teacher)
    assert abs(compiled_loss - loss) < 1e-2
    for name, gradient in eager.items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), compiled[name].flatten(), dim=0) > 0.97, name
    torch._dynamo.reset()


def test_the_error_of_a_float8_student_is_measured_without_dropped_paths(clip):
    student = VideoStudent(replace(STUDENT, frames=3, drop_path=0.9)).train()
    line = lower_student_precision(student, clip, 4, 12, 0.99, emulate=True)
    assert line.startswith("fp8 student: cosine of its predictions with the exact ones: mean 0.99")
    assert student.training
    with pytest.raises(ConfigError, match=r"fp8 is refused: .*least_student_cosine is 1\.1"):
        lower_student_precision(VideoStudent(replace(STUDENT, frames=3)), clip, 4, 12, 1.1, emulate=True)


def test_an_impossible_float8_student_is_named():
    with pytest.raises(ConfigError, match="student_precision = fp8 needs a GPU"):
        convert_student(VideoStudent(STUDENT), 2, 16)
    with pytest.raises(ConfigError, match=r"visible tokens of a batch = 12 is not a multiple of 16"):
        convert_student(VideoStudent(STUDENT), 1, 12, emulate=True)
    with pytest.raises(ConfigError, match=r"compute.student_precision is for runs in bf16; remove"):
        LowPrecisionConfig(student_precision="fp8", precision="fp32")


def test_accelerate_hands_the_student_over(monkeypatch, teacher, clip):
    config = PretrainConfig(
        STUDENT,
        CONFIG,
        compute=LowPrecisionConfig(attention="sdpa", student_precision="fp8"),
        optim=OptimConfig(batch_size=2),
    )
    cpu, student, given = World(0, 1, torch.device("cpu")), VideoStudent(STUDENT), []
    monkeypatch.setattr(
        acceleration, "lower_student_precision", lambda *args: given.append(args) or "fp8 student: near"
    )
    assert "fp8 student: near" in accelerate(config, cpu, student, teacher, True, lambda: clip)[1]
    assert given[0][0] is student
    assert given[0][2:] == (2, 4 * 4, 0.99)
    with pytest.raises(ConfigError, match=r"student_precision is for runs in bf16; add"):
        accelerate(config, cpu, student, teacher, False, lambda: clip)


# on a GPU


HAS_FLOAT8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= FLOAT8_CAPABILITY


@pytest.mark.skipif(not HAS_FLOAT8, reason="needs a GPU with float8 matmuls")
@pytest.mark.parametrize("compiled", [False, True])
def test_float8_on_a_gpu_stays_near_and_trains(clip, compiled):
    teacher, student = ClipTeacher(CONFIG).cuda().eval(), VideoStudent(replace(STUDENT, frames=3)).cuda()
    teacher.store_matmul_weights(torch.bfloat16)
    clip = clip.repeat(4, 1, 1, 1, 1).cuda()
    assert "fp8 teacher: " in lower_precision(teacher, "fp8", clip, 0.99)
    assert "fp8 student: " in lower_student_precision(student, clip, 8, 12, 0.99)
    if compiled:
        compile_models(student, teacher)
    optimizer, losses = build_optimizer(student, OptimConfig(lr=1e-3)), []
    visible = torch.rand(8, 3, 16, device="cuda").topk(4).indices.sort().values
    for _ in range(5):
        with torch.autocast("cuda", torch.bfloat16):
            loss = alignment_step(student, teacher, clip, None, visible).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch._dynamo.reset()
