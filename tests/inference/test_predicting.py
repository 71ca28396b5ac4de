"""Predicting from the shell: real CIFAR-10 test images, every kind of image file, and every kind of broken one."""

import csv
import io
import json
import re
import shutil
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image

import convmixer_timm
from convmixer_timm import images, load_model, predict
from convmixer_timm.cli import main
from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.images import ImageError, load_image
from convmixer_timm.inference import reading

from ..conftest import IMAGES

NAME = "convmixer_128_4.e25_cifar10"
IMAGE = "tests/images/cat/0000.png"


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
    _, out, _ = run(capsys, path, "--format", "csv", "--topk", 10, "--model", "convmixer_128_4.e25_cifar10")
    rows = list(csv.DictReader(io.StringIO(out)))
    model = timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True).eval()
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
    code, out, _ = run(capsys, f"{folder}/*/0000.png", folder / "cat" / "0000.png", "--topk", 1)
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


def test_what_was_classified_before_ctrl_c_is_shown(cifar_images, capsys, monkeypatch):
    paths, read = [str(path) for path, _ in cifar_images[:3]], images.load_image

    def interrupted(path, **options):
        if str(path) == paths[2]:
            raise KeyboardInterrupt
        return read(path, **options)

    monkeypatch.setattr(images, "load_image", interrupted)
    shown = {}
    for format in ("table", "csv", "json"):
        assert main(["predict", *paths, "--batch-size", "1", "--topk", "1", "--format", format]) == 130
        shown[format] = capsys.readouterr().out
    assert len(shown["table"].splitlines()) == len(shown["csv"].splitlines()) - 1 == len(json.loads(shown["json"])) == 2


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "convmixer_9_9"], "'convmixer_9_9' is not a known model"),
        (["--model", "convmixer_256_16_ks9_p1"], "has no weights. With weights there are: convmixer_128_4.e25"),
        (["--model", "convmixer_128_4.nope"], "is not a known model: did you mean convmixer_128_4.e25_cifar10?"),
        (["--model", "local-dir:/nonexistent"], "nonexistent"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--device", "meta"], "device 'meta'"),
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
    folder = tmp_path / "#1?"  # an address would end there
    save_for_hf(model, folder, model_config=config, model_args=args, safe_serialization=True)
    code, out, _ = run(capsys, cifar_images[0][0], "--model", f"local-dir:{folder}", "--format", "json")
    assert code == 0
    assert {c["label"] for c in json.loads(out)[0]["classes"]} == {"ant", "bee"}


def test_a_class_name_cannot_speak_to_the_terminal(tmp_path, capsys):
    folder = WEIGHTS_DIR / NAME
    config = json.loads((folder / "config.json").read_text())
    for names in (config, config["pretrained_cfg"]):
        if "label_names" in names:
            names["label_names"] = ["\x1b[31mred\nline"] * 10
    shutil.copy(folder / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, _ = run(capsys, IMAGES / "cat/0000.png", "--model", f"local-dir:{tmp_path}", "--topk", "2")
    assert (code, out.count("\n"), out.count("\x1b[31mred\nline"), out.count("\x1b")) == (0, 1, 0, 0)
    assert r"\x1b[31mred\nline" in out


def test_list_shows_every_variant(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(timm.list_models("convmixer*"))
    row = next(line for line in lines if line.startswith("convmixer_768_32 "))
    assert "21.11" in row
    assert "3x224x224" in row
    assert "convmixer_768_32.in1k" in row


@pytest.fixture(scope="module")
def model():
    return load_model("convmixer_128_4.e25_cifar10")


def test_one_or_many_images_of_any_kind(model):
    cat = IMAGES / "cat/0000.png"
    picture = Image.open(cat)
    array = np.asarray(picture.convert("RGB"))
    mixed = [str(cat), cat, picture, array, array / 255, array.astype(np.uint16) * 257]
    predictions = list(predict(model, mixed, topk=2))
    assert [image for image, _ in predictions[:3]] == mixed[:3]
    assert all(given is image for given, (image, _) in zip(mixed, predictions, strict=True))
    first = predictions[0][1]
    assert first[0][0] == "cat" and len(first) == 2
    for _, classes in predictions:
        assert [name for name, _ in classes] == [name for name, _ in first]
        assert [p for _, p in classes] == pytest.approx([p for _, p in first], abs=1e-3)
    for one in (str(cat), cat, cat.read_bytes(), picture, array):
        [(given, classes)] = predict(model, one, topk=2)
        assert given is one
        assert dict(classes) == pytest.approx(dict(first), abs=1e-4)
    assert [c[0][0] for _, c in predict(model, np.stack([array] * 3), batch_size=2)] == ["cat"] * 3
    assert len(list(predict(model, iter([cat] * 5), batch_size=2))) == 5
    folder = list(predict(model, IMAGES, topk=1))
    assert len(folder) == 30 and folder[0][0] == IMAGES / "airplane/0000.png"
    assert [path for path, _ in predict(model, np.array([str(cat)] * 2))] == [str(cat)] * 2
    assert list(predict(model, [])) == []


def test_large_files_are_read_by_several_threads_and_come_in_order(model, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_LARGE", range(2400, 10_000))  # some of the images are, some not
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    files = sorted(IMAGES.glob("*/*.png"))
    assert 5 < sum(file.stat().st_size >= 2400 for file in files) < 25
    (tmp_path / "bad.jpg").write_bytes(b"no image" * 1000)
    files.insert(7, tmp_path / "bad.jpg")
    seen, failed = set(), []

    def load(*args, **kwargs):
        seen.add(threading.current_thread())
        return load_image(*args, **kwargs)

    monkeypatch.setattr(images, "load_image", load)
    found = list(predict(model, files, batch_size=4, on_error=lambda image, _: failed.append(image)))
    assert len(seen) > 1 and failed == [tmp_path / "bad.jpg"]
    seen.clear()
    # What an iterator gives is read before the next, whose file may be the same.
    alone = list(predict(model, iter(files), batch_size=4, on_error=lambda *_: None))
    assert seen == {threading.current_thread()} and found == alone
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        list(predict(model, files))
    before = threading.active_count()
    next(predict(model, files[:7], batch_size=2))
    assert threading.active_count() == before


def test_predicting_leaves_the_model_in_its_mode(model):
    other = timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True).train()
    other.stem.eval()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    modes = [module.training for module in other.modules()]
    image = IMAGES / "cat/0000.png"
    assert next(predict(other, image)) == next(predict(model, image))
    assert [module.training for module in other.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_several_threads_predict_with_a_model_in_training(model):
    other = timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True).train()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: list(predict(other, IMAGES, topk=1, batch_size=8)), range(8)))
    assert found == [list(predict(model, IMAGES, topk=1, batch_size=8))] * 8
    assert all(module.training for module in other.modules())
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_model_that_gives_no_numbers():
    other = timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True)
    other.head.bias.data[3] = float("nan")
    with pytest.raises(ValueError, match="the model's outputs are no finite numbers"):
        list(predict(other, IMAGES / "cat/0000.png"))


