"""Table, page and comparison of the measurements of `benchmarks.step_time`."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Content = dict[str, Any]
"""Content of step_time.json."""

K710_VIDEOS, K710_EPOCHS, K710_GPUS = 658_000, 200, 32
REGRESSION = 0.05
REFUSED = "refused"
CHECKED = "losses right"
OVERLAP = {"decode": "decode_seconds", "all-reduce": "all_reduce_seconds"}

HEADER = (
    *("model", "batch", "rung", "precision", "ms / step", "fastest", "speed-up", "clips/s", "TFLOP/s", "% of matmul"),
    *("peak GiB", "K710 days on 32", "data stall ms", "loss error", "allowed"),
)
OVERLAP_HEADER = ("model", "batch", "decode ms", "by", "all-reduce ms", "by")


def k710_days(clips_per_second: float) -> float:
    """Days for the published 200 epochs of K710's 658k videos on 32 devices of this speed."""
    return K710_VIDEOS * K710_EPOCHS / (K710_GPUS * clips_per_second) / 86400


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def copy_rate() -> float:
    """Bytes per second of a large copy on the GPU."""
    from benchmarks.kernels.timing import copy_bandwidth

    return copy_bandwidth()


def read(path: Path) -> Content:
    """A step_time.json. Raises SystemExit naming the file if it is something else."""
    try:
        content = json.loads(path.read_text())
        content["results"][0]["rung"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SystemExit(f"error: {path} is not a step_time.json: {error!r}") from None
    return {"job": "pretrain", **content}


def groups(content: Content) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The ladders, each of one model and batch, by title."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in content["results"]:
        found.setdefault(f"{result['model']}, batch {result['batch']}", []).append(result)
    yield from found.items()


def overlap_of(content: Content, result: dict[str, Any]) -> dict[str, Any]:
    """Times of the work that overlaps with a result's step; empty if it was not timed."""
    alike = (b for b in content.get("beside", ()) if (b["model"], b["batch"]) == (result["model"], result["batch"]))
    return next(alike, {})


def stall(content: Content, result: dict[str, Any]) -> float | None:
    """Seconds per step that a run would wait for its clips; None if decoding was not measured."""
    decode = overlap_of(content, result).get("decode_seconds")
    return None if decode is None else max(0.0, decode - result["seconds"])


def rows(content: Content) -> list[list[str]]:
    """Lines of the table, in the order of HEADER. Speed-ups are over the ladder's first measured rung."""
    lines = []
    for _, results in groups(content):
        first = next((result["seconds"] for result in results if result["seconds"]), None)
        for result in results:
            line = [result["model"], str(result["batch"]), result["rung"], result["precision"]]
            error = result.get("loss_error")
            losses = ["reference" if result.get("losses") else "", ""]
            if error is not None:
                losses = [f"{error:.4f}", f"{result['loss_tolerance']:g}"]
            if result["seconds"] is None:
                lines.append([*line, result["not_run"] or "", *[""] * (len(HEADER) - len(line) - 3), *losses])
                continue
            seconds, peak, waits = result["seconds"], result["peak_bytes"], stall(content, result)
            lines.append(
                [
                    *line,
                    f"{1e3 * seconds:.1f}",
                    f"{1e3 * min(result['samples']):.1f}",
                    f"{first / seconds:.2f}x",
                    f"{result['clips_per_second']:.2f}",
                    f"{result['model_flops'] / seconds / 1e12:.2f}",
                    f"{100 * result['gemm_share']:.0f}",
                    "" if peak is None else f"{peak / 2**30:.2f}",
                    f"{k710_days(result['clips_per_second']):.3g}" if content["job"] == "pretrain" else "",
                    _milliseconds(waits),
                    *losses,
                ]
            )
    return lines


def overlap_rows(content: Content) -> list[list[str]]:
    """Lines of the table of decoding and the all-reduce, in the order of OVERLAP_HEADER."""
    return [
        [
            *(found["model"], str(found["batch"]), _milliseconds(found["decode_seconds"]), found["decode"]),
            *(_milliseconds(found["all_reduce_seconds"]), found["all_reduce"]),
        ]
        for found in content.get("beside", ())
    ]


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.1f}"


def table(content: Content) -> str:
    """The rungs as Markdown."""
    return markdown(*filled(HEADER, rows(content)))


def overlap_table(content: Content) -> str:
    """Decoding and the all-reduce as Markdown; empty if neither was timed."""
    lines = overlap_rows(content)
    return markdown(OVERLAP_HEADER, lines) if lines else ""


def filled(header: Sequence[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The table without its empty columns."""
    kept = [column for column in range(len(header)) if any(line[column] for line in lines)]
    return [header[column] for column in kept], [[line[column] for column in kept] for line in lines]


def markdown(header: Sequence[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in ([*header], ["---"] * len(header), *lines))


def refusals(content: Content) -> list[str]:
    """Lines about rungs whose losses differ from the reference's."""
    return [
        f"{result['model']}, batch {result['batch']}, {result['rung']}: {result['not_run']}"
        for result in content["results"]
        if (result["not_run"] or "").startswith(REFUSED)
    ]


def facts(content: Content) -> str:
    """Device, versions, date and matmul rate of a measurement."""
    gemm = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in content["gemm_flops_per_second"].items())
    return (
        f"{content['device']} ({content['threads']} CPU threads), torch {content['torch']}, commit "
        f"{content['commit']}, {content['date']}. A large matmul in the same run: {gemm}."
    )


def regressions(old: Content, new: Content) -> list[str]:
    """Lines about rungs over 5% slower than in `old`. Raises SystemExit for a measurement of another device."""
    if old["device"] != new["device"]:
        raise SystemExit(f"error: {old['device']} and {new['device']} are not compared; give a file of the same device")
    before = {(r["model"], r["batch"], r["rung"]): r["seconds"] for r in old["results"]}
    slower = []
    for result in new["results"]:
        key = (result["model"], result["batch"], result["rung"])
        then, now = before.get(key), result["seconds"]
        if then and now is None:
            slower.append(f"{key[0]}, batch {key[1]}, {key[2]}: {1e3 * then:.1f} ms, now {result['not_run']}")
        elif then and now > then * (1 + REGRESSION):
            change = 100 * (now / then - 1)
            slower.append(
                f"{key[0]}, batch {key[1]}, {key[2]}: {1e3 * then:.1f} -> {1e3 * now:.1f} ms (+{change:.0f}%)"
            )
    return slower
