"""Checkpoints of other implementations. Each source model is built here from its definition."""

import pickle
import sys
import types
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

from convmixer_timm import ConvMixer
from convmixer_timm.checkpoints import Shape, checkpoint_filter_fn, convert, read_checkpoint, to_timm_layout
from convmixer_timm.cli import main

DIM, DEPTH, KERNEL, PATCH, CLASSES = 24, 3, 5, 2, 7


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


def layer():
    depthwise = nn.Sequential(nn.Conv2d(DIM, DIM, KERNEL, groups=DIM, padding="same"), nn.GELU(), nn.BatchNorm2d(DIM))
    return nn.Sequential(Residual(depthwise), nn.Conv2d(DIM, DIM, 1), nn.GELU(), nn.BatchNorm2d(DIM))


def authors():
    """locuslab/convmixer and locuslab/convmixer-cifar10: one flat Sequential."""
    stem = nn.Conv2d(3, DIM, PATCH, PATCH), nn.GELU(), nn.BatchNorm2d(DIM)
    layers = [layer() for _ in range(DEPTH)]
    return nn.Sequential(*stem, *layers, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(DIM, CLASSES))


class Labml(nn.Module):
    """labml's annotated implementation."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.depth_wise_conv = nn.Conv2d(DIM, DIM, KERNEL, groups=DIM, padding=(KERNEL - 1) // 2)
            self.norm1 = nn.BatchNorm2d(DIM)
            self.point_wise_conv = nn.Conv2d(DIM, DIM, 1)
            self.norm2 = nn.BatchNorm2d(DIM)

        def forward(self, x):
            x = x + self.norm1(nn.functional.gelu(self.depth_wise_conv(x)))
            return self.norm2(nn.functional.gelu(self.point_wise_conv(x)))

    def __init__(self):
        super().__init__()
        self.patch_emb = nn.Module()
        self.patch_emb.conv = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.patch_emb.norm = nn.BatchNorm2d(DIM)
        self.classification = nn.Module()
        self.classification.linear = nn.Linear(DIM, CLASSES)
        self.conv_mixer_layers = nn.ModuleList(self.Layer() for _ in range(DEPTH))

    def forward(self, x):
        x = self.patch_emb.norm(nn.functional.gelu(self.patch_emb.conv(x)))
        for mixer in self.conv_mixer_layers:
            x = mixer(x)
        return self.classification.linear(x.mean((2, 3)))


class Mmpretrain(nn.Module):
    """mmpretrain's ImageClassifier with its ConvMixer backbone, global average pooling and LinearClsHead."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Module()
        self.backbone.stem = nn.Sequential(nn.Conv2d(3, DIM, PATCH, PATCH), nn.GELU(), nn.BatchNorm2d(DIM))
        self.backbone.stages = nn.Sequential(*[layer() for _ in range(DEPTH)])
        self.head = nn.Module()
        self.head.fc = nn.Linear(DIM, CLASSES)

    def forward(self, x):
        return self.head.fc(self.backbone.stages(self.backbone.stem(x)).mean((2, 3)))


def timms():
    from timm.models.convmixer import ConvMixer as TimmConvMixer

    return TimmConvMixer(DIM, DEPTH, KERNEL, PATCH, num_classes=CLASSES)


SOURCES = {"timm": timms, "authors": authors, "labml": Labml, "mmpretrain": Mmpretrain}


@pytest.fixture(params=SOURCES)
def source(request):
    """A model of another implementation with lived-in weights and statistics."""
    torch.manual_seed(0)
    model = SOURCES[request.param]()
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16))
    model.layout = request.param
    return model.eval()


def our_model(**kwargs):
    sizes = dict(dim=DIM, depth=DEPTH, kernel_size=KERNEL, patch_size=PATCH, num_classes=CLASSES)
    return ConvMixer(**{**sizes, **kwargs}).eval()


def assert_same_output(state_dict, source):
    ours = our_model()
    ours.load_state_dict(state_dict)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), source(x), atol=1e-6, rtol=0)


WRAPPINGS = {
    "bare": lambda sd: sd,
    "DataParallel": lambda sd: {f"module.{k}": v for k, v in sd.items()},
    "compiled": lambda sd: {f"_orig_mod.{k}": v for k, v in sd.items()},
    "state_dict": lambda sd: {"state_dict": sd, "epoch": 3, "arch": "convmixer", "args": Namespace(lr=0.1)},
    "DataParallel in state_dict": lambda sd: {"state_dict": {f"module.{k}": v for k, v in sd.items()}},
    "EMA first": lambda sd: {"state_dict": {k: v * 0 for k, v in sd.items()}, "state_dict_ema": sd},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_output_equals_the_source_models(source, wrapping, tmp_path):
    wrapped = WRAPPINGS[wrapping](source.state_dict())
    assert_same_output(checkpoint_filter_fn(wrapped, our_model()), source)
    torch.save(wrapped, tmp_path / "model.pth.tar")
    shape, layout = convert(tmp_path / "model.pth.tar", tmp_path / "out.safetensors")
    assert layout == source.layout
    assert shape == Shape(DIM, DEPTH, KERNEL, PATCH, 3, CLASSES)
    assert_same_output(load_file(tmp_path / "out.safetensors"), source)
    (tmp_path / "usual").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("out.safetensors", "usual")}
    assert len(modes) == 1  # safetensors' own are for nobody else


