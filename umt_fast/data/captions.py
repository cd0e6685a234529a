"""Lists of videos and pictures with captions, for pre-training, retrieval and question answering.

A source is one of

    .json              a list of {"image" or "video": path, "caption": text or list of texts}, as published
    .sqlite .db ...    SQLite: a table `annos` with the columns id, file name, caption, as published; read only
    .csv .tsv          a line for each: path, then the caption, separated by the first comma or tab
    shards, an index   what `umt_fast.data.manifest` reads; captions are the .txt members or "caption" in the .json
                       members of a shard, or the captions of the index

written as `SOURCE`, or as `SOURCE=ROOT` to let relative paths start from ROOT. A suffix `*2.5` visits the source two
and a half times per epoch.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import posixpath
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from umt_fast.config import DataConfig
from umt_fast.data import manifest
from umt_fast.data.decode import IMAGE_SUFFIXES
from umt_fast.data.index import VideoList
from umt_fast.data.list_forms import VIDEO_SUFFIXES
from umt_fast.data.manifest import read_manifest, shard_rows
from umt_fast.data.storage import read
from umt_fast.data.tokens import clean_text
from umt_fast.data.video import DEFAULT_LIMITS, Limits, Video, is_url
from umt_fast.errors import RunError
from umt_fast.files import expand_home

if TYPE_CHECKING:
    from jaxtyping import Int

Identity = Literal["published", "distinct"]


class CaptionError(RunError, ValueError):
    """A list of captions, questions or answers is invalid."""


@dataclass(frozen=True)
class Annotation:
    """One entry of a list."""

    paths: tuple[str, ...]
    """One path; several if videos share a caption."""
    captions: tuple[str, ...]
    row: dict[str, Any] | None = None
    """Other facts about the video, as in a row of an index."""


@dataclass(frozen=True)
class Source:
    """A source as it is written in the settings."""

    path: str
    root: str = ""
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Source:
        head, star, tail = text.rpartition("*")
        weight = 1.0
        if star:
            with contextlib.suppress(ValueError):  # the star may belong to a name
                weight, text = float(tail), head
        if not 0 < weight <= 1000:
            raise CaptionError(f"{text}*{weight}: the weight of a source must be above 0 and at most 1000")
        path, _, root = text.partition("=")
        return cls(path, root, weight)


@dataclass(frozen=True)
class CaptionList:
    """The videos of a training list; each row of `videos` has its caption."""

    videos: VideoList
    idx: Int[np.ndarray, " n"]
    """Rows with equal numbers match each other: they are positives in the contrast and no negatives."""
    starts: tuple[tuple[str, int], ...] = ()
    """Each source as it is written in the settings, and its first row."""

    def __len__(self) -> int:
        return len(self.videos)


@dataclass(frozen=True)
class RetrievalSet:
    """The videos and texts of a retrieval test."""

    videos: VideoList
    texts: list[str]
    """Texts after `clean_text`."""
    texts_of_videos: list[list[int]]
    """Indices of the texts that match each video."""


def check_files(videos: Sequence[Video], starts: Iterable[tuple[str, int]]) -> None:
    """Raise ManifestError if none of the first files of a source exists. `starts`: as in CaptionList."""
    for (text, first), (_, end) in itertools.pairwise((*starts, ("", len(videos)))):
        source = Source.parse(text)
        listed = [videos[row] for row in range(first, min(end, first + manifest.FIRST_LINES))]
        start = source.root or os.getcwd()
        manifest.check_files(
            listed,
            source.path,
            advice=f"relative paths start from {start!r}; give another folder as {source.path}=ROOT",
        )


def read_annotations(source: Source, read_timeout: float = DataConfig.read_timeout) -> list[Annotation]:
    """The entries of a source. Raises CaptionError naming the file and the entry, ManifestError for bad shards
    or a bad index."""
    suffix = posixpath.splitext(source.path)[1].lower()
    if ".json" in posixpath.basename(source.path).lower() and suffix != ".jsonl":
        found = list(_of_json(source, read_timeout))
    elif suffix in (".csv", ".tsv"):
        found = list(_of_lines(source, "\t" if suffix == ".tsv" else ",", read_timeout))
    elif suffix == ".tar":
        found = list(_of_rows(source, shard_rows(source.path, VIDEO_SUFFIXES | IMAGE_SUFFIXES, read_timeout)))
    elif suffix == ".jsonl" or os.path.isdir(source.path):
        found = list(_of_rows(source, read_manifest(source.path, source.root, read_timeout).rows()))
    else:
        found = list(_of_sqlite(source))
    if not found:
        raise CaptionError(f"{source.path} lists nothing")
    return found


def read_training(
    sources: Sequence[str],
    identity: Identity = "published",
    read_timeout: float = DataConfig.read_timeout,
    same_caption: bool = False,
) -> CaptionList:
    """The list of a pre-training run: one row per entry, with one caption.

    identity      published: a row's number is its index within its source, so rows of different sources with the same
                  index match each other; distinct: every entry has its own number.
    same_caption  overrides `identity`: rows with equal raw captions match each other.
    Raises CaptionError.
    """
    rows: list[dict[str, Any]] = []
    numbers: list[np.ndarray] = []
    starts, first = [], 0
    for text in sources:
        source = Source.parse(text)
        entries = read_annotations(source, read_timeout)
        several = next((i for i, entry in enumerate(entries) if len(entry.captions) > 1 or len(entry.paths) > 1), None)
        if several is not None:
            raise CaptionError(f"{source.path}, entry {several}: pre-training takes one file and one caption an entry")
        count = max(round(len(entries) * source.weight), 1)
        chosen = np.resize(np.arange(len(entries)), count)
        starts.append((text, len(rows)))
        rows += [_row(entries[i], entries[i].paths[0], entries[i].captions[0]) for i in chosen]
        numbers.append(chosen + (first if identity == "distinct" else 0))
        first += len(entries)
    if not rows:
        raise CaptionError("no captions: give --data.images or --data.videos a list")
    idx = number_keys(row["caption"] for row in rows) if same_caption else np.concatenate(numbers).astype(np.int64)
    return CaptionList(_list(rows, read_timeout), idx, tuple(starts))


def read_videos(
    source: str, prefix: str = "", read_timeout: float = DataConfig.read_timeout, limits: Limits = DEFAULT_LIMITS
) -> VideoList:
    """Read a source of `read_manifest`, or a list with captions (.json, SQLite).

    A file with several captions gives one video per caption. Raises ManifestError or CaptionError.
    """
    if is_url(source) or posixpath.splitext(source)[1].lower() not in (".json", ".db", ".sqlite", ".sqlite3"):
        return read_manifest(source, prefix, read_timeout, limits)
    entries = read_annotations(Source(os.path.expanduser(source), prefix), read_timeout)
    rows = [_row(entry, path, caption) for entry in entries for path in entry.paths for caption in entry.captions]
    videos = _list(rows, read_timeout)
    videos.limits = limits
    return videos


def read_retrieval_training(
    sources: Sequence[str],
    join: bool = False,
    same_caption: bool = False,
    read_timeout: float = DataConfig.read_timeout,
    identity: Identity = "published",
) -> CaptionList:
    """The list of a retrieval fine-tuning: one row per file and caption.

    join          the captions of an entry become one text (paragraph retrieval: DiDeMo, ActivityNet).
    same_caption  rows with equal raw captions match each other (Something-Something V2); overrides `identity`.
    identity      published: rows whose files have the same base name match each other, in any folder; distinct: rows of
                  the same file match each other.
    """
    rows: list[dict[str, Any]] = []
    keys, starts = [], []
    for text in sources:
        starts.append((text, len(rows)))
        for entry in read_annotations(Source.parse(text), read_timeout):
            captions = (" ".join(entry.captions),) if join else entry.captions
            for path in entry.paths:
                for caption in captions:
                    rows.append(_row(entry, path, caption))
                    file = path if identity == "distinct" else posixpath.basename(path)
                    keys.append(caption if same_caption else file)
    return CaptionList(_list(rows, read_timeout), number_keys(keys), tuple(starts))


def number_keys(keys: Iterable[str]) -> Int[np.ndarray, " n"]:
    """A number for each key: equal keys get equal numbers, in order of first appearance."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def read_retrieval(source: str, join: bool = False, read_timeout: float = DataConfig.read_timeout) -> RetrievalSet:
    """The videos and texts of a test: one video per file, one text per caption. Raises CaptionError."""
    rows: list[dict[str, Any]] = []
    texts: list[str] = []
    right: list[list[int]] = []
    for entry in read_annotations(Source.parse(source), read_timeout):
        captions = (" ".join(entry.captions),) if join else entry.captions
        numbers = list(range(len(texts), len(texts) + len(captions)))
        texts += [clean_text(caption) for caption in captions]
        for path in entry.paths:
            rows.append(_row(entry, path, captions[0]))
            right.append(numbers)
    return RetrievalSet(_list(rows, read_timeout), texts, right)


