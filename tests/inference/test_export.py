"""`convmixer-timm export`: files for other programs, compared with the model before they are there."""

import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch

from convmixer_timm.cli import main
from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.inference import export as export_module
from convmixer_timm.inference.agreement import TOLERANCES
from convmixer_timm.inference.calibration import calibration_batches
from convmixer_timm.inference.class_map import has_class_map
from convmixer_timm.inference.engines import unavailable
from convmixer_timm.inference.export import export

from ..conftest import IMAGES

NAME = "convmixer_128_4.e25_cifar10"
SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2"}
CASES = [
    (format, precision)
    for format, precisions in export_module.FORMATS.items()
    for precision in precisions
    if precision != "bf16" or unavailable("inductor", "bf16") is None
]


def read(format, file):
    """Metadata and a function, by means of the format's own library."""
    if format == "torch-export":
        extra = {"metadata.json": ""}
        program = torch.export.load(file, extra_files=extra)
        return json.loads(extra["metadata.json"]), program.module()
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        properties = session.get_modelmeta().custom_metadata_map
        return properties, lambda x: torch.tensor(session.run(None, {"images": x.numpy()})[0])
    openvino = pytest.importorskip("openvino")
    network = openvino.Core().read_model(file)
    properties = {key: value.value for key, value in network.get_rt_info()["convmixer_timm"].items()}
    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return properties, lambda x: torch.tensor(compiled(x.numpy())[0])


@pytest.mark.parametrize("format, precision", CASES)
def test_file_computes_the_same_and_knows_its_images(format, precision, tmp_path, capsys):
    file = tmp_path / f"model{SUFFIXES[format]}"
    calibration = ["--calibration", str(IMAGES)] if precision == "int8" else []
    args = ["--format", format, "--precision", precision, "--dynamic-batch", *calibration, "-o", str(file)]
    assert main(["export", NAME, *args]) == 0
    assert "images of Nx3x32x32, outputs compared" in capsys.readouterr().out
    parts = {file.name} | ({"model.bin"} if format == "openvino" else set())
    assert {path.name for path in tmp_path.iterdir()} == parts

    metadata, run = read(format, file)
    metadata = {k: json.loads(v) if isinstance(v, str) and format != "torch-export" else v for k, v in metadata.items()}
    assert metadata["architecture"] == "convmixer_128_4"
    assert metadata["precision"] == precision
    assert metadata["input_size"] == [3, 32, 32]
    assert metadata["mean"] == [0.4914, 0.4822, 0.4465]
    assert metadata["crop_pct"] == 1.0
    assert metadata["interpolation"] == "bicubic"
    assert metadata["label_names"][8] == "ship"

    model = timm.create_model(NAME, pretrained=True).eval()
    images = torch.cat(list(calibration_batches(model, IMAGES)))
    with torch.no_grad():
        expected = model(images)
        for batch in (1, 7, 30):
            difference = (run(images[:batch]) - expected[:batch]).abs().max()
            assert difference <= TOLERANCES[precision] * expected.abs().max()


