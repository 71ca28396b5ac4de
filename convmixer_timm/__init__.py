"""ConvMixer for timm: importing this package registers the variants with timm's model registry."""

import importlib
import os
import sys
from typing import TYPE_CHECKING

if sys.argv[:1] == ["-m"] and os.path.exists("timm/__init__.py") and os.path.exists("train.py"):
    # `python -m convmixer_timm` inside a clone of timm: the clone must not stand in for the installed timm.
    sys.path[:] = [p for p in sys.path if p not in ("", os.getcwd())]

from .convmixer import ConvMixer
from .kernels.switch import set_fast_training
from .training.compat import mend_muon, mend_posterize

if TYPE_CHECKING:
    from .hub.publish import publish
    from .inference.export import export
    from .inference.labels import class_names
    from .inference.optimize import optimize
    from .inference.predicting import predict
    from .training.trained import load_model
    from .web.page import page

__all__ = [
    "ConvMixer",
    "class_names",
    "export",
    "load_model",
    "optimize",
    "page",
    "predict",
    "publish",
    "set_fast_training",
]

mend_posterize()
mend_muon()

# Imported when they are first asked for: importing the package stays as cheap as importing timm.
_ROOMS = {
    "class_names": "inference.labels",
    "export": "inference.export",
    "load_model": "training.trained",
    "optimize": "inference.optimize",
    "page": "web.page",
    "predict": "inference.predicting",
    "publish": "hub.publish",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name == "__version__":
        from .version import version

        return version()
    if name in _ROOMS:
        return getattr(importlib.import_module(f".{_ROOMS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
