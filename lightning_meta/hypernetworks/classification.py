"""Image classification by networks with generated kernels (Ha et al. 2016, sections 4.1, 4.2 and A.1)."""

import math
import warnings
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_meta.errors import InputError
from lightning_meta.hypernetworks.classification_data import ImageBatch
from lightning_meta.hypernetworks.figures import answer_sheet, kernel_grid
from lightning_meta.hypernetworks.networks import DigitNetwork, FullyConnectedNetwork, WideResNet, l2
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, cosine, piecewise
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values

SHOWN = 100  # largest number of images on a sheet


class PictureClassification(Experiment):
    """Trains an image classifier whose kernels are generated, or its plain twin, which learns them directly.

    Args:
        network: ``digits`` (section 4.1), ``wide_resnet`` (4.2) or ``fully_connected`` (A.1).
        hyper: Generate the kernels. False: train the plain twin.
        depth: Depth of the residual network (paper: 40).
        width: Width factor of the residual network (paper: 1 and 2).
        classes: Number of classes.
        embedding_size: Size N_z of an embedding. None: the paper's, 4 for digits and 64 for the residual network.
        init: Initialisation of the kernels, see ``DigitNetwork`` and ``WideResNet``.
        optimizer: ``adam``, or ``sgd`` with Nesterov momentum 0.9 (the paper's plain residual networks).
        lr: Initial learning rate.
        lr_steps: Later learning rates as [step, rate], each valid until the next (paper); [] for none. None: decay to
            zero along a cosine.
        l2: Factor of half the sum of the kernels' squares, generated or learned. Embeddings, the generator and all
            other parameters are not regularised (paper: 5e-4 for the residual networks).
        compile: Compile the network with ``torch.compile``.

    Raises:
        InputError: If depth or width is not possible, or the data have another image size or number of classes.
    """

    def __init__(
        self,
        network: Literal["digits", "wide_resnet", "fully_connected"] = "digits",
        hyper: bool = True,
        depth: int = 40,
        width: int = 1,
        classes: int = 10,
        embedding_size: int | None = None,
        init: Literal["variance", "paper"] = "variance",
        optimizer: Literal["adam", "sgd"] = "adam",
        lr: float = 1e-3,
        lr_steps: list[list[float]] | None = None,
        l2: float = 0.0,
        compile: bool = False,
    ):
        super().__init__()
        self.save_hyperparameters()
        if lr_steps and (any(len(pair) != 2 for pair in lr_steps) or lr_steps != sorted(lr_steps)):
            raise InputError(f"model.lr_steps is {lr_steps}: give a list of [step, rate] with rising steps")
        options = {"init": init} | ({"embedding_size": embedding_size} if embedding_size else {})
        try:
            if network == "digits":
                self.network = DigitNetwork(hyper, classes, **options)
            elif network == "wide_resnet":
                self.network = WideResNet(hyper, depth, width, classes, **options)
            else:
                self.network = FullyConnectedNetwork(hyper, classes)
        except ValueError as error:
            raise InputError(f"model: {error}") from error
        self.val_error, self.val_cross_entropy = Mean(), Mean()

    def configure_model(self) -> None:
        if self.hparams.compile:
            self.network.compile()

    def configure_optimizers(self):
        h = self.hparams
        if h.optimizer == "adam":
            optimizer = torch.optim.Adam(self.parameters(), h.lr)
        else:
            optimizer = torch.optim.SGD(self.parameters(), h.lr, momentum=0.9, nesterov=True)
        steps = self.trainer.max_steps
        return by_step(optimizer, cosine(steps) if h.lr_steps is None else piecewise(h.lr, h.lr_steps))

    def setup(self, stage: str) -> None:
        h, data = self.hparams, self.trainer.datamodule
        if data.shape != self.network.shape:
            raise InputError(
                f"model.network {h.network} needs images of {_size(self.network.shape)}, but the data have "
                f"{_size(data.shape)}: choose wide_resnet for 3x32x32, digits or fully_connected for 1x28x28"
            )
        if len(data.classes) != h.classes:
            raise InputError(
                f"the data have {len(data.classes)} classes, but model.classes is {h.classes}: "
                f"give --model.classes {len(data.classes)}"
            )

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return logits (B, classes) in float32 or better, and the kernels."""
        logits, kernels = self.network(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), kernels

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        logits, kernels = self(batch.x)
        loss = F.cross_entropy(logits, batch.labels)
        self.log("train/cross_entropy", loss, prog_bar=True)
        self.log("train/error", 100 * (logits.argmax(1) != batch.labels).float().mean())
        return loss + self.hparams.l2 * l2(kernels) if self.hparams.l2 else loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        logits, kernels = self(batch.x)
        errors, cross_entropies = _scores(logits, batch.labels)
        self.val_error.update(errors)
        self.val_cross_entropy.update(cross_entropies)
        self.log("val/error", self.val_error, prog_bar=True)
        self.log("val/cross_entropy", self.val_cross_entropy)
        if batch_idx == 0:
            for name, i in self.network.shown.items():
                for statistic in ("mean", "std"):
                    self.log(f"val/{name}_{statistic}", getattr(kernels[i], statistic)(), batch_size=1, sync_dist=True)

    def on_test_start(self) -> None:
        data = self.trainer.datamodule
        train = data.sets["train"]
        weight, bias = linear_classifier(data.normalised(train.images).flatten(1), train.labels, self.hparams.classes)
        self.linear = weight.to(self.device), bias.to(self.device)
        self.scores = {name: Values().to(self.device) for name in ("model", "linear")}

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        weight, bias = (t.to(batch.x.dtype) for t in self.linear)
        logits = {"model": self(batch.x)[0], "linear": F.linear(batch.x.flatten(1), weight, bias)}
        for name, metric in self.scores.items():
            metric.update(torch.stack(_scores(logits[name].float(), batch.labels), 1))

    def on_test_epoch_end(self) -> None:
        classes = self.hparams.classes
        names = {"model": "model", "linear": "linear classifier"}
        for i, measure in enumerate(("error", "cross_entropy")):
            for name, metric in self.scores.items():
                self.log_mean(f"test/{measure}/{names[name]}", metric.compute()[:, i])
            self.log(f"test/{measure}/chance", (100 - 100 / classes, math.log(classes))[i])
            self.log(f"test/{measure}/chance/interval", 0.0)
        self.measure, *self.further_measures = (
            Measure(
                name, unit, f"test/{measure}/model", {b: f"test/{measure}/{b}" for b in ("chance", names["linear"])}
            )
            for name, unit, measure in (("error", "%", "error"), ("cross-entropy", "nats", "cross_entropy"))
        )

    def pictures(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Draw the kernels (the paper's figures 2, 8, 12 and 13) and the answers, uint8 (3, H', W')."""
        logits, kernels = self(batch.x[:SHOWN])
        return self._draw_kernels(kernels) | {"answers": self._draw_answers(batch, logits)}

    def _draw_kernels(self, kernels: list[Tensor]) -> dict[str, Tensor]:
        return {name: kernel_grid(kernels[i]) for name, i in self.network.shown.items()}

    def _draw_answers(self, batch: ImageBatch, logits: Tensor) -> Tensor:
        data, logits = self.trainer.datamodule, logits[:SHOWN]
        best, labels = logits.softmax(1).max(1), batch.labels[: len(logits)].tolist()
        answers = [
            f"{data.classes[k]}: {100 * p:.0f} %" for p, k in zip(*(part.tolist() for part in best), strict=True)
        ]
        right = [None if label < 0 else label == k for label, k in zip(labels, best.indices.tolist(), strict=True)]
        return answer_sheet(data.unnormalised(batch.x[: len(logits)]), answers, right)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor | str]:
        """Return files: the three likeliest classes of each image as text, a sheet of the images, and the kernels."""
        data, first = self.trainer.datamodule, batch.segment.problem
        logits, kernels = self(batch.x)
        top = logits.softmax(1).topk(min(3, logits.shape[1]), 1)
        lines = ["picture\tanswers and their probabilities"]
        for i, (p, k) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            number = first + i * self.trainer.world_size
            name = data.names[number] if data.names else f"test picture {number}, {data.classes[batch.labels[i]]}"
            lines.append("\t".join([name, *(f"{data.classes[c]} {q:.4f}" for c, q in zip(k, p, strict=True))]))
        files = {f"{name}.png": image for name, image in self._draw_kernels(kernels).items()}
        files[f"answers_{first:05d}.txt"] = "\n".join([*lines, ""])
        return files | {f"answers_{first:05d}.png": self._draw_answers(batch, logits)}


def linear_classifier(x: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression to inputs (N, D) with 50 steps of L-BFGS; return weights (classes, D) and biases."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning that 50 steps have not converged
        found = LogisticRegression(max_iter=50).fit(x.float().cpu().numpy(), labels.cpu().numpy())
    weight, bias = found.coef_, found.intercept_
    if len(weight) == 1:  # with two classes there is only the second's score
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    all_weights, all_biases = torch.zeros(classes, x.shape[1]), torch.full((classes,), -100.0)
    known = torch.from_numpy(found.classes_).long()  # a class without training images is never the answer
    all_weights[known], all_biases[known] = (torch.from_numpy(part).float() for part in (weight, bias))
    return all_weights, all_biases


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the error in % (0 or 100) and the cross-entropy in nats of each image."""
    return 100 * (logits.argmax(1) != labels).float(), F.cross_entropy(logits, labels, reduction="none").float()


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
