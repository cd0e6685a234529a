"""torch.compile, recomputation, several visible sets per clip, and the captured step do not change the result."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import umt_kernels.backend
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step, masking
from umt_fast.config import ConfigError, LowPrecisionConfig, MaskConfig, OptimConfig, PretrainConfig
from umt_fast.models.attention import load
from umt_fast.run import attention_choice
from umt_fast.run.compute import RECOMPUTES_COMPILED_UNDER_DDP, accelerate, choose_attention, compile_models
from umt_fast.run.cuda_graph import DDP_WARM_UPS, WARM_UPS, CapturedStep, capture_stream
from umt_fast.run.optim import build_optimizer, clip_gradients, set_learning_rate
from umt_fast.run.world import World

CPU = World(0, 1, torch.device("cpu"))
STUDENT = StudentConfig(64, 16, 1, 3, 32, 2, 2, 0.0, 2, 16)
TEACHER = TeacherConfig(56, 14, 1, 64, 32, 2, 2, 16, 2)


pytestmark = pytest.mark.usefixtures("one_thread")


def models(drop_path: float = 0.0) -> tuple[VideoStudent, ClipTeacher]:
    torch.manual_seed(1)
    student = VideoStudent(replace(STUDENT, drop_path=drop_path))
    teacher = ClipTeacher(TEACHER)
    with torch.no_grad():
        for parameter in (*student.parameters(), *teacher.parameters()):
            parameter += 0.1 * torch.randn_like(parameter)
    teacher.load_state_dict(teacher.state_dict())
    return student, teacher


@pytest.fixture
def clip() -> Tensor:
    return torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)


def some_visible(sets: int) -> Tensor:
    return torch.rand(sets, 3, 16).topk(4).indices.sort().values


def gradients(student: VideoStudent, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(student.parameters())))


def assert_same(one: list[Tensor], two: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(one, two, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9


# masks_per_clip


@pytest.mark.parametrize("whole_clip", [False, True])
def test_several_sets_equal_as_many_passes(clip, whole_clip):
    """Three sets at once: targets, predictions, loss and gradient of three passes with one set each."""
    student, teacher = models()
    visible = some_visible(6)
    if whole_clip:
        visible = masking.token_ids(visible, 48)[:, None]
    together = alignment_step(student, teacher, clip, None, visible, masks_per_clip=3)
    assert together.targets.shape == together.predictions.shape == (2, 6, 12, 16)
    alone = [alignment_step(student, teacher, clip, None, visible[i::3]) for i in range(3)]
    for i, out in enumerate(alone):
        assert (together.targets[:, i::3] - out.targets).abs().max() < 1e-5
        assert (together.predictions[:, i::3] - out.predictions).abs().max() < 1e-5
    mean = torch.stack([out.loss for out in alone]).mean()
    assert abs(together.loss - mean) < 1e-6
    assert_same(gradients(student, together.loss), gradients(student, mean), 1e-4)


def test_drawn_sets_of_a_clip_differ_and_follow_its_own_scores(clip):
    student, teacher = models()
    calls = []
    encode = teacher.encode
    teacher.encode = lambda clip: calls.append(len(clip)) or encode(clip)
    out = alignment_step(student, teacher, clip, 4, masks_per_clip=4)
    assert calls == [2]  # one pass of the teacher
    assert out.visible.shape == (8, 3, 4)
    assert out.scores.shape == (2, 3, 16)
    assert len(torch.unique(out.visible.flatten(1), dim=0)) == 8
    given = alignment_step(student, teacher, clip, None, out.visible, masks_per_clip=4)
    assert torch.equal(given.targets, out.targets)
    state = teacher.encode(clip)
    state.scores[:] = 0
    state.scores[0, :, :4] = 1  # clip 0 can only draw its first patches, clip 1 its last
    state.scores[1, :, 12:] = 1
    teacher.encode = lambda _clip: state
    drawn = alignment_step(student, teacher, clip, 4, masks_per_clip=4).visible
    assert (drawn[:4] < 4).all()
    assert (drawn[4:] >= 12).all()


def test_rows_that_are_not_a_multiple_of_the_clips_are_refused(clip):
    student, teacher = models()
    with pytest.raises(ValueError, match="3 rows, which is not a multiple of 2 clips"):
        student(clip, torch.zeros(3, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"give \[4, 3, n\]"):
        alignment_step(student, teacher, clip, None, some_visible(2), masks_per_clip=2)


# torch.compile


@pytest.mark.parametrize(("recompute", "name"), [("none", "sdpa"), ("selective", "math"), ("full", "flash")])
def test_both_models_compile_as_one_graph_each_and_agree(clip, recompute, name):
    visible = some_visible(4)
    student, teacher = models()
    eager = alignment_step(student, teacher, clip, None, visible, masks_per_clip=2)
    expected = gradients(student, eager.loss)
    student.set_recompute(recompute)
    student.set_attention(load(name))
    teacher.set_attention(load(name), load(name))
    compile_models(student, teacher, backend="aot_eager")
    assert list(student.state_dict()) == list(models()[0].state_dict())
    compiled = alignment_step(student, teacher, clip, None, visible, masks_per_clip=2)
    assert abs(compiled.loss - eager.loss) < 1e-6
    assert (compiled.targets - eager.targets).abs().max() < 1e-5
    assert_same(gradients(student, compiled.loss), expected, 1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_compiled_student_under_ddp_has_the_same_gradients(clip, recompute, tmp_path):
    """torch.compile cuts the graph at DDP's buckets: this one has several."""
    if recompute != "none" and TorchVersion(torch.__version__) < RECOMPUTES_COMPILED_UNDER_DDP:
        pytest.skip(f"torch {torch.__version__} cannot cut a graph that recomputes")
    wide, visible = replace(STUDENT, width=128, depth=6), some_visible(2)
    torch.manual_seed(1)
    student, (_, teacher) = VideoStudent(wide), models()
    expected = gradients(student, alignment_step(student, teacher, clip, None, visible).loss)
    student.set_recompute(recompute)
    compile_models(student, teacher, backend="aot_eager")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(student, broadcast_buffers=False, bucket_cap_mb=1)
        for _ in range(2):  # the first step settles the buckets
            student.zero_grad()
            alignment_step(model, teacher, clip, None, visible).loss.backward()
        assert_same([p.grad for p in student.parameters() if p.grad is not None], expected, 1e-4)
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()


