"""`optimize`: the same outputs, by other engines."""

import copy
import importlib.util

import pytest
import timm
import torch
import torch.nn as nn

from convmixer_timm.inference import optimize as optimize_module
from convmixer_timm.inference.folding import fold_norms
from convmixer_timm.inference.optimize import TOLERANCES, calibration_batches, optimize, unavailable

from ..conftest import IMAGES

NAME = "convmixer_128_4.e10_cifar10"


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
    with pytest.raises(ValueError, match="int8 needs calibration images"):
        optimize(model, images, precision="int8")
    with pytest.raises(ValueError, match="no calibration images in"):
        optimize(model, images, precision="int8", calibration=tmp_path)
    with pytest.raises(RuntimeError, match="inductor has no int8 here; openvino has"):
        optimize(model, images, "inductor", "int8", calibration=[images])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(RuntimeError, match=r"openvino not installed: pip install 'convmixer-timm\[openvino\]'"):
        optimize(model, images, "openvino")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(RuntimeError, match="no bf16 instructions"):
        optimize(model, images, precision="bf16")


def test_wrong_outputs_are_not_returned(model, images, monkeypatch):
    monkeypatch.setattr(optimize_module, "BACKENDS", {"inductor": (lambda *args: lambda x: model(x) + 1, ("fp32",))})
    with pytest.raises(RuntimeError, match="the outputs differ by"):
        optimize(model, images, "inductor")


def test_calibration_takes_loaders_and_folders(model, images):
    pairs = [(images[:20], torch.zeros(20)), (images[20:], torch.zeros(10))]
    assert torch.equal(torch.cat(list(calibration_batches(model, pairs))), images)
    assert len(list(calibration_batches(model, [torch.zeros(200, 3, 32, 32)] * 5))) == 2
