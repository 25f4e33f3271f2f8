"""A page about a quantized model: what it is made of, how it came to be, and what each layer costs."""

from lfq_lightning.report.writing import write_report

__all__ = ["write_report"]
