"""The plain step of stage 2, the base of its speed-ups, and all rungs compute the published step."""

from __future__ import annotations

import pytest
import stage2_cases as stage2
import torch

from benchmarks.step_time.baselines.stage2 import BaselineStage2Step, BaselineVideoText, StepInputs
from benchmarks.step_time.jobs import JOBS
from benchmarks.step_time.jobs.stage2 import OPTIM, published_text_flops
from benchmarks.step_time.phases import PHASES, no_mark
from umt_fast.objectives.video_text import apply_words
from umt_fast.run import costs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("sdpa", [False, True])
def test_the_baseline_has_the_recorded_loss(sdpa):
    case = stage2.read("c_trajectory")
    config = stage2.video_text_config(case.config)
    model = BaselineVideoText(config, sdpa)
    copies = ("position_ids", "predictions.decoder.weight", "predictions.decoder.bias")
    state = {key: value for key, value in case.part("model.").items() if not key.endswith(copies)}
    model.load_state_dict(state)
    drawn, inputs = case.part("step0.draw."), case.part("step0.in.")
    chosen = [drawn[f"mlm_{name}"].bool() for name in ("select", "replace", "random")]
    words = apply_words(inputs["input_ids"], *chosen, drawn["mlm_words"], config.text)
    batch = StepInputs(
        inputs["video"].transpose(1, 2),
        inputs["input_ids"],
        inputs["attention_mask"],
        inputs["idx"],
        drawn["visual_mask"].bool(),
        drawn["vision_neg"],
        drawn["text_neg"],
        *words,
    )
    loss = BaselineStage2Step(model, OPTIM, 4, "fp32")(batch, no_mark)
    expected = sum(float(case[f"step0.loss.{name}"]) for name in ("uta", "vtc", "vtm", "mlm"))
    assert loss == pytest.approx(expected, abs=3e-5)


def test_rungs_give_the_reference_losses_step_by_step():
    job, device = JOBS["stage2"], torch.device("cpu")
    work = job.prepare("tiny", 4, device)
    rungs = {rung.name: rung for rung in job.ladder(device)}
    assert not any(rung.captured for rung in rungs.values())
    reference, *others = (
        work.build(rungs[n]) for n in ("baseline, float32", "baseline", "+ SDPA", "+ lean math, eager")
    )
    expected = [float(reference(True, no_mark)) for _ in range(4)]
    assert expected[-1] < expected[0]
    for step in others:
        losses = [float(step(True, no_mark)) for _ in range(4)]
        assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 0.05
        assert float(step(False, no_mark)) > 0  # with its own draws


def test_lean_flops_are_fewer():
    work = JOBS["stage2"].prepare("tiny", 4, torch.device("cpu"))
    lean, published = work.flops(lean=True), work.flops(lean=False)
    assert set(lean) <= set(PHASES)
    assert 0 < sum(lean.values()) < sum(published.values())
    assert costs.text_flops(work.config, 4, 20, 8, 9) < published_text_flops(work.config, 4, 8)
    with pytest.raises(ValueError, match="batch = 1: matching needs negatives"):
        JOBS["stage2"].prepare("tiny", 1, torch.device("cpu"))
