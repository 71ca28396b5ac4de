"""ConvMixer for timm: importing this package registers the variants with timm's model registry."""

import os
import sys

if sys.argv[:1] == ["-m"] and os.path.exists("timm/__init__.py") and os.path.exists("train.py"):
    # `python -m convmixer_timm` inside a clone of timm: the clone must not stand in for the installed timm.
    sys.path[:] = [p for p in sys.path if p not in ("", os.getcwd())]

from .compat import mend_posterize
from .convmixer import ConvMixer
from .native import set_fast_training

__all__ = ["ConvMixer", "optimize", "set_fast_training"]

mend_posterize()


def __getattr__(name: str):
    if name == "__version__":  # read only when asked for: it takes longer than the rest of this import
        from importlib.metadata import version

        return version("convmixer-timm")
    if name == "optimize":
        from .inference import optimize

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
