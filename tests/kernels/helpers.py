import os
import shutil
import sys

import pytest
import torch

# Not whether the kernels can be built: kernels that no longer compile are to fail.
HAS_COMPILER = sys.platform.startswith("linux") and any(
    map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))
)
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler on this machine")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, by the norm of `b`."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
