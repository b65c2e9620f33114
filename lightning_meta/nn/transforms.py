"""Whether PyTorch transforms the running code, so that custom operators must make way for plain PyTorch."""

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is active.

    A custom operator has a backward formula only; under these it would fail or silently give zeros. The first check is
    the one that ``torch.autograd.Function`` makes; the second sees ``forward_ad.dual_level`` without torch.func.
    torch.compile evaluates both while it traces.

    >>> is_transformed()
    False
    >>> torch.func.grad(lambda x: x * is_transformed())(torch.tensor(2.0))
    tensor(1.)
    """
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or forward_ad._current_level >= 0