def test_timm_loads_any_of_them(source, tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(source.state_dict(), file)
    sizes = dict(dim=DIM, depth=DEPTH, kernel_size=KERNEL, patch_size=PATCH)
    cfg = {"file": str(file), "num_classes": CLASSES}
    x = torch.randn(2, 3, 16, 16)
    model = timm.create_model("convmixer_256_8", pretrained=True, pretrained_cfg_overlay=cfg, **sizes).eval()
    torch.testing.assert_close(model(x), source(x), atol=1e-6, rtol=0)
    other = timm.create_model(
        "convmixer_256_8", pretrained=True, pretrained_cfg_overlay=cfg, num_classes=2, in_chans=1, **sizes
    )
    assert other.eval()(x[:, :1]).shape == (2, 2)


def test_deep_models_are_ordered_by_number():
    state_dict = {f"{i}.3.weight": torch.tensor(i) for i in range(3, 35)}
    state_dict |= {"0.weight": torch.zeros(8, 3, 2, 2), "3.0.fn.0.weight": torch.zeros(8, 1, 3, 3)}
    state_dict["37.weight"] = torch.zeros(5, 8)
    converted, _ = to_timm_layout(state_dict)
    assert converted["blocks.31.3.weight"] == 34
    assert Shape.of(converted).depth == 32
    assert Shape.of(converted).num_classes == 5


@pytest.mark.parametrize("change", [dict(dim=32), dict(depth=4), dict(kernel_size=7), dict(patch_size=1)])
def test_another_size_is_named(source, change):
    with pytest.raises(
        ValueError, match=r"expected dim .* found dim 24, depth 3, kernel_size 5, patch_size 2"
    ) as error:
        checkpoint_filter_fn(source.state_dict(), our_model(**change))
    (name, value), *_ = change.items()
    assert f"{name} {value}" in str(error.value).split("found")[0]


def test_another_architecture_is_named():
    other = timm.create_model("resnet18").state_dict()
    with pytest.raises(ValueError, match=r"Not a ConvMixer.*stem\.0\.weight \(timm\).*found conv1\.weight"):
        checkpoint_filter_fn(other, our_model())
    with pytest.raises(ValueError, match="found nothing"):
        checkpoint_filter_fn({}, our_model())


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def test_code_in_a_pickle_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": our_model().state_dict(), "x": Evil()}, "evil.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(ValueError, match="can't be read as weights"):
            read_checkpoint(name)
        assert main(["convert", name, "out.safetensors"]) == 1
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.pth", "plain.pth"]


def test_a_pointer_of_git_lfs_is_no_damaged_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(ValueError, match="is a pointer of Git LFS in the place of the file itself: run `git lfs pull`"):
        read_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["in.safetensors", "a_blob_of_the_hubs_cache"])
