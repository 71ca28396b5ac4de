"""Training by Lightning, in the precisions that a CPU has, and going on from its checkpoint."""

import pytest
import timm
import torch
import torch.nn.functional as F

lightning = pytest.importorskip("lightning")


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("convmixer_128_4", num_classes=2, depth=2)

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.model(images).float(), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def trainer(folder, precision, epochs):
    return lightning.Trainer(
        accelerator="cpu",
        precision=precision,
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_training_and_resuming(precision, tmp_path):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    data = torch.utils.data.DataLoader([(image, i % 2) for i, image in enumerate(images)], batch_size=4)
    first = trainer(tmp_path, precision, 1)
    first.fit(Classifier(), data)
    first.save_checkpoint(tmp_path / "one.ckpt")
    second, model = trainer(tmp_path, precision, 2), Classifier()
    second.fit(model, data, ckpt_path=tmp_path / "one.ckpt")
    assert (second.current_epoch, second.global_step) == (2, 4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if precision == "bf16-true" else torch.float32}
    before = torch.load(tmp_path / "one.ckpt", weights_only=False)["state_dict"]
    after = model.state_dict()
    assert not torch.equal(after["model.blocks.0.0.fn.0.weight"], before["model.blocks.0.0.fn.0.weight"])
    assert all(value.isfinite().all() for value in after.values())
