"""Lists of captions in every form, read as by the published code."""

from __future__ import annotations

import io
import json
import sqlite3
import tarfile

import pytest

from umt_fast.data import captions
from umt_fast.data.captions import (
    CaptionError,
    Source,
    read_answers,
    read_questions,
    read_retrieval,
    read_retrieval_training,
    read_training,
)
from umt_fast.data.manifest import ManifestError
from umt_fast.errors import RunError


def write_json(path, entries):
    path.write_text(json.dumps(entries))
    return str(path)


def write_sqlite(path, rows):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE annos (id INTEGER PRIMARY KEY, name TEXT, caption TEXT)")
        connection.executemany("INSERT INTO annos VALUES (?, ?, ?)", rows)
    connection.close()
    return str(path)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def listed(captions):
    return [(video.name, video.caption) for video in captions.videos]


def test_sources_of_every_form_and_their_numbers(tmp_path):
    first = write_json(
        tmp_path / "a.json", [{"video": "1.mp4", "caption": "one"}, {"video": "/x/2.mp4", "caption": "two"}]
    )
    second = write_sqlite(tmp_path / "b.sqlite.db", [(0, "3.jpg", "three"), (1, "s3://bucket/4.jpg", "four")])
    third = tmp_path / "c.csv"
    third.write_text('5.mp4,five, with a comma\n"6, a.mp4","six, too"\n')
    fourth = write_tar(
        tmp_path / "d-00.tar",
        {"6.mp4": b"v", "6.txt": b"six", "7.jpg": b"p", "7.json": b'{"caption": "seven"}', "8.txt": b"of nothing"},
    )
    sources = [f"{first}=/root", second, str(third), fourth]
    captions = read_training(sources)
    assert listed(captions) == [
        ("/root/1.mp4", "one"),
        ("/x/2.mp4", "two"),
        ("3.jpg", "three"),
        ("s3://bucket/4.jpg", "four"),
        ("5.mp4", "five, with a comma"),
        ("6, a.mp4", "six, too"),
        (f"{fourth}/6.mp4", "six"),
        (f"{fourth}/7.jpg", "seven"),
    ]
    assert captions.idx.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]  # as published, numbers repeat across sources
    assert read_training(sources, "distinct").idx.tolist() == list(range(8))


def test_the_index_of_prepared_copies_carries_captions(tmp_path):
    from umt_fast.data.index import write_index

    (tmp_path / "index.jsonl").write_bytes(write_index([{"path": "a.mp4", "caption": "of a", "label": 3}]))
    captions = read_training([str(tmp_path)])
    assert listed(captions) == [(f"{tmp_path}/a.mp4", "of a")]
    assert captions.videos[0].label == 3


def test_prepared_copies_carry_the_captions_of_a_list(tmp_path, demo_videos):
    from umt_fast.data.prepare import Recipe, Settings, prepare

    video = demo_videos.read_text().split(",")[0]
    source = write_json(tmp_path / "a.json", [{"video": video, "caption": text} for text in ("one", "two")])
    prepare(Settings(source, str(tmp_path / "out"), Recipe("h264", short_side=32), workers=1))
    captions = read_training([str(tmp_path / "out")])
    assert [video.caption for video in captions.videos] == ["one", "two"]
    assert captions.idx.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.json", ("a.json", "", 1.0)),
        ("a.json=/r", ("a.json", "/r", 1.0)),
        ("a.json=/r*2.5", ("a.json", "/r", 2.5)),
        ("a*b.json", ("a*b.json", "", 1.0)),
    ],
)
def test_how_a_source_is_written(text, expected):
    source = Source.parse(text)
    assert (source.path, source.root, source.weight) == expected


def test_weights_repeat_or_shorten_a_source(tmp_path):
    path = write_json(tmp_path / "a.json", [{"image": f"{i}.jpg", "caption": str(i)} for i in range(4)])
    assert read_training([f"{path}*2.5"]).idx.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert read_training([f"{path}*0.5"]).idx.tolist() == [0, 1]
    other = write_json(tmp_path / "b.json", [{"image": f"{i}.jpg", "caption": str(i % 3)} for i in range(5)])
    assert read_training([path, other], same_caption=True).idx.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    with pytest.raises(CaptionError, match="weight of a source must be above 0"):
        read_training([f"{path}*0"])


