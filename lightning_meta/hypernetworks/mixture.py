"""Mixture densities of pen strokes (Graves 2013, section 4; Ha et al. 2016, section 4.5).

M is the number of a mixture's components. A point is (dx, dy, e).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Without these bounds densities can become infinite, and training ends in NaN.
MIN_LOG_SIGMA = -6.0
MAX_RHO = 0.999


class Mixture(NamedTuple):
    """Predicted distribution of a point: M bivariate Gaussians for its offset, and a Bernoulli variable for the pen.

    >>> import torch
    >>> mixture = Mixture.of(torch.zeros(1, 2 * 6 + 1))  # standard Gaussians, and P(lift) = 1/2
    >>> mixture.log_loss(torch.zeros(1, 3))  # log(2 pi) + log(2)
    tensor([2.5310])
    """

    log_pi: Tensor  # (..., M)
    mu: Tensor  # (..., M, 2)
    log_sigma: Tensor  # (..., M, 2)
    rho: Tensor  # (..., M)
    lift: Tensor  # (...), logit of the probability that the pen is lifted after the point

    @classmethod
    def of(cls, outputs: Tensor) -> "Mixture":
        """Create from a network's outputs (..., 6 M + 1), in float32 or better.

        pi is a softmax, sigma an exponential, rho a hyperbolic tangent (Graves 2013, equations 18 to 22).
        The paper does not say: sigma is at least e^-6, the absolute value of rho at most 0.999.
        """
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        lift, *parts = outputs.split([1, *[outputs.shape[-1] // 6] * 6], -1)
        pi, mu_x, mu_y, log_sigma_x, log_sigma_y, rho = parts
        return cls(
            pi.log_softmax(-1),
            torch.stack([mu_x, mu_y], -1),
            torch.stack([log_sigma_x, log_sigma_y], -1).clamp(min=MIN_LOG_SIGMA),
            MAX_RHO * torch.tanh(rho),
            lift.squeeze(-1),
        )

    def log_loss(self, points: Tensor) -> Tensor:
        r"""Compute the loss (...) of points (..., 3) in nats.

        .. math:: -\log \sum_j \pi_j N(x, y | \mu_j, \sigma_j, \rho_j) - \log P(e)
        """
        d = (points[..., None, :2] - self.mu) * torch.exp(-self.log_sigma)
        x, y = d.unbind(-1)
        rest = 1 - self.rho.square()
        Z = x.square() + y.square() - 2 * self.rho * x * y
        log_N = -Z / (2 * rest) - self.log_sigma.sum(-1) - rest.log() / 2 - math.log(2 * math.pi)
        lifted = F.binary_cross_entropy_with_logits(self.lift, points[..., 2], reduction="none")
        return lifted - (self.log_pi + log_N).logsumexp(-1)

    def sample(self, temperature: float, random: torch.Generator | None) -> Tensor:
        """Sample a point (B, 3) from each of B mixtures, on the CPU.

        Args:
            temperature: Below 1, samples are closer to the most likely ones. 1: the mixture itself.
            random: Generator on the CPU.
        """
        log_pi, mu, log_sigma, rho, lift = (part.detach().float().cpu() for part in self)
        j = torch.multinomial((log_pi / temperature).softmax(-1), 1, generator=random)
        (mu, log_sigma), rho = (
            (t.gather(1, j[..., None].expand(-1, 1, 2))[:, 0] for t in (mu, log_sigma)),
            rho.gather(1, j),
        )
        x, y = torch.randn(len(j), 2, generator=random).split(1, 1)
        y = rho * x + (1 - rho.square()).sqrt() * y
        offset = mu + temperature**0.5 * log_sigma.exp() * torch.cat([x, y], 1)
        lifted = torch.rand(len(j), 1, generator=random) < torch.sigmoid(lift / temperature)[:, None]
        return torch.cat([offset, lifted.float()], 1)
