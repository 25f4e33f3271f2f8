"""TensorRT, by files with explicit quantization."""

from lfq_lightning.targets.target import Target

# Source: NVIDIA/TensorRT, include/NvInfer.h, IQuantizeLayer: zero points are 0, scales for each channel are the
# weights'; tools/tensorflow-quantization/docs, add_custom_qdq_cases.md: of an addition the branch of a convolution has
# no quantizer; NVIDIA/TensorRT-Model-Optimizer, modelopt/onnx/quantization/int8.py lists the operations;
# onnx/onnx-tensorrt, docs/operators.md: DequantizeLinear takes no 32-bit integers, so that biases stay float. Not run
# by the authors; a file is checked by its operators.
TENSORRT = Target(
    name="tensorrt",
    operations=frozenset(
        {
            "add",  # within the convolution before it
            "mul",  # scales of its own
            "cat",
            "adaptive_avg_pool2d",  # scales of its own
            "mean of pixels",
            "avg_pool2d",
            "max_pool2d",
        }
    ),
    choosing=frozenset({"max_pool2d"}),
    one_scale=frozenset({"cat"}),
    codes="centred",
    sums="fused",
    results=frozenset(),
    narrow=True,
    least_bits=8,
    least_group=64,  # of weights in 4 bits that meet floats
)
