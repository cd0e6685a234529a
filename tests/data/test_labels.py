from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from umt_fast.data.index import VideoList, write_index
from umt_fast.data.labels import LabelError, read_classes, read_labelled
from umt_fast.data.manifest import ManifestError, read_manifest
from umt_fast.data.mapped_list import write_mapped
from umt_fast.data.prepare.plan import make_plan


def touch(folder: Path, names: list[str]) -> None:
    for name in names:
        if "://" not in name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("content", "paths", "labels", "classes"),
    [
        ("a.mp4,1\nb c.mp4,0\n", ["a.mp4", "b c.mp4"], [1, 0], ("0", "1")),
        ("a.mp4 2\r\n\r\nd/b.mp4 0", ["a.mp4", "d/b.mp4"], [2, 0], ("0", "1", "2")),
        ("a,b.mp4,run\nc.mp4,arm wrestling", ["a,b.mp4", "c.mp4"], [1, 0], ("arm wrestling", "run")),
        ('"a, b.mp4",jump\n"c.mp4","run, far"', ["a, b.mp4", "c.mp4"], [0, 1], ("jump", "run, far")),
        ("\ufeffa.mp4\trun\n", ["a.mp4"], [0], ("run",)),
        ("a.mp4;run\nb;c.mp4;hop", ["a.mp4", "b;c.mp4"], [1, 0], ("hop", "run")),
        ('# all\r\npath,label\r\na.mp4,run\r\nb.mp4,"hop, far"', ["a.mp4", "b.mp4"], [1, 0], ("hop, far", "run")),
        ("label\tpath\nrun\ta b.mp4", ["a b.mp4"], [0], ("run",)),
        ("a.mp4 run\nb.mp4,hop", ["a.mp4", "b.mp4"], [1, 0], ("hop", "run")),
        ("https://x/a.mp4,3", ["https://x/a.mp4"], [3], ("0", "1", "2", "3")),
    ],
)
def test_lists(tmp_path: Path, content, paths, labels, classes):
    listing = tmp_path / "list.csv"
    listing.write_text(content, "utf-8")
    touch(tmp_path, paths)
    found = read_labelled(str(listing), str(tmp_path))
    assert [video.path for video in found.videos] == [p if "://" in p else f"{tmp_path}/{p}" for p in paths]
    assert found.labels.tolist() == labels
    assert found.classes == classes


def test_lists_of_other_kinds_have_labels(tmp_path: Path, monkeypatch):
    touch(tmp_path, ["a.mp4"])
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "utf16.csv": "a.mp4,run\n".encode("utf-16"),
        "plain": b"a.mp4,run\n",
        "list.json": b'[{"path": "a.mp4", "label": "run"}]',
    }.items():
        Path(name).write_bytes(content)
        found = read_labelled(name)
        assert (found.videos[0].path, found.classes) == ("a.mp4", ("run",)), name
    Path("numbers.csv").write_text("a.mp4,1\n")
    write_mapped(read_manifest("numbers.csv"), "mapped.videos")
    assert read_labelled("mapped.videos").labels.tolist() == [1]


