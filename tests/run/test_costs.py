"""The computed cost of a step against PyTorch's own counters."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.step_time.baselines.pretrain import BaselineStep, build_baseline
from umt_fast import (
    ClassifierConfig,
    ClipTeacher,
    StudentConfig,
    TeacherConfig,
    TextConfig,
    VideoQaModel,
    VideoStudent,
    VideoTextConfig,
    VideoTextModel,
    alignment_step,
    video_text_step,
)
from umt_fast.config import (
    STUDENTS,
    TEACHERS,
    LowPrecisionConfig,
    MaeStConfig,
    MaskConfig,
    OptimConfig,
    PretrainConfig,
    VideoMaeConfig,
    VideoTextObjective,
)
from umt_fast.models.attention import load
from umt_fast.models.classifier import build_classifier
from umt_fast.models.pixels import MaeSt, VideoMae
from umt_fast.objectives.answering import answering_loss
from umt_fast.objectives.pixels import mae_st_step, videomae_step
from umt_fast.recipe import load_recipe
from umt_fast.run import costs
from umt_fast.run.optim import build_optimizer

ROOT = Path(__file__).parents[2]

STUDENT = StudentConfig(64, 16, 1, 3, 32, 3, 2, 0.0, 2, 24)
RESIZED = TeacherConfig(56, 14, 1, 64, 48, 4, 3, 24, 2)
CASES = [
    (STUDENT, RESIZED),
    (replace(STUDENT, frames=4, tubelet_size=2), TeacherConfig(64, 16, 2, None, 48, 3, 3, 24, 2)),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def counted(counter: FlopCounterMode) -> int:
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", ["videomae", "videomaev2", "mae_st"])
def test_flops_of_pixel_reconstruction(kind):
    sizes = (64, 16, 2, 8, 32, 3, 2)
    visible = torch.arange(0, 64, 8).expand(2, -1)
    clip = torch.randint(256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        if kind == "mae_st":
            config = MaeStConfig(
                *sizes, decoder_width=24, decoder_depth=2, decoder_heads=2, target_frames=4, class_token=False
            )
            model = MaeSt(config)
            model.set_attention(load("math"))
            mae_st_step(model, config, clip, visible).loss.backward()
            expected = costs.pixel_flops(config, 2, 8, 64, 56)
        else:
            config = VideoMaeConfig(*sizes, decoder_width=24, decoder_depth=2, decoder_heads=2, mlp_width=96)
            model = VideoMae(config)
            model.set_attention(load("math"))
            decoded = None if kind == "videomae" else torch.arange(0, 64, 2).expand(2, -1)  # 8 of them are visible
            videomae_step(model, config, clip, visible, decoded, 8).loss.backward()
            expected = costs.pixel_flops(config, 2, 8, *((64, 56) if decoded is None else (40, 24)))
    assert counted(counter) == pytest.approx(expected.total, rel=0.002)


@pytest.mark.parametrize("masks_per_clip", [1, 3])
@pytest.mark.parametrize(("student_config", "teacher_config"), CASES)
def test_lean_flops_are_those_that_are_counted(student_config, teacher_config, masks_per_clip):
    student, teacher = VideoStudent(student_config), ClipTeacher(teacher_config)
    student.set_attention(load("math"))  # made of matmuls that the counter knows on every device
    teacher.set_attention(load("math"), load("math"))
    clip = torch.randint(0, 256, (2, student_config.frames, 64, 64, 3), dtype=torch.uint8)
    seen = student_config.tokens // 16 * 4
    expected = costs.lean_flops(student_config, teacher_config, 2, seen, masks_per_clip)
    with FlopCounterMode(display=False) as counter:
        out = alignment_step(student, teacher, clip, 4, masks_per_clip=masks_per_clip)
    assert counted(counter) == expected.teacher + expected.student_forward
    with FlopCounterMode(display=False) as counter:
        out.loss.backward()
    assert counted(counter) == expected.student_backward


@pytest.mark.parametrize(
    "options", [{}, {"mlp_width": 96, "tubelet_size": 2, "frames": 4}, {"architecture": "mae_st", "frames": 2}]
)
def test_a_classifiers_step_costs_what_is_counted(options):
    config = ClassifierConfig(**{"image_size": 64, "frames": 3, "width": 32, "depth": 2, "heads": 2, **options})
    model = build_classifier(config)
    model.set_attention(load("math"))
    clip = torch.randint(0, 256, (2, config.frames, 64, 64, 3), dtype=torch.uint8)
    expected = costs.classifier_flops(config, 2)
    with FlopCounterMode(display=False) as counter:
        loss = model(clip).sum()
    assert counted(counter) == expected.student_forward
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert counted(counter) == expected.student_backward


def count_stage2(model, make_loss) -> int:
    for module in model.modules():
        if isinstance(module, ClipTeacher):
            module.set_attention(load("math"), load("math"))
    model.set_attention(load("math"), load("matmul"))  # the latter has masks too
    with FlopCounterMode(display=False) as counter:
        make_loss().backward()
    return counted(counter)


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("weights", [{}, {"uta": 0.0}, {"mlm": 0.0}, {"vtm": 0.0}, {"vtm": 0.0, "mlm": 0.0}])
def test_a_video_text_step_costs_what_is_counted(weights, frames):
    """Within 1%, because projections and the match head are not counted."""
    text = TextConfig(48, 4, 3, 2, 40, 20, 96, cls_id=2, sep_id=3, mask_id=4)
    model = VideoTextModel(VideoTextConfig(replace(STUDENT, width=48), RESIZED, text, 4))
    clip = torch.randint(0, 256, (3, frames, 64, 64, 3), dtype=torch.uint8)
    mask = (torch.arange(12) < torch.tensor([[9], [4], [7]])).long()
    objective = VideoTextObjective(**weights, mlm_probability=1.0)  # all words are hidden: no chance

    def make_loss() -> Tensor:
        return video_text_step(model, clip, 5 * mask, mask, torch.arange(3), objective=objective).total

    found = costs.video_text_flops(model.config, objective, 3, frames, 9, int(mask.sum()))
    assert found == pytest.approx(count_stage2(model, make_loss), rel=0.01)


def test_answering_costs_what_is_counted():
    text = TextConfig(48, 4, 3, 2, 40, 20, 96, cls_id=2, sep_id=3, mask_id=4)
    model = VideoQaModel(VideoTextConfig(replace(STUDENT, width=48), None, text))
    clip = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    question, answer = torch.ones(2, 8).long(), torch.ones(5, 4).long()

    def make_loss() -> Tensor:
        counts, weights = torch.tensor([2, 3]), torch.ones(5)
        return answering_loss(model, clip, question, question, answer, answer, counts, weights)

    found = costs.answering_flops(model.config, 2, 3, 5, 8, 4)
    assert found == pytest.approx(count_stage2(model, make_loss), rel=0.01)


@pytest.mark.parametrize(("student_config", "teacher_config"), CASES)
def test_published_flops_are_those_of_the_baseline(student_config, teacher_config):
    student, teacher = build_baseline(student_config, teacher_config)
    step = BaselineStep(student, teacher, OptimConfig(), 4, "fp32")
    clip = torch.randn(2, 3, student_config.frames, 64, 64)
    seen = student_config.tokens // 16 * 4
    expected = costs.published_flops(student_config, teacher_config, 2, seen)
    with FlopCounterMode(display=False) as counter:
        step(clip)
    # MultiheadAttention's CPU attention is unknown to the counter where no weights are asked for
    tokens, width = teacher_config.grid**2 + 1, teacher_config.width
    frames = student_config.frames // student_config.tubelet_size
    unknown = 2 * frames * (teacher_config.depth - 1) * 4 * tokens * tokens * width
    assert counted(counter) in (expected.total, expected.total - unknown)


@pytest.mark.parametrize(
    ("size", "teacher", "published", "lean"), [("umt_b16", "clip_b16", 471, 447), ("umt_l16", "clip_l14", 1623, 1580)]
)
def test_the_published_sizes_cost_what_the_design_says(size, teacher, published, lean):
    """GFLOP per clip of DESIGN section 3, whose numbers are rounded sums."""
    student, teacher_config = STUDENTS[size], TEACHERS[teacher]
    assert costs.published_flops(student, teacher_config, 1, 320).total / 1e9 == pytest.approx(published, rel=0.02)
    assert costs.lean_flops(student, teacher_config, 1, 320).total / 1e9 == pytest.approx(lean, rel=0.03)


@pytest.mark.parametrize(("size", "teacher"), [("umt_b16", "clip_b16"), ("umt_l16", "clip_l14")])
def test_parameter_counts(size, teacher):
    with torch.device("meta"):
        student = VideoStudent(STUDENTS[size])
    assert costs.student_parameters(STUDENTS[size]) == sum(p.numel() for p in student.parameters())
    small = replace(TEACHERS[teacher], width=64, heads=2, depth=2, align_layers=1)
    model = ClipTeacher(small)
    assert costs.teacher_parameters(small) == sum(p.numel() for p in (*model.parameters(), model.patch_weight))


def kept_bytes(config: PretrainConfig, clips: int, bf16: bool) -> int:
    """Bytes that the student's forward pass saves for its backward pass, without its own weights."""
    student = VideoStudent(config.student)
    own = {x.untyped_storage().data_ptr() for x in (*student.parameters(), student.position)}
    held: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x  # alive, so that no address is used twice
        return x

    clip = torch.randint(0, 256, (clips, 4, 64, 64, 3), dtype=torch.uint8)
    ids = torch.arange(16).expand(clips, -1)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        student(clip, ids)
    return sum(x.untyped_storage().nbytes() for address, x in held.items() if address not in own)


