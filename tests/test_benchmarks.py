"""The benchmarks run and draw; what they measure is theirs."""

import csv
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
    settings = ["--settings", "timm", "channels-last", "--precisions", "fp32", "--repeats", "3"]
    path = tmp_path / "inference.csv"
    for batch in ("2", "1"):  # the second run appends
        columns = ["--columns", f"convmixer_128_4.e10_cifar10:32:{batch}", "--calls", "2"]
        run(*columns, *settings, "--csv", str(path))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["backend"], row["infer_batch_size"]) for row in rows] == [
        ("timm", "2"),
        ("channels-last", "2"),
        ("timm", "1"),
        ("channels-last", "1"),
    ]
    for row in rows:
        assert float(row["slowest"]) <= float(row["infer_samples_per_sec"]) <= float(row["fastest"])
        assert float(row["difference"]) < 1e-4
        assert row["torch"] and row["cpu"]


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
