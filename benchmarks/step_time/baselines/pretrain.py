"""One step of stage-1 pre-training as published (arXiv 2303.16058), in plain PyTorch: speed-ups are relative to it.

This is our own code for the same computation, with the costs of the public code: every token is embedded, projected and
normalised before most are dropped; a frame of another size is resized first; the mask is a boolean tensor made on the
CPU from a multinomial draw; position tables are on the host; the student's attention is matmul, softmax, matmul;
gradients are scaled for fp16; the host waits for the loss of every step. Parameter names are those of the checkpoints.

It is faster than the published setting in one point: nn.MultiheadAttention of today's PyTorch uses SDPA wherever no
weights are requested. The teacher runs under autocast in the baseline and in our step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_time.baselines.update import BaselineUpdate
from benchmarks.step_time.phases import Mark, no_mark
from umt_fast.config import OptimConfig, StudentConfig, TeacherConfig, check_fit
from umt_fast.models.positions import sinusoid_positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class StudentAttention(nn.Module):
    def __init__(self, width: int, heads: int, sdpa: bool) -> None:
        super().__init__()
        self.heads = heads
        self.sdpa = sdpa
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        batch, length, width = x.shape
        no_bias = torch.zeros_like(self.v_bias, requires_grad=False)
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, no_bias, self.v_bias)))
        q, k, v = qkv.reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            out = weights.softmax(dim=-1) @ v
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class StudentMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class StudentBlock(nn.Module):
    def __init__(self, width: int, heads: int, drop_path: float, sdpa: bool) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = StudentAttention(width, heads, sdpa)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = StudentMlp(width)

    def _drop(self, branch: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        kept = (keep + torch.rand(len(branch), 1, 1, dtype=branch.dtype, device=branch.device)).floor()
        return branch / keep * kept

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m d"]:
        x = x + self._drop(self.attn(self.norm1(x)))
        return x + self._drop(self.mlp(self.norm2(x)))


class StudentEncoder(nn.Module):
    def __init__(self, config: StudentConfig, sdpa: bool) -> None:
        super().__init__()
        kernel = (config.tubelet_size, config.patch_size, config.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, config.width, kernel, stride=kernel)})
        rates = torch.linspace(0, config.drop_path, config.depth).tolist()
        self.blocks = nn.ModuleList(StudentBlock(config.width, config.heads, rate, sdpa) for rate in rates)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)


class StudentHead(nn.Module):
    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.width, config.target_width)
        self.norm = nn.LayerNorm(config.target_width, eps=1e-6)

    def forward(self, x: Float[Tensor, "b m d"]) -> Float[Tensor, "b m c"]:
        y = self.norm(self.head(x))
        return y / y.norm(dim=-1, keepdim=True)


class BaselineStudent(nn.Module):
    """The published student; `sdpa` replaces its attention by torch's, for the ladder's second rung."""

    def __init__(self, config: StudentConfig, sdpa: bool = False) -> None:
        super().__init__()
        self.align_layers = config.align_layers
        self.encoder = StudentEncoder(config, sdpa)
        self.clip_decoder = nn.ModuleList(StudentHead(config) for _ in range(config.align_layers))
        self.position = sinusoid_positions(config.tokens, config.width)[None]  # not a buffer: it stays on the host

    def forward(self, clip: Float[Tensor, "b 3 t h w"], hidden: Bool[Tensor, "b n"]) -> Float[Tensor, "k b m c"]:
        """L2-normalised predictions at the tokens where `hidden` is False."""
        embedded = self.encoder.patch_embed["proj"](clip).flatten(2).transpose(1, 2)
        embedded = embedded + self.position.type_as(embedded).to(embedded.device)
        batch, _, width = embedded.shape
        x = embedded[~hidden].reshape(batch, -1, width)
        outputs = []
        for index, block in enumerate(self.encoder.blocks):
            x = block(x)
            if index >= len(self.encoder.blocks) - self.align_layers:
                outputs.append(self.encoder.norm(x))
        position = self.position.type_as(x).to(x.device).expand(batch, -1, -1)[~hidden].reshape(batch, -1, width)
        heads = zip(self.clip_decoder, outputs, strict=True)
        return torch.stack([head(output + position) for head, output in heads])


class TeacherMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "l r d"]) -> Float[Tensor, "l r d"]:
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class TeacherNorm(nn.LayerNorm):
    """Computes in float32 and returns the dtype of its input, so that the residual stream stays in half precision."""

    def forward(self, input: Float[Tensor, "... d"]) -> Float[Tensor, "... d"]:
        return super().forward(input.float()).to(input.dtype)


class TeacherBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = TeacherNorm(width)
        self.mlp = TeacherMlp(width)
        self.ln_2 = TeacherNorm(width)

    def forward(
        self, x: Float[Tensor, "l r d"], need_weights: bool
    ) -> tuple[Float[Tensor, "l r d"], Float[Tensor, "r l l"] | None]:
        normed = self.ln_1(x)
        out, weights = self.attn(normed, normed, normed, need_weights=need_weights)
        x = x + out
        return x + self.mlp(self.ln_2(x)), weights


class TeacherBlocks(nn.Module):
    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TeacherBlock(config.width, config.heads) for _ in range(config.depth))


class BaselineTeacher(nn.Module):
    """CLIP's image ViT on every frame. It gives every token of every aligned block in the output space."""

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        width, kernel = config.width, (config.tubelet_size, config.patch_size, config.patch_size)
        self.conv1 = nn.Conv3d(3, width, kernel, stride=kernel, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.positional_embedding = nn.Parameter(torch.randn(1 + config.grid**2, width) * width**-0.5)
        self.ln_pre = TeacherNorm(width)
        self.transformer = TeacherBlocks(config)
        self.ln_post = TeacherNorm(width)
        self.proj = nn.Parameter(torch.randn(width, config.target_width) * width**-0.5)
        self.requires_grad_(False)

    def forward(self, clip: Float[Tensor, "b 3 t h w"]) -> tuple[Float[Tensor, "k b n c"], Float[Tensor, "r p"]]:
        """L2-normalised targets of all tokens, and the class token's attention to the patches of each frame."""
        config = self.config
        batch, channels, frames, height, width = clip.shape
        if height != config.image_size:
            pictures = clip.reshape(batch, channels * frames, height, width)
            size = (config.image_size, config.image_size)
            pictures = F.interpolate(pictures, size=size, mode="bicubic", align_corners=False)
            clip = pictures.view(batch, channels, frames, *size)
        x = self.conv1(clip)
        x = x.permute(0, 2, 3, 4, 1).reshape(batch * x.shape[2], -1, config.width)
        cls = self.class_embedding.to(x.dtype) + torch.zeros(len(x), 1, config.width, dtype=x.dtype, device=x.device)
        x = self.ln_pre(torch.cat((cls, x), dim=1) + self.positional_embedding.to(x.dtype))
        x = x.permute(1, 0, 2)  # CLIP's blocks take the sequence first
        outputs = []
        for index, block in enumerate(self.transformer.resblocks):
            x, weights = block(x, need_weights=index == config.depth - 1)
            if index >= config.depth - config.align_layers:
                outputs.append(x)
        rows = torch.stack(outputs)[:, 1:].permute(0, 2, 1, 3)  # [K, B*T, P, D], without the class token
        targets = self.ln_post(rows) @ self.proj
        targets = targets / targets.norm(dim=-1, keepdim=True)
        return targets.reshape(len(targets), batch, -1, targets.shape[-1]), weights[:, 0, 1:]


def draw_mask(scores: Float[Tensor, "r p"], batch: int, num_visible: int) -> Bool[Tensor, "b n"]:
    """Order all patches by a multinomial draw; the first of each frame are visible. The mask is True where hidden."""
    rows, patches = scores.shape
    order = torch.multinomial(scores, patches)
    hidden = torch.ones(rows, patches)
    row = torch.arange(rows).view(-1, 1).repeat(1, num_visible)
    hidden[row, order[:, :num_visible].cpu()] = 0
    return hidden.view(batch, -1).to(torch.bool).to(scores.device, non_blocking=True)


class BaselineStep:
    """The published training step. A call takes a normalised clip and returns the loss as a number.

    precision  autocast's dtype: fp16 (CUDA; with loss scaling), bf16 or fp32.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        optim: OptimConfig,
        num_visible: int,
        precision: str,
    ) -> None:
        self.student, self.teacher, self.num_visible = student, teacher, num_visible
        self.update = BaselineUpdate(student, optim, precision, lambda _, parameter: parameter.dim() > 1)

    def __call__(
        self, clip: Float[Tensor, "b 3 t h w"], hidden: Bool[Tensor, "b n"] | None = None, mark: Mark = no_mark
    ) -> float:
        """`hidden` is a mask to use instead of a draw; `mark` is called at the end of every phase."""
        autocast = self.update.autocast()
        with torch.no_grad():
            with autocast:
                norm_clip, scores = self.teacher(clip)
            mark("teacher")
            if hidden is None:
                hidden = draw_mask(scores.float(), len(clip), self.num_visible)
            layers, batch, _, width = norm_clip.shape
            targets = norm_clip[~hidden.unsqueeze(0).repeat(layers, 1, 1)].reshape(layers, batch, -1, width)
        mark("sampling")
        with autocast:
            predictions = self.student(clip, hidden)
            mark("student forward")
            loss = (2 - 2 * (predictions * targets).sum(dim=-1)).mean()
        return self.update(loss, mark)


def build_baseline(
    student: StudentConfig, teacher: TeacherConfig, sdpa: bool = False
) -> tuple[BaselineStudent, BaselineTeacher]:
    """Both models with random weights. Raises ConfigError if they do not fit each other."""
    check_fit(student, teacher)
    return BaselineStudent(student, sdpa), BaselineTeacher(teacher).eval()
