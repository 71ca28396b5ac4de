"""A training run packed as a checkpoint folder."""

import shutil
from argparse import Namespace

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.weights import Evaluation, pack_run

SOURCE = WEIGHTS_DIR / "convmixer_128_4.e10_cifar10"
EVALUATION = Evaluation(top1=81.25, top5=98.5, train_data="these", test_data="those", machine="one core", hours=2.0)


@pytest.fixture
def run(tmp_path):
    """An output folder as timm's train.py leaves it, with its machine's paths in the arguments."""
    folder = tmp_path / "run"
    folder.mkdir()
    args = yaml.safe_load((SOURCE / "args.yaml").read_text())
    args |= {"data_dir": str(tmp_path / "images"), "output": str(tmp_path), "resume": str(folder / "last.pth.tar")}
    args |= {"model_kwargs": {"depth": 2}, "num_classes": 10}
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    shutil.copy(SOURCE / "summary.csv", folder)
    model = timm.create_model("convmixer_128_4", depth=2)
    torch.save({"state_dict": model.state_dict(), "epoch": 9, "args": Namespace(**args)}, folder / "last.pth.tar")
    return folder


def test_packed_run_loads_and_has_its_card(run, tmp_path):
    target = tmp_path / "convmixer_128_4.mine"
    for _ in range(2):  # the second replaces the first
        pack_run(run, target, EVALUATION)
    files = sorted(p.name for p in target.iterdir())
    assert files == ["README.md", "args.yaml", "config.json", "model.safetensors", "summary.csv"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["convmixer_128_4.mine", "run"]
    model = timm.create_model(f"local-dir:{target}", pretrained=True)
    assert len(model.blocks) == 2
    weights = torch.load(run / "last.pth.tar", weights_only=False)["state_dict"]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not [p.name for p in target.iterdir() if str(tmp_path).encode() in p.read_bytes()]
    assert yaml.safe_load((target / "args.yaml").read_text())["resume"] == ""  # else the card's command would fail
    card = ModelCard.load(target / "README.md")
    assert card.data.license == "mit"
    assert card.data.library_name == "timm"
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {
        "Top 1 Accuracy": 81.25,
        "Top 5 Accuracy": 98.5,
    }
    assert "import convmixer_timm" in card.text
    assert "| 81.25 | 98.50 | those |" in card.text


def test_what_is_missing_is_named_and_the_old_folder_stays(run, tmp_path):
    target = tmp_path / "convmixer_128_4.mine"
    pack_run(run, target, EVALUATION)
    with pytest.raises(ValueError, match=r"named convmixer_128_4\.TAG"):
        pack_run(run, tmp_path / "convmixer_256_8.mine", EVALUATION)
    with pytest.raises(ValueError, match="no averaged weights"):
        pack_run(run, target, EVALUATION, ema=True)
    (run / "last.pth.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"no last\.pth\.tar"):
        pack_run(run, target, EVALUATION)
    assert (target / "model.safetensors").exists()
