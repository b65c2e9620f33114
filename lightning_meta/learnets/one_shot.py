"""One-shot recognition of characters (Bertinetto et al. 2016, sections 2 and 4.1).

Shapes: E episodes of W ways and S shots, so Z = W * S exemplars, and X queries; pictures of P x P pixels, ink 1;
embeddings of e numbers.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.learnets.figures import answer_sheet, response_sheet
from lightning_meta.learnets.layers import FactorisedConv2d, initialise_as_filters, depthwise_conv2d, filter_variation
from lightning_meta.learnets.one_shot_data import Episodes
from lightning_meta.nn.batch_norm import BatchNorm2d
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, cosine, exponential
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values

Variant = Literal["siamese", "unshared", "factorised", "siamese_learnet", "learnet", "prototypical"]
Metric = Literal["inner_product", "euclidean", "weighted_l1", "squared_euclidean"]


class Trunk(NamedTuple):
    """Convolutions of an embedding: each of ``front`` and ``middle`` is followed by ReLU and 2x2 pooling."""

    front: list[tuple[int, int, int]]  # channels, side, padding
    middle: tuple[int, int, int]  # the one that a learnet predicts
    last: tuple[int, int]  # channels and side, which is all that is left of a picture of 28x28


TRUNKS = {
    "paper": Trunk([(16, 5, 0)], (64, 5, 0), (512, 4)),
    "deep": Trunk([(64, 3, 1), (64, 3, 1)], (64, 3, 1), (128, 3)),
}


class Pupil(nn.Module):
    """The network phi that embeds pictures: of its own weights, or with filters in the middle that come from outside.

    Args:
        trunk: Its sizes.
        middle: A full convolution, a factorised one with learned filters, or one whose filters are ``predicted``.
        batch_norm: After every convolution but the last, in place of its bias.
    """

    def __init__(self, trunk: Trunk, middle: Literal["full", "factorised", "predicted"], batch_norm: bool):
        super().__init__()
        self.front = _front(trunk, batch_norm)
        channels, (inner, side, padding) = trunk.front[-1][0], trunk.middle
        layer = nn.Conv2d if middle == "full" else FactorisedConv2d
        self.middle = layer(channels, inner, side, padding=padding, bias=not batch_norm)
        if middle == "factorised":
            self.filters = nn.Parameter(torch.randn(1, *self.middle.filter_shape) / side)
        self.back = nn.Sequential(*_activation(inner, batch_norm), nn.Conv2d(inner, *trunk.last), nn.Flatten())

    def forward(self, x: Tensor, filters: Tensor | None = None) -> Tensor:
        """Embeddings (N, e) of pictures (N, 1, P, P), with filters (N, d, f, f) of their own if they are predicted."""
        x = self.front(x)
        if isinstance(self.middle, nn.Conv2d):
            return self.back(self.middle(x))
        filters = self.filters.expand(len(x), -1, -1, -1) if filters is None else filters
        return self.back(self.middle(x, filters))

    def embed_for_each(self, x: Tensor, filters: Tensor) -> Tensor:
        """Embeddings of every query as every exemplar of its episode sees it.

        Args:
            x: (E, X, 1, P, P).
            filters: (E, Z, d, f, f).

        Returns:
            (E, Z, X, e).
        """
        E, Z = filters.shape[:2]
        return self.back(self.middle.recombine(self.responses(x, filters)).flatten(0, 1)).view(E, Z, x.shape[1], -1)

    def responses(self, x: Tensor, filters: Tensor) -> Tensor:
        """The same up to the predicted filters: w(z) *_d M * x, (E * Z, X, d, H', W')."""
        E, Z = filters.shape[:2]
        x = self.middle.project(self.front(x.flatten(0, 1))).unflatten(0, (E, -1))
        x = x[:, None].expand(-1, Z, -1, -1, -1, -1).flatten(0, 1)
        return depthwise_conv2d(x, filters.flatten(0, 1), self.middle.padding)


class Learnet(nn.Module):
    """The network w that looks at an exemplar and writes filters, and for single-stream pupils the embedding too.

    Args:
        trunk: Sizes of the pupil, which are its own too.
        filter_shape: Of the filters, (d, f, f).
        embeds: Whether it has the second head.
        batch_norm: After every convolution but the last.
    """

    def __init__(self, trunk: Trunk, filter_shape: tuple[int, int, int], embeds: bool, batch_norm: bool):
        super().__init__()
        channels, (inner, side, padding), (embedding, last) = trunk.front[-1][0], *trunk[1:]
        self.filter_shape = filter_shape
        self.trunk = nn.Sequential(
            _front(trunk, batch_norm),
            nn.Conv2d(channels, inner, side, padding=padding, bias=not batch_norm),
            *_activation(inner, batch_norm),
        )
        self.write_filters = nn.Conv2d(inner, math.prod(filter_shape), last)
        self.write_embedding = nn.Conv2d(inner, embedding, last) if embeds else None
        initialise_as_filters(self.write_filters, filter_shape[-1])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Filters (N, d, f, f) and embeddings (N, e) for exemplars (N, 1, P, P)."""
        features = self.trunk(z)
        embedding = self.write_embedding(features).flatten(1) if self.write_embedding else None
        return self.write_filters(features).view(-1, *self.filter_shape), embedding