def test_predicting_in_bf16(model):
    other = timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True).bfloat16()
    assert next(predict(other, IMAGES / "ship/0000.png"))[1][0][0] == "ship"


def test_an_image_that_cannot_be_read_is_named(model, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = [tmp_path / "bad.jpg", IMAGES / "cat/0000.png", tmp_path / "gone.jpg"]
    with pytest.raises(ImageError, match=r"bad.jpg: not an image that Pillow can read"):
        list(predict(model, images))
    failed = []
    assert len(list(predict(model, images, on_error=lambda image, error: failed.append((image, str(error)))))) == 1
    assert failed == [
        (images[0], f"{images[0]}: not an image that Pillow can read"),
        (images[2], f"{images[2]}: no such file"),
    ]


@pytest.mark.parametrize(
    "images, message",
    [
        (7, "images are paths, PIL images or arrays"),
        (None, "images are paths, PIL images or arrays"),
        (np.array(7), "got a ndarray"),
        ([7], "an image is a path, a PIL image or an array"),
        (np.zeros((8, 8, 3), np.uint8).tolist(), r"a path, a PIL image or an array \[H, W, 3\], got a list"),
        ([(np.zeros((8, 8, 3), np.uint8), 3)], "got a tuple: give the images alone"),
        (np.zeros((3, 32, 32)), r"got \[3, 32, 32\]"),
        ([torch.zeros(1, 3, 32, 32)], r"got \[1, 3, 32, 32\]"),
    ],
)
def test_what_is_no_image_is_said(model, images, message):
    with pytest.raises(ValueError, match=message):
        list(predict(model, images))
    with pytest.raises(ValueError, match="topk and batch_size must be whole numbers, 1 or more, got 0 and 64"):
        list(predict(model, [], topk=0))
    assert [len(next(predict(model, IMAGES / "cat/0000.png", topk))[1]) for topk in (True, np.int64(2))] == [1, 2]
    with pytest.raises(ValueError, match="whole numbers, 1 or more, got '3' and 64"):
        list(predict(model, [], topk="3"))


DAMAGED_CONFIGS = [
    ("[" * 100_000, "doesn't describe a model to timm"),
    ("[1]", "doesn't describe a model to timm"),
    ("{}", "doesn't describe a model to timm"),
    ('{"architecture": ["x"]}', "doesn't describe a model"),
    ('{"architecture": "convmixer_9_9"}', "no architecture that timm or this package knows"),
    ('{"architecture": "convmixer_128_4", "num_classes": 1000000000000}', "says num_classes 1000000000000"),
    (
        '{"architecture": "convmixer_128_4", "num_classes": 10, "model_args": {"depth": 99999999}}',
        "says depth 99999999",
    ),
    ('{"architecture": "convmixer_128_4", "num_classes": 10, "model_args": {"dim": "x"}}', "doesn't describe a model"),
    (
        '{"architecture": "convmixer_128_4", "num_classes": 10, "model_args": {"nothing": 1}}',
        "doesn't describe a model",
    ),
    (
        '{"architecture": "convmixer_128_4", "num_classes": 10, "pretrained_cfg": {"input_size": [3, 99999, 99999]}}',
        "no preprocessing of images can be made from input_size",
    ),
    ('{"architecture": "convmixer_128_4", "num_classes": 10, "pretrained_cfg": {"mean": [1]}}', "no preprocessing"),
    (
        '{"architecture": "convmixer_128_4", "num_classes": 10, "label_names": ["a"]}',
        "has 1 label_names for 10 classes",
    ),
    (
        '{"architecture": "convmixer_128_4", "num_classes": 10, "pretrained_cfg": {"crop_pct": 1e-9}}',
        "no preprocessing",
    ),
]


@pytest.mark.parametrize("content, message", DAMAGED_CONFIGS)
def test_a_damaged_description_gets_one_line(content, message, tmp_path, capsys):
    shutil.copy(WEIGHTS_DIR / "convmixer_128_4.e25_cifar10/model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(content)
    code, out, err = run(capsys, IMAGES / "cat", "--model", f"local-dir:{tmp_path}")
    assert (code, out) == (1, "")
    assert message in err and "config.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"global_pool": ""}])
def test_what_is_no_classifier_is_said(options):
    with pytest.raises(ValueError, match="no classifier: the model gives"):
        list(predict(timm.create_model("convmixer_128_4", **options), IMAGES / "cat/0000.png"))
    with pytest.raises(ValueError, match="one class only: there is nothing to choose"):
        list(predict(timm.create_model("convmixer_128_4", num_classes=1), IMAGES / "cat/0000.png"))


@pytest.mark.parametrize(
    "name, message",
    [
        (WEIGHTS_DIR / NAME, "a model is named by a text, got a PosixPath"),
        (None, "got a NoneType"),
        (str(WEIGHTS_DIR / NAME), f"a packed one, and a training's, is loaded by 'local-dir:{WEIGHTS_DIR / NAME}'"),
        (str(WEIGHTS_DIR / NAME / "model.safetensors"), "is a file: its folder, packed or a training's, is loaded by"),
        ("convmixer_128_4.e25_cifar", "is not a known model: did you mean convmixer_128_4.e25_cifar10?"),
        ("foo:bar", "no source 'foo'; a model is NAME, hf-hub:OWNER/NAME or local-dir:FOLDER"),
        (f"timm:{NAME}", "no source 'timm'; a model is NAME, hf-hub:OWNER/NAME or local-dir:FOLDER"),
        ("hf-hub:ann/cifar@", "ann/cifar@ names no revision: leave the @ out, or give OWNER/NAME@REVISION"),
    ],
)
def test_what_names_no_model(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_model(name)


def test_a_name_is_no_model(tmp_path):
    for call in (
        lambda: list(convmixer_timm.predict(NAME, IMAGES)),
        lambda: convmixer_timm.class_names(NAME),
        lambda: convmixer_timm.export(NAME, tmp_path / "x.onnx", "onnx"),
        lambda: convmixer_timm.optimize(NAME, torch.zeros(1, 3, 32, 32)),
    ):
        with pytest.raises(ValueError, match="the model must be one of PyTorch, from load_model"):
            call()
    with pytest.raises(ValueError, match="device 'abacus': "):
        load_model(NAME, "abacus")
    with pytest.raises(ValueError, match="enable must be True or False, got 'no'"):
        convmixer_timm.set_fast_training("no")


@pytest.mark.parametrize(
    "wrap, missing",
    [
        (nn.Sequential, "pretrained_cfg"),
        (nn.DataParallel, "pretrained_cfg"),
        (timm.utils.ModelEmaV3, "pretrained_cfg"),
        (torch.optim.swa_utils.AveragedModel, "pretrained_cfg"),
        (torch.jit.script, "pretrained_cfg"),
        (lambda model: nn.Linear(3, 3), "pretrained_cfg"),
        (lambda model: timm.create_model("convmixer_128_4", features_only=True), "num_classes"),
    ],
)
def test_what_is_no_model_of_timms(wrap, missing, model, tmp_path):
    wrapped = wrap(model)
    for call in (
        lambda: list(predict(wrapped, IMAGES)),
        lambda: convmixer_timm.class_names(wrapped),
        lambda: convmixer_timm.export(wrapped, tmp_path / "x.pt2", "torch-export"),
    ):
        with pytest.raises(ValueError, match=f"no classifier of timm's, it has no {missing}: give the model inside it"):
            call()


def test_models_of_other_channels():
    def made(channels):
        return timm.create_model(NAME, pretrained=True, in_chans=channels)

    [(_, classes)] = predict(made(1), IMAGES / "cat/0000.png")
    assert classes[0][0] == "cat"
    with pytest.raises(ValueError, match=r"^images are read in 1 or 3 channels, and the model takes 4$"):
        next(predict(made(4), IMAGES / "cat/0000.png"))


def test_a_compiled_model_predicts(model):
    compiled = torch.compile(model, backend="eager")
    assert next(predict(compiled, IMAGES / "ship/0000.png"))[1][0][0] == "ship"


def test_every_public_name_is_offered():
    assert set(convmixer_timm.__all__) <= set(dir(convmixer_timm))
