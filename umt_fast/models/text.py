"""BERT whose upper layers cross-attend to a video (UMT, arXiv 2303.16058, section 3.2), under its published names.

The lower layers read the text alone; the fusion layers also attend to the tokens of a video. Keys and values of a video
are projected once, for any number of texts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from umt_kernels import add_layer_norm

from umt_fast.config import Recompute, TextConfig
from umt_fast.errors import RunError
from umt_fast.models.attention import SDPA, Backend, attention
from umt_fast.models.recompute import RUN_BLOCK

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

LAYER_NORM_EPS = 1e-12
INIT_STD = 0.02


class TextTooLong(RunError, ValueError):
    """A text with more tokens than the text encoder has positions."""


@dataclass(frozen=True)
class Pairing:
    """Pairs of texts and videos (or other states): which video each row of a batch of texts attends to.

    The rows form consecutive segments. A segment `(ids, texts)` pairs `texts` neighbouring rows with each video of
    `ids`, in this order; None: with each of all videos.
    """

    segments: tuple[tuple[Int[Tensor, " v"] | None, int], ...] = ((None, 1),)

    def rows(self, videos: int) -> int:
        """Number of rows of text that this pairing needs for `videos` videos."""
        return sum((videos if ids is None else len(ids)) * texts for ids, texts in self.segments)

    def attend(
        self,
        q: Float[Tensor, "r l h e"],
        k: Float[Tensor, "v m h e"],
        v: Float[Tensor, "v m h e"],
        backend: Backend,
        mask: Bool[Tensor, "v 1 1 m"] | None,
        dropout: float,
    ) -> Float[Tensor, "r l h e"]:
        """Attention of each row of q over the keys of its video. Texts of one video are joined to one longer row."""
        length, begin, outputs = q.shape[1], 0, []
        for ids, texts in self.segments:
            # Not index_select: on a GPU its backward sums repeated ids in an order that changes from run to run.
            keys, values, seen = (k, v, mask) if ids is None else (k[ids], v[ids], None if mask is None else mask[ids])
            end = begin + len(keys) * texts
            queries = q[begin:end].reshape(len(keys), texts * length, *q.shape[2:])
            outputs.append(attention(queries, keys, values, backend, seen, dropout).reshape(end - begin, *q.shape[1:]))
            begin = end
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


ONE_TO_ONE = Pairing()


@dataclass(frozen=True)
class Context:
    """Input of the fusion layers' cross-attention."""

    states: Float[Tensor, "v m d"]
    """Tokens of videos, or hidden states of questions."""
    pairing: Pairing = ONE_TO_ONE
    mask: Bool[Tensor, "v 1 1 m"] | None = None
    """True where a state may be attended to; None: everywhere."""


class Embeddings(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.width)
        self.position_embeddings = nn.Embedding(config.max_positions, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, input_ids: Int[Tensor, "r l"]) -> Float[Tensor, "r l h"]:
        length, limit = input_ids.shape[1], self.position_embeddings.num_embeddings
        if length > limit:
            raise TextTooLong(f"a text has {length} tokens, but this text encoder has {limit} positions")
        fixed = self.position_embeddings.weight[:length] + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + fixed))


class Projections(nn.Module):
    def __init__(self, width: int, source_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(source_width, width)
        self.value = nn.Linear(source_width, width)


class Output(nn.Module):
    """The end of each sublayer: linear, dropout, residual, LayerNorm."""

    def __init__(self, config: TextConfig, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "r l w"], residual: Float[Tensor, "r l h"]) -> Float[Tensor, "r l h"]:
        branch, norm = self.dropout(self.dense(x)), self.LayerNorm
        return add_layer_norm(residual, branch, norm.weight, norm.bias, norm.eps, post_norm=True)[0]


