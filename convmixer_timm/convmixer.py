"""ConvMixer: patch embeddings, then depthwise convolutions to mix space and 1x1 convolutions to mix channels.

Paper: `Patches Are All You Need?` - https://arxiv.org/abs/2201.09792

Module names, and so `state_dict` keys, are those of timm's own ConvMixer: each one's weights load in the other.
Importing this module registers the variants with timm, three of them in place of timm's.
"""

import json
import warnings
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SelectAdaptivePool2d, drop_path, get_act_layer, get_norm_layer
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices

from .checkpoints import checkpoint_filter_fn
from .kernels import fast

__all__ = ["ConvMixer"]


class ConvActNorm(fast.ConvActNorm, nn.Sequential):
    """Convolution, activation, norm, in this order."""


class Residual(fast.Residual, nn.Module):
    """``fn(x) + x``, with stochastic depth over `fn`."""

    def __init__(self, fn: nn.Module, drop_path: float = 0.0):
        super().__init__()
        self.fn = fn
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch: torch.Tensor = self.drop_path(self.fn(x))
        return branch + x


class Block(fast.Block, nn.Sequential):
    """One ConvMixer layer: spatial mixing with its residual, then channel mixing (1x1 convolution, activation, norm).

    Args:
        layers: These four, in this order.
        drop_path: Stochastic depth rate of the channel mixing's residual.
        residual: Put a residual around the channel mixing too, which the paper's model doesn't have.
    """

    def __init__(self, *layers: nn.Module, drop_path: float = 0.0, residual: bool = False):
        super().__init__(*layers)
        self.residual = residual
        self.drop_rate = drop_path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = x
        for i, layer in enumerate(self):
            x = layer(x)
            if i == 0 and self.residual:  # else its memory is free for the next
                mixed = x
        return drop_path(x, self.drop_rate, self.training) + mixed if self.residual else x


class GlobalPool(fast.GlobalPool, SelectAdaptivePool2d):
    """timm's pooling over all positions."""


