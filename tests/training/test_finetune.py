"""A bundled checkpoint taken to other classes, channels and sizes, whole or in part."""

import pytest
import timm
import torch
import yaml
from timm.optim import create_optimizer_v2
from timm.utils import freeze

from convmixer_timm.training.launch import RECIPES

NAME = "convmixer_128_4.e25_cifar10"


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_other_classes_channels_and_sizes(in_chans):
    source = timm.create_model(NAME, pretrained=True)
    model = timm.create_model(NAME, pretrained=True, num_classes=2, in_chans=in_chans)
    kept = {k: v for k, v in model.state_dict().items() if not k.startswith(("head", "stem.0.weight"))}
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in kept.items())
    assert model.head.weight.shape == (2, 128)
    if in_chans == 1:  # a grey image is one whose three channels are the same
        torch.testing.assert_close(model.stem[0].weight, source.stem[0].weight.sum(1, keepdim=True))
    for size in (32, 96, 45):
        assert model(torch.zeros(2, in_chans, size, size)).shape == (2, 2)


def trained_layers(model, **options):
    """What an optimizer of timm's factory changes in one step."""
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    return {name.split(".")[0] for name in changed}


def test_layers_learn_slower_toward_the_stem():
    model = timm.create_model(NAME, pretrained=True, num_classes=2)
    decay = yaml.safe_load((RECIPES / "finetune.yaml").read_text())["layer_decay"]
    groups = create_optimizer_v2(model, "adamw", lr=0.1, layer_decay=decay).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    layers = [model.stem[0], *(block[1] for block in model.blocks), model.head]
    scales = [scale[id(layer.weight)] for layer in layers]
    assert scales == [pytest.approx(decay ** (len(layers) - 1 - i)) for i in range(len(layers))]


def test_frozen_stem_and_head_only():
    def model():
        return timm.create_model(NAME, pretrained=True, num_classes=2)

    assert trained_layers(model()) == {"stem", "blocks", "head"}
    assert trained_layers(model(), layer_decay=0.8, layer_decay_no_opt_scale=0.8**5 + 1e-6) == {"blocks", "head"}
    assert trained_layers(model(), layer_decay=0.1, layer_decay_no_opt_scale=0.5) == {"head"}
    frozen = model()
    freeze(frozen, ["stem", "blocks"])
    assert trained_layers(frozen) == {"head"}
