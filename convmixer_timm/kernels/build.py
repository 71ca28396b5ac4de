"""Builds ``kernels.cpp`` with the machine's C++ compiler at first use and loads it.

Nothing is built at import, nor for the evaluation of a few images: that takes what was built before. Where there is no
compiler (or no OpenMP), `available` says no and the layers take PyTorch's own operations.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from ..errors import one_line
from ..files import atomic_path, cache_dir, private_dir

__all__ = ["available", "library", "require"]

_logger = logging.getLogger(__name__)
_SOURCE = Path(__file__).with_name("kernels.cpp")
_FLAGS = "-std=c++17 -O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp -shared -fPIC".split()
_SUM = hashlib.sha256().digest_size  # a library ends with its own checksum, which the loader doesn't look at


def _machine() -> str:
    """What the built code depends on besides its source: a cache may be shared by different processors."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor()


def _is_whole(path: Path) -> bool:
    """Whether a library is there as it was built; loading a damaged one may end the process."""
    try:
        content = path.read_bytes()
    except OSError:  # it isn't there, or nobody may look
        return False
    return hashlib.sha256(content[:-_SUM]).digest() == content[-_SUM:]


def _name() -> str:
    key = "\n".join([_SOURCE.read_text(encoding="utf-8"), os.environ.get("CXX", ""), _machine(), *_FLAGS])
    return f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


@functools.cache
def _was_built() -> bool:
    """Whether the library stood in the cache when this was first asked."""
    return _is_whole(cache_dir() / _name())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they can't be built (the reason is logged, once)."""
    if not sys.platform.startswith("linux"):  # nothing that the user could do about it
        _logger.info("ConvMixer runs by PyTorch's own operations: the fast kernels are for Linux.")
        return None
    name = _name()
    compiler = os.environ.get("CXX", "") or next(filter(shutil.which, ("c++", "g++", "clang++")), "")
    if not compiler and not _is_whole(cache_dir() / name):
        _logger.warning(
            "No C++ compiler found: ConvMixer runs slowly, by PyTorch's own operations. Install g++ or name one in CXX."
        )
        return None
    try:
        try:
            return _load(cache_dir() / name, compiler)
        except OSError:  # no right to write there, or no space
            return _load(private_dir() / name, compiler)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:  # ValueError: a quote in CXX isn't closed
        reason = getattr(error, "stderr", None) or error
        _logger.warning(
            "The fast kernels could not be built, ConvMixer runs slowly, without them. Install g++ with OpenMP, or "
            "name a compiler in CXX. %s said: %s",
            compiler,
            one_line(reason),
        )
        return None


def _load(path: Path, compiler: str) -> ctypes.CDLL:
    if _is_whole(path):
        with contextlib.suppress(OSError):  # damaged in a way that shows now only, or another machine's
            return ctypes.CDLL(str(path))
    if path.is_dir():  # the name is ours, so whatever that is, it is in a library's place
        shutil.rmtree(path, ignore_errors=True)
    # Built where the compiler works too, so that of a full cache it is the writing here that tells.
    with atomic_path(path) as temporary, tempfile.TemporaryDirectory() as folder:
        built = Path(folder, path.name)
        command = [compiler] if shutil.which(compiler) else shlex.split(compiler)  # one with arguments
        command += [*_FLAGS, str(_SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8", errors="replace")
        temporary.write_bytes((content := built.read_bytes()) + hashlib.sha256(content).digest())
    return ctypes.CDLL(str(path))


@torch.compiler.assume_constant_result
def available(build: bool = True) -> bool:
    """Whether the kernels are there; builds them, if wanted, at the first call that wants it."""
    wanted = build or library.cache_info().currsize > 0 or _was_built()
    return wanted and library() is not None


def require() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: If they can't be built here.
    """
    lib = library()
    if lib is None:
        raise RuntimeError(
            "convmixer_timm's kernels could not be built here (the log says why), so its operators don't run."
        )
    return lib
