"""The index beside the videos of a search may come from their author: it is not trusted."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from umt_fast.evaluation.search import SearchError, SearchIndex, read_index, refuse_links, save_index


def index(rows: list[int], width: int = 3, second: float = 1.0) -> SearchIndex:
    seconds = np.full((len(rows), 2), second)
    return SearchIndex(np.array(rows, np.int64), seconds, torch.ones(len(rows), width), [("a.mp4", "no")])


def test_an_index_is_read_for_its_key(tmp_path):
    path = tmp_path / "new" / "index.safetensors"
    save_index(path, index([0, 1, 1]), "key")
    found = read_index(path, "key", 2, 3)
    assert found is not None
    assert found.rows.tolist() == [0, 1, 1]
    assert found.bad == [("a.mp4", "no")]
    assert read_index(path, "other", 2, 3) is None


@pytest.mark.parametrize(
    "wrong",
    [
        index([0, 2]),
        index([-1]),
        index([0], width=4),
        index([0], second=float("nan")),
        SearchIndex(np.zeros(1, np.int64), np.zeros((1, 2)), torch.full((1, 3), float("inf")), []),
        SearchIndex(np.zeros(2, np.int64), np.zeros((1, 2)), torch.ones(1, 3), []),
    ],
)
def test_an_index_that_does_not_fit_is_made_again(tmp_path, wrong):
    save_index(tmp_path / "index.safetensors", wrong, "key")
    assert read_index(tmp_path / "index.safetensors", "key", 2, 3) is None


@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_an_index_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "index.safetensors")
    assert read_index(tmp_path / "index.safetensors", "key", 2, 3) is None


@pytest.mark.parametrize("name", ["", "found.png", ".index.safetensors.new"])
def test_a_link_beside_the_videos_leads_nothing_elsewhere(tmp_path, name):
    folder, other = tmp_path / "videos" / ".umt-fast-search", tmp_path / "other"
    other.mkdir()
    (folder if name else folder.parent).mkdir(parents=True)
    (folder / name if name else folder).symlink_to(other)
    with pytest.raises(SearchError, match="is a link; remove it"):
        refuse_links(folder)
    refuse_links(tmp_path / "fresh")