@dataclass(frozen=True)
class Question:
    """A question about a video and what people answered."""

    path: str
    question: str
    number: str
    answers: tuple[str, ...]


def read_questions(source: str) -> list[Question]:
    """A JSON list of {"video", "question", "question_id", "answer": string or list}. Raises CaptionError."""
    parsed = Source.parse(source)
    questions = []
    for place, entry in enumerate(read_json_list(parsed.path)):
        where = f"{parsed.path}, entry {place}"
        path = entry.get("video", entry.get("image")) if isinstance(entry, dict) else None
        if not isinstance(path, str) or not isinstance(entry.get("question"), str):
            raise CaptionError(f"{where}: give an object with a video and a question")
        answers = _texts(entry.get("answer", []), where, "answer", may_be_empty=True)
        number = str(entry.get("question_id", place))
        questions.append(Question(join_root(parsed.root, path), entry["question"], number, answers))
    if not questions:
        raise CaptionError(f"{parsed.path} lists nothing")
    return questions


def read_answers(path: str) -> list[str]:
    """The answers to choose from: a JSON list of strings, each once. Raises CaptionError."""
    answers = read_json_list(path)
    if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
        raise CaptionError(f"{path} is not a list of answers: give a JSON list of strings, none of them empty")
    return list(dict.fromkeys(answers))


