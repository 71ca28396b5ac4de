"""The public face as a program under mypy --strict uses it: checked, not run."""

import numpy as np
import torch
from PIL import Image

import convmixer_timm

model = convmixer_timm.load_model("convmixer_128_4.e25_cifar10")
names: list[str] = convmixer_timm.class_names(model)
for image, classes in convmixer_timm.predict(
    model, ["a.png", Image.new("RGB", (32, 32)), np.zeros((32, 32, 3), np.uint8)], topk=3
):
    best, probability = classes[0]
    print(image, best.upper(), probability + 1)
fast = convmixer_timm.optimize(model, torch.zeros(1, 3, 32, 32))
logits: torch.Tensor = fast(torch.zeros(1, 3, 32, 32))
convmixer_timm.set_fast_training(False)
report: list[str] = convmixer_timm.publish("run", "me/name", dry_run=True).report()
convmixer_timm.export(model, "x.onnx", "onnx")
convmixer_timm.page("convmixer_128_4.e25_cifar10", "page")
net: torch.nn.Module = convmixer_timm.ConvMixer(32, 2)
