"""Validation of a fine-tuning run, its best checkpoint, and the multi-view test of this checkpoint at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from train.finetune_data import Lists
from umt_fast.config import FinetuneConfig
from umt_fast.data.labels import LabelledVideos
from umt_fast.evaluation.classification import Predictions, predict, score
from umt_fast.evaluation.report import write_report
from umt_fast.evaluation.views import Views
from umt_fast.models.attention import load as load_attention
from umt_fast.models.classifier import build_classifier
from umt_fast.run import checkpoint, parallel
from umt_fast.run.optim import EpochSchedule, MovingAverage
from umt_fast.run.progress import Progress
from umt_fast.run.train_state import TrainState
from umt_fast.weights import read_model

BEST = "best.pth"


class Validation:
    """Tests the weights of a run on its validation list after every `test.every_epochs` epochs and the last step.

    best.pth keeps the weights with the best top-1 (without a validation list: the last weights); `test` reads it.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        state: TrainState,
        lists: Lists,
        average: MovingAverage | None,
        schedule: EpochSchedule,
        bf16: bool,
    ) -> None:
        """If `average` is given, it is tested instead of the model."""
        self._config, self._state, self._lists, self._average, self._bf16 = config, state, lists, average, bf16
        self._every, self._total = schedule.epoch_steps * config.test.every_epochs, schedule.total_steps
        self._best = config.run.folder / BEST
        state.plan |= {"best_top1": -1.0, "validated": 0}

    def due(self, step: int) -> bool:
        """Whether validation follows a step."""
        return step > 0 and (step % self._every == 0 or step == self._total)

    def missed(self) -> bool:
        """Whether a signal came between the last step and its validation."""
        return self.due(self._state.step) and self._state.plan["validated"] != self._state.step

    def run(self, say: Callable[[str], None]) -> None:
        """Test one view of each video of the list, and keep the weights if they are the best so far."""
        state, listed, model = self._state, self._lists.validation, self._weights()
        state.plan["validated"] = state.step
        if listed is None:
            self._save_best(model, None)
            return
        found = self._predict(model, listed, Progress("validation", say=say), validation=True)
        scores = score(found.probabilities, torch.from_numpy(listed.labels)[found.rows])
        unread = f", {len(found.bad)} could not be read" if found.bad else ""
        say(
            f"validation after step {state.step}: top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  "
            f"loss {scores.loss:.4f}  ({scores.videos} videos{unread})"
        )
        if scores.top1 > state.plan["best_top1"]:
            state.plan["best_top1"] = scores.top1
            self._save_best(model, scores.top1)

    def test(self, say: Callable[[str], None]) -> None:
        """Test the best weights on all views, if there is a test list, and write the report into the folder `test`."""
        config, listed = self._config, self._lists.test
        if listed is None:
            return
        self._state.world.gather(None)  # the main rank may still be writing best.pth
        model = self._weights()
        model.load_state_dict(read_model(self._best)[0])
        found = self._predict(model, listed, Progress("test", say=say))
        if not self._state.world.main:
            return
        folder, views = config.run.folder / "test", [config.test.segments, config.test.crops]
        about = {"checkpoint": str(self._best), "list": config.data.test, "views": views}
        scores = write_report(folder, found, listed, about)
        unread = f"; {len(found.bad)} could not be read, see test.json" if found.bad else ""
        say(
            f"test, {config.test.segments} x {config.test.crops} views: top-1 {scores.top1:.2f}%  "
            f"top-5 {scores.top5:.2f}%  mean per class {scores.mean_class:.2f}%  ({scores.videos} videos{unread}); "
            f"report in {folder}"
        )

    def _weights(self) -> nn.Module:
        """The model to test. Every rank must call this.

        Returns a whole copy of a model that FSDP has sharded: the ranks test different numbers of clips, so they
        cannot gather shards together for each clip.
        """
        if self._average is not None:
            return self._average.module
        model = self._state.model
        if not isinstance(model, FSDPModule):
            return model
        copy = build_classifier(self._config.classifier).to(self._state.world.device).requires_grad_(False)
        copy.set_attention(load_attention(self._state.attention["classifier"]))
        copy.load_state_dict({key: parallel.whole(value) for key, value in model.state_dict().items()})
        return copy

    def _predict(
        self, model: nn.Module, listed: LabelledVideos, on_progress: Progress, *, validation: bool = False
    ) -> Predictions:
        data, test = self._config.data, self._config.test
        views = Views.of(self._config.classifier, data, test, validation)
        clips, merge, world = test.clips_per_pass, test.merge, self._state.world
        return predict(
            model,
            listed.videos,
            views,
            data,
            world,
            clips_per_pass=clips,
            bf16=self._bf16,
            merge=merge,
            on_progress=on_progress,
        )

    def _save_best(self, model: nn.Module, top1: float | None) -> None:
        """Write best.pth: weights, settings and class names; `load_encoder` and `train.evaluate` read it.

        Raises OSError on every rank if the disk is full.
        """
        state, problem = self._state, None
        weights = {key: value.detach().cpu() for key, value in model.state_dict().items()}
        content = {"model": weights, "config": dataclasses.asdict(state.config), "schedule": state.plan, "top1": top1}
        if state.world.main:
            try:
                checkpoint.write_tensors(self._best, {**content, "step": state.step})
            except OSError as error:
                problem = error
        problem = state.world.gather(problem)[0]
        if problem is not None:
            raise problem
