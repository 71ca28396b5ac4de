"""`optimize`: the same outputs, by other engines."""

import contextlib
import copy
import importlib.util
import io
import json
import pickle
import shutil
import sys
import threading
import warnings

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

from convmixer_timm import ConvMixer, class_names, export, predict
from convmixer_timm.inference import optimize as optimize_module
from convmixer_timm.inference.agreement import TOLERANCES
from convmixer_timm.inference.calibration import calibration_batches
from convmixer_timm.inference.engines import quiet, unavailable
from convmixer_timm.inference.folding import fold_norms
from convmixer_timm.inference.optimize import optimize
from convmixer_timm.kernels import fast

from ..conftest import IMAGES

NAME = "convmixer_128_4.e25_cifar10"


@pytest.fixture(autouse=True)
def choices(tmp_path, monkeypatch):
    """Choices are made in haste and remembered for the length of a test only."""
    monkeypatch.setattr(optimize_module, "_TIMING_SECONDS", 0.05)
    monkeypatch.setattr(optimize_module, "_choices", lambda: tmp_path / "inference.json")
    return tmp_path / "inference.json"


@pytest.fixture(scope="module")
def model():
    return timm.create_model(NAME, pretrained=True).eval()


@pytest.fixture(scope="module")
def images(model):
    return torch.cat(list(calibration_batches(model, IMAGES)))


