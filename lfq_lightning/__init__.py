"""Quantization-aware training with learned scales and zero points, as a Lightning callback."""

from lfq_lightning.analysis import Sensitivity, load_rules, propose_bits, save_rules, sensitivity
from lfq_lightning.calibration import calibrate
from lfq_lightning.callback import QuantizationAwareTraining
from lfq_lightning.checkpoint import load_from_checkpoint, load_state_dict
from lfq_lightning.export import export_onnx, export_pt2, freeze
from lfq_lightning.ops import backends, fake_quantize
from lfq_lightning.phases import project_, set_phase
from lfq_lightning.placement import Placement, attach, detach, quantizers
from lfq_lightning.quantizer import LearnableFakeQuantize
from lfq_lightning.records import Summary, plot_trajectories, summarize
from lfq_lightning.report import write_report
from lfq_lightning.rules import Rule
from lfq_lightning.schedule import PhaseSchedule
from lfq_lightning.spec import QuantSpec
from lfq_lightning.techniques import BatchNormStatistics, BitAnnealing, Distillation, OscillationControl, while_learning

__all__ = [
    "BatchNormStatistics",
    "BitAnnealing",
    "Distillation",
    "LearnableFakeQuantize",
    "OscillationControl",
    "PhaseSchedule",
    "Placement",
    "QuantSpec",
    "QuantizationAwareTraining",
    "Rule",
    "Sensitivity",
    "Summary",
    "attach",
    "backends",
    "calibrate",
    "detach",
    "export_onnx",
    "export_pt2",
    "fake_quantize",
    "freeze",
    "load_from_checkpoint",
    "load_rules",
    "load_state_dict",
    "plot_trajectories",
    "project_",
    "propose_bits",
    "quantizers",
    "save_rules",
    "sensitivity",
    "set_phase",
    "summarize",
    "while_learning",
    "write_report",
]
