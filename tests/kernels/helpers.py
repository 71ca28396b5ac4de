import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch


def has_openmp(compiler: str) -> bool:
    """Whether a compiler, with its arguments, takes a program with OpenMP. Kernels that it doesn't take are to fail."""
    if not sys.platform.startswith("linux") or not compiler:
        return False
    command = [*shlex.split(compiler), "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input="#include <omp.h>\n", text=True, capture_output=True).returncode == 0


HAS_COMPILER = has_openmp(os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), ""))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler with OpenMP on this machine")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference, by the norm of `b`."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=torch.channels_last)
