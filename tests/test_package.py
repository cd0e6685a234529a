"""First use of the package: import, doctor, the README's example."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step, doctor

ROOT = Path(__file__).parents[1]

TRAIN_EXTRA = ("tyro", "tqdm", "tensorboard", "matplotlib", "filelock", "pebble", "PIL", "tokenizers", "tomli")
OPTIONAL = ("av", "PIL", "tyro", "matplotlib", "tensorboard", "transformers", "huggingface_hub", "nvidia.dali")
OPTIONAL += ("flash_attn", "xformers", "torchao", "jaxtyping", "scipy")


def test_import_brings_nothing_optional_and_not_even_torch():
    """The import is fast because parts are imported at first use."""
    code = f"import umt_fast, sys; print([name for name in {('torch', *OPTIONAL)} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_the_library_needs_nothing_of_the_train_extra():
    """Models, weights, losses, data and evaluation work without the packages of training programs."""
    modules = ("models.vit", "models.clip_vision", "models.heads", "models.classifier", "models.pixels", "masking")
    modules += ("objectives.alignment", "objectives.pixels", "weights", "data", "data.loader", "data.manifest")
    modules += ("data.clips", "evaluation.classification", "config", "files")
    lines = [f"import sys; sys.modules.update(dict.fromkeys({TRAIN_EXTRA}))"]
    lines += [
        "from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent, alignment_step, checkpoint"
    ]
    lines += [f"import umt_fast.{module}" for module in modules]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=ROOT, check=True)


def test_a_program_without_the_train_extra_says_how_to_install_it():
    """Programs import without it, so that the error is one line."""
    code = [f"import sys; sys.modules.update(dict.fromkeys({TRAIN_EXTRA}))"]
    code += ["import train.pretrain, umt_fast.evaluation.features, umt_fast.evaluation.probe"]
    code += ["import train.evaluate; train.evaluate.main([])"]
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == "error: command line needs tyro, which is missing: pip install 'umt-fast[train]'\n"


def test_kernels_package_does_not_import_umt_fast():
    code = "import umt_kernels, sys; assert 'umt_fast' not in sys.modules; assert 'einops' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_doctor_names_what_is_in_use_and_how_to_install_what_is_missing(monkeypatch):
    text = doctor.report()
    for part in ("torch " + torch.__version__, "device", "decoder", "attention", "kernels", "precision"):
        assert part in text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "av" else object())
    assert "MISSING: pip install av" in doctor.report()


@pytest.mark.parametrize("missing", ["einops", "av", "triton", "tyro"])
def test_doctor_works_with_a_part_missing(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; import umt_fast.doctor as d; print(d.report())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    install = "'umt-fast[train]'" if missing == "tyro" else missing
    lack = "not installed" if missing == "triton" else "MISSING"
    assert f"{lack}: pip install {install}" in done.stdout


def test_the_example_in_the_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["out"].visible.shape == (1, 8, 40)
    assert names["out"].scores.shape == (1, 8, 196)
    assert names["out"].predictions.shape == names["out"].targets.shape == (6, 1, 320, 512)


def test_the_step_is_one_graph_of_static_shapes():
    """Full-graph tracing fails if a value is read on the host, which would make it wait for a GPU."""
    student = VideoStudent(StudentConfig(32, 16, 1, 2, 32, 2, 2, 0.1, 2, 16))
    teacher = ClipTeacher(TeacherConfig(32, 16, 1, 32, 32, 2, 2, 16, 2))
    clip = torch.randint(0, 256, (3, 2, 32, 32, 3), dtype=torch.uint8)
    step = torch.compile(
        lambda clip: alignment_step(student, teacher, clip, 2), fullgraph=True, backend="aot_eager", dynamic=False
    )
    out = step(clip)
    out.loss.backward()
    again = alignment_step(student.eval(), teacher, clip, 2, out.visible)
    torch.testing.assert_close(out.raw_targets, again.raw_targets)
    assert all(parameter.grad is not None for parameter in student.parameters())
