"""Networks that write other networks: four papers as one PyTorch Lightning application."""
