"""Data looked at before the first step, by timm's readers on small folders."""

import json
import os
import random
import shutil
from argparse import Namespace
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from convmixer_timm.training.data_check import _class_names, check_evaluation_data, check_training_data, left_out

from ..conftest import IMAGES

DEFAULTS = {
    "data": None,
    "dataset": "",
    "train_split": "train",
    "val_split": "validation",
    "class_map": "",
    "dataset_download": False,
    "num_classes": None,
    "batch_size": 2,
    "seed": 42,
}


def make_images(folder, n=3, seed=0):
    folder.mkdir(parents=True)
    colours = random.Random(ascii(folder.name) + str(seed))
    for i in range(n):
        Image.new("RGB", (8, 8), tuple(colours.randrange(256) for _ in range(3))).save(folder / f"{i}.png")


def make_data(root, classes=("ant", "bee"), splits=("train", "validation"), **kwargs):
    for split in splits:
        for name in classes:
            make_images(root / split / name, **kwargs)
    return root


def check(root, processes=1, **options):
    return check_training_data(Namespace(**{**DEFAULTS, "data_dir": str(root), **options}), processes)


def test_what_is_found(tmp_path):
    data = check(make_data(tmp_path / "insects"))
    assert (data.name, data.classes, data.num_classes) == ("insects", ["ant", "bee"], 2)
    assert {name: split.images for name, split in data.splits.items()} == {"train": 6, "validation": 6}
    assert data.splits["train"].where == str(tmp_path / "insects/train")
    assert "6 images" in str(data) and "ant, bee" in str(data)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_the_split_to_validate_on(name, tmp_path):
    data = check(make_data(tmp_path, splits=("train", name)))
    assert data.val_split == ("test" if name == "test" else "validation")
    assert data.splits["validation"].where.endswith(f"/{name}")


def test_no_validation_on_purpose(tmp_path):
    assert list(check(make_data(tmp_path, splits=("train",)), val_split="").splits) == ["train"]


def add(*parts):
    return lambda root: make_images(root.joinpath(*parts))


def remove(*parts):
    return lambda root: shutil.rmtree(root.joinpath(*parts))


def empty(*parts):
    return lambda root: [path.unlink() for path in root.joinpath(*parts).iterdir()]


def write(*parts, content=b"no image"):
    return lambda root: root.joinpath(*parts).write_bytes(content)


def cut(*parts):
    def harm(root):
        path = root.joinpath(*parts)
        path.write_bytes(path.read_bytes()[:45])

    return harm


def test_what_is_trained_on_is_not_validated_on(tmp_path):
    make_data(tmp_path)
    for options in ({"val_split": "train"}, {"train_split": "validation"}):
        with pytest.raises(ValueError, match="is to be trained and validated on"):
            check(tmp_path, **options)
    shutil.rmtree(tmp_path / "validation")
    (tmp_path / "validation").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="is to be trained and validated on"):
        check(tmp_path)


@pytest.mark.parametrize("names", [("bee", "Bee"), ("1", "01")])
def test_classes_that_timm_cant_order(names, tmp_path):
    make_data(tmp_path, classes=("ant", *names))
    with pytest.raises(ValueError, match="which timm can't order: rename one"):
        check(tmp_path)


@pytest.mark.parametrize(
    "harm, message",
    [
        (remove("validation"), "no folder validation, val, test"),
        (remove("train"), "no folder train"),
        (remove("validation", "bee"), "validation lacks bee"),
        (empty("validation", "bee"), "validation lacks bee"),
        (empty("train", "ant"), "validation has ant, which"),
        (add("validation", "wasp"), "validation has wasp, which"),
        (add("train", "wasp"), "validation lacks wasp"),
        (add("train", ".ipynb_checkpoints"), "train/.ipynb_checkpoints is hidden"),
        (add("validation", "ant", ".ipynb_checkpoints"), "validation/ant/.ipynb_checkpoints is hidden"),
        (write("train", "bee", "._0.png"), "train/bee/._0.png is hidden"),
        (add("train", "bee", "queens"), "deeper than its class's folder"),
        (write("train", "0.png"), "in no class's folder"),
        (write("train", "bee", "1.png"), "train/bee/1.png can't be read"),
        (cut("validation", "ant", "2.png"), "validation/ant/2.png can't be read"),
    ],
)
def test_what_cannot_be_trained_on_is_named(harm, message, tmp_path):
    harm(make_data(tmp_path))
    with pytest.raises(ValueError, match=message) as raised:
        check(tmp_path)
    assert "\n" not in str(raised.value)