def spread_norms(model):
    """Norms as after a training: a fresh one does nothing."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2.0)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"act_layer": "relu", "kernel_size": 4},
        {"num_classes": 0},
        {"global_pool": "max"},
        {"global_pool": ""},
        {"drop_rate": 0.5, "drop_path_rate": 0.5},
    ],
)
def test_folding_is_exact(options):
    torch.manual_seed(0)
    model = spread_norms(timm.create_model("convmixer_128_4", **options)).double().eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(fold_norms(model)(x), model(x), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_folding_with_a_channel_switched_off():
    torch.manual_seed(0)
    model = spread_norms(timm.create_model("convmixer_128_4")).eval()
    with torch.no_grad():
        model.blocks[1][0].fn[2].weight[:5] = 0
        x = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(fold_norms(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_folded_is_left():
    assert fold_norms(timm.create_model("convmixer_128_4", pointwise_residual=True)) is None
    assert fold_norms(timm.create_model("convmixer_128_4", norm_layer="layernorm2d")) is None
    assert fold_norms(timm.create_model("test_resnet")) is None
    changed = timm.create_model("convmixer_128_4", pretrained=True).eval()
    changed.blocks[1].append(nn.Tanh())
    assert fold_norms(changed) is None
    norm_first = timm.create_model("convmixer_128_4")
    stem = norm_first.stem
    stem[1], stem[2] = stem[2], stem[1]
    assert fold_norms(norm_first) is None

    class Other(ConvMixer):
        def forward(self, x):
            return -super().forward(x)

    assert fold_norms(Other(8, 1)) is None


def _hooked(name, kind="forward"):
    return lambda model: getattr(model.get_submodule(name), f"register_{kind}_hook")(lambda *args: None)


def _overridden(name):
    return lambda model: setattr(model, name, getattr(model, name))


def _subclassed(index):
    def change(model):
        layer = model.stem[index]
        layer.__class__ = type("Other", (type(layer),), {})

    return change


def _weight_computed(model):
    weight = model.blocks[0][1].weight.detach()
    del model.blocks[0][1].weight
    model.blocks[0][1].weight = weight


@pytest.mark.parametrize(
    "change",
    [
        *map(_hooked, ("", "blocks", "blocks.1", "blocks.0.0.fn", "blocks.1.3", "head")),
        _hooked("stem", "forward_pre"),
        *map(_overridden, ("forward", "forward_features", "_forward_layers", "forward_head")),
        _subclassed(0),
        _subclassed(2),
        lambda model: nn.utils.parametrizations.weight_norm(model.blocks[0][0].fn[0]),
        lambda model: nn.utils.parametrize.register_parametrization(model.blocks[1][3], "weight", nn.Identity()),
        _weight_computed,
        lambda model: setattr(model, "head_drop", nn.Tanh()),
        lambda model: model.blocks[0].__setitem__(1, nn.Conv2d(32, 32, 3, padding=1)),
    ],
)
def test_a_model_that_somebody_reaches_into_is_not_folded(change):
    model = ConvMixer(32, 2).eval()
    assert fold_norms(model) is not None
    change(model)
    assert fold_norms(model) is None


CASES = [
    (backend, precision)
    for backend, (_, precisions) in optimize_module.BACKENDS.items()
    for precision in precisions
    if unavailable(backend, precision) is None
]


@pytest.mark.parametrize("backend, precision", CASES)
def test_same_outputs_for_any_batch(backend, precision, model, images):
    before = copy.deepcopy(model.state_dict())
    fast = optimize(model, images[:8], backend, precision, calibration=IMAGES if precision == "int8" else None)
    assert (fast.backend, fast.precision) == (backend, precision)
    for batch in (images[:8], images[:1], images[:13], images[:8].to(memory_format=torch.channels_last)):
        with torch.inference_mode():
            expected = model(batch)
        found = fast(batch)
        assert found.dtype == torch.float32
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= TOLERANCES[precision] * expected.abs().max()
    with torch.inference_mode():
        same = (fast(images).argmax(1) == model(images).argmax(1)).float().mean()
    assert same >= {"fp32": 1.0, "bf16": 0.96, "int8": 0.93}[precision]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="made for images of Nx3x32x32, got 1x3x64x64"):
        fast(torch.zeros(1, 3, 64, 64))


needs_openvino = pytest.mark.skipif(unavailable("openvino") is not None, reason="OpenVINO is not installed")


@needs_openvino
def test_auto_times_remembers_and_tells(model, images, choices, monkeypatch, caplog):
    monkeypatch.setattr(
        optimize_module, "BACKENDS", {k: optimize_module.BACKENDS[k] for k in ("openvino", "onnxruntime")}
    )
    with caplog.at_level("INFO", logger="convmixer_timm.inference"):
        fast = optimize(model, images[:4])
    assert fast.backend in optimize_module.BACKENDS
    assert len(fast.times) == 4 - 2 * (unavailable("onnxruntime") is not None)
    assert f"{fast.chosen}" in fast.times
    assert f"runs by {fast.backend}" in caplog.text
    assert fast.backend in repr(fast)
    assert timm.data.resolve_model_data_config(fast)["input_size"] == (3, 32, 32)
    monkeypatch.setattr(optimize_module, "_times", None)  # not again
    again = optimize(model, images[:4])
    assert (again.backend, again.folded) == (fast.backend, fast.folded)
    choices.write_text("damaged")
    with pytest.raises(TypeError):
        optimize(model, images[:4])


@needs_openvino
def test_fixed_batch_other_models_and_training_mode(images):
    model = timm.create_model("test_resnet", num_classes=3).train()
    fast = optimize(model, images[:4], "openvino", fixed_batch=True)
    assert model.training and not fast.folded
    with torch.inference_mode():
        torch.testing.assert_close(fast(images[:4]), model.eval()(images[:4]), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="made for images of 4x3x32x32"):
        fast(images[:5])


@needs_openvino
@pytest.mark.parametrize("fixed_batch", [False, True])
def test_a_batch_in_parts(fixed_batch, model, images, monkeypatch):
    sizes = []

    def engine(network, example, precision, fixed, batches):
        def run(x):
            assert not fixed or len(x) == len(example)
            sizes.append(len(x))
            return network(x)

        return run

    monkeypatch.setattr(optimize_module, "BACKENDS", {"openvino": (engine, ("fp32",))})
    monkeypatch.setattr(optimize_module, "_times", lambda runs, x: {key: key.part != 4 for key in runs})
    fast = optimize(model, images[:20], fixed_batch=fixed_batch)
    assert fast.part == 4
    assert "4 at a time" in repr(fast)
    sizes.clear()
    with torch.inference_mode():
        torch.testing.assert_close(fast(images[:20]), model(images[:20]), rtol=1e-4, atol=1e-5)
    assert sizes == [4] * 5
    if not fixed_batch:
        sizes.clear()
        assert fast(images[:7]).shape == (7, 10)
        assert sizes == [4, 3]


def test_what_cannot_be_done_is_said(model, images, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no backend 'tensorrt'; there are auto, inductor"):
        optimize(model, images, "tensorrt")
    with pytest.raises(ValueError, match="no precision 'fp8'"):
        optimize(model, images, precision="fp8")
    with pytest.raises(ValueError, match="calibration images are for int8, and this is fp32: leave out one of them"):
        optimize(model, images, calibration=tmp_path / "none")
    with pytest.raises(ValueError, match="fixed_batch is True or False, as the batch is the example's; got 8"):
        optimize(model, images, fixed_batch=8)
    for odd in (images * torch.nan, images + 1j):
        with pytest.raises(ValueError, match="the example must be of finite numbers, and real ones"):
            optimize(model, odd)
    with pytest.raises(ValueError, match="int8 needs calibration images"):
        optimize(model, images, precision="int8")
    with pytest.raises(ValueError, match="no calibration images in"):
        optimize(model, images, precision="int8", calibration=tmp_path)
    with pytest.raises(RuntimeError, match="inductor has no int8 here; openvino has"):
        optimize(model, images, "inductor", "int8", calibration=[images])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(RuntimeError, match=r"openvino not installed: pip install openvino"):
        optimize(model, images, "openvino")
    monkeypatch.setattr(fast, "SLOW_DTYPES", {torch.bfloat16})
    with pytest.raises(RuntimeError, match="no bf16 instructions"):
        optimize(model, images, precision="bf16")


def test_wrong_outputs_are_not_returned(model, images, monkeypatch):
    monkeypatch.setattr(optimize_module, "BACKENDS", {"inductor": (lambda *args: lambda x: model(x) + 1, ("fp32",))})
    with pytest.raises(RuntimeError, match="the outputs differ by"):
        optimize(model, images, "inductor")


def test_what_cannot_be_optimised_is_said_before_anything_is_built(model, images, monkeypatch):
    monkeypatch.setattr(optimize_module, "BACKENDS", {"inductor": (None, ("fp32",))})
    for script in (torch.jit.script(model), nn.Sequential(torch.jit.trace(model, images[:1]))):
        with pytest.raises(ValueError, match="in TorchScript can't be optimised"):
            optimize(script, images, "inductor")
    with pytest.raises(ValueError, match="DataParallel can't be optimised: give the model that it was made from"):
        optimize(nn.DataParallel(model), images, "inductor")
    with pytest.raises(ValueError, match="only a model that gives a tensor can be optimised, this one gives a list"):
        optimize(timm.create_model("convmixer_128_4", features_only=True), images, "inductor")


def test_a_compiled_model_is_optimised_as_what_it_was_made_from(model, images, monkeypatch):
    seen = []

    def engine(network, *args):
        seen.append(network)
        return network

    monkeypatch.setattr(optimize_module, "BACKENDS", {"inductor": (engine, ("fp32",))})
    fast = optimize(torch.compile(model), images, "inductor")
    assert type(seen[0]) is type(model)
    with pytest.raises(ValueError, match="OptimizedModel can't be optimised: give the model that it was made from"):
        optimize(fast, images, "inductor")


def test_another_head_of_the_model_renames_nothing(model, images, monkeypatch):
    monkeypatch.setattr(optimize_module, "BACKENDS", {"inductor": (lambda network, *args: network, ("fp32",))})
    other = timm.create_model(NAME, pretrained=True)
    fast = optimize(other, images, "inductor")
    other.reset_classifier(3)
    assert class_names(fast)[0] == "airplane"
    with pytest.raises(ValueError, match="export the model that it was made from"):
        export(fast, "never.onnx", "onnx")
    other.head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="outputs are no finite numbers"):
        optimize(other, images, "inductor")


@pytest.fixture(scope="module")
def engine(model, images):
    """Each engine in each precision, made once."""
    made = {}

    def make(backend, precision):
        if (backend, precision) not in made:
            calibration = IMAGES if precision == "int8" else None
            made[backend, precision] = optimize(model, images[:8], backend, precision, calibration=calibration)
        return made[backend, precision]

    return make


@pytest.mark.parametrize("backend, precision", CASES)
def test_four_threads_at_once(backend, precision, engine, images):
    fast = engine(backend, precision)
    batches = [images[i : i + size] for size in (1, 3, 8) for i in range(0, 12, 3)]
    expected = [fast(batch) for batch in batches]
    start, problems = threading.Barrier(4), []

    def serve(seed):
        start.wait()
        for i in np.random.default_rng(seed).permutation(len(batches) * 4) % len(batches):
            try:
                # Equal but for the order of sums, which may follow the threads.
                torch.testing.assert_close(fast(batches[i]), expected[i], rtol=1e-3, atol=1e-3)
            except Exception as error:
                problems.append(error)

    threads = [threading.Thread(target=serve, args=[seed]) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


@pytest.mark.parametrize("backend, precision", CASES)
def test_whatever_the_caller_has_switched_on(backend, precision, engine, images):
    fast = engine(backend, precision)
    x = images[:8].clone()
    expected = fast(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fast(x), expected)
    for switch in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with switch():
            assert torch.equal(fast(x), expected)
    assert torch.equal(fast(x.requires_grad_()), expected)
    found = fast(x.double())
    assert torch.equal(found, expected) and found.dtype == torch.float32
    with torch.inference_mode():
        inside = images[:8].clone()
    found = fast(inside)
    assert not found.requires_grad and not found.is_inference()
    with torch.inference_mode():
        assert not fast(inside).is_inference()
    assert torch.equal(fast(torch._neg_view(-x.detach())), expected)
    scale = torch.ones((), requires_grad=True)
    (found * scale).sum().backward()  # a loss may be computed on it
    assert scale.grad is not None


@pytest.mark.parametrize("backend", ["inductor", "openvino", "onnxruntime"])
def test_made_under_autocast_and_gradients(backend, model, images):
    if unavailable(backend) is not None:
        pytest.skip(unavailable(backend))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = optimize(model, images[:2].clone().requires_grad_(), backend)
    with torch.inference_mode():
        torch.testing.assert_close(fast(images[:2]), model(images[:2]), rtol=1e-3, atol=1e-3)


def test_folding_and_precision_are_not_the_callers(model, images):
    """Neither autocast nor the model's own precision reach the folded weights."""
    if reason := unavailable("onnxruntime"):
        pytest.skip(reason)
    expected = optimize(model, images[:2], "onnxruntime")(images[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = optimize(model, images[:2], "onnxruntime")
    torch.testing.assert_close(fast(images[:2]), expected, rtol=1e-4, atol=1e-4)
    for dtype in (torch.float64, torch.bfloat16):
        found = optimize(copy.deepcopy(model).to(dtype), images[:2].to(dtype), "onnxruntime")(images[:2])
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_remembered_choice_that_fails_is_made_again(model, images, choices, monkeypatch):
    right = (lambda network, *_: network, ("fp32",))
    wrong = (lambda network, *_: lambda x: network(x) + 1, ("fp32",))
    monkeypatch.setattr(optimize_module, "BACKENDS", {"openvino": right, "inductor": right})
    monkeypatch.setattr(optimize_module, "unavailable", lambda *_: None)
    chosen = optimize(model, images[:2]).backend
    other = {"openvino": "inductor", "inductor": "openvino"}[chosen]
    monkeypatch.setattr(optimize_module, "BACKENDS", {chosen: wrong, other: right})
    monkeypatch.setattr(optimize_module, "_key", lambda *args: next(iter(json.loads(choices.read_text()))))
    assert optimize(model, images[:2]).backend == other


def test_what_is_quiet_in_two_threads_is_loud_afterwards():
    before = (sys.stdout, list(warnings.filters))
    inside = threading.Barrier(2, timeout=0.2)

    def work():
        with quiet(), contextlib.suppress(threading.BrokenBarrierError):
            inside.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sys.stdout, list(warnings.filters)) == before


needs_int8 = pytest.mark.skipif(unavailable("openvino", "int8") is not None, reason="NNCF is not installed")


@needs_int8
@pytest.mark.parametrize("folder", [True, False])
def test_int8_of_a_fixed_batch_at_another_size(folder, model, images, capsys):
    larger = nn.functional.interpolate(images, 48)
    example = larger[:4]
    calibration = IMAGES if folder else larger.split(9)
    fast = optimize(model, example, "openvino", "int8", calibration=calibration, fixed_batch=True)
    assert fast(example).shape == (4, 10)
    assert capsys.readouterr().out == ""  # NNCF's bars go to stderr


@needs_int8
def test_int8_is_the_same_for_any_batches_of_its_images(model, images):
    outputs = [
        optimize(model, images[:n], "openvino", "int8", calibration=images.split(m), fixed_batch=fixed)(images[:n])
        for n, m, fixed in ((10, 1, False), (10, 30, False), (10, 30, True))
    ]
    for other in outputs[1:]:
        assert (other - outputs[0]).norm() < 0.03 * outputs[0].norm()  # of bf16 between, where there is any


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_no_images_give_no_outputs(backend):
    if reason := unavailable(backend):
        pytest.skip(reason)
    model = timm.create_model("resnet18", num_classes=7).eval()  # whose outputs OpenVINO keeps from the call before
    fast = optimize(model, torch.randn(2, 3, 32, 32), backend)
    assert fast(torch.empty(0, 3, 32, 32)).shape == (0, 7)


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_another_default_device(backend, model, images):
    if reason := unavailable(backend):
        pytest.skip(reason)
    with torch.device("meta"):
        fast = optimize(model, images[:2], backend)
    torch.testing.assert_close(fast(images), model(images), atol=1e-4, rtol=0)


@needs_int8
def test_int8_of_a_large_fixed_batch_in_parts_too(model, images, caplog):
    example = torch.cat([images, images[:18]])  # more than are compared
    fast = optimize(model, example, "openvino", "int8", calibration=images, fixed_batch=True)
    assert set(fast.times) == {"openvino", "openvino, 16 at a time", "openvino, 4 at a time"} and not caplog.records
    assert (fast(example).argmax(1) == model.eval()(example).argmax(1)).float().mean() > 0.9


def test_calibration_in_batches_of_one_size(model, images, tmp_path, caplog):
    def shapes(source, **kwargs):
        return [tuple(batch.shape) for batch in calibration_batches(model, source, **kwargs)]

    assert shapes(IMAGES, size=(3, 40, 24)) == [(1, 3, 40, 24)] * 30
    assert shapes(IMAGES, batch=7) == [(7, 3, 32, 32)] * 4
    assert shapes([images[:5], images[:9]], batch=4) == [(4, 3, 32, 32)] * 3
    assert shapes([images[:3]], batch=8) == [(8, 3, 32, 32)]
    assert torch.equal(torch.cat(list(calibration_batches(model, [images[:5], images[5:12]], batch=4))), images[:12])
    with pytest.raises(ValueError, match=r"calibration images must be \[N, 3, 28, 28\], got \[30, 3, 32, 32\]"):
        shapes([images], size=(3, 28, 28))
    shutil.copy(IMAGES / "cat/0000.png", tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert len(shapes(tmp_path)) == 1
    assert f"left out of the calibration: {tmp_path}/bad.png: not an image" in caplog.text
    (tmp_path / "0000.png").unlink()
    with pytest.raises(ValueError, match="no calibration images in"):
        shapes(tmp_path)


REMEMBERED = [[], 7, {"KEY": 7}, {"KEY": {}}, {"KEY": {"chosen": ["openvino"], "times": {}}}]
REMEMBERED += [{"KEY": {"chosen": ["openvino", False, None], "times": times}} for times in (None, [1], {"a": "b"})]
REMEMBERED += [{"KEY": {"chosen": chosen, "times": {}}} for chosen in (None, "abc", [[], {}, 1], ["tpu", False, None])]
REMEMBERED += [{"KEY": {"chosen": ["openvino", False, 4.0], "times": {}}}]


@pytest.mark.parametrize("content", REMEMBERED)
def test_a_remembered_choice_of_another_shape_is_made_again(content, model, images, choices, monkeypatch):
    monkeypatch.setattr(optimize_module, "_key", lambda *args: "KEY")
    monkeypatch.setattr(optimize_module, "BACKENDS", {"openvino": (lambda network, *_: network, ("fp32",))})
    choices.write_text(json.dumps(content))
    fast = optimize(model, images[:2])
    assert fast.backend == "openvino"
    assert json.loads(choices.read_text())["KEY"]["chosen"] == list(fast.chosen)


@pytest.fixture
def eager(monkeypatch):
    """An engine that needs nothing."""
    monkeypatch.setattr(optimize_module, "BACKENDS", {"inductor": (lambda network, *_: network, ("fp32",))})
    monkeypatch.setattr(optimize_module, "unavailable", lambda *_: None)


def test_an_optimised_model_is_of_its_process(model, images, eager):
    fast = optimize(nn.Sequential(model), images[:2])  # of any module
    for save in (pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(RuntimeError, match="belongs to this process and machine: call optimize where it runs"):
            save(fast)
    for copied in (copy.copy(fast), copy.deepcopy(fast)):
        assert torch.equal(copied(images[:2]), fast(images[:2]))


@pytest.mark.parametrize("wrong, got", [([1], "a list"), (None, "a NoneType"), (np.zeros((1, 3, 32, 32)), "a ndarray")])
def test_what_is_no_tensor_is_said(wrong, got, model, images, eager):
    with pytest.raises(ValueError, match="made for images of real numbers on the CPU, got"):
        optimize(model, images[:2])(images.to("meta"))
    with pytest.raises(ValueError, match=f"^made for images of Nx3x32x32, got {got}$"):
        optimize(model, images[:2])(wrong)


def test_a_model_of_one_channel(images, eager):
    model = timm.create_model(NAME, pretrained=True, in_chans=1).eval()
    fast = optimize(model, images[:2].mean(1, keepdim=True))
    [(_, classes)] = predict(fast, IMAGES / "cat/0000.png")
    assert classes[0][0] == "cat"
    assert next(calibration_batches(model, IMAGES)).shape == (1, 1, 32, 32)


def test_examples_that_are_no_batch(model, images):
    for example in (images[0], images[:0]):
        with pytest.raises(ValueError, match=r"the example must be a tensor of images \[N, in_chans, H, W\], got"):
            optimize(model, example)


def test_predicting_with_an_optimized_model(model, images):
    fast = optimize(model, images[:4], "inductor" if unavailable("openvino") else "openvino")
    [(_, classes)] = predict(fast, IMAGES / "cat/0000.png")
    [(_, expected)] = predict(model, IMAGES / "cat/0000.png")
    assert dict(classes) == pytest.approx(dict(expected), abs=1e-3)


needs_inductor = pytest.mark.skipif(unavailable("inductor") is not None, reason="there is no C++ compiler")


@needs_inductor
@torch._dynamo.config.patch(recompile_limit=2)
def test_each_model_of_a_process_is_compiled():
    counts, x = torch._dynamo.utils.counters["stats"], torch.randn(2, 3, 4, 4)
    for dim in (8, 16, 24):
        before = counts["unique_graphs"]
        fast = optimize(ConvMixer(dim, 1, 3, 2, num_classes=2), x, "inductor", fixed_batch=True)
        assert counts["unique_graphs"] == before + 2  # as it is, and folded
    assert torch.equal(torch.compile(fast)(x), fast(x))


@needs_inductor
def test_threads_that_meet_a_new_size_at_once_compile_it_once(model, images):
    fast = optimize(model, images[:4], "inductor")
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    threads = [threading.Thread(target=fast, args=[images[:1]]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts["unique_graphs"] <= before + 1  # none where an earlier test has compiled that size
