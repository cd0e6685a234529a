"""PyAV decodes interlaced videos, because GPUs combine two fields in different ways."""

from __future__ import annotations

import pytest

from umt_fast.data.decode import probe, read_frames
from umt_fast.data.decode.excerpt import cut_excerpt
from umt_fast.data.index import VideoList

INTERLACED = {
    "h264.mp4": ("libx264", {"x264-params": "tff=1:bframes=2"}),
    "mpeg2.ts": ("mpeg2video", {"flags": "+ildct+ilme"}),
}


@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_videos_are_not_plain(write_video, decode_all, tmp_path, name):
    codec, options = INTERLACED[name]
    path = write_video(tmp_path / name, codec, frames=20, options=options)
    (video,) = VideoList.of_paths([str(path)])
    assert not probe(video).plain
    assert cut_excerpt(video, lambda count: [count - 1]) is None
    (last,) = read_frames(video, lambda count: [count - 1])
    assert (last == decode_all(path)[-1]).all()


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_progressive_videos_are(write_video, tmp_path, codec):
    (video,) = VideoList.of_paths([str(write_video(tmp_path / "a.mp4", codec, frames=20))])
    assert probe(video).plain
