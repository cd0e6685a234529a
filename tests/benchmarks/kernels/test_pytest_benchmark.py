"""The kernels' cases under pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_cases_run_and_are_kept(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = ["-m", "pytest", "-q", "benchmarks/kernels", "-k", "cls_scores and eager", "-p", "no:xdist"]
    outside = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}  # xdist's, above all
    environment = {**outside, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, *command, "--benchmark-json", str(tmp_path / "out.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert found
    assert all("cls_scores" in entry["name"] and entry["stats"]["median"] > 0 for entry in found)
