"""What one example batch does in a network: which operations it meets, what they read, and who reads what they make."""

__all__: list[str] = []
