"""Stage 2 of Unmasked Teacher in plain float64: pair by pair, padded, nothing shared, without the library's code.

The golden files have one set of sizes; this module checks others. It reads weights under their published names.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from umt_fast import VideoTextConfig

Weights = dict[str, Tensor]


def positions(tokens: int, width: int) -> Tensor:
    table = torch.zeros(tokens, width, dtype=torch.float64)
    for channel in range(width):
        angle = torch.arange(tokens, dtype=torch.float64) / 10000 ** (2 * (channel // 2) / width)
        table[:, channel] = angle.cos() if channel % 2 else angle.sin()
    return table


def norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, added: Tensor | None = None) -> Tensor:
    """Attention of q [L,D] to k and v [S,D]; `added` [S] is added to the scores."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores if added is None else scores + added
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def vision(w: Weights, config: VideoTextConfig, video: Tensor, visible: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [m,D], pooled [f,D] and student features [K,m,C] of one video [T,3,H,W]; visible [T,n]."""
    sizes, own = config.vision, "vision_encoder.encoder."
    frames = len(video)
    kernel = w[f"{own}patch_embed.proj.weight"][:, :, 0]
    x = F.conv2d(video, kernel, w[f"{own}patch_embed.proj.bias"], stride=sizes.patch_size)
    x = x.flatten(2).transpose(1, 2).flatten(0, 1)
    table = positions(len(x), sizes.width)
    x = x + table
    if visible is not None:
        places = (visible + torch.arange(frames)[:, None] * (len(x) // frames)).flatten()
        x, table = x[places], table[places]
    outputs = []
    for block in (f"{own}blocks.{i}" for i in range(sizes.depth)):
        h, width = norm(x, w, f"{block}.norm1", 1e-6), sizes.width
        weight = w[f"{block}.attn.qkv.weight"]
        q = h @ weight[:width].T + w[f"{block}.attn.q_bias"]
        k = h @ weight[width : 2 * width].T
        v = h @ weight[2 * width :].T + w[f"{block}.attn.v_bias"]
        x = x + linear(attend(q, k, v, sizes.heads), w, f"{block}.attn.proj")
        h = F.gelu(linear(norm(x, w, f"{block}.norm2", 1e-6), w, f"{block}.mlp.fc1"))
        x = x + linear(h, w, f"{block}.mlp.fc2")
        outputs.append(x)
    tokens = norm(outputs[-1], w, f"{own}norm", 1e-6)
    mean = tokens.mean(0, keepdim=True) if visible is not None else tokens.unflatten(0, (frames, -1)).mean(1)
    pooled = norm(mean, w, "vision_encoder.pool_norm", 1e-6)
    features = []
    for k, index in enumerate(aligned(sizes.depth, sizes.align_layers, sizes.align_interval)):
        if config.teacher is not None:
            head = f"vision_encoder.clip_decoder.{k}"
            h = linear(norm(outputs[index], w, f"{own}norm", 1e-6) + table, w, f"{head}.head")
            features.append(norm(h, w, f"{head}.norm", config.align_eps))
    return tokens, pooled, torch.stack(features) if features else tokens.new_zeros(0)


def aligned(depth: int, layers: int, interval: float) -> list[int]:
    return sorted(depth - 1 - int(i * interval) for i in range(layers))


def teacher(w: Weights, config: VideoTextConfig, video: Tensor) -> tuple[Tensor, Tensor]:
    """Features [K,T,N,C] and attention [T,N] of one video [T,3,H,W]."""
    sizes, own = config.teacher, "clip_teacher."
    if video.shape[-1] != sizes.image_size:
        video = F.interpolate(video, size=(sizes.image_size,) * 2, mode="bicubic", align_corners=False)
    kernel = w[f"{own}conv1.weight"]
    x = F.conv2d(video, kernel[:, :, 0] if kernel.dim() == 5 else kernel, stride=sizes.patch_size)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((w[f"{own}class_embedding"].expand(len(x), 1, -1), x), dim=1) + w[f"{own}positional_embedding"]
    x = norm(x, w, f"{own}ln_pre", 1e-5)
    outputs, attention = [], None
    for block in (f"{own}transformer.resblocks.{i}" for i in range(sizes.depth)):
        h = norm(x, w, f"{block}.ln_1", 1e-5)
        qkv = h @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        q, k, v = qkv.chunk(3, dim=-1)
        split = [y.unflatten(-1, (sizes.heads, -1)).transpose(1, 2) for y in (q, k)]
        scores = split[0][:, :, :1] @ split[1].transpose(-2, -1) / math.sqrt(split[0].shape[-1])
        attention = scores.softmax(-1)[:, :, 0, 1:].mean(1)
        mixed = torch.stack([attend(*frame, sizes.heads) for frame in zip(q, k, v, strict=True)])
        x = x + linear(mixed, w, f"{block}.attn.out_proj")
        h = linear(norm(x, w, f"{block}.ln_2", 1e-5), w, f"{block}.mlp.c_fc")
        x = x + linear(h * (1.702 * h).sigmoid(), w, f"{block}.mlp.c_proj")
        outputs.append(x)
    chosen = [outputs[i][:, 1:] for i in aligned(sizes.depth, sizes.align_layers, sizes.align_interval)]
    features = torch.stack([norm(x, w, f"{own}ln_post", 1e-5) @ w[f"{own}proj"] for x in chosen])
    assert attention is not None
    return features, attention


def bert(
    w: Weights, config: VideoTextConfig, x: Tensor, mask: Tensor, layers: range, video: Tensor | None = None
) -> Tensor:
    """BERT's layers on one text [L,H] with its padding, with cross-attention to tokens [m,D] if given."""
    heads, prefix = config.text.heads, bert_prefix(w)
    added = (1 - mask.double()) * -10000
    for layer in (f"{prefix}encoder.layer.{i}" for i in layers):
        for name in ("attention", "crossattention"):
            if name == "crossattention" and video is None:
                continue
            source = x if name == "attention" else video
            q = linear(x, w, f"{layer}.{name}.self.query")
            k, v = (linear(source, w, f"{layer}.{name}.self.{part}") for part in ("key", "value"))
            out = linear(
                attend(q, k, v, heads, added if name == "attention" else None), w, f"{layer}.{name}.output.dense"
            )
            x = norm(out + x, w, f"{layer}.{name}.output.LayerNorm", 1e-12)
        h = linear(F.gelu(linear(x, w, f"{layer}.intermediate.dense")), w, f"{layer}.output.dense")
        x = norm(h + x, w, f"{layer}.output.LayerNorm", 1e-12)
    return x


def bert_prefix(w: Weights) -> str:
    bare = "text_encoder.embeddings.word_embeddings.weight" in w
    return "text_encoder." if bare else "text_encoder.bert."


def text(w: Weights, config: VideoTextConfig, ids: Tensor, mask: Tensor) -> Tensor:
    """The layers of one text below the fusion layers, [L,H]."""
    own = f"{bert_prefix(w)}embeddings."
    x = w[f"{own}word_embeddings.weight"][ids] + w[f"{own}position_embeddings.weight"][: len(ids)]
    x = norm(x + w[f"{own}token_type_embeddings.weight"][0], w, f"{own}LayerNorm", 1e-12)
    return bert(w, config, x, mask, range(config.text.fusion_layer))


def fuse(w: Weights, config: VideoTextConfig, hidden: Tensor, mask: Tensor, video: Tensor) -> Tensor:
    return bert(w, config, hidden, mask, range(config.text.fusion_layer, config.text.depth), video)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def similarity(w: Weights, pooled: list[Tensor], texts: list[Tensor], temperature: Tensor | float) -> Tensor:
    """[videos, texts]: mean cosine over frames, divided by the temperature."""
    videos = [unit(linear(x, w, "vision_proj")) for x in pooled]
    words = [unit(linear(x[0], w, "text_proj")) for x in texts]
    return torch.stack([torch.stack([(v @ t).mean() for t in words]) for v in videos]) / temperature


def step(
    w: Weights,
    config: VideoTextConfig,
    video: Tensor,
    ids: Tensor,
    mask: Tensor,
    idx: Tensor,
    visible: Tensor | None,
    negative_videos: Tensor,
    negative_texts: Tensor,
    mlm_ids: Tensor | None = None,
    mlm_labels: Tensor | None = None,
) -> dict[str, Tensor]:
    """The losses of a step with given draws; video [B,T,3,H,W] normalised."""
    batch = len(video)
    temperature = w["temp"].clamp(0.001, 0.5).detach() + w["temp"] - w["temp"].detach()
    seen = [vision(w, config, video[i], None if visible is None else visible[i]) for i in range(batch)]
    texts = [text(w, config, ids[i], mask[i]) for i in range(batch)]
    losses = {"uta": video.new_zeros(()), "mlm": video.new_zeros(())}
    if visible is not None:
        distances = []
        for i in range(batch):
            features = teacher(w, config, video[i])[0]
            targets = torch.cat([features[:, t, visible[i, t]] for t in range(video.shape[1])], dim=1)
            distances.append(2 - 2 * (unit(seen[i][2]) * unit(targets)).sum(-1))
        losses["uta"] = torch.stack(distances).mean()
    scores = similarity(w, [pooled for _, pooled, _ in seen], texts, temperature)
    wanted = (idx[:, None] == idx).double()
    wanted = wanted / wanted.sum(1, keepdim=True)
    losses["vtc"] = -sum((s.log_softmax(1) * wanted).sum(1).mean() for s in (scores, scores.T)) / 2
    pairs = [(i, i, 1) for i in range(batch)]
    pairs += [(int(negative_videos[i]), i, 0) for i in range(batch)]
    pairs += [(i, int(negative_texts[i]), 0) for i in range(batch)]
    matches = []
    for of_video, of_text, label in pairs:
        fused = fuse(w, config, texts[of_text], mask[of_text], seen[of_video][0])
        matches.append(-linear(fused[0], w, "itm_head").log_softmax(0)[label])
    losses["vtm"] = torch.stack(matches).mean()
    if mlm_ids is not None and mlm_labels is not None:
        found, head = [], "text_encoder.cls.predictions"
        for i in range(batch):
            h = fuse(w, config, text(w, config, mlm_ids[i], mask[i]), mask[i], seen[i][0])
            h = norm(F.gelu(linear(h, w, f"{head}.transform.dense")), w, f"{head}.transform.LayerNorm", 1e-12)
            logits = h @ w["text_encoder.bert.embeddings.word_embeddings.weight"].T + w[f"{head}.bias"]
            found += [
                -logits[j].log_softmax(0)[label] for j, label in enumerate(mlm_labels[i].tolist()) if label != -100
            ]
        losses["mlm"] = torch.stack(found).mean() if found else video.new_zeros(())
    return losses | {"total": sum(losses.values())}
