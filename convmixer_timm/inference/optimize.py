"""The fastest way that a processor has to run a model, in one call: `optimize`."""

import collections
import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import platform
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image

from ..errors import one_line
from ..files import atomic_path, cache_dir
from ..images import ImageError, find_images, image_loader
from ..kernels import fast
from .class_map import ClassMap
from .folding import fold_norms
from .loading import check_finite, check_module, uncompiled

__all__ = ["BACKENDS", "PRECISIONS", "TOLERANCES", "OptimizedModel", "calibration_batches", "optimize", "unavailable"]

_logger = logging.getLogger(__name__)

PRECISIONS = ("fp32", "bf16", "int8")
# How far outputs may be from those of the model in fp32, as a share of the largest of them. Of 300 images the worst in
# int8 is off by a third where top-1 loses 0.3 points.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.5}
_CALIBRATION_IMAGES = 300
COMPARED = 32  # of them
_TIMING_SECONDS = 1.0  # for each candidate
_PARTS = (16, 4)
_quiet = threading.RLock()

Run = Callable[[torch.Tensor], torch.Tensor]
Batches = list[torch.Tensor]


class _Candidate(NamedTuple):
    backend: str
    folded: bool
    part: int | None  # images at a time: what a layer of fewer images writes is still in the cache for the next

    def __str__(self) -> str:
        return f"{self.backend}{', folded' * self.folded}{f', {self.part} at a time' if self.part else ''}"


class OptimizedModel(nn.Module):
    """What `optimize` returns: called like the model that it was made from, also from several threads at once.

    Its outputs are plain fp32 tensors without gradients, whatever its caller has switched on: gradients, inference
    mode or autocast.

    Attributes:
        backend: The engine that runs it.
        precision: 'fp32', 'bf16' or 'int8'.
        folded: Whether ConvMixer's norms are folded (`convmixer_timm.inference.folding`).
        part: How many images the engine gets at a time; None for all.
        times: Seconds for the example by candidate, where they were measured.
        pretrained_cfg: The model's, so that `timm.data.resolve_model_data_config` finds its preprocessing.
    """

    def __init__(
        self, run: Run, model: Any, precision: str, size: tuple[int, ...], fixed: int | None, choice: dict[str, Any]
    ):
        super().__init__()
        self._run, self._size, self._fixed = run, size, fixed
        self.precision = precision
        self.backend, self.folded, self.part = self.chosen = _Candidate(*choice["chosen"])
        self.times: dict[str, float] = choice["times"]
        self.pretrained_cfg = copy.deepcopy(getattr(model, "pretrained_cfg", {}))
        self.num_classes = getattr(model, "num_classes", None)
        self.in_chans = size[0]

    @torch.compiler.disable  # what it runs is compiled already, or another engine's
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_chans, H, W], of the example's size, to what the model gives for them, in fp32."""
        shape = tuple(x.shape) if isinstance(x, torch.Tensor) else ()
        if shape[1:] != self._size or (self._fixed and shape[0] != self._fixed):
            expected = "x".join(map(str, (self._fixed or "N", *self._size)))
            got = "x".join(map(str, shape)) or f"a {type(x).__name__}"
            raise ValueError(f"made for images of {expected}, got {got}")
        return self._run(x)

    def extra_repr(self) -> str:
        return f"{self.chosen}, {self.precision}"


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


