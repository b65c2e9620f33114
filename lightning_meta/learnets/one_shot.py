"""One-shot recognition of characters (Bertinetto et al. 2016, sections 2 and 4.1).

Shapes: E episodes of W ways and S shots, so Z = W * S exemplars, and X queries; images of P x P pixels with ink 1 and
paper 0; embeddings of e numbers; N images of any kind.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_meta.learnets.figures import answer_sheet, response_sheet
from lightning_meta.learnets.layers import FactorisedConv2d, depthwise_conv2d, filter_variation, initialise_as_filters
from lightning_meta.learnets.one_shot_data import Episodes
from lightning_meta.nn.batch_norm import BatchNorm2d
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, cosine, exponential
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values

OneShotVariant = Literal["siamese", "unshared", "factorised", "siamese_learnet", "learnet", "prototypical"]
Metric = Literal["inner_product", "euclidean", "weighted_l1", "squared_euclidean"]


class Trunk(NamedTuple):
    """Sizes of the convolutions that embed an image. ReLU and 2x2 pooling follow all but the last."""

    front: list[tuple[int, int, int]]  # channels, side and padding of each
    middle: tuple[int, int, int]  # of the layer whose filters a learnet predicts
    last: tuple[int, int]  # channels and side; it reduces an image of 28x28 to one place


TRUNKS = {
    "paper": Trunk([(16, 5, 0)], (64, 5, 0), (512, 4)),
    "deep": Trunk([(64, 3, 1), (64, 3, 1)], (64, 3, 1), (128, 3)),
}


class OneShotPupil(nn.Module):
    """The network phi, which embeds images.

    Args:
        trunk: Sizes of its layers.
        middle: Kind of the middle layer: a ``full`` convolution, a ``factorised`` one with learned filters, or a
            factorised one whose filters are ``predicted``.
        batch_norm: Replace the biases of all convolutions but the last by batch normalisation.
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
        """Embed images (N, 1, P, P) as (N, e), each with its own filters (N, d, f, f) if they are predicted."""
        x = self.front(x)
        if isinstance(self.middle, nn.Conv2d):
            return self.back(self.middle(x))
        filters = self.filters.expand(len(x), -1, -1, -1) if filters is None else filters
        return self.back(self.middle(x, filters))

    def embed_for_each(self, x: Tensor, filters: Tensor) -> Tensor:
        """Embed every query with the filters of every exemplar of its episode.

        Args:
            x: (E, X, 1, P, P).
            filters: (E, Z, d, f, f).

        Returns:
            (E, Z, X, e).
        """
        E, Z = filters.shape[:2]
        return self.back(self.middle.recombine(self.responses(x, filters)).flatten(0, 1)).view(E, Z, x.shape[1], -1)

    def responses(self, x: Tensor, filters: Tensor) -> Tensor:
        """Return the responses of queries to the filters, w(z) *_d M * x: (E * Z, X, d, H', W')."""
        E, Z = filters.shape[:2]
        x = self.middle.project(self.front(x.flatten(0, 1))).unflatten(0, (E, -1))
        x = x[:, None].expand(-1, Z, -1, -1, -1, -1).flatten(0, 1)
        return depthwise_conv2d(x, filters.flatten(0, 1), self.middle.padding)


