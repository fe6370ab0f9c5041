"""Timings against peers, as ratios: ``python -m benchmarks``."""
