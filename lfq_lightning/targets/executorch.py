"""XNNPACK, by which ExecuTorch runs networks on the processors of telephones and computers."""

from lfq_lightning.targets.target import Target

# Source: pytorch/executorch, backends/xnnpack: partition/config/gemm_configs.py wants one QuantizeLinear as the only
# reader of a layer's result, quantizer/xnnpack_quantizer_utils.py lists what shares a scale, and operators/ has the
# types. Found with 1.5: a pooling without quantizers on both sides, or a concatenation with several scales, fails to
# load; an average over windows, interpolation and the products of attention are in float; a layer without a
# quantized result is given wrong numbers, so that the exporter writes such layers in float (export/pt2_passes.py).
EXECUTORCH = Target(
    name="executorch",
    operations=frozenset(
        {
            "add",  # scales of its own
            "sub",
            "mul",
            "cat",
            "adaptive_avg_pool2d",  # global; scales of its own
            "mean of pixels",
            "max_pool2d",
        }
    ),
    choosing=frozenset({"max_pool2d"}),
    one_scale=frozenset({"cat"}),
    codes="any",  # unsigned ones are stored 128 lower
    sums="operands",
    results=frozenset({"linear", "conv1d", "conv2d", "conv_transpose2d"}),
    narrow=True,
    least_bits=8,  # what clips before a quantizer parts it from its layer
    least_group=None,  # those need inputs that are quantized as they come
)