@pytest.mark.parametrize("bf16", [True, False])
def test_a_clips_memory_is_what_the_student_keeps(bf16):
    student = StudentConfig(64, 16, 1, 4, 128, 12, 2, 0.1, 2, 64)
    config = PretrainConfig(student, TeacherConfig(64, 16, 1, None, 64, 2, 2, 64, 2))
    kept = (kept_bytes(config, 4, bf16) - kept_bytes(config, 2, bf16)) / 2
    assert costs.step_memory(config, bf16).per_clip == pytest.approx(kept, rel=0.2)
    assert costs.step_memory(config, bf16).per_clip > kept


def test_memory_follows_the_settings():
    base = PretrainConfig(STUDENTS["umt_b16"], TEACHERS["clip_b16"])
    plain = costs.step_memory(base, True)
    students, teachers = (
        f(c) for f, c in ((costs.student_parameters, base.student), (costs.teacher_parameters, base.teacher))
    )
    assert plain.states == 18 * students + 2 * teachers
    sizes = {
        recompute: costs.step_memory(replace(base, compute=LowPrecisionConfig(recompute=recompute)), True).per_clip
        for recompute in ("none", "selective", "full")
    }
    assert sizes["none"] > 1.3 * sizes["selective"] > 1.3 * sizes["full"]
    more = costs.step_memory(replace(base, mask=MaskConfig(masks_per_clip=3)), True).per_clip
    assert more == 3 * plain.per_clip
    batch = plain.largest_batch(80 * costs.GIB)
    assert plain.peak(batch) <= 78 * costs.GIB < plain.peak(batch + 1)
    assert plain.largest_batch(costs.GIB) == 0


