"""Hydra groups, which every app finds beside which this package is installed."""
