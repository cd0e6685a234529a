"""The contrastive loss over all ranks against recorded numbers and the plain loss, and in chunks."""

from __future__ import annotations

import ctypes
import resource

import pytest
import stage2_cases as stage2
import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked import run_ranks
from torch.nn.parallel import DistributedDataParallel

from umt_fast import VideoTextModel, video_text_step
from umt_fast.evaluation import retrieval
from umt_fast.objectives import contrast
from umt_fast.objectives.contrast import contrastive_loss, unit_mean
from umt_fast.run import world as processes


def recorded_gradients(rank: int | None, gradient: str = "published") -> dict[str, torch.Tensor]:
    """Gradients of the recorded case for one rank, or for one process with both batches."""
    case = stage2.read("h_vtc_two_ranks")
    inputs = [case[f"in.{name}"] for name in ("vision", "text", "idx")]
    vision, text, idx = [x.flatten(0, 1) for x in inputs] if rank is None else [x[rank] for x in inputs]
    weights = {name: case[f"in.{name}"].requires_grad_() for name in ("vision_weight", "text_weight", "temp")}
    projected = {
        "vision_proj": vision @ weights["vision_weight"].T,
        "text_proj": text @ weights["text_weight"].T,
    }
    for tensor in projected.values():
        tensor.retain_grad()
    video, words = unit_mean(projected["vision_proj"]), unit_mean(projected["text_proj"][:, None])
    loss = contrastive_loss(video, words, weights["temp"], idx, gradient)
    loss.backward()
    return {"loss": loss.detach()} | {f"grad_{name}": x.grad for name, x in (weights | projected).items()}


def spread_model() -> VideoTextModel:
    torch.manual_seed(1)
    model = VideoTextModel(stage2.SMALL)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def spread_inputs():
    """Four samples, the draws of each, and captions of five videos for retrieval."""
    torch.manual_seed(2)
    clip = torch.randint(0, 256, (5, 2, 32, 32, 3), dtype=torch.uint8)
    return clip, *stage2.some_texts(6), torch.tensor([0, 1, 0, 3])


def worker(path: str) -> None:
    """One of two processes: the recorded case with both gradients, a step under DDP, and retrieval of its videos."""
    world = processes.start("cpu")
    found = {
        f"{way}.{key}": x for way in ("published", "true") for key, x in recorded_gradients(world.rank, way).items()
    }
    model = spread_model()
    clip, ids, mask, idx = spread_inputs()
    own = slice(2 * world.rank, 2 * world.rank + 2)
    wrapped = DistributedDataParallel(model)
    out = video_text_step(wrapped, clip[own], ids[own], mask[own], idx[own])
    out.total.backward()
    found["vtc"] = out.vtc.detach()
    found["grad"] = model.vision_proj.weight.grad
    part = clip[:3] if world.main else clip[3:]
    result = retrieval.evaluate(model, part, ids, mask, TEXTS_OF_VIDEOS, k=2)
    found |= {"v2t": result.rerank_v2t, "t2v": result.rerank_t2v}
    torch.save(found, f"{path}.{world.rank}")
    dist.barrier()
    world.close()


TEXTS_OF_VIDEOS = [[0], [1], [2], [3], [4, 5]]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("ranks") / "found"
    run_ranks(worker, [str(path)])
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in (0, 1)]


def test_one_process_has_the_recorded_gradients():
    case = stage2.read("h_vtc_two_ranks")
    found = recorded_gradients(None)
    for key, expected in case.part("one_process.").items():
        assert (found[key] - expected).abs().max() < 1e-6 * max(1, expected.abs().max()), key


def test_two_processes_have_the_recorded_gradients_each_and_on_average(two_processes):
    case = stage2.read("h_vtc_two_ranks")
    for rank, found in enumerate(two_processes):
        for key, expected in case.part(f"rank{rank}.").items():
            assert (found[f"published.{key}"] - expected).abs().max() < 1e-6 * max(1, expected.abs().max()), key
    for key, expected in case.part("ddp_mean.").items():
        mean = sum(found[f"published.{key}"] for found in two_processes) / 2
        assert (mean - expected).abs().max() < 1e-6 * max(1, expected.abs().max()), key
    for key, expected in case.part("one_process.grad_").items():
        mean = sum(found[f"true.grad_{key}"] for found in two_processes) / 2
        assert (mean - expected).abs().max() < 1e-6 * max(1, expected.abs().max()), key


