"""A model written to one file for another program, with what it needs to know of its images."""

import errno
import io
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn

from ..files import folder_beside
from ..images import data_config
from .agreement import check_agreement, images_to_compare
from .calibration import calibration_batches, check_calibration
from .class_map import ClassMap, has_class_map
from .engines import onnx_program, openvino_model, quantized, quiet, unavailable
from .labels import check_labels, class_names
from .loading import check_finite, check_model, evaluating, uncompiled
from .optimize import OptimizedModel

__all__ = ["FORMATS", "export"]

# Precisions by format. OpenVINO computes an fp32 file in bf16 when it is asked to, so it needs no other file for that.
FORMATS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "int8"), "torch-export": ("fp32", "bf16")}
Run = Callable[[torch.Tensor], Any]
_SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}


def export(
    model: Any,
    target: str | Path,
    format: str,
    precision: str = "fp32",
    dynamic_batch: bool = False,
    calibration: Iterable[Any] | str | Path | None = None,
    labels: list[str] | None = None,
    class_map: bool = False,
) -> dict[str, Any]:
    """Writes a model to a file, loads that back and compares its outputs before it gets its name.

    The file carries its preprocessing and its classes as metadata (the keys that this function returns), each as JSON:
    in ONNX as metadata properties, in OpenVINO as runtime information under ``convmixer_timm``, in torch.export as the
    extra file ``metadata.json``.

    Args:
        model: In fp32 on the CPU; it stays as it is.
        target: File to write: ``.onnx``, ``.xml`` (OpenVINO, with a ``.bin`` beside it) or ``.pt2``.
        format: 'onnx', 'openvino' or 'torch-export'.
        precision: One of `FORMATS`. int8 is quantised by NNCF.
        dynamic_batch: Take any number of images; else one.
        calibration: For int8, as for `convmixer_timm.optimize`.
        labels: Names of the classes; by default the model's own.
        class_map: Add the class maps (`convmixer_timm.inference.class_map`) as a second output, for a model that has
            them; in ONNX.

    Returns:
        The metadata.

    Raises:
        ValueError: If the model is in another precision or place, optimised, or gives no finite numbers or no wanted
            class maps; format, precision or suffix is none of those, the file is a folder, int8 has no
            calibration images or another precision has some, or the labels don't fit.
        RuntimeError: If a needed package is missing, or the file's outputs differ from the model's by more than
            `convmixer_timm.inference.agreement.TOLERANCES`.
    """
    check_model(model)
    model = uncompiled(model)
    if isinstance(model, OptimizedModel):
        raise ValueError("an optimised model is for this process: export the model that it was made from")
    if odd := {f"{p.dtype} on {p.device}" for p in model.parameters()} - {"torch.float32 on cpu"}:
        raise ValueError(f"a model is written from fp32 on the CPU, and this one is {odd.pop()}: .float().cpu() it")
    target = Path(os.path.realpath(Path(target).expanduser()))  # where a link leads
    if format not in FORMATS:
        raise ValueError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    if precision not in FORMATS[format]:
        raise ValueError(f"{format} is written in {' or '.join(FORMATS[format])}, not in {precision!r}")
    check_calibration(calibration, precision)
    if class_map and format != "onnx":
        raise ValueError(f"class maps are written in ONNX, not in {format}")
    if class_map and not has_class_map(model):
        raise ValueError("class maps need average pooling before a linear classifier, which this model hasn't got")
    if target.suffix != _SUFFIXES[format]:
        raise ValueError(f"a file of format {format} must end in {_SUFFIXES[format]}, got {target}")
    if labels is not None:
        check_labels(labels, model.num_classes)
    parts = [target, target.with_suffix(".bin")] if format == "openvino" else [target]
    if folders := [part for part in parts if part.is_dir()]:
        raise ValueError(f"{folders[0]} is a folder: name a file to write")
    if parts[-1].exists() and not target.exists():
        raise ValueError(f"{parts[-1]} would be replaced, and is no part of an earlier export: give another name")
    if format != "torch-export":
        reason = unavailable("onnxruntime" if format == "onnx" else "openvino")
        reason = reason or (unavailable("openvino", precision) if precision == "int8" else None)
        if reason:
            raise RuntimeError(reason)
    config = data_config(model)
    metadata = {
        "architecture": model.pretrained_cfg.get("architecture"),
        "precision": precision,
        **{key: config[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")},
        "label_names": labels or class_names(model),
    }
    # The file is compared with the model on other images than those that it is made with, whose outputs it could know.
    shape, generator = (2 if dynamic_batch else 1, *config["input_size"]), torch.Generator().manual_seed(0)
    example, other = (torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") for _ in range(2))
    batches: list[torch.Tensor] = []
    if precision == "int8":
        size = tuple(config["input_size"])
        batches = list(calibration_batches(model, calibration, size, None if dynamic_batch else 1))
    network = ClassMap(model) if class_map else model
    with folder_beside(target) as temporary, quiet(), evaluating(network):
        file = temporary / target.name
        write, load = _FORMATS[format]
        write(_Task(network, example, precision, dynamic_batch, batches, metadata), file)
        # int8 is made for real images, and one of them tells little of how far off it is.
        images = images_to_compare(batches) if batches else other
        _compare(network, load(file), images.split(len(images) if dynamic_batch else 1), precision)
        for part in sorted(temporary.iterdir()):  # OpenVINO's .xml last: it needs the .bin
            os.replace(part, target.with_suffix(part.suffix))
    return metadata


class _Task(NamedTuple):
    """What a file is made from."""

    model: nn.Module
    example: torch.Tensor
    precision: str
    dynamic: bool
    batches: list[torch.Tensor]
    metadata: dict[str, Any]


def _compare(model: nn.Module, found: Run, batches: Iterable[torch.Tensor], precision: str) -> None:
    """Compares a written file's outputs with the model's, and the means of its class maps with its logits."""
    outputs, means, expected = [], [], []
    for images in batches:
        logits, own = found(images), model(images)
        if isinstance(model, ClassMap):
            (logits, maps), (own, _) = logits, own
            means.append(torch.as_tensor(maps.mean((2, 3)), device="cpu"))
        check_finite(own)
        outputs.append(torch.as_tensor(np.asarray(logits), device="cpu"))
        expected.append(own)
    try:
        if means:
            check_agreement(torch.cat(means), torch.cat(outputs), precision, "means of the file's class maps")
        check_agreement(torch.cat(outputs), torch.cat(expected), precision, "file's outputs")
    except RuntimeError as error:
        raise RuntimeError(f"nothing written: {error}") from None


def _onnx(task: _Task, file: Path) -> None:
    import onnx

    network = onnx_program(task.model, task.example, fixed=not task.dynamic)
    if task.precision == "int8":
        network = quantized(network, task.batches, network.graph.input[0].name)
    for part in (*network.graph.node, *network.graph.value_info):  # traces name this machine's folders
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(network, {key: json.dumps(value) for key, value in task.metadata.items()})
    onnx.checker.check_model(network)
    onnx.save(network, file)


def _load_onnx(file: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(file.read_bytes(), providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> Any:
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return outputs if len(outputs) > 1 else outputs[0]

    return run


def _openvino(task: _Task, file: Path) -> None:
    import openvino

    network = openvino_model(task.model, task.example, fixed=not task.dynamic, batches=task.batches)
    for key, value in task.metadata.items():
        network.set_rt_info(json.dumps(value), ["convmixer_timm", key])
    try:
        openvino.save_model(network, file, compress_to_fp16=False)
    except RuntimeError as error:  # of its streams, which don't say why
        raise OSError(errno.EIO, "could not be written whole, the disk may be full", str(file)) from error


def _load_openvino(file: Path) -> Run:
    import openvino

    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: compiled(images.numpy())[0]


class _InBf16(nn.Module):
    """fp32 images in, fp32 outputs out, bf16 between."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.model(images.bfloat16())
        return output.float()


def _torch_export(task: _Task, file: Path) -> None:
    import copy

    network = _InBf16(copy.deepcopy(task.model).bfloat16()) if task.precision == "bf16" else task.model
    shapes = ({0: torch.export.Dim.DYNAMIC},) if task.dynamic else None
    program = torch.export.export(network, (task.example,), dynamic_shapes=shapes)
    content = io.BytesIO()  # PyTorch's own writer ends the process where the disk is full
    torch.export.save(program, content, extra_files={"metadata.json": json.dumps(task.metadata)})
    file.write_bytes(content.getvalue())


def _load_torch_export(file: Path) -> Run:
    return torch.export.load(file).module()


_FORMATS = {
    "onnx": (_onnx, _load_onnx),
    "openvino": (_openvino, _load_openvino),
    "torch-export": (_torch_export, _load_torch_export),
}
