"""Optional defences for low bits: each a callback of its own that finds its quantizers in the model."""

from lfq_lightning.techniques.batch_norm_statistics import BatchNormStatistics
from lfq_lightning.techniques.bit_annealing import BitAnnealing
from lfq_lightning.techniques.distillation import Distillation, distillation_loss
from lfq_lightning.techniques.oscillation_control import OscillationControl
from lfq_lightning.techniques.while_learning import while_learning
from lfq_lightning.training.batch_norm import reestimate_batch_norm

__all__ = [
    "BatchNormStatistics",
    "BitAnnealing",
    "Distillation",
    "OscillationControl",
    "distillation_loss",
    "reestimate_batch_norm",
    "while_learning",
]
