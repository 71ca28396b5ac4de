"""Pictures of a model and of its training."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from convmixer_timm.cli import main
from convmixer_timm.plots import draw_curve, draw_depthwise_kernels, draw_heat_map, draw_patch_filters

from .conftest import IMAGES

NAME = "convmixer_128_4.e25_cifar10"
SHIP = str(IMAGES / "ship/0000.png")


def spread(path):
    """How much of a picture's range its pixels use."""
    low, high = Image.open(path).convert("L").getextrema()
    return high - low


def test_plot_command(tmp_path, capsys):
    assert main(["plot", NAME, "--layers", "0,3", "--image", SHIP, "-o", str(tmp_path)]) == 0
    *files, last = capsys.readouterr().out.splitlines()
    assert files == [str(tmp_path / "patch_filters.png"), str(tmp_path / "depthwise_kernels.png")]
    assert last.startswith(f"{tmp_path / 'heat_map_0000.png'}  ship 0.")
    for path in tmp_path.iterdir():
        assert spread(path) > 150
    wide, square = (Image.open(path) for path in (files[1], files[0]))
    assert wide.width / wide.height > 1.5 > square.width / square.height


@pytest.mark.parametrize(
    "args, message",
    [
        ([NAME, "--layers", "4"], "no layer 4: this model's are 0 to 3"),
        ([NAME, "--image", "nowhere.jpg"], "no such file"),
        (["convmixer_256_16_ks9_p1"], "has no weights"),
    ],
)
def test_bad_input_is_named(args, message, tmp_path, capsys):
    assert main(["plot", *args, "-o", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    if "--image" not in args:  # an image that can't be read leaves the rest
        assert list(tmp_path.iterdir()) == []


def test_neighbours_look_alike(tmp_path):
    from convmixer_timm.plots import _order

    angles = torch.rand(50, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    waves = torch.sin(torch.arange(25).view(1, 1, 5, 5) / 4 + angles.view(-1, 1, 1, 1))
    ordered = waves[_order(waves)].flatten(1)
    step = (ordered[1:] - ordered[:-1]).norm(dim=1).mean()
    assert step < 0.25 * (waves.flatten(1)[1:] - waves.flatten(1)[:-1]).norm(dim=1).mean()


def test_heat_map_is_where_the_evidence_is(tmp_path):
    """A model whose class is the brightness of a corner looks at that corner."""
    model = timm.create_model("convmixer_128_4", num_classes=2)
    model.forward_features = lambda x: x[:, :1].expand(-1, 128, -1, -1).clone().requires_grad_()
    torch.nn.init.constant_(model.head.weight[0], 0.0)
    torch.nn.init.constant_(model.head.weight[1], 1.0)
    image = torch.zeros(3, 32, 32)
    image[:, :8, :8] = 4.0
    said = draw_heat_map(model, image, ["dark", "bright"], tmp_path / "map.png")
    assert said.startswith("bright 1.0") and model.training
    for name in ("US$_$5", "飛行機"):  # no formula; perhaps no letters of the font's
        draw_heat_map(model, image, ["dark", name], tmp_path / "map.png")
    picture = Image.open(tmp_path / "map.png").convert("L")
    width, height = picture.size
    corner, rest = picture.getpixel((width * 9 // 16, height // 5)), picture.getpixel((width * 7 // 8, height * 3 // 4))
    assert corner > rest + 50


def test_grey_models_and_other_patches(tmp_path):
    model = timm.create_model("convmixer_256_8_ks9_p1", in_chans=1, depth=1)
    draw_patch_filters(model, tmp_path / "filters.png")
    draw_depthwise_kernels(model, tmp_path / "kernels.png")
    draw_heat_map(model, torch.randn(1, 32, 32), [*"abcdefghij"], tmp_path / "map.png")
    assert all(spread(path) > 50 for path in tmp_path.iterdir())


def test_curve_without_validation(tmp_path):
    summary = tmp_path / "summary.csv"
    summary.write_text("epoch,train_loss\n0,2.0\n1,1.0\n")
    draw_curve(summary, tmp_path / "curve.png")
    assert spread(tmp_path / "curve.png") > 150
    summary.write_text("")
    with pytest.raises(ValueError, match="no finished epoch"):
        draw_curve(summary, tmp_path / "other.png")


def test_a_matplotlib_that_cannot_be_imported_is_not_said_to_be_missing(tmp_path):
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib/__init__.py").write_text("raise ImportError('numpy.core.multiarray failed to import')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import convmixer_timm.plots"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr
    assert said.endswith("pictures need matplotlib, which can't be imported: numpy.core.multiarray failed to import\n")


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "convmixer_timm.plots", raising=False)
    assert main(["plot", NAME]) == 1
    assert capsys.readouterr().err == ("convmixer-timm: error: pictures need matplotlib: pip install matplotlib\n")


def test_images_of_the_same_name_and_damaged_ones(tmp_path, capsys):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    images = [IMAGES / "bird/0000.png", tmp_path / "bad.jpg", IMAGES / "frog/0000.png", IMAGES / "frog/0001.png"]
    out = tmp_path / "plots"
    assert main(["plot", NAME, "--image", *map(str, images), "-o", str(out)]) == 1
    said = capsys.readouterr()
    written = {"heat_map_bird_0000.png", "heat_map_frog_0000.png", "heat_map_0001.png"}
    assert {path.name for path in out.iterdir()} == written | {"patch_filters.png", "depthwise_kernels.png"}
    assert [Path(line.split("  ")[0]).name for line in said.out.splitlines()[2:]] == [
        "heat_map_bird_0000.png",
        "heat_map_frog_0000.png",
        "heat_map_0001.png",
    ]
    assert said.err == f"error: {images[1]}: not an image that Pillow can read\n"


def test_names_of_heat_maps_are_distinct():
    from convmixer_timm.plots import _distinct_names

    paths = [Path(p) for p in ("a/x.jpg", "b/x.jpg", "c/a/x.jpg", "y.jpg", "a/a_x.png", "a/x.png")]
    names = _distinct_names(paths)
    assert names[:4] == ["a_x", "b_x", "a_x_2", "y"]
    assert len(set(names)) == len(paths)