def test_a_step_under_ddp_contrasts_the_batches_of_both_ranks(two_processes):
    assert torch.equal(two_processes[0]["vtc"], two_processes[1]["vtc"])
    assert torch.equal(two_processes[0]["grad"], two_processes[1]["grad"])
    model, (clip, ids, mask, idx) = spread_model(), spread_inputs()
    with torch.no_grad():
        alone = video_text_step(model, clip[:2], ids[:2], mask[:2], idx[:2])
    assert abs(alone.vtc - two_processes[0]["vtc"]) > 0.1  # 4 samples are harder to distinguish than 2


def test_two_processes_retrieve_as_one(two_processes):
    model, (clip, ids, mask, _) = spread_model(), spread_inputs()
    with torch.no_grad():
        model.temp.clamp_(0.001, 0.5)
    alone = retrieval.evaluate(model, clip, ids, mask, TEXTS_OF_VIDEOS, k=2)
    for found in two_processes:
        assert (found["v2t"] - alone.rerank_v2t).abs().max() < 1e-6
        assert (found["t2v"] - alone.rerank_t2v).abs().max() < 1e-6


def written_out(video, text, temperature, idx):
    """The loss as the published code computes it, whole."""
    similarity = video @ text.T / temperature
    targets = (idx[:, None] == idx).to(similarity.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    rows = -(similarity.log_softmax(1) * targets).sum(1).mean()
    columns = -(similarity.T.log_softmax(1) * targets).sum(1).mean()
    return (rows + columns) / 2


@pytest.mark.parametrize("most", [1, 40, 1 << 24])
def test_in_chunks_of_any_size_it_is_the_loss_written_out(monkeypatch, most):
    monkeypatch.setattr(contrast, "MOST_SIMILARITIES", most)
    idx = torch.tensor([0, 1, 2, 0, 4, 4, 6, 7, 0, 9, 10])
    video, text = (torch.randn(11, 5, dtype=torch.float64).requires_grad_() for _ in range(2))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(
        written_out(video / 3, F.normalize(text, dim=1), temperature, idx), (video, text, temperature)
    )
    singles = [x.detach().float().requires_grad_() for x in (video, text, temperature)]
    loss = contrastive_loss(singles[0] / 3, F.normalize(singles[1], dim=1), singles[2], idx)
    whole = written_out(video / 3, F.normalize(text, dim=1), temperature, idx)
    assert loss.item() == pytest.approx(whole.item())
    for found, wanted in zip(torch.autograd.grad(2 * loss, singles), expected, strict=True):
        assert (found - 2 * wanted).abs().max() < 1e-6 * max(1, wanted.abs().max())


def test_sharp_similarities_stay_finite():
    video = F.normalize(torch.randn(6, 4), dim=1).requires_grad_()
    loss = contrastive_loss(video, video.detach().clone(), torch.tensor(0.001), torch.arange(6))
    loss.backward()
    assert loss.isfinite()
    assert video.grad.isfinite().all()


def print_memory_of_a_large_batch() -> None:
    # Every chunk has its own pages and returns them. By default glibc keeps gaps, in some runs 300 MiB.
    m_mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)
    contrast.MOST_SIMILARITIES = 1 << 20
    torch.manual_seed(0)
    video, text = (F.normalize(torch.randn(8192, 16), dim=1).requires_grad_() for _ in range(2))
    idx, temperature = torch.arange(8192), torch.tensor(0.07, requires_grad=True)
    contrastive_loss(video[:64], text[:64], temperature, idx[:64]).backward()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contrastive_loss(video, text, temperature, idx).backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)


def test_memory_does_not_grow_with_the_square_of_the_global_batch():
    """The similarities alone would take 256 MiB, and the tensors that autograd saves several times as much."""
    printed = run_ranks(print_memory_of_a_large_batch, count=1)
    assert float(printed) < 64, f"{printed} MiB"


def test_refuses_batches_of_different_sizes():
    with pytest.raises(ValueError, match="2 videos, 3 texts and 2 numbers"):
        contrastive_loss(torch.ones(2, 4), torch.ones(3, 4), torch.tensor(1.0), torch.arange(2))
