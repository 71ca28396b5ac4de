"""The models of the study, registered with timm: `import models`, or ``--device-modules models`` of ``train.py``.

Each differs from `convmixer_timm.ConvMixer` in one point, which its arguments name.
"""

from typing import Any

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import set_fused_attn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer

from convmixer_timm import ConvMixer

# PyTorch's fused attention took twice as long here, on a CPU, and before 2.15 its multiply-adds aren't counted.
set_fused_attn(False)


def _swap(layers: nn.Sequential, i: int, j: int) -> None:
    layers[i], layers[j] = layers[j], layers[i]


class Shuffled(nn.Module):
    """Puts an image's patches into another order, the same for every image.

    Args:
        patch_size: Side of the patches that stay whole.
        grid: Patches in a row of the image, and in a column.
    """

    def __init__(self, patch_size: int, grid: int):
        super().__init__()
        self.patch_size = patch_size
        order = torch.randperm(grid * grid, generator=torch.Generator().manual_seed(0))
        self.register_buffer("order", order)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, C, H, W], to the same."""
        p = self.patch_size
        patches = nn.functional.unfold(x, p, stride=p)[:, :, self.order]
        return nn.functional.fold(patches, x.shape[2:], p, stride=p)


class StudyConvMixer(ConvMixer):
    """ConvMixer with one point changed.

    Args:
        residual: 'spatial' as in the paper, 'both' for channel mixing too, or 'none'.
        norm_first: Norm before the activation instead of after it.
        hidden: Width between two layers of channel mixing, which are an MLP; 0 for the paper's single layer.
    """

    def __init__(self, *args: Any, residual: str = "spatial", norm_first: bool = False, hidden: int = 0, **kwargs: Any):
        super().__init__(*args, pointwise_residual=residual == "both", **kwargs)
        if norm_first:
            _swap(self.stem, 1, 2)
        for block in self.blocks:
            if norm_first:
                _swap(block[0].fn, 1, 2)
                _swap(block, 2, 3)
            if residual == "none":
                block[0] = block[0].fn
            if hidden:
                dim = self.num_features
                block[1] = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.GELU(), nn.Conv2d(hidden, dim, 1))
                block[2] = nn.Identity()


def _shuffling(model_class: type[nn.Module]) -> type[nn.Module]:
    """The class with an argument `shuffled`, which shuffles the images' patches first."""

    class Model(model_class):  # type: ignore[valid-type, misc]
        def __init__(self, *args: Any, shuffled: bool = False, img_size: int = 28, **kwargs: Any):
            if model_class is not StudyConvMixer:
                kwargs["img_size"] = img_size
            super().__init__(*args, **kwargs)
            patch_size = kwargs["patch_size"]
            self.shuffle = Shuffled(patch_size, img_size // patch_size) if shuffled else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.shuffle(x))

    return Model


_CFG = {
    "num_classes": 10,
    "input_size": (3, 28, 28),
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
}
default_cfgs = generate_default_cfgs({f"study_{name}": _CFG for name in ("convmixer", "mixer", "vit")})


@register_model
def study_convmixer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ConvMixer-128/8, kernel 5, patch 4, but for what `kwargs` say."""
    args = {"dim": 128, "depth": 8, "kernel_size": 5, "patch_size": 4, **kwargs}
    return build_model_with_cfg(_shuffling(StudyConvMixer), "study_convmixer", pretrained, **args)


@register_model
def study_mixer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's MLP-Mixer."""
    return build_model_with_cfg(_shuffling(MlpMixer), "study_mixer", pretrained, **{"patch_size": 4, **kwargs})


@register_model
def study_vit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's vision transformer."""
    return build_model_with_cfg(_shuffling(VisionTransformer), "study_vit", pretrained, **{"patch_size": 4, **kwargs})