def test_files_that_are_no_images_by_their_names(tmp_path):
    make_data(tmp_path, ["ant", "bee", "fly"])
    assert left_out(check(tmp_path)) == []
    for split in ("train", "validation"):
        (tmp_path / split / "ant" / "0.png").rename(tmp_path / split / "ant" / "0.xcf")
    (tmp_path / "train" / "ant" / ".DS_Store").touch()
    first, second = left_out(check(tmp_path))
    assert "train: 1 files are no images by their names" in first and "0.xcf say" in first and "validation" in second
    for split in ("train", "validation"):
        for file in (tmp_path / split / "ant").glob("*.png"):
            file.rename(file.with_suffix(".xcf"))
    with pytest.raises(ValueError, match="train has no image, by its name's ending, of ant: put some there"):
        check(tmp_path)


@pytest.mark.parametrize("dataset", ["folder/x", "nosuch/train"])
def test_a_reader_that_timm_does_not_have(dataset, tmp_path):
    """timm would take the folder, and none of what it lacks would be seen."""
    make_data(tmp_path)
    with pytest.raises(ValueError, match=f"--dataset {dataset}: timm has no reader {dataset.split('/')[0]}/, and"):
        check(tmp_path, dataset=dataset)


def test_splits_that_hold_nothing(tmp_path):
    make_data(tmp_path, splits=("train",))
    (tmp_path / "validation").mkdir()
    with pytest.raises(ValueError, match="Found 0 images"):
        check(tmp_path)
    with pytest.raises(ValueError, match="no such folder: nowhere"):
        check("nowhere")
    with pytest.raises(ValueError, match="--data-dir"):
        check_training_data(Namespace(**DEFAULTS, data_dir=None))


def test_the_only_class(tmp_path):
    with pytest.raises(ValueError, match="one class only: ant"):
        check(make_data(tmp_path, ["ant"]))


def test_number_of_classes(tmp_path):
    make_data(tmp_path)
    assert check(tmp_path, num_classes=2).num_classes == 2
    for wrong in (1, 10):
        with pytest.raises(ValueError, match="--num-classes 2"):
            check(tmp_path, num_classes=wrong)


def test_at_least_one_batch(tmp_path):
    make_data(tmp_path)
    check(tmp_path, batch_size=6)
    with pytest.raises(ValueError, match="6 images, fewer than one batch of 7"):
        check(tmp_path, batch_size=7)
    with pytest.raises(ValueError, match="one batch of 8: give -b a number up to 3"):
        check(tmp_path, processes=2, batch_size=4)


def test_other_data_have_another_digest(tmp_path):
    def digests(root):
        return [split.digest for split in check(root).splits.values()]

    first = digests(make_data(tmp_path / "a"))
    assert digests(Path(shutil.copytree(tmp_path / "a", tmp_path / "elsewhere"))) == first
    others = [make_data(tmp_path / "b", seed=1), make_data(tmp_path / "c", n=4)]  # same names, other contents
    shutil.copytree(tmp_path / "a", tmp_path / "d")
    for split in ("train", "validation"):
        (tmp_path / "d" / split / "bee").rename(tmp_path / "d" / split / "wasp")
    for other in [*others, tmp_path / "d"]:
        assert digests(other)[0] != first[0]


def test_a_class_map_gives_the_order(tmp_path):
    make_data(tmp_path)
    (tmp_path / "order.txt").write_text("bee\nant\n")
    assert check(tmp_path, class_map=str(tmp_path / "order.txt")).classes == ["bee", "ant"]


