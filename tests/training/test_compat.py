"""What the package mends in timm."""

import random
import subprocess
import sys

import pytest
from PIL import Image
from timm.data import auto_augment, create_transform


def test_randaugment_at_full_strength(cifar_images):
    random.seed(0)
    transform = create_transform(32, is_training=True, auto_augment="rand-m10-n5-inc1")
    image = Image.open(cifar_images[0][0])
    for _ in range(100):
        assert transform(image).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
def test_posterize(name, cifar_images):
    image = Image.open(cifar_images[0][0])
    posterize = auto_augment.NAME_TO_OP[name]
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3
    assert all(v % 128 == 0 for v, _ in posterize(image, 1).getchannel(0).getcolors() for v in [_])
    assert posterize(image, 8) is image


MIXED = """
import sys
import torch
from timm.data import FastCollateMixup, create_dataset, create_loader
from convmixer_timm.training.compat import mend_mixup_off

mend_mixup_off()
loader = create_loader(
    create_dataset("", root=sys.argv[1]),
    input_size=(3, 32, 32),
    batch_size=10,
    is_training=True,
    num_workers=1,
    collate_fn=FastCollateMixup(cutmix_alpha=1.0, num_classes=10, label_smoothing=0.0),
    device=torch.device("cpu"),
)
for enabled in (True, False, False):
    if not enabled:
        loader.mixup_enabled = False
    print(any(bool(target.max(1).values.min() < 1) for _, target in loader))
"""


def test_mixup_that_is_switched_off_stays_off_in_the_workers(cifar_images):
    # In a process of its own: a loader with workers here made a later test crash, after the inference engines' tests.
    command = [sys.executable, "-c", MIXED, str(cifar_images[0][0].parent.parent)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        "True",
        "False",
        "False",
    ]
