"""The fake-quantize operation: one definition, several implementations that agree bit for bit."""

from lfq_lightning.ops.autograd import in_graph_of, quantize
from lfq_lightning.ops.backends import backends
from lfq_lightning.ops.function import Saturation, check_range, fake_quantize
from lfq_lightning.ops.power_of_two import nearest_power_of_two, power_of_two_above, power_of_two_below
from lfq_lightning.ops.reference import effective, measure, not_finite, spread

__all__ = [
    "Saturation",
    "backends",
    "check_range",
    "effective",
    "fake_quantize",
    "in_graph_of",
    "measure",
    "nearest_power_of_two",
    "not_finite",
    "power_of_two_above",
    "power_of_two_below",
    "quantize",
    "spread",
]
