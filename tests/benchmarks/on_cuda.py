"""Times on a GPU by its own events, and the larger of the networks that are timed there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median

import pytest
import torch
from torch import Tensor, nn

from tests.benchmarks.networks import transformer

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def device_note() -> str:
    """The GPU and what runs it."""
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, torch {torch.__version__}"


def milliseconds(call: Callable[[], object]) -> float:
    """What one call takes on the device, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def medians(calls: Mapping[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """Median milliseconds of each, measured in alternation."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            taken[name].append(milliseconds(call))
    return {name: median(values) for name, values in taken.items()}


def replayed(call: Callable[[], object], times: int) -> Callable[[], None]:
    """That many calls as one CUDA graph, so that what Python adds to each does not count."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50(classes: int = 1000) -> nn.Module:
    """ResNet-50 (He et al. 2016), with the stride in the 3x3 convolution."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, 2 if stage and not block else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def make(name: str, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with one batch of inputs and labels."""
    torch.manual_seed(0)
    if name == "resnet50":
        return resnet50(), torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    return transformer(768, 12, 64, 100), torch.randn(batch, 512, 64), torch.randint(100, (batch, 512))
