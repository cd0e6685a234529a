"""The committed leaderboard matches the committed results."""

from __future__ import annotations

import copy
import json

from benchmarks import leaderboard
from benchmarks.environment import RESULTS
from benchmarks.step_time import report


def test_the_committed_page_is_up_to_date():
    assert (RESULTS / leaderboard.NAME).read_text() == leaderboard.page(), "run `python -m benchmarks.leaderboard`"


def test_the_fastest_exact_rung_of_each_model_is_listed(tmp_path):
    content = report.read(RESULTS / "cpu" / "pretrain" / "step_time.json")
    base = next(result for result in content["results"] if result["rung"] == "baseline")
    graph = {**copy.deepcopy(base), "rung": "+ CUDA graph", "seconds": base["seconds"] / 4, "gemm_share": 0.6}
    fp8 = {**graph, "rung": "+ fp8 teacher", "seconds": base["seconds"] / 5}
    other = {**base, "model": "umt_l16", "seconds": None}
    content |= {"device": "NVIDIA H200", "results": [base, graph, fp8, other]}
    (tmp_path / "h200" / "pretrain").mkdir(parents=True)
    (tmp_path / "h200" / "pretrain" / "step_time.json").write_text(json.dumps(content))
    text = leaderboard.page(tmp_path)
    assert "| [NVIDIA H200](h200/pretrain/step_time.md) | pretrain | umt_b16 | 2 | + CUDA graph |" in text
    assert "| 4.00x | 60 |" in text
    assert text.count("NVIDIA") == 1
    assert "No GPU" not in text
    session = {"facts": {}, "step_time": {**content, "device": "NVIDIA A100-SXM4-80GB"}}
    (tmp_path / "a100").mkdir()
    (tmp_path / "a100" / "session.json").write_text(json.dumps(session))
    assert "[NVIDIA A100-SXM4-80GB](a100/session.md)" in leaderboard.page(tmp_path)
