from lightning_meta.hypernetworks.layers import (
    CoordinateNetwork,
    HyperConv2d,
    HyperLSTM,
    HyperLSTMCell,
    HyperRNN,
    HyperRNNCell,
    KernelGenerator,
)

__all__ = [
    "CoordinateNetwork",
    "HyperConv2d",
    "HyperLSTM",
    "HyperLSTMCell",
    "HyperRNN",
    "HyperRNNCell",
    "KernelGenerator",
]
