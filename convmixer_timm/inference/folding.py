"""A ConvMixer for inference, with its norms folded into what follows them.

In evaluation a batch-norm after an activation is an affine map of each channel, which no engine can fold into the
convolution before it. ConvMixer's structure lets most of it go another way. A layer computes, with s and t the scale
and shift of its two norms (1 after the depthwise, 2 after the 1x1 convolution),

    y = x + s1 * act(depthwise(x)) + t1
    x' = s2 * act(W y + b) + t2

Carried in the scale of the first norm, v = x / s1, it is

    u = v + act(depthwise'(v))          depthwise' = depthwise * s1
    v' = s2 / s1' * act(W' u + b') + t2 / s1'      W' = W * s1, b' = b + W t1, s1' of the next layer

so that one affine map a layer remains of two, and the residual is a bare sum.
"""

import copy
from typing import Any

import torch
import torch.nn as nn
from timm.layers import DropPath

from ..convmixer import Block, ConvActNorm, ConvMixer, Residual
from ..kernels.fast import untouched

__all__ = ["fold_norms"]


class _Affine(nn.Module):
    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor):
        super().__init__()
        self.register_buffer("scale", scale.view(1, -1, 1, 1).clone())
        self.register_buffer("shift", shift.view(1, -1, 1, 1).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift


class _Layer(nn.Module):
    def __init__(self, spatial: nn.Module, channels: nn.Module):
        super().__init__()
        self.spatial, self.channels = spatial, channels

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return self.channels(v + self.spatial(v))


class _Folded(nn.Module):
    def __init__(self, stem: nn.Module, layers: list[nn.Module], model: ConvMixer):
        super().__init__()
        self.features = nn.Sequential(stem, *layers)
        self.global_pool, self.head = model.global_pool, model.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.global_pool(self.features(x)))
        return logits


def _scale_and_shift(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _is(layers: Any, kind: Any, *kinds: type[nn.Module] | None) -> bool:
    """Whether a sequence is exactly of a kind, of layers that are exactly of these; None is any activation."""
    if type(layers) is not kind or len(layers) != len(kinds):
        return False
    return all(exact is None or type(layer) is exact for layer, exact in zip(layers, kinds, strict=True))


def _foldable(model: Any) -> bool:
    """Whether a model is a ConvMixer as it was made: a subclass, or what was changed since, may compute anything."""
    conv_act_norm = (nn.Conv2d, None, nn.BatchNorm2d)
    methods = {"forward_features", "forward_head", "_forward_layers"}
    if type(model) is not ConvMixer or methods & vars(model).keys() or not untouched(*model.modules()):
        return False
    if type(model.head_drop) is not nn.Dropout or not _is(model.stem, ConvActNorm, *conv_act_norm):
        return False
    dim = model.num_features
    blocks: Any = model.blocks
    for block in blocks:
        if not _is(block, Block, Residual, *conv_act_norm) or block.residual or block[1].bias is None:
            return False
        if not _is(block[0].fn, ConvActNorm, *conv_act_norm) or type(block[0].drop_path) not in (DropPath, nn.Identity):
            return False
        if block[0].fn[0].weight.shape[:2] != (dim, 1) or block[1].weight.shape != (dim, dim, 1, 1):
            return False
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    # A weight that is no parameter is made anew at each call.
    return all(m._parameters.get("weight") is not None and getattr(m, "track_running_stats", True) for m in layers)


@torch.no_grad()
def fold_norms(model: nn.Module) -> nn.Module | None:
    """A module that computes what `model` computes in evaluation, with fewer passes over memory.

    Args:
        model: Stays as it is.

    Returns:
        The folded module, in evaluation mode; None where it can't be done: for other models and changed ones, for norms
        that are no batch-norms, where something hooks in, and for a residual around the channel mixing.
    """
    if not _foldable(model):
        return None
    source: Any = copy.deepcopy(model).eval()
    scale, shift = _scale_and_shift(source.stem[2])
    firsts = [_scale_and_shift(block[0].fn[2]) for block in source.blocks]
    # A channel that a norm switched off has scale 0. The smallest scale that can be divided by does the same.
    firsts = [(torch.where(s.abs() < 1e-12, torch.full_like(s, 1e-12), s), t) for s, t in firsts]
    stem = nn.Sequential(source.stem[0], source.stem[1], _Affine(scale / firsts[0][0], shift / firsts[0][0]))
    ones = torch.ones_like(scale)
    layers: list[nn.Module] = []
    for i, block in enumerate(source.blocks):
        (s1, t1), (s2, t2) = firsts[i], _scale_and_shift(block[3])
        following = firsts[i + 1][0] if i + 1 < len(firsts) else ones
        depthwise, act = block[0].fn[0], block[0].fn[1]
        depthwise.weight.mul_(s1.view(-1, 1, 1, 1))
        pointwise = block[1]
        pointwise.bias.add_(pointwise.weight.flatten(1) @ t1)
        pointwise.weight.mul_(s1.view(1, -1, 1, 1))
        channels = nn.Sequential(pointwise, block[2], _Affine(s2 / following, t2 / following))
        layers.append(_Layer(nn.Sequential(depthwise, act), channels))
    return _Folded(stem, layers, source).eval().requires_grad_(False)
