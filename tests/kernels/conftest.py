import functools

import pytest
import torch

from convmixer_timm.kernels import build

from .helpers import HAS_COMPILER


@pytest.fixture(params=["kernels", "no compiler"])
def way(request, monkeypatch):
    """Both what runs with the kernels and what runs on machines where they can't be built."""
    torch.manual_seed(0)
    if request.param == "no compiler":
        monkeypatch.setattr(build, "library", functools.cache(lambda: None))
    elif not HAS_COMPILER:
        pytest.skip("no C++ compiler with OpenMP on this machine")
    return request.param
