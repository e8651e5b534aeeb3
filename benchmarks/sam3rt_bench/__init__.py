"""Measuring a bundle: stages, side by side, curves, and the distance to the machine's limits."""
