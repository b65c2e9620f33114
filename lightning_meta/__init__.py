"""Networks that write other networks: four papers as one PyTorch Lightning application."""

__version__ = "0.1.0"
