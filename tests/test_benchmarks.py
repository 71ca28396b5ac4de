"""The benchmarks run and draw; what they measure is theirs."""

import argparse
import csv
import platform
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(*args):
    done = subprocess.run([sys.executable, BENCHMARKS / "inference.py", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_inference_measures_what_matches(tmp_path):
    settings = ["--settings", "timm", "eager", "--precisions", "fp32"]
    path = tmp_path / "inference.csv"
    for batch, repeats in (("2", "3"), ("1", "1")):  # the second run appends
        columns = ["--columns", f"convmixer_128_4.e25_cifar10:32:{batch}", "--calls", "2", "--repeats", repeats]
        run(*columns, *settings, "--csv", str(path))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["backend"], row["infer_batch_size"]) for row in rows] == [
        ("timm", "2"),
        ("eager", "2"),
        ("timm", "1"),
        ("eager", "1"),
    ]
    for row in rows:
        assert float(row["slowest"]) <= float(row["infer_samples_per_sec"]) <= float(row["fastest"])
        assert float(row["difference"]) < 1e-4
        assert row["torch"] and row["cpu"]


@pytest.mark.parametrize(("precision", "folder"), [("fp32", ""), ("bf16", "tests/images"), ("int8", "tests/images")])
def test_inference_measures_optimize_in_every_precision(precision, folder, monkeypatch):
    from convmixer_timm.inference import engines, optimize

    if reason := engines.unavailable("openvino", precision):
        pytest.skip(reason)
    monkeypatch.syspath_prepend(BENCHMARKS)
    import inference

    monkeypatch.setattr(optimize, "_remembered", optimize._remembered)  # which the benchmark puts out of use
    monkeypatch.setattr(engines, "BACKENDS", {"openvino": engines.BACKENDS["openvino"]})
    monkeypatch.setattr(optimize, "BACKENDS", engines.BACKENDS)
    model = "convmixer_128_4.e25_cifar10"
    args = argparse.Namespace(model=model, img_size=32, batch_size=4, pretrained=[model], calibration="", accuracy="")
    args.calibration = folder and str(BENCHMARKS.parent / folder)
    run, answer = inference.prepare(args, "optimize", precision)
    assert answer["matches"] and answer["label"].startswith("optimize (openvino")
    assert run().shape == (4, 10)


@pytest.mark.parametrize(
    ("script", "args", "said"),
    [
        ("train_step", ["--model", "convmixer_25_8"], "no model 'convmixer_25_8': did you mean convmixer_256_8?"),
        ("train_step", ["--opt", "adamx"], "no optimizer 'adamx': did you mean adamax?"),
        ("train_step", ["--repeats", "0"], "a whole number of 1 or more, not '0'"),
        ("inference", ["--columns", "convmixer_256_8:32"], "MODEL:PIXELS:BATCH, not 'convmixer_256_8:32'"),
        ("inference", ["--columns"], "without --columns it draws what --csv has, and there is no such file"),
        ("finetune", [".", "--num-classes", "2"], ". has no folder train or val"),
        (
            "finetune",
            [".", "--num-classes", "2", "--model", "convmixer_256_8.e1"],
            "no checkpoint 'convmixer_256_8.e1'",
        ),
        ("pack", ["nowhere", "name"], "no folder nowhere"),
        ("epoch", ["finetune"], "invalid choice: 'finetune'"),
        ("clients", ["acelerate"], "no client 'acelerate': did you mean accelerate?"),
        ("cifar_folders", [".", "."], ". is there already, and not empty: name another folder, or remove it first"),
        ("cifar_folders", [".", "new"], ". has no cifar-10-batches-py as torchvision downloads it"),
    ],
)
def test_what_is_wrong_with_an_argument_is_said_in_a_line(script, args, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "argv", [script, *args])
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(BENCHMARKS / f"{script}.py"), run_name="__main__")
    assert error.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_split_is_not_laid_over_another(tmp_path):
    for number in range(4):
        (tmp_path / "all" / "cat").mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / "cat" / f"{number}.png").touch()
    command = [sys.executable, BENCHMARKS / "holdout.py", tmp_path / "all", tmp_path / "split", "--per-class"]
    subprocess.run([*command, "1"], check=True)
    again = subprocess.run([*command, "2"], capture_output=True, text=True)
    assert again.returncode == 2 and "is there already, and not empty" in again.stderr
    held_out, kept = (
        sorted(p.name for p in (tmp_path / "split" / part / "cat").iterdir()) for part in ("validation", "train")
    )
    assert len(held_out) == 1 and sorted(held_out + kept) == ["0.png", "1.png", "2.png", "3.png"]


def test_committed_results_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    before = (BENCHMARKS / "results/inference.csv").read_bytes()
    run("--columns", "--csv", str(BENCHMARKS / "results/inference.csv"), "--plots", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "accuracy.png",
        "growth.png",
        "share_of_peak.png",
        "throughput.png",
    ]
    for path in tmp_path.iterdir():
        assert Image.open(path).convert("L").getextrema()[0] < 100
    assert (BENCHMARKS / "results/inference.csv").read_bytes() == before


def test_train_step_times_training_and_evaluation(tmp_path):
    path = tmp_path / "steps.csv"
    options = ["--model", "convmixer_128_4", "--batch-size", "2", "--repeats", "1", "--precision", "fp32"]
    avx2 = ["--march", "haswell"] if platform.machine() == "x86_64" else ["--march", "native"]
    for extra in (["--evaluate"], [*avx2, "--opt", "nmuon"]):
        command = [sys.executable, BENCHMARKS / "train_step.py", *options, "--settings", "timm", "ours", *extra]
        subprocess.run([*command, "--csv", path], check=True, capture_output=True)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["loop"], row["code"]) for row in rows[::2]] == [("evaluation", "native"), ("training", avx2[1])]
    assert all(float(row["images_per_s"]) > 0 for row in rows)


def test_near_duplicates_are_found_at_any_size(tmp_path):
    (tmp_path / "few").mkdir(), (tmp_path / "many").mkdir()
    images = sorted(file for file in (Path(__file__).parent / "images").rglob("*") if file.is_file())[:4]
    for i, file in enumerate(images):
        with Image.open(file) as image:
            image.convert("RGB").save(tmp_path / "many" / f"{i}.png")
    with Image.open(images[2]) as image:
        image.convert("RGB").resize((100, 80)).save(tmp_path / "few" / "again.jpg")
    command = [sys.executable, BENCHMARKS / "near_duplicates.py", tmp_path / "few", tmp_path / "many"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "again.jpg" in out.splitlines()[0] and out.splitlines()[0].endswith("2.png")
    assert out.splitlines()[-1].startswith("above 0.9: 1 images")
