"""Weights of ConvMixers saved by other implementations, read into timm's layout.

| layout     | recognised by              | saved by                                                      |
|------------|----------------------------|---------------------------------------------------------------|
| timm       | ``stem.0.weight``          | timm, this package, the authors' fork of timm                 |
| authors    | ``3.0.fn.0.weight``        | the flat `nn.Sequential` of locuslab/convmixer(-cifar10)      |
| labml      | ``patch_emb.conv.weight``  | labml's annotated implementation                              |
| mmpretrain | ``backbone.stages.0…``     | OpenMMLab's mmpretrain                                        |

All of them are the same network, so this is a renaming; prefixes that a wrapper of the model left in front of the keys
(`DataParallel`, `torch.compile`, a Lightning module's attribute) are dropped. The activation leaves no trace in the
keys: whether a checkpoint wants ReLU or GELU its source has to tell.
"""

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn as nn

from .errors import one_line
from .files import atomic_path

__all__ = ["Shape", "check_sizes", "checkpoint_filter_fn", "convert", "not_finite", "read_checkpoint", "to_timm_layout"]

# In an order in which no key ends like that of a layout before it.
_MARKERS = {
    "mmpretrain": "backbone.stages.0.0.fn.0.weight",
    "timm": "stem.0.weight",
    "authors": "3.0.fn.0.weight",
    "labml": "patch_emb.conv.weight",
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
# Under what trainers usually keep the weights, and how averaged ones are called.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module", "weights", "params")
_AVERAGED = re.compile(r"(^|[._])(ema|averaged|swa)([._]|$)")
# What wrappers of a model's parts leave inside of a name.
_INNER = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What may lie beside a model's own parts.
_LOSS = re.compile(r"(criterion|loss\w*)\.")

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
        """Reads the sizes off the tensors of a `state_dict` in timm's layout.

        Raises:
            ValueError: If these are no tensors of a ConvMixer.
        """
        stem, depthwise = state_dict["stem.0.weight"], state_dict["blocks.0.0.fn.0.weight"]
        head = state_dict.get("head.weight")
        if stem.ndim != 4 or depthwise.ndim != 4 or (head is not None and head.ndim != 2):
            raise ValueError("Not a ConvMixer checkpoint: its convolutions or its classifier have another form.")
        return cls(
            dim=stem.shape[0],
            depth=1 + max(int(m[1]) for k in state_dict if (m := re.match(r"blocks\.(\d+)\.", k))),
            kernel_size=depthwise.shape[-1],
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
    if other := next((key for key in state_dict if not re.match(r"\d+\.", key)), None):
        raise ValueError(f"Not a ConvMixer checkpoint: {other} is no key of the authors' layout.")
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


def _layout(keys: Iterable[str]) -> tuple[str | None, str]:
    """The layout that some keys have, and the prefix that they all have there; of several, averaged weights'."""
    for name, marker in _MARKERS.items():
        prefixes = [key.removesuffix(marker) for key in keys if key == marker or key.endswith(f".{marker}")]
        if prefixes:
            return name, min(prefixes, key=lambda prefix: (not _AVERAGED.search(prefix), len(prefix), prefix))
    return None, ""


def _candidates(content: dict[Any, Any], seen: set[int]) -> Iterator[StateDict]:
    """The tensors by name in a checkpoint and in whatever is nested in it, those that are most likely meant first."""
    if id(content) in seen:  # one that holds itself
        return
    seen.add(id(content))
    inner = {str(key): value for key, value in content.items() if isinstance(value, dict)}
    averaged = [key for key in inner if _AVERAGED.search(key)]
    for key in averaged:
        yield from _candidates(inner[key], seen)
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    yield {_INNER.sub("", key): value for key, value in tensors.items()}
    for key in sorted(inner.keys() - averaged, key=lambda key: (key not in _WRAPPERS, list(inner).index(key))):
        yield from _candidates(inner[key], seen)


def to_timm_layout(state_dict: StateDict) -> tuple[StateDict, str]:
    """Renames a ConvMixer's parameters to timm's names.

    Args:
        state_dict: Tensors by name in any layout of this module's table, with or without the prefixes of
            `DataParallel`, `torch.compile` and Lightning modules, or a checkpoint that holds them as trainers do,
            under any key and however deep; averaged ones (``ema``, …) are preferred.

    Returns:
        The tensors by timm's names, and the layout's name.

    Raises:
        ValueError: If the keys are those of no known ConvMixer.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"Not a ConvMixer checkpoint: expected tensors by name, found a {type(state_dict).__name__}")
    found = ", ".join(map(str, list(state_dict)[:3])) or "nothing"
    state_dict, layout, prefix = next(
        ((tensors, *which) for tensors in _candidates(state_dict, set()) if (which := _layout(tensors))[0]),
        ({}, None, ""),
    )
    if prefix:  # what else a wrapper keeps (a criterion, metrics) is no part of the model
        state_dict = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    elif layout == "timm":  # the same where timm's loader has cut the prefix off: counters, and a loss with parameters
        state_dict = {key: value for key, value in state_dict.items() if "." in key and not _LOSS.match(key)}
    if layout == "authors":
        state_dict = _from_authors(state_dict)
    elif layout == "labml":
        state_dict = _renamed(state_dict, _LABML)
    elif layout == "mmpretrain":
        state_dict = _renamed(state_dict, _MMPRETRAIN)
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith("data_preprocessor.")}
    if layout is None or "blocks.0.0.fn.0.weight" not in state_dict:
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


def check_sizes(said: dict[str, Any], state_dict: StateDict, source: str | Path) -> None:
    """Raises ValueError if the sizes that `source` says, by `Shape`'s names, aren't those of a ConvMixer's weights.

    For before a model is made by them: a damaged number may ask for more memory than there is.
    """
    found = asdict(Shape.of(to_timm_layout(state_dict)[0]))
    for name, value in said.items():
        if isinstance(value, int) and name in found and value not in (found[name], 0):
            raise ValueError(f"{source} says {name} {value}, and the weights have {found[name]}")


def not_finite(state_dict: StateDict) -> list[str]:
    """Names of the tensors that hold an infinity or no number."""
    return [key for key, value in state_dict.items() if not value.isfinite().all()]


def read_checkpoint(path: str | Path) -> StateDict:
    """Reads a file of weights without running anything in it: safetensors, or a pickle with tensors only.

    Raises:
        OSError: If there is no such file, or no right to read it.
        ValueError: If it holds something else, or is a pickle that asks for code, as some of torch's own (a whole
            module) do. The message is one line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No such checkpoint file: {path}" + ", it is a folder" * path.is_dir())
    with path.open("rb") as file:  # an error of rights is told as such
        head = file.read(9)
    if head == b"version h":  # https://git-lfs…
        raise ValueError(f"{path} is a pointer of Git LFS in the place of the file itself: run `git lfs pull`")
    try:
        # By its content too: the Hub's cache has files without a suffix. A header in JSON follows its length.
        if path.suffix == ".safetensors" or head[8:] == b"{":
            return safetensors.torch.load_file(path)
        # timm's checkpoints carry their training arguments as a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle's protocol
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors each have their own
        raise ValueError(f"{path} can't be read as weights: {_why(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} can't be read as weights: it holds a {type(content).__name__}, no tensors by name")
    return content


def _why(error: Exception) -> str:
    """What is wrong with a file, in a whole sentence, of errors that fill a screen."""
    text = one_line(error)
    if code := re.search(r"(?:GLOBAL|[Uu]nsupported (?:class|global):?|function) ([A-Za-z_][\w.]*\.[\w.]*\w)", text):
        return (
            f"it is a pickle that asks for {code[1]}, and code in a file is never run here. If you trust the file, "
            "write its tensors alone where that code is installed: c = torch.load(FILE, weights_only=False), then "
            "torch.save(c['state_dict'], NEW), or torch.save(c.state_dict(), NEW) if c is a whole model"
        )
    if isinstance(error, pickle.UnpicklingError):
        detail = re.search(r"WeightsUnpickler error: (.{1,120}?)(?:\. | Check the documentation|$)", text)
        return f"it is damaged, or no pickle of tensors only ({detail[1].strip() if detail else type(error).__name__})"
    if "TorchScript" in text:
        return "it is a TorchScript program, which is never run here: torch.save its state_dict() to another file"
    return f"it is damaged ({text if 0 < len(text) <= 200 else type(error).__name__})"


def convert(source: str | Path, target: str | Path) -> tuple[Shape, str]:
    """Writes the ConvMixer weights in `source` to `target` as safetensors with timm's names.

    Returns:
        The model's sizes and the layout that `source` had.

    Raises:
        FileNotFoundError: If there is no `source`.
        ValueError: If `source` can't be read, is no ConvMixer or a part of one, or if `target` doesn't end in
            ``.safetensors``.
    """
    target = Path(target).expanduser()
    if target.suffix != ".safetensors":
        raise ValueError(f"The output must end in .safetensors, got {target}")
    state_dict, layout = to_timm_layout(read_checkpoint(source))
    shape = Shape.of(state_dict)
    inner = {m[1] for key in state_dict if (m := re.match(r"blocks\.\d+\.(.*)", key))}
    expected = [f"blocks.{i}.{rest}" for i in range(shape.depth) for rest in sorted(inner)]
    expected += ["stem.0.bias", *["head.bias"] * bool(shape.num_classes)]
    if lost := [key for key in expected if key not in state_dict]:
        raise ValueError(f"{source} is not whole: it lacks {', '.join(lost[:3])}" + ", …" * (len(lost) > 3))
    if odd := [key for key, value in state_dict.items() if value.layout != torch.strided or value.is_quantized]:
        raise ValueError(f"{source} has tensors that are no plain ones: {', '.join(odd[:3])}")
    with atomic_path(target) as temporary:
        safetensors.torch.save_file({k: v.detach().clone().contiguous() for k, v in state_dict.items()}, temporary)
    return shape, layout