def optimize(
    model: nn.Module,
    example_input: torch.Tensor,
    backend: str = "auto",
    precision: str = "fp32",
    calibration: Iterable[Any] | str | Path | None = None,
    fixed_batch: bool = False,
) -> OptimizedModel:
    """Makes a model fast on this machine's processor.

    Args:
        model: On the CPU; it stays as it is, and its evaluation mode is what is made fast.
        example_input: Images [N, in_chans, H, W], of the size and batch that matter most.
        backend: 'inductor' (PyTorch's compiler, frozen, channels-last), 'openvino', 'onnxruntime', or 'auto', which
            times those that are installed on the example, keeps the fastest and remembers it. What was chosen is
            logged, and stands in the result's `backend`.
        precision: 'fp32', 'bf16', or 'int8' (OpenVINO with NNCF).
        calibration: For int8, a few hundred real images: a folder, whose images are brought to the example's size, or
            an iterable of batches as the model takes them (of pairs with labels too, so a `DataLoader` will do) or of
            single images as `convmixer_timm.predict` takes them.
        fixed_batch: Make it for the example's batch size only.

    Returns:
        A module that takes images of the example's size in any number and gives the outputs of `model` within
        `TOLERANCES` (checked on the example, in int8 on calibration images).

    Raises:
        ValueError: If `backend` or `precision` is unknown, the model is in TorchScript, wrapped or gives no numbers, or
            int8 has no calibration images of the example's size.
        RuntimeError: If this machine can't do it, or the outputs differ by more than the tolerance.
    """
    check_module(model)
    model = uncompiled(model)
    if isinstance(model, OptimizedModel | nn.DataParallel):
        raise ValueError(f"{type(model).__name__} can't be optimised: give the model that it was made from")
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ValueError("a model in TorchScript can't be optimised: give the one that it was made from")
    if not isinstance(example_input, torch.Tensor) or example_input.ndim != 4 or not len(example_input):
        got = list(getattr(example_input, "shape", ())) or type(example_input).__name__
        raise ValueError(f"the example must be a tensor of images [N, in_chans, H, W], got {got}")
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}; there are auto, {', '.join(BACKENDS)}")
    if example_input.device.type != "cpu" or any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("this is for CPUs: bring model and example to the CPU")
    example_input = example_input.detach().float()
    size, count = tuple(example_input.shape[1:]), len(example_input)
    batches: Batches = []
    if precision == "int8":
        batches = list(calibration_batches(model, calibration, size, count if fixed_batch else None))
    names = list(BACKENDS) if backend == "auto" else [backend]
    reasons = {name: unavailable(name, precision) for name in names}
    usable = [name for name in names if reasons[name] is None]
    if not usable:
        raise RuntimeError("; ".join(dict.fromkeys(str(reason) for reason in reasons.values())))

    # int8 is made for real images: of others it may give anything.
    checked = torch.cat(batches[:1] if fixed_batch else batches)[:COMPARED] if batches else example_input
    # Eager modes that would reach into an engine's trace are none of its business.
    plain = copy.deepcopy(model).float().eval().requires_grad_(False)
    with quiet():
        # Quantisation has one scale a tensor, which the folded channels' different scales would spoil.
        folded = None if precision == "int8" else fold_norms(plain)
        try:
            expected = plain(checked)
        except RuntimeError as error:  # PyTorch's, for another number of channels, say
            raise ValueError(f"the model can't take images of {list(size)}: {one_line(error)}") from error
    if not isinstance(expected, torch.Tensor):
        raise ValueError(
            f"only a model that gives a tensor can be optimised, this one gives a {type(expected).__name__}"
        )
    check_finite(expected)
    networks: dict[bool, nn.Module] = {False: plain, **({True: folded} if folded is not None else {})}
    parts = [part for part in _PARTS if part < count and not (fixed_batch and count % part)]
    candidates = [_Candidate(*c) for c in itertools.product(usable, networks, [None, *parts])]

    @functools.cache
    def engine(name: str, fold: bool, part: int | None) -> Run:
        with quiet():
            return BACKENDS[name][0](networks[fold], example_input[:part], precision, fixed_batch, batches)

    def build(candidate: _Candidate) -> Run:
        name, fold, part = candidate
        run = engine(name, fold, part if fixed_batch else None)
        whole = _Indifferent(run if part is None else lambda x: torch.cat([run(images) for images in x.split(part)]))
        _check(whole, checked, expected, precision)
        return whole

    result = functools.partial(OptimizedModel, model=model, precision=precision, size=size, fixed=count * fixed_batch)
    key = _key(model, example_input, names, precision, fixed_batch)
    known = _remembered(key)
    runs: dict[_Candidate, Run] = {}
    failure = None

    def attempt(candidate: _Candidate) -> None:
        nonlocal failure
        try:
            runs[candidate] = build(candidate)
        except Exception as error:
            failure = error
            _logger.warning("%s left out: %s", candidate, one_line(error))

    if known and known["chosen"] in candidates:
        attempt(known["chosen"])
        if runs:
            return result(runs[known["chosen"]], choice=known)
    for candidate in candidates:  # all of them, where the remembered one doesn't do for these weights
        attempt(candidate)
    if not runs:
        reason = one_line(failure).partition(". ")[0]
        raise RuntimeError(f"{', '.join(usable)} can't run this model: {reason}") from failure
    times = _times(runs, example_input)
    best = min(runs, key=times.__getitem__)
    choice = {"chosen": best, "times": {str(candidate): seconds for candidate, seconds in times.items()}}
    _logger.info("%s runs by %s (%s)", type(model).__name__, best, choice["times"])
    _remember(key, choice)
    return result(runs[best], choice=choice)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """For tracing and quantising, whatever the caller has switched on.

    Tracing warns of every shape that it fixes, which is meant, and NNCF draws its bars on stdout, which is for results.
    One thread at a time: warnings and stdout are the whole process's, and two that overlap would restore each other's.
    """
    with _quiet, warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr), torch.no_grad(), _no_autocast():
        warnings.simplefilter("ignore")
        yield


