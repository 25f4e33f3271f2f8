"""ONNX Runtime on x86-64, its CPU execution provider."""

from lfq_lightning.targets.target import Target

# Source: microsoft/onnxruntime, onnxruntime/core/optimizer/qdq_transformer/selectors_actions:
# qdq_selector_action_transformer.cc lists the operations, and qdq_selectors.cc what they need: a DequantizeLinear at
# every operand, and one QuantizeLinear as the only reader of the result. Found with 1.32: reduction by ReduceMean,
# subtraction, padding, linear interpolation and transposed convolution stay in float; signed activations turn to float
# where several read them (qdq_s8_to_u8.cc); scales for each channel of an activation fail when a session runs.
# The products of attention are left in float, as the probabilities between them are.
ONNXRUNTIME = Target(
    name="onnxruntime",
    operations=frozenset(
        {
            "add",  # QLinearAdd, scales of its own
            "mul",  # QLinearMul, scales of its own
            "cat",  # QLinearConcat, scales of its own
            "adaptive_avg_pool2d",  # QLinearGlobalAveragePool, scales of its own
            "mean of pixels",  # exported as a global average pooling
            "avg_pool2d",  # QLinearAveragePool, scales of its own
            "max_pool2d",  # MaxPool of unsigned codes
            "interpolate nearest",  # Resize of unsigned codes; other modes are in float
        }
    ),
    choosing=frozenset({"max_pool2d", "interpolate nearest"}),
    one_scale=frozenset(),
    codes="unsigned",
    sums="operands",
    results=frozenset(),
    narrow=False,
    least_bits=1,
    least_group=16,  # MatMulNBits, which reads an input that is not quantized
)
