"""One step of stage 2 as published (arXiv 2303.16058, section 3.2), in plain PyTorch: speed-ups are relative to it.

This is our own code for the same computation, with the costs of the public code: the video encoder and teacher of
`pretrain`; texts padded to the full length; a separate text pass and fusion pass for the masked texts; keys and values
of a video projected for each of its pairs; BERT's attention by matmul, additive mask, softmax, matmul; the language
head on every token; the whole similarity matrix for the contrast. Parameter names are those of the checkpoints; dropout
is off.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.step_time.baselines.pretrain import BaselineTeacher, StudentEncoder, StudentHead, draw_mask
from benchmarks.step_time.baselines.update import BaselineUpdate
from benchmarks.step_time.phases import Mark
from umt_fast.config import OptimConfig, StudentConfig, TextConfig, VideoTextConfig
from umt_fast.models.positions import sinusoid_positions

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class BertProjections(nn.Module):
    def __init__(self, width: int, source: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(source, width), nn.Linear(source, width)


class BertOutput(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, out)
        self.LayerNorm = nn.LayerNorm(out, eps=1e-12)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(x) + residual)


class BertAttention(nn.Module):
    def __init__(self, config: TextConfig, source: int, sdpa: bool) -> None:
        super().__init__()
        self.heads, self.sdpa = config.heads, sdpa
        self.self = BertProjections(config.width, source)
        self.output = BertOutput(config.width, config.width)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None, source: Tensor | None = None) -> Tensor:
        source = x if source is None else source
        q, k, v = (self._heads(y) for y in (self.self.query(x), self.self.key(source), self.self.value(source)))
        if self.sdpa:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask.to(q.dtype))
        else:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            out = (scores if mask is None else scores + mask).softmax(dim=-1) @ v
        return self.output(out.transpose(1, 2).flatten(2), x)


class BertIntermediate(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)


class BertLayer(nn.Module):
    def __init__(self, config: TextConfig, source: int | None, sdpa: bool) -> None:
        super().__init__()
        self.attention = BertAttention(config, config.width, sdpa)
        if source is not None:
            self.crossattention = BertAttention(config, source, sdpa)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config.mlp_width, config.width)

    def forward(self, x: Tensor, mask: Tensor, video: Tensor | None = None) -> Tensor:
        x = self.attention(x, mask)
        if video is not None:
            x = self.crossattention(x, None, video)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class BertEmbeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        kinds = torch.zeros_like(ids)
        embedded = self.word_embeddings(ids) + self.token_type_embeddings(kinds) + self.position_embeddings(places)
        return self.LayerNorm(embedded)


class BertLayers(nn.Module):
    def __init__(self, layers: Iterable[BertLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class BaselineBert(nn.Module):
    def __init__(self, config: TextConfig, source: int, sdpa: bool) -> None:
        super().__init__()
        self.fusion_layer = config.fusion_layer
        self.embeddings = BertEmbeddings(config)
        layers = (BertLayer(config, source if i >= config.fusion_layer else None, sdpa) for i in range(config.depth))
        self.encoder = BertLayers(layers)

    @staticmethod
    def extend(mask: Int[Tensor, "r l"]) -> Float[Tensor, "r 1 1 l"]:
        return (1.0 - mask[:, None, None].float()) * -10000.0

    def text(self, ids: Int[Tensor, "r l"], mask: Int[Tensor, "r l"]) -> Float[Tensor, "r l h"]:
        x, added = self.embeddings(ids), self.extend(mask)
        for layer in self.encoder.layer[: self.fusion_layer]:
            x = layer(x, added)
        return x

    def fuse(self, x: Tensor, mask: Tensor, video: Float[Tensor, "r m d"]) -> Float[Tensor, "r l h"]:
        added = self.extend(mask)
        for layer in self.encoder.layer[self.fusion_layer :]:
            x = layer(x, added, video)
        return x


class LanguagePredictions(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = nn.ModuleDict(
            {"dense": nn.Linear(config.width, config.width), "LayerNorm": nn.LayerNorm(config.width, eps=1e-12)}
        )


class BaselineText(nn.Module):
    def __init__(self, config: TextConfig, source: int, sdpa: bool) -> None:
        super().__init__()
        self.bert = BaselineBert(config, source, sdpa)
        self.cls = nn.ModuleDict({"predictions": LanguagePredictions(config)})

    def logits(self, x: Tensor) -> Tensor:
        head = self.cls["predictions"]
        assert isinstance(head, LanguagePredictions)
        x = head.transform["LayerNorm"](F.gelu(head.transform["dense"](x)))
        return F.linear(x, self.bert.embeddings.word_embeddings.weight, head.bias)


class BaselineVision(nn.Module):
    """The student of stage 1 with a pooling norm; its heads' norms have stage 2's epsilon."""

    def __init__(self, config: StudentConfig, eps: float, sdpa: bool) -> None:
        super().__init__()
        self.align_layers = config.align_layers
        self.encoder = StudentEncoder(config, sdpa)
        self.pool_norm = nn.LayerNorm(config.width, eps=1e-6)
        self.clip_decoder = nn.ModuleList(StudentHead(config) for _ in range(config.align_layers))
        for norm in (head.norm for head in self.clip_decoder if isinstance(head, StudentHead)):
            norm.eps = eps
        self.position = sinusoid_positions(config.tokens, config.width)[None]  # not a buffer: it stays on the host

    def forward(
        self, clip: Float[Tensor, "b 3 t h w"], hidden: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b m d"], Float[Tensor, "b 1 d"], Float[Tensor, "k b m c"]]:
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
        predictions = torch.stack([head(output + position) for head, output in heads])
        return outputs[-1], self.pool_norm(outputs[-1].mean(1, keepdim=True)), predictions


class BaselineVideoText(nn.Module):
    def __init__(self, config: VideoTextConfig, sdpa: bool = False) -> None:
        super().__init__()
        assert config.teacher is not None
        self.temp = nn.Parameter(torch.tensor(config.temperature))
        self.clip_teacher = BaselineTeacher(config.teacher)
        self.vision_encoder = BaselineVision(config.vision, config.align_eps, sdpa)
        self.text_encoder = BaselineText(config.text, config.vision.width, sdpa)
        self.vision_proj = nn.Linear(config.vision.width, config.joint_width)
        self.text_proj = nn.Linear(config.text.width, config.joint_width)
        self.itm_head = nn.Linear(config.text.width, 2)


@dataclass(frozen=True)
class StepInputs:
    """A batch and its draws, on the device."""

    clip: Float[Tensor, "b 3 t h w"]
    ids: Int[Tensor, "b l"]
    mask: Int[Tensor, "b l"]
    idx: Int[Tensor, " b"]
    hidden: Bool[Tensor, "b n"] | None
    """None: the step draws it, and the negatives as well."""
    negative_videos: Int[Tensor, " b"]
    negative_texts: Int[Tensor, " b"]
    mlm_ids: Int[Tensor, "b l"]
    mlm_labels: Int[Tensor, "b l"]


class BaselineStage2Step:
    """The published training step. A call takes a batch and returns the loss as a number."""

    def __init__(self, model: BaselineVideoText, optim: OptimConfig, num_visible: int, precision: str) -> None:
        self.model, self.num_visible = model, num_visible
        self.update = BaselineUpdate(model, optim, precision, lambda _, p: p.dim() != 1, log_norm=False)

    def __call__(self, batch: StepInputs, mark: Mark) -> float:
        model, autocast = self.model, self.update.autocast()
        with torch.no_grad(), autocast:
            model.temp.clamp_(0.001, 0.5)
            features, scores = model.clip_teacher(batch.clip)
        mark("teacher")
        hidden = batch.hidden
        if hidden is None:
            hidden = draw_mask(scores.float(), len(batch.clip), self.num_visible)
        layers, size, _, width = features.shape
        targets = features[~hidden.unsqueeze(0).repeat(layers, 1, 1)].reshape(layers, size, -1, width)
        mark("sampling")
        with autocast:
            tokens, pooled, predictions = model.vision_encoder(batch.clip, hidden)
            mark("student forward")
            uta = (2 - 2 * (predictions * targets).sum(dim=-1)).mean()
            loss = uta + self._text_losses(batch, tokens, pooled)
        return self.update(loss, mark)

    def _text_losses(self, batch: StepInputs, tokens: Tensor, pooled: Tensor) -> Tensor:
        model, size = self.model, len(batch.ids)
        bert = model.text_encoder.bert
        texts = bert.text(batch.ids, batch.mask)
        video = F.normalize(model.vision_proj(pooled), dim=-1)
        text = F.normalize(model.text_proj(texts[:, 0]), dim=-1)
        similarity = torch.einsum("mld,nd->mln", video, text).mean(1) / model.temp
        wanted = (batch.idx[:, None] == batch.idx).float()
        wanted = wanted / wanted.sum(1, keepdim=True)
        vtc = (
            -(similarity.log_softmax(1) * wanted).sum(1).mean() - (similarity.T.log_softmax(1) * wanted).sum(1).mean()
        ) / 2
        with torch.no_grad():
            equal = batch.idx[:, None] == batch.idx
            t2v, v2t = similarity.T.softmax(1).masked_fill(equal, 0), similarity.softmax(1).masked_fill(equal, 0)
            videos, negatives = batch.negative_videos, batch.negative_texts
            if batch.hidden is None:
                videos, negatives = (torch.multinomial(w.float(), 1)[:, 0] for w in (t2v, v2t))
        pairs = torch.cat((tokens, tokens[videos], tokens))
        words = torch.cat((texts, texts, texts[negatives]))
        masks = torch.cat((batch.mask, batch.mask, batch.mask[negatives]))
        matched = model.itm_head(bert.fuse(words, masks, pairs)[:, 0])
        vtm = F.cross_entropy(matched.float(), (torch.arange(3 * size, device=tokens.device) < size).long())
        filled = bert.fuse(bert.text(batch.mlm_ids, batch.mask), batch.mask, tokens)
        logits = model.text_encoder.logits(filled)
        return vtc + vtm + F.cross_entropy(logits.float().flatten(0, 1), batch.mlm_labels.flatten())
