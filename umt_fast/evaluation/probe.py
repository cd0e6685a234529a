"""Probes of a frozen encoder on cached features: k nearest neighbours, a linear and an attentive classifier.

python -m umt_fast.evaluation.probe linear --train features/train --test features/val
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umt_fast.evaluation.classification import Scores, score
from umt_fast.evaluation.extract import Features, FeaturesError, read_features
from umt_fast.models.vit import LAYER_NORM_EPS

if TYPE_CHECKING:
    from jaxtyping import Float, Int

WEIGHT_DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
"""Strengths of the linear probe's L2 penalty; held-out training videos select one."""


def knn(
    train: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    test: Float[Tensor, "m d"],
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "m k"]:
    """Class probabilities from the k nearest training vectors, weighted by exp(cosine / temperature)
    (arXiv 1805.01978, as in DINO's evaluation)."""
    similarity = F.normalize(test.float(), dim=-1) @ F.normalize(train.float(), dim=-1).T
    near = similarity.topk(min(k, len(train)), dim=-1)
    votes = torch.zeros(len(test), classes, dtype=torch.float64)
    votes.scatter_add_(1, labels[near.indices], ((near.values - 1) / temperature).exp().double())
    return votes / votes.sum(-1, keepdim=True)


class LinearProbe(nn.Module):
    """Standardised features and one linear layer."""

    mean: Tensor
    scale: Tensor

    def __init__(self, features: Float[Tensor, "n d"], classes: int) -> None:
        super().__init__()
        deviation, mean = torch.std_mean(features.float(), dim=0, correction=0)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", 1 / deviation.clamp_min(1e-6))
        self.head = nn.Linear(features.shape[1], classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return self.head((features.float() - self.mean) * self.scale)


def fit_linear(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, weight_decay: float, steps: int = 100
) -> LinearProbe:
    """Logistic regression with an L2 penalty, by L-BFGS on all features at once; deterministic."""
    probe = LinearProbe(features, classes)
    optimizer = torch.optim.LBFGS(probe.head.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(probe(features), labels) + weight_decay * probe.head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return probe.requires_grad_(False)


def choose_linear(
    features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, seed: int = 0
) -> LinearProbe:
    """Choose the L2 penalty on a held-out fifth of the training videos, then fit the linear probe on all of them."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: max(len(order) // 5, 1)], order[max(len(order) // 5, 1) :]
    if len(rest) < classes:
        return fit_linear(features, labels, classes, WEIGHT_DECAYS[2])

    def miss(weight_decay: float) -> float:
        probe = fit_linear(features[rest], labels[rest], classes, weight_decay)
        return float(F.cross_entropy(probe(features[held]), labels[held]))

    return fit_linear(features, labels, classes, min(WEIGHT_DECAYS, key=miss))


class AttentiveProbe(nn.Module):
    """A learned query that attends to a clip's tokens, and a linear layer (as in V-JEPA, arXiv 2404.08471)."""

    def __init__(self, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b k"]:
        tokens = self.norm(tokens.float())
        pooled, _ = self.attention(self.query.expand(len(tokens), -1, -1), tokens, tokens, need_weights=False)
        return self.head(pooled[:, 0])


@dataclass(frozen=True)
class AttentiveSettings:
    """Training settings of the attentive probe. Raises FeaturesError for a value out of range."""

    epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-3
    weight_decay: float = 0.01
    heads: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.heads < 1 or not 0 < self.lr < math.inf:
            raise FeaturesError(f"--epochs {self.epochs} --lr {self.lr} --heads {self.heads}: give finite numbers > 0")


def fit_attentive(
    tokens: Float[Tensor, "n m d"], labels: Int[Tensor, " n"], classes: int, settings: AttentiveSettings
) -> AttentiveProbe:
    """Train the attentive probe with AdamW and a cosine schedule. Raises FeaturesError if heads do not divide D."""
    width = tokens.shape[-1]
    if width % settings.heads:
        raise FeaturesError(f"{settings.heads} heads do not divide features of width {width}; give --heads")
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        probe = AttentiveProbe(width, classes, settings.heads)
    optimizer = torch.optim.AdamW(probe.parameters(), settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * -(-len(labels) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(settings.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(probe(tokens[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return probe.requires_grad_(False).eval()


def probe(kind: str, train: Features, test: Features, settings: AttentiveSettings, k: int = 20) -> Scores:
    """Fit a probe on the first view of each training video; average its probabilities over all views of a test video.

    Raises FeaturesError for features without labels, or of the wrong kind for the probe.
    """
    classes = check(kind, train, test)
    views = test.features.unbind(1)
    if kind == "knn":
        merged = [knn(train.features[:, 0], train.labels, view, classes, k) for view in views]
    elif kind == "linear":
        linear = choose_linear(train.features[:, 0], train.labels, classes, settings.seed)
        merged = [linear(view).double().softmax(-1) for view in views]
    else:
        attentive = fit_attentive(train.features[:, 0], train.labels, classes, settings)
        merged = [
            torch.cat([attentive(part) for part in view.split(settings.batch_size)]).double().softmax(-1)
            for view in views
        ]
    return score(torch.stack(merged).mean(0), test.labels)


def check(kind: str, train: Features, test: Features) -> int:
    """Check both feature sets and return the number of classes. Raises FeaturesError."""
    wanted = 4 if kind == "attentive" else 3
    for name, found in (("--train", train), ("--test", test)):
        if int(found.labels.min()) < 0:
            raise FeaturesError(f"{name} has features without labels; extract them from a list with labels")
        if found.features.dim() != wanted:
            made = "tokens" if wanted == 4 else "pooled"
            raise FeaturesError(f"the {kind} probe needs features of kind {made}; extract {name} with --kind {made}")
    if train.features.shape[-1] != test.features.shape[-1]:
        widths = f"--train {train.features.shape[-1]}, --test {test.features.shape[-1]}"
        raise FeaturesError(f"the features differ in width: {widths}; extract both with one checkpoint")
    if train.classes != test.classes:
        names = [f"{name} {', '.join(found.classes[:5])}" for name, found in (("--train", train), ("--test", test))]
        raise FeaturesError(f"the classes differ: {'; '.join(names)}; extract both with one --classes FILE")
    return max(len(train.classes), int(torch.cat((train.labels, test.labels)).max()) + 1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m umt_fast.evaluation.probe", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=("knn", "linear", "attentive"), help="the probe")
    parser.add_argument("--train", required=True, help="folder of features to fit on")
    parser.add_argument("--test", required=True, help="folder of features to test on")
    parser.add_argument("--out", type=Path, help="JSON file for the scores")
    parser.add_argument("--neighbours", type=int, default=20, help="knn: training videos that vote (default 20)")
    parser.add_argument("--epochs", type=int, default=AttentiveSettings.epochs, help="attentive: default %(default)s")
    parser.add_argument("--lr", type=float, default=AttentiveSettings.lr, help="attentive: default %(default)s")
    parser.add_argument("--heads", type=int, default=AttentiveSettings.heads, help="attentive: default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="linear, attentive: of what is drawn (default 0)")
    from umt_fast.run import launch  # library users of the probes must not need its imports

    with launch.one_line_errors():
        given = parser.parse_args(arguments)
        if given.neighbours < 1:
            raise FeaturesError(f"--neighbours {given.neighbours}: must be an integer >= 1")
        settings = AttentiveSettings(epochs=given.epochs, lr=given.lr, heads=given.heads, seed=given.seed)
        scores = probe(given.kind, read_features(given.train), read_features(given.test), settings, given.neighbours)
        print(
            f"{given.kind}: top-1 {scores.top1:.2f}%  top-5 {scores.top5:.2f}%  mean per class {scores.mean_class:.2f}%"
            f"  ({scores.videos} videos)"
        )
        if given.out is not None:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps({"probe": given.kind, **scores.as_dict()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
