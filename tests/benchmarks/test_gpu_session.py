"""The stages of a GPU session: cut off in time, taken up again, not repeated."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_session
from benchmarks.environment import _commit, sources_digest
from benchmarks.gpu_session import Stage, run, stages
from benchmarks.step_time import __main__ as step_time


def python(code: str, name: str = "a stage") -> Stage:
    return Stage(name, (sys.executable, "-c", code))


def test_a_finished_stage_is_not_repeated_for_the_same_commit(tmp_path):
    stage = python(f"open({str(tmp_path / 'runs')!r}, 'a').write('x'); print('hello')")
    assert run(stage, tmp_path, "abc") == "done"
    assert run(stage, tmp_path, "abc") == "done before"
    assert (tmp_path / "runs").read_text() == "x"
    assert run(stage, tmp_path, "def") == "done"
    assert run(stage, tmp_path, "def+") == "done"  # uncommitted changes: never taken for done
    assert run(stage, tmp_path, "def+") == "done"
    assert (tmp_path / "runs").read_text() == "xxxx"
    assert (tmp_path / "logs" / "a_stage.log").read_text() == "hello\n"


def test_a_failed_or_slow_stage_is_tried_again(tmp_path):
    assert run(python("import sys; print('why'); sys.exit(3)"), tmp_path, "abc").startswith("failed with 3; see ")
    assert (tmp_path / "logs" / "a_stage.log").read_text() == "why\n"
    assert run(python("import time; time.sleep(60)"), tmp_path, "abc", limit=0.2) == "out of time after 0 s"
    assert run(python("pass"), tmp_path, "abc") == "done"


def test_a_stage_that_is_out_of_time_writes_what_it_has_or_is_killed_with_its_children(monkeypatch, tmp_path):
    writes = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('what I have')"
    assert run(python(writes), tmp_path, "abc", limit=3).startswith("out of time")
    assert (tmp_path / "logs" / "a_stage.log").read_text() == "what I have\n"
    deaf = "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    deaf += "child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    monkeypatch.setattr(gpu_session, "GRACE", 1)
    assert run(python(deaf), tmp_path, "abc", limit=3).startswith("out of time")
    child = int((tmp_path / "logs" / "a_stage.log").read_text())
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return "State:\tZ" not in Path("/proc", str(process), "status").read_text()
    except FileNotFoundError:
        return False


def test_every_stage_names_something_that_is_there(tmp_path):
    for stage in stages(tmp_path):
        module, targets = stage.command[2], stage.command[3:]
        if module == "pytest":
            files = [target for target in targets if target.startswith(("tests", "kernels", "benchmarks"))]
            assert files
            assert all((gpu_session.ROOT / file).exists() for file in files)
        else:
            assert importlib.util.find_spec(module) is not None
    for stage in (s for s in stages(tmp_path) if "step_time" in s.command[2]):
        with pytest.raises(SystemExit, match=r"none.json is not a step_time.json"):  # so its options are known
            step_time.main([*stage.command[3:], "--from", str(tmp_path / "none.json")])


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu_session.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU"):
        gpu_session.main()


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
