"""The study: its models differ in what their names say, and its scripts run at toy size."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

STUDY = Path(__file__).parent.parent / "benchmarks/study"


@pytest.fixture
def study(monkeypatch):
    """The scripts' modules."""
    monkeypatch.syspath_prepend(str(STUDY))
    import models
    import run

    return models, run


@pytest.fixture
def images(tmp_path):
    """Grey squares of ten shades, enough of them for a batch."""
    for part in ("train", "validation", "test"):
        for i in range(10):
            folder = tmp_path / "images" / part / f"grey{i}"
            folder.mkdir(parents=True)
            for j in range(13):
                Image.new("RGB", (32, 32), (20 * i + j,) * 3).save(folder / f"{j}.png")
    return tmp_path / "images"


def test_every_run_is_of_equal_cost_but_for_its_point(study):
    _, run = study
    names = sorted(path.stem for path in (STUDY / "runs").glob("*.yaml"))
    base = run.settings_of("base")
    equal = {**run.cost_of(base)}
    for name in names:
        settings = run.settings_of(name)
        differs = {key for key in settings if settings[key] != base.get(key)}
        assert differs <= {"model", "model_kwargs", "epochs", "lr_of"}, name
        assert settings.get("lr_of", name) in names
        cost = run.cost_of(settings)
        if not name.startswith(("kernel", "patch")):  # these can't be
            assert abs(cost["parameters"] / equal["parameters"] - 1) < 0.05, (name, cost)
            most = 0.2 if name.startswith("vit") else 0.08  # attention multiplies positions beside its parameters
            assert abs(cost["multiply_adds_M"] / equal["multiply_adds_M"] - 1) < most, (name, cost)


def test_the_points_are_what_is_said(study):
    models, _ = study
    x = torch.randn(2, 3, 28, 28)
    torch.manual_seed(0)
    base = models.study_convmixer(num_classes=10)
    for kwargs in ({"residual": "none"}, {"residual": "both"}, {"norm_first": True}):
        torch.manual_seed(0)
        changed = models.study_convmixer(num_classes=10, **kwargs)
        assert sum(p.numel() for p in changed.parameters()) == sum(p.numel() for p in base.parameters())
        assert not torch.allclose(changed(x), base(x))
    block = models.study_convmixer(residual="none").blocks[0]
    h = torch.randn(2, 128, 7, 7)
    assert torch.allclose(block(h), torch.nn.Sequential(*block[0], *block[1:])(h), atol=1e-5)
    first = models.study_convmixer(norm_first=True).blocks[0]
    assert isinstance(first[2], torch.nn.BatchNorm2d) and isinstance(first[3], torch.nn.GELU)
    assert isinstance(first[0].fn[1], torch.nn.BatchNorm2d) and isinstance(first[0].fn[2], torch.nn.GELU)


@pytest.mark.parametrize(
    "name, kwargs", [("mixer", {"embed_dim": 16, "num_blocks": 1}), ("vit", {"embed_dim": 24, "depth": 1})]
)
def test_shuffling_moves_whole_patches(study, name, kwargs):
    models, _ = study
    shuffle = models.Shuffled(4, 7)
    x = torch.arange(28 * 28.0).reshape(1, 1, 28, 28).expand(2, 3, -1, -1)
    y = shuffle(x)
    patches = {tuple(p.flatten().tolist()) for rows in x[0, 0].split(4) for p in rows.split(4, dim=1)}
    assert patches == {tuple(p.flatten().tolist()) for rows in y[0, 0].split(4) for p in rows.split(4, dim=1)}
    assert not torch.equal(x, y) and torch.equal(y[0], y[1])
    model = getattr(models, f"study_{name}")(num_classes=10, shuffled=True, **kwargs)
    assert model(x.contiguous()).shape == (2, 10)
    assert torch.equal(model.shuffle(x), y)  # the same for every model


def test_a_run_end_to_end(timm_scripts, images, tmp_path):
    command = [sys.executable, STUDY / "run.py", "--quick", "--data-dir", images, "--output", tmp_path / "out"]
    subprocess.run([*command, "base", "vit_shuffled"], check=True, capture_output=True)
    with (tmp_path / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["base", "vit_shuffled"]
    assert all(0 <= float(row["test_top1"]) <= 100 and float(row["seconds"]) > 0 for row in rows)
    with (tmp_path / "out/trials.csv").open() as file:
        trials = [row for row in csv.DictReader(file) if row["name"] == "base"]
    tried = {float(row["lr"]): float(row["held_out_top1"]) for row in trials}
    assert len(tried) == 3 and float(rows[0]["lr"]) == max(tried, key=lambda lr: tried[lr])
    assert (tmp_path / "out/plots/robustness.png").is_file()
    done = subprocess.run([sys.executable, STUDY / "run.py", "no_such"], capture_output=True, text=True)
    assert done.returncode == 2 and "no run no_such; there are base, " in done.stderr


def test_robustness_and_report(images, tmp_path):
    pytest.importorskip("matplotlib")
    command = [sys.executable, STUDY / "robustness.py", "--data-dir", images, "--results", tmp_path]
    subprocess.run([*command, "--models", "convmixer_128_4.e25_cifar10", "--images", "4"], check=True)
    with (tmp_path / "robustness.csv").open() as file:
        assert {row["corruption"] for row in csv.DictReader(file)} == {
            *("none", "noise", "blur", "contrast", "jpeg", "shift", "size")
        }
    (tmp_path / "results.csv").write_bytes((STUDY / "results.csv").read_bytes())
    report = [sys.executable, STUDY / "report.py", "--results", tmp_path]
    tables = subprocess.run(report, check=True, capture_output=True, text=True).stdout
    # What stands in the README is what comes out of the committed rows.
    readme = (STUDY / "README.md").read_text(encoding="utf-8")
    lines = [line for line in tables.splitlines() if line.startswith("| ")]
    assert lines and all(line in readme for line in lines)
    assert (tmp_path / "plots/robustness.png").is_file()
