"""Which layers quantization hurts, and the bits that follow from it."""

from lfq_lightning.analysis.bits import load_rules, propose_bits, save_rules
from lfq_lightning.analysis.sensitivity import Sensitivity, SensitivityRow, sensitivity

__all__ = ["Sensitivity", "SensitivityRow", "load_rules", "propose_bits", "save_rules", "sensitivity"]