class Similarity(nn.Module):
    """Gamma: how alike two embeddings are, as a score; distances count negative.

    Args:
        metric: Inner product or a distance; its scale is learned.
        size: e.
        offset: Whether a learned number is added: pairs need it, to a soft-max it is nothing.
    """

    def __init__(self, metric: Metric, size: int, offset: bool):
        super().__init__()
        self.metric = metric
        # Scores begin within a few units of zero, whatever the embeddings' size: an offset that began at zero would
        # take thousands of steps to make up for distances of 10 or 20.
        start = {
            "inner_product": (size**-0.5, 0.0),
            "euclidean": (7 * size**-0.5, 5.0),
            "weighted_l1": (10 / size, 5.0),
            "squared_euclidean": (1 / size, 0.0),
        }
        scale, middle = start[metric]
        self.scale = nn.Parameter(torch.full((size if metric == "weighted_l1" else 1,), scale))
        self.offset = nn.Parameter(torch.tensor(middle)) if offset else 0.0

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Scores (...) of embeddings (..., e), in float32 or better."""
        wide = torch.promote_types(a.dtype, torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            a, b = a.to(wide), b.to(wide)
            if self.metric == "inner_product":
                return self.scale * (a * b).sum(-1) + self.offset
            if self.metric == "weighted_l1":
                return self.offset - (self.scale * (a - b)).abs().sum(-1)
            squared = (a - b).square().sum(-1)
            if self.metric == "squared_euclidean":
                return self.offset - self.scale * squared
            return self.offset - self.scale * (squared + 1e-12).sqrt()  # the root has no slope at zero


class OneShotNetwork(nn.Module):
    """Scores of queries against exemplars: one of the paper's five architectures, or a prototypical network.

    Args:
        variant: ``siamese`` (one phi for both), ``unshared`` (two), ``factorised`` (two, with M' w M in the middle),
            ``siamese_learnet`` (phi(x; w(z)) and phi(z; w(z))), ``learnet`` (phi(x; w(z)) and an embedding that the
            learnet writes), ``prototypical`` (one phi; the mean of a class's exemplars; Snell et al. 2017).
        metric: Gamma.
        trunk: ``paper`` or ``deep``.
        batch_norm: Batch normalisation after the convolutions.
        offset: See ``Similarity``.
    """

    def __init__(
        self, variant: Variant, metric: Metric, trunk: Literal["paper", "deep"], batch_norm: bool, offset: bool
    ):
        super().__init__()
        self.variant, sizes = variant, TRUNKS[trunk]
        predicts = variant in ("siamese_learnet", "learnet")
        middle = "predicted" if predicts else "factorised" if variant == "factorised" else "full"
        self.pupil = Pupil(sizes, middle, batch_norm)
        if variant in ("unshared", "factorised"):
            self.exemplar_pupil = Pupil(sizes, middle, batch_norm)
        if predicts:
            self.learnet = Learnet(sizes, self.pupil.middle.filter_shape, variant == "learnet", batch_norm)
        self.similarity = Similarity(metric, sizes.last[0], offset)

    def forward(self, exemplars: Tensor, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores and the filters that were predicted.

        Args:
            exemplars: (E, W, S, 1, P, P).
            queries: (E, X, 1, P, P).

        Returns:
            (E, Z, X), or (E, W, X) of prototypes; (E, Z, d, f, f) or None.
        """
        E, W, S = exemplars.shape[:3]
        z, x = exemplars.flatten(0, 2), queries.flatten(0, 1)
        if not hasattr(self, "learnet"):
            a = getattr(self, "exemplar_pupil", self.pupil)(z).view(E, W, S, -1)
            a = a.mean(2) if self.variant == "prototypical" else a.flatten(1, 2)
            return self.similarity(a[:, :, None], self.pupil(x).view(E, 1, queries.shape[1], -1)), None
        filters, a = self.learnet(z)
        a = self.pupil(z, filters) if a is None else a
        filters = filters.unflatten(0, (E, -1))
        b = self.pupil.embed_for_each(queries, filters)
        return self.similarity(a.view(E, W * S, 1, -1), b), filters


def _activation(channels: int, batch_norm: bool) -> list[nn.Module]:
    return [*([BatchNorm2d(channels)] if batch_norm else []), nn.ReLU(), nn.MaxPool2d(2)]


def _front(trunk: Trunk, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, (channels, side, padding) in zip([1, *(c for c, _, _ in trunk.front)], trunk.front, strict=False):
        layers.append(nn.Conv2d(inputs, channels, side, padding=padding, bias=not batch_norm))
        layers += _activation(channels, batch_norm)
    return nn.Sequential(*layers)


def pair_logistic(scores: Tensor, same: Tensor) -> Tensor:
    """The paper's loss (section 2, equation 3): log(1 + exp(-l s)), l = 1 for pairs of one class and -1 for others.

    Either kind counts for a half, as when both are drawn with probability 1/2.
    """
    losses = F.softplus(torch.where(same, -scores, scores))
    return (losses[same].mean() + losses[~same].mean()) / 2


def episode_softmax(scores: Tensor, same: Tensor) -> Tensor:
    """Cross-entropy of the soft-max over an exemplar's queries and over a query's exemplars, a half each.

    Args:
        scores: (E, Z, X).
        same: The same shape, bool: pairs of one class. Where there are several, each counts alike.
    """
    target = same.to(scores.dtype)
    return sum(-(target * scores.log_softmax(d)).sum(d).div(target.sum(d).clamp(min=1)).mean() / 2 for d in (1, 2))


class OneShotRecognition(Experiment):
    """Trains a network to tell from one example which pictures show the same character.

    Args:
        variant: See ``OneShotNetwork``.
        metric: Gamma of the two embeddings.
        loss: ``logistic`` on pairs (paper), or ``softmax`` over an episode.
        trunk: ``paper``'s three convolutions, or a ``deep`` one of four.
        batch_norm: Batch normalisation (whether the paper had it here is not known).
        optimizer: ``sgd`` with momentum 0.9 (the paper's, its momentum unknown) or ``adam``.
        lr: Learning rate.
        final_lr: Where it falls to, geometrically (paper). None: to zero along a cosine.
        weight_decay: Of all weights.
    """

    def __init__(
        self,
        variant: Variant = "learnet",
        metric: Metric = "weighted_l1",
        loss: Literal["logistic", "softmax"] = "logistic",
        trunk: Literal["paper", "deep"] = "paper",
        batch_norm: bool = True,
        optimizer: Literal["sgd", "adam"] = "adam",
        lr: float = 1e-3,
        final_lr: float | None = None,
        weight_decay: float = 0.0,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.network = OneShotNetwork(variant, metric, trunk, batch_norm, offset=loss == "logistic")
        self.val_error, self.val_variation = Mean(), Mean()
        self.errors: dict[str, dict[str, Values]] = {}  # of each test case: ours and the baselines', (episodes,)

    def configure_optimizers(self):
        h = self.hparams
        if h.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), h.lr, weight_decay=h.weight_decay)
        else:
            optimizer = torch.optim.SGD(self.parameters(), h.lr, momentum=0.9, weight_decay=h.weight_decay)
        steps = self.trainer.max_steps
        return by_step(optimizer, cosine(steps) if h.final_lr is None else exponential(h.final_lr / h.lr, steps))

    def class_scores(self, exemplars: Tensor, queries: Tensor) -> Tensor:
        """Scores (E, W, X) of queries against classes: the mean over a class's exemplars."""
        scores, _ = self.network(exemplars, queries)
        return scores.unflatten(1, (exemplars.shape[1], -1)).mean(2)

    def training_step(self, batch: Episodes, batch_idx: int) -> Tensor:
        scores, filters = self.network(batch.exemplars, batch.queries)
        classes = torch.arange(batch.exemplars.shape[1], device=self.device)
        same = classes.repeat_interleave(scores.shape[1] // len(classes))[:, None] == batch.labels[:, None]
        loss = (pair_logistic if self.hparams.loss == "logistic" else episode_softmax)(scores, same)
        self.log("train/loss", loss, prog_bar=True)
        if filters is not None:
            self.log("train/filter_variation", filter_variation(filters.flatten(0, 1)))
        return loss

    def validation_step(self, batch: Episodes, batch_idx: int) -> None:
        scores, filters = self.network(batch.exemplars, batch.queries)
        scores = scores.unflatten(1, (batch.exemplars.shape[1], -1)).mean(2)
        self.val_error.update(_errors(scores, batch))
        self.log("val/error", self.val_error, prog_bar=True)
        if filters is not None:
            self.val_variation.update(filter_variation(filters.flatten(0, 1)))
            self.log("val/filter_variation", self.val_variation)

    def on_test_start(self) -> None:
        rules = ("model", "chance", "nearest picture")
        self.errors = {
            case: {rule: Values().to(self.device) for rule in rules} for case in self.trainer.datamodule.cases
        }

    def test_step(self, batch: Episodes, batch_idx: int, dataloader_idx: int = 0) -> None:
        metrics = list(self.errors.values())[dataloader_idx]
        metrics["model"].update(_errors(self.class_scores(batch.exemplars, batch.queries), batch))
        metrics["nearest picture"].update(_errors(nearest_pictures(batch.exemplars, batch.queries), batch))
        metrics["chance"].update(
            torch.full((len(batch.labels),), 100 - 100 / batch.exemplars.shape[1], device=self.device)
        )

    def on_test_epoch_end(self) -> None:
        measures = []
        for case, metrics in self.errors.items():
            for rule, metric in metrics.items():
                self.log_mean(f"test/{case}/{rule}", metric.compute())
            baselines = {rule: f"test/{case}/{rule}" for rule in metrics if rule != "model"}
            measures.append(Measure(case, "error, %", f"test/{case}/model", baselines))
        self.measure, *self.further_measures = measures

    def pictures(self, batch: Episodes) -> dict[str, Tensor]:
        """Answers in the first episode and, of learnets, the paper's figure 3; uint8 (3, H', W')."""
        exemplars, queries = batch.exemplars[:1], batch.queries[:1]
        scores = self.class_scores(exemplars, queries)[0]
        pictures = {"answers": answer_sheet(exemplars[0, :, 0, 0], queries[0, :, 0], scores, batch.labels[0])}
        if hasattr(self.network, "learnet"):
            z = exemplars[0, :5, 0]
            filters, _ = self.network.learnet(z)
            responses = self.network.pupil.responses(queries[:, :1], filters[None])[:, 0]
            pictures["responses"] = response_sheet(z[:, 0], queries[0, 0, 0], filters, responses)
        return pictures

    def predict_step(self, batch: Episodes, batch_idx: int) -> dict[str, Tensor | str]:
        """For each alphabet a picture of the answers and a text of them, by file name."""
        written = {}
        for i, labels in enumerate(batch.labels):
            number = batch.segment.problem + i * self.trainer.world_size
            names = self.trainer.datamodule.names(number, labels.tolist())
            one = Episodes(batch.exemplars[i : i + 1], batch.queries[i : i + 1], labels[None], batch.segment)
            scores = self.class_scores(one.exemplars, one.queries)[0]
            lines = [
                f"{query}\t{names.classes[best]}\t{score:.3f}"
                for query, best, score in zip(names.queries, scores.argmax(0), scores.amax(0), strict=True)
            ]
            written[f"{names.alphabet}.txt"] = "\n".join(["query\tanswer\tscore", *lines, ""])
            written |= {f"{names.alphabet}_{name}.png": picture for name, picture in self.pictures(one).items()}
        return written


def nearest_pictures(exemplars: Tensor, queries: Tensor) -> Tensor:
    """The trivial baseline: minus the distance of pixels, (E, W, X), to the nearest exemplar of a class."""
    E, W, S = exemplars.shape[:3]
    distances = torch.cdist(exemplars.reshape(E, W * S, -1).float(), queries.flatten(2).float())
    return -distances.unflatten(1, (W, S)).amin(2)


def _errors(scores: Tensor, batch: Episodes) -> Tensor:
    """The error of each episode in per cent, (E,), for scores (E, W, X).

    In the paper's problem an exemplar chooses among candidates, one a class; elsewhere a query chooses among classes.
    """
    if batch.choose == "candidate":
        wrong = batch.labels.gather(1, scores.argmax(2)) != torch.arange(scores.shape[1], device=scores.device)
    else:
        wrong = scores.argmax(1) != batch.labels
    return 100 * wrong.float().mean(1)
