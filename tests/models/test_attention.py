"""Every attention backend against float64, and the choice of a backend."""

from __future__ import annotations

import itertools
import json
import sys
import types

import pytest
import torch
from torch import Tensor

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step, doctor, masking
from umt_fast.config import ConfigError, MaskConfig, OptimConfig, PretrainConfig
from umt_fast.models.attention import LIBRARIES, NAMES, SDPA, Backend, attention, fault, load, self_attention
from umt_fast.run import attention_choice
from umt_fast.run.attention_choice import Use, choose
from umt_fast.run.compute import accelerate
from umt_fast.run.world import World

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
USE = Use(2, 9, 9, 2, 16, True)


pytestmark = pytest.mark.usefixtures("one_thread")


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)


def usable(name: str, dtype: torch.dtype, head_dim: int = 64) -> bool:
    try:
        return fault(load(name), DEVICE, dtype, head_dim, gradients=True) is None
    except ImportError:
        return False


@pytest.mark.parametrize("cached", [1, 4 * 2 * 30 * 20])
def test_groups_of_heads_are_attention(monkeypatch, cached):
    """One head at a time, and two, where the last group has one head."""
    monkeypatch.setattr("umt_fast.models.attention._CACHED_BYTES", cached)
    q, k, v = (torch.randn(1, length, 3, 16, requires_grad=True) for length in (20, 30, 30))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, expected = attention(q, k, v, load("heads")), reference(*exact)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad.double())
    assert torch.allclose(out.double(), expected, atol=1e-6)
    for got, wanted in zip((q, k, v), exact, strict=True):
        assert torch.allclose(got.grad.double(), wanted.grad, atol=1e-5)
    qkv = torch.randn(2, 9, 3, 3, 16)
    with torch.no_grad():
        assert torch.allclose(self_attention(qkv, load("heads")), reference(*qkv.unbind(2)).float(), atol=1e-6)


def test_the_cpu_has_at_least_these():
    cpu = torch.device("cpu")
    for name in ("sdpa", "flash", "math"):
        for dtype in (torch.float32, torch.bfloat16):
            assert fault(load(name), cpu, dtype, 64, gradients=True) is None


