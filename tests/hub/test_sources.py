"""Sources of a publish that are not quite what they should be, and what their cards may say."""

import csv
import json

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard

import convmixer_timm
from convmixer_timm.cli import main
from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.hub.cards import BEGIN, END, merge_cards
from convmixer_timm.hub.packing import pack
from convmixer_timm.hub.sources import read_run, read_source
from convmixer_timm.training.record import Record

from ..conftest import IMAGES
from .test_packing import make_run

NAMES = [*"abcdefghij"]


def card_of(run, tmp_path, **kwargs):
    pack(read_run(run, **kwargs), tmp_path / "packed")
    return ModelCard.load(tmp_path / "packed" / "README.md")


def fails(*args, capsys):
    """The one line of a publish that has to fail."""
    assert main(["publish", *map(str, args), "--repo-id", "ann/x", "--dry-run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_names_are_those_of_the_record(tmp_path):
    """And never those that a folder has by now."""
    for name in ("wasp", "fly"):
        (tmp_path / "insects/train" / name).mkdir(parents=True)
    run = make_run(tmp_path / "run", ["ant", "bee"], data_dir=str(tmp_path / "insects"), num_classes=2)
    assert read_run(run).labels == ["ant", "bee"]
    (run / "args.yaml").write_text("")  # the record has the arguments, too
    assert read_run(run).labels == ["ant", "bee"]
    (run / "run.json").unlink()
    with pytest.raises(ValueError, match="names no model"):
        read_run(run)


def test_a_run_predicts_before_it_is_published(tmp_path, capsys):
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2, model_kwargs={"depth": 2})
    (run / "summary.csv").unlink()  # which tells nothing of the model
    assert main(["predict", str(IMAGES / "cat"), "--model", f"local-dir:{run}", "--format", "json"]) == 0
    assert {row["label"] for row in json.loads(capsys.readouterr().out)[0]["classes"]} == {"ant", "bee"}
    model = convmixer_timm.load_model(f"local-dir:{run}")
    assert not model.training and len(model.blocks) == 2
    weights = torch.load(run / "last.pth.tar", weights_only=False)["state_dict"]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    (run / "run.json").unlink()
    assert convmixer_timm.class_names(convmixer_timm.load_model(f"local-dir:{run}")) == ["0", "1"]
    (run / "last.pth.tar").unlink()
    with pytest.raises(FileNotFoundError, match="that finished an epoch: it has no last"):
        convmixer_timm.load_model(f"local-dir:{run}")


def test_a_run_without_a_record_has_no_names(tmp_path, capsys):
    (tmp_path / "insects/train/ant").mkdir(parents=True)
    run = make_run(tmp_path / "run", data_dir=str(tmp_path / "insects"), num_classes=2)
    assert read_run(run).labels is None
    pack(read_run(run), tmp_path / "packed")
    assert "--labels" in capsys.readouterr().err
    model = convmixer_timm.load_model(f"local-dir:{tmp_path / 'packed'}")
    assert convmixer_timm.class_names(model) == ["0", "1"]
    cifar = make_run(tmp_path / "cifar", dataset="torch/cifar10", num_classes=10)
    assert read_run(cifar).labels[0] == "airplane"  # that data set's classes are known


@pytest.mark.parametrize("classes", [10, 1000])
def test_equal_counts_are_not_equal_classes(classes, tmp_path):
    """Ten are not CIFAR-10's, a thousand not ImageNet's."""
    model = timm.create_model("convmixer_128_4", num_classes=classes)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    pack(read_source(tmp_path / "own.pth", "convmixer_128_4"), tmp_path / "convmixer_128_4.in1k")
    loaded = convmixer_timm.load_model(f"local-dir:{tmp_path / 'convmixer_128_4.in1k'}")
    assert convmixer_timm.class_names(loaded) == [str(i) for i in range(classes)]


def test_imagenets_names_are_its_weights(tmp_path):
    model = timm.create_model("convmixer_768_32", num_classes=1000, depth=1, dim=8)
    model.pretrained_cfg["tag"] = "in1k"
    assert convmixer_timm.class_names(model)[0].startswith("tench")
    model.pretrained_cfg["tag"] = "mine"
    assert convmixer_timm.class_names(model)[0] == "0"


@pytest.mark.parametrize("inside", [True, False])
def test_averaged_checkpoints(inside, tmp_path):
    """avg_checkpoints writes the weights alone."""
    run = make_run(tmp_path / "run", NAMES, num_classes=10)
    weights = torch.load(run / "last.pth.tar", weights_only=False)["state_dict"]
    file = (run if inside else tmp_path) / "averaged.pth"
    torch.save(weights, file)
    source = read_source(file, None if inside else "convmixer_128_4", NAMES)
    assert torch.equal(source.model.head.weight, weights["head.weight"])
    assert source.evaluation is None  # of these weights nothing was measured
    if inside:
        assert "averaged.pth" in source.training.weights


def test_a_checkpoint_without_a_classifier(tmp_path, capsys):
    run = make_run(tmp_path / "run", NAMES, num_classes=10)
    stored = torch.load(run / "last.pth.tar", weights_only=False)
    stored["state_dict"] = {k: v for k, v in stored["state_dict"].items() if not k.startswith("head")}
    torch.save(stored, run / "last.pth.tar")
    torch.save(stored["state_dict"], tmp_path / "own.pth")
    assert "no classifier" in fails(run, capsys=capsys)
    assert "no classifier" in fails(tmp_path / "own.pth", "--model", "convmixer_128_4", capsys=capsys)


@pytest.mark.parametrize("text", ["", "[]", "epochs: 3\n", "model: 3\n", "model: [1\n", "model: convmixer_1_1\n"])
def test_arguments_that_are_none(text, tmp_path, capsys):
    run = make_run(tmp_path / "run", num_classes=10)
    (run / "args.yaml").write_text(text)
    assert "args.yaml" in fails(run, capsys=capsys)


def test_few_arguments_are_enough(tmp_path):
    run = make_run(tmp_path / "run", num_classes=10)
    (run / "args.yaml").write_text("model: convmixer_128_4\n")
    assert read_run(run).model.num_classes == 10


@pytest.mark.parametrize("text", ["", "epoch,train_loss\n", "nonsense", "\n\n"])
def test_a_history_that_is_none(text, tmp_path, capsys):
    run = make_run(tmp_path / "run", NAMES, num_classes=10)
    (run / "summary.csv").write_text(text)
    assert "summary.csv" in fails(run, capsys=capsys)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": 3}, {"epoch": 1}, torch.zeros(2), {}])
def test_a_checkpoint_that_is_none(content, tmp_path, capsys):
    run = make_run(tmp_path / "run", NAMES, num_classes=10)
    torch.save(content, run / "last.pth.tar")
    fails(run, capsys=capsys)


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"architecture": "convmixer_1_1", "pretrained_cfg": {}}'])
def test_a_packed_folder_that_is_none(config, tmp_path, capsys):
    pack(read_run(make_run(tmp_path / "run", NAMES, num_classes=10)), tmp_path / "packed")
    (tmp_path / "packed/config.json").write_text(config)
    fails(tmp_path / "packed", capsys=capsys)