class OneShotLearnet(nn.Module):
    """The network w, which predicts filters from an exemplar and, if ``embeds``, the exemplar's embedding.

    Args:
        trunk: Sizes of its layers, the same as the pupil's.
        filter_shape: (d, f, f).
        embeds: Add a second head for the embedding.
        batch_norm: Replace the biases of all convolutions but the last by batch normalisation.
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
        """Predict filters (N, d, f, f) and embeddings (N, e), or None, from exemplars (N, 1, P, P)."""
        features = self.trunk(z)
        embedding = self.write_embedding(features).flatten(1) if self.write_embedding else None
        return self.write_filters(features).view(-1, *self.filter_shape), embedding


class Similarity(nn.Module):
    """Gamma, the similarity of two embeddings: a scaled inner product, or minus a scaled distance.

    Args:
        metric: Inner product or a distance; its scale is learned.
        size: e.
        offset: Add a learned number to the score. The logistic loss needs it; a softmax is invariant to it.

    >>> import torch
    >>> similarity = Similarity("squared_euclidean", size=4, offset=False)
    >>> similarity(torch.ones(2, 4), torch.zeros(2, 4)).tolist()
    [-1.0, -1.0]
    """

    def __init__(self, metric: Metric, size: int, offset: bool):
        super().__init__()
        self.metric = metric
        # Initial scores lie within a few units of zero for any embedding size. An offset that started at zero would
        # need thousands of steps to balance distances of 10 or 20.
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
        """Return the scores (...) of two batches of embeddings (..., e), in float32 or better."""
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
            return self.offset - self.scale * (squared + 1e-12).sqrt()  # the root is not differentiable at zero


class OneShotNetwork(nn.Module):
    """Network that scores queries against exemplars: the paper's five architectures and prototypical networks.

    Args:
        variant: ``siamese`` (one phi for exemplars and queries), ``unshared`` (two), ``factorised`` (two, with M' w M
            in the middle), ``siamese_learnet`` (phi(x; w(z)) and phi(z; w(z))), ``learnet`` (phi(x; w(z)) and an
            embedding of z that the learnet predicts), ``prototypical`` (one phi, and the mean embedding of each class's
            exemplars; Snell et al. 2017).
        metric: Gamma, see ``Similarity``.
        trunk: Sizes of phi: ``paper`` (three convolutions) or ``deep`` (four).
        batch_norm: Use batch normalisation after all convolutions but the last.
        offset: See ``Similarity``.

    >>> import torch
    >>> network = OneShotNetwork("learnet", "weighted_l1", trunk="paper", batch_norm=True, offset=True)
    >>> scores, filters = network(torch.rand(1, 5, 1, 1, 28, 28), torch.rand(1, 10, 1, 28, 28))
    >>> scores.shape, filters.shape
    (torch.Size([1, 5, 10]), torch.Size([1, 5, 64, 5, 5]))
    """

    def __init__(
        self, variant: OneShotVariant, metric: Metric, trunk: Literal["paper", "deep"], batch_norm: bool, offset: bool
    ):
        super().__init__()
        self.variant, sizes = variant, TRUNKS[trunk]
        predicts = variant in ("siamese_learnet", "learnet")
        middle = "predicted" if predicts else "factorised" if variant == "factorised" else "full"
        self.pupil = OneShotPupil(sizes, middle, batch_norm)
        if variant in ("unshared", "factorised"):
            self.exemplar_pupil = OneShotPupil(sizes, middle, batch_norm)
        if predicts:
            self.learnet = OneShotLearnet(sizes, self.pupil.middle.filter_shape, variant == "learnet", batch_norm)
        self.similarity = Similarity(metric, sizes.last[0], offset)

    def forward(self, exemplars: Tensor, queries: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score all queries of an episode against all of its exemplars.

        Args:
            exemplars: (E, W, S, 1, P, P).
            queries: (E, X, 1, P, P).

        Returns:
            Scores (E, Z, X), or (E, W, X) for ``prototypical``; predicted filters (E, Z, d, f, f), or None.
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
    """Return the paper's loss (section 2, equation 3): log(1 + exp(-l s)), l = 1 for matching pairs and -1 for others.

    Matching and other pairs each contribute half of the mean, as if each were drawn with probability 1/2.

    Args:
        scores: Any shape.
        same: The same shape, bool: the pairs that match.

    >>> import torch
    >>> pair_logistic(torch.zeros(3), torch.tensor([True, False, False]))
    tensor(0.6931)
    """
    losses = F.softplus(torch.where(same, -scores, scores))
    return (losses[same].mean() + losses[~same].mean()) / 2


def episode_softmax(scores: Tensor, same: Tensor) -> Tensor:
    """Return the mean of two cross-entropies: of softmax over each exemplar's queries and over each query's exemplars.

    Args:
        scores: (E, Z, X).
        same: (E, Z, X), bool: the pairs that match. If several match, the target is uniform over them.

    >>> import torch
    >>> episode_softmax(torch.zeros(1, 2, 2), torch.eye(2, dtype=torch.bool)[None])
    tensor(0.6931)
    """
    target = same.to(scores.dtype)
    return sum(-(target * scores.log_softmax(d)).sum(d).div(target.sum(d).clamp(min=1)).mean() / 2 for d in (1, 2))


class OneShotRecognition(Experiment):
    """Train a network to recognise characters from one example of each.

    Args:
        variant: Architecture: ``siamese``, ``unshared``, ``factorised``, ``siamese_learnet``, ``learnet`` (all of the
            paper) or ``prototypical``; see ``OneShotNetwork``.
        metric: Similarity of two embeddings, the paper's Gamma.
        loss: ``logistic`` on pairs (paper) or ``softmax`` over an episode.
        trunk: Convolutions of the embedding: ``paper`` (three) or ``deep`` (four).
        batch_norm: Use batch normalisation (the paper does not say).
        optimizer: ``sgd`` (paper) with momentum 0.9 (the paper does not say) or ``adam``.
        lr: Learning rate.
        final_lr: Learning rate at the last step, reached by geometric decay (paper). None: cosine decay to zero.
        weight_decay: Weight decay of all parameters.
    """

    def __init__(
        self,
        variant: OneShotVariant = "learnet",
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
        self.errors: dict[str, dict[str, Values]] = {}  # by test case and rule, (episodes,)

    def configure_optimizers(self):
        h = self.hparams
        if h.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), h.lr, weight_decay=h.weight_decay)
        else:
            optimizer = torch.optim.SGD(self.parameters(), h.lr, momentum=0.9, weight_decay=h.weight_decay)
        steps = self.trainer.max_steps
        return by_step(optimizer, cosine(steps) if h.final_lr is None else exponential(h.final_lr / h.lr, steps))

    def class_scores(self, exemplars: Tensor, queries: Tensor) -> Tensor:
        """Return the mean score over the exemplars of each class, (E, W, X)."""
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
        metrics["nearest picture"].update(_errors(nearest_images(batch.exemplars, batch.queries), batch))
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
        """Draw the answers in the first episode and, for learnets, the paper's figure 3: uint8 (3, H', W')."""
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
        """Return a table and images of the answers for each alphabet, by file name."""
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


def nearest_images(exemplars: Tensor, queries: Tensor) -> Tensor:
    """Score by nearest neighbours in pixels: minus the distance to a class's nearest exemplar, (E, W, X).

    >>> import torch
    >>> nearest_images(torch.zeros(1, 2, 1, 1, 4, 4), torch.ones(1, 1, 1, 4, 4)).tolist()
    [[[-4.0], [-4.0]]]
    """
    E, W, S = exemplars.shape[:3]
    distances = torch.cdist(exemplars.reshape(E, W * S, -1).float(), queries.flatten(2).float())
    return -distances.unflatten(1, (W, S)).amin(2)


def _errors(scores: Tensor, batch: Episodes) -> Tensor:
    """Return the error of each episode in per cent, (E,), from scores (E, W, X).

    In the paper's task each exemplar chooses one query; in the others each query chooses one class.
    """
    if batch.choose == "candidate":
        wrong = batch.labels.gather(1, scores.argmax(2)) != torch.arange(scores.shape[1], device=scores.device)
    else:
        wrong = scores.argmax(1) != batch.labels
    return 100 * wrong.float().mean(1)
