"""Engines that run a model on a CPU: PyTorch's compiler, OpenVINO and ONNX Runtime.

Each makes of a model a function from images to outputs, both fp32 tensors.
"""

import collections
import contextlib
import copy
import importlib.util
import logging
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn as nn

from ..kernels import fast
from .class_map import ClassMap

__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Batches",
    "Run",
    "no_autocast",
    "onnx_program",
    "openvino_model",
    "quantized",
    "quiet",
    "unavailable",
]

PRECISIONS = ("fp32", "bf16", "int8")
_quiet = threading.RLock()

Run = Callable[[torch.Tensor], torch.Tensor]
Batches = list[torch.Tensor]


def unavailable(backend: str, precision: str = "fp32") -> str | None:
    """Why this machine can't run a model by `backend` in `precision`; None if it can."""
    if precision == "bf16" and torch.bfloat16 in fast.SLOW_DTYPES:
        return "this processor has no bf16 instructions"
    if precision not in BACKENDS[backend][1]:
        others = [name for name, (_, precisions) in BACKENDS.items() if precision in precisions]
        return f"{backend} has no {precision} here; {', '.join(others)} has"
    if backend == "inductor":
        compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++"))
        return None if compiler else "inductor needs a C++ compiler (g++ or clang++)"
    needed = {"openvino": ["openvino"], "onnxruntime": ["onnxruntime", "onnx", "onnxscript"]}[backend]
    if backend == "openvino" and precision == "int8":
        needed = [*needed, "nncf"]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} not installed: pip install {' '.join(missing)}" if missing else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For tracing and quantising, whatever the caller has switched on.

    Tracing warns of every shape that it fixes, which is meant, and NNCF draws its bars on stdout, which is for results,
    and whether somebody looks on or not.
    One thread at a time: warnings and stdout are the whole process's, and two that overlap would restore each other's.
    """
    with (
        _quiet,
        warnings.catch_warnings(),
        open(os.devnull, "w", encoding="utf-8") as nobody,
        contextlib.redirect_stdout(sys.stderr if sys.stderr and sys.stderr.isatty() else nobody),
        _unreported(),
        torch.no_grad(),
        no_autocast(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _unreported() -> Iterator[None]:
    """Has OpenVINO and NNCF report nobody's use of them to their makers, which they do unless told otherwise.

    They fork a process for each report, and this one's end waits for it: for seconds where no server answers, and for
    ever where the fork caught a lock of another thread's.
    """
    try:
        from openvino_telemetry.utils.opt_in_checker import ConsentCheckResult, OptInChecker
    except ImportError:
        yield
    else:
        with mock.patch.object(OptInChecker, "check", return_value=ConsentCheckResult.DECLINED):
            yield


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def _inductor(model: nn.Module, x: torch.Tensor, precision: str, fixed: bool, _: Batches) -> Run:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network: Any = copy.deepcopy(model).to(memory_format=torch.channels_last, dtype=dtype)  # type: ignore[call-overload]

    def forward(x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = network(x)
        return output

    # PyTorch gives up compiling, silently, a code that it has compiled eight times: each model has a code of its own.
    forward.__code__ = forward.__code__.replace()
    compiled = torch.compile(forward, dynamic=False if fixed else None, options={"freezing": True})
    # One call at a time, which has all cores anyway: of threads that check PyTorch's guards at once some fail them, and
    # compile again, until it gives up compiling for good.
    lock = threading.Lock()

    def run(x: torch.Tensor) -> torch.Tensor:
        x = x.to(dtype=dtype, memory_format=torch.channels_last)
        if not fixed and len(x) > 1:  # a batch of one is compiled by itself
            torch._dynamo.maybe_mark_dynamic(x, 0)
        with lock:
            return compiled(x).float()

    return run


def openvino_model(model: nn.Module, x: torch.Tensor, fixed: bool, batches: Batches) -> Any:
    """An OpenVINO network; quantised where there are batches to calibrate it with."""
    import openvino

    network = openvino.convert_model(model, example_input=x)
    if batches or not fixed:
        network.reshape([-1, *x.shape[1:]])
    if batches:
        network = quantized(network, batches)
    if fixed:
        network.reshape(list(x.shape))
    return network


def quantized(network: Any, batches: Batches, name: str | None = None) -> Any:
    """An OpenVINO or ONNX network in int8, by NNCF.

    Args:
        network: Of any number of images, or one.
        batches: Images to choose the scales by.
        name: Of its input, in ONNX.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    # One by one: NNCF takes a batch's least and greatest value for one image's, and the scales get too wide.
    images = [image.numpy() for batch in batches for image in batch.split(1)]
    items = images if name is None else [{name: image} for image in images]
    return nncf.quantize(network, nncf.Dataset(items), subset_size=len(items))


def _openvino(model: nn.Module, x: torch.Tensor, precision: str, fixed: bool, batches: Batches) -> Run:
    import openvino

    rest = "bf16" if unavailable("openvino", "bf16") is None else "f32"  # of what int8 leaves
    hints = {
        "PERFORMANCE_HINT": "LATENCY",  # one call at a time, with all cores
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16", "int8": rest}[precision],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = openvino.Core().compile_model(openvino_model(model, x, fixed, batches), "CPU", hints)
    idle = collections.deque([compiled.create_infer_request()])  # one serves one thread at a time

    def run(x: torch.Tensor) -> torch.Tensor:
        try:
            request = idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        try:
            return torch.from_numpy(request.infer({0: x.contiguous().numpy()}, share_inputs=True)[0].copy())
        finally:
            idle.append(request)

    return run


def onnx_program(model: nn.Module, x: torch.Tensor, fixed: bool) -> Any:
    """The ONNX form of a model."""
    batch = {0: torch.export.Dim.DYNAMIC}
    example = x if fixed or len(x) > 1 else torch.cat([x, x])  # a batch of one would be taken for a constant
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        input_names=["images"],
        output_names=["logits", "maps"] if isinstance(model, ClassMap) else ["logits"],
        dynamic_shapes=None if fixed else (batch,),
        verbose=False,
    )
    assert program is not None
    return program.model_proto


def _onnxruntime(model: nn.Module, x: torch.Tensor, precision: str, fixed: bool, _: Batches) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = onnx_program(model, x, fixed).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: x.contiguous().numpy()})[0])

    return run


BACKENDS: dict[str, tuple[Callable[..., Run], tuple[str, ...]]] = {
    "inductor": (_inductor, ("fp32", "bf16")),
    "openvino": (_openvino, ("fp32", "bf16", "int8")),
    "onnxruntime": (_onnxruntime, ("fp32",)),
}
