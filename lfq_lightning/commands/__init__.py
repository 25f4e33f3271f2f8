"""What `python -m lfq_lightning` can be asked for: a module with one function `add_to` for each."""

__all__: list[str] = []
