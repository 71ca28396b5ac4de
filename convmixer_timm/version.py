"""The version of this package, as it is installed."""

import importlib.metadata

__all__ = ["version"]


def version() -> str:
    """Read only when asked for: it takes longer than importing this package."""
    return importlib.metadata.version("convmixer-timm")
