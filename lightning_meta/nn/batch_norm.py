"""Batch normalisation over the batches of all processes, on any device (torch's own needs GPUs)."""

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` that gives N processes of batch B what one of batch N*B gets (Ioffe and Szegedy 2015).

    Every process must bring the same number of values.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalises (B, C, H, W)."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        processes = torch.distributed.get_world_size() if distributed else 1
        if not self.training or processes == 1:
            return super().forward(x)
        self._check_input_dim(x)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = all_reduce(values.mean((0, 2, 3))) / processes
        centred = values - mean[:, None, None]
        variance = all_reduce(centred.square().mean((0, 2, 3))) / processes
        with torch.no_grad():
            self.num_batches_tracked += 1
            count = processes * x.numel() / x.shape[1]
            # None: a plain average
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
