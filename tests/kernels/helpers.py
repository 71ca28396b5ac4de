import pytest
import torch

from convmixer_timm.kernels import build

needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C++ compiler with OpenMP on this machine")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, by the norm of `b`."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