class LinearMap(nn.Linear):
    """A linear classifier at each position: [N, C, H, W] to [N, classes, H, W]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight, self.bias).permute(0, 3, 1, 2)


class ConvMixer(nn.Module):
    """ConvMixer, from `Patches Are All You Need?` (https://arxiv.org/abs/2201.09792).

    Takes images [N, in_chans, H, W] of any size from one patch up; gives logits [N, num_classes].

    Args:
        dim: Channels of every layer (the paper's h).
        depth: Number of layers (d).
        kernel_size: Side of the depthwise kernels (k).
        patch_size: Side and stride of the patch embedding (p).
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: timm's pooling name: 'avg', 'max', 'avgmax', 'catavgmax', 'fast…', or '' for none; without
            pooling the classifier applies at each position and gives [N, num_classes, H / p, W / p].
        drop_rate: Dropout before the classifier.
        act_layer: Activation, a class or timm's name for it.
        drop_path_rate: Stochastic depth over the residual branches, rising linearly from 0 in the first layer.
        norm_layer: Norm after each activation, a class or timm's name for it.
        pointwise_residual: Put a residual around the channel mixing as well. The parameters stay the same.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        ValueError: If `dim`, `depth`, `kernel_size` or `patch_size` is below 1.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        act_layer: str | Callable[..., nn.Module] = nn.GELU,
        drop_path_rate: float = 0.0,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        pointwise_residual: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        sizes = {"dim": dim, "depth": depth, "kernel_size": kernel_size, "patch_size": patch_size}
        for name, value in sizes.items():
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}.")
        # Left out where not asked for: not every norm takes them.
        dd: dict[str, Any] = {k: v for k, v in {"device": device, "dtype": dtype}.items() if v is not None}
        act: Callable[..., nn.Module] = get_act_layer(act_layer)
        norm: Callable[..., nn.Module] = get_norm_layer(norm_layer)

        self.in_chans = in_chans
        self.num_features = dim
        self.grad_checkpointing = False

        self.stem = ConvActNorm(
            nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size, **dd),
            act(),
            norm(dim, **dd),
        )
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]  # timm's function fails on fake tensors
        self.blocks = nn.Sequential(
            *[
                Block(
                    Residual(
                        ConvActNorm(
                            nn.Conv2d(dim, dim, kernel_size, groups=dim, padding="same", **dd), act(), norm(dim, **dd)
                        ),
                        drop_path=rate,
                    ),
                    nn.Conv2d(dim, dim, kernel_size=1, **dd),
                    act(),
                    norm(dim, **dd),
                    drop_path=rate,
                    residual=pointwise_residual,
                )
                for rate in rates
            ]
        )
        self.feature_info = [dict(num_chs=dim, reduction=patch_size, module=f"blocks.{i}") for i in range(depth)]
        # In timm's order, for who takes the model apart by its children.
        self.global_pool = GlobalPool(pool_type=global_pool, flatten=bool(global_pool))
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, None, **dd)

    def _set_head(self, num_classes: int, global_pool: str | None, device: Any = None, dtype: Any = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = GlobalPool(pool_type=global_pool, flatten=bool(global_pool))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        linear = nn.Linear if self.global_pool.pool_type else LinearMap
        self.head = (
            linear(self.head_hidden_size, num_classes, device=device, dtype=dtype) if num_classes > 0 else nn.Identity()
        )

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must spare beyond timm's rule for biases and norms: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates: the stem, then one group a layer."""
        return dict(stem=r"^stem", blocks=r"^blocks\.(\d+)")

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers' activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier: a Linear, or an Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, on the same device, in the same dtype and mode. Its classes have no names yet.

        Args:
            num_classes: Classes; 0 for no classifier.
            global_pool: New pooling; None keeps the present one.
        """
        weight = next(self.parameters())
        self._set_head(num_classes, global_pool, device=weight.device, dtype=weight.dtype)
        self.global_pool.train(self.training)
        self.head.train(self.training)
        _forget_classes(self)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features of chosen layers.

        Args:
            x: Images, [N, in_chans, H, W].
            indices: The last n layers if an int, these layers if a list (negative from the end), all if None.
            norm: For timm's interface; there is no final norm.
            stop_early: Run no layer after the last one asked for.
            output_fmt: 'NCHW' only.
            intermediates_only: Leave out the final features.

        Returns:
            The final features and the list of intermediate ones, each [N, dim, H / p, W / p]; or the list alone.
        """
        assert output_fmt in ("NCHW",), "output_fmt must be NCHW."
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        images = x
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            fast.settle(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript can't slice the layers
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x)
            else:
                x = block(x)
            if i in take_indices:
                features = fast.as_given(x, images)
                intermediates.append(features)
                if torch.is_grad_enabled():  # so that one has gradients by the next
                    x = features
        if intermediates_only:
            return intermediates
        return fast.as_given(x, images), intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the layers that the given intermediate features don't need.

        Args:
            indices: As for `forward_intermediates`.
            prune_norm: For timm's interface; there is no final norm.
            prune_head: Drop pooling and classifier too.

        Returns:
            The indices as positive numbers.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def _forward_layers(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            fast.settle(x)
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_chans, H, W] to features [N, dim, H / p, W / p]."""
        return fast.as_given(self._forward_layers(x), x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features [N, dim, H / p, W / p] to logits, or with `pre_logits` to what the classifier would get."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_chans, H, W] to logits [N, num_classes]."""
        if torch.jit.is_scripting():
            features = self.forward_features(x)
        elif type(self).forward_features is ConvMixer.forward_features and "forward_features" not in self.__dict__:
            features = self._forward_layers(x)  # its last features needn't be turned
        else:
            features = self.forward_features(x)
        return fast.as_given(self.forward_head(features), x)  # without pooling, feature maps


def _forget_classes(model: nn.Module) -> None:
    """Takes from a model's description what its registered weights' classes are called, ImageNet's by their tag."""
    cfg: Any = getattr(model, "pretrained_cfg", {})
    for name in ("label_names", "tag"):
        cfg.pop(name, None)


def _create_convmixer(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> ConvMixer:
    kwargs = {**model_args, **kwargs}  # the caller's word wins over the variant's
    out_indices = kwargs.pop("out_indices", 3)
    told = isinstance(kwargs.get("pretrained_cfg"), (dict, PretrainedCfg)) or kwargs.get("pretrained_cfg_overlay")
    model: ConvMixer = build_model_with_cfg(
        ConvMixer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls="getter"),
        **kwargs,
    )
    if not (pretrained or told):  # the classes that it will learn are not those of the registered weights
        _forget_classes(model)
    return model


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.96,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head",
        "license": "mit",
        "origin_url": "https://github.com/locuslab/convmixer",
        "paper_name": "Patches Are All You Need?",
        "paper_ids": "arXiv:2201.09792",
        **kwargs,
    }


# Inside the package where it was installed from a wheel, beside it in a checkout or an editable install.
WEIGHTS_DIR = Path(__file__).parent / "weights"
if not WEIGHTS_DIR.is_dir():
    WEIGHTS_DIR = Path(__file__).parent.parent / "weights"

CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _cifar10_cfg(**kwargs: Any) -> dict[str, Any]:
    return _cfg(
        **{
            "num_classes": 10,
            "input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2471, 0.2435, 0.2616),
            "label_names": CIFAR10_LABELS,
            **kwargs,
        }
    )


def _bundled(name: str) -> dict[str, Any]:
    """The weights' file of a bundled checkpoint, and its classes' names, which stand beside it."""
    config = json.loads((WEIGHTS_DIR / name / "config.json").read_text(encoding="utf-8"))
    return {"file": str(WEIGHTS_DIR / name / "model.safetensors"), "label_names": tuple(config["label_names"])}


