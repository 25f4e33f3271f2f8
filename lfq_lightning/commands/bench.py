"""`python -m lfq_lightning bench FILE.onnx [--against FLOAT.onnx]`: latency, share of integers and size, as a table."""

from __future__ import annotations

import argparse
from pathlib import Path

from lfq_lightning.export.bench import bench


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = commands.add_parser("bench", help="latency and size of exported files", description=__doc__)
    parser.add_argument("file", type=Path, nargs="+", help="files that `export_onnx` or another tool wrote")
    parser.add_argument("--against", type=Path, help="the file that the others are a share of, such as the float one")
    parser.add_argument("--batch", type=int, default=1, help="length of dimensions that may vary (%(default)s)")
    parser.add_argument("--runs", type=int, default=50, help="of each file, in turn (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the runtime (%(default)s)")
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime", help="(%(default)s)")
    parser.set_defaults(run=_bench)


def _bench(given: argparse.Namespace) -> None:
    files = ([] if given.against is None else [given.against]) + given.file
    print(bench(files, batch=given.batch, runs=given.runs, threads=given.threads, runtime=given.runtime))
