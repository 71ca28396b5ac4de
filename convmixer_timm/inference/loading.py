"""A pretrained model by its name, and what its classes are called."""

from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

from ..checkpoints import checkpoint_filter_fn, read_checkpoint
from ..convmixer import ConvMixer
from .download import download

__all__ = ["class_names", "load_folder", "load_model", "usable_device"]


def usable_device(name: str | None = None) -> torch.device:
    """The device of that name; by default the GPU where there is one, else the CPU.

    Raises:
        ValueError: If it can't be used here; the message is one line.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def load_model(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """A pretrained model, ready to predict.

    Args:
        name: A registered model with weights ('convmixer_…'), ``hf-hub:OWNER/NAME`` or ``local-dir:FOLDER``.
        device: Where to run it.

    Raises:
        ValueError: If the name is unknown or has no weights, or its weights don't fit its description.
        OSError: If the weights can't be downloaded.
    """
    scheme, _, location = name.rpartition(":")
    if not scheme and name not in timm.list_models(pretrained=True) and not timm.models.is_model_pretrained(name):
        arch = name.split(".")[0]
        known = timm.list_pretrained(f"{arch}*" if timm.is_model(arch) else "convmixer*")
        problem = "has no weights" if timm.is_model(arch) and "." not in name else "is not a known model"
        raise ValueError(f"{name!r} {problem}. With weights there are: {', '.join(known) or 'none'}.")
    cfg = None if scheme else timm.get_pretrained_cfg(name)
    if scheme == "local-dir":
        return load_folder(Path(location).expanduser()).eval().to(device)
    if scheme in ("hf-hub", "hf_hub"):
        download(location)
    elif cfg and cfg.hf_hub_id and not cfg.file:
        download(str(cfg.hf_hub_id), config=False)
    try:
        return timm.create_model(name, pretrained=True).eval().to(device)
    except RuntimeError as error:  # PyTorch's, for tensors of other names or sizes
        raise ValueError(f"{name}: its weights don't fit its description: {error}") from error


def load_folder(folder: Path) -> nn.Module:
    """The model of a packed folder, from ``model.safetensors`` alone.

    Older timm's ``local-dir:`` unpickles whatever it finds there.

    Raises:
        FileNotFoundError: If the folder has no ``config.json`` or no ``model.safetensors``.
        ValueError: If the weights can't be read or don't fit the configuration.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}")
    try:
        model = timm.create_model(f"local-dir:{folder}")
    except (
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ValueError,
    ) as error:  # timm's own, for each slip another
        raise ValueError(f"{folder}: config.json doesn't describe a model to timm: {error}") from error
    state_dict = read_checkpoint(folder / "model.safetensors")
    if isinstance(model, ConvMixer):
        state_dict = checkpoint_filter_fn(state_dict, model)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:  # PyTorch's, for tensors of other names or sizes
        raise ValueError(f"{folder}: model.safetensors doesn't fit config.json: {error}") from error
    return model


def class_names(model: Any) -> list[str]:
    """The model's classes: from its pretrained config, else ImageNet's of weights whose tag says so, else numbers."""
    names = model.pretrained_cfg.get("label_names")
    if names and len(names) == model.num_classes:
        return list(names)
    subset = timm.data.infer_imagenet_subset(model)
    # A thousand classes alone may be anybody's.
    trained_on = str(model.pretrained_cfg.get("tag") or "").rpartition("_")[2]
    if subset and trained_on in ("in1k", "in12k", "in21k", "in22k"):
        info = timm.data.ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]
