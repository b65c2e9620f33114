"""Batch normalisation over the batches of all processes, on any device (``torch.nn.SyncBatchNorm`` needs GPUs)."""

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` with statistics over all processes (Ioffe and Szegedy 2015).

    N processes with batches of size B get the result of one process with a batch of size N*B. Each process must have
    the same number of values. In evaluation and with one process it is ``torch.nn.BatchNorm2d``.

    Example:
        >>> import torch
        >>> BatchNorm2d(3)(torch.ones(2, 3, 4, 5)).shape
        torch.Size([2, 3, 4, 5])
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch (B, C, H, W)."""
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
            # momentum None: a cumulative average
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        scale = self.weight / (variance + self.eps).sqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)
