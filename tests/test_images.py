"""The one reader of images: every kind of file that people have, and the kinds that nobody should meet unprepared."""

import os
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from convmixer_timm.images import ImageError, find_images, load_image

from .conftest import IMAGES

CAT = IMAGES / "cat/0000.png"
PIXELS = torch.ones(4, 4, 3)
UNREADABLE = [PIXELS.to("meta"), PIXELS.to_sparse(), PIXELS.to(torch.float8_e5m2)]


@pytest.fixture(scope="module")
def grey():
    return np.asarray(Image.open(CAT).convert("L"))


def seen(path):
    return np.asarray(load_image(path, channels=1)).astype(int)


def png(path, width, height, content=b""):
    """A PNG that says that it is of this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(content)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize(
    "values",
    [
        lambda grey: (grey / 255).astype(np.float32),
        lambda grey: grey.astype(np.float32),
        lambda grey: (grey / 127.5 - 1).astype(np.float32),
        lambda grey: grey.astype(np.uint16) * 257,
        lambda grey: grey.astype(np.int32) * 257,
        lambda grey: grey.astype(np.int32) * (2**31 // 255),
        lambda grey: grey.astype(np.int32),
    ],
    ids=["0 to 1", "0 to 255", "-1 to 1", "16 bits", "16 of 32 bits", "32 bits", "8 of 32 bits"],
)
def test_deep_tiffs_are_scaled_by_their_range(values, grey, tmp_path):
    Image.fromarray(values(grey)).save(tmp_path / "deep.tiff")
    assert np.abs(seen(tmp_path / "deep.tiff") - grey).max() <= 1


def test_a_dark_16_bit_image_stays_dark(grey, tmp_path):
    for name in ("dark.tiff", "dark.png"):
        Image.fromarray(grey.astype(np.uint16)).save(tmp_path / name)
        assert seen(tmp_path / name).max() <= 1


def test_a_range_that_the_file_states(grey, tmp_path):
    tags = ImageFileDirectory_v2()
    tags[340], tags[341] = 100.0, 355.0
    tags.tagtype[340] = tags.tagtype[341] = 11  # floats
    Image.fromarray((grey + 100.0).astype(np.float32)).save(tmp_path / "stated.tiff", tiffinfo=tags)
    assert np.abs(seen(tmp_path / "stated.tiff") - grey).max() <= 1


@pytest.mark.parametrize(
    "values", [lambda grey: 65535 - grey.astype(np.uint16) * 257, lambda grey: 1 - (grey / 255).astype(np.float32)]
)
def test_white_is_zero_where_the_file_says_so(values, grey, tmp_path):
    path = tmp_path / "negative.tiff"
    Image.fromarray(values(grey)).save(path)
    content = bytearray(path.read_bytes())
    at = content.index(struct.pack("<HHI", 262, 3, 1))  # which Pillow always writes as "black is zero"
    content[at + 8 : at + 10] = b"\0\0"
    path.write_bytes(content)
    assert np.abs(seen(path) - grey).max() <= 1


def tiff(path, bits, packed):
    """A TIFF of 32 x 32 pixels, made by hand."""
    entries = {256: 32, 257: 32, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 32, 279: len(packed)}
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(packed))
    directory = struct.pack("<H", len(entries)) + directory + bytes(4)
    path.write_bytes(header + packed + directory)
    return path


def test_twelve_bits(grey, tmp_path):
    """As scientific cameras write: two pixels in three bytes."""
    values = (grey.astype(int) * 4095 // 255).reshape(-1, 2)
    first, second = values[:, 0], values[:, 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    assert np.abs(seen(tiff(tmp_path / "deep.tiff", 12, packed)) - grey).max() <= 1


def test_thirty_two_bits_without_a_sign(tmp_path):
    ramp = np.arange(1024).reshape(32, 32) // 4
    path = tiff(tmp_path / "deep.tiff", 32, (ramp * (2**32 // 256)).astype("<u4").tobytes())
    assert np.abs(seen(path) - ramp).max() <= 1


@pytest.mark.parametrize("offset", [0, 32768])
def test_an_offset_that_pillow_ignores(offset, tmp_path):
    sizes = ["BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 32", "NAXIS2  = 32"]
    cards = ["SIMPLE  = T", *sizes, f"BZERO   = {offset} / x", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    (tmp_path / "sky.fits").write_bytes(header + np.arange(1024).astype(">i2").tobytes())
    if not offset:
        assert load_image(tmp_path / "sky.fits").size == (32, 32)
        return
    with pytest.raises(ImageError, match=r"sky.fits: its pixels have an offset \(BZERO   = 32768 / x\), which Pillow"):
        load_image(tmp_path / "sky.fits")
    with pytest.raises(ImageError, match="its pixels have an offset"), Image.open(tmp_path / "sky.fits") as image:
        load_image(image)


def test_values_that_are_no_numbers(grey, tmp_path):
    values = (grey / 255).astype(np.float32)
    values[0] = [np.nan, np.inf] * 16
    Image.fromarray(values).save(tmp_path / "odd.tiff")
    found = seen(tmp_path / "odd.tiff")
    assert np.abs(found[1:] - grey[1:].astype(int)).max() <= 1
    assert set(found[0]) == {0, 255}
    Image.fromarray(values * np.nan).save(tmp_path / "nothing.tiff")
    with pytest.raises(ImageError, match=r"nothing.tiff: damaged image \(no finite pixels\)"):
        load_image(tmp_path / "nothing.tiff")


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.tiff", "turned.webp"])
def test_turned_photographs_stand_upright(name, tmp_path):
    original = Image.fromarray(np.repeat(np.arange(0, 256, 8, dtype=np.uint8)[None], 48, 0)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    original.rotate(90, expand=True).save(tmp_path / name, exif=exif)
    image = load_image(tmp_path / name)
    assert image.size == original.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(original)).mean() < 4
    with Image.open(tmp_path / name) as opened:
        assert load_image(opened).tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_turned_tiffs_of_every_layout(mode, compression, tmp_path):
    original = Image.open(CAT).convert("L").resize((48, 32))
    pixels = np.rot90(np.asarray(original))
    turned = (
        Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    )
    turned.save(tmp_path / "turned.tif", tiffinfo={0x0112: 6}, compression=compression)
    assert np.array_equal(np.asarray(load_image(tmp_path / "turned.tif", channels=1)), np.asarray(original))


def test_damaged_exif_data_leave_a_sound_picture(tmp_path):
    Image.open(CAT).save(tmp_path / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xffgarbage", quality=95)
    assert load_image(tmp_path / "odd.jpg").size == (32, 32)


@pytest.mark.parametrize("size", [(80_000_000, 1), (300_000, 1), (1, 300_000), (10_000, 10_000), (100_000, 100_000)])
def test_huge_images_of_a_kilobyte_cost_nothing(size, tmp_path):
    path = png(tmp_path / "huge.png", *size, content=bytes(1000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match=r"huge.png: too (large|narrow)"):
        load_image(path)
    with pytest.raises(ImageError, match=r"too (large|narrow)"), Image.open(CAT) as image:
        image._size = size
        load_image(image)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_panorama_is_read(tmp_path):
    Image.new("RGB", (3000, 40)).save(tmp_path / "wide.png")
    assert load_image(tmp_path / "wide.png").size == (3000, 40)


@pytest.mark.parametrize("ending", "webp bmp tif tiff avif dds jp2 tga gif ppm ico jfif pcx qoi WEBP".split())
def test_every_kind_of_file_is_found_and_read(ending, tmp_path):
    image = Image.open(CAT).convert("RGB")
    image.save(tmp_path / f"x.{ending}", format="JPEG" if ending == "jfif" else None)
    assert find_images([tmp_path]) == [tmp_path / f"x.{ending}"]
    difference = np.asarray(load_image(tmp_path / f"x.{ending}")).astype(int) - np.asarray(image)
    assert np.abs(difference).mean() < 12


def test_scripts_for_a_printer_are_not_run(tmp_path):
    (tmp_path / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="not an image that Pillow can read"):
        load_image(tmp_path / "x.eps")


def test_links_are_followed_and_circles_are_not(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/cat").symlink_to(IMAGES / "cat")
    (tmp_path / "data/dog").mkdir()
    (tmp_path / "data/dog/back").symlink_to(tmp_path / "data")
    (tmp_path / "data/dog/lost.jpg").symlink_to("nowhere.jpg")
    found = find_images([tmp_path / "data"])
    assert [path.name for path in found] == ["0000.png", "0001.png", "0002.png", "lost.jpg"]
    assert find_images([f"{tmp_path}/d*"]) == found
    with pytest.raises(ImageError, match=r"lost.jpg: no such file"):
        load_image(found[-1])


def test_names_that_no_file_can_have(tmp_path):
    shutil.copy(CAT, tmp_path / "cat.png")
    for name in (str(tmp_path / ("x" * 300)), str(tmp_path / "cat.png/below.png")):
        assert find_images([name, tmp_path / "cat.png"]) == [Path(name), tmp_path / "cat.png"]
        with pytest.raises(ImageError):
            load_image(name)
    with pytest.raises(ValueError, match="the name of an image is empty"):
        find_images([""])
    with pytest.raises(ValueError, match=r"https://host/cat.png: images are read from files, so download it first"):
        find_images(["https://host/cat.png"])


def test_a_phones_pictures_are_not_passed_over(tmp_path):
    for name in ("IMG_1.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(b"something")
    shutil.copy(CAT, tmp_path / "a.png")
    photo, cat = find_images([tmp_path])
    assert (photo.name, cat.name) == ("IMG_1.HEIC", "a.png")
    with pytest.raises(ImageError, match=r"IMG_1.HEIC: not an image that Pillow can read"):
        load_image(photo)


def test_what_is_no_file_is_said_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name, message in [
        ("pipe.png", "not a regular file"),
        ("empty.png", "an empty file"),
        ("folder.png", "no images found in this folder"),
        ("x" * 300, "file name too long"),
    ]:
        with pytest.raises(ImageError, match=f"{name}: {message}"):
            load_image(tmp_path / name)


def test_an_unreadable_file_or_folder_is_named(tmp_path, monkeypatch):
    shutil.copytree(IMAGES / "cat", tmp_path / "cat")
    (tmp_path / "secret").mkdir()
    real = os.scandir

    def scandir(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_images([tmp_path])[-1] == tmp_path / "secret"
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(ImageError, match="secret: permission denied"):
        load_image(tmp_path / "secret")


@pytest.mark.parametrize(
    "array",
    [
        lambda rgb: rgb,
        lambda rgb: rgb / 255,
        lambda rgb: (rgb / 255).astype(np.float16),
        lambda rgb: rgb.astype(np.float32),
        lambda rgb: rgb.astype(np.int64),
        lambda rgb: rgb.astype(np.uint16) * 257,
        lambda rgb: np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)]),
        lambda rgb: torch.from_numpy(rgb.copy()),
        lambda rgb: rgb[::-1][::-1],
        lambda rgb: torch._neg_view(-torch.from_numpy(rgb / 255)),
    ],
)
def test_arrays(array):
    rgb = np.asarray(Image.open(CAT).convert("RGB"))
    assert np.abs(np.asarray(load_image(array(rgb))).astype(int) - rgb).max() <= 1


def test_what_belongs_to_the_whole_process_stays_as_the_user_has_it():
    """timm's readers, and Pillow's warning of images that decompress to too much."""
    code = f"""