@pytest.mark.parametrize(
    "names, message", [("ant\nbee\n\n", "has an empty line: remove it"), ("ant\nbee\nant\n", "has a name twice")]
)
def test_a_class_map_of_classes_that_are_none(names, message, tmp_path):
    make_data(tmp_path)
    (tmp_path / "map.txt").write_text(names)
    with pytest.raises(ValueError, match=f"the class map {message}"):
        check(tmp_path, class_map=str(tmp_path / "map.txt"))


def test_a_class_map_with_other_names_than_the_folders(tmp_path):
    make_data(tmp_path, ["ant", "bee", "wasp"])
    (tmp_path / "typo.txt").write_text("ant\nbees\nwasp\n")
    with pytest.raises(ValueError, match=r"names bees, of which .* has no image, and lacks bee, which is there: mend"):
        check(tmp_path, class_map=str(tmp_path / "typo.txt"))
    (tmp_path / "some.txt").write_text("ant\nwasp\n")
    notes = left_out(check(tmp_path, class_map=str(tmp_path / "some.txt")))
    assert [note.endswith("the class map leaves out bee") for note in notes] == [True, True]
    (tmp_path / "more.txt").write_text("ant\nbee\nfly\nwasp\n")  # of a model that has learned more, say
    data = check(tmp_path, class_map=str(tmp_path / "more.txt"))
    assert (data.num_classes, left_out(data)) == (4, [])


