"""An optimizer learned for neural style transfer (Andrychowicz et al. 2016, section 3.4)."""

import math

import torch
from torch import Tensor

from lightning_meta.drawing.sheets import image_sheet
from lightning_meta.learned_optimizers.learning_to_learn import OURS, LearningToLearn
from lightning_meta.learned_optimizers.problems import StyleTransfers
from lightning_meta.learned_optimizers.unroll import unroll

FRAMES = 32  # of an animation


class LearningStyle(LearningToLearn):
    """``LearningToLearn`` that also shows the images: figure 9 of the paper, and an animation of the optimization."""

    def pictures(self, batch: StyleTransfers) -> dict[str, Tensor]:
        """Draw the loss curves, and a row with content, style and results for each problem, uint8 (3, H', W')."""
        runs = self.compare(batch)
        curves = {rule: losses.T for rule, (losses, _) in runs.items()}
        return {"curves": self._draw("validation", curves), "pictures": self._sheet(batch, runs)}

    def predict_step(self, batch: StyleTransfers, batch_idx: int) -> dict[str, Tensor]:
        """Return results, a sheet with their content and style, loss curves and animations, by file name."""
        runs = self.compare(batch)
        first = batch.segment.problem
        files = {f"{first:03d}_sheet.png": self._sheet(batch, runs)}
        files[f"{first:03d}_curves.png"] = self._draw("prediction", {r: losses.T for r, (losses, _) in runs.items()})
        for j, frames in enumerate(self._frames(batch)):
            number = first + j * self.trainer.world_size
            files[f"{number:03d}.png"] = frames[-1]
            files[f"{number:03d}.gif"] = frames
        return files

    def _sheet(self, batch: StyleTransfers, runs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        best = min(list(runs)[1:], key=lambda rule: runs[rule][0][-1].mean().nan_to_num(torch.inf), default=OURS)
        results = {rule: runs[rule][1].view_as(batch.contents) for rule in dict.fromkeys((OURS, best))}
        return image_sheet(
            [
                {"content": content, "style": batch.style[0]} | {rule: result[j] for rule, result in results.items()}
                for j, content in enumerate(batch.contents)
            ]
        )

    def _frames(self, batch: StyleTransfers) -> Tensor:
        """Run the optimization and return images on its way, uint8 (B, frames, 3, H, W)."""
        steps = batch.segment.stop
        stride = math.ceil(steps / FRAMES)
        theta, state = batch.start, self.rule.start(len(batch.start), batch.shapes)
        frames = [theta]
        for start in range(0, steps, stride):
            run = unroll(self.rule, batch, theta, state, start, min(steps, start + stride))
            theta, state = run.theta, run.state
            frames.append(theta)
        frames = torch.stack(frames, 1).unflatten(2, batch.contents.shape[1:])
        return (frames.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
