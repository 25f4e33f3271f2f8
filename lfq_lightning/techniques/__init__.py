"""Optional defences for low bits: each a callback of its own that finds its quantizers in the model."""
