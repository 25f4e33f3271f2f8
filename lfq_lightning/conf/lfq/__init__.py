"""The Hydra groups `quant`, `schedule`, `target`, `recipe` and `technique`, found by every app beside which this is installed."""