def test_folders_name_the_classes(tmp_path: Path):
    for name in ("walk/1.mp4", "run/2.mp4", "run/deep/3.webm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = read_labelled(str(tmp_path))
    assert found.classes == ("run", "walk")
    assert [found.classes[label] for label in found.labels] == [
        Path(v.path).relative_to(tmp_path).parts[0] for v in found.videos
    ]
    (tmp_path / "4.mp4").write_bytes(b"")
    with pytest.raises(LabelError, match=r"4\.mp4: no label"):
        read_labelled(str(tmp_path))


def test_known_classes_number_the_names(tmp_path: Path):
    listing, names = tmp_path / "list.txt", tmp_path / "classes.txt"
    touch(tmp_path, ["a.mp4", "b.mp4"])
    listing.write_text(f"{tmp_path}/a.mp4,run\n{tmp_path}/b.mp4,walk\n")
    names.write_text("walk\nrun\nswim\n")
    classes = read_classes(names)
    assert read_labelled(str(listing), classes=classes).labels.tolist() == [1, 0]
    assert read_labelled(str(listing), classes=classes).classes == ("walk", "run", "swim")
    listing.write_text(f"{tmp_path}/a.mp4,2\n")
    assert read_labelled(str(listing), classes=classes).labels.tolist() == [2]
    assert len(read_labelled(str(listing), classes=400).classes) == 400


@pytest.mark.parametrize(
    ("content", "classes", "says"),
    [
        ("a.mp4,1\nb.mp4,7\n", 5, "line 2: label 7 is not one of 5 classes, 0 to 4"),
        ("a.mp4,1\n\nb.mp4\n", None, "line 3: no label"),
        ("a b.mp4\n", None, "line 1: no label"),
        ("# all\npath;label\na.mp4;1\nb.mp4;\n", None, "line 4: no label"),
        ("a.mp4,1\nb.mp4,run\n", None, "line 2: label 'run', but line 1 has '1'"),
        ("a.mp4,run\nb.mp4,hop\n", ("walk", "run"), "line 2: no class 'hop' among the 2 known: walk, run"),
        ("a.mp4,-1\n", 3, "line 1: label -1 is not one of 3 classes"),
        ("a.mp4," + "9" * 5000, 3, "is not one of 3 classes"),
        ('a.mp4,run\nb.mp4 "c\rd\n', None, "line 2: .* is not a line of CSV"),
        ("a.mp4,run\nb.mp4,walk\n", 1, "2 class names, but the model has 1 classes"),
    ],
)
def test_wrong_labels_name_file_and_line(tmp_path: Path, content, classes, says):
    listing = tmp_path / "list.csv"
    listing.write_text(content)
    touch(tmp_path, ["a.mp4", "b.mp4", "a b.mp4"])
    with pytest.raises(LabelError, match=says) as error:
        read_labelled(str(listing), str(tmp_path), classes)
    assert str(listing) in str(error.value)


def test_rows_of_an_index_need_labels(tmp_path: Path, monkeypatch):
    rows = VideoList.of_rows([{"path": "a.mp4", "label": 4}, {"path": "b.mp4"}])
    monkeypatch.setattr("umt_fast.data.labels.read_manifest", lambda *_: rows)
    with pytest.raises(LabelError, match=r"x\.tar, row 2: no label"):
        read_labelled("x.tar")


def test_class_files(tmp_path: Path):
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    with pytest.raises(LabelError, match="has the class 'a' twice"):
        read_classes(tmp_path / "twice.txt")
    with pytest.raises(LabelError, match="cannot read the class file"):
        read_classes(tmp_path / "none.txt")
    (tmp_path / "empty.csv").write_text("\n")
    with pytest.raises(ManifestError, match="is empty"):
        read_labelled(str(tmp_path / "empty.csv"))


def test_a_label_that_would_make_millions_of_classes_is_refused(tmp_path):
    """Found by fuzzing: such a label used all memory of the machine."""
    (tmp_path / "list.csv").write_text("a.mp4,3\nb.mp4,421474836\n")
    with pytest.raises(LabelError, match="line 2: label 421474836 would make"):
        read_labelled(str(tmp_path / "list.csv"))
    with pytest.raises(LabelError, match="not one of 10 classes"):
        read_labelled(str(tmp_path / "list.csv"), classes=10)


def test_other_forms_of_lists(tmp_path: Path):
    """Columns by name with start and end, as pre-training reads them"""
    touch(tmp_path, ["a.mp4"])
    (tmp_path / "columns.csv").write_text("path,label,start,end\na.mp4,1,2.5,4\na.mp4,0,0,2\n")
    found = read_labelled(str(tmp_path / "columns.csv"), str(tmp_path))
    assert found.labels.tolist() == [1, 0]
    assert [video.path for video in found.videos] == [f"{tmp_path}/a.mp4"] * 2


COLUMNS = "path\tclass\tstart\tend\na.mp4\trun, far\t2.5\t4\na.mp4\thop\t0\t2\n"
ENTRIES = [{"video": "a.mp4", "label": "run, far", "start": 2.5, "end": 4}, {"video": "a.mp4", "label": "hop"}]


@pytest.mark.parametrize(
    ("name", "content", "first_frames"),
    [
        ("numbers.csv", "path,label,start,end\na.mp4,1,2.5,4\na.mp4,0,0,2\n", None),
        ("columns.tsv", COLUMNS, None),
        ("utf16.txt", COLUMNS.encode("utf-16"), None),
        ("quoted.csv", '"a.mp4","run, far"\n"a.mp4",hop\n', None),
        ("entries.json", json.dumps(ENTRIES), None),
        ("frames.txt", "frames 12 run, far\nframes 7 hop\n", 12),
        ("frames.csv", "frames,12,1\nframes,7,0\n", 12),
    ],
)
def test_every_form_of_list_has_numbers_or_names(tmp_path: Path, name, content, first_frames):
    touch(tmp_path, ["a.mp4", "frames/1.jpg"])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_labelled(str(tmp_path / name), str(tmp_path))
    assert found.labels.tolist() == [1, 0]
    assert found.classes == (("0", "1") if name in ("numbers.csv", "frames.csv") else ("hop", "run, far"))
    assert {video.path for video in found.videos} == {f"{tmp_path}/{'frames' if first_frames else 'a.mp4'}"}
    parts = [video.part for video in found.videos]
    if first_frames:
        assert [part.count for part in parts] == [first_frames, 7]
    elif name != "quoted.csv":
        assert (parts[0].start, parts[0].end) == (2.5, 4)
    with pytest.raises(LabelError, match=f"{name}, (line|row) [12]: (no class 'run, far' among|label 1 is not one of)"):
        read_labelled(str(tmp_path / name), str(tmp_path), ("hop",))


def test_shards_name_their_classes(tmp_path: Path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in (("0.mp4", b"x"), ("0.cls", b"run\n"), ("1.mp4", b"y"), ("1.json", b'{"label": "hop"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found = read_labelled(str(tmp_path / "s.tar"))
    assert (found.classes, found.labels.tolist()) == (("hop", "run"), [1, 0])
    (line, other) = make_plan(found.videos, str(tmp_path / "s.tar"), None).lines
    assert (line.label, other.label) == ("run", "hop")
    rows = [{"path": "run/a.mp4"}, {"path": "hop/b.mp4"}]
    (tmp_path / "index.jsonl").write_bytes(write_index(rows))  # copies of a folder of classes
    assert read_labelled(str(tmp_path)).classes == ("hop", "run")
    (tmp_path / "index.jsonl").write_bytes(write_index([{**rows[0], "class": "swim"}]))
    assert read_labelled(str(tmp_path)).classes == ("swim",)


def test_lines_keep_their_numbers_and_parts(tmp_path: Path):
    touch(tmp_path, ["a.mp4"])
    for content, says in (
        ("path,label\n\na.mp4,1\na.mp4,\n", "line 4: no label"),
        ("a.mp4,1\na.mp4 3 -1\n", "line 2: no label"),
        ("https://x/a.mp4?b=1,2,c\n", "line 1: no label"),
    ):
        (tmp_path / "list.csv").write_text(content)
        with pytest.raises(LabelError, match=says):
            read_labelled(str(tmp_path / "list.csv"), str(tmp_path))


def test_names_of_classes_that_are_not_text_keep_their_bytes(tmp_path: Path):
    """A folder's name in Latin-1, through the class file that a run writes and back."""
    for name in (b"caf\xe9", b"tea"):
        (tmp_path / os.fsdecode(name)).mkdir()
        (tmp_path / os.fsdecode(name) / "a.mp4").touch()
    names = read_labelled(str(tmp_path)).classes
    assert names == ("caf\udce9", "tea")
    (tmp_path / "classes.txt").write_text("".join(f"{name}\n" for name in names), "utf-8", "surrogateescape")
    assert read_classes(tmp_path / "classes.txt") == names


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[31m", "\x00"])
def test_names_that_no_class_file_can_hold_are_refused(tmp_path: Path, name):
    (tmp_path / "a.json").write_text(json.dumps([{"path": "a.mp4", "label": "dog"}, {"path": "b.mp4", "label": name}]))
    with pytest.raises(LabelError, match=r"row 2: .* cannot be the name of a class"):
        read_labelled(str(tmp_path / "a.json"))