def read_json_list(path: str, read_timeout: float = DataConfig.read_timeout) -> list[Any]:
    """A JSON file that holds a list. Raises CaptionError."""
    try:
        content = json.loads(read(path if is_url(path) else os.path.expanduser(path), timeout=read_timeout))
    except OSError as error:
        raise CaptionError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CaptionError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, list):
        raise CaptionError(f"{path} holds a {type(content).__name__}, not a list of annotations")
    return content


def _of_json(source: Source, read_timeout: float) -> Iterator[Annotation]:
    for place, entry in enumerate(read_json_list(source.path, read_timeout)):
        where = f"{source.path}, entry {place}"
        if not isinstance(entry, dict):
            raise CaptionError(f"{where} is not an object with a file and a caption")
        files = entry.get("video", entry.get("image"))
        if files is None or "caption" not in entry:
            raise CaptionError(f"{where} has no {'caption' if files is not None else 'video or image'}")
        paths = _texts(files, where, "file")
        yield Annotation(
            tuple(join_root(source.root, path) for path in paths), _texts(entry["caption"], where, "caption")
        )


def _texts(value: Any, where: str, name: str, may_be_empty: bool = False) -> tuple[str, ...]:
    texts = tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(text, str) for text in texts) or not (texts or may_be_empty):
        raise CaptionError(f"{where}: {name} = {str(value)[:50]!r} is not a string or a list of strings")
    return texts


_LONGEST_ROW = 1 << 20
"""Bytes of an entry of an SQLite file."""


def _of_sqlite(source: Source) -> Iterator[Annotation]:
    path = expand_home(source.path)
    if not path.is_file():
        raise CaptionError(f"no annotations at {source.path}: no such file")
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            if hasattr(connection, "setlimit"):  # Python 3.11
                connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_ROW)
            connection.execute("PRAGMA trusted_schema = OFF")
            found = connection.execute("SELECT type, sql FROM sqlite_master WHERE name = 'annos'").fetchall()
            # A view can compute forever, and a virtual table runs an extension on untrusted data. The word VIRTUAL may
            # follow a comment, so it is searched for in the whole statement.
            if len(found) != 1 or found[0][0] != "table" or "VIRTUAL" in str(found[0][1]).upper():
                raise CaptionError(f"{path} is not an SQLite file with a table `annos` (id, file name, caption)")
            for place, (number, name, caption) in enumerate(connection.execute("SELECT * FROM annos ORDER BY 1")):
                if number != place:
                    raise CaptionError(f"{path}, table annos: id {number!r} in place {place}; ids must run from 0 on")
                if not isinstance(name, str) or not isinstance(caption, str):
                    raise CaptionError(f"{path}, table annos, id {number}: file name and caption must be text")
                yield Annotation((join_root(source.root, name),), (caption,))
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise CaptionError(
            f"{path} is not an SQLite file with a table `annos` (id, file name, caption): {error}"
        ) from None
    except ValueError as error:
        if isinstance(error, CaptionError):
            raise
        raise CaptionError(f"{path}: table annos must have the columns id, file name and caption: {error}") from None


def _of_lines(source: Source, separator: str, read_timeout: float) -> Iterator[Annotation]:
    try:
        content = read(source.path, timeout=read_timeout).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise CaptionError(f"cannot read the list {source.path}: {error.strerror or error}") from None
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            path, found, caption = line.strip().partition(separator)
            if path.startswith('"'):  # a quoted path may hold the separator, and doubled quotes
                path, *rest = next(csv.reader([line.strip()], delimiter=separator))
                found, caption = separator if rest else "", separator.join(rest)
            if not found:
                raise CaptionError(f"{source.path}, line {number}: no caption; give `path{separator}caption`")
            yield Annotation((join_root(source.root, path.strip()),), (caption.strip().strip('"'),))


def _of_rows(source: Source, rows: Iterable[dict[str, Any]]) -> Iterator[Annotation]:
    for row in rows:
        if not isinstance(row.get("caption"), str):
            raise CaptionError(f"{source.path}: {row.get('path')} has no caption")
        yield Annotation((row["path"],), (row["caption"],), row)


def _row(entry: Annotation, path: str, caption: str) -> dict[str, Any]:
    return {**(entry.row or {}), "path": path, "caption": caption}


def _list(rows: list[dict[str, Any]], read_timeout: float) -> VideoList:
    videos = VideoList.of_rows(rows)
    videos.read_timeout = read_timeout
    return videos


def join_root(root: str, path: str) -> str:
    """A path of a list, relative to the list's root unless it is absolute or a URL."""
    if is_url(path) or not root:
        return path
    return posixpath.join(root if is_url(root) else os.path.expanduser(root), path)
