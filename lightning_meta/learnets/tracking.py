"""Training and evaluation of the tracker (Bertinetto et al. 2016, section 4.2).

Shapes: B triplets; K places along a side of a score map.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_meta.learnets.layers import filter_variation
from lightning_meta.learnets.protocols import (
    SupervisedRun,
    centre_distance,
    one_pass,
    overlap,
    precision_curve,
    success_curve,
    supervised,
    vot_summary,
    write_vot,
)
from lightning_meta.learnets.tracker import (
    LearnetTracker,
    Network,
    SiameseNetwork,
    StillTracker,
    TrackerVariant,
    labels,
    logistic_loss,
    peaks,
    upsample,
)
from lightning_meta.learnets.tracking_data import Triplets
from lightning_meta.learnets.tracking_figures import triplet_sheet, with_boxes
from lightning_meta.running.experiment import Experiment
from lightning_meta.running.learning_rates import by_step, exponential
from lightning_meta.running.measures import Measure
from lightning_meta.running.metrics import Mean, Values

STILL = "the object stays where it was"


class SequenceResult(NamedTuple):
    """Results of a tracker on one sequence."""

    supervised: SupervisedRun
    success: float  # OTB's area under the curve
    precision: float  # OTB's precision at 20 pixels


class LearnetTracking(Experiment):
    """Train a network to find an exemplar's object in a larger search image, and test it as a tracker.

    Args:
        variant: Architecture: ``siamese``, ``unshared``, ``factorised`` or ``learnet``; see ``SiameseNetwork``.
        pupil: Sizes of the network that embeds crops: ``A``, ``B`` or ``C`` (paper), or the small ``D``.
        learnet: Sizes of the learnet, likewise.
        gain: Fixed factor of the scores (the authors' later tracker: 1e-3).
        radius: Distance from the object's centre, in pixels, up to which places of the score map have label +1.
        balanced: Let the places with label +1 and those with -1 each contribute half of the loss.
        scales: Number of scales that the tracker searches: 1, 3 or 5 (paper).
        lr: Learning rate of SGD.
        final_lr: Learning rate at the last step, reached by geometric decay.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of all parameters.
    """

    def __init__(
        self,
        variant: TrackerVariant = "learnet",
        pupil: Network = "B",
        learnet: Network = "A",
        gain: float = 1e-3,
        radius: float = 16,
        balanced: bool = False,
        scales: int = 5,
        lr: float = 1e-2,
        final_lr: float = 1e-5,
        momentum: float = 0.9,
        weight_decay: float = 5e-3,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.network = SiameseNetwork(variant, pupil, learnet, gain)
        self.network.to(memory_format=torch.channels_last)
        self.metrics = nn.ModuleDict({name: Mean() for name in ("loss", "distance", "variation")})
        self.test_distances = nn.ModuleDict({"model": Values(), STILL: Values()})
        self.runs: dict[str, dict[int, SequenceResult]] = {}

    def configure_optimizers(self):
        h = self.hparams
        optimizer = torch.optim.SGD(self.parameters(), h.lr, h.momentum, weight_decay=h.weight_decay)
        return by_step(optimizer, exponential(h.final_lr / h.lr, self.trainer.max_steps))

    def forward(self, batch: Triplets) -> tuple[Tensor, Tensor | None]:
        """Return score maps (B, K, K) and the predicted filters (B, d, f, f), or None."""
        target = self.network.describe(batch.exemplars)
        scores = self.network(target, batch.searches)[:, 0]
        return scores, target.filters if self.hparams.variant == "learnet" else None

    def loss(self, scores: Tensor, batch: Triplets) -> Tensor:
        """Return the logistic loss of score maps (B, K, K)."""
        return logistic_loss(
            scores, labels(scores, batch.label, batch.offset, self.hparams.radius), self.hparams.balanced
        )

    def training_step(self, batch: Triplets, batch_idx: int) -> Tensor:
        scores, filters = self(batch)
        loss = self.loss(scores, batch)
        self.log("train/loss", loss, prog_bar=True)
        if (batch.label > 0).any():
            self.log("train/centre_distance", _distances(scores, batch).mean())
        if filters is not None:
            self.log("train/filter_variation", filter_variation(filters))
        return loss

    def validation_step(self, batch: Triplets, batch_idx: int) -> None:
        scores, filters = self(batch)
        self.metrics["loss"].update(self.loss(scores, batch), weight=len(scores))
        self.log("val/loss", self.metrics["loss"])
        self.metrics["distance"].update(_distances(scores, batch))
        self.log("val/centre_distance", self.metrics["distance"], prog_bar=True)
        if filters is not None:
            self.metrics["variation"].update(filter_variation(filters), weight=len(scores))
            self.log("val/filter_variation", self.metrics["variation"])

    def on_test_start(self) -> None:
        self.runs = {"model": {}, STILL: {}}
        self.vot = Path(self.trainer.log_dir or ".") / "vot"  # log_dir is a collective call: all processes make it
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            self.vot.mkdir(parents=True, exist_ok=True)

    def test_step(self, batch: Triplets | int, batch_idx: int, dataloader_idx: int = 0) -> None:
        if isinstance(batch, Triplets):
            self.test_distances["model"].update(_distances(self(batch)[0], batch))
            self.test_distances[STILL].update(torch.linalg.vector_norm(batch.offset, dim=1))
            return
        video = self.trainer.datamodule.test_videos[batch]
        for name, tracker in {"model": self.tracker(), STILL: StillTracker()}.items():
            run, boxes = supervised(tracker, video), one_pass(tracker, video)
            success = success_curve(overlap(boxes, video.boxes)[1:]).mean().item()
            precision = precision_curve(centre_distance(boxes, video.boxes)[1:])[20].item()
            self.runs[name][batch] = SequenceResult(run, success, precision)
        if not self.trainer.fast_dev_run:
            write_vot(self.vot / f"{video.name.replace('/', '_')}.txt", self.runs["model"][batch].supervised)

    def tracker(self) -> LearnetTracker:
        """Return a tracker with the network's current weights."""
        return LearnetTracker(self.network, self.hparams.scales)

    def on_test_epoch_end(self) -> None:
        values = {}
        for name, metric in self.test_distances.items():
            values[name] = {"peak to object, pixels": metric.compute().mean()}
            metric.reset()
        for name, mine in self.runs.items():
            runs = self._of_all_processes(mine)
            vot = vot_summary([run.supervised for run in runs])
            values[name] |= {
                "VOT accuracy, overlap": vot.accuracy,
                "VOT failures, number": float(vot.failures),
                "OTB success, area under the curve": sum(run.success for run in runs) / len(runs),
                "OTB precision, share within 20 pixels": sum(run.precision for run in runs) / len(runs),
            }
        measures = []
        for title in values["model"]:
            names = {name: f"test/{title}/{name}" for name in values}
            for name, key in names.items():
                self.log(key, values[name][title])
            measure, unit = title.split(", ")
            measures.append(Measure(measure, unit, names["model"], {STILL: names[STILL]}))
        self.measure, *self.further_measures = measures

    def _of_all_processes(self, mine: dict[int, SequenceResult]) -> list[SequenceResult]:
        """Gather the results of all processes, in the order of the sequences."""
        parts = [mine]
        if self.trainer.world_size > 1:
            parts = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, mine)
        runs = {number: run for part in parts for number, run in part.items()}
        return [runs[number] for number in sorted(runs)]

    def pictures(self, batch: Triplets) -> dict[str, Tensor]:
        """Draw the first four triplets of a batch like the paper's figure 4: uint8 (3, H', W')."""
        few = Triplets(*(None if values is None else values[:4] for values in batch[:-1]), batch.segment)
        scores, filters = self(few)
        centres = [place if label > 0 else None for place, label in zip(few.offset, few.label, strict=True)]
        return {"searches": triplet_sheet(few.exemplars, few.searches, scores, filters, centres)}

    def predict_step(self, batch: int, batch_idx: int) -> dict[str, Any]:
        """Track an object. Return its boxes as text, one line a frame, and the video with the boxes, by file name."""
        video, tracker = self.trainer.datamodule.videos_to_track[batch], self.tracker()
        frames = video.frames()
        tracker.start(next(frames), video.box)
        boxes = [video.box, *map(tracker.track, frames)]
        lines = [",".join(f"{number:.2f}" for number in box.tolist()) + "\n" for box in boxes]
        return {f"{video.name}.txt": "".join(lines), f"{video.name}.mp4": with_boxes(video.frames(), boxes)}


def _distances(scores: Tensor, batch: Triplets) -> Tensor:
    """Return the distance in pixels from the peak to the object's centre for each search that shows the object."""
    shown = batch.label > 0
    return torch.linalg.vector_norm(peaks(upsample(scores[shown])) - batch.offset[shown], dim=1)