import warnings
import timm.data
from PIL import Image
warnings.simplefilter("error", Image.DecompressionBombWarning)
endings = timm.data.get_img_extensions()
from convmixer_timm.images import ImageError, find_images, load_image
assert len(find_images([{str(IMAGES)!r}])) == 30 and timm.data.get_img_extensions() == endings
Image.MAX_IMAGE_PIXELS = 600
try:
    load_image({str(CAT)!r})
except ImageError as error:
    assert "too large, more than 600 pixels are not read" in str(error), error
try:
    Image.open({str(CAT)!r})
except Image.DecompressionBombWarning:
    print("warned")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "warned\n", done.stderr


def test_bytes_are_a_files_content():
    assert load_image(CAT.read_bytes()) == load_image(CAT)
    with pytest.raises(ImageError, match="image: not an image that Pillow can read"):
        load_image(b"cat.jpg")


def test_resampled_floats_may_reach_beyond_their_range():
    for top in (1, 255):
        array = np.linspace(-0.1 * top, 1.1 * top, 64).reshape(8, 8)
        assert np.asarray(load_image(array, channels=1))[[0, -1], [0, -1]].tolist() == [0, 255]


def test_grey_arrays():
    grey = np.asarray(Image.open(CAT).convert("L"))
    for array in (grey, grey[..., None], grey / 255):
        assert np.array_equal(np.asarray(load_image(array, channels=1)), grey)
    assert set(np.unique(load_image(grey > 100))) == {0, 255}


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros((3, 32, 32), np.uint8), r"array \[H, W, 3\], got \[3, 32, 32\]"),
        (np.zeros((2, 32, 32, 3), np.uint8), r"got \[2, 32, 32, 3\]"),
        (np.zeros((0, 4, 3)), "no pixels"),
        (np.zeros((1, 400, 3)), "too narrow"),
        (np.zeros((4, 4, 3), complex), "pixels must be numbers, got complex128"),
        (np.full((4, 4, 3), np.nan), "no finite pixels"),
        (np.array([["a"]]), "pixels must be numbers"),
        *((t, "not a tensor of pixels: ") for t in UNREADABLE),
        (PIXELS.cfloat().conj(), "pixels must be numbers, got complex64"),
        (7, "an image is a path, a PIL image or an array"),
        (None, "an image is a path, a PIL image or an array"),
        (torch.rand(3, 8, 8), "a batch that is preprocessed goes to the model itself"),
        (np.random.default_rng(0).normal(size=(9, 9, 3)), "give the image before it is normalised"),
    ],
)
def test_what_is_no_image(source, message):
    with pytest.raises(ValueError, match=message):
        load_image(source)


NAMES = ["caf\udce9.jpg", "ünï.jpg", "red \x1b[31m.jpg", "two\nlines.jpg", "猫.jpg"]


@pytest.mark.parametrize("python, format", [([], "csv"), *((["-X", "utf8=0"], f) for f in ("table", "csv", "json"))])
def test_names_of_any_bytes_under_any_locale(python, format, tmp_path):
    for name in NAMES:
        shutil.copy(CAT, tmp_path / name)
    (tmp_path / "b\udcffd.jpg").write_bytes(b"no image")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii:strict" if python else "utf-8:strict"}
    command = [sys.executable, *python, "-m", "convmixer_timm", "predict", str(tmp_path), "--topk", "1"]
    done = subprocess.run([*command, "--format", format], env=environment, capture_output=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/b\\udcffd.jpg: not an image that Pillow can read\n".encode()
    out = done.stdout.decode()
    assert out.count("cat") == len(NAMES)
    assert "caf\\udce9.jpg" in out
    if format == "table":
        assert len(out.splitlines()) == len(NAMES)
        assert "\x1b" not in out
        assert "two\\nlines.jpg" in out
