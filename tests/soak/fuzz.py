"""Damaged and hostile input for all code that reads files: `make fuzz`, or

    python tests/soak/fuzz.py --minutes 20 [--target index] [--keep FOLDER]
    python tests/soak/fuzz.py --case index:1234            one case again, with its traceback

Each case is a good file with random damage, read in a child process with limits of time and memory. A case fails
if another exception than those for bad input is raised, or if the child dies, hangs or exceeds the memory.
A case depends only on its number. Each fault found has a test beside the tests of the faulty module.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import sqlite3
import struct
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from umt_fast import ClipTeacher, StudentConfig, TeacherConfig, VideoStudent
from umt_fast.config import PretrainConfig
from umt_fast.data.captions import Source, read_annotations, read_answers, read_questions
from umt_fast.data.decode import probe, read_frames
from umt_fast.data.decode.excerpt import cut_excerpt
from umt_fast.data.decode.time_limit import TimeLimit
from umt_fast.data.index import BadIndex, VideoList, describe, write_index
from umt_fast.data.labels import read_classes, read_labelled
from umt_fast.data.manifest import read_manifest
from umt_fast.data.mapped_list import write_mapped
from umt_fast.data.prepare.encode import Recipe, write_copy
from umt_fast.data.prepare.journal import Journal
from umt_fast.data.tokens import SPECIAL, Tokenizer
from umt_fast.data.video import BadVideo, Limits, Video
from umt_fast.errors import RunError
from umt_fast.evaluation.extract import read_features
from umt_fast.evaluation.probe import AttentiveSettings
from umt_fast.evaluation.probe import probe as probe_features
from umt_fast.evaluation.search import read_index
from umt_fast.recipe import load_recipe
from umt_fast.run import checkpoint
from umt_fast.run.log import read_metrics
from umt_fast.weights import load_clip_teacher, load_umt_student, read_class_map, read_weights

MOST_SECONDS = 30.0
MOST_MEMORY = 1 << 30
"""Peak bytes of a child, including its imports."""
REFUSALS = (RunError, BadVideo)
"""Allowed exceptions for a bad file."""
TEACHER = TeacherConfig(image_size=32, width=32, depth=2, heads=2, target_width=16, align_layers=2)
STUDENT = StudentConfig(image_size=32, frames=2, width=32, depth=2, heads=2, align_layers=2, target_width=16)
_NUMBERS = (0, 1, 2, 127, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1)
_WORDS = '-1 0 1e999 NaN null true {} [] "" " \u00b2 \ud800 \x00 \\u0000 \ufeff ../../x /dev/zero file:///etc/passwd'
_TEXTS = (*_WORDS.split(" "), "reference://a", "a::b", "http://127.0.0.1:9/x", "9" * 30, "9" * 5000, "[" * 3000)


# Damage.


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Change a few places, as a bad disk or a curious attacker does."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not data:
            return bytes(data)
        # Headers matter most, and they are at both ends.
        span = len(data) if rng.random() < 0.5 else min(len(data), 512)
        place = rng.randrange(span)
        place = len(data) - 1 - place if rng.random() < 0.2 else place
        kind = rng.randrange(8)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.randrange(256)
        elif kind == 2:
            size = rng.choice((2, 4, 8))
            value = rng.choice(_NUMBERS) & ((1 << 8 * size) - 1)
            data[place : place + size] = value.to_bytes(size, rng.choice(("big", "little")))
        elif kind == 3:
            del data[place : place + rng.choice((1, 4, 64, 4096))]
        elif kind == 4:
            other = rng.randrange(len(data))
            data[place:place] = data[other : other + rng.choice((1, 8, 256))]
        elif kind == 5:
            data[place : place + rng.choice((1, 16, 512))] = bytes([rng.randrange(256)]) * rng.choice((1, 16, 512))
        elif kind == 6 and rng.random() < 0.3:
            del data[place:]
        else:
            other = rng.randrange(len(data))
            count = rng.choice((4, 32))
            data[place : place + count] = data[other : other + count]
    return bytes(data)


def damage_text(content: bytes, rng: random.Random) -> bytes:
    """Change numbers, words and lines, and sometimes bytes."""
    if rng.random() < 0.25:
        return damage_bytes(content, rng)
    text = content.decode("utf-8", "surrogateescape")
    for _ in range(rng.choice((1, 1, 2, 4))):
        found = list(re.finditer(r"-?\d+|\w+|[^\w\s]+|\s+", text))
        if not found:
            break
        one = rng.choice(found)
        new = rng.choice((rng.choice(_TEXTS), "", one[0] * 2, rng.choice(found)[0], str(rng.choice(_NUMBERS))))
        text = text[: one.start()] + new + text[one.end() :]
    return text.encode("utf-8", "surrogatepass") if rng.random() < 0.5 else text.encode("utf-8", "backslashreplace")


def damage_tar(content: bytes, rng: random.Random) -> bytes:
    """Change a header and correct its checksum, because readers reject a wrong one."""
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    data = bytearray(content)
    blocks = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = rng.choice(blocks)
    for _ in range(rng.choice((1, 2, 3))):
        where, size = rng.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
        kind = rng.randrange(4)
        if where == 156:
            data[at + 156] = rng.choice(b"0123567xgLKSDNVX\0")
        elif kind == 0:
            value = rng.choice((*_NUMBERS, -1, -512, -(1 << 40)))
            data[at + where : at + where + size] = (b"\x80" if value >= 0 else b"\xff") + (
                value & ((1 << 8 * (size - 1)) - 1)
            ).to_bytes(size - 1, "big")
        elif kind == 1:
            data[at + where : at + where + size] = (b"%o" % rng.choice(_NUMBERS))[:size].ljust(size, b"\0")
        else:
            data[at + where : at + where + size] = damage_bytes(bytes(data[at + where : at + where + size]), rng)[
                :size
            ].ljust(size, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def damage_zip(content: bytes, rng: random.Random) -> bytes:
    """Change a record, and write an otherwise valid archive."""
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        records = old.namelist()
        pickles = [name for name in records if name.endswith(".pkl")]
        chosen = rng.choice(pickles if pickles and rng.random() < 0.8 else records)
        for name in records:
            part = old.read(name)
            if name == chosen:
                part = damage_bytes(part, rng)
            if not (name == chosen and rng.random() < 0.05):
                new.writestr(name, part)
    return out.getvalue()


def damage_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Change the header as text, and its length field."""
    if rng.random() < 0.3:
        return damage_bytes(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header = damage_text(content[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


# What is read.


@dataclass
class Target:
    """Good files, the function that damages them, and the function that reads them."""

    name: str
    seeds: list[tuple[str, bytes]]
    """File names and contents."""
    damage: Callable[[bytes, random.Random], bytes]
    read: Callable[[Path], None]
    beside: dict[str, bytes] = field(default_factory=dict)
    """Other files in the folder, which are good."""
    weight: int = 1


def ends(timeline: Any) -> list[int]:
    """The first, middle and last frame, from a number of frames or a timeline."""
    count = timeline if isinstance(timeline, int) else timeline.num_frames
    return sorted({0, count // 2, count - 1})


def read_video(path: Path) -> None:
    with TimeLimit(MOST_SECONDS / 3):
        video = Video(str(path))
        for attempt in (
            lambda: read_frames(video, ends),
            lambda: read_frames(video, ends, path.read_bytes()),
            lambda: probe(video),
            lambda: cut_excerpt(video, ends),
        ):
            with contextlib.suppress(BadVideo):
                attempt()
        read_frames(video, ends)


def read_all(videos: VideoList) -> None:
    """Read every row, and the frames of existing videos."""
    videos.read_timeout, videos.limits = 1.0, Limits(max_bytes=1 << 20)
    for row in range(min(len(videos), 50)):
        with contextlib.suppress(BadIndex, BadVideo), TimeLimit(MOST_SECONDS / 3):
            read_frames(videos[row], ends)
    list(zip(range(9), videos.rows(), strict=False))
    videos.count_distinct()


def read_list(path: Path) -> None:
    with contextlib.suppress(RunError):
        read_labelled(str(path), str(path.parent), read_timeout=1)
    read_all(read_manifest(str(path), str(path.parent), read_timeout=1))


def read_captions(path: Path) -> None:
    read_annotations(Source(str(path), str(path.parent)))


def read_names(path: Path) -> None:
    """A class file, a map of classes, a vocabulary, or answers to choose from."""
    readers: dict[str, Callable[[Path], object]] = {
        "classes.txt": read_classes,
        "map.json": lambda path: read_class_map(str(path), 2),
        "vocab.txt": lambda path: Tokenizer.read(path)(["a b"], 8),
        "answers.json": lambda path: read_answers(str(path)),
        "questions.json": lambda path: read_questions(str(path)),
    }
    readers[path.name](path)


def read_search(path: Path) -> None:
    read_index(path, "key", 3, 4)


def read_probe(path: Path) -> None:
    """A folder of features, and a probe on them."""
    features = read_features(path.parent)
    probe_features("knn", features, features, AttentiveSettings(), k=2)


def read_teacher(path: Path) -> None:
    load_clip_teacher(ClipTeacher(TEACHER), read_weights(path))


def read_student(path: Path) -> None:
    load_umt_student(VideoStudent(STUDENT), read_weights(path))


def read_journal(path: Path) -> None:
    Journal(path).close()


def encoded(name: str, codec: str, pixels: str = "yuv420p", frames: int = 12) -> bytes:
    """A small video."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/{name}"
        with av.open(path, "w") as container:
            # With threads, x265 writes past its buffers for such small pictures.
            options = {"x265-params": "pools=none:frame-threads=1:wpp=0:log-level=none"} if codec == "libx265" else {}
            stream = container.add_stream(codec, rate=12, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
            stream.codec_context.thread_count = 1
            stream.codec_context.gop_size = 4
            for number in range(frames):
                picture = np.full((48, 64, 3), 20 * number, np.uint8)
                picture[:, number : number + 8] = 255
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        return Path(path).read_bytes()


def tar_of(files: dict[str, bytes], form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def saved(content: object, **options: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def mapped_list() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_mapped(VideoList.of_paths(["/a.mp4", "/b.mp4"]), f"{folder}/a.videos")
        return Path(f"{folder}/a.videos").read_bytes()


def annotations_database() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(f"{folder}/a.db")
        connection.execute("CREATE TABLE annos (id INTEGER PRIMARY KEY, file TEXT, caption TEXT)")
        connection.executemany("INSERT INTO annos VALUES (?, 'a.mp4', 'a caption')", [(i,) for i in range(9)])
        connection.commit()
        connection.close()
        return Path(f"{folder}/a.db").read_bytes()


def copy_and_row(content: bytes, codec: str) -> tuple[bytes, dict[str, object]]:
    """A training copy and its row of an index."""
    with tempfile.TemporaryDirectory() as folder:
        facts, _ = write_copy(Video("memory://a"), f"{folder}/a.mp4", Recipe(codec, 32), content)
        copy = Path(f"{folder}/a.mp4").read_bytes()
    return copy, {"path": "a.mp4", "bytes": len(copy), **describe(facts), "label": 3, "caption": "a caption"}


def make_targets() -> list[Target]:
    """All targets with their good files, which are the same each time."""
    torch.manual_seed(0)
    good_video = encoded("a.mp4", "libx264")
    kinds = [("a.mp4", "libx264", "yuv420p"), ("a.mkv", "libx264", "yuv420p"), ("a.avi", "mpeg4", "yuv420p")]
    kinds += [("a.ts", "libx264", "yuv420p"), ("a.webm", "libvpx-vp9", "yuv420p"), ("a.mov", "mjpeg", "yuvj420p")]
    kinds += [("a.flv", "flv1", "yuv420p"), ("a.mpg", "mpeg2video", "yuv420p"), ("a.gif", "gif", "rgb8")]
    kinds += [("a.wmv", "wmv2", "yuv420p"), ("b.mp4", "libx265", "yuv420p"), ("b.webm", "libvpx", "yuv420p")]
    kinds += [("a.h264", "libx264", "yuv420p"), ("a.ogv", "libtheora", "yuv420p"), ("b.mkv", "ffv1", "yuv420p")]
    videos = [(name, encoded(name, codec, form)) for name, codec, form in kinds if codec in av.codecs_available]
    stills = []
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp"):
        out = io.BytesIO()
        Image.fromarray(np.arange(3 * 24 * 32, dtype=np.uint8).reshape(24, 32, 3)).save(
            out, name[2:].replace("jpg", "jpeg")
        )
        stills.append((name, out.getvalue()))

    teacher, student = ClipTeacher(TEACHER).state_dict(), VideoStudent(STUDENT).state_dict()
    visual = {f"visual.{key}": value for key, value in teacher.items()}
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))), script)
    extras = {"model": visual, "epoch": 3, "best": np.float64(1), "args": argparse.Namespace(lr=1.0), "path": Path("a")}
    weights = [("a.pth", saved(teacher)), ("b.pth", saved(extras))]
    run = {"clips_seen": 4, "model": student, "optimizer": {}, "rng": [], "schedule": {}}
    sections = {
        "train": {"masks_per_clip": 1, "cuda_graph": False},
        "model": {},
        "mask": {},
        "run": {"precision": "bf16"},
    }
    runs = [saved(run | {"format": number, "config": sections}) for number in (1, 2)]

    members = {
        "0.mp4": good_video,
        "0.cls": b"3",
        "0.txt": b"a caption",
        "1.mp4": good_video,
        "1.json": b'{"label": 5, "caption": "b"}',
    }
    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    shards = [("s.tar", tar_of(members, form)) for form in forms]
    shards.append(("s.tar", tar_of({f"{'d/' * 80}\u00e9{name}": part for name, part in members.items()}, forms[2])))
    lists = [
        b"a.mp4,3\na.mp4 4\na.mp4\n",
        b'"a.mp4",3\n"b, c.mp4",4\n',
        b"path,label\na.mp4,cat\nb.mp4,dog\n",
        b"# a comment\r\npath;start;total;caption\r\na.mp4;2;4;x\r\nb.mp4;0;-1;y\r\n",
        b'a.mp4;3\n"b; c.mp4";4\na.mp4;cat\na.mp4\tcat, dog\n',
        b"a.mp4 0 -1 3\n",
        b"\xef\xbb\xbfa.mp4,1\r\nx y.mp4,2\r\n",
        b"http://127.0.0.1:9/a.mp4,1\nfile:///a.mp4,2\n",
    ]
    annotations = [
        ("a.json", json.dumps([{"video": "a.mp4", "caption": "x"}, {"image": "b.jpg", "caption": ["x", "y"]}]))
    ]
    annotations += [("a.csv", "video,caption\na.mp4,x y\nb.mp4,z\n"), ("a.tsv", "video\tcaption\na.mp4\tx y\n")]
    folder = Path(__file__).parents[2] / "train" / "recipes" / "pretrain"
    recipes = [(path.name, path.read_bytes()) for path in sorted(folder.glob("umt_*.toml"))]
    captions = [(name, text.encode()) for name, text in annotations]
    names = {"classes.txt": b"cat\ndog\n", "map.json": b"[1, 0]", "answers.json": b'["cat", "dog"]'}
    names["vocab.txt"] = "\n".join([*SPECIAL, "a", "b", "##c"]).encode()
    names["questions.json"] = b'[{"video": "a.mp4", "question": "what", "question_id": 3, "answer": ["cat", "dog"]}]'
    features = {"features": torch.ones(3, 1, 4), "rows": torch.arange(3), "labels": torch.tensor([0, 1, 1])}
    folder_index = json.dumps({"shards": 1, "classes": ["cat", "dog"], "videos": 3}).encode()
    shard = ("features_00000.safetensors", save(features, {"unreadable": "[]"}))
    arrays = io.BytesIO()
    np.savez(arrays, **{key: value.numpy() for key, value in features.items()}, unreadable=np.array("[]"))
    zipped, npz_index = arrays.getvalue(), folder_index.replace(b"{", b'{"format": "npz", ', 1)
    parts = {"rows": torch.arange(3), "seconds": torch.ones(3, 2), "vectors": torch.ones(3, 4)}
    found = save(parts, {"key": "key", "bad": '[["a.mp4", "no"]]'})
    targets = [
        Target("names", list(names.items()), damage_text, read_names, weight=2),
        Target("features", [("features.json", folder_index)], damage_text, read_probe, dict([shard])),
        Target("feature_shard", [shard], damage_safetensors, read_probe, {"features.json": folder_index}),
        Target("npz", [("features_00000.npz", zipped)], damage_zip, read_probe, {"features.json": npz_index}),
        Target(
            "search",
            [("index.safetensors", found)],
            damage_safetensors,
            lambda path: read_index(path, "key", 3, 4) and None,
        ),
        Target("video", videos, damage_bytes, read_video, weight=6),
        Target("still", stills, damage_bytes, read_video),
        Target("list", [("list.csv", text) for text in lists], damage_text, read_list, {"a.mp4": good_video}, weight=3),
        Target("shard", shards, damage_tar, lambda path: read_all(read_manifest(str(path))), weight=3),
        Target("captions", captions, damage_text, read_captions, weight=2),
        Target("sqlite", [("a.db", annotations_database())], damage_bytes, read_captions),
        Target("mapped", [("a.videos", mapped_list())], damage_text, read_list),
        Target("recipe", recipes, damage_text, read_recipe),
        Target("teacher", weights, damage_zip, read_teacher, weight=2),
        Target("torchscript", [("a.pt", script.getvalue())], damage_zip, lambda path: read_weights(path) and None),
        Target("legacy", [("a.pth", saved(visual, _use_new_zipfile_serialization=False))], damage_bytes, read_teacher),
        Target("safetensors", [("a.safetensors", save(visual))], damage_safetensors, read_teacher),
        Target("student", [("a.pth", saved({"model": student}))], damage_zip, read_student),
        Target("checkpoint", [("clips_0000000004.pth", one) for one in runs], damage_zip, lambda path: read_run(path)),
        Target("journal", [("journal.jsonl", JOURNAL)], damage_text, read_journal),
        Target("metrics", [("metrics.jsonl", METRICS)], damage_text, lambda path: read_metrics(path) and None),
    ]
    for codec in ("h264", "mjpeg", "vp9"):
        copy, row = copy_and_row(good_video, codec)
        index = write_index([{"path": "a.mp4"}, row, {"path": "a.mp4"}])
        read = lambda path: read_all(read_manifest(str(path)))  # noqa: E731
        targets.append(Target(f"index_{codec}", [("index.jsonl", index)], damage_text, read, {"a.mp4": copy}))
        targets.append(Target(f"copy_{codec}", [("a.mp4", copy)], damage_bytes, read_copy, {"index.jsonl": index}))
    return targets


JOURNAL = b'{"kind": "copy", "name": "a.mp4", "content": {"row": {"path": "a.mp4", "bytes": 3}, "seconds": 1.0}}\n' * 3
METRICS = b'{"step": 1, "loss": 2.5, "lr": 0.001, "bad": []}\n{"step": 2, "loss": 2.25, "lr": 0.001}\n'


def read_recipe(path: Path) -> None:
    load_recipe(PretrainConfig, path)


def read_run(path: Path) -> None:
    checkpoint.load_checkpoint(path)


def read_copy(path: Path) -> None:
    read_all(read_manifest(str(path.parent)))


# Running.


def lay_out(target: Target, number: int, folder: Path) -> Path:
    """Write the files of a case. Returns the damaged one."""
    rng = random.Random(f"{target.name}:{number}")
    name, content = rng.choice(target.seeds)
    for other, good in target.beside.items():
        (folder / other).write_bytes(good)
    (folder / name).write_bytes(target.damage(content, rng))
    return folder / name


def read_case(target: Target, number: int, folder: Path) -> str:
    """`read` or `refused`. Raises any exception that is not allowed."""
    try:
        target.read(lay_out(target, number, folder))
    except REFUSALS as error:
        return f"refused\n{error}"
    return "read"


@dataclass
class Outcome:
    kind: str
    """read, refused, or the fault in one word."""
    detail: str
    seconds: float
    peak: int
    """Bytes."""


def run_case(target: Target, number: int) -> Outcome:
    """Run one case in a child of this process."""
    folder = Path(tempfile.mkdtemp(prefix="umt-fuzz-"))
    reader, writer = os.pipe()
    begun = time.monotonic()
    child = os.fork()
    if not child:
        _serve(target, number, folder, writer)
    os.close(writer)
    parts = []
    try:
        while True:
            left = begun + MOST_SECONDS - time.monotonic()
            if left <= 0 or not select.select([reader], [], [], left)[0]:
                os.kill(child, signal.SIGKILL)
                break
            if not (part := os.read(reader, 1 << 16)):
                break
            parts.append(part)
    finally:
        os.close(reader)
    _, status, usage = os.wait4(child, 0)
    seconds, peak = time.monotonic() - begun, usage.ru_maxrss << 10
    shutil.rmtree(folder, ignore_errors=True)
    kind, _, detail = b"".join(parts).decode("utf-8", "replace").partition("\n")
    if seconds >= MOST_SECONDS:
        kind = "hang"
    elif os.WIFSIGNALED(status) or not kind:
        kind, detail = "death", f"{detail} status {status}"
    elif peak > MOST_MEMORY:
        kind = "memory"
    return Outcome(kind, detail, seconds, peak)


def _serve(target: Target, number: int, folder: Path, writer: int) -> None:
    """Run in the child: report to `writer` and end."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MOST_MEMORY,) * 2)
        report = read_case(target, number, folder)
    except BaseException:
        report = "traceback\n" + traceback.format_exc()
    with contextlib.suppress(OSError):
        os.write(writer, report.encode("utf-8", "backslashreplace")[-60_000:])
    os._exit(0)


def numbers(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1


def fuzz(targets: list[Target], minutes: float, first: int, keep: Path | None) -> int:
    """Run cases until the time is over. Print a table; return the number of failed cases."""
    until = time.monotonic() + 60 * minutes
    turns = [target for target in targets for _ in range(target.weight)]
    next_number = {target.name: numbers(first) for target in targets}
    counts: dict[str, Counter[str]] = {target.name: Counter() for target in targets}
    slowest, largest = Counter[str](), Counter[str]()
    known: set[str] = set()
    while time.monotonic() < until:
        for target in turns:
            number = next(next_number[target.name])
            outcome = run_case(target, number)
            counts[target.name][outcome.kind] += 1
            slowest[target.name] = max(slowest[target.name], outcome.seconds)
            largest[target.name] = max(largest[target.name], outcome.peak)
            if outcome.kind not in ("read", "refused"):
                last = outcome.detail.strip().splitlines()[-1:] or [""]
                places = re.findall(r'File ".*?([^/"]+)", line (\d+)', outcome.detail)[-1:]
                print(f"{target.name}:{number} {outcome.kind} {last[0][:200]} {places}", flush=True)
                if keep is not None and f"{target.name} {outcome.kind} {places}" not in known:
                    known.add(f"{target.name} {outcome.kind} {places}")
                    folder = keep / f"{target.name}-{number}"
                    folder.mkdir(parents=True, exist_ok=True)
                    lay_out(target, number, folder)
                    (folder / "detail.txt").write_text(outcome.detail)
    failed = 0
    print(f"\n{'target':14} {'cases':>7} {'read':>7} {'refused':>7} {'failed':>7} {'slowest s':>9} {'peak MB':>7}")
    for name, found in counts.items():
        bad = found.total() - found["read"] - found["refused"]
        failed += bad
        row = f"{name:14} {found.total():7} {found['read']:7} {found['refused']:7} {bad:7}"
        print(f"{row} {slowest[name]:9.2f} {largest[name] / 1e6:7.0f}")
    total = sum(found.total() for found in counts.values())
    print(f"{total} cases in {minutes:g} minutes, {failed} failed")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--target", action="append", help="only this one; may be given several times")
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each target")
    parser.add_argument("--keep", type=Path, help="folder for the files of cases that failed")
    parser.add_argument("--case", help="TARGET:NUMBER, run in this process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    targets = make_targets()
    if given.case:
        name, _, number = given.case.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            print(read_case(next(one for one in targets if one.name == name), int(number), Path(folder)))
        return
    chosen = [target for target in targets if given.target is None or target.name in given.target]
    for target in chosen:  # a target must be able to read its good files
        for name, content in target.seeds:
            good = replace(target, seeds=[(name, content)], damage=lambda same, _rng: same)
            outcome = run_case(good, 0)
            if outcome.kind != "read":
                sys.exit(f"{target.name}: the undamaged {name} gives {outcome.kind} {outcome.detail}")
    sys.exit(1 if fuzz(chosen, given.minutes, given.first, given.keep) else 0)


if __name__ == "__main__":
    main()
