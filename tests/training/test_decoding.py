"""timm's scripts see the pictures that predicting sees."""

import errno
import hashlib
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset, create_transform, dataset_factory
from torchvision.transforms.functional import pil_to_tensor

from convmixer_timm.images import load_image, load_in_mode
from convmixer_timm.training import decoding
from convmixer_timm.training.decoding import use_one_reader

from ..conftest import IMAGES

CAT = IMAGES / "cat/0000.png"


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


# In a process of its own, as the next: a loader's workers crash a process that has the engines' threads.
FORGETS = """
import shutil, sys
from timm.data import create_dataset
from torch.utils.data import DataLoader
from torchvision.transforms import PILToTensor
from convmixer_timm.training import decoding

if __name__ == "__main__":
    folder, start = sys.argv[1:]
    decoding.use_one_reader(training=True)
    data = create_dataset("", root=folder)
    data.transform = PILToTensor()
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context=start)
    epochs = [[(image.tolist(), target) for image, target in loader]]
    shutil.rmtree(folder)
    epochs.append([(image.tolist(), target) for image, target in loader])  # by another worker
    print(len(epochs[0]), epochs[0] == epochs[1])
"""


@pytest.mark.parametrize("start", ["fork", "forkserver"])  # the latter is Python 3.14's own choice
def test_workers_of_any_kind_share_what_they_decoded(start, tmp_path):
    shutil.copytree(IMAGES, tmp_path / "images")
    done = subprocess.run(
        [sys.executable, "-c", FORGETS, tmp_path / "images", start], check=True, capture_output=True, text=True
    )
    assert done.stdout == "30 True\n"


