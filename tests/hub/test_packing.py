"""A training run packed as a checkpoint folder."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.hub.cards import Evaluation, adopt_card, make_card, merge_cards
from convmixer_timm.hub.packing import _mend_config, pack
from convmixer_timm.hub.sources import read_run
from convmixer_timm.training.data_check import Data, Split
from convmixer_timm.training.record import Record

SOURCE = WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"
EVALUATION = Evaluation(top1=81.25, top5=98.5, data="those")


def pack_run(run, target, **kwargs):
    pack(read_run(run, **kwargs), target)


def make_run(folder, classes=None, name="insects", **changes):
    """An output folder as timm's train.py leaves it, with its machine's paths in the arguments.

    With `classes` as the launcher's, which adds the record of what was trained on.
    """
    folder.mkdir(parents=True)
    args = yaml.safe_load((SOURCE / "args.yaml").read_text())
    args |= {"data_dir": str(folder / "images"), "output": str(folder.parent), "resume": str(folder / "last.pth.tar")}
    args |= changes
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    rows = [f"{i},{2 - i / 20},{1.5 - i / 20},{60.25 + i},{96 + i / 10},{0.01 - i / 2400}" for i in range(25)]
    (folder / "summary.csv").write_text("\n".join(["epoch,train_loss,eval_loss,eval_top1,eval_top5,lr", *rows, ""]))
    if classes:
        splits = {split: Split(f"/data/{name}/{split}", 40, split) for split in ("train", "validation")}
        data = Data(name, classes, splits, "validation", len(classes))
        Record.of(Namespace(**args), data).write(folder)
    torch.manual_seed(0)
    kwargs = args["model_kwargs"] if args["model"].startswith("convmixer_128_4") else {}
    model = timm.create_model("convmixer_128_4", num_classes=args["num_classes"], in_chans=args["in_chans"], **kwargs)
    torch.save({"state_dict": model.state_dict(), "epoch": 9, "args": Namespace(**args)}, folder / "last.pth.tar")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", model_kwargs={"depth": 2}, num_classes=10)


def test_packed_run_loads_and_has_its_card(run, tmp_path):
    target = tmp_path / "convmixer_128_4.mine"
    for _ in range(2):  # the second replaces the first
        source = read_run(run, labels=[*"abcdefghij"])
        training = replace(source.training, cost=", 2.0 hours on one core")
        pack(replace(source, training=training, evaluation=EVALUATION), target)
    files = sorted(p.name for p in target.iterdir())
    assert [f for f in files if not f.endswith(".png")] == [
        "README.md",
        "args.yaml",
        "config.json",
        "model.safetensors",
        "summary.csv",
    ]
    assert [f for f in files if f.endswith(".png")] == ["curve.png", "depthwise_kernels.png", "patch_filters.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["convmixer_128_4.mine", "run"]
    model = timm.create_model(f"local-dir:{target}", pretrained=True)
    assert len(model.blocks) == 2
    assert model.pretrained_cfg["tag"] == "mine"
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
    assert "2.0 hours on one core" in card.text
    assert "from the weights of" not in card.text
    assert model.pretrained_cfg["label_names"] == [*"abcdefghij"]


def test_a_card_says_how_to_repeat_a_run_that_was_resumed_with_other_settings(run, tmp_path):
    target = tmp_path / "convmixer_128_4.mine"
    source = read_run(run, labels=[*"abcdefghij"])
    pack(replace(source, training=replace(source.training, again="Twice, the second time in full size.")), target)
    card = (target / "README.md").read_text()
    assert "Twice, the second time in full size." in card
    assert "--config args.yaml" not in card


def test_a_card_starts_as_many_processes_as_trained_together(tmp_path):
    """Each has a batch of its own, so that one alone would train by smaller ones."""
    run = make_run(tmp_path / "run", classes=[*"abcdefghij"], num_classes=10)
    for processes, command in ((1, "convmixer-timm"), (4, "torchrun --nproc-per-node=4 -m convmixer_timm")):
        record = Record.read(run)
        replace(record, processes=processes).write(run)
        pack_run(run, tmp_path / str(processes))
        card = (tmp_path / str(processes) / "README.md").read_text()
        assert f"\n{command} run train --config args.yaml --data-dir DATA\n" in card


def test_averaged_weights_and_the_best_epoch(run, tmp_path):
    last = torch.load(run / "last.pth.tar", weights_only=False)
    averaged = {k: v + 1 if v.is_floating_point() else v for k, v in last["state_dict"].items()}
    torch.save({**last, "state_dict_ema": averaged}, run / "last.pth.tar")
    for epoch, best in ((4, False), (24, True)):
        torch.save({**last, "epoch": epoch}, run / "model_best.pth.tar")
        pack_run(run, tmp_path / "best")
        card = (tmp_path / "best" / "README.md").read_text()
        assert (f"epoch {epoch + 1} of 25, the best on the validation images" in card) == best
        assert f"| {'84.25' if best else '64.25'} |" in card
    for ema, name, bias in ((None, "ema", averaged), (True, "ema", averaged), (False, "raw", last["state_dict"])):
        pack_run(run, tmp_path / name, checkpoint="last.pth.tar", ema=ema)
        assert torch.equal(load_file(tmp_path / name / "model.safetensors")["head.bias"], bias["head.bias"])
        assert ("averaged (EMA)" in (tmp_path / name / "README.md").read_text()) == (name == "ema")


def test_averaged_weights_that_train_py_did_not_measure(tmp_path):
    run = make_run(tmp_path / "run", num_classes=10, model_ema=True, model_ema_force_cpu=True)
    last = torch.load(run / "last.pth.tar", weights_only=False)
    torch.save({**last, "state_dict_ema": last["state_dict"]}, run / "last.pth.tar")
    source = read_run(run)
    assert source.evaluation is not None and "averaged" not in source.training.weights
    source = read_run(run, ema=True)
    assert source.evaluation is None and "averaged (EMA)" in source.training.weights


def test_split_batchnorm_leaves_its_other_statistics(tmp_path):
    run = make_run(tmp_path / "run", num_classes=10)
    last = torch.load(run / "last.pth.tar", weights_only=False)
    last["state_dict"]["stem.2.aux_bn.0.weight"] = torch.ones(128)
    torch.save(last, run / "last.pth.tar")
    assert "stem.2.aux_bn.0.weight" not in read_run(run).model.state_dict()


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"model": "convmixer_128_4.e25_cifar10", "pretrained": True}, "convmixer_128_4.e25_cifar10"),
        ({"initial_checkpoint": "somewhere/mine.safetensors"}, "mine.safetensors"),
        (
            {"pretrained": True, "model_kwargs": {"pretrained_cfg_overlay": {"file": "/somewhere/own.pth"}}},
            "own.pth",
        ),
    ],
)
def test_card_says_what_the_run_started_from(tmp_path, changes, start):
    run = make_run(tmp_path / "run", **changes)
    pack_run(run, tmp_path / "convmixer_128_4.tuned", labels=[*"abcdefghij"])
    packed = tmp_path / "convmixer_128_4.tuned"
    assert f", from the weights of `{start}`." in (packed / "README.md").read_text()
    assert not [file.name for file in packed.iterdir() if b"somewhere" in file.read_bytes()]


def test_preprocessing_and_channels_travel(tmp_path):
    size = [1, 48, 48]
    changes = {"in_chans": 1, "num_classes": 3, "input_size": size, "mean": [0.5], "std": [0.25], "crop_pct": 0.9}
    run = make_run(tmp_path / "run", **changes)
    pack_run(run, tmp_path / "grey")
    model = timm.create_model(f"local-dir:{tmp_path / 'grey'}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    assert tuple(config["input_size"]) == (1, 48, 48)
    assert (config["mean"], config["std"], config["crop_pct"]) == ([0.5], [0.25], 0.9)
    assert model(torch.zeros(1, 1, 48, 48)).shape == (1, 3)
    assert model.pretrained_cfg["label_names"] == ["0", "1", "2"]  # CIFAR-10's would be wrong


def test_a_description_keeps_its_only_number_of_classes(tmp_path):
    folder = WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"
    config = json.loads((folder / "config.json").read_text())
    del config["num_classes"], config["pretrained_cfg"]["num_classes"]
    config["model_args"] = {"num_classes": 10}
    (tmp_path / "config.json").write_text(json.dumps(config))
    _mend_config(tmp_path / "config.json")
    mended = json.loads((tmp_path / "config.json").read_text())
    assert (mended["num_classes"], mended["model_args"]) == (10, {})
    _mend_config(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text()) == mended


def test_cards_merge():
    model = timm.create_model("convmixer_128_4")
    new = make_card(model, "new", "hf-hub:a/new")
    assert merge_cards(new, new) == new
    foreign = "---\nlicense: bsd\n---\nWritten by hand.\n"
    merged = merge_cards(new, foreign)
    assert merged.index("Written by hand.") < merged.index("# new")
    assert "license: bsd" in merged and "library_name: timm" in merged
    assert merge_cards(new, merged) == merged
    adopted = adopt_card(foreign, new)
    assert "# new" not in adopted and "Written by hand." in adopted and "license: bsd" in adopted
    assert merge_cards(adopted, adopted) == adopted == adopt_card(adopted, new)


def test_what_is_missing_is_named_and_the_old_folder_stays(run, tmp_path):
    target = tmp_path / "convmixer_128_4.mine"
    pack_run(run, target)
    with pytest.raises(ValueError, match="no averaged weights"):
        pack_run(run, target, ema=True)
    with pytest.raises(ValueError, match="10 classes, and the labels are 2"):
        pack_run(run, target, labels=["ant", "bee"])
    (run / "last.pth.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"no last\.pth\.tar"):
        pack_run(run, target)
    assert (target / "model.safetensors").exists()


def test_names_from_an_ascii_locale_are_what_they_were(tmp_path):
    """Python gives the bytes of other letters as surrogates there."""
    run = make_run(tmp_path / "run", model_kwargs={}, num_classes=2, data_dir="/d\udcc3\udca4t\udcff")
    pack_run(run, tmp_path / "packed", labels=["b", "ün"])
    assert "on dät\\xff" in (tmp_path / "packed/README.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "packed/config.json").read_text())["label_names"] == ["b", "ün"]
    assert yaml.safe_load((tmp_path / "packed/args.yaml").read_text())["data_dir"] == "dät\\xff"
