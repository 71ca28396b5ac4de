"""The registry: names, pretrained configs, and what importing the package does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch.nn as nn

from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.variants import variants

# name: dim, depth, kernel, patch, activation, input, classes
TABLE = {
    "convmixer_768_32": (768, 32, 7, 7, nn.ReLU, 224, 1000),
    "convmixer_1536_20": (1536, 20, 9, 7, nn.GELU, 224, 1000),
    "convmixer_1024_20_ks9_p14": (1024, 20, 9, 14, nn.GELU, 224, 1000),
    "convmixer_256_8": (256, 8, 5, 2, nn.GELU, 32, 10),
    "convmixer_256_8_ks7_p2": (256, 8, 7, 2, nn.GELU, 32, 10),
    "convmixer_256_8_ks7_p4": (256, 8, 7, 4, nn.GELU, 56, 200),
    "convmixer_256_8_ks9_p1": (256, 8, 9, 1, nn.GELU, 32, 10),
    "convmixer_256_16_ks9_p1": (256, 16, 9, 1, nn.GELU, 32, 10),
    "convmixer_128_8": (128, 8, 5, 2, nn.GELU, 32, 10),
    "convmixer_128_4": (128, 4, 5, 2, nn.GELU, 32, 10),
}
IN1K = ["convmixer_768_32", "convmixer_1024_20_ks9_p14", "convmixer_1536_20"]


@pytest.mark.parametrize("name", TABLE)
def test_variant(name):
    dim, depth, kernel, patch, act, size, classes = TABLE[name]
    model = timm.create_model(name, device="meta")
    depthwise = model.blocks[0][0].fn[0]
    assert (model.num_features, len(model.blocks)) == (dim, depth)
    assert depthwise.kernel_size == (kernel, kernel)
    assert model.stem[0].kernel_size == model.stem[0].stride == (patch, patch)
    assert {type(m) for m in model.modules() if isinstance(m, (nn.GELU, nn.ReLU))} == {act}
    assert model.num_classes == classes
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, size, size)


def test_names():
    assert sorted(timm.list_models("convmixer*")) == sorted(TABLE)
    assert sorted(timm.list_models(module="convmixer")) == sorted(TABLE)
    pretrained = timm.list_pretrained("convmixer*")
    assert len(pretrained) == len(set(pretrained))
    bundled = [p.parent.name for p in WEIGHTS_DIR.glob("*/model.safetensors")]
    assert sorted(pretrained) == sorted([f"{name}.in1k" for name in IN1K] + bundled)
    assert bundled


def test_a_callers_keyword_wins():
    model = timm.create_model("convmixer_256_8", depth=4, kernel_size=3, act_layer="relu", num_classes=3)
    assert len(model.blocks) == 4
    assert model.blocks[0][0].fn[0].kernel_size == (3, 3)
    assert model.head.out_features == 3


@pytest.mark.parametrize("name", IN1K)
def test_in1k_config(name):
    cfg = timm.get_pretrained_cfg(f"{name}.in1k")
    assert cfg.hf_hub_id == f"timm/{name}.in1k"
    assert (cfg.license, cfg.paper_name, cfg.paper_ids) == ("mit", "Patches Are All You Need?", "arXiv:2201.09792")
    assert cfg.origin_url == "https://github.com/locuslab/convmixer"
    assert (cfg.mean, cfg.std) == (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
    assert (cfg.crop_pct, cfg.first_conv, cfg.classifier) == (0.96, "stem.0", "head")


@pytest.mark.parametrize("name", sorted(set(TABLE) - set(IN1K) - {"convmixer_256_8_ks7_p4"}))
def test_cifar10_config(name):
    cfg = timm.get_pretrained_cfg(name)
    assert (cfg.mean, cfg.std) == ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
    assert (cfg.num_classes, len(cfg.label_names)) == (10, 10)
    assert cfg.crop_pct == cfg.input_size[-1] / 32  # nothing is resized: the middle of the 32 pixels, or all
    assert (cfg.license, cfg.paper_ids) == ("mit", "arXiv:2201.09792")
    assert bool(cfg.has_weights) == bool(timm.list_pretrained(f"{name}.*"))


@pytest.mark.parametrize(
    "folder", sorted(p.parent for p in WEIGHTS_DIR.glob("*/model.safetensors")), ids=lambda p: p.name
)
def test_bundled_weights_agree_with_their_folder(folder):
    config = json.loads((folder / "config.json").read_text())
    cfg = timm.get_pretrained_cfg(folder.name)
    assert Path(cfg.file) == folder / "model.safetensors"
    assert f"{config['architecture']}.{config['pretrained_cfg']['tag']}" == folder.name
    for key in ("mean", "std", "label_names", "input_size"):
        assert list(config["pretrained_cfg"].get(key) or config.get(key)) == list(getattr(cfg, key))
    assert config["pretrained_cfg"]["crop_pct"] == cfg.crop_pct
    ours = timm.create_model(folder.name, pretrained=True)
    local = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for a, b in zip(ours.parameters(), local.parameters(), strict=True):
        assert a.equal(b)


def test_costs():
    by_name = {v.name: v for v in variants()}
    assert by_name["convmixer_768_32"].params == 21_110_248
    # by hand: stem, then a layer's depthwise and pointwise products at each of 16 x 16 positions, then the head
    assert by_name["convmixer_256_8"].macs == 256 * (3 * 4 * 256 + 8 * (256 * 25 + 256 * 256)) + 2560


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_is_silent():
    timms_own = run_python("import torch, timm")  # older ones warn on newer torch
    result = run_python("import torch, timm, warnings; warnings.simplefilter('error'); import convmixer_timm")
    assert (result.stdout, result.stderr) == (timms_own.stdout, timms_own.stderr)


def test_import_is_cheap():
    """Beside timm's own, on any machine: in seconds of the processor, whoever else uses it."""
    code = "from time import process_time as t; a = t(); "
    code += "import timm; b = t(); import convmixer_timm; print((t() - b) / (b - a))"
    assert min(float(run_python(code).stdout) for _ in range(2)) < 0.025