LOADS = """
import hashlib, sys
from timm.data import create_dataset
from torch.utils.data import DataLoader
from torchvision.transforms import PILToTensor
from convmixer_timm.training import decoding

if __name__ == "__main__":
    folder, mode, start, keep = sys.argv[1:]
    start = None if start == "none" else start
    if keep != "keep":
        decoding._MOST = 0
    decoding.use_one_reader(training=True)
    data = create_dataset("", root=folder, input_img_mode=mode)
    data.transform = PILToTensor()
    assert data.reader.class_to_idx == {"a": 0, "b": 1}
    worker = dict(num_workers=1, persistent_workers=True, multiprocessing_context=start) if start else {}
    loader = DataLoader(data, batch_size=None, **worker)
    for _ in range(2):
        for image, target in loader:
            print(target, hashlib.sha256(image.numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize(
    "start, mode, keep",
    [
        *itertools.product(("none", "fork"), ("RGB", "L"), ("keep", "read again")),
        ("spawn", "RGB", "keep"),
        ("spawn", "L", "read again"),
    ],
)
def test_the_same_pixels_in_every_process_and_epoch(start, mode, keep, folder):
    names = create_dataset("", root=str(folder)).filenames(absolute=True)
    assert len(names) == 8
    images = [load_image(name, {"RGB": 3, "L": 1}[mode]) for name in names if not name.endswith("5.bmp")]
    sums = [hashlib.sha256(pil_to_tensor(image).numpy().tobytes()).hexdigest() for image in images]
    targets = [0, 0, 0, 0, 1, 1, 1]
    expected = [f"{target} {digest}" for target, digest in zip(targets, sums, strict=True)]
    expected.insert(4, expected[4])  # for the damaged one timm takes the next
    done = subprocess.run(
        [sys.executable, "-c", LOADS, folder, mode, start, keep], check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == 2 * expected
    assert start != "none" or f"{folder}/a/5.bmp: not an image that Pillow can read" in done.stderr


@pytest.fixture
def read(monkeypatch):
    """The files that are read from now on."""
    files = []

    def load(file, *args):
        files.append(file.name)
        return load_in_mode(file, *args)

    monkeypatch.setattr(decoding, "load_in_mode", load)
    return files


def train_on(folder, transform=None, **kwargs):
    use_one_reader(training=True)
    data = create_dataset("", root=str(folder), **kwargs)
    data.transform = transform
    return data


def test_images_of_any_size_are_decoded_once(tmp_path, read):
    for i in range(20):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.full((5 + i, 27 - i, 3), i, np.uint8)).save(tmp_path / "ab"[i % 2] / f"{i}.png")
    data = train_on(tmp_path)
    first = [(np.asarray(image), target) for image, target in data]
    for (image, target), (pixels, expected) in zip(data, first, strict=True):
        image.putpixel((0, 0), (9, 9, 9))  # a transform may write into its image
        assert target == expected and image.size == pixels.shape[1::-1]
    assert all(np.array_equal(image, pixels) for (image, _), (pixels, _) in zip(data, first, strict=True))
    assert len(read) == len(set(read)) == 20


def test_what_has_no_room_is_read_again(tmp_path, monkeypatch, read):
    """The sample tells nothing of how large the others are."""
    (tmp_path / "a").mkdir()
    for i in range(16):
        Image.new("RGB", (8, 800 if i % 3 == 1 else 8), (i, 0, 0)).save(tmp_path / f"a/{i:02}.png")
    monkeypatch.setattr(decoding, "_MOST", 40_000)
    data = train_on(tmp_path)
    for _ in range(2):
        assert [image.getpixel((0, 0))[0] for image, _ in data] == list(range(16))
    assert 16 < len(read) < 32


@pytest.mark.parametrize("prefetcher", [True, False])
def test_validation_sees_the_same_each_epoch(prefetcher, folder, read):
    """In the size that the model takes, which is made once."""
    transform = create_transform((3, 20, 20), use_prefetcher=prefetcher, crop_pct=0.9, interpolation="bicubic")
    (folder / "a/5.bmp").unlink()
    data = train_on(folder, transform)
    for _ in range(2):
        for (image, _), name in zip(data, data.filenames(absolute=True), strict=True):
            assert np.array_equal(image, transform(load_image(name)))
    assert sorted(read) == sorted(data.filenames(absolute=True))


def test_training_needs_no_more_of_a_photograph_than_its_crops(tmp_path, read):
    (tmp_path / "a").mkdir()
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    smooth = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((1200, 900), Image.BICUBIC)
    smooth.save(tmp_path / "a/0.jpg", exif=exif, quality=95)
    smooth.save(tmp_path / "a/1.png")
    smooth.resize((170, 110)).save(tmp_path / "a/2.png")  # small enough as it is
    data = train_on(tmp_path, create_transform((3, 16, 16), is_training=True))
    kept = [data.reader[i][0].read() for i in range(3)]
    assert 2 * 16 * (4 / 3 / 0.08) ** 0.5 < 131  # of a JPEG half, a quarter or an eighth is decoded
    assert [image.size for image in kept] == [(225, 300), (200, 150), (170, 110)]
    for image, name in zip(kept, data.filenames(absolute=True), strict=True):
        found, expected = (np.asarray(i.resize((32, 32), Image.BICUBIC), np.float32) for i in (image, load_image(name)))
        assert np.abs(found - expected).mean() < 1
    assert data[0][0].shape == (3, 16, 16) and len(read) == 3


@pytest.mark.parametrize("lacks", ["_memory_file", "fcntl"])
def test_what_cannot_be_kept_is_read_again(lacks, monkeypatch, read):
    """On a system without files in memory, or without locks."""

    def fail(*args):
        raise OSError(errno.ENOLCK, "none here")

    if lacks == "fcntl":
        monkeypatch.setattr(decoding.fcntl, "lockf", fail)
    else:
        monkeypatch.setattr(decoding, lacks, fail)
    data = train_on(IMAGES)
    for _ in range(2):
        assert [image.size for image, _ in data] == [(32, 32)] * 30
    assert len(read) >= 60


def test_a_container_may_have_less_memory(monkeypatch):
    files = {"/proc/self/cgroup": "0::/job/step\n", "/sys/fs/cgroup/job/memory.max": "80\n"}
    files |= {"/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory/job/step/memory.limit_in_bytes": "40"}

    def read_text(path, encoding):
        try:
            return files[str(path)]
        except KeyError:
            raise FileNotFoundError from None

    monkeypatch.setattr(decoding.Path, "read_text", read_text)
    assert decoding._memory() == 80 and decoding._room() == 10
    files["/proc/self/cgroup"] = "3:cpu:/\n2:memory:/job/step\n"
    assert decoding._memory() == 40


def test_a_file_that_took_the_place_of_what_was_kept_is_left_alone(tmp_path):
    kept = decoding._Kept(1, "L", 100)
    remade, (identity, *args) = kept.__reduce__()
    kept.keep(0, Image.new("L", (5, 5), 7), 3)
    image, target = remade(identity, *args).get(0)
    assert (image.size, image.getpixel((4, 4)), target) == ((5, 5), 7, 3)
    (tmp_path / "other").write_bytes(bytes(1000))
    assert remade(identity, *args[:-1], str(tmp_path / "other")) is None
    assert remade(identity, *args[:-1], str(tmp_path / "none")) is None


def test_an_archive_is_opened_by_each_worker(tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for folder in sorted(IMAGES.iterdir()):
            archive.add(folder, folder.name)
    data = train_on(tmp_path / "images.tar", create_transform((3, 20, 20)))
    assert data.reader.tar_state.tf is None and len(pickle.dumps(data))
    folder = train_on(IMAGES, create_transform((3, 20, 20)))
    assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(data, folder, strict=True))


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "YCbCr", "CMYK", "LA", "L", "I", "F"])
def test_modes_keep_what_an_image_has(mode, tmp_path):
    (tmp_path / "a").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (9, 9, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a/0.png")
    data = train_on(tmp_path, input_img_mode=mode)
    for image, _ in (data[0], data[0]):
        assert image.mode == mode and np.array_equal(image, Image.fromarray(pixels).convert(mode))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("gone", [False, True])
def test_what_measures_ends_at_an_image_that_cannot_be_read(workers, gone, folder):
    """timm takes the next in its place, which would count twice."""
    if gone:
        (folder / "a/5.bmp").unlink()
        (folder / "a/5.bmp").symlink_to("nowhere")
    code = f"""
