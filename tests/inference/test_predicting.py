"""Predicting from the shell: real CIFAR-10 test images, every kind of image file, and every kind of broken one."""

import csv
import io
import json
import shutil
import struct
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from convmixer_timm.cli import main
from convmixer_timm.images import load_image

IMAGE = "tests/images/cat/0000.jpg"


def run(capsys, *argv):
    code = main(["predict", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_real_images_are_recognised(cifar_images, capsys):
    paths = [path for path, _ in cifar_images]
    code, out, err = run(capsys, *paths, "--format", "json", "--topk", 3, "--batch-size", 7)
    assert (code, err) == (0, "")
    rows = json.loads(out)
    assert [row["path"] for row in rows] == list(map(str, paths))
    assert all(len(row["classes"]) == 3 for row in rows)
    for row in rows:
        probs = [c["prob"] for c in row["classes"]]
        assert probs == sorted(probs, reverse=True)
    right = [row["classes"][0]["label"] == label for row, (_, label) in zip(rows, cifar_images, strict=True)]
    assert sum(right) >= 21  # of 30; the checkpoint's card has its accuracy on all 10,000


def test_output_equals_timms_own_pipeline(cifar_images, capsys):
    path, _ = cifar_images[0]
    _, out, _ = run(capsys, path, "--format", "csv", "--topk", 10, "--model", "convmixer_128_4.e10_cifar10")
    rows = list(csv.DictReader(io.StringIO(out)))
    model = timm.create_model("convmixer_128_4.e10_cifar10", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    probs = model(transform(Image.open(path))[None]).softmax(-1)[0]
    labels = model.pretrained_cfg["label_names"]
    assert {r["label"]: float(r["prob"]) for r in rows} == pytest.approx(
        dict(zip(labels, probs.tolist(), strict=True)), abs=1e-5
    )


def test_folders_and_globs(cifar_images, capsys, tmp_path):
    folder = cifar_images[0][0].parent.parent
    code, out, _ = run(capsys, folder, "--topk", 1)
    assert (code, len(out.splitlines())) == (0, 30)
    code, out, _ = run(capsys, f"{folder}/*/0000.jpg", folder / "cat" / "0000.jpg", "--topk", 1)
    assert (code, len(out.splitlines())) == (0, 10)
    code, _, err = run(capsys, tmp_path)
    assert code == 1
    assert "no images found" in err


def png_16_bit(path, values):
    """A 16-bit greyscale PNG, written by hand."""
    height, width = values.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_every_mode_looks_like_the_original(cifar_images, tmp_path):
    original = Image.open(cifar_images[0][0]).convert("RGB")
    grey = original.convert("L")

    def difference(name, reference=original):
        image = load_image(tmp_path / name)
        assert image.mode == "RGB"
        assert image.size == reference.size
        return np.abs(np.asarray(image, float) - np.asarray(reference.convert("RGB"), float)).mean()

    for mode, name, tolerance in [
        ("RGBA", "rgba.png", 0),
        ("P", "palette.png", 20),
        ("CMYK", "cmyk.tiff", 0),
        ("1", "bits.png", 255),
    ]:
        original.convert(mode).save(tmp_path / name)
        assert difference(name) <= tolerance
    original.convert("P").save(tmp_path / "transparent.png", transparency=b"\x00" * 3 + b"\xff" * 253)
    assert difference("transparent.png") <= 20
    for mode, name in [("L", "grey.png"), ("LA", "grey_alpha.png")]:
        grey.convert(mode).save(tmp_path / name)
        assert difference(name, grey) == 0
    png_16_bit(tmp_path / "deep.png", np.asarray(grey, np.uint16) * 257)
    assert difference("deep.png", grey) <= 1
    Image.fromarray(np.asarray(grey, np.int32) * 257).save(tmp_path / "deep.tiff")
    assert difference("deep.tiff", grey) <= 1
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to view
    original.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert difference("turned.png") == 0


def test_broken_files_are_named_and_the_rest_is_classified(cifar_images, capsys, tmp_path, monkeypatch):
    good = cifar_images[0][0]
    (tmp_path / "corrupt.jpg").write_bytes(b"no image at all")
    (tmp_path / "truncated.jpg").write_bytes(good.read_bytes()[:500])
    png = tmp_path / "truncated.png"
    Image.open(good).save(png)
    png.write_bytes(png.read_bytes()[:600])
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("L", (400, 300)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    shutil.copy(good, tmp_path / "good.jpg")
    names = ["corrupt.jpg", "truncated.jpg", "truncated.png", "empty.png", "large.png", "missing.jpg"]
    code, out, err = run(capsys, *(tmp_path / name for name in names), tmp_path / "good.jpg", "--topk", 1)
    assert code == 1
    assert out.startswith(str(tmp_path / "good.jpg"))
    lines = err.splitlines()
    assert len(lines) == len(names)
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"error: {tmp_path / name}: ")
    assert "no such file" in lines[-1]
    assert "100,000 pixels" in lines[-2]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "convmixer_9_9"], "'convmixer_9_9' is not a known model"),
        (["--model", "convmixer_256_16_ks9_p1"], "'convmixer_256_16_ks9_p1' has no weights"),
        (["--model", "convmixer_128_4.nope"], "With weights there are: convmixer_128_4.e10_cifar10"),
        (["--model", "local-dir:/nonexistent"], "nonexistent"),
        (["--device", "abacus"], "--device abacus"),
    ],
)
def test_wrong_arguments_get_one_line(argv, message, cifar_images, capsys):
    code, out, err = run(capsys, cifar_images[0][0], *argv)
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("argv", [["--topk", "0"], ["--batch-size", "-1"], ["--format", "xml"], []])
def test_argparse_refuses(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["predict", *argv])
    assert stop.value.code == 2


def test_a_local_folder_with_one_channel_and_other_labels(tmp_path, cifar_images, capsys):
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("convmixer_128_4", in_chans=1, num_classes=2, depth=2)
    data = {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,), "num_classes": 2, "label_names": None}
    config = {"pretrained_cfg": data, "label_names": ["ant", "bee"]}
    args = {"in_chans": 1, "num_classes": 2, "depth": 2}
    save_for_hf(model, tmp_path, model_config=config, model_args=args, safe_serialization=True)
    code, out, _ = run(capsys, cifar_images[0][0], "--model", f"local-dir:{tmp_path}", "--format", "json")
    assert code == 0
    assert {c["label"] for c in json.loads(out)[0]["classes"]} == {"ant", "bee"}


def test_list_shows_every_variant(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(timm.list_models("convmixer*"))
    row = next(line for line in lines if line.startswith("convmixer_768_32 "))
    assert "21.11" in row
    assert "3x224x224" in row
    assert "convmixer_768_32.in1k" in row
