"""What is kept of a run: the GPU but not the host's name, the quartiles but not every round."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import environment


@pytest.hookimpl(optionalhook=True)  # so that the folder can be collected without pytest-benchmark
def pytest_benchmark_update_machine_info(config: object, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)
    machine_info["gpu"] = environment.describe()["device"]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: object, benchmarks: object, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
