"""fastai's learner on a variant by its name: one epoch, export, load."""

import pytest
import timm
import torch

from ..conftest import IMAGES

pytest.importorskip("fastai")


def test_an_epoch_export_and_load(tmp_path):
    from fastai.vision.all import ImageDataLoaders, load_learner, vision_learner

    data = ImageDataLoaders.from_folder(IMAGES, valid_pct=0.2, seed=0, bs=4, num_workers=0, device="cpu")
    learner = vision_learner(data, "convmixer_128_4.e25_cifar10", normalize=False, path=tmp_path)
    pretrained = timm.create_model("convmixer_128_4.e25_cifar10", pretrained=True)
    assert torch.equal(learner.model[0].model.stem[0].weight, pretrained.stem[0].weight)
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(1)
    learner.export("learner.pkl")
    loaded = load_learner(tmp_path / "learner.pkl")
    image = IMAGES / "ship/0000.png"
    with learner.no_bar(), loaded.no_bar():
        before, after = learner.predict(image), loaded.predict(image)
    assert before[0] == after[0]
    torch.testing.assert_close(before[2], after[2])