def test_figures_of_few_classes(tmp_path):
    for classes, shown in ((["ant", "bee"], False), ([*"abcde"], False), ([*"abcdef"], True)):
        run = make_run(tmp_path / f"run{len(classes)}", classes, num_classes=len(classes))
        card = card_of(run, tmp_path)
        assert ("Top 5 Accuracy" in {r.metric_name for r in card.data.eval_results}) == shown
        assert ("top-5" in card.text) == shown


@pytest.mark.parametrize(
    "dataset, hub, shown",
    [
        ("", None, "insects"),
        ("torch/image_folder", None, "insects"),
        ("torch/cifar10", ["uoft-cs/cifar10"], "cifar10"),
        ("hfds/ann/insects", ["ann/insects"], "ann/insects"),
        ("hfds/insects", None, "insects"),
        ("wds/insects", None, "insects"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_data_sets_as_the_hub_names_them(dataset, hub, shown, recorded, tmp_path):
    name = "insects" if dataset == "torch/image_folder" else dataset or "insects"
    if not recorded and dataset == "torch/image_folder":
        shown = "image_folder"
    run = make_run(tmp_path / "run", NAMES if recorded else None, name, dataset=dataset, data_dir="/d/insects")
    if recorded:
        assert Record.read(run).data.name == name
    card = card_of(run, tmp_path, labels=NAMES)
    assert card.data.datasets == hub
    assert {r.dataset_type for r in card.data.eval_results} == set(hub or ["imagefolder"])
    assert f"epochs on {shown}" in card.text
    assert f"| {shown}, {'test' if shown == 'cifar10' else 'validation'}" in card.text


@pytest.mark.parametrize(
    "model, pretrained, base",
    [
        ("convmixer_128_4.e25_cifar10", True, None),  # comes with this package, and is on no Hub
        ("convmixer_768_32.in1k", True, "timm/convmixer_768_32.in1k"),
        ("convmixer_768_32.in1k", False, None),
    ],
)
def test_the_model_that_it_began_with(model, pretrained, base, tmp_path):
    kwargs = {"depth": 4, "dim": 128, "kernel_size": 5, "patch_size": 2}
    changes = {"model": model, "pretrained": pretrained, "num_classes": 10, "model_kwargs": kwargs}
    metadata = card_of(make_run(tmp_path / "run", NAMES, **changes), tmp_path).data.to_dict()
    assert metadata.get("base_model") == base
    assert metadata.get("base_model_relation") == ("finetune" if base else None)


def test_a_new_base_takes_the_old_ones_place():
    old, new = (f"---\nbase_model: ann/{name}\nlibrary_name: timm\nlicense: mit\n---\n{name}\n" for name in "ab")
    assert "base_model: ann/b" in merge_cards(new, old)


def test_a_base_that_an_earlier_publish_wrote_goes_with_its_weights(tmp_path):
    kwargs = {"depth": 4, "dim": 128, "kernel_size": 5, "patch_size": 2}
    changes = {"model": "convmixer_768_32.in1k", "pretrained": True, "num_classes": 10, "model_kwargs": kwargs}
    old = str(
        card_of(make_run(tmp_path / "tuned", NAMES, "torch/cifar10", dataset="torch/cifar10", **changes), tmp_path)
    )
    assert "base_model: timm/convmixer_768_32.in1k" in old and "uoft-cs/cifar10" in old
    new = str(card_of(make_run(tmp_path / "plain", NAMES, num_classes=10), tmp_path))
    merged = ModelCard(merge_cards(new, old)).data.to_dict()
    assert "base_model" not in merged and "base_model_relation" not in merged and "datasets" not in merged
    own = old.replace("datasets:\n", "datasets:\n- ann/own\n").replace("license: mit", "license: mit\npinned: true")
    assert ModelCard(merge_cards(new, own)).data.to_dict()["datasets"] == ["ann/own"]


@pytest.mark.parametrize("option", ["initial_checkpoint", "pretrained_path"])
def test_the_file_that_it_began_with(option, tmp_path):
    changes = {
        "model": "convmixer_128_4.e25_cifar10",
        "pretrained": True,
        "num_classes": 10,
        option: "/home/ann/own.pth",
    }
    text = card_of(make_run(tmp_path / "run", NAMES, **changes), tmp_path).text
    assert "from the weights of `own.pth`" in text and "/home/ann" not in text
    random = card_of(make_run(tmp_path / "random", NAMES, **{**changes, "pretrained": False}), tmp_path).text
    assert ("from the weights of" in random) == (option == "initial_checkpoint")  # train.py passes over the other


def test_a_local_folder_that_it_began_with_is_no_address(tmp_path):
    folder = WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"
    run = make_run(tmp_path / "run", NAMES, model=f"local-dir:{folder}", pretrained=True, num_classes=10)
    pack(read_run(run), tmp_path / "packed")
    assert "from the weights of `local-dir:convmixer_128_4.e25_cifar10`" in (tmp_path / "packed/README.md").read_text()
    for name in ("README.md", "args.yaml"):
        assert str(folder) not in (tmp_path / "packed" / name).read_text()


def test_the_variant_that_is_named_has_to_be_its_own(tmp_path):
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2)
    assert read_source(run / "last.pth.tar", "convmixer_128_4").labels == ["ant", "bee"]
    for path in (run, run / "last.pth.tar", WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"):
        with pytest.raises(ValueError, match="is a convmixer_128_4, and --model says convmixer_256_8: leave that out"):
            read_source(path, "convmixer_256_8")


def test_a_history_with_undecodable_bytes(tmp_path):
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2)
    content = (run / "summary.csv").read_bytes()
    (run / "summary.csv").write_bytes(content + b"\xff\xfe,1\r\n")
    assert read_run(run).evaluation is not None


def test_a_history_that_was_cut_or_edited(tmp_path, capsys):
    """What a full disk or a spreadsheet leaves is never told as a figure."""
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2)  # its checkpoint is of epoch 9
    history = run / "summary.csv"
    lines = history.read_text().splitlines(keepends=True)

    history.write_text("".join(lines[:11])[:-9])  # within the accuracy of epoch 9
    source = read_run(run)
    assert (source.evaluation, source.training.epochs) == (None, 10)
    assert "has no whole line of epoch 9, that of last.pth.tar: the card tells no accuracy" in capsys.readouterr().err

    history.write_text("".join(lines), encoding="utf-8-sig")
    assert read_run(run).evaluation.top1 == 69.25 and not capsys.readouterr().err

    for there, said in (("nan", None), ("abc", "epoch 9 has the eval_top1 'abc', which is no number")):
        history.write_text("".join(lines).replace("69.25", there))
        if said:
            assert said in fails(run, capsys=capsys)
        else:
            assert read_run(run).evaluation is None
    history.write_text("".join(lines).replace(",", ";"))
    assert "summary.csv has no finished epoch: a line whose column 'epoch'" in fails(run, capsys=capsys)


def test_a_run_that_went_on_with_other_settings(tmp_path):
    """Each epoch is published as what it was trained on."""
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2)
    first = Record.read(run)
    second = make_run(tmp_path / "second", ["fly", "wasp"], "wings", num_classes=2, lr=0.5)
    Record.read(second).going_on_from(first, 7).write(run)
    source = read_run(run)  # of epoch 9
    assert source.labels == ["fly", "wasp"]
    assert "Up to epoch 7 it was another run" in source.training.resumed and "ant, bee" in source.training.resumed
    assert "/data" not in source.training.resumed and str(tmp_path) not in source.training.resumed
    stored = torch.load(run / "last.pth.tar", weights_only=False)
    torch.save({**stored, "epoch": 6}, run / "model_best.pth.tar")
    source = read_run(run)
    assert (source.labels, source.training.resumed) == (["ant", "bee"], "")
    with (run / "summary.csv").open() as file:
        assert source.evaluation.top1 == float(list(csv.DictReader(file))[6]["eval_top1"])


