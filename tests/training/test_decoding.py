"""timm's scripts see the pictures that predicting sees."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset, dataset_factory
from torchvision.transforms.functional import pil_to_tensor

from convmixer_timm.images import load_image
from convmixer_timm.training.decoding import use_one_reader

from ..conftest import IMAGES

CAT = IMAGES / "cat/0000.jpg"


@pytest.fixture(autouse=True)
def one_reader(monkeypatch):
    for name in ("ImageDataset", "ImageFolder", "ImageNet"):
        monkeypatch.setattr(dataset_factory, name, getattr(dataset_factory, name))
    use_one_reader()


@pytest.fixture
def folder(tmp_path):
    """A turned photograph, a 16-bit and a floating-point image, other formats, a linked class, and a damaged file."""
    (tmp_path / "a").mkdir()
    grey = np.asarray(Image.open(CAT).convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(CAT).save(tmp_path / "a/1.jpg", exif=exif, quality=95)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a/2.png")
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "a/3.tiff")
    Image.open(CAT).save(tmp_path / "a/4.webp")
    (tmp_path / "a/5.bmp").write_bytes(b"damaged")
    (tmp_path / "b").symlink_to(IMAGES / "dog")
    return tmp_path


# In a process of its own: a loader's workers crash a process that has the engines' threads.
LOADS = """
import hashlib, sys
from timm.data import create_dataset
from torch.utils.data import DataLoader
from torchvision.transforms import PILToTensor
from convmixer_timm.training.decoding import use_one_reader

if __name__ == "__main__":
    folder, mode, start = sys.argv[1:]
    start = None if start == "none" else start
    use_one_reader()
    data = create_dataset("", root=folder, input_img_mode=mode)
    data.transform = PILToTensor()
    assert data.reader.class_to_idx == {"a": 0, "b": 1}
    loader = DataLoader(data, batch_size=None, num_workers=bool(start), multiprocessing_context=start)
    for image, _ in loader:
        print(hashlib.sha256(image.numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize("start", ["none", "fork", "spawn"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_same_pixels_in_every_process(start, mode, folder):
    names = create_dataset("", root=str(folder)).filenames(absolute=True)
    assert len(names) == 8
    images = [load_image(name, {"RGB": 3, "L": 1}[mode]) for name in names if not name.endswith("5.bmp")]
    expected = [hashlib.sha256(pil_to_tensor(image).numpy().tobytes()).hexdigest() for image in images]
    expected.insert(4, expected[4])  # for the damaged one timm takes the next
    done = subprocess.run(
        [sys.executable, "-c", LOADS, folder, mode, start], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == expected
    assert start != "none" or f"{folder}/a/5.bmp: not an image that Pillow can read" in done.stderr


def test_torchvisions_folders_too(folder):
    (folder / "a/5.bmp").unlink()
    data = create_dataset("torch/image_folder", root=str(folder))
    assert all(np.array_equal(data[i][0], load_image(path)) for i, (path, _) in enumerate(data.samples))


def test_bytes_for_whoever_wants_them():
    data = create_dataset("", root=str(IMAGES), load_bytes=True)
    assert data[0][0] == (IMAGES / "airplane/0000.jpg").read_bytes()


def test_validation_reads_by_it(timm_scripts, folder, tmp_path):
    """validate.py through the launcher, in an ASCII locale, on a folder with a name that has other letters."""
    images = tmp_path / "dätä"
    images.mkdir()
    for name in ("a", "b"):
        (images / name).symlink_to(folder / name)
    args = ["--model", "convmixer_128_4", "--num-classes", "2", "--data-dir", str(images), "--device", "cpu", "-j", "1"]
    command = [sys.executable, "-X", "utf8=0", "-m", "convmixer_timm", "run", "validate", *args]
    environment = {**os.environ, "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr
    assert '"top1"' in done.stdout
    assert "5.bmp: not an image that Pillow can read" in done.stderr