def test_the_dry_run_prints_the_plan(capsys):
    pytest.importorskip("tyro")  # a machine for the GPU tests may lack it
    from train import pretrain

    pretrain.main(["--recipe", "umt_b16_k710", "--dry-run", "--gpu-memory", "40"])
    text = capsys.readouterr().out
    flops = costs.lean_flops(STUDENTS["umt_b16"], TEACHERS["clip_b16"], 64, 320).total
    assert f"{flops / 1e12:.2f} TFLOP" in text
    batch = costs.step_memory(load_recipe(PretrainConfig, pretrain.RECIPES / "umt_b16_k710.toml"), True).largest_batch(
        40 * costs.GIB
    )
    assert f"a GPU with 40 GiB has room for {batch} clips" in text
    for options in (["--dry-run", "--gpu-memory", "-3"], ["--dry-run", "--gpu-memory", "nan"], ["--gpu-memory", "40"]):
        with pytest.raises(SystemExit, match=f"--gpu-memory {options[-1]}: give GiB above 0, with --dry-run"):
            pretrain.main(["--recipe", "umt_b16_k710", *options])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--dry-run"], 0, "a GPU with 80 GiB has room for"),
        (["--data.train", "x.csv"], 1, "error: video decoding on the CPU needs av, which is missing: pip install av"),
    ],
    ids=["a dry run", "a run"],
)
def test_only_a_run_needs_pyav(arguments, status, said, tmp_path):
    pytest.importorskip("tyro")
    blocked = "import sys; sys.modules['av'] = None; from train import pretrain; pretrain.main(sys.argv[1:])"
    command = [sys.executable, "-c", blocked, "--recipe", "tiny", "--run.dir", str(tmp_path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert said in done.stdout + done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's own count of its memory")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_predicted_peak_is_near_the_measured_one(recompute):
    config = PretrainConfig(STUDENTS["umt_b16"], TEACHERS["clip_b16"], compute=LowPrecisionConfig(recompute=recompute))
    student, teacher = VideoStudent(config.student).cuda(), ClipTeacher(config.teacher).cuda()
    student.set_recompute(recompute)
    teacher.store_matmul_weights(torch.bfloat16)
    optimizer = build_optimizer(student, OptimConfig())
    clip = torch.randint(0, 256, (16, 8, 224, 224, 3), dtype=torch.uint8, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            loss = alignment_step(student, teacher, clip, 40).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated()
    assert costs.step_memory(config, True).peak(16) == pytest.approx(measured, rel=0.2)
