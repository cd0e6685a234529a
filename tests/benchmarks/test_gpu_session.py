"""A GPU session: its stages end in time and keep their results, and the next call continues."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_session, gpu_session_page
from benchmarks.environment import _commit, sources_digest
from benchmarks.gpu_session import PARTS, Session, Stage, stages
from benchmarks.input_pipeline import __main__ as input_pipeline
from benchmarks.kernels import __main__ as kernels
from benchmarks.step_time import __main__ as step_time
from benchmarks.step_time.ladder import BEST

ROOT = gpu_session.ROOT


def python(code: str, limit: float = 60) -> Stage:
    return Stage("a stage", (sys.executable, "-c", code), limit)


@pytest.fixture
def session(tmp_path):
    (tmp_path / "work").mkdir()
    with open(tmp_path / "session.log", "w") as log:
        facts = {"sources": "abc", "device": "NVIDIA H200", "rehearsal": False}
        yield Session(tmp_path, tmp_path / "work", 600, facts, log)


def saved(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "session.json").read_text())


def write_part(session: Session, part: str, content: dict) -> Path:
    path = session.work / PARTS[part]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_a_stage_ends_with_its_state_and_its_output_in_the_log(session, tmp_path):
    assert session.run(python("print('hello')")).state == "done"
    assert session.run(python("import sys; print('why'); sys.exit(3)")).state == "failed with 3; see session.log"
    log = (tmp_path / "session.log").read_text()
    assert log.index("hello") < log.index("why")
    assert [stage["state"] for stage in saved(tmp_path)["stages"]] == ["done", "failed with 3; see session.log"]


def test_a_stage_out_of_time_keeps_what_it_wrote(session, tmp_path):
    path = write_part(session, "kernels", {"results": [1]})
    code = f"import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n open({str(path)!r}, 'w').write('[2]')"
    assert session.run(python(code, limit=3)).state == "out of time"
    assert saved(tmp_path)["kernels"] == [2]


def test_results_are_saved_while_a_stage_runs(session, tmp_path, monkeypatch):
    """So that a killed session keeps its results."""
    monkeypatch.setattr(gpu_session, "SAVE_EVERY", 0.1)
    seen = []
    save = session.save
    monkeypatch.setattr(session, "save", lambda: (save(), seen.append(saved(tmp_path))))
    path = session.work / PARTS["smoke"]
    path.parent.mkdir(parents=True)
    session.run(python(f"open({str(path)!r}, 'w').write('[1]'); import time; time.sleep(1)"))
    assert {"smoke": [1], "stages": [{"name": "a stage", "state": "running", "seconds": 0.0}]}.items() <= seen[
        -2
    ].items()


def test_a_stage_that_ignores_its_interrupt_is_killed_with_its_children(session, tmp_path, monkeypatch):
    deaf = "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    deaf += "child = subprocess.Popen(['sleep', '60']); print('child', child.pid, flush=True); child.wait()"
    monkeypatch.setattr(gpu_session, "GRACE", 1)
    assert session.run(python(deaf, limit=2)).state == "out of time"
    child = int((tmp_path / "session.log").read_text().split("child ")[-1])
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path("/proc", str(process), "status").read_text()
    except FileNotFoundError:
        return False


def test_no_stage_begins_without_time_left(session):
    session.deadline = time.monotonic() + gpu_session.LEAST - 1
    assert session.run(python("raise SystemExit(1)")).state == "not begun: no time left"


def test_a_stage_whose_packages_are_missing_is_left_out(session, tmp_path):
    stage = Stage("decoding", (sys.executable, "-c", "raise SystemExit(1)"), needs=("json", "no_such_package"))
    assert session.run(stage).state == "left out: needs no_such_package"
    assert saved(tmp_path)["stages"][-1]["state"] == "left out: needs no_such_package"


def test_a_session_ends_by_itself_and_leaves_three_files(tmp_path, monkeypatch, capsys):
    """Here of a second, with a stage that would take a minute."""
    monkeypatch.setattr(gpu_session, "RESERVE", 0)
    monkeypatch.setattr(gpu_session, "LEAST", 0)
    monkeypatch.setattr(gpu_session, "GRACE", 1)
    monkeypatch.setattr(gpu_session, "stages", lambda _work, _rehearse: [python("import time; time.sleep(60)")] * 2)
    begun = time.monotonic()
    with pytest.raises(SystemExit, match="the same command continues"):
        gpu_session.main(["--rehearse", "--minutes", "0.03", "--out", str(tmp_path)])
    assert time.monotonic() - begun < 30
    assert sorted(path.name for path in tmp_path.iterdir()) == ["session.json", "session.log", "session.md"]
    assert "| a stage | out of time |" in (tmp_path / "session.md").read_text()


def test_a_request_to_end_leaves_the_results_too(tmp_path):
    code = "import sys; from benchmarks import gpu_session as g; "
    code += "g.stages = lambda *_: [g.Stage('long', (sys.executable, '-c', 'import time; time.sleep(60)'))]; "
    code += f"g.main(['--rehearse', '--out', {str(tmp_path)!r}])"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "session.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    assert "ended by signal 15" in child.communicate(timeout=60)[1]
    assert (tmp_path / "session.md").exists()


def test_a_killed_session_leaves_a_page_and_no_stage(tmp_path):
    """After kill -9 the results can be read, no stage runs on the GPU, and the next call continues."""
    measured = {"facts": {"sources": "abc"}, "results": []}
    stage = "import os, pathlib, time; pathlib.Path(os.environ['PID']).write_text(str(os.getpid())); time.sleep(60)"
    code = "import sys; from benchmarks import gpu_session as g; g.SAVE_EVERY = 0.1; "
    code += f"g.stages = lambda *_: [g.Stage('long', (sys.executable, '-c', {stage!r}))]; "
    code += f"g.main(['--rehearse', '--out', {str(tmp_path)!r}])"
    (tmp_path / "session.json").write_text(json.dumps({"kernels": measured}))
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PID": str(tmp_path / "pid")}
    child = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "session.md").exists() and (tmp_path / "pid").exists()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.kill()
    child.wait()
    assert saved(tmp_path)["kernels"] == measured
    assert saved(tmp_path)["stages"][0]["state"] == "running"
    assert "| long | running |" in (tmp_path / "session.md").read_text()
    process = int((tmp_path / "pid").read_text())
    while is_alive(process):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert gpu_session.read_before(tmp_path)[0]["kernels"] == measured


def test_the_next_session_goes_on_from_results_of_the_same_sources(session, tmp_path):
    old = {part: {"facts": {"sources": "abc"}, "results": [part]} for part in PARTS}
    session.seed(old)
    for part, place in PARTS.items():
        assert json.loads((session.work / place).read_text()) == old[part]
    assert session.run(Stage("decoding", (sys.executable, "-c", "raise SystemExit(1)"))).state == "done before"
    other = Session(tmp_path, tmp_path / "other", 600, {**session.content["facts"], "sources": "def"}, io.StringIO())
    other.seed(old)
    assert not (other.work / PARTS["decoding"]).exists()
    assert (other.work / PARTS["kernels"]).exists()  # whose command compares the sources itself


def test_the_folder_of_the_call_comes_before_that_of_the_tree(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    assert gpu_session.read_before(one, two) == ({}, None)
    (two / "session.json").write_text('{"a": 2}')
    assert gpu_session.read_before(one, two) == ({"a": 2}, two)
    (one / "session.json").write_text("{")
    assert gpu_session.read_before(one, two)[1] == two
    assert "session.json is not used" in capsys.readouterr().out
    (one / "session.json").write_text('{"a": 1}')
    assert gpu_session.read_before(one, two) == ({"a": 1}, one)


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python cannot unpack an archive safely")
def test_compiled_kernels_are_kept_where_they_fit(tmp_path, monkeypatch):
    work, archive = tmp_path / "work", tmp_path / "compile_cache.tar.gz"
    (work / "cache" / "triton").mkdir(parents=True)
    (work / "cache" / "triton" / "kernel").write_bytes(os.urandom(4096))
    monkeypatch.setattr(gpu_session, "LARGEST_CACHE", 2048)
    assert "left out" in gpu_session.pack_cache(work, archive)
    assert not archive.exists()
    monkeypatch.undo()
    assert gpu_session.pack_cache(work, archive) == "compile cache: 0.0 MiB"
    gpu_session.unpack_cache(archive, tmp_path / "next")
    kept = tmp_path / "next" / "cache" / "triton" / "kernel"
    assert kept.read_bytes() == (work / "cache" / "triton" / "kernel").read_bytes()
    archive.write_bytes(b"not an archive")
    gpu_session.unpack_cache(archive, tmp_path / "bad")


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_stage_is_a_command_with_known_options(rehearse, tmp_path, monkeypatch):
    monkeypatch.setattr(step_time.torch.cuda, "is_available", lambda: not rehearse)
    modules = {"step_time": step_time, "kernels": kernels, "input_pipeline": input_pipeline}
    names = []
    for stage in stages(tmp_path, rehearse):
        module, arguments = stage.command[3], stage.command[4:]
        assert importlib.util.find_spec(module) is not None
        modules[module.removeprefix("benchmarks.")].parse([*arguments])
        names.append(stage.name)
    assert [name.split(":")[0] for name in names] == [
        *["smoke"] * 2,
        *["best"] * 2,
        *["ladder"] * 2,
        "kernels",
        "decoding",
    ]
    assert [name for name in names if "UMT" in name] == sorted((n for n in names if "UMT" in n), key=lambda n: n[0])


def test_a_session_without_a_gpu_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_session.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"PyTorch sees no CUDA GPU.*--rehearse"):
        gpu_session.main([])
    for arguments, message in (
        (["--minutes", "0.1"], "--minutes 0.1: must be above"),
        (["--rehearse"], "give a folder"),
    ):
        with pytest.raises(SystemExit):
            gpu_session.main(arguments)
        assert message in capsys.readouterr().err


def session_content() -> dict:
    rung = {"model": "umt_b16", "batch": 64, "precision": "bf16", "not_run": None, "losses": [2.0]}
    times = {"baseline": 0.1, "+ lean math": 0.06, "+ fused kernels": 0.061, BEST: 0.05}
    results = [{**rung, "rung": name, "seconds": seconds} for name, seconds in times.items()]
    results.append({**rung, "rung": "+ fp8 teacher", "seconds": None, "not_run": "refused: the loss"})
    facts = {"device": "NVIDIA H200", "torch": "2", "triton": "3", "commit": "abc", "sources": "def"}
    op = {"op": "cls_scores", "form": "last block", "direction": "forward", "model": "umt_b16", "batch": 64}
    op |= {"least_bytes": 10**9, "flops": 0, "not_run": None}
    contenders = [{**op, "contender": name, "seconds": s} for name, s in (("triton", 3e-4), ("compiled", 2e-4))]
    return {
        "facts": {**facts, "date": "today", "rehearsal": False},
        "stages": [{"name": "kernels", "state": "done", "seconds": 1.0}],
        "step_time": {
            **facts,
            "job": "pretrain",
            "gemm_flops_per_second": {"bf16": 790e12},
            "copy_bytes_per_second": 4.3e12,
            "results": results,
        },
        "kernels": {"facts": {**facts, "copy_bytes_per_second": 4.3e12}, "results": contenders},
        "checks": {"facts": facts, "results": [{**contenders[0], "seconds": None, "not_run": "refused: off by nan"}]},
    }


def test_the_page_says_what_was_predicted_measured_and_what_to_delete():
    text = gpu_session_page.page(session_content())
    (line,) = [line for line in text.splitlines() if line.startswith(f"| umt_b16 | 64 | {BEST} |")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    predicted, measured, error = float(cells[3]), float(cells[4]), cells[5]
    assert 30 < predicted < 100
    assert measured == 50.0
    assert error == f"{100 * (predicted / 50 - 1):+.0f}%"
    assert cells[6:] == ["2.00x", "keep: 1.22x over + fused kernels"]
    deletions = text.split("## What to delete")[1]
    assert deletions.count("\n- ") == 2
    assert "- rung + fused kernels on umt_b16: delete: 0.98x over + lean math" in deletions
    assert "- cls_scores (last block), forward, umt_b16: delete: compiled is 1.50x faster" in deletions
    assert "refused: the loss" in text
    assert "0 of 1 right" in text
    assert f"| {1e6 * 1e9 / 4.3e12:.1f} | 300.0 |" in text  # predicted and measured microseconds
    bare = {"facts": session_content()["facts"], "stages": []}
    assert "Nothing so far." in gpu_session_page.page(bare)


def test_results_do_not_change_the_commit_but_sources_do(tmp_path):
    source, result = tmp_path / "umt_fast" / "a.py", tmp_path / "benchmarks" / "results" / "h200.json"
    for path in (source, result):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    assert _commit(tmp_path) == "unknown"
    before = sources_digest(tmp_path)
    result.write_text("2")
    assert sources_digest(tmp_path) == before
    source.write_text("2")
    assert sources_digest(tmp_path) != before

    def git(*words: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
        subprocess.run(("git", *who, *words), cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    commit = _commit(tmp_path)
    assert len(commit) == 12
    result.write_text("3")
    assert _commit(tmp_path) == commit
    source.write_text("3")
    assert _commit(tmp_path) == commit + "+"
