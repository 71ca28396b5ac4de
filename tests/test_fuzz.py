"""A few seconds of damaged files in the suite; `python -m tests.fuzz` goes on for as long as one likes.

CONVMIXER_TIMM_FUZZ_SECONDS is the time for all kinds together, CONVMIXER_TIMM_FUZZ_SEED chooses the cases.
"""

import os
import re
import subprocess
import sys

import pytest

from .fuzz import KINDS

SECONDS = float(os.environ.get("CONVMIXER_TIMM_FUZZ_SECONDS") or 24)
SEED = os.environ.get("CONVMIXER_TIMM_FUZZ_SEED") or "0"


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_give_documented_errors_only(kind, tmp_path):
    options = ["--seconds", str(SECONDS / len(KINDS)), "--seed", SEED, "--keep", str(tmp_path)]
    done = subprocess.run([sys.executable, "-m", "tests.fuzz", kind, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    cases, accepted, refused = map(int, re.search(r"(\d+) cases, .*: (\d+), .*: (\d+)", done.stdout).groups())
    assert cases == accepted + refused
    assert accepted and refused


FAULT = """
import pathlib, sys
from convmixer_timm import images
from tests import fuzz
def broken(*args, **kwargs):
    raise TypeError("planted")
images.load_image = broken
sys.exit(fuzz.run("images", 5, 0, pathlib.Path(sys.argv[1])))
"""


def test_a_planted_fault_is_found(tmp_path):
    done = subprocess.run([sys.executable, "-c", FAULT, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "TypeError: planted" in done.stdout
    assert len(list(tmp_path.glob("images-0-0/*.image"))) == 1
