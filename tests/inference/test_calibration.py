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
    pixels = [(image.mul(255).byte(), 0) for image in images]
    for wrong in (5, [()], [5], [{"a": 1}], images.mul(255).byte(), pixels, images.byte().numpy(), images / 0):
        with pytest.raises(ValueError, match="calibration images"):
            list(calibration_batches(model, wrong))


def test_images_that_are_not_normalised_are_told(model, images, caplog):
    list(calibration_batches(model, images))
    assert not caplog.records
    list(calibration_batches(model, [images - images.min()] * 20))
    assert [record.message for record in caplog.records] == [
        "no calibration image has a value below 0: are they normalised, as the model takes them?"
    ]


def test_a_dataset_is_seen_from_first_to_last(model, images, monkeypatch):
    class Dataset:
        def __init__(self, items):
            self.items = items

        def __getitem__(self, i):
            return self.items[i], 0

        def __len__(self):
            return len(self.items)

    assert torch.equal(torch.cat(list(calibration_batches(model, Dataset(images)))), images)
    assert torch.equal(torch.cat(list(calibration_batches(model, Dataset(find_images([IMAGES]))))), images)
    monkeypatch.setattr(calibration, "_ENOUGH", 10)
    assert torch.equal(torch.cat(list(calibration_batches(model, Dataset(images)))), images[::3])
    one = IMAGES / "ship/0000.png"
    for image in (one.read_bytes(), Image.open(one)):
        assert torch.equal(*(torch.cat(list(calibration_batches(model, source))) for source in (image, one)))


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
