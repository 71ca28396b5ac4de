"""What the tests that run timm's scripts share."""

import csv
import os
import shutil
import subprocess

import pytest

from ..conftest import IMAGES


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The 30 images as both splits."""
    folder = tmp_path_factory.mktemp("data")
    for split in ("train", "validation"):
        shutil.copytree(IMAGES, folder / split)
    return folder


def run(command, **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def summary(folder):
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))