def _no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


class _Indifferent:
    """The same function for every caller: with gradients, inference mode and autocast on or off."""

    def __init__(self, run: Run):
        self._run = run

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), _no_autocast():
            out = self._run(x.detach().float().resolve_neg())
        with torch.inference_mode(False), torch.no_grad():
            return out.clone()  # no inference tensor, so that a loss may be computed on it

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Indifferent":
        return self

    def __reduce__(self) -> Any:
        raise RuntimeError("an optimised model belongs to this process and machine: call optimize where it runs")


def _check(run: Run, x: torch.Tensor, expected: torch.Tensor, precision: str) -> None:
    found = run(x)
    largest = expected.abs().max().item() or 1.0  # a head of zeros gives nothing else
    difference = (found - expected).abs().max().item() / largest
    if not difference <= TOLERANCES[precision]:
        raise RuntimeError(f"the outputs differ by {difference:.2g} of the largest, more than {TOLERANCES[precision]}")


def _times(runs: dict[_Candidate, Run], x: torch.Tensor) -> dict[_Candidate, float]:
    """Least seconds of each candidate, as other work only adds to it.

    They take turns, so that a change of the machine's speed meets all; those far behind after the first are out.
    """
    if len(runs) == 1:
        return dict.fromkeys(runs, float("nan"))
    taken: dict[_Candidate, list[float]] = {key: [] for key in runs}

    def turn(keys: Iterable[_Candidate]) -> None:
        for key in keys:
            runs[key](x)  # not timed: the threads of the engine before may still spin
            start = time.perf_counter()
            runs[key](x)
            taken[key].append(time.perf_counter() - start)

    turn(runs)
    limit = 1.5 * min(min(taken.values()))
    close = [key for key in runs if taken[key][0] <= limit]
    end = time.perf_counter() + _TIMING_SECONDS * len(close)
    while len(taken[close[0]]) < 3 or time.perf_counter() < end:
        turn(close)
    return {key: min(seconds) for key, seconds in taken.items()}