@pytest.mark.parametrize(("queries", "keys"), [(197, 197), (320, 320), (40, 197)])
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("name", NAMES)
def test_every_backend_is_attention(name, head_dim, queries, keys):
    checked = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        if not usable(name, dtype, head_dim):
            continue
        checked += 1
        q = torch.randn(2, queries, 3, head_dim, device=DEVICE, dtype=dtype)
        k, v = torch.randn(2, 2, keys, 3, head_dim, device=DEVICE, dtype=dtype).unbind()
        inputs = [x.requires_grad_() for x in (q, k, v)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out, expected = attention(*inputs, load(name)), reference(*exact)
        grad = torch.randn_like(out)
        got = torch.autograd.grad(out, inputs, grad)
        wanted = torch.autograd.grad(expected, exact, grad.double())
        assert out.shape == q.shape
        for one, two in zip((out, *got), (expected, *wanted), strict=True):
            assert (one - two).norm() < tolerance * two.norm()
    if not checked:
        pytest.skip(f"{name} does not run on this {DEVICE.type}")


@pytest.mark.parametrize("name", NAMES)
def test_packed_is_the_same(name):
    if not usable(name, torch.bfloat16):
        pytest.skip(f"{name} does not run on this {DEVICE.type}")
    qkv = torch.randn(2, 33, 3, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 33, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    packed, apart = self_attention(qkv, load(name)), attention(*qkv.unbind(2), load(name))
    one, two = (torch.autograd.grad(out, qkv, grad)[0] for out in (packed, apart))
    assert (packed - apart).abs().max() < 1e-2
    assert (one - two).norm() < 1e-2 * two.norm()


@pytest.mark.parametrize("name", ["sdpa", "flash", "math"])
def test_a_backend_is_one_graph(name):
    assert fault(load(name), torch.device("cpu"), torch.float32, 64, gradients=True, compiled=True) is None


def test_no_number_of_trials_makes_a_backend_break_the_graph():
    torch._dynamo.reset()
    trials = list(
        itertools.product(("sdpa", "flash", "math", "matmul"), (torch.float32, torch.bfloat16), (False, True))
    )
    assert len(trials) > torch._dynamo.config.recompile_limit
    for name, dtype, with_gradients in trials:
        assert fault(load(name), torch.device("cpu"), dtype, 64, with_gradients, compiled=True) is None, name
    torch._dynamo.reset()


@pytest.mark.parametrize(("queries", "called"), [(9, "packed"), (4, "apart")])
def test_measures_the_call_that_the_models_make(monkeypatch, queries, called):
    calls = []

    def apart(q, k, v):
        calls.append("apart")
        return SDPA.attend(q, k, v)

    def packed(qkv):
        calls.append("packed")
        return SDPA.attend_packed(qkv)

    def broken(*_inputs):
        raise AssertionError("not at this size")

    backends = {"sdpa": Backend("sdpa", apart, packed), "math": Backend("math", broken, broken)}
    monkeypatch.setattr(attention_choice, "load", backends.__getitem__)
    monkeypatch.setattr(attention_choice, "NAMES", tuple(backends))
    monkeypatch.setattr(attention_choice, "fault", lambda *_args: None)
    use = Use(2, queries, 9, 2, 16, True)
    assert list(attention_choice.measure(use, torch.device("cpu"), torch.float32)) == ["sdpa"]
    assert set(calls) == {called}


def test_fault_finds_backends_that_break_a_graph_or_do_not_run():
    def breaks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return SDPA.attend(q, k, v)

    broken = Backend("broken", breaks, lambda qkv: qkv)
    cpu = torch.device("cpu")
    assert fault(broken, cpu, torch.float32, 8, gradients=False) is None
    assert fault(broken, cpu, torch.float32, 8, gradients=False, compiled=True) is not None
    assert fault(load("cudnn"), cpu, torch.float32, 8, gradients=False) is not None


def fake_library(monkeypatch, name: str, with_statistics: bool) -> list[str]:
    """A fake library with the real names and layout, which records its calls."""
    calls: list[str] = []

    def attend(q, k, v):
        calls.append("attend")
        out = SDPA.attend(q, k, v)
        return (out, out.sum(-1)) if with_statistics else out

    def packed(qkv):
        calls.append("packed")
        out = SDPA.attend_packed(qkv)
        return (out, out.sum(-1)) if with_statistics else out

    library = LIBRARIES[name]
    module = types.ModuleType(library.module)
    setattr(module, library.function, attend)
    if library.packed_function:
        setattr(module, library.packed_function, packed)
    if "." in library.module:
        monkeypatch.setitem(sys.modules, library.module.split(".")[0], types.ModuleType(library.module.split(".")[0]))
    monkeypatch.setitem(sys.modules, library.module, module)
    return calls


@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_are_called_with_their_names_and_layout(monkeypatch, name, with_statistics):
    calls = fake_library(monkeypatch, name, with_statistics)
    backend = load(name)
    q, k, v = torch.randn(3, 2, 7, 2, 8).unbind()
    torch.testing.assert_close(attention(q, k, v, backend), reference(q, k, v).float())
    qkv = torch.stack((q, k, v), dim=2)
    torch.testing.assert_close(self_attention(qkv, backend), reference(q, k, v).float())
    assert calls == ["attend", "packed" if LIBRARIES[name].packed_function else "attend"]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_says_how_to_install_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, LIBRARIES[name].module, None)
    with pytest.raises(ConfigError) as caught:
        choose(name, USE, DEVICE, torch.float32, compiled=False)
    assert LIBRARIES[name].install in str(caught.value)
    assert f"not installed: {LIBRARIES[name].install}" in doctor.report()


def test_a_backend_that_does_not_run_here_says_why():
    with pytest.raises(ConfigError, match=r"compute.attention = cudnn does not run on this cpu"):
        choose("cudnn", USE, torch.device("cpu"), torch.float32, compiled=False)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("UMT_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attention.json"


def test_auto_measures_once_and_takes_the_fastest(monkeypatch, cache):
    measured = []

    def measure(use, *_rest):
        measured.append(use)
        return {"sdpa": 3.0, "math": 1.0, "flash": 2.0}

    monkeypatch.setattr(attention_choice, "measure", measure)
    cpu = torch.device("cpu")
    first = choose("auto", USE, cpu, torch.float32, compiled=False)
    assert first.backend.name == "math"
    assert choose("auto", USE, cpu, torch.float32, compiled=False).backend.name == "math"
    assert measured == [USE]
    for other in (  # another shape, dtype or way to run is another choice
        (Use(4, 9, 9, 2, 16, True), torch.float32, False),
        (USE, torch.bfloat16, False),
        (USE, torch.float32, True),
    ):
        choose("auto", other[0], cpu, other[1], compiled=other[2])
    assert len(measured) == 4
    assert len(json.loads(cache.read_text())) == 4
    assert [path.name for path in cache.parent.iterdir()] == ["attention.json"]


@pytest.mark.parametrize("content", ["", "{", "[1]", '"x"', "\x00\x01"])
def test_a_broken_cache_is_measured_again_and_rewritten(cache, content):
    cache.parent.mkdir()
    cache.write_text(content)
    choice = choose("auto", USE, torch.device("cpu"), torch.float32, compiled=False)
    assert "ms measured: " in choice.reason
    (times,) = json.loads(cache.read_text()).values()
    assert min(times, key=times.get) == choice.backend.name


def test_a_remembered_backend_that_is_gone_is_measured_anew(cache):
    cpu = torch.device("cpu")
    choose("auto", USE, cpu, torch.float32, compiled=False)
    key = next(iter(json.loads(cache.read_text())))
    for gone in ("sdpa", {"flash_attn_3": 0.1}, {"no such thing": 0.1}, {"sdpa": "fast"}, 7):
        cache.write_text(json.dumps({key: gone}))
        assert choose("auto", USE, cpu, torch.float32, compiled=False).backend.name in ("sdpa", "flash", "math")


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("UMT_FAST_CACHE", str(tmp_path / "file" / "folder"))
    assert choose("auto", USE, torch.device("cpu"), torch.float32, compiled=False).backend.name in NAMES


@pytest.mark.parametrize(("rule", "masks"), [("attention", 1), ("tube", 2), ("random", 1), ("random", 2)])
def test_measures_the_shapes_that_a_run_uses(monkeypatch, rule, masks):
    """`accelerate` chooses the backend for the shapes that attention gets later."""
    config = PretrainConfig(
        student=StudentConfig(64, 16, 1, 3, 32, 2, 2, 0.0, 1, 16),
        teacher=TeacherConfig(64, 16, 1, None, 48, 2, 3, 16, 1),
        mask=MaskConfig(rule, 0.75, masks),
        optim=OptimConfig(batch_size=2),
    )
    student, teacher = VideoStudent(config.student), ClipTeacher(config.teacher)
    asked, seen = set(), set()

    def choose(_wanted, use, *_rest):
        asked.add(use)
        return attention_choice.Choice(SDPA, "")

    def spy(q, k, v):
        seen.add(Use(q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], q.requires_grad))
        return SDPA.attend(q, k, v)

    monkeypatch.setattr(attention_choice, "choose", choose)
    accelerate(config, World(0, 1, torch.device("cpu")), student, teacher, False, lambda: torch.empty(0))
    backend = Backend("spy", spy, lambda qkv: spy(*qkv.unbind(2)))
    student.set_attention(backend)
    teacher.set_attention(backend, backend)
    clip = torch.randint(0, 256, (2, 3, 64, 64, 3), dtype=torch.uint8)
    visible = masking.draw_blind(rule, 2 * masks, 3, 16, 0.75, clip.device)
    alignment_step(student, teacher, clip, 4, visible, masks_per_clip=masks)
    assert seen == asked


def test_each_model_takes_the_backend_it_is_given():
    teacher = ClipTeacher(TeacherConfig(32, 16, 1, None, 32, 3, 2, 16, 1))
    teacher.set_attention(load("math"), load("flash"))
    assert [block.attn.backend.name for block in teacher.transformer.resblocks] == ["math", "math", "flash"]
    student = VideoStudent(StudentConfig(32, 16, 1, 2, 32, 2, 2, 0.0, 1, 16))
    assert {block.attn.backend.name for block in student.encoder.blocks} == {"sdpa"}
    student.set_attention(load("math"))
    assert {block.attn.backend.name for block in student.encoder.blocks} == {"math"}
