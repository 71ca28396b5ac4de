"""What a model's classes are called."""

from collections import Counter
from pathlib import Path
from typing import Any

import timm

from .loading import check_model

__all__ = ["check_labels", "class_names", "read_labels"]


def class_names(model: Any) -> list[str]:
    """The model's classes: from its pretrained config, else ImageNet's of weights whose tag says so, else numbers."""
    check_model(model)
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, list | tuple) and len(names) == model.num_classes:
        return list(map(str, names))
    subset = timm.data.infer_imagenet_subset(model)
    # A thousand classes alone may be anybody's.
    trained_on = str(model.pretrained_cfg.get("tag") or "").rpartition("_")[2]
    if subset and trained_on in ("in1k", "in12k", "in21k", "in22k"):
        info = timm.data.ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [str(i) for i in range(model.num_classes)]


def read_labels(file: str | Path) -> list[str]:
    """Names of classes from a text file in UTF-8, one a line.

    Raises:
        OSError: If it can't be read.
        ValueError: If it is in another encoding or has no names.
    """
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8") from error
    labels = [line.strip() for line in text.splitlines() if line.strip()]
    if not labels:
        raise ValueError(f"{file} has no labels")
    return labels


def check_labels(labels: list[str], num_classes: int) -> None:
    """Raises ValueError where given names of classes are not a list, one for each class, or a name stands twice."""
    if isinstance(labels, str):
        raise ValueError(f"the labels are a list of names, got the text {labels!r}")
    if len(labels) != num_classes:
        raise ValueError(f"the model has {num_classes} classes, and the labels are {len(labels)}")
    if twice := [name for name, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"labels that stand more than once: {', '.join(twice)}")
