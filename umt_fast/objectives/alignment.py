"""Stage 1 of Unmasked Teacher as one call: teacher, visible set, student, loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from umt_kernels import cosine_alignment_loss

from umt_fast import masking
from umt_fast.config import Masking, check_fit
from umt_fast.models.clip_vision import ClipTeacher
from umt_fast.models.heads import Predictions, bare_student
from umt_fast.models.vit import LAYER_NORM_EPS

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped


@dataclass
class Alignment:
    """Results of `alignment_step`."""

    loss: Float[Tensor, ""]
    visible: Int[Tensor, "b g n"]
    """Ascending ids: of the patches within each frame [B,T,n], or of the tokens of the clip [B,1,n]."""
    scores: Float[Tensor, "b t p"]
    """The teacher's attention from the class token to each patch."""
    raw_targets: Float[Tensor, "k b m c"]
    raw_predictions: Predictions

    @property
    def targets(self) -> Float[Tensor, "k b m c"]:
        """Teacher outputs at the visible tokens, L2-normalised; k runs from shallow to deep."""
        return F.normalize(self.raw_targets, dim=-1)

    @property
    def predictions(self) -> Float[Tensor, "k b m c"]:
        """Student outputs at the visible tokens, L2-normalised."""
        return F.normalize(self.raw_predictions.normed(), dim=-1)


def alignment_step(
    student: torch.nn.Module,
    teacher: ClipTeacher,
    clip: Shaped[Tensor, "b ..."],
    num_visible: int | None,
    visible: Int[Tensor, "b g n"] | None = None,
    generator: torch.Generator | None = None,
    masks_per_clip: int = 1,
    rule: Masking = "attention",
) -> Alignment:
    """Forward pass of stage 1 (UMT, arXiv 2303.16058, section 3.1); then call `out.loss.backward()`.

    clip         uint8 [B,T,H,W,3], or float [B,3,T,H,W] already normalised.
    num_visible  patches drawn per frame (tokens per clip for rules that count per clip); ignored if `visible` is given.
    visible      visible set to use instead of a draw: [B,T,n] ids within a frame or [B,1,n] within the clip, each at
                 most once, in any order.
    generator    source of the draw, on the clip's device; None: torch's default generator.
    masks_per_clip  visible sets per clip, M: the student gets M * B samples, and the M samples of a clip are
                 neighbours. A given `visible` then has M * B rows.
    rule         the masking rule that draws from the scores, by its name in `umt_fast.masking.rules.RULES`.

    `student` is a VideoStudent, bare or wrapped (DDP, torch.compile). The step does not synchronise with the host.
    Raises ValueError if student, teacher, clip and visible set do not fit each other.
    """
    check_fit(bare_student(student).config, teacher.config)
    with torch.no_grad():
        state = teacher.encode(clip)
        batch, frames, patches = state.scores.shape
        if visible is None:
            if num_visible is None:
                raise ValueError("num_visible is None and no visible set is given; give one of them")
            of_sets = state.scores.repeat_interleave(masks_per_clip, dim=0)
            visible = masking.find_rule(rule).draw(of_sets, num_visible, generator)
        else:
            masking.check_visible(visible, masks_per_clip * batch, frames, patches)
            visible = visible.long().sort(dim=-1).values
        targets = teacher.targets(state, visible)
        scores = state.scores
        del state  # otherwise a third of the teacher's activations stays in memory while the student runs
    predictions = student(clip, masking.token_ids(visible, frames * patches))
    loss = cosine_alignment_loss(
        predictions.hidden, targets, weight=predictions.weight, bias=predictions.bias, eps=LAYER_NORM_EPS
    )
    return Alignment(loss, visible, scores, targets, predictions)
