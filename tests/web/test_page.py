"""`convmixer-timm page`: the folder that it writes, whole or not at all."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageCms

import convmixer_timm
from convmixer_timm.cli import main
from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.images import image_loader
from convmixer_timm.inference.class_map import ClassMap, has_class_map
from convmixer_timm.inference.engines import unavailable
from convmixer_timm.inference.export import export
from convmixer_timm.web import page as page_module

from ..conftest import IMAGES

pytestmark = pytest.mark.skipif(unavailable("onnxruntime") is not None, reason=str(unavailable("onnxruntime")))

NAME = "convmixer_128_4.e25_cifar10"
SOURCES = {"index.html", "page.js", "page.css", "model.onnx"}


def settings(folder):
    """What the page tells its script."""
    html = (folder / "index.html").read_text(encoding="utf-8")
    return json.loads(html.partition('id="settings">')[2].partition("</script>")[0])


def save(folder, labels=None, **kwargs):
    """A small untrained model, packed; `kwargs` with a capital stand in its preprocessing."""
    config = {key.lower(): kwargs.pop(key) for key in list(kwargs) if key.isupper()}
    torch.manual_seed(0)
    args = {"dim": 16, "depth": 1, "num_classes": 5, **kwargs}
    model = timm.create_model("convmixer_128_4", **args).eval()
    model.pretrained_cfg.update(config)
    model.pretrained_cfg.pop("label_names", None)
    model_config = {"label_names": labels} if labels else None
    timm.models.save_for_hf(model, str(folder), model_config=model_config, model_args=args, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "cifar"
    assert main(["page", NAME, "-o", str(folder), "--title", "What <is> this?"]) == 0
    return folder


def test_folder_holds_the_page_and_what_it_needs(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == SOURCES | {"examples/1.png", "examples/2.png", "examples/3.png"}
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert "<title>What &lt;is&gt; this?</title>" in html
    assert "0.08 million" in html and "89.82 %" in html and "cifar10" in html
    known = settings(folder)
    assert known["labels"][8] == "ship"
    assert (known["input_size"], known["scale"]) == ([3, 32, 32], [32, 32])
    assert known["model"]["bytes"] == (folder / "model.onnx").stat().st_size
    assert known["runtime"]["base"] == page_module._CDN
    for name, example in zip(("cat", "horse", "ship"), known["examples"], strict=True):
        assert example["name"] == name
        shown = np.asarray(Image.open(folder / example["file"]))
        assert np.array_equal(shown, np.asarray(Image.open(WEIGHTS_DIR / "images" / f"{name}.png")))


def test_model_file_gives_logits_and_class_maps(folder):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["label_names"])[8] == "ship"
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()
    assert str(WEIGHTS_DIR.parent).encode() not in (folder / "model.onnx").read_bytes()
    model = timm.create_model(NAME, pretrained=True).eval()
    image = image_loader(model)(IMAGES / "ship/0000.png")[None]
    logits, maps = map(torch.tensor, session.run(["logits", "maps"], {"images": image.numpy()}))
    with torch.no_grad():
        features = model.forward_features(image)
        expected = torch.einsum("nchw,kc->nkhw", features, model.head.weight) + model.head.bias[:, None, None]
        torch.testing.assert_close(logits, model(image), atol=1e-4, rtol=0)
    torch.testing.assert_close(maps, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(maps.mean((2, 3)), logits, atol=1e-3, rtol=0)


def test_int8_is_smaller_and_close(folder, tmp_path):
    if reason := unavailable("openvino", "int8"):
        pytest.skip(reason)
    files = convmixer_timm.page(NAME, tmp_path / "page", precision="int8", calibration=IMAGES)
    assert files["model.onnx"] < 0.6 * (folder / "model.onnx").stat().st_size
    assert settings(tmp_path / "page")["precision"] == "int8"
    assert "in int8" in (tmp_path / "page/index.html").read_text()


@pytest.mark.parametrize("pool", ["max", "catavgmax"])
def test_other_pooling_has_no_class_map(pool, tmp_path):
    convmixer_timm.page(save(tmp_path / "model", global_pool=pool), tmp_path / "page")
    assert "shows where it looks" not in (tmp_path / "page/index.html").read_text()


def test_class_maps_of_other_architectures():
    assert has_class_map(timm.create_model("resnet10t", num_classes=3))
    assert not has_class_map(timm.create_model("convnext_atto", num_classes=3))  # a norm after the pooling
    assert not has_class_map(timm.create_model("vit_tiny_patch16_224", num_classes=3))


def test_what_a_model_calls_its_classes_is_never_markup(tmp_path):
    labels = ["</script><script>alert(1)</script>", "<!--<script>", "a & b", "${facts}", "é\u2028"]
    convmixer_timm.page(save(tmp_path / "model", labels=labels), tmp_path / "page", title="</title>$title")
    html = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    assert settings(tmp_path / "page")["labels"] == labels
    assert html.count("<script") == 2 and "</title>$title" not in html


def test_a_card_beside_the_model_gives_its_facts(tmp_path):
    name = save(tmp_path / "model")
    (tmp_path / "model/README.md").write_text(
        "---\nlicense: cc-by-4.0\ndatasets: [moths]\nmodel-index:\n- name: m\n  results:\n  - task: {type: t}\n"
        "    dataset: {name: 'moths, <validation>', type: moths}\n"
        "    metrics: [{type: accuracy, name: Top 1 Accuracy, value: 81.5}]\n---\n# m\n"
    )
    convmixer_timm.page(name, tmp_path / "page", link="https://example.org/m?a=1&b=2")
    html = (tmp_path / "page/index.html").read_text()
    for said in (
        "cc-by-4.0",
        "moths",
        "81.5 %, on moths, &lt;validation&gt;",
        'href="https://example.org/m?a=1&amp;b=2"',
    ):
        assert said in html
    (tmp_path / "model/README.md").write_text("---\nlicense: [\n---\n")  # a card that can't be read
    convmixer_timm.page(name, tmp_path / "page")


def test_a_label_that_no_encoding_holds(tmp_path):
    labels = ["\ud800x", *"abcd"]
    convmixer_timm.page(save(tmp_path / "model", labels=labels), tmp_path / "page")
    assert settings(tmp_path / "page")["labels"] == labels
    assert "\\ud800x" in (tmp_path / "page/index.html").read_text(encoding="utf-8")


def test_examples_are_shrunk_and_carry_no_metadata(tmp_path):
    photo = Image.new("RGB", (3000, 1500), "green")
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    exif[0x0112] = 6  # to be turned
    told = {"exif": exif, "icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()}
    photo.save(tmp_path / "photo.jpg", comment="a secret", **told)
    photo.resize((32, 32)).save(tmp_path / "small.png", **told)
    examples = [tmp_path / "photo.jpg", tmp_path / "small.png"]
    convmixer_timm.page(save(tmp_path / "model"), tmp_path / "page", examples=examples)
    shown = Image.open(tmp_path / "page/examples/1.jpg")
    assert shown.size == (512, 1024)
    for image in (shown, Image.open(tmp_path / "page/examples/2.png")):
        assert not image.getexif() and not image.info.keys() & {"comment", "icc_profile"}


def test_examples_of_a_folder_and_of_one_file(tmp_path):
    name = save(tmp_path / "model")
    for number, examples in enumerate((IMAGES / "ship", str(IMAGES / "ship/*.png"), [IMAGES / "ship"])):
        convmixer_timm.page(name, tmp_path / f"{number}", examples=examples)
        assert len(settings(tmp_path / f"{number}")["examples"]) == 3
    with pytest.raises(ValueError, match=r"named by files, folders and globs, got a Image"):
        convmixer_timm.page(name, tmp_path / "none", examples=[Image.new("RGB", (8, 8))])


def test_titles(tmp_path, monkeypatch):
    name = save(tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    for given, title, shown in [
        ("local-dir:.", None, "model"),
        (name, "  ", "model"),
        (name, "a\udcffb\n c", "a\\xffb c"),
    ]:
        convmixer_timm.page(given, tmp_path / "page", title=title)
        assert f"<title>{shown}</title>" in (tmp_path / "page/index.html").read_text()


@pytest.mark.parametrize("link", ["example.org/m", "javascript:alert(1)"])
def test_a_link_is_an_address(link, tmp_path):
    with pytest.raises(ValueError, match="the link must be an address"):
        convmixer_timm.page(NAME, tmp_path / "page", link=link)


def test_older_page_is_replaced_and_nothing_else(folder, tmp_path, capsys):
    target = tmp_path / "page"
    target.mkdir()  # an empty folder is as good as none
    model = save(tmp_path / "model")
    assert main(["page", model, "-o", str(target)]) == 0
    (target / "page.js").write_text("an older version's")
    (tmp_path / "link").symlink_to(target)
    assert main(["page", model, "-o", str(tmp_path / "link")]) == 0
    assert {path.name for path in target.iterdir()} == SOURCES
    assert (target / "page.js").stat().st_size > 1000 and (tmp_path / "link").is_symlink()
    (target / "CNAME").write_text("example.org")
    capsys.readouterr()
    assert main(["page", model, "-o", str(target)]) == 1
    assert "holds CNAME, which is no part of an earlier page" in capsys.readouterr().err
    assert (target / "CNAME").read_text() == "example.org"
    (target / "CNAME").unlink()
    (target / "examples").mkdir()
    (target / "examples/mine.txt").write_text("mine")
    assert main(["page", model, "-o", str(target)]) == 1
    assert "holds examples/mine.txt, which is no part" in capsys.readouterr().err
    assert (target / "examples/mine.txt").read_text() == "mine"

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "index.html").write_text("<h1>mine</h1>")
    (tmp_path / "file").write_text("")
    for wrong in (mine, tmp_path / "file"):
        assert main(["page", model, "-o", str(wrong)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and str(wrong) in error
    assert (mine / "index.html").read_text() == "<h1>mine</h1>"


@pytest.mark.parametrize(
    "model, args, message",
    [
        ({}, ["--precision", "int8"], "int8 needs calibration images"),
        ({}, ["--examples", "no.jpg"], "no.jpg: no such file"),
        ({}, ["--calibration", "."], "calibration images are for int8, and this is fp32"),
        ({}, ["-o", "/proc/x"], "/proc/x: no such file"),
        ({}, ["--runtime", "."], "has no ort.webgpu.bundle.min.mjs"),
        ({}, ["--runtime", "nowhere"], "nowhere is no folder"),
        ({"global_pool": ""}, [], "is no classifier of two classes or more: for an image it gives 5x16x16 values"),
        ({"num_classes": 0}, [], "is no classifier"),
        ({"num_classes": 1}, [], "is no classifier of two classes or more: for an image it gives 1 values"),
        ({"in_chans": 4, "INPUT_SIZE": (4, 32, 32), "MEAN": (0.5,) * 4, "STD": (0.5,) * 4}, [], "images of 4 channels"),
        ({"INTERPOLATION": "random"}, [], "no preprocessing of images can be made"),
    ],
)
def test_what_cannot_be_written_is_named_and_leaves_nothing(model, args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = save(tmp_path / "model", **model)
    assert main(["page", name, *args]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_runtime_of_another_version_is_refused(tmp_path):
    dist = tmp_path / "dist"
    dist.mkdir()
    for name in page_module._INTEGRITY:
        (dist / name).write_text("another version's")
    with pytest.raises(ValueError, match=r"is not that of npm's onnxruntime-web 1\."):
        convmixer_timm.page(NAME, tmp_path / "page", runtime=tmp_path)
    assert not (tmp_path / "page").exists()


def test_class_maps_are_for_onnx(tmp_path):
    model = timm.create_model(NAME, pretrained=True).eval()
    with pytest.raises(ValueError, match="written in ONNX"):
        export(model, tmp_path / "model.pt2", "torch-export", class_map=True)
    images = torch.zeros(1, 3, 32, 32)
    assert [tuple(x.shape) for x in ClassMap(model)(images)] == [(1, 10), (1, 10, 16, 16)]


def test_the_mark_of_a_page_is_in_its_source():
    assert page_module._MARK in page_module._source("index.html")