default_cfgs = generate_default_cfgs(
    {
        "convmixer_1536_20.in1k": _cfg(hf_hub_id="timm/"),
        "convmixer_768_32.in1k": _cfg(hf_hub_id="timm/"),
        "convmixer_1024_20_ks9_p14.in1k": _cfg(hf_hub_id="timm/"),
        "convmixer_256_8.e100_cifar10": _cifar10_cfg(**_bundled("convmixer_256_8.e100_cifar10")),
        "convmixer_256_8.e25_cifar10": _cifar10_cfg(**_bundled("convmixer_256_8.e25_cifar10")),
        # These two classify the middle 28 of the 32 pixels.
        "convmixer_256_8.e45_cifar100": _cifar10_cfg(
            num_classes=100, input_size=(3, 28, 28), crop_pct=0.875, **_bundled("convmixer_256_8.e45_cifar100")
        ),
        "convmixer_256_8.e45_dist_cifar100": _cifar10_cfg(
            num_classes=100, input_size=(3, 28, 28), crop_pct=0.875, **_bundled("convmixer_256_8.e45_dist_cifar100")
        ),
        "convmixer_256_8_ks7_p2": _cifar10_cfg(),
        "convmixer_256_8_ks7_p4.e10_tiny_imagenet": _cfg(
            num_classes=200,
            input_size=(3, 56, 56),
            crop_pct=1.0,
            **_bundled("convmixer_256_8_ks7_p4.e10_tiny_imagenet"),
        ),
        "convmixer_256_8_ks9_p1.e172_cifar10": _cifar10_cfg(**_bundled("convmixer_256_8_ks9_p1.e172_cifar10")),
        "convmixer_256_16_ks9_p1": _cifar10_cfg(),
        "convmixer_128_8.e25_cifar10": _cifar10_cfg(**_bundled("convmixer_128_8.e25_cifar10")),
        "convmixer_128_4.e25_cifar10": _cifar10_cfg(**_bundled("convmixer_128_4.e25_cifar10")),
    }
)


def _register(fn: Callable[..., ConvMixer]) -> Callable[..., ConvMixer]:
    """timm's `register_model`, without its warning where a variant replaces timm's own: that is intended here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Overwriting convmixer_", category=UserWarning)
        return register_model(fn)


@_register
def convmixer_1536_20(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-1536/20, kernel 9, patch 7."""
    model_args = dict(dim=1536, depth=20, kernel_size=9, patch_size=7)
    return _create_convmixer("convmixer_1536_20", pretrained, model_args, kwargs)


@_register
def convmixer_768_32(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-768/32, kernel 7, patch 7, with ReLU."""
    model_args = dict(dim=768, depth=32, kernel_size=7, patch_size=7, act_layer=nn.ReLU)
    return _create_convmixer("convmixer_768_32", pretrained, model_args, kwargs)


@_register
def convmixer_1024_20_ks9_p14(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-1024/20, kernel 9, patch 14."""
    model_args = dict(dim=1024, depth=20, kernel_size=9, patch_size=14)
    return _create_convmixer("convmixer_1024_20_ks9_p14", pretrained, model_args, kwargs)


@_register
def convmixer_256_8(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/8, kernel 5, patch 2, for CIFAR-10."""
    model_args = dict(dim=256, depth=8, kernel_size=5, patch_size=2)
    return _create_convmixer("convmixer_256_8", pretrained, model_args, kwargs)


@_register
def convmixer_256_8_ks7_p2(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/8, kernel 7, patch 2, for CIFAR-10."""
    model_args = dict(dim=256, depth=8, kernel_size=7, patch_size=2)
    return _create_convmixer("convmixer_256_8_ks7_p2", pretrained, model_args, kwargs)


@_register
def convmixer_256_8_ks7_p4(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/8, kernel 7, patch 4, for the 64 pixels of Tiny-ImageNet."""
    model_args = dict(dim=256, depth=8, kernel_size=7, patch_size=4)
    return _create_convmixer("convmixer_256_8_ks7_p4", pretrained, model_args, kwargs)


@_register
def convmixer_256_8_ks9_p1(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/8, kernel 9, patch 1, for CIFAR-10."""
    model_args = dict(dim=256, depth=8, kernel_size=9, patch_size=1)
    return _create_convmixer("convmixer_256_8_ks9_p1", pretrained, model_args, kwargs)


@_register
def convmixer_256_16_ks9_p1(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-256/16, kernel 9, patch 1, for CIFAR-10."""
    model_args = dict(dim=256, depth=16, kernel_size=9, patch_size=1)
    return _create_convmixer("convmixer_256_16_ks9_p1", pretrained, model_args, kwargs)


@_register
def convmixer_128_8(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-128/8, kernel 5, patch 2, for CIFAR-10."""
    model_args = dict(dim=128, depth=8, kernel_size=5, patch_size=2)
    return _create_convmixer("convmixer_128_8", pretrained, model_args, kwargs)


@_register
def convmixer_128_4(pretrained: bool = False, **kwargs: Any) -> ConvMixer:
    """ConvMixer-128/4, kernel 5, patch 2, for CIFAR-10."""
    model_args = dict(dim=128, depth=4, kernel_size=5, patch_size=2)
    return _create_convmixer("convmixer_128_4", pretrained, model_args, kwargs)
