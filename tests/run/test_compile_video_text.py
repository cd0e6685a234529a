"""Stage 2 through torch.compile: the same losses and gradients, for texts of any length. Backends that compile nothing
with C++ stand for inductor."""

from __future__ import annotations

from dataclasses import replace

import pytest
import stage2_cases as stage2
import torch

from umt_fast import VideoQaModel, VideoTextModel, video_text_step
from umt_fast.objectives.answering import answering_loss
from umt_fast.run.compute import compile_video_text

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, plain, make_loss) -> None:
    """The losses and gradients of both models, from the same random state."""
    torch.manual_seed(3)
    loss = make_loss(model)
    torch.manual_seed(3)
    expected = make_loss(plain)
    assert torch.allclose(loss, expected, rtol=1e-6)
    found, wanted = gradients(model, loss), gradients(plain, expected)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert torch.allclose(found[name], grad, rtol=1e-4, atol=1e-6), name


@pytest.fixture
def pair():
    """Makes a compiled model and a plain one with its weights."""
    torch._dynamo.reset()

    def make(config, backend, kind=VideoTextModel, recompute="none", vision=True):
        model, plain = kind(config), kind(config)
        plain.load_state_dict(model.state_dict())
        model.set_recompute(recompute, recompute)
        if vision:
            compile_video_text(model, backend=backend)
        else:
            model.compile_text(backend=backend)
        return model, plain

    yield make
    torch._dynamo.reset()


SMALLER = replace(
    stage2.SMALL,
    vision=replace(stage2.SMALL.vision, depth=2),
    text=replace(stage2.SMALL.text, depth=2),
)


def test_compiled_text_layers_are_for_texts_of_any_length(pair):
    """With and without a padding mask; the third length makes no new graph."""
    model, plain = pair(SMALLER, "eager", vision=False)
    counter = torch._dynamo.utils.counters
    graphs = 0
    for rows, frames, length, padded in ((4, 2, 5, True), (4, 1, 7, True), (3, 2, 8, False), (5, 2, 6, True)):
        clip = torch.randint(0, 256, (rows, frames, 32, 32, 3), dtype=torch.uint8)
        ids, mask = stage2.some_texts(rows, length)
        if not padded:
            ids, mask = ids.clamp(min=5), torch.ones_like(mask)
        assert_same(model, plain, lambda one: video_text_step(one, clip, ids, mask, torch.arange(rows)).total)  # noqa: B023
        before, graphs = graphs, counter["stats"]["unique_graphs"]
    assert graphs == before


def test_a_whole_compiled_step_equals_the_plain_one(pair):
    model, plain = pair(SMALLER, "eager", recompute="full")
    assert model.state_dict().keys() == plain.state_dict().keys()
    clip = torch.randint(0, 256, (4, 2, 32, 32, 3), dtype=torch.uint8)
    ids, mask = stage2.some_texts(4, 6)
    assert_same(model, plain, lambda one: video_text_step(one, clip, ids, mask, torch.arange(4)).total)


def test_a_compiled_answering_step_equals_the_plain_one(pair):
    text = replace(SMALLER.text, width=16)
    model, plain = pair(replace(SMALLER, teacher=None, text=text), "eager", VideoQaModel)
    clip = torch.randint(0, 256, (2, 2, 32, 32, 3), dtype=torch.uint8)
    ids, mask = stage2.some_texts(2, 5)
    answers, answer_mask = stage2.some_texts(3, 4)
    counts, shares = torch.tensor([2, 1]), torch.tensor([0.7, 0.3, 1.0])
    assert_same(model, plain, lambda one: answering_loss(one, clip, ids, mask, answers, answer_mask, counts, shares))
