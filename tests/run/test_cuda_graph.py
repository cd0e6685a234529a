"""Order and number of the captured step's operations, with a fake CUDA."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from umt_fast.run import cuda_graph as graph


class Stream:
    def wait_stream(self, _other: Stream) -> None:
        pass


class Recorder:
    """Replaces CUDAGraph: a replay runs the recorded step again on the recorded buffer."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch) -> None:
    graph._stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorder)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_args, **_kwargs: contextlib.nullcontext())
    yield
    graph._stream.cache_clear()


def test_warm_up_then_one_recording_then_replays(cuda):
    seen: list[Tensor] = []
    step = graph.CapturedStep(lambda clip: seen.append(clip) or clip.sum(), warm_ups=2)
    clips = torch.arange(6, dtype=torch.uint8)[:, None].expand(-1, 4).contiguous()
    results = [step(clip) for clip in clips]
    assert len(seen) == 3  # two eager steps, one recorded step, and no more
    assert seen[0] is not seen[2]
    assert all(torch.equal(seen[i], clips[i]) for i in range(2))
    recorded, buffer, result = step._recorded
    assert recorded.replays == 4  # every call after the warm-up makes one step, the recording one too
    assert torch.equal(buffer, clips[5])
    assert all(given is result for given in results[2:])
    assert torch.equal(clips[2], torch.full((4,), 2, dtype=torch.uint8))  # the caller's clip is not the buffer


def test_another_shape_or_type_is_refused(cuda):
    step = graph.CapturedStep(lambda clip: clip.sum(), warm_ups=0)
    step(torch.zeros(2, 3))
    for other in (torch.zeros(1, 3), torch.zeros(2, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"the step was recorded with torch\.float32"):
            step(other)


def test_ddp_gets_the_stream_only_when_capturing(cuda, monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: used.append(stream) or contextlib.nullcontext())
    with graph.capture_stream(False):
        assert used == []
    with graph.capture_stream(True):
        assert used == [graph._stream()]
