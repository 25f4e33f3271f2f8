"""What knows the Trainer: how long it runs, its strategy, its other callbacks, its module, and its checkpoints."""

__all__: list[str] = []