def test_convert_from_the_shell(name, source, tmp_path, capsys):
    save_file(source.state_dict(), tmp_path / name)
    assert main(["convert", str(tmp_path / name), str(tmp_path / "sub" / "out.safetensors")]) == 0
    out = capsys.readouterr().out
    assert f"dim {DIM}, depth {DEPTH}, kernel_size {KERNEL}, patch_size {PATCH}" in out
    assert f"num_classes {CLASSES}" in out
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize(
    "content, target, message",
    [
        (None, "out.safetensors", "No such checkpoint file"),
        (b"not a checkpoint", "out.safetensors", "can't be read"),
        (b"", "out.safetensors", "can't be read"),
        (b"", "out.pth", "must end in .safetensors"),
    ],
)
def test_convert_names_what_is_wrong(content, target, message, tmp_path, capsys):
    file = tmp_path / "in.safetensors"
    if content is not None:
        file.write_bytes(content)
    (tmp_path / target).write_text("old")
    assert main(["convert", str(file), str(tmp_path / target)]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert (tmp_path / target).read_text() == "old"


def test_a_part_of_a_model_is_not_converted(tmp_path, capsys):
    whole = ConvMixer(16, 3, 3, 2, num_classes=2).state_dict()
    for lost in ("blocks.1.", "head.bias", "stem.0.bias"):
        part = {key: value for key, value in whole.items() if not key.startswith(lost)}
        save_file(part, tmp_path / "part.safetensors")
        assert main(["convert", str(tmp_path / "part.safetensors"), str(tmp_path / "out.safetensors")]) == 1
        assert f"is not whole: it lacks {lost}" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


PREFIXES = ["", "module.", "model.", "net.", "model._orig_mod.", "_orig_mod.module.", "1.", "backbone."]
WRAPPERS = [(), ("net",), ("state_dict",), ("model_state_dict",), ("model", "state_dict"), ("state_dict_ema",)]
WRAPPERS += [("checkpoint",), ("state", "model")]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("wrappers", WRAPPERS)
def test_what_trainers_wrap_around_the_weights(prefix, wrappers, source, tmp_path):
    content = {f"{prefix}{key}": value for key, value in source.state_dict().items()}
    if prefix:
        content["criterion.weight"] = torch.ones(3)  # of a Lightning module, say
    for wrapper in reversed(wrappers):
        content = {wrapper: content, "epoch": 3, "acc": 93.5, "optimizer_state_dict": {"state": {0: torch.ones(2)}}}
    torch.save(content, tmp_path / "x.pth")
    assert_same_output(checkpoint_filter_fn(read_checkpoint(tmp_path / "x.pth"), our_model()), source)


def test_averaged_weights_are_preferred(source):
    averaged = {key: value * 2 for key, value in source.state_dict().items()}
    expected, _ = to_timm_layout(averaged)
    plain = source.state_dict()
    lightning = {f"model.{key}": value for key, value in plain.items()}
    for content in (
        {"state_dict": plain, "ema_state_dict": averaged},
        {"model": plain, "ema": averaged},
        {"model": plain, "ema": {"module": averaged, "updates": 3}},
        {"params": plain, "params_ema": averaged},
        {"state_dict": {**lightning, **{f"ema_model.module.{key}": value for key, value in averaged.items()}}},
    ):
        found, _ = to_timm_layout(content)
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_what_only_looks_like_the_weights_is_passed_over(source):
    plain = source.state_dict()
    circle = {"model": plain}
    circle["state_dict"] = circle
    compiled = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in plain.items()}
    for content in (
        {"state_dict": plain, "state_dict_ema": {}},
        {"model": {"name": "convmixer", "dim": DIM}, "net": plain},
        {**plain, "epoch": 3, "best": 93.1},
        circle,
        compiled,
    ):
        assert_same_output(checkpoint_filter_fn(content, our_model()), source)


def test_refused_pickles_say_what_to_do(tmp_path, monkeypatch, capsys):
    buffer = type("HistoryBuffer", (), {"__module__": "mmengine.logging.history_buffer"})
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["mmengine.logging.history_buffer"].HistoryBuffer = buffer
    torch.save({"state_dict": our_model().state_dict(), "message_hub": buffer()}, tmp_path / "mm.pth")
    torch.save(our_model(), tmp_path / "whole.pth")
    for file, asked in (
        ("mm.pth", "mmengine.logging.history_buffer.HistoryBuffer"),
        ("whole.pth", "convmixer_timm.convmixer.ConvMixer"),
    ):
        assert main(["convert", str(tmp_path / file), str(tmp_path / "out.safetensors")]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"convmixer-timm: error: {tmp_path / file} can't be read as weights: it is a pickle that")
        assert f"asks for {asked}, and code in a file is never run here" in err
        assert err.endswith("torch.save(c.state_dict(), NEW) if c is a whole model\n")
        assert "\x1b" not in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list, no tensors by name"),
        (torch.ones(3), "holds a Tensor, no tensors by name"),
        ({"a": 1}, "found a, "),
        ({1: 2}, "found 1, "),
        ({"state_dict": {}}, "found state_dict, "),
        ({"stem.0.weight": 1, "blocks.0.0.fn.0.weight": 2}, "found stem.0.weight, "),
        ({"stem.0.weight": torch.ones(()), "blocks.0.0.fn.0.weight": torch.ones(1)}, "have another form"),
        ({"3.0.fn.0.weight": torch.ones(1), "x": torch.ones(1)}, "x is no key of the authors' layout"),
    ],
)
def test_what_is_no_checkpoint_is_said(content, message, tmp_path, capsys):
    torch.save(content, tmp_path / "x.pth")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "out.safetensors")]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_folder_in_the_way_stays(source, tmp_path, capsys):
    save_file(source.state_dict(), tmp_path / "in.safetensors")
    (tmp_path / "out.safetensors").mkdir()
    (tmp_path / "out.safetensors/mine").write_text("kept")
    assert main(["convert", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]) == 1
    assert f"{tmp_path}/out.safetensors: is a folder" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors/mine").read_text() == "kept"


def test_what_lies_beside_the_weights_is_left_out(tmp_path):
    """Where timm's own loader has cut the wrapper's prefix off already."""
    model = ConvMixer(32, 2, 3, 2, num_classes=4)
    averaged = torch.optim.swa_utils.AveragedModel(model).state_dict()
    beside = {"total_ops": torch.zeros(1), "module.criterion.weight": torch.ones(4)}
    torch.save({**averaged, **beside}, tmp_path / "swa.pth")
    loaded = timm.create_model(
        "convmixer_256_8",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "swa.pth"), num_classes=4),
        dim=32,
        depth=2,
        kernel_size=3,
    )
    assert torch.equal(loaded.head.weight, model.head.weight)
