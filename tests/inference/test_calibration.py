"""Images to choose int8's scales by."""

import pytest
import timm
import torch
from PIL import Image

from convmixer_timm.images import find_images
from convmixer_timm.inference import calibration, reading
from convmixer_timm.inference.calibration import calibration_batches

from ..conftest import IMAGES


@pytest.fixture(scope="module")
def model():
    return timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True).eval()


@pytest.fixture(scope="module")
def images(model):
    return torch.cat(list(calibration_batches(model, IMAGES)))


def test_it_takes_loaders_and_folders(model, images):
    pairs = [(images[:20], torch.zeros(20)), (images[20:], torch.zeros(10))]
    assert torch.equal(torch.cat(list(calibration_batches(model, pairs))), images)
    assert len(list(calibration_batches(model, [torch.zeros(200, 3, 32, 32)] * 5))) == 2
    assert torch.equal(torch.cat(list(calibration_batches(model, images))), images)
    assert torch.equal(torch.cat(list(calibration_batches(model, images.numpy()))), images)
    assert torch.equal(torch.cat(list(calibration_batches(model, [{"pixel_values": images, "labels": 1}]))), images)
    one = list(calibration_batches(model, IMAGES / "ship/0000.png"))
    for image in (str(IMAGES / "ship/0000.png"), Image.open(IMAGES / "ship/0000.png")):
        assert torch.equal(torch.cat(list(calibration_batches(model, [image]))), one[0])
    for wrong in (5, [()], [5], [{"a": 1}]):
        with pytest.raises(ValueError, match="calibration images"):
            list(calibration_batches(model, wrong))


def test_large_files_are_read_by_several_threads_and_come_in_order(model, images, monkeypatch):
    monkeypatch.setattr(reading, "_LARGE", range(2400, 10_000))  # some of the images are, some not
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(torch.cat(list(calibration_batches(model, IMAGES))), images)


def test_it_sees_every_class_and_fills_a_batch(model, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_ENOUGH", 20)
    batches = list(calibration_batches(model, IMAGES))  # of 30 images, of ten classes
    classes = [find_images([IMAGES])[i * 30 // 20].parent.name for i in range(20)]
    assert len(batches) == 20 and len(set(classes)) == 10
    # A batch of more images than are looked at otherwise.
    assert [len(batch) for batch in calibration_batches(model, IMAGES, batch=25)] == [25]
    assert [len(batch) for batch in calibration_batches(model, IMAGES, batch=40)] == [40]
