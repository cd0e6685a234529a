"""A run is restored exactly or ends with an error; damaged checkpoints are renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from umt_fast.config import OptimConfig, PretrainConfig, RunConfig
from umt_fast.errors import RunError
from umt_fast.files import put_in_place
from umt_fast.run import checkpoint, train_state
from umt_fast.run.checkpoint import find_checkpoint
from umt_fast.run.launch import check_alike
from umt_fast.run.lost_rank import RandomStates, save_if_lost
from umt_fast.run.optim import build_optimizer
from umt_fast.run.train_state import TrainState
from umt_fast.run.world import World
from umt_fast.weights import WeightsError

ALONE = World(0, 1, torch.device("cpu"))
CONFIG = PretrainConfig()


def new_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 1))
    return TrainState(model, build_optimizer(model, OptimConfig()), ALONE, CONFIG, {"videos": 8}, {"student": "math"})


def step(state: TrainState) -> None:
    state.model(torch.randn(4, 3)).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.advance(4)


def parameters(state: TrainState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of clips 4, 8 and 12."""
    state = new_state()
    for _ in range(3):
        step(state)
        state.save(tmp_path, keep=5)
    return tmp_path


def test_a_restored_run_goes_on_bit_for_bit(tmp_path):
    whole = new_state()
    for _ in range(2):
        step(whole)
    whole.save(tmp_path, keep=3)
    step(whole)
    parts = new_state(seed=5)
    assert parts.restore(tmp_path, step_clips=4)
    assert (parts.step, parts.clips_seen) == (2, 8)
    step(parts)
    assert torch.equal(parameters(parts), parameters(whole))


def test_a_folder_without_checkpoints_restores_nothing(tmp_path):
    assert not new_state().restore(tmp_path)


def test_a_checkpoint_of_another_model_is_refused(folder):
    model = nn.Linear(2, 2)
    other = TrainState(model, build_optimizer(model, OptimConfig()), ALONE, CONFIG)
    with pytest.raises(RunError, match=r"clips_0000000012\.pth is not of this model: "):
        other.restore(folder, step_clips=4)


def test_keys_are_the_models_own(folder):
    content = checkpoint.load_checkpoint(checkpoint.list_checkpoints(folder)[-1])
    assert list(content["model"]) == list(new_state().model.state_dict())
    assert set(content["optimizer"]["state"]) == set(content["model"])


@pytest.mark.parametrize("damage", ["zeros", "half", "empty", "bit"])
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(folder, damage):
    path = checkpoint.list_checkpoints(folder)[-1]
    content = bytearray(path.read_bytes())
    weight = checkpoint.load_checkpoint(path)["model"]["0.weight"].numpy().tobytes()
    middle = content.index(weight) + 4
    if damage == "zeros":
        content[middle : middle + 16] = bytes(16)
    elif damage == "bit":
        content[middle] ^= 1
    path.write_bytes(content[: len(content) // 2] if damage == "half" else b"" if damage == "empty" else content)
    said: list[str] = []
    found = find_checkpoint(folder, ALONE, say=said.append)
    assert found is not None
    assert found.clips_seen == 8
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == [f"clips_{n:010d}.pth" for n in (4, 8)]
    assert (folder / "clips_0000000012.pth.damaged").exists()
    assert "damaged checkpoint set aside" in said[0]


def test_weights_that_are_not_finite_are_neither_saved_nor_resumed(folder):
    state = new_state()
    assert state.restore(folder, step_clips=4)
    with torch.no_grad():
        state.model[0].weight[0, 0] = float("inf")
    state.advance(4)
    with pytest.raises(RunError, match=r"0\.weight .* the last checkpoint is .*clips_0000000012"):
        state.save(folder, keep=5)
    assert len(checkpoint.list_checkpoints(folder)) == 3
    content = checkpoint.load_checkpoint(checkpoint.list_checkpoints(folder)[-1])
    content["model"]["0.weight"][0, 0] = float("nan")
    checkpoint.save_checkpoint(folder, 16, {key: content[key] for key in content if key != "clips_seen"}, keep=9)
    found = find_checkpoint(folder, ALONE, say=lambda _: None)
    assert found is not None
    assert found.clips_seen == 12


def test_a_save_is_due_by_the_clock(monkeypatch):
    state = new_state()
    by_steps, by_minutes = RunConfig(save_every=100, log_every=2), RunConfig(save_minutes=10, log_every=2)
    state.step = 2
    assert not state.save_due(by_minutes)
    monkeypatch.setattr(train_state.time, "monotonic", lambda: state.saved_at + 601)
    assert state.save_due(by_minutes)
    assert not state.save_due(by_steps)
    state.step = 3  # between two log lines
    assert not state.save_due(by_minutes)
    state.step = 100
    assert state.save_due(by_steps)


# When another rank is lost.


@pytest.fixture
def main_rank(monkeypatch) -> TrainState:
    """The main rank of two after one step, with the random states of both."""
    monkeypatch.setattr(World, "set_timeout", lambda *_: None)
    monkeypatch.setattr(RandomStates, "share", lambda *_: None)
    monkeypatch.setattr(RandomStates, "received", lambda *_: [{"cpu": torch.get_rng_state()}] * 2)
    state = new_state()
    state = TrainState(state.model, state.optimizer, World(0, 2, torch.device("cpu")), CONFIG)
    step(state)
    return state


def test_the_main_rank_saves_the_last_whole_step_alone(main_rank, tmp_path):
    path = main_rank.save_alone(tmp_path, keep=3)
    assert path == main_rank.save_alone(tmp_path, keep=3) == main_rank.last_saved
    alone = new_state(seed=5)
    assert alone.restore(tmp_path, step_clips=4)
    assert torch.equal(parameters(alone), parameters(main_rank))
    assert len(checkpoint.load_checkpoint(path)["rng"]) == 2


def _infinite(state: TrainState) -> None:
    with torch.no_grad():
        state.model[0].weight[0, 0] = float("inf")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.optimizer.step(), "in the middle of a step"),
        (lambda state: setattr(state._random, "received", lambda: None), "had not sent its random state"),
        (lambda state: setattr(state, "_advanced", False), "no step was made"),
        (_infinite, r"0\.weight holds values that are not finite"),
    ],
)
def test_what_is_not_a_whole_step_is_not_saved_alone(main_rank, tmp_path, spoil, says):
    spoil(main_rank)
    with pytest.raises(RunError, match=says):
        main_rank.save_alone(tmp_path, keep=3)
    assert not list(tmp_path.iterdir())


