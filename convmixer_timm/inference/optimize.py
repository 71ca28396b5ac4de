"""The fastest way that a processor has to run a model, in one call: `optimize`."""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import itertools
import json
import logging
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ..errors import one_line
from ..files import atomic_path, cache_dir
from .agreement import check_agreement, images_to_compare
from .calibration import calibration_batches, check_calibration
from .engines import BACKENDS, PRECISIONS, Batches, Run, no_autocast, quiet, unavailable
from .folding import fold_norms
from .loading import check_finite, check_module, uncompiled

__all__ = ["OptimizedModel", "optimize"]

_logger = logging.getLogger(__name__)

_TIMING_SECONDS = 1.0  # for each candidate
_PARTS = (16, 4)


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
        if x.device.type != "cpu" or x.is_complex():
            raise ValueError(f"made for images of real numbers on the CPU, got {x.dtype} on {x.device}")
        if not len(x):  # to which engines give anything: an error, or the outputs of the call before
            return self._run(x.new_zeros(1, *self._size))[:0]
        return self._run(x)

    def extra_repr(self) -> str:
        return f"{self.chosen}, {self.precision}"


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
            an iterable of batches as the model takes them (of pairs with labels too, so a `DataLoader` will do, or a
            dataset) or of single images as `convmixer_timm.predict` takes them.
        fixed_batch: Make it for the example's batch size only.

    Returns:
        A module that takes images of the example's size in any number and gives the outputs of `model` within
        `convmixer_timm.inference.agreement.TOLERANCES` (checked on the example, in int8 on calibration images).

    Raises:
        ValueError: If `backend` or `precision` is unknown, the model is in TorchScript, wrapped or gives no numbers,
            the example isn't finite, int8 has no calibration images of the example's size, or another precision some.
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
    check_calibration(calibration, precision)
    if not isinstance(fixed_batch, bool):
        raise ValueError(f"fixed_batch is True or False, as the batch is the example's; got {fixed_batch!r}")
    if example_input.device.type != "cpu" or any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError("this is for CPUs: bring model and example to the CPU")
    if example_input.is_complex() or not example_input.isfinite().all():
        raise ValueError("the example must be of finite numbers, and real ones")
    example_input = example_input.detach().float().resolve_neg()
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
    checked = images_to_compare(batches, count if fixed_batch else None) if batches else example_input
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
        found = torch.cat([whole(images) for images in checked.split(count if fixed_batch else len(checked))])
        check_agreement(found, expected, precision)
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


class _Indifferent:
    """The same function for every caller: with gradients, inference mode and autocast on or off."""

    def __init__(self, run: Run):
        self._run = run

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), no_autocast():
            out = self._run(x.detach().float().resolve_neg())
        with torch.inference_mode(False), torch.no_grad():
            return out.clone()  # no inference tensor, so that a loss may be computed on it

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Indifferent":
        return self

    def __reduce__(self) -> Any:
        raise RuntimeError("an optimised model belongs to this process and machine: call optimize where it runs")


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
