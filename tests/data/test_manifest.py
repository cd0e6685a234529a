from __future__ import annotations

import os
from pathlib import Path

import pytest

from umt_fast.data.manifest import VIDEO_SUFFIXES, ManifestError
from umt_fast.data.manifest import read_manifest as read_videos
from umt_fast.errors import RunError


def read_manifest(*arguments: str) -> list[str]:
    return [video.path for video in read_videos(*arguments)]


@pytest.fixture
def listing(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "train.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("/v/a.mp4,3", "/v/a.mp4"),
        ("/v/a.mp4, 3", "/v/a.mp4"),
        ("/v/a.mp4 3", "/v/a.mp4"),
        ("/v/a.mp4\t3", "/v/a.mp4"),
        ("/v/a.mp4", "/v/a.mp4"),
        ("  /v/a.mp4,3  ", "/v/a.mp4"),
        ("/v/a.mp4,-1", "/v/a.mp4"),
        ("/v/a.mp4 -1", "/v/a.mp4"),
        ("/v/a.mp4,0", "/v/a.mp4"),
        ("/v/my clip.mp4,3", "/v/my clip.mp4"),
        ("/v/my clip.mp4 3", "/v/my clip.mp4"),
        ("/v/my clip.mp4", "/v/my clip.mp4"),
        ("/v/one, two.mp4,3", "/v/one, two.mp4"),
        ("/v/one, two.mp4 3", "/v/one, two.mp4"),
        ("/v/one, two.mp4", "/v/one, two.mp4"),
        ("/v/clip 7.mp4,3", "/v/clip 7.mp4"),
        ("/v/1,2,3.mp4", "/v/1,2,3.mp4"),
        ("/v/1,2.mp4,3", "/v/1,2.mp4"),
        ("/v/äöü 動画.mp4,3", "/v/äöü 動画.mp4"),
    ],
)
def test_line(listing, line, path):
    assert read_manifest(listing(f"{line}\n")) == [path]


def test_order_and_repeats_are_kept(listing):
    assert read_manifest(listing("/b.mp4,1\n/a.mp4,2\n/b.mp4,1\n")) == ["/b.mp4", "/a.mp4", "/b.mp4"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n  \n"])
def test_line_ends_and_blank_lines(listing, end):
    assert read_manifest(listing(f"{end}/a.mp4,1{end}/b.mp4,2")) == ["/a.mp4", "/b.mp4"]


def test_byte_order_mark(listing):
    """Spreadsheets write one before the first path."""
    assert read_manifest(listing("\ufeff/a.mp4,1\n/b.mp4,2\n".encode())) == ["/a.mp4", "/b.mp4"]


def test_prefix_goes_before_relative_paths_only(listing):
    source = listing("k400/a b.mp4,1\n/abs/c.mp4,2\nd.mp4\n")
    assert read_manifest(source, "/data") == ["/data/k400/a b.mp4", "/abs/c.mp4", "/data/d.mp4"]
    assert read_manifest(source, "/data/") == ["/data/k400/a b.mp4", "/abs/c.mp4", "/data/d.mp4"]
    assert read_manifest(source) == ["k400/a b.mp4", "/abs/c.mp4", "d.mp4"]


def test_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("/a.mp4\n")
    assert read_manifest("~/list.txt") == ["/a.mp4"]


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folder_is_searched_through_and_sorted(tmp_path):
    _touch(tmp_path, "b/z.mp4", "b/deep/er/a.webm", "a/y.MKV", "x.avi", "notes.txt", "b/label.csv", "noend", "a,1.mov")
    expected = ["a,1.mov", "a/y.MKV", "b/deep/er/a.webm", "b/z.mp4", "x.avi"]
    assert read_manifest(str(tmp_path)) == sorted(str(tmp_path / name) for name in expected)


@pytest.mark.parametrize("suffix", sorted(VIDEO_SUFFIXES))
def test_folder_finds_every_suffix(tmp_path, suffix):
    _touch(tmp_path, f"a{suffix}")
    assert read_manifest(str(tmp_path)) == [str(tmp_path / f"a{suffix}")]


def test_folder_named_like_a_video_is_not_a_video(tmp_path):
    """Extracted frames often lie in a folder named after their video."""
    _touch(tmp_path, "a.mp4", "b.avi/frame_0001.jpg", "c.avi/inside.mp4")
    assert read_manifest(str(tmp_path)) == [str(tmp_path / "a.mp4"), str(tmp_path / "c.avi" / "inside.mp4")]


def test_folder_with_linked_files(tmp_path):
    _touch(tmp_path, "store/a.mp4")
    (tmp_path / "view").mkdir()
    (tmp_path / "view" / "b.mp4").symlink_to(tmp_path / "store" / "a.mp4")
    assert read_manifest(str(tmp_path / "view")) == [str(tmp_path / "view" / "b.mp4")]


def test_linked_folders_are_searched_once(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "a.mp4").touch()
    source = tmp_path / "source"
    source.mkdir()
    for name in ("x", "y"):
        (source / name).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(source)
    assert read_manifest(str(source)) == [str(source / "x" / "deep" / "a.mp4")]


def test_no_source():
    with pytest.raises(ManifestError, match=r"--data\.train"):
        read_manifest("")


@pytest.mark.parametrize("text", ["", "\n", "  \n\n\t\n"])
def test_empty_list(listing, text):
    source = listing(text)
    with pytest.raises(ManifestError, match="empty") as caught:
        read_manifest(source)
    assert source in str(caught.value)


def test_missing_list(tmp_path):
    source = str(tmp_path / "nowhere" / "train.csv")
    with pytest.raises(ManifestError, match="No such file") as caught:
        read_manifest(source)
    assert source in str(caught.value)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser reads everything")
def test_forbidden_list(listing):
    source = listing("/a.mp4\n")
    os.chmod(source, 0)
    with pytest.raises(ManifestError, match="Permission denied") as caught:
        read_manifest(source)
    assert source in str(caught.value)


@pytest.mark.parametrize("names", [(), ("notes.txt", "deep/list.csv")])
def test_folder_without_videos(tmp_path, names):
    _touch(tmp_path, *names)
    with pytest.raises(ManifestError, match=r"\.mp4") as caught:
        read_manifest(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.mp4", "a.WebM", "missing.mkv"])
def test_one_video_is_not_a_list(tmp_path, name):
    if name != "missing.mkv":
        _touch(tmp_path, name)
    with pytest.raises(ManifestError, match="one video") as caught:
        read_manifest(str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)


def test_binary_file_is_not_a_list(listing):
    source = listing(b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe" * 50)
    with pytest.raises(ManifestError, match="not a text") as caught:
        read_manifest(source)
    assert source in str(caught.value)


def test_errors_are_the_users():
    """The trainer prints a RunError without a traceback."""
    assert issubclass(ManifestError, RunError)


def test_unfinished_copies_are_not_a_data_set(tmp_path):
    (tmp_path / ".prepare").mkdir()
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ManifestError, match=r"unfinished copies; give umt_fast\.data\.prepare the same command again"):
        read_manifest(str(tmp_path))