def test_only_a_lost_rank_makes_the_main_rank_save(main_rank, tmp_path, capsys):
    for error, saved in ((RuntimeError("shapes differ"), 0), (RuntimeError("[gloo/pair.cc:1] Connection closed"), 1)):
        with pytest.raises(RuntimeError), save_if_lost(main_rank, tmp_path, keep=3):
            raise error
        assert len(checkpoint.list_checkpoints(tmp_path)) == saved
    assert "another rank is lost after step 1; saved" in capsys.readouterr().err


def test_a_run_folder_that_was_removed_is_made_anew(folder):
    state = new_state()
    assert state.restore(folder, step_clips=4)
    step(state)
    shutil.rmtree(folder)
    assert state.save(folder, keep=1).exists()


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch, number, fails):
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, "no directory fsync")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "new").write_bytes(b"content")
    if fails:
        with pytest.raises(OSError, match="no directory fsync"):
            put_in_place(tmp_path / "new", tmp_path / "file")
    else:
        put_in_place(tmp_path / "new", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"content"


def test_changed_settings_are_listed(folder):
    found = find_checkpoint(folder, ALONE)
    assert found is not None
    now = replace(CONFIG, optim=OptimConfig(lr=0.5), run=RunConfig(name="other", stop_at=9))
    notes = checkpoint.list_changes(found, now, {"videos": 9}, {"student": "flash"})
    assert notes == [
        "note: optim.lr was 0.00015 when it was saved, now 0.5",
        "note: videos was 8 when it was saved, now 9",
        "note: attention of student was math when it was saved, now flash",
    ]
    assert checkpoint.list_changes(found, CONFIG, {"videos": 8}) == []
    checkpoint.check_same(found, now, ("student", "mask.rule"))
    with pytest.raises(RunError, match=r"optim\.lr = 0\.00015, this run has 0\.5"):
        checkpoint.check_same(found, now, ("optim",))


def test_ranks_with_other_settings_refuse(monkeypatch):
    other = replace(CONFIG, optim=OptimConfig(lr=0.5))
    gathered = [checkpoint.asdict(config) for config in (CONFIG, other)]
    monkeypatch.setattr(World, "gather", lambda *_: gathered)
    with pytest.raises(ValueError, match=r"rank 1 was started with optim\.lr = 0\.5, rank 0 with 0\.00015"):
        check_alike(CONFIG, World(0, 2, torch.device("cpu")))


def test_settings_that_hold_themselves_are_refused(tmp_path):
    """The second settings are small, but have 2^60 paths."""
    circle: dict = {"step": 1}
    circle["circle"] = circle
    shared: object = {"x": 1}
    listed: object = [1]
    for _ in range(60):
        shared, listed = {"a": shared, "b": shared}, [listed, listed]
    whole = {"format": 2, "clips_seen": 4, "model": {}, "optimizer": {}, "rng": [], "config": {}, "schedule": {}}
    for number, settings in enumerate((circle, shared, {"a": listed})):
        for name in ("config", "schedule", "attention"):
            path = checkpoint.checkpoint_path(tmp_path, number)
            torch.save({**whole, name: settings}, path)
            with pytest.raises(WeightsError, match=f"{name} does not hold settings"):
                checkpoint.load_checkpoint(path)


def _set(*keys: object) -> Callable[[dict], None]:
    """Sets content[keys[0]][keys[1]]... to the last of them."""

    def change(content: dict) -> None:
        *way, last, value = keys
        for key in way:
            content = content[key]
        content[last] = value

    return change


MOMENTS = ("optimizer", "state", "0.weight")
STRANGE: list[tuple[Callable[[dict], object], str]] = [
    (lambda content: content.pop("optimizer"), "optimizer missing"),
    (lambda content: content.pop("rng"), "rng missing"),
    (_set("clips_seen", -1), "clips_seen missing or of another kind"),
    (_set("format", torch.zeros(2)), "is not a checkpoint of a run"),
    (_set("config", "run", {"seed": torch.zeros(2)}), r"run\.seed is a Tensor"),
    (_set("schedule", "videos", 1 << 70), "videos is a int"),
    (_set("schedule", 3, 3), "3 is not a name"),
    (_set("model", "0.weight", torch.eye(3).to_sparse()), "sparse"),
    (_set("model", {}), "it holds no weights"),
    # Each of these four made torch read or write outside the tensor's memory.
    (_set(*MOMENTS, "exp_avg", torch.zeros(1)), r"exp_avg of 0\.weight is not a tensor of shape \[3, 3\]"),
    (_set(*MOMENTS, "exp_avg_sq", torch.zeros(3, 1).expand(3, 3)), "not stored as floating-point numbers in order"),
    (_set(*MOMENTS, "step", torch.zeros(3, 3)), r"step of 0\.weight is not a tensor of shape \[\]"),
    (lambda content: content["optimizer"]["state"]["0.weight"].pop("exp_avg"), r"exp_avg of 0\.weight is not a tensor"),
    (_set("optimizer", "state", "other", {}), "a state of other, which this model lacks"),
    (_set("optimizer", "param_groups", None), "is not of this model"),
    (_set("rng", [{"cpu": torch.zeros(3)}]), "is not of this model"),
    (_set("rng", [3]), "is not of this model"),
]


@pytest.mark.parametrize(("change", "says"), STRANGE)
def test_a_checkpoint_with_strange_content_is_refused(folder, change, says):
    path = checkpoint.list_checkpoints(folder)[-1]
    content = checkpoint.load_checkpoint(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(RunError, match=says):
        new_state().go_on(checkpoint.Checkpoint(path, checkpoint.load_checkpoint(path)), step_clips=4)


def test_an_optimisers_settings_are_the_resumed_runs_own(folder):
    path = checkpoint.list_checkpoints(folder)[-1]
    content = checkpoint.load_checkpoint(path)
    content["optimizer"]["param_groups"][0] |= {"amsgrad": True, "lr": "x", "fused": False, "maximize": True}
    torch.save(content, path)
    state = new_state()
    before = [{key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups]
    assert state.restore(folder, step_clips=4)
    after = [{key: value for key, value in group.items() if key != "params"} for group in state.optimizer.param_groups]
    assert before == after
    step(state)


def test_a_run_with_a_moving_average_refuses_a_checkpoint_without_one(folder):
    state = new_state()
    state.companions["average"] = nn.Linear(1, 1)
    with pytest.raises(RunError, match="it holds no average; resume with the settings of the run that saved it"):
        state.restore(folder, step_clips=4)


def test_a_score_that_is_not_a_number_is_refused(folder):
    found = find_checkpoint(folder, ALONE)
    assert found is not None
    found.content["schedule"]["best_top1"] = "x"
    with pytest.raises(RunError, match="its best_top1 is not a number"):
        new_state().go_on(found, step_clips=4, kept=("best_top1",))


def test_notes_of_changed_settings_are_one_line(folder):
    found = find_checkpoint(folder, ALONE)
    assert found is not None
    found.content["config"]["run"]["seed"] = "x\x1b[31m\ny"
    assert checkpoint.list_changes(found, CONFIG, {}) == [r"note: run.seed was x\x1b[31m\ny when it was saved, now 0"]


@pytest.mark.parametrize("kind", ["file", "link", "closed"])
def test_a_run_that_cannot_save_says_so_before_its_first_step(tmp_path, monkeypatch, kind):
    state = new_state()
    state.config = replace(CONFIG, run=RunConfig(dir=str(tmp_path), name="a"))
    (tmp_path / "a").mkdir()
    if kind == "file":
        (tmp_path / "a" / "checkpoints").write_text("")
    elif kind == "link":
        (tmp_path / "a" / "checkpoints").symlink_to("/nowhere/at/all")
    else:
        monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OSError, match="checkpoints"):
        state.go_on(None, step_clips=4)