def test_retrieval_lists_number_base_names_or_captions(tmp_path):
    path = write_json(
        tmp_path / "train.json",
        [
            {"video": "a/1.mp4", "caption": ["x", "y"]},
            {"video": "b/1.mp4", "caption": "z"},
            {"video": "2.mp4", "caption": "x"},
        ],
    )
    captions = read_retrieval_training([path])
    assert listed(captions) == [("a/1.mp4", "x"), ("a/1.mp4", "y"), ("b/1.mp4", "z"), ("2.mp4", "x")]
    assert captions.idx.tolist() == [0, 0, 0, 1]
    assert read_retrieval_training([path], identity="distinct").idx.tolist() == [0, 0, 1, 2]
    assert read_retrieval_training([path], same_caption=True).idx.tolist() == [0, 1, 2, 0]
    assert [video.caption for video in read_retrieval_training([path], join=True).videos] == ["x y", "z", "x"]


def test_retrieval_tests_keep_what_belongs_together(tmp_path):
    path = write_json(
        tmp_path / "test.json",
        [{"video": "1.mp4", "caption": ["A dog!", "a cat"]}, {"video": ["2.mp4", "3.mp4"], "caption": "push"}],
    )
    found = read_retrieval(path)
    assert found.texts == ["a dog", "a cat", "push"]
    assert found.texts_of_videos == [[0, 1], [2], [2]]
    assert read_retrieval(path, join=True).texts == ["a dog a cat", "push"]


def test_questions_and_answers(tmp_path):
    path = write_json(
        tmp_path / "qa.json",
        [
            {"video": "1.mp4", "question": "who?", "question_id": 7, "answer": "a man"},
            {"video": "2.mp4", "question": "what?", "answer": ["dog", "dog", "cat"]},
        ],
    )
    first, second = read_questions(f"{path}=/v")
    assert (first.path, first.number, first.answers) == ("/v/1.mp4", "7", ("a man",))
    assert (second.number, second.answers) == ("1", ("dog", "dog", "cat"))
    assert read_answers(write_json(tmp_path / "answers.json", ["dog", "cat", "dog"])) == ["dog", "cat"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.json", None, "cannot read .*none.json"),
        ("none.db", None, "no annotations at .*none.db"),
        ("a.db", b"this is not a database, however long it is made to be", "is not an SQLite file with a table"),
        ("empty.db", b"", "is not an SQLite file with a table"),
        ("a.json", b"[", "is not JSON"),
        ("A.JSON", b"[", "is not JSON"),
        ("a.json", b"{}", "holds a dict, not a list"),
        ("a.json", b"[]", "lists nothing"),
        ("a.json", b'[{"caption": "x"}]', "entry 0 has no video or image"),
        ("a.json", b'[{"video": "1.mp4"}]', "entry 0 has no caption"),
        ("a.json", b'[{"video": "1.mp4", "caption": 3}]', "entry 0: caption = '3' is not a string"),
        ("a.json", b'[{"video": "1.mp4", "caption": ["x", "y"]}]', "pre-training takes one file and one caption"),
        ("a.csv", b"1.mp4,x\n2.mp4\n", "a.csv, line 2: no caption"),
        ("a.tar", b"nothing of a tar", "cannot read the shard"),
    ],
)
def test_a_list_that_cannot_be_used_is_named(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RunError, match=says):
        read_training([str(tmp_path / name)])


def test_sqlite_rows_must_be_as_published(tmp_path):
    with pytest.raises(CaptionError, match="id 5 in place 1"):
        read_training([write_sqlite(tmp_path / "a.db", [(0, "1.jpg", "x"), (5, "2.jpg", "y")])])
    before = (tmp_path / "a.db").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.db"]  # nothing is written beside it
    assert before == (tmp_path / "a.db").read_bytes()


@pytest.mark.parametrize("content", ["{}", "[3]", '["a", ""]', "[]"])
def test_answers_that_are_not_a_list_are_refused(tmp_path, content):
    (tmp_path / "answers.json").write_text(content)
    with pytest.raises(CaptionError, match=r"answers\.json"):
        read_answers(str(tmp_path / "answers.json"))


def test_a_source_without_existing_files_is_refused(tmp_path):
    (tmp_path / "a.mp4").touch()
    for name in ("there", "gone"):
        (tmp_path / f"{name}.json").write_text(json.dumps([{"video": f"{n}.mp4", "caption": "x"} for n in "abc"]))
    good, bad = f"{tmp_path}/there.json={tmp_path}*2", f"{tmp_path}/gone.json=/nowhere"
    captions.check_files((found := captions.read_training([good])).videos, found.starts)
    for found in (captions.read_training([good, bad]), captions.read_retrieval_training([good, bad])):
        with pytest.raises(
            ManifestError, match=r"first 3 files of .*gone.json is there.*'/nowhere/a.mp4'.*gone.json=RO"
        ):
            captions.check_files(found.videos, found.starts)