from torch.utils.data import DataLoader
from timm.data import create_dataset
from convmixer_timm.errors import RunError
from convmixer_timm.training.decoding import use_one_reader

use_one_reader()
for dataset in ("", "torch/image_folder"):
    data = create_dataset(dataset, root={str(folder)!r})
    try:
        for _ in DataLoader(data, batch_size=None, num_workers={workers}):
            pass
    except RunError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    reason = "no such file" if gone else "not an image that Pillow can read"
    line = f"{folder}/a/5.bmp: {reason}: mend the file, or move it away"
    assert done.stdout.splitlines() == [line] * 2, done.stderr


def test_more_than_fits_is_read_again(monkeypatch, read):
    monkeypatch.setattr(decoding, "_MOST", 1000)
    data = train_on(IMAGES)
    before = len(read)
    assert data[0][0].size == data[0][0].size == (32, 32) and len(read) == before + 2


def test_torchvisions_folders_too(folder):
    (folder / "a/5.bmp").unlink()
    data = create_dataset("torch/image_folder", root=str(folder))
    assert all(np.array_equal(data[i][0], load_image(path)) for i, (path, _) in enumerate(data.samples))


def test_bytes_for_whoever_wants_them():
    data = create_dataset("", root=str(IMAGES), load_bytes=True)
    assert data[0][0] == (IMAGES / "airplane/0000.png").read_bytes()


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
    [line] = [line for line in done.stderr.splitlines() if "5.bmp" in line]
    assert done.returncode == 1 and line.endswith(
        "5.bmp: not an image that Pillow can read: mend the file, or move it away"
    )
    (folder / "a/5.bmp").unlink()
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr
    assert '"top1"' in done.stdout
    assert "--num-classes 2: the weights' classifier has 10; a random one takes its place." in done.stderr
