"""PyTorch's own compiler on x86-64, by torchao's lowering of programs to the kernels of oneDNN."""

from lfq_lightning.targets.target import Target

# Source: pytorch/ao, torchao/quantization/pt2e/quantizer/x86_inductor_quantizer.py, and pt2e/inductor_passes/x86.py,
# whose patterns are: a product with what clips behind it, and with an addition of another tensor, whose product has no
# quantizer. Found with torchao 0.18: signed activations are refused; a pooling or a concatenation needs quantizers
# before and behind it, of one scale; interpolation stays in float.
X86 = Target(
    name="x86",
    operations=frozenset(
        {
            "add",  # within the product before it
            "mul",  # scales of its own
            "cat",
            "adaptive_avg_pool2d",
            "mean of pixels",
            "avg_pool2d",
            "max_pool2d",
        }
    ),
    choosing=frozenset({"max_pool2d"}),
    one_scale=frozenset({"cat", "adaptive_avg_pool2d", "mean of pixels", "avg_pool2d"}),
    codes="unsigned",
    sums="fused",
    results=frozenset(),
    narrow=True,
    least_bits=8,
    least_group=None,
)
