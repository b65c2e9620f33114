"""An optimizer learned for neural style transfer (Andrychowicz et al. 2016, section 3.4)."""

import torch
from torch import Tensor

from lightning_meta.drawing.sheets import picture_sheet
from lightning_meta.learned_optimizers.learning_to_learn import OURS, LearningToLearn
from lightning_meta.learned_optimizers.problems import StyleTransfers
from lightning_meta.learned_optimizers.unroll import unroll

FRAMES = 32  # of the film of an optimization


class LearningStyle(LearningToLearn):
    """``LearningToLearn`` that shows what it paints: figure 9 of the paper, and a film of how a picture comes about."""

    def pictures(self, batch: StyleTransfers) -> dict[str, Tensor]:
        """Curves, and content, style and results of each problem in a row, uint8 (3, H', W')."""
        runs = self.compare(batch)
        curves = {rule: losses.T for rule, (losses, _) in runs.items()}
        return {"curves": self._draw("validation", curves), "pictures": self._sheet(batch, runs)}

    def predict_step(self, batch: StyleTransfers, batch_idx: int) -> dict[str, Tensor]:
        """Results, the sheet with their content and style, the curves and a film for each, by file name."""
        runs = self.compare(batch)
        first = batch.segment.problem
        drawn = {f"{first:03d}_sheet.png": self._sheet(batch, runs)}
        drawn[f"{first:03d}_curves.png"] = self._draw("prediction", {r: losses.T for r, (losses, _) in runs.items()})
        films = self._film(batch)  # (B, frames, 3, H, W)
        for j, film in enumerate(films):
            number = first + j * self.trainer.world_size
            drawn[f"{number:03d}.png"] = film[-1]
            drawn[f"{number:03d}.gif"] = film
        return drawn

    def _sheet(self, batch: StyleTransfers, runs: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        best = min(list(runs)[1:], key=lambda rule: runs[rule][0][-1].mean().nan_to_num(torch.inf), default=OURS)
        results = {rule: runs[rule][1].view_as(batch.contents) for rule in dict.fromkeys((OURS, best))}
        return picture_sheet(
            [
                {"content": content, "style": batch.style[0]} | {rule: result[j] for rule, result in results.items()}
                for j, content in enumerate(batch.contents)
            ]
        )

    def _film(self, batch: StyleTransfers) -> Tensor:
        """The optimization's pictures, uint8 (B, frames, 3, H, W)."""
        steps = batch.segment.stop
        theta, state = batch.start, self.rule.start(len(batch.start), batch.shapes)
        frames = [theta]
        for start in range(0, steps, -(-steps // FRAMES)):
            run = unroll(self.rule, batch, theta, state, start, min(steps, start - (-steps // FRAMES)))
            theta, state = run.theta, run.state
            frames.append(theta)
        frames = torch.stack(frames, 1).unflatten(2, batch.contents.shape[1:])
        return (frames.float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
