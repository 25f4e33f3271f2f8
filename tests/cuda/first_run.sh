#!/bin/sh
# All that a GPU can tell, in the order of tests/cuda/README.md; a part that fails does not stop the others.
cd "$(dirname "$0")/../.." || exit 1
to=.benchmarks/gpu
mkdir -p "$to"

part() { # its name, its most seconds, its command
    name=$1 most=$2
    shift 2
    timeout "$most" "$@" > "$to/$name.log" 2>&1
    echo "$name: exit $?, $(grep -E ' (passed|failed|error)' "$to/$name.log" | tail -n 1)" | tee -a "$to/summary.txt"
}

{
    date
    nvidia-smi --query-gpu=name,driver_version,power.limit --format=csv,noheader
    python -c "import torch, triton; print('torch', torch.__version__, 'CUDA', torch.version.cuda, 'Triton', triton.__version__)"
} 2>&1 | tee "$to/summary.txt"
part cuda_tests 300 python -m pytest -m cuda -n 0 -q tests/cuda
part bandwidth 120 python -m pytest -m cuda -q tests/benchmarks/test_cuda_bandwidth.py --benchmarks "$to"
part eager 300 python -m pytest -m cuda -q tests/benchmarks/test_cuda_step.py -k eager --benchmarks "$to"
part compiled 600 python -m pytest -m cuda -q tests/benchmarks/test_cuda_step.py -k compiled --benchmarks "$to"
part static 300 python -m tests.benchmarks.cuda_static
