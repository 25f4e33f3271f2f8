"""What steps: scales and zero points by themselves or in users' optimizers, and longer steps of few bits."""

__all__: list[str] = []
