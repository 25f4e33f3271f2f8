"""Quantizers in a Trainer's run: optimizers, phases, neighbours and records."""

__all__: list[str] = []