def test_fixed_batch_of_a_local_checkpoint(tmp_path, capsys):
    timm.models.save_for_hf(timm.create_model("convmixer_128_4", num_classes=2), str(tmp_path), safe_serialization=True)
    file = tmp_path / "out" / "model.pt2"
    assert main(["export", f"local-dir:{tmp_path}", "--format", "torch-export", "-o", str(file)]) == 0
    assert "images of 1x3x32x32" in capsys.readouterr().out
    _, run = read("torch-export", file)
    assert run(torch.zeros(1, 3, 32, 32)).shape == (1, 2)
    with pytest.raises((RuntimeError, AssertionError)):
        run(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize(
    "args, message",
    [
        (["--format", "onnx", "-o", "model.xml"], "must end in .onnx"),
        (["--format", "onnx", "--precision", "bf16", "-o", "model.onnx"], "written in fp32 or int8"),
        (["--format", "openvino", "--precision", "int8", "-o", "model.xml"], "int8 needs calibration images"),
    ],
)
def test_bad_arguments_are_named(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", NAME, *args]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_never_appears(tmp_path, monkeypatch):
    model = timm.create_model(NAME, pretrained=True).eval()
    target = tmp_path / "model.pt2"
    target.write_text("an older file")
    write, load = export_module._FORMATS["torch-export"]
    broken = {"torch-export": (write, lambda file: lambda images: load(file)(images) + 1)}
    monkeypatch.setattr(export_module, "_FORMATS", broken)
    with pytest.raises(RuntimeError, match="nothing written"):
        export(model, target, "torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert target.read_text() == "an older file"


@pytest.mark.parametrize("format, part", [("onnx", "m.onnx"), ("openvino", "m.xml"), ("openvino", "m.bin")])
def test_a_folder_is_not_written_into(format, part, tmp_path, capsys):
    (tmp_path / part).mkdir()
    assert main(["export", NAME, "--format", format, "-o", str(tmp_path / f"m{SUFFIXES[format]}")]) == 1
    assert capsys.readouterr().err == f"convmixer-timm: error: {tmp_path / part} is a folder: name a file to write\n"
    assert [path.name for path in tmp_path.rglob("*")] == [part]


@pytest.mark.parametrize(
    "command, below",
    [
        (["export", NAME, "--format", "torch-export"], "model.pt2"),
        (["convert", str(WEIGHTS_DIR / NAME / "model.safetensors")], "model.safetensors"),
        (["plot", NAME], "plots"),
        (["page", NAME], "page"),
    ],
)
def test_a_file_in_a_folders_place_is_named(command, below, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    option = [] if command[0] == "convert" else ["-o"]
    assert main([*command, *option, str(file / below)]) == 1
    line = capsys.readouterr().err
    assert re.match(rf"convmixer-timm: error: {file}:? is a file", line) and line.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_another_programs_file_is_left_alone(tmp_path):
    if reason := unavailable("openvino"):
        pytest.skip(reason)
    model = timm.create_model("convmixer_128_4")
    (tmp_path / "m.bin").write_text("precious")
    with pytest.raises(ValueError, match=r"m\.bin would be replaced, and is no part of an earlier export"):
        export(model, tmp_path / "m.xml", "openvino")
    assert (tmp_path / "m.bin").read_text() == "precious"
    for _ in range(2):  # an export of one's own is replaced
        export(model, tmp_path / "n.xml", "openvino")


@pytest.mark.parametrize(
    "labels, message",
    [
        ("abcdefghij", "a list of names"),
        ([*"abc"], "has 10 classes, and the labels are 3"),
        ([*"abcdefghia"], "more than once: a"),
    ],
)
def test_labels_must_fit(labels, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(timm.create_model("convmixer_128_4"), tmp_path / "m.pt2", "torch-export", labels=labels)
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_another_precision_is_not_written(tmp_path):
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(ValueError, match=f"from fp32 on the CPU, and this one is {dtype}"):
            export(timm.create_model("convmixer_128_4").to(dtype), tmp_path / "m.pt2", "torch-export")


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_of_other_channels(channels, tmp_path):
    model = timm.create_model(NAME, pretrained=True, in_chans=channels)
    metadata = export(model, tmp_path / "m.pt2", "torch-export")
    assert metadata["input_size"] == (channels, 32, 32)
    assert metadata["mean"] == pytest.approx([sum((0.4914, 0.4822, 0.4465)) / 3] * channels)
    assert len(metadata["std"]) == channels
    assert has_class_map(model)


@pytest.mark.skipif(unavailable("openvino", "int8") is not None, reason="NNCF is not installed")
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_only_the_result_is_on_stdout(format, tmp_path, capfd):
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "images").symlink_to(IMAGES)
    file = str(tmp_path / f"m{SUFFIXES[format]}")
    args = ["--format", format, "--precision", "int8", "--calibration", str(tmp_path), "-o", file]
    assert main(["export", NAME, *args]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_calibration_batches_of_any_size_for_one_image_at_a_time(tmp_path):
    if unavailable("openvino", "int8") is not None:
        pytest.skip("NNCF is not installed")
    model = timm.create_model(NAME, pretrained=True).eval()
    images = torch.cat(list(calibration_batches(model, IMAGES)))
    export(model, tmp_path / "m.xml", "openvino", "int8", calibration=images.split(20))
    assert (tmp_path / "m.bin").is_file()


@pytest.mark.parametrize("format, name", [("onnx", "a.onnx"), ("torch-export", "a.pt2")])
def test_a_model_in_training_stays_in_training(format, name, tmp_path):
    if format == "onnx" and (reason := unavailable("onnxruntime")):
        pytest.skip(reason)
    model = timm.create_model("convmixer_128_4", num_classes=4, drop_rate=0.5).train()
    model.stem.eval()  # frozen by its owner
    modes = [module.training for module in model.modules()]
    export(model, tmp_path / name, format, class_map=format == "onnx")
    assert has_class_map(model)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.skipif(unavailable("openvino", "int8") is not None, reason="no OpenVINO or no NNCF")
def test_nobody_is_told_of_it(tmp_path):
    # OpenVINO and NNCF keep a number for each user in that folder, for what they report.
    told = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}
    args = ["--format", "openvino", "--precision", "int8", "--calibration", str(IMAGES), "-o", str(tmp_path / "m.xml")]
    command = [sys.executable, "-m", "convmixer_timm", "export", NAME, *args]
    subprocess.run(command, env={**told, "HOME": str(tmp_path)}, check=True, capture_output=True)
    assert (tmp_path / "m.bin").is_file() and not (tmp_path / "intel").exists()
