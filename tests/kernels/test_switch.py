"""What turns the kernels on and off."""

import os
import subprocess
import sys

import pytest

from convmixer_timm import set_fast_training
from convmixer_timm.kernels import switch


@pytest.fixture(autouse=True)
def as_it_was():
    yield
    set_fast_training(True, gpu=False)


def test_a_call_turns_it_on_and_off():
    assert switch.enabled() and not switch.enabled(gpu=True)
    set_fast_training(gpu=True)
    assert switch.enabled() and switch.enabled(gpu=True)
    set_fast_training(False)
    assert not switch.enabled() and not switch.enabled(gpu=True)
    set_fast_training()
    assert switch.enabled() and switch.enabled(gpu=True)
    set_fast_training(gpu=False)
    assert switch.enabled() and not switch.enabled(gpu=True)
    with pytest.raises(ValueError, match="gpu must be True or False, got 'yes'"):
        set_fast_training(gpu="yes")


@pytest.mark.parametrize(
    ("value", "on", "on_gpus"),
    [("", True, False), ("1", True, False), ("gpu", True, True), ("0", False, False), ("off", False, False)]
    + [("False", False, False)],
)
def test_the_environment_does_so_from_the_start(value, on, on_gpus):
    code = "from convmixer_timm.kernels import switch; print(switch.enabled(), switch.enabled(gpu=True))"
    environment = {**os.environ, "CONVMIXER_TIMM_FAST": value}
    done = subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [str(on), str(on_gpus)]
