"""OpenVINO on x86-64, its CPU plugin."""

from lfq_lightning.targets.target import Target

# Source: openvinotoolkit/openvino, src/common/low_precision_transformations, whose documentation says what becomes of
# the scales around each operation, and nncf/common/hardware/setups/cpu.py of NNCF 3.4. Found with 2026.4: what reads a
# concatenation is in float unless all its operands have one scale; a convolution before a pooling gives floats unless a
# quantizer stands between the two; unsigned weights are convolved in float; additions and multiplications take either,
# fused into what is before them.
OPENVINO = Target(
    name="openvino",
    operations=frozenset(
        {
            "add",
            "mul",
            "cat",
            "adaptive_avg_pool2d",
            "mean of pixels",
            "avg_pool2d",
            "max_pool2d",
            "interpolate nearest",  # other modes are in float, and what reads them
        }
    ),
    choosing=frozenset({"max_pool2d", "interpolate nearest"}),
    one_scale=frozenset({"cat"}),
    codes="any",
    sums="any",
    results=frozenset(),
    narrow=False,
    least_bits=1,
    least_group=1,
)
