"""Builds ``kernels.cpp`` with the machine's C++ compiler at first use and loads it.

Nothing is built at import or for inference. Where there is no compiler (or no OpenMP), `library` gives None and
the callers take PyTorch's own operations.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..files import atomic_path, cache_dir

__all__ = ["CHANNELS", "enabled", "library", "pointers", "set_fast_training", "trains_here", "transformed", "watched"]

CHANNELS = 16  # the kernels take multiples of so many channels

_logger = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("kernels.cpp")
# Predictive commoning keeps what it has loaded in registers that the sums need: twice the time at kernel size 5 or 9.
_FLAGS = (
    "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fno-predictive-commoning -fopenmp -shared -fPIC"
).split()
_enabled = os.environ.get("CONVMIXER_TIMM_FAST", "1") != "0"


def set_fast_training(enable: bool = True) -> None:
    """Turn the fast CPU training kernels on or off (``CONVMIXER_TIMM_FAST=0`` in the environment does it too)."""
    global _enabled
    _enabled = enable


def enabled() -> bool:
    """Whether the fast CPU training kernels may be used."""
    return _enabled


def transformed() -> bool:
    """Whether torch.func (vmap, jvp, …) transforms what runs: it can't look into these kernels."""
    # torch has no public way to ask; torch.autograd.Function itself asks so.
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def watched(x: torch.Tensor) -> bool:
    """Whether somebody stands between PyTorch's operations and their execution: a tensor subclass (fake or distributed
    tensors), or a dispatch mode (FlopCounterMode, make_fx). They see PyTorch's own operations."""
    plain = type(x) in (torch.Tensor, torch.nn.Parameter)
    return not plain or (not torch.compiler.is_compiling() and _get_current_dispatch_mode() is not None)


def trains_here(x: torch.Tensor) -> bool:
    """Whether code that runs now, rather than is traced, compiled or transformed, trains on a CPU with `x`."""
    return (
        enabled()
        and not torch.compiler.is_compiling()
        and isinstance(x, torch.Tensor)  # not an FX proxy
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not transformed()
        and not watched(x)
    )


def pointers(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p]:
    """The tensors' data as arguments of a kernel."""
    return [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors]


def _machine() -> str:
    """What the built code depends on besides its source: a cache may be shared by different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _is_whole(path: Path) -> bool:
    """Whether a library is there and not cut off, which loading it would answer with a bus error."""
    content = path.read_bytes() if path.is_file() else b""
    if len(content) < 64 or not content.startswith(b"\x7fELF"):
        return False
    (table,), (size, count) = struct.unpack_from("<Q", content, 40), struct.unpack_from("<HH", content, 58)
    return table + size * count <= len(content)  # the table of sections stands last


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they can't be built (the reason is logged, once)."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if not sys.platform.startswith("linux") or not compiler:
        _logger.warning(
            "No C++ compiler found: ConvMixer trains slowly, with PyTorch's own operations. "
            "Install g++ or name one in CXX."
        )
        return None
    key = "\n".join([_SOURCE.read_text(encoding="utf-8"), compiler, _machine(), *_FLAGS])
    try:
        path = cache_dir() / f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
        if not _is_whole(path):
            with atomic_path(path) as built:
                command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(built)]
                subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        _logger.warning(
            "The fast kernels could not be built, ConvMixer trains slowly, without them: %s", reason.strip()
        )
        return None