class TextAttention(nn.Module):
    """Self-attention, or cross-attention if states of `source_width` are given; both under BERT's names."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.backend = SDPA
        self.self = Projections(config.width, source_width)
        self.output = Output(config, config.width)

    def _heads(self, x: Float[Tensor, "r l h"]) -> Float[Tensor, "r l n e"]:
        return x.unflatten(-1, (self.heads, -1))

    def forward(
        self, x: Float[Tensor, "r l h"], mask: Bool[Tensor, "r 1 q l"] | None = None, context: Context | None = None
    ) -> Float[Tensor, "r l h"]:
        """`mask` is for self-attention only: True where a token may be attended to. A context has its own mask."""
        dropout = self.dropout if self.training else 0.0
        source = x if context is None else context.states
        key = self.self.key
        # A key's bias adds the same to all scores of a query, so its gradient is 0. Rounding errors in it would be
        # noise, which AdamW would scale up to full-sized steps.
        bias = key.bias.detach() + 0 * key.bias
        keys = F.linear(source, key.weight, bias)
        q, k, v = (self._heads(y) for y in (self.self.query(x), keys, self.self.value(source)))
        if context is None:
            out = attention(q, k, v, self.backend, mask, dropout)
        else:
            out = context.pairing.attend(q, k, v, self.backend, context.mask, dropout)
        return self.output(out.flatten(2), x)


class Intermediate(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.mlp_width)


class Layer(nn.Module):
    """A post-norm BERT layer; with `source_width` also cross-attention, between self-attention and the MLP."""

    def __init__(self, config: TextConfig, source_width: int | None) -> None:
        super().__init__()
        self.attention = TextAttention(config, config.width)
        if source_width is not None:
            self.crossattention = TextAttention(config, source_width)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.mlp_width)

    def forward(
        self, x: Float[Tensor, "r l h"], mask: Bool[Tensor, "r 1 q l"] | None, context: Context | None = None
    ) -> Float[Tensor, "r l h"]:
        x = self.attention(x, mask)
        if context is not None:
            x = self.crossattention(x, context=context)
        return self.output(F.gelu(self.intermediate.dense(x)), x)


class Layers(nn.Module):
    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config, source_width if index >= config.fusion_layer else None) for index in range(config.depth)
        )


class Bert(nn.Module):
    """BERT without pooler, cross-attending from layer `fusion_layer` on to states of `source_width`.

    `text` runs the layers below `fusion_layer`, `fuse` the others. Self-attention masks padding in all layers.
    """

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Layers(config, source_width)
        self.run_block = RUN_BLOCK["none"]
        self.apply(_init_weights)

    def set_attention(self, backend: Backend) -> None:
        """Use `backend` where neither a mask nor dropout is needed, as in cross-attention (see `attention`)."""
        for module in self.modules():
            if isinstance(module, TextAttention):
                module.backend = backend

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what the backward pass recomputes. Call this before torch.compile."""
        self.run_block = RUN_BLOCK[recompute]

    def _run(self, layers: Iterable[nn.Module], x: Tensor, mask: Tensor | None, context: Context | None) -> Tensor:
        for layer in layers:
            x = self.run_block(functools.partial(layer, mask=mask, context=context), x)
        return x

    def text(self, input_ids: Int[Tensor, "r l"], mask: Bool[Tensor, "r 1 q l"] | None) -> Float[Tensor, "r l h"]:
        """Hidden states of texts below the fusion layers."""
        return self._run(self.encoder.layer[: self.config.fusion_layer], self.embeddings(input_ids), mask, None)

    def fuse(
        self, hidden: Float[Tensor, "r l h"], mask: Bool[Tensor, "r 1 q l"] | None, context: Context
    ) -> Float[Tensor, "r l h"]:
        """Hidden states of texts after the fusion layers. Raises ValueError if the pairing has other rows."""
        rows = context.pairing.rows(len(context.states))
        if rows != len(hidden):
            raise ValueError(f"{len(hidden)} texts do not fit a pairing of {rows} rows")
        return self._run(self.encoder.layer[self.config.fusion_layer :], hidden, mask, context)

    def forward(
        self, input_ids: Int[Tensor, "r l"], mask: Bool[Tensor, "r 1 q l"] | None, context: Context
    ) -> Float[Tensor, "r l h"]:
        """All layers, as question answering uses them."""
        return self.fuse(self.text(input_ids, mask), mask, context)


class Transform(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=LAYER_NORM_EPS)


class Predictions(nn.Module):
    """BERT's masked-language head. The caller passes the word embeddings, which are its output matrix."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.transform = Transform(config)

    def forward(self, hidden: Float[Tensor, "... h"], word_embeddings: Float[Tensor, "w h"]) -> Float[Tensor, "... w"]:
        hidden = self.transform.LayerNorm(F.gelu(self.transform.dense(hidden)))
        return F.linear(hidden, word_embeddings, self.bias)


class LanguageHead(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.predictions = Predictions(config)
        self.apply(_init_weights)


class BertWithHead(nn.Module):
    """A BERT with its language head, under the published names `bert.*` and `cls.predictions.*`."""

    def __init__(self, config: TextConfig, source_width: int) -> None:
        super().__init__()
        self.bert = Bert(config, source_width)
        self.cls = LanguageHead(config)

    def logits(self, hidden: Float[Tensor, "... h"]) -> Float[Tensor, "... w"]:
        """Logits of every vocabulary word for each hidden state."""
        return self.cls.predictions(hidden, self.bert.embeddings.word_embeddings.weight)


def _init_weights(module: nn.Module) -> None:
    """BERT's initialisation (arXiv 1810.04805, released code)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def padding_mask(attention_mask: Int[Tensor, "r l"]) -> Bool[Tensor, "r 1 1 l"] | None:
    """Attention mask, True at real tokens. None if the mask is on the CPU and has no padding."""
    if attention_mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(attention_mask.all()):
        return None
    return attention_mask.bool()[:, None, None]


def causal_mask(attention_mask: Int[Tensor, "r l"]) -> Bool[Tensor, "r 1 l l"]:
    """Attention mask for a decoder: each token attends to itself and earlier tokens."""
    length = attention_mask.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return attention_mask.bool()[:, None, None] & past


def cut_padding(
    input_ids: Int[Tensor, "r l"], attention_mask: Int[Tensor, "r l"]
) -> tuple[Int[Tensor, "r m"], Int[Tensor, "r m"]]:
    """Cut both tensors to the longest text, unless they are on a GPU: reading them would make the host wait."""
    if attention_mask.device.type != "cpu":
        return input_ids, attention_mask
    used = attention_mask.any(dim=0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return input_ids[:, :length], attention_mask[:, :length]
