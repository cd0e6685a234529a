"""The cost of a step by arithmetic: floating-point operations (FLOP) and bytes of memory.

A multiply-add counts as two operations. Only matmuls, convolutions and attention count; the rest is under 1% and bound
by memory. `torch.utils.flop_counter` agrees with these formulas (tests/run/test_costs.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from umt_fast import masking
from umt_fast.config import (
    MLP_RATIO,
    ClassifierConfig,
    MaeStConfig,
    PretrainConfig,
    Recompute,
    StudentConfig,
    TeacherConfig,
    TextConfig,
    VideoMaeConfig,
    VideoTextConfig,
    VideoTextObjective,
    VitConfig,
)

GIB = 2**30


@dataclass(frozen=True)
class Flops:
    """FLOP of one step, by phase."""

    teacher: int
    student_forward: int
    student_backward: int

    @property
    def total(self) -> int:
        return self.teacher + self.student_forward + self.student_backward

    def by_phase(self) -> dict[str, int]:
        return {"teacher": self.teacher, "student forward": self.student_forward, "backward": self.student_backward}


def _rows(rows: int, keys: int, width: int) -> int:
    """FLOP of a transformer block for `rows` queries over `keys` keys, without the projections of keys and values."""
    matmuls = 2 * rows * width * width * (2 + 2 * MLP_RATIO)  # query, output, MLP
    return matmuls + 4 * rows * keys * width


def _block(tokens: int, width: int) -> int:
    return _rows(tokens, tokens, width) + 2 * tokens * width * 2 * width


def _wider_mlp(tokens: int, width: int, mlp_width: int) -> int:
    """FLOP to add to `_block` for an MLP of another width: `_block` assumes MLP_RATIO * width."""
    return 4 * tokens * width * (mlp_width - MLP_RATIO * width)


def _embedding(config: VitConfig, tokens: int) -> int:
    return 2 * tokens * config.width * 3 * config.tubelet_size * config.patch_size**2


def _student(config: StudentConfig, seen: int, embedded: int) -> tuple[int, int]:
    """FLOP of forward and of backward of one sample; `embedded` tokens go through the patch embedding."""
    patch = _embedding(config, embedded)
    blocks = config.depth * _block(seen, config.width)
    heads = config.align_layers * 2 * seen * config.width * config.target_width
    return patch + blocks + heads, patch + 2 * (blocks + heads)  # pixels get no gradient


def lean_flops(student: StudentConfig, teacher: TeacherConfig, clips: int, seen: int, masks_per_clip: int = 1) -> Flops:
    """The step as umt_fast computes it, without unneeded work. `seen` is the number of visible tokens per clip."""
    frames, patches = student.tokens // student.grid**2, teacher.grid**2
    rows = seen * masks_per_clip  # rows of the last block and of the projection, over all frames
    # The folded kernel is as wide as the window of the resize: one or two pixels of halo.
    window = folded_window(teacher)
    width, length = teacher.width, patches + 1
    one = frames * patches * 2 * width * 3 * teacher.tubelet_size * window**2
    one += frames * (teacher.depth - 1) * _block(length, width)
    one += frames * (2 * length * width * 2 * width + 2 * width * width + 2 * length * width)  # keys, values; scores
    one += _rows(rows, length, width)
    one += teacher.align_layers * 2 * rows * width * teacher.target_width
    forward, backward = _student(student, seen, seen)
    return Flops(clips * one, clips * masks_per_clip * forward, clips * masks_per_clip * backward)


def classifier_flops(config: ClassifierConfig, clips: int) -> Flops:
    """A step of fine-tuning: all tokens, and one head."""
    seen = config.tokens + (config.architecture == "mae_st")  # MAE-ST has a class token
    patch = _embedding(config, config.tokens)
    wider = _wider_mlp(seen, config.width, config.mlp_width or MLP_RATIO * config.width)
    rest = config.depth * (_block(seen, config.width) + wider) + 2 * config.width * config.num_classes
    return Flops(0, clips * (patch + rest), clips * (patch + 2 * rest))  # pixels get no gradient


def pixel_flops(config: VideoMaeConfig | MaeStConfig, clips: int, visible: int, decoded: int, scored: int) -> Flops:
    """A step of a masked autoencoder: encoder on `visible` tokens, decoder on `decoded`, its head on `scored`."""
    mlp = config.mlp_width if isinstance(config, VideoMaeConfig) and config.mlp_width else MLP_RATIO * config.width
    patch = _embedding(config, visible)
    encoder = config.depth * (_block(visible, config.width) + _wider_mlp(visible, config.width, mlp))
    width = config.decoder_width
    decoder = config.decoder_depth * _block(decoded, width)
    if isinstance(config, VideoMaeConfig):  # in the last block visible tokens are only keys and values
        decoder -= _rows(visible, decoded, width)
        decoder += _wider_mlp(config.decoder_depth * decoded - visible, width, config.decoder_mlp_width)
    outputs = 3 * config.tubelet_size * config.patch_size**2
    if isinstance(config, MaeStConfig):
        outputs = outputs * config.target_frames // config.frames
    heads = 2 * visible * config.width * width + 2 * scored * width * outputs
    forward = encoder + decoder + heads
    return Flops(0, clips * (patch + forward), clips * (patch + 2 * forward))  # pixels get no gradient


def _text_layer(text: TextConfig, length: int) -> int:
    """A BERT layer for one text: projections, MLP and self-attention."""
    return 2 * length * (4 * text.width**2 + 2 * text.width * text.mlp_width) + 4 * length**2 * text.width


def _cross_attention(text: TextConfig, length: int, keys: int) -> int:
    """Cross-attention of one text, without the projections of keys and values."""
    return 4 * length * text.width**2 + 4 * length * keys * text.width


def text_flops(
    config: VideoTextConfig, samples: int, length: int, seen: int, words: float, matches: bool = True
) -> int:
    """Forward pass of stage 2's text side for `samples` texts of `length` tokens, `seen` visible tokens per video.

    `words` is the number of words that MLM predicts; 0: without MLM, as in fine-tuning. `matches`: whether VTM's three
    pairs per sample go through the fusion layers.
    """
    text = config.text
    fusion, fills = text.depth - text.fusion_layer, words > 0
    layer, cross = _text_layer(text, length), _cross_attention(text, length, seen)
    pairs = samples * (3 * matches + fills)
    fused = pairs * (layer + cross) + (samples * 4 * seen * config.vision.width * text.width if pairs else 0)
    head = round(words * 2 * text.width * (text.width + text.vocab_size))
    return samples * (1 + fills) * text.fusion_layer * layer + fusion * fused + head


def video_text_flops(
    config: VideoTextConfig, objective: VideoTextObjective, clips: int, frames: int, length: int, tokens: int
) -> int:
    """Forward and backward pass of stage 2 on clips of `frames` frames (images: 1); the longest text has `length`
    tokens.

    `tokens` is the number of tokens of all texts, from which the number of MLM's hidden words follows.
    """
    vision = replace(config.vision, frames=frames)
    seen, teacher, embedding = frames * vision.patches, 0, _embedding(vision, frames * vision.patches)
    video = embedding + vision.depth * _block(seen, vision.width)
    if config.teacher is not None and objective.uta > 0:
        ratio = objective.image_mask_ratio if frames == 1 else objective.video_mask_ratio
        seen = frames * masking.count_visible(vision.patches, ratio)
        flops = lean_flops(vision, config.teacher, 1, seen)
        teacher, video, embedding = flops.teacher, flops.student_forward, _embedding(vision, seen)
    fills = objective.mlm > 0 and config.has_language_head
    words = objective.mlm_probability * max(tokens - clips, 0) if fills else 0  # [CLS] is never hidden
    text = text_flops(config, clips, length, seen, words, objective.vtm > 0)
    return clips * (teacher + 3 * video - embedding) + 3 * text  # pixels get no gradient


def answering_flops(
    config: VideoTextConfig, clips: int, frames: int, answers: int, length: int, answer_length: int
) -> int:
    """Forward and backward pass of question answering; `length` is the longest question, in tokens."""
    vision, text = replace(config.vision, frames=frames), config.text
    seen, fusion = frames * vision.patches, text.depth - text.fusion_layer
    embedding = _embedding(vision, seen)
    video = embedding + vision.depth * _block(seen, vision.width)
    keys = 4 * seen * vision.width * text.width
    question = text.depth * _text_layer(text, length) + fusion * (_cross_attention(text, length, seen) + keys)
    answer = _text_layer(text, answer_length) + _cross_attention(text, answer_length, length)
    head = answer_length * 2 * text.width * (text.width + text.vocab_size)
    decoder = answers * (fusion * answer + head) + clips * fusion * 4 * length * vision.width * text.width
    return clips * (3 * video - embedding) + 3 * (clips * question + decoder)


def published_flops(student: StudentConfig, teacher: TeacherConfig, clips: int, seen: int) -> Flops:
    """The step as published: the teacher computes and projects every token, and the student embeds every token."""
    frames, patches = student.tokens // student.grid**2, teacher.grid**2
    width, length = teacher.width, patches + 1
    one = frames * patches * 2 * width * 3 * teacher.tubelet_size * teacher.patch_size**2
    one += frames * teacher.depth * _block(length, width)
    one += teacher.align_layers * frames * patches * 2 * width * teacher.target_width
    forward, backward = _student(student, seen, student.tokens)
    return Flops(clips * one, clips * forward, clips * backward)


def folded_window(teacher: TeacherConfig) -> int:
    """Side of the patch kernel on the input clip, pixels."""
    from umt_fast.models.positions import bicubic_window

    if teacher.clip_patch_size == teacher.patch_size:
        return teacher.patch_size
    return bicubic_window(teacher.clip_patch_size, teacher.patch_size)[0].shape[1]


def student_parameters(config: StudentConfig) -> int:
    d, c = config.width, config.target_width
    block = (4 + 2 * MLP_RATIO) * d * d + 12 * d
    patch = 3 * config.tubelet_size * config.patch_size**2 * d + d
    return patch + config.depth * block + 2 * d + config.align_layers * (d * c + 3 * c)


def teacher_parameters(config: TeacherConfig) -> int:
    d = config.width
    block = (4 + 2 * MLP_RATIO) * d * d + (9 + MLP_RATIO) * d
    patch = 3 * config.tubelet_size * (config.patch_size**2 + folded_window(config) ** 2) * d
    return patch + config.depth * block + (config.grid**2 + 6) * d + d * config.target_width


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step."""

    states: int
    """Weights, gradients and optimiser state, which do not depend on the batch."""
    per_clip: int
    """Activations of one clip."""

    def peak(self, clips: int) -> int:
        return self.states + clips * self.per_clip

    def largest_batch(self, available: int) -> int:
        return max(0, (available - RESERVED - self.states) // self.per_clip)


RESERVED = 2 * GIB
"""GPU memory to leave free for the CUDA context, cuBLAS workspaces and fragmentation."""

KEPT: dict[Recompute, tuple[int, int]] = {"none": (8, 28), "selective": (4, 20), "full": (4, 0)}
"""Bytes per token and unit of width that a student's block keeps for its backward pass: always in float32, and in the
run's precision (here 2-byte numbers).

none       two residuals; normalised inputs 2 x 2, qkv 6, attention 2, hidden layer and its GELU 2 x 8
selective  one residual; the outputs of matmuls and attention: qkv 6, attention 2, its projection 2, fc1 8, fc2 2
full       one residual
"""


def step_memory(config: PretrainConfig, bf16: bool) -> Memory:
    """The peak memory of a step: the larger of the teacher's peak and the student's before its backward pass."""
    student, teacher, masks = config.student, config.teacher, config.mask.masks_per_clip
    frames, patches = student.token_frames, student.patches
    seen = masking.count_seen(config.mask.rule, frames, patches, config.mask.ratio)
    size = 2 if bf16 else 4
    # float32 weights, gradients and two moments; autocast's copy of the weights lasts until the backward pass
    states = student_parameters(student) * (16 + (2 if bf16 else 0)) + teacher_parameters(teacher) * size
    single, run = KEPT[config.compute.recompute]
    width, out, layers = student.width, student.target_width, student.align_layers
    block = width * (single + run * size // 2)
    whole = width * (KEPT["none"][0] + KEPT["none"][1] * size // 2)  # the block in the backward pass
    pixels = 3 * student.tubelet_size * student.patch_size**2 * size
    # Per aligned layer: its normalised output, the head's output, both gradients of the loss, the target.
    heads = layers * (2 * width * size + 4 * out * size)
    of_student = masks * seen * (student.depth * block + whole + pixels + heads)
    # Outputs of the aligned blocks, the residual stream before and after, the hidden layer and its activation.
    rows = frames * (patches + 1)
    of_teacher = rows * teacher.width * (4 * (teacher.align_layers + 1) + 10 * size)
    return Memory(states, max(of_student, of_teacher))


def plan(config: PretrainConfig, bf16: bool, gpu_memory: float | None) -> str:
    """Text about the cost of a step, and the batches that fit `gpu_memory` GiB (None: several common sizes)."""
    optim, student = config.optim, config.student
    frames, patches = student.token_frames, student.patches
    seen = masking.count_seen(config.mask.rule, frames, patches, config.mask.ratio)
    flops = lean_flops(student, config.teacher, optim.batch_size, seen, config.mask.masks_per_clip)
    memory = step_memory(config, bf16)
    lines = [
        f"student {student.width} x {student.depth}, teacher {config.teacher.width} x {config.teacher.depth}: "
        f"one forward and backward pass of {optim.batch_size} clips per process, {seen} visible tokens each, "
        f"{'bf16' if bf16 else 'float32'}, recompute {config.compute.recompute}",
        f"  {flops.total / 1e12:.2f} TFLOP: " + ", ".join(f"{n} {f / 1e12:.2f}" for n, f in flops.by_phase().items()),
        f"  {memory.peak(optim.batch_size) / GIB:.1f} GiB at the peak, by arithmetic: {memory.states / GIB:.1f} GiB of "
        f"weights, gradients and optimiser, {memory.per_clip / 2**20:.0f} MiB per clip",
    ]
    for size in (24, 40, 80, 141) if gpu_memory is None else (gpu_memory,):
        batch = memory.largest_batch(int(size * GIB))
        lines.append(
            f"  a GPU with {size:g} GiB has room for {batch} clips" if batch else f"  {size:g} GiB are too little"
        )
    return "\n".join(lines)
