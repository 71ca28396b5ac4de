"""A packed checkpoint in transformers: the pipeline, the Trainer, and back."""

import os

import pytest
import timm
import torch

import convmixer_timm
from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.hub.packing import pack
from convmixer_timm.hub.sources import read_source

from ..conftest import IMAGES

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which its Trainer needs

BUNDLED = WEIGHTS_DIR / "convmixer_128_4.e25_cifar10"
IMAGE = IMAGES / "ship/0000.png"


@pytest.fixture
def packed(tmp_path):
    """A checkpoint packed here, whose pooling is not its variant's."""
    model = timm.create_model("convmixer_128_4", num_classes=3, global_pool="max")
    torch.save(model.state_dict(), tmp_path / "own.pth")
    source = read_source(tmp_path / "own.pth", "convmixer_128_4", ["ant", "bee", "wasp"])
    pack(source, tmp_path / "packed")
    return tmp_path / "packed"


def test_pipeline_gives_what_predict_gives():
    (prediction,) = convmixer_timm.predict(convmixer_timm.load_model(f"local-dir:{BUNDLED}"), [IMAGE])
    told = transformers.pipeline("image-classification", model=str(BUNDLED))(str(IMAGE))
    assert [one["label"] for one in told] == [name for name, _ in prediction[1]]
    assert told[0]["score"] == pytest.approx(prediction[1][0][1], abs=1e-5)


def test_logits_and_features_are_timms(packed):
    images = torch.randn(2, 3, 32, 32)
    ours = timm.create_model(f"local-dir:{packed}", pretrained=True).eval()
    classifier = transformers.AutoModelForImageClassification.from_pretrained(packed).eval()
    backbone = transformers.AutoModel.from_pretrained(packed).eval()
    with torch.inference_mode():
        assert torch.equal(classifier(images).logits, ours(images))
        assert torch.equal(backbone(images).last_hidden_state, ours.forward_features(images))
    assert classifier.config.id2label == {0: "ant", 1: "bee", 2: "wasp"}


def test_trainer_and_back(packed, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(packed)
    before = model.timm_model.head.weight.detach().clone()
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 3} for i in range(4)]
    settings = {"max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    trainer = transformers.Trainer(
        model=model, args=transformers.TrainingArguments(str(tmp_path / "out"), **settings), train_dataset=data
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not torch.equal(model.timm_model.head.weight, before)
    loaded = convmixer_timm.load_model(f"local-dir:{tmp_path / 'saved'}")
    assert torch.equal(loaded.head.weight, model.timm_model.head.weight)
    assert convmixer_timm.class_names(loaded) == ["ant", "bee", "wasp"]
    (_, classes), *_ = convmixer_timm.predict(loaded, [IMAGE])
    assert {name for name, _ in classes} == {"ant", "bee", "wasp"}


def test_other_classes_keep_their_names(packed, tmp_path):
    """As README says; without the second line transformers saves the checkpoint's."""
    names = ["fly", "moth"]
    model = transformers.AutoModelForImageClassification.from_pretrained(
        packed, num_labels=2, id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "without")
    with pytest.raises(
        ValueError, match=r"has 3 label_names for 2 classes: write theirs there \(transformers keeps the"
    ):
        convmixer_timm.load_model(f"local-dir:{tmp_path / 'without'}")
    model.config.label_names = names
    model.save_pretrained(tmp_path / "saved")
    assert convmixer_timm.class_names(convmixer_timm.load_model(f"local-dir:{tmp_path / 'saved'}")) == names


def test_what_it_says_without_the_import(packed):
    import subprocess
    import sys

    script = f"import transformers; transformers.AutoModelForImageClassification.from_pretrained({str(packed)!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert "'convmixer_128_4' is not supported in your version of timm" in result.stderr.splitlines()[-1]
