"""LiteRT, formerly TensorFlow Lite."""

from lfq_lightning.targets.target import Target

# Source: tensorflow/tensorflow, tensorflow/lite/g3doc/performance/quantization_spec.md: int8 activations, symmetric
# weights, and the operations whose result has their operand's scale, averages over windows, concatenations and
# interpolation among them. Found with litert-torch 0.10: weights must be floats behind quantizers of their own.
LITERT = Target(
    name="litert",
    operations=frozenset(
        {
            "add",  # scales of its own
            "sub",
            "mul",
            "cat",
            "adaptive_avg_pool2d",  # MEAN, scales of its own
            "mean of pixels",
            "avg_pool2d",
            "max_pool2d",
            "interpolate nearest",
            "interpolate bilinear",
        }
    ),
    choosing=frozenset({"max_pool2d", "interpolate nearest"}),
    one_scale=frozenset({"cat", "avg_pool2d", "interpolate bilinear"}),
    codes="any",  # unsigned ones are stored 128 lower
    sums="operands",
    results=frozenset({"linear", "conv1d", "conv2d"}),
    narrow=True,
    least_bits=8,
    least_group=None,
)