def test_packed_arguments_train_it_again(tmp_path):
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2, data_dir=str(tmp_path / "insects"))
    pack(read_run(run), tmp_path / "packed")
    args = yaml.safe_load((tmp_path / "packed/args.yaml").read_text())
    assert (args["model"], args["num_classes"], args["data_dir"], args["resume"]) == (
        "convmixer_128_4",
        2,
        "insects",
        "",
    )


def test_a_history_with_epochs_that_were_run_again(tmp_path):
    """As ``train.py`` alone writes it when it goes on from an earlier checkpoint; older ones repeat the header too."""
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2)  # its checkpoint is of epoch 9
    lines = (run / "summary.csv").read_text().splitlines()
    again = lines[10].replace(lines[10].split(",")[lines[0].split(",").index("eval_top1")], "12.5")
    (run / "summary.csv").write_text("\n".join([*lines, lines[0], lines[9], again, ""]))
    source = read_run(run)
    assert (source.evaluation.top1, source.training.epochs) == (12.5, 10)
    pack(source, tmp_path / "packed")  # with its curve
    with (tmp_path / "packed/summary.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == [str(i) for i in range(10)]


def test_the_weights_of_a_packed_folder_are_the_folder(tmp_path):
    source = read_source(WEIGHTS_DIR / "convmixer_128_4.e25_cifar10/model.safetensors")
    assert source.card and "summary.csv" in source.files


def test_a_card_of_another_editor(tmp_path):
    packed = tmp_path / "packed"
    pack(read_source(WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"), packed)
    text = "---\nlicense: cc-by-nc-4.0\n---\n# mine\n"
    (packed / "README.md").write_text(text, encoding="utf-8-sig")
    pack(read_source(packed), tmp_path / "again")
    card = ModelCard.load(tmp_path / "again/README.md")
    assert card.data.license == "cc-by-nc-4.0" and "license" not in card.text
    (packed / "README.md").write_text("größer", encoding="latin-1")
    with pytest.raises(ValueError, match=r"README.md is no text in UTF-8, mend it first"):
        read_source(packed)


def test_a_file_of_grey_images(tmp_path):
    model = timm.create_model("convmixer_128_4", num_classes=2, in_chans=1)
    torch.save(model.state_dict(), tmp_path / "grey.pth")
    pack(read_source(tmp_path / "grey.pth", "convmixer_128_4"), tmp_path / "packed")
    loaded = convmixer_timm.load_model(f"local-dir:{tmp_path / 'packed'}")
    assert loaded.pretrained_cfg["input_size"][0] == len(loaded.pretrained_cfg["mean"]) == 1


def test_folders_of_the_machine_stay_on_it(tmp_path):
    elsewhere = {"train_split": "/home/me/train", "val_split": "/home/me/val", "experiment": "/home/me/runs/a"}
    teacher = {"kd_model_name": "local-dir:/home/me/teacher"}
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2, **elsewhere, **teacher)
    source = read_run(run)
    assert b"/home" not in source.files["args.yaml"] and "/home" not in source.evaluation.data
    pack(source, tmp_path / "packed")
    assert ". Its teacher was `local-dir:teacher`." in (tmp_path / "packed/README.md").read_text()


def test_a_run_of_other_colours_is_not_described(tmp_path):
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2, input_img_mode="YCbCr")
    with pytest.raises(ValueError, match="was trained on images in YCbCr, and who loads a published model reads RGB"):
        read_run(run)


def test_the_accuracy_of_an_earlier_publish_goes(tmp_path):
    run = make_run(tmp_path / "run", ["ant", "bee"], num_classes=2)
    measured = str(card_of(run, tmp_path))
    history = (run / "summary.csv").read_text().replace(",eval_top1,", ",other,")
    (run / "summary.csv").write_text(history)
    unmeasured = str(card_of(run, tmp_path))
    assert ModelCard(merge_cards(unmeasured, measured)).data.to_dict().get("metrics") is None
    edited = measured.replace("- accuracy\n", "- accuracy\n- f1\n", 1)
    assert ModelCard(merge_cards(unmeasured, edited)).data.metrics == ["f1"]
    assert ModelCard(merge_cards(measured, edited)).data.metrics == ["accuracy", "f1"]


def test_a_data_set_of_an_earlier_publish_goes():
    def card(name, dataset, own=""):
        datasets = f"datasets:\n- {dataset}\n{own}" if dataset else ""
        text = f"{BEGIN}\n\n# m\n\nTrained for 25 epochs on {name}.\n\n{END}"
        return f"---\nlibrary_name: timm\n{datasets}---\n\n{text}\n"

    merged = merge_cards(card("insects", ""), card("cifar10, 50,000 images", "uoft-cs/cifar10", "- my/own\n"))
    assert ModelCard(merged).data.datasets == ["my/own"]
    merged = merge_cards(card("insects", ""), card("cifar10", "my/cifar10-corrupted"))
    assert ModelCard(merged).data.datasets == ["my/cifar10-corrupted"]
    odd = card("insects", "").replace("library_name: timm", "library_name: timm\ndatasets: {a: 1}")
    assert "insects" in merge_cards(card("insects", ""), odd)
