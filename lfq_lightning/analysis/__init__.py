"""Which layers quantization hurts, and the bits that follow from it."""
