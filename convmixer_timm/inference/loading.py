"""A pretrained model by its name."""

import contextlib
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.data import create_transform, resolve_model_data_config
from timm.models._hub import load_model_config_from_path

from ..checkpoints import check_sizes, checkpoint_filter_fn, read_checkpoint
from ..convmixer import ConvMixer
from ..errors import closest, one_line
from .download import download

__all__ = [
    "check_finite",
    "check_model",
    "check_module",
    "check_preprocessing",
    "evaluating",
    "load_folder",
    "load_pretrained",
    "split_name",
    "uncompiled",
    "usable_device",
]


_modes = threading.Lock()
# Models that are being evaluated: how many times at once, and which of their layers were in training before.
_evaluated: dict[nn.Module, tuple[int, list[nn.Module]]] = {}
_SOURCES = ("", "hf-hub", "local-dir")


def usable_device(name: str | torch.device | None = None) -> torch.device:
    """The device of that name; by default the GPU where there is one, else the CPU.

    Raises:
        ValueError: If it can't be used here; the message is one line.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).split(". ")[0].rstrip(".")
        there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        usable = "cpu" if there is None else f"cpu and {there.type}"
        raise ValueError(f"device {str(name)!r}: {reason}; this machine has {usable}") from error
    return device


def check_module(model: Any) -> None:
    """Raises ValueError for what is no model: its name, say."""
    if not isinstance(model, nn.Module):
        got = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise ValueError(f"the model must be one of PyTorch, from load_model or timm.create_model, got {got}")


def check_model(model: Any) -> None:
    """Raises ValueError for what is no classifier of timm's: a wrapper around one, say."""
    check_module(model)
    if missing := [name for name in ("pretrained_cfg", "num_classes") if getattr(model, name, None) is None]:
        raise ValueError(
            f"{type(model).__name__} is no classifier of timm's, it has no {missing[0]}: give the model inside it, as "
            "load_model or timm.create_model makes it"
        )


def check_finite(outputs: torch.Tensor) -> None:
    """Raises ValueError where a model gives something else than numbers: one whose training diverged, say."""
    if not outputs.isfinite().all():
        raise ValueError(
            "the model's outputs are no finite numbers: its weights are damaged, or too large for its type"
        )


def uncompiled(model: Any) -> Any:
    """The model that `torch.compile` wrapped, or the model itself: other engines can't trace what is compiled."""
    return getattr(model, "_orig_mod", model)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Has a model in evaluation mode for a while; each of its layers gets its own mode back.

    Of several threads that evaluate it at once the last one gives it back.
    """
    with _modes:
        users, training = _evaluated.get(model) or (0, [module for module in model.modules() if module.training])
        _evaluated[model] = users + 1, training
        model.eval()
    try:
        yield
    finally:
        with _modes:
            users, training = _evaluated.pop(model)
            if users > 1:
                _evaluated[model] = users - 1, training
            else:
                for module in training:
                    module.training = True


def split_name(name: str) -> tuple[str, str]:
    """A model's name as where it comes from ('hf-hub', 'local-dir', …; nothing for a registered one), and the rest."""
    scheme, colon, location = name.partition(":")
    if scheme in ("hf-hub", "hf_hub"):  # timm takes both, and an address's slashes
        return "hf-hub", location.removeprefix("//")
    return (scheme, location) if colon else ("", name)


