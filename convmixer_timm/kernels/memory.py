"""What glibc does with the memory that a tensor gives back.

It returns every large block to the system and pays for its page faults again at the next step. Kept instead, a step of
timm's class in channels-last and bf16 takes two thirds of the time (benchmarks/README.md); the process then holds on to
the most that it ever used.
"""

import ctypes
import functools
import os
import platform

import torch

__all__ = ["keep_freed"]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h


def _chosen(environment: dict[str, str]) -> bool:
    """Whether the user chose an allocator, or settings of glibc's."""
    settings = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    return (
        "malloc" in environment.get("LD_PRELOAD", "")
        or "glibc.malloc" in environment.get("GLIBC_TUNABLES", "")
        or any(name in environment for name in settings)
    )


@functools.cache
def _tell_glibc() -> bool:
    if platform.libc_ver()[0] != "glibc" or _chosen(dict(os.environ)):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all((mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, -1), mallopt(_M_TOP_PAD, 64 << 20)))


@torch.compiler.assume_constant_result
def keep_freed() -> bool:
    """Tells glibc, once, to keep freed memory for the next step; leaves every other allocator and any choice of the
    user's alone. Says whether it did."""
    return _tell_glibc()
