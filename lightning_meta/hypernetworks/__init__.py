from lightning_meta.hypernetworks.layers import (
    CoordinateNetwork,
    HyperConv2d,
    HyperLSTM,
    HyperLSTMCell,
    HyperRNN,
    HyperRNNCell,
    KernelGenerator,
)
from lightning_meta.hypernetworks.recurrent import LSTM, LSTMCell

__all__ = [
    "LSTM",
    "CoordinateNetwork",
    "HyperConv2d",
    "HyperLSTM",
    "HyperLSTMCell",
    "HyperRNN",
    "HyperRNNCell",
    "KernelGenerator",
    "LSTMCell",
]
