"""Where a classifier sees its classes: with global average pooling and a linear head, without any gradient."""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..images import data_config
from .loading import evaluating

__all__ = ["ClassMap", "has_class_map"]


class ClassMap(nn.Module):
    """A model whose outputs are its logits [N, classes] and their class maps [N, classes, H / p, W / p].

    The maps are what the classifier says of the features at each position. Their mean over the positions is the logits
    (class activation maps, arXiv 1512.04150).
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.model.forward_features(images)
        head = self.model.get_classifier()
        maps = F.conv2d(features, head.weight[:, :, None, None], head.bias)
        return self.model.forward_head(features), maps


@torch.inference_mode()
def has_class_map(model: Any) -> bool:
    """Whether a model's logits are the mean of its class maps: not with another pooling, nor a norm before the head."""
    if not isinstance(model.get_classifier(), nn.Linear):
        return False
    images = torch.randn(2, *data_config(model)["input_size"], generator=torch.Generator().manual_seed(0), device="cpu")
    try:
        with evaluating(model):
            logits, maps = ClassMap(model)(images)
    except (RuntimeError, TypeError):  # features or pooled ones of another shape
        return False
    if logits.shape != maps.shape[:2]:
        return False
    return bool((maps.mean((2, 3)) - logits).abs().max() <= 1e-3 * logits.abs().max())