def _key(model: nn.Module, x: torch.Tensor, names: list[str], precision: str, fixed_batch: bool) -> str:
    """What a choice depends on: the network's shape, the input, the engines with their versions, and the machine."""
    from importlib.metadata import version

    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    installed = [n for n in ("torch", "openvino", "onnxruntime", "nncf") if importlib.util.find_spec(n)]
    machine = (platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
    parts = (type(model).__name__, shapes, tuple(x.shape), names, precision, fixed_batch, machine, _PARTS)
    return hashlib.sha256(repr((parts, [version(n) for n in installed])).encode()).hexdigest()[:16]


def _choices() -> Path:
    return cache_dir() / "inference.json"


def _all_remembered() -> dict[str, Any]:
    try:
        content = json.loads(_choices().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _remembered(key: str) -> dict[str, Any] | None:
    """A choice that was made before; None where there is none, or not of the shape that this version writes."""
    try:
        known = _all_remembered()[key]
        backend, folded, part = known["chosen"]
        times = {str(name): float(seconds) for name, seconds in known["times"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return None
    if not isinstance(folded, bool) or not (part is None or isinstance(part, int)):  # 4.0 is a 4 to who compares
        return None
    return {"chosen": _Candidate(backend, folded, part), "times": times}


def _remember(key: str, choice: dict[str, Any]) -> None:
    with contextlib.suppress(OSError), atomic_path(_choices()) as temporary:  # a choice can be made again
        temporary.write_text(json.dumps({**_all_remembered(), key: choice}, indent=1), encoding="utf-8")


def calibration_batches(
    model: Any, source: Iterable[Any] | str | Path | None, size: tuple[int, ...] | None = None, batch: int | None = None
) -> Iterator[torch.Tensor]:
    """The first few hundred images of a folder or of an iterable, in batches as the model takes them.

    Args:
        model: Whose transform images that aren't batches yet go through. Those of a folder that can't be read are left
            out, and a warning names them.
        source: Folder, file or glob, or a list of them; or an iterable of batches (tensors, or pairs and mappings that
            have them first) or of images as `convmixer_timm.images.load_image` reads them; or one batch.
        size: (in_chans, H, W), to which images are brought and which batches must have; by default the model's.
        batch: Images in every batch, where it can't be any number; too few images for one are repeated.

    Raises:
        ValueError: If there are none, or they are something else or of another size.
    """
    if source is None:
        raise ValueError("int8 needs calibration images: a folder, or batches of images")
    enough = max(_CALIBRATION_IMAGES, batch or 0)
    named = isinstance(source, list | tuple) and all(isinstance(item, str | os.PathLike) for item in source)
    if isinstance(source, str | Path) or named:
        batches: Iterable[Any] = _from_files(model, source if named else [source], size, enough)
    elif getattr(source, "ndim", 0) == 4:
        batches = [source]
    elif isinstance(source, Iterable):
        batches = source
    else:
        raise ValueError(f"calibration images are a folder or batches of images, got a {type(source).__name__}")
    load = image_loader(model, size)
    count = 0
    waiting: Batches = []
    for item in batches:
        images = _as_batch(item, load)
        if size is not None and tuple(images.shape[1:]) != size:
            raise ValueError(f"calibration images must be [N, {', '.join(map(str, size))}], got {list(images.shape)}")
        count += len(images)
        if batch is None:
            yield images
        else:
            *full, rest = torch.cat([*waiting, images]).split(batch)
            waiting = [] if len(rest) == batch else [rest]
            yield from full + [rest] * (len(rest) == batch)
        if count >= enough:
            return
    if not count:
        raise ValueError(f"no calibration images in {source if isinstance(source, str | Path) else 'the iterable'}")
    if waiting and batch is not None and count < batch:
        yield torch.cat(waiting * -(-batch // count))[:batch]


def _as_batch(item: Any, load: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    """One item of an iterable as images [N, in_chans, H, W]."""
    given = item
    if isinstance(item, Mapping):
        item = next((value for value in item.values() if getattr(value, "ndim", 0) == 4), None)
    elif isinstance(item, tuple | list) and item:
        item = item[0]
    if isinstance(item, np.ndarray) and item.ndim == 4:
        item = torch.from_numpy(item)
    if isinstance(item, torch.Tensor):
        return item.detach().float()
    if isinstance(item, str | bytes | os.PathLike | Image.Image | np.ndarray):
        return load(item)[None]
    raise ValueError(f"calibration images must be batches or images, got a {type(given).__name__} without any")


def _from_files(model: Any, sources: Any, size: tuple[int, ...] | None, enough: int) -> Iterator[torch.Tensor]:
    load = image_loader(model, size)
    paths = find_images(sources)
    count = min(len(paths), enough)
    for i in range(count):  # from every class, as folders list one after the other
        try:
            yield load(paths[i * len(paths) // count])[None]
        except ImageError as error:
            _logger.warning("left out of the calibration: %s", one_line(error))


# Engines: each makes a function from images to outputs, both fp32 tensors.


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
    network.reshape([len(x) if fixed else -1, *x.shape[1:]])
    return quantized(network, [batch.numpy() for batch in batches]) if batches else network


def quantized(network: Any, items: list[Any]) -> Any:
    """An OpenVINO or ONNX network in int8, by NNCF; `items` are its inputs to choose the scales by."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
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
