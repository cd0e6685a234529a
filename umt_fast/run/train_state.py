"""The state of a run: model, optimiser, random generators and progress, saved and restored as one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from umt_fast.config import RunConfig
from umt_fast.errors import RunError
from umt_fast.run.checkpoint import (
    Checkpoint,
    checkpoint_path,
    find_checkpoint,
    list_changes,
    prepare_folder,
    save_checkpoint,
)
from umt_fast.run.lost_rank import RandomStates, is_lost_rank
from umt_fast.run.world import World
from umt_fast.weights.files import find_not_finite

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class TrainState:
    """Everything that a run needs to continue as if it had not been interrupted."""

    model: nn.Module
    """The bare model, or the model that FSDP has sharded; not DDP's wrapper."""
    optimizer: torch.optim.Optimizer
    world: World
    config: Any
    """The run's settings, a dataclass of sections."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Values that determine the schedule, such as the number of videos."""
    attention: dict[str, str] = field(default_factory=dict)
    companions: dict[str, nn.Module] = field(default_factory=dict)
    """Other modules to save and restore by name, such as a moving average of the weights."""
    step: int = 0
    clips_seen: int = 0
    last_saved: Path | None = None
    saved_at: float = field(default_factory=time.monotonic)
    _advanced: bool = False
    _updating: bool = False
    """Whether the optimiser has changed weights since the last `advance`."""
    _random: RandomStates | None = None

    def __post_init__(self) -> None:
        self.optimizer.register_step_pre_hook(lambda *_: setattr(self, "_updating", True))
        if self.world.size > 1 and self.world.device.type == "cpu" and not isinstance(self.model, FSDPModule):
            self._random = RandomStates(self.world)

    def advance(self, clips: int) -> None:
        """Count one step of `clips` clips over all ranks. After the first step, `run.step_timeout` applies."""
        if not self._advanced and self.world.size > 1:
            self.world.set_timeout(self.config.run.step_timeout)
        self._advanced = True
        self._updating = False
        self.step += 1
        self.clips_seen += clips
        if self._random is not None:
            self._random.share()

    def save_due(self, run: RunConfig) -> bool:
        """Whether to save after this step; every rank must call this after every step.

        True after each `save_every` steps and, at a log line, if `save_minutes` have passed since the last save by the
        main rank's clock.
        """
        if self.step % run.save_every == 0:
            return True
        if run.save_minutes is None or self.step % run.log_every:
            return False
        return self.world.gather(time.monotonic() - self.saved_at >= 60 * run.save_minutes)[0]

    def save(self, folder: Path, keep: int) -> Path:
        """Write a checkpoint and remove all but the newest `keep`; every rank returns after the file is written.

        Does nothing if this state is already saved. Raises on every rank: RunError for weights that are not finite,
        OSError for a full disk.
        """
        path, problem = checkpoint_path(folder, self.clips_seen), None
        if path == self.last_saved:
            return path
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_WHOLE)
        rng = self.world.gather(get_rng_state(self.world.device))
        if self.world.main:
            try:
                self._write(folder, keep, model, optimizer, rng)
            except (RunError, OSError) as error:
                problem = error
        problem = self.world.gather(problem)[0]
        if problem is not None:
            raise problem
        self.last_saved, self.saved_at = path, time.monotonic()
        return path

    def save_alone(self, folder: Path, keep: int) -> Path:
        """Write the checkpoint of the last whole step on the main rank, after another rank was lost in the next step.

        Raises RunError if this rank does not have the whole state, and OSError for a full disk.
        """
        path = checkpoint_path(folder, self.clips_seen)
        if path == self.last_saved:
            return path
        if isinstance(self.model, FSDPModule):
            raise RunError("with --compute.parallel fsdp each rank holds a part of the model")
        if self.world.device.type != "cpu":
            raise RunError("the GPU waits for the lost rank in the middle of a step; see --run.save-minutes")
        if self._updating or not self._advanced:
            raise RunError("the optimiser was in the middle of a step" if self._updating else "no step was made")
        if self._random is None or (rng := self._random.received()) is None:
            raise RunError("the lost rank had not sent its random state")
        self._write(folder, keep, *get_state_dict(self.model, self.optimizer, options=_WHOLE), rng)
        self.last_saved = path
        return path

    def _write(self, folder: Path, keep: int, model: dict, optimizer: dict, rng: list[dict[str, Tensor]]) -> None:
        content = {"model": model, "optimizer": optimizer, "rng": rng, "config": asdict(self.config)}
        content |= {"schedule": self.plan, "attention": self.attention}
        content |= {name: module.state_dict() for name, module in self.companions.items()}
        if (bad := find_not_finite(model)) is not None:
            raise RunError(f"{bad} holds values that are not finite; the last checkpoint is {self.last_saved}")
        save_checkpoint(folder, self.clips_seen, content, keep)

    def go_on(self, found: Checkpoint | None, step_clips: int, kept: Sequence[str] = ()) -> list[str]:
        """Restore the checkpoint `found` by `find_own_checkpoint`, and remove unfinished files from the folder.

        `kept` names results of the run in the plan, such as its best score, which are restored too. Returns log lines:
        the step to resume at, and each setting and attention backend that has changed.
        """
        folder = self.config.run.checkpoints
        if self.world.main:
            prepare_folder(folder)
        if found is None:
            return []
        self.restore(folder, found, step_clips)
        stored = {name: found.content["schedule"][name] for name in kept if name in found.content["schedule"]}
        if wrong := [name for name, value in stored.items() if type(value) not in (int, float)]:
            raise RunError(f"{found.path} is not of this job: its {wrong[0]} is not a number")
        self.plan |= stored
        changes = list_changes(found, self.config, self.plan, self.attention)
        return [f"going on from {found.path} at step {self.step}", *changes]

    def restore(self, folder: Path, found: Checkpoint | None = None, step_clips: int = 1) -> bool:
        """Resume from the newest checkpoint in `folder`, or from `found`, which `find_checkpoint` has read.

        Returns whether there was a checkpoint. The step is recomputed from the clips seen and `step_clips`, the global
        batch, which may have changed. A rank without a random state in the checkpoint keeps its own.
        """
        found = found if found is not None else find_checkpoint(folder, self.world)
        if found is None:
            return False
        try:
            self._fill(found.content)
        except (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError) as error:
            if isinstance(error, RuntimeError) and is_lost_rank(error):
                raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"{found.path} is not of this model: {' '.join(reason[:2])}") from None
        self.clips_seen = found.clips_seen
        self.step = self.clips_seen // step_clips
        self.last_saved = found.path
        return True

    def _fill(self, content: dict[str, Any]) -> None:
        """Copy a checkpoint's tensors into this state. Raises torch's errors for tensors of another model."""
        options = StateDictOptions(full_state_dict=True)
        if not content["model"]:
            raise ValueError("it holds no weights")
        set_model_state_dict(self.model, content["model"], options=options)
        # Rates, decay and kernels are the resumed run's own.
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups]
        state = content["optimizer"]
        if content["format"] == 1:
            state = _name_parameters(state, self.model, self.optimizer)
        _check_moments(state["state"], self.model)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=options)
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
        if self.world.rank < len(content["rng"]):
            set_rng_state(content["rng"][self.world.rank], self.world.device)
        for name, module in self.companions.items():
            if name not in content:
                raise ValueError(f"it holds no {name}; resume with the settings of the run that saved it")
            if (bad := find_not_finite(content[name])) is not None:
                raise ValueError(f"{bad} of its {name} holds values that are not finite")
            module.load_state_dict(content[name])


def _check_moments(state: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ValueError unless AdamW's state of each parameter is there as the parameter is.

    torch's fused AdamW does not look: with tensors that are too small it reads and writes other memory.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name, values in state.items():
        if name not in shapes:
            raise ValueError(f"its optimiser has a state of {name}, which this model lacks")
        for key, shape in (("step", ()), ("exp_avg", shapes[name]), ("exp_avg_sq", shapes[name])):
            value = values.get(key)
            if not isinstance(value, Tensor) or value.layout != torch.strided or tuple(value.shape) != shape:
                raise ValueError(f"its optimiser's {key} of {name} is not a tensor of shape {list(shape)}")
            if not value.is_floating_point() or not value.is_contiguous():
                raise ValueError(f"its optimiser's {key} of {name} is not stored as floating-point numbers in order")


def _name_parameters(state: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Rename the parameters of an optimiser's state dict from numbers, in the order of its groups, to names."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [{**group, "params": [ordered[i] for i in group["params"]]} for group in state["param_groups"]]
    return {"state": {ordered[i]: values for i, values in state["state"].items()}, "param_groups": groups}


def get_rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of this process's default random generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
