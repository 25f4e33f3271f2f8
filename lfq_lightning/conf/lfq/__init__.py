"""The Hydra groups `quant`, `schedule` and `technique`, found by every app beside which this is installed."""