def load_pretrained(name: str, device: str | torch.device = "cpu") -> nn.Module:
    """A pretrained model, ready to predict.

    Args:
        name: A registered model with weights ('convmixer_…'), ``hf-hub:OWNER/NAME``, or ``local-dir:FOLDER`` of a
            packed one.
        device: Where to run it.

    Raises:
        ValueError: If the name is unknown or has no weights, its weights don't fit its description, or the device
            can't be used here.
        OSError: If the weights can't be downloaded.
    """
    device = usable_device(device)
    if not isinstance(name, str):
        raise ValueError(f"a model is named by a text, got a {type(name).__name__}: for a folder, 'local-dir:FOLDER'")
    scheme, location = split_name(name)
    if scheme not in _SOURCES:
        raise ValueError(f"{name!r}: no source {scheme!r}; a model is NAME, hf-hub:OWNER/NAME or local-dir:FOLDER")
    if not scheme and not timm.models.is_model_pretrained(name):
        arch = name.split(".")[0]
        known = (timm.is_model(arch) and timm.list_pretrained(f"{arch}*")) or timm.list_pretrained("convmixer*")
        file = Path(name).expanduser()
        if name and file.is_dir():
            raise ValueError(f"{name!r} is a folder: a packed one, and a training's, is loaded by 'local-dir:{name}'")
        if file.is_file():
            raise ValueError(f"{name!r} is a file: its folder, packed or a training's, is loaded by 'local-dir:FOLDER'")
        there = f"With weights there are: {', '.join(known)}."
        if timm.is_model(arch) and "." not in name:
            raise ValueError(f"{name!r} has no weights. {there}")
        guess = closest(name, known)
        raise ValueError(f"{name!r} is not a known model{f': did you mean {guess}?' if guess else f'. {there}'}")
    cfg, source = None if scheme else timm.get_pretrained_cfg(name), {}
    if scheme == "local-dir":
        return load_folder(Path(location).expanduser()).eval().to(device)
    if scheme == "hf-hub":
        weights = download(location)
        check_description(weights.with_name("config.json"), read_checkpoint(weights))
        # That file, whatever else a stranger's description names: a pickle, say, which older timm runs.
        source = dict(source="", file=str(weights), state_dict=None, custom_load=False)
    elif cfg and cfg.hf_hub_id and not cfg.file:
        download(str(cfg.hf_hub_id), config=False)
    try:
        model: Any = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source or None)
    except OSError:
        raise
    except Exception as error:  # PyTorch's, for tensors of other names or sizes, and the architecture's own
        raise ValueError(f"{name}: its weights don't fit its description: {error or type(error).__name__}") from error
    if source:
        model.pretrained_cfg.update(source="hf-hub", file=None)
    check_preprocessing(model, name)
    ready: nn.Module = model.eval().to(device)
    return ready


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
    state_dict = read_checkpoint(folder / "model.safetensors")
    check_description(folder / "config.json", state_dict)
    try:
        # Not by local-dir: older timm takes that for an address, in which a name ends at '#' or '?'.
        cfg, architecture, args = load_model_config_from_path(folder)
        model: nn.Module = timm.create_model(architecture, pretrained_cfg=cfg, **(args or {}))
    except Exception as error:  # timm and the architecture's code each have their own
        raise ValueError(f"{folder}/config.json doesn't describe a model: {error or type(error).__name__}") from error
    if isinstance(model, ConvMixer):
        state_dict = checkpoint_filter_fn(state_dict, model)
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:  # PyTorch's, for tensors of other names or sizes
        raise ValueError(f"{folder}: model.safetensors doesn't fit config.json: {error}") from error
    check_preprocessing(model, f"{folder}/config.json")
    return model


def check_description(config: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Raises ValueError if ``config.json`` is none, or describes another size of ConvMixer than these weights have.

    Before a model is made by it: a damaged number may ask for more memory than there is.
    """
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        architecture, args = content["architecture"], content.get("model_args") or {}
        classes = content.get("num_classes", 0)
        known = timm.is_model(architecture)
        names = (content.get("pretrained_cfg") or {}).get("label_names") or content.get("label_names")
        sizes = {**args, "num_classes": args.get("num_classes", classes)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{config} doesn't describe a model to timm: it has no sound architecture") from error
    if told := [name for name in args if name.startswith("pretrained")]:  # how to load weights is nothing of a model
        raise ValueError(f"{config} has the model argument {told[0]}, which is no size or choice of a model")
    if not known:
        raise ValueError(f"{config} is of {architecture!r}, which is no architecture that timm or this package knows")
    if not architecture.startswith("convmixer"):
        return
    if classes and isinstance(names, list) and len(names) != classes:
        raise ValueError(
            f"{config} has {len(names)} label_names for {classes} classes: write theirs there (transformers keeps the "
            "old ones unless model.config.label_names is set too)"
        )
    check_sizes(sizes, state_dict, config)


def check_preprocessing(model: nn.Module, source: str) -> None:
    """Raises ValueError if `source` says of a model's images what no transform can be made from."""
    try:
        config = resolve_model_data_config(model)
        channels, height, width = config["input_size"]
        sound = (
            all(isinstance(n, int) and 0 < n <= 4096 for n in (channels, height, width))
            and 0.05 <= config["crop_pct"] <= 10
            and all(len(config[key]) == channels and all(map(math.isfinite, config[key])) for key in ("mean", "std"))
            and 0 not in config["std"]
        )
        create_transform(**config, is_training=False)
    except Exception as error:  # timm's, for values of other types
        raise ValueError(f"{source}: no preprocessing of images can be made from what it says: {error}") from error
    if not sound:
        said = ", ".join(f"{key} {config[key]}" for key in ("input_size", "crop_pct", "mean", "std"))
        raise ValueError(f"{source}: no preprocessing of images can be made from {said}")
