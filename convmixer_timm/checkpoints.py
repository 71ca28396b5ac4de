"""Weights of ConvMixers saved by other implementations, read into timm's layout.

| layout     | recognised by              | saved by                                                      |
|------------|----------------------------|---------------------------------------------------------------|
| timm       | ``stem.0.weight``          | timm, this package, the authors' fork of timm                 |
| authors    | ``3.0.fn.0.weight``        | the flat `nn.Sequential` of locuslab/convmixer(-cifar10)      |
| labml      | ``patch_emb.conv.weight``  | labml's annotated implementation                              |
| mmpretrain | ``backbone.stem.0.weight`` | OpenMMLab's mmpretrain                                        |

All of them are the same network, so this is a renaming. The activation leaves no trace in the keys: whether a
checkpoint wants ReLU or GELU its source has to tell.
"""

import argparse
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
from timm.models import clean_state_dict

from .files import atomic_path

__all__ = ["Shape", "checkpoint_filter_fn", "convert", "read_checkpoint", "to_timm_layout"]

_MARKERS = {
    "timm": "stem.0.weight",
    "authors": "3.0.fn.0.weight",
    "labml": "patch_emb.conv.weight",
    "mmpretrain": "backbone.stem.0.weight",
}
_LABML = (
    ("patch_emb.conv.", "stem.0."),
    ("patch_emb.norm.", "stem.2."),
    ("depth_wise_conv.", "0.fn.0."),
    ("norm1.", "0.fn.2."),
    ("point_wise_conv.", "1."),
    ("norm2.", "3."),
    ("conv_mixer_layers.", "blocks."),
    ("classification.linear.", "head."),
)
_MMPRETRAIN = (("backbone.stem.", "stem."), ("backbone.stages.", "blocks."), ("head.fc.", "head."))
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")

StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """What a checkpoint in timm's layout tells of its model."""

    dim: int
    depth: int
    kernel_size: int
    patch_size: int
    in_chans: int
    num_classes: int

    @classmethod
    def of(cls, state_dict: StateDict) -> "Shape":
        """Reads the sizes off the tensors of a `state_dict` in timm's layout."""
        stem = state_dict["stem.0.weight"]
        head = state_dict.get("head.weight")
        return cls(
            dim=stem.shape[0],
            depth=1 + max(int(m[1]) for k in state_dict if (m := re.match(r"blocks\.(\d+)\.", k))),
            kernel_size=state_dict["blocks.0.0.fn.0.weight"].shape[-1],
            patch_size=stem.shape[-1],
            in_chans=stem.shape[1],
            num_classes=0 if head is None else head.shape[0],
        )

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


def _renamed(state_dict: StateDict, names: tuple[tuple[str, str], ...]) -> StateDict:
    out = {}
    for key, value in state_dict.items():
        for old, new in names:
            key = key.replace(old, new)
        out[key] = value
    return out


def _from_authors(state_dict: StateDict) -> StateDict:
    # stem at 0 and 2, layers from 3 on, then pooling and flattening without parameters, then the classifier
    head = max(int(key.split(".")[0]) for key in state_dict)
    out = {}
    for key, value in state_dict.items():
        index, rest = key.split(".", 1)
        if int(index) < 3:
            out[f"stem.{key}"] = value
        elif int(index) == head:
            out[f"head.{rest}"] = value
        else:
            out[f"blocks.{int(index) - 3}.{rest}"] = value
    return out


def to_timm_layout(state_dict: StateDict) -> tuple[StateDict, str]:
    """Renames a ConvMixer's parameters to timm's names.

    Args:
        state_dict: Tensors by name in any layout of this module's table, with or without the prefixes of
            `DataParallel` and `torch.compile`, or a checkpoint that holds them under ``state_dict_ema``,
            ``model_ema``, ``state_dict`` or ``model``.

    Returns:
        The tensors by timm's names, and the layout's name.

    Raises:
        ValueError: If the keys are those of no known ConvMixer.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"Not a ConvMixer checkpoint: expected tensors by name, found a {type(state_dict).__name__}")
    for wrapper in _WRAPPERS:
        inner = state_dict.get(wrapper)
        if isinstance(inner, dict):
            state_dict = inner
            break
    state_dict = clean_state_dict(state_dict)
    layout = next((name for name, key in _MARKERS.items() if key in state_dict), None)
    if layout == "authors":
        state_dict = _from_authors(state_dict)
    elif layout == "labml":
        state_dict = _renamed(state_dict, _LABML)
    elif layout == "mmpretrain":
        state_dict = _renamed(state_dict, _MMPRETRAIN)
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith("data_preprocessor.")}
    if layout is None or "blocks.0.0.fn.0.weight" not in state_dict:
        found = ", ".join(list(state_dict)[:3]) or "nothing"
        expected = ", ".join(f"{key} ({name})" for name, key in _MARKERS.items())
        raise ValueError(f"Not a ConvMixer checkpoint: expected a key such as {expected}; found {found}, …")
    return state_dict, layout


def checkpoint_filter_fn(state_dict: StateDict, model: nn.Module) -> StateDict:
    """Brings a checkpoint into the layout of `model`; timm calls it when it loads pretrained weights.

    Args:
        state_dict: As for `to_timm_layout`.
        model: The ConvMixer that the weights are for. Its input channels and classes may differ: timm adapts them.

    Returns:
        Tensors by the names that `model` has.

    Raises:
        ValueError: If the checkpoint is of another architecture or of another size.
    """
    state_dict, _ = to_timm_layout(state_dict)
    found, expected = asdict(Shape.of(state_dict)), asdict(Shape.of(model.state_dict()))
    names = ("dim", "depth", "kernel_size", "patch_size")
    if any(found[name] != expected[name] for name in names):
        wanted, got = (", ".join(f"{name} {sizes[name]}" for name in names) for sizes in (expected, found))
        raise ValueError(f"The checkpoint is a ConvMixer of another size: expected {wanted}; found {got}.")
    return state_dict


def read_checkpoint(path: str | Path) -> StateDict:
    """Reads a file of weights without running anything in it: safetensors, or a pickle with tensors only.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it can't be read, or is a pickle that asks for code, as some of torch's own (a whole module) do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such checkpoint file: {path}")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        # timm's checkpoints carry their training arguments as a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, no tensors by name")
        return content
    except Exception as error:  # torch, pickle, zipfile and safetensors each have their own
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} can't be read as weights: {reason}") from error


def convert(source: str | Path, target: str | Path) -> tuple[Shape, str]:
    """Writes the ConvMixer weights in `source` to `target` as safetensors with timm's names.

    Returns:
        The model's sizes and the layout that `source` had.

    Raises:
        FileNotFoundError: If there is no `source`.
        ValueError: If `source` can't be read or is no ConvMixer, or if `target` doesn't end in ``.safetensors``.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise ValueError(f"The output must end in .safetensors, got {target}")
    state_dict, layout = to_timm_layout(read_checkpoint(source))
    with atomic_path(target) as temporary:
        safetensors.torch.save_file({k: v.detach().clone().contiguous() for k, v in state_dict.items()}, temporary)
    return Shape.of(state_dict), layout