def test_what_is_no_image_is_said_once(tmp_path):
    make_data(tmp_path)
    (tmp_path / "train/ant/0.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"ant/0\.png can't be read: an empty file$"):
        check(tmp_path)
    (tmp_path / "train/ant/0.png").unlink()
    os.mkfifo(tmp_path / "train/ant/0.png")  # which would be waited for
    with pytest.raises(ValueError, match=r"ant/0\.png can't be read: not a regular file$"):
        check(tmp_path)


def test_torchvisions_data_sets(tmp_path):
    data = check(make_data(tmp_path), dataset="torch/image_folder")
    assert (data.name, data.classes, data.splits["train"].images) == (tmp_path.name, ["ant", "bee"], 6)
    remove("validation", "bee")(tmp_path)
    with pytest.raises(ValueError, match="validation lacks bee"):
        check(tmp_path, dataset="torch/image_folder")
    with pytest.raises(ValueError, match=r"torch/cifar10 \(train\) can't be read: Dataset not found"):
        check(tmp_path, dataset="torch/cifar10")
    with pytest.raises(ValueError, match="torch/nothing"):
        check(tmp_path, dataset="torch/nothing")


def test_names_from_an_ascii_locale_are_what_they_were(tmp_path):
    data = check(make_data(tmp_path / "d\udcc3\udca4t\udcff", ["\udcc3\udcbcn", "b"]))
    assert (data.name, data.classes) == ("dät\\xff", ["b", "ün"])
    assert data.splits["train"].where.endswith("/dät\\xff/train")


def test_several_names_a_class():
    class Reader:
        class_to_idx: ClassVar = {"tench": 0, "Tinca tinca": 0, "goldfish": 1}
        classes: ClassVar = [("tench", "Tinca tinca"), ("goldfish",)]

    assert _class_names(Reader()) == (["tench, Tinca tinca", "goldfish"], 2)


def test_hugging_faces_data_sets(tmp_path):
    pytest.importorskip("datasets")
    make_data(tmp_path / "insects")
    data = check(tmp_path / "cache", dataset=f"hfds/{tmp_path / 'insects'}")
    assert (data.name, data.classes, data.splits["train"].images) == ("insects", ["ant", "bee"], 6)
    with pytest.raises(ValueError, match="--num-classes 2"):
        check(tmp_path / "cache", dataset=f"hfds/{tmp_path / 'insects'}", num_classes=3)
    make_data(tmp_path / "tested", splits=("train", "test"))
    assert check(tmp_path / "cache", dataset=f"hfds/{tmp_path / 'tested'}").val_split == "test"
    with pytest.raises(ValueError, match="Unknown split"):
        check(tmp_path / "cache", dataset=f"hfds/{tmp_path / 'tested'}", val_split="other")


@pytest.mark.parametrize(
    "columns, keys, message",
    [
        (("img", "label"), {}, "has no column image, it has img, label: name the right one by --input-key"),
        (("image", "kind"), {}, "has no column label, it has image, kind: name the right one by --target-key"),
        (("img", "kind"), {"input_key": "img", "target_key": "kind"}, "names its classes, ant say, where numbers are"),
    ],
)
def test_columns_of_hugging_faces_data_sets(columns, keys, message, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "rows"
    folder.mkdir()
    picture = sorted(IMAGES.glob("*/*.png"))[0]
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_dict({columns[0]: [str(picture)] * 4, columns[1]: ["ant", "bee"] * 2})
        rows.cast_column(columns[0], datasets.Image()).to_parquet(folder / f"{split}-00000.parquet")
    with pytest.raises(ValueError, match=message):
        check(tmp_path / "cache", dataset=f"hfds/{folder}", num_classes=2, **keys)


def test_a_reader_that_tells_no_classes_is_said_not_to_be_checked(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for split in ("train", "validation"):
        with webdataset.TarWriter(str(tmp_path / f"{split}-0.tar")) as tar:
            for i in range(4):
                tar.write({"__key__": str(i), "png": Image.new("RGB", (8, 8)), "cls": i % 2})
    splits = {
        split: {"name": split, "num_samples": 4, "filenames": [f"{split}-0.tar"], "shard_lengths": [4]}
        for split in ("train", "validation")
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    data = check(tmp_path, dataset="wds/insects", num_classes=2, batch_size=1)
    assert (data.classes, data.num_classes, data.splits["train"].images) == (None, None, 4)
    assert "not checked" in str(data)
    with pytest.raises(ValueError, match=r"doesn't tell how many classes it has: give --num-classes N"):
        check(tmp_path, dataset="wds/insects", batch_size=1)
    with pytest.raises(ValueError, match="has an image of class 1, where there are 1 classes"):
        check(tmp_path, dataset="wds/insects", num_classes=1, batch_size=1)
    (tmp_path / "train-0.tar").unlink()
    with pytest.raises(ValueError, match="no image that can be read"):
        check(tmp_path, dataset="wds/insects", num_classes=2, batch_size=1)


def test_evaluation(tmp_path):
    make_data(tmp_path)
    args = Namespace(**DEFAULTS, data_dir=str(tmp_path), split="validation")
    check_evaluation_data(args, ["ant", "bee"])
    check_evaluation_data(args, None)
    check_evaluation_data(Namespace(**{**vars(args), "data_dir": str(tmp_path / "train")}), ["ant", "bee"])
    for classes in (["bee", "ant"], ["ant", "bee", "wasp"], ["ant", "wasp"]):
        with pytest.raises(ValueError, match="the model"):
            check_evaluation_data(args, classes)
    # Names that a publisher wrote for people may be others than the folders'; those of a training are the folders'.
    assert "taken for the same, in this order" in check_evaluation_data(args, ["Ameise", "Biene"], recorded=False)[1]
    for classes, recorded in ((["Ameise", "Biene"], True), (["Ameise", "Biene", "x"], False), (["bee", "ant"], False)):
        with pytest.raises(ValueError, match="the model"):
            check_evaluation_data(args, classes, recorded)
    with pytest.raises(ValueError, match="no folder val2: give --split"):
        check_evaluation_data(Namespace(**{**vars(args), "split": "val2"}), None)


def test_the_split_to_evaluate_on(tmp_path):
    """Where there is none of the default's name, the one that a training would take, or took."""
    make_data(tmp_path)
    args = Namespace(**DEFAULTS, data_dir=str(tmp_path), split="validation")
    assert check_evaluation_data(args, None, split="held_out") == ("validation", "")
    (tmp_path / "validation").rename(tmp_path / "test")
    assert check_evaluation_data(args, None)[0] == "test"
    (tmp_path / "train").rename(tmp_path / "held_out")
    assert check_evaluation_data(args, None, split="held_out")[0] == "held_out"