# recomputation


def saved_bytes(student: VideoStudent, clip: Tensor) -> int:
    """Bytes that the student's forward pass saves for its backward pass."""
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        student(clip, masking.token_ids(some_visible(2), 48)).hidden.sum()
    return sum(held.values())


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_gives_the_same_gradients_with_stochastic_depth(clip, recompute):
    student, teacher = models(drop_path=0.5)
    visible = some_visible(2)

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        return gradients(student, alignment_step(student, teacher, clip, None, visible).loss)

    expected = run()
    student.set_recompute(recompute)
    assert_same(run(), expected)


def test_recomputation_keeps_less(clip):
    student, _ = models()
    everything = saved_bytes(student, clip)
    student.set_recompute("full")
    assert saved_bytes(student, clip) < 0.7 * everything


class Counter(TorchDispatchMode):
    """Counts the calls of each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def test_selective_recomputation_runs_no_matmul_twice(clip):
    student, _ = models()
    ids = masking.token_ids(some_visible(2), 48)

    def count(recompute: str) -> tuple[int, int]:
        student.set_recompute(recompute)
        with Counter() as counter:
            student(clip, ids).hidden.sum().backward()
        return counter.counts["addmm"], counter.counts["gelu"]

    matmuls, gelus = count("none")
    assert count("selective") == (matmuls, 2 * gelus)
    assert count("full")[0] > matmuls


# accelerate


def config(**changes) -> PretrainConfig:
    return PretrainConfig(student=STUDENT, teacher=TEACHER, **{"optim": OptimConfig(batch_size=2), **changes})


def test_accelerate_says_what_it_did_and_does_it(clip):
    student, teacher = models()
    visible = some_visible(2)
    expected = alignment_step(student, teacher, clip, None, visible).loss
    compute = LowPrecisionConfig(attention="math", recompute="full")
    said = "\n".join(accelerate(config(compute=compute), CPU, student, teacher, False, lambda: clip)[1])
    assert "student math" in said
    assert "recompute: full" in said
    assert {block.attn.backend.name for block in student.encoder.blocks} == {"math"}
    assert abs(alignment_step(student, teacher, clip, None, visible).loss - expected) < 1e-6
    said = "\n".join(accelerate(config(), CPU, student, teacher, True, lambda: clip)[1])
    assert any(f"student {name}" in said for name in ("sdpa", "flash", "math"))
    assert "torch.compile" not in said


@pytest.mark.parametrize(
    ("asked", "stored", "expected"),
    [("auto", "math", "math"), ("auto", "gone", "measured"), ("auto", None, "measured"), ("sdpa", "math", "sdpa")],
)
def test_a_resumed_run_keeps_its_attention(monkeypatch, asked, stored, expected):
    """On another machine, where the measurement could choose another backend with other bits."""
    real = attention_choice.choose

    def choose(wanted, *rest):
        return attention_choice.Choice(load("sdpa"), "measured") if wanted == "auto" else real(wanted, *rest)

    monkeypatch.setattr(attention_choice, "choose", choose)
    use = attention_choice.Use(2, 8, 8, 2, 16, True)
    before = {} if stored is None else {"student": stored}
    compute = LowPrecisionConfig(precision="fp32", attention=asked)
    chosen, lines = choose_attention(compute, {"student": use}, CPU, torch.float32, before)
    assert chosen["student"].name == ("sdpa" if expected == "measured" else expected)
    assert ("measured" in lines[0]) == (expected == "measured")
    assert ("as in the checkpoint" in lines[0]) == (expected == "math")


def test_settings_that_exclude_each_other_are_named():
    with pytest.raises(ConfigError, match=r"optim.accumulate must be 1"):
        config(compute=LowPrecisionConfig(cuda_graph=True), optim=OptimConfig(accumulate=2))
    with pytest.raises(ConfigError, match=r"add --compute.compile"):
        LowPrecisionConfig(cuda_graph=True, recompute="full")
    compiled = LowPrecisionConfig(compile=True, recompute="full", cuda_graph=True)
    config(compute=compiled)
    with pytest.raises(ConfigError, match=r"use --compute.recompute selective"):
        PretrainConfig(replace(STUDENT, drop_path=0.1), TEACHER, compute=compiled)
    with pytest.raises(ConfigError, match="masks_per_clip = 0"):
        config(mask=MaskConfig(masks_per_clip=0))
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        accelerate(config(compute=LowPrecisionConfig(cuda_graph=True)), CPU, *models(), False, lambda: torch.empty(0))


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_an_old_torch_is_refused_before_the_first_step(monkeypatch, recompute):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.8.0+cu128"))
    wanted = config(compute=LowPrecisionConfig(attention="math", compile=True, recompute=recompute))
    ranks = World(0, 2, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=rf"{recompute} with --compute.compile .* needs torch 2.9 or later, this is 2.8"
    ):
        accelerate(wanted, ranks, *models(), False, lambda: torch.empty(0))


@pytest.mark.parametrize(
    ("name", "value", "lacks"),
    [("triton", None, r"triton \(pip install triton\)"), ("REFERENCE_ONLY", True, "UMT_KERNELS_REFERENCE unset")],
)
def test_a_graph_of_plain_pytorch_is_refused(monkeypatch, name, value, lacks):
    monkeypatch.setattr(umt_kernels.backend, "triton", object())
    monkeypatch.setattr(umt_kernels.backend, name, value)
    gpu = World(0, 1, torch.device("cuda"))
    with pytest.raises(
        ConfigError, match=rf"compute\.cuda_graph .* it needs {lacks}; or leave out --compute\.cuda-graph"
    ):
        accelerate(config(compute=LowPrecisionConfig(cuda_graph=True)), gpu, *models(), False, lambda: torch.empty(0))


# on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_with_its_kernels_gives_the_loss_and_gradients_of_the_cpu(clip, compiled):
    student, teacher = models()
    visible = some_visible(2)
    expected = alignment_step(student, teacher, clip, None, visible)
    wanted = gradients(student, expected.loss)
    student, teacher = (model.cuda() for model in models())
    if compiled:
        compile_models(student, teacher)
    out = alignment_step(student, teacher, clip.cuda(), None, visible.cuda())
    assert abs(out.loss.cpu() - expected.loss) < 1e-4
    assert (out.scores.cpu() - expected.scores).abs().max() < 1e-5
    assert_same([gradient.cpu() for gradient in gradients(student, out.loss)], wanted, 1e-3)
    torch._dynamo.reset()


# the captured step


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("way", ["as it is", "compiled", "under DDP"])
def test_a_captured_step_is_the_eager_step_for_twenty_steps(way, tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    if way == "under DDP":
        store = f"file://{tmp_path / 'store'}"
        dist.init_process_group("nccl", init_method=store, rank=0, world_size=1, device_id=device)
    clips = torch.randint(0, 256, (20, 2, 3, 64, 64, 3), dtype=torch.uint8, device=device)
    visible = some_visible(2).to(device)

    def run(capturing: bool) -> tuple[list[float], list[Tensor]]:
        student, teacher = (model.to(device) for model in models())
        optimizer = build_optimizer(student, OptimConfig(), capturable=capturing)
        model: torch.nn.Module = student
        if way == "compiled":
            compile_models(student, teacher)
        if way == "under DDP":
            with capture_stream(capturing):
                model = DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)

        def step(clip: Tensor) -> Tensor:
            loss = alignment_step(model, teacher, clip, None, visible).loss
            loss.backward()
            clip_gradients(student, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        call = CapturedStep(step, DDP_WARM_UPS if way == "under DDP" else WARM_UPS) if capturing else step
        losses = []
        for number, clip in enumerate(clips):
            set_learning_rate(optimizer, 1e-4 * (number + 1))
            losses.append(call(clip).item())
        return losses, list(student.parameters())

    try:
        (eager, expected), (captured, got) = run(False), run(True)
    finally:
        torch._dynamo.reset()
        if dist.is_initialized():
            dist.destroy_process_group()
    assert captured == pytest.approx(eager, rel=1e-4)
    assert_same(got, expected, 1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_captured_step_draws_anew_and_refuses_another_shape():
    device = torch.device("cuda")
    student, teacher = (model.to(device) for model in models())
    step = CapturedStep(lambda clip: alignment_step(student, teacher, clip, 4).visible)
    clip = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8, device=device)
    drawn = [step(clip).clone() for _ in range(8)]
    assert len(torch.unique(torch.stack(drawn), dim=0)) > 6
    with pytest.raises(ValueError, match="recorded with"):
        step(clip[:1])
