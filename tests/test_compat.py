"""What the package mends in timm."""

import random

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
