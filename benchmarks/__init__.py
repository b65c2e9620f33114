"""Benchmarks of speed, each a ratio within one run: ``python -m benchmarks [name]``."""
