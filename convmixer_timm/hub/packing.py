"""A trained model written into a folder as timm, transformers and the Hugging Face Hub read it.

The folder holds ``model.safetensors`` and ``config.json``, which timm's ``local-dir:`` and ``hf-hub:`` load, and the
card, ``README.md``; of a run of ``train.py`` also ``args.yaml`` with every setting (itself a ``train.py --config``),
``summary.csv`` with the history, and that as a curve.
"""

import importlib.util
import json
import sys
from pathlib import Path

import timm

from ..files import as_text, atomic_path
from .cards import adopt_card, make_card, rename_in_card
from .sources import Source

__all__ = ["pack"]


def pack(source: Source, target: Path, load_name: str | None = None) -> None:
    """Writes a trained model with its card.

    Args:
        source: The model, and what is known of it.
        target: Folder to make, whose name is the card's title; one that exists is replaced as a whole.
        load_name: What `timm.create_model` will load it by, for the card; the title by default.
    """
    load_name = load_name or target.name
    for name in source.left_out:
        print(f"left out: {name}", file=sys.stderr)
    with atomic_path(target) as folder:
        folder.mkdir()
        for name, content in source.files.items():
            (folder / name).write_bytes(content)
        if "config.json" in source.files:  # packed already
            _mend_config(folder / "config.json")
            pictures = {}
        else:
            _save(source, folder)
            pictures = draw_pictures(source, folder)
        card = make_card(source.model, target.name, load_name, source.training, source.evaluation, pictures)
        if source.card:
            card = adopt_card(rename_in_card(source.card, load_name), card)
        (folder / "README.md").write_text(as_text(card), encoding="utf-8")


def _save(source: Source, folder: Path) -> None:
    """Weights and configuration, by timm."""
    model, labels = source.model, source.labels
    if labels is None:
        print("no class names are known, so the classes are numbers: --labels gives them names", file=sys.stderr)
        # Said as such: who finds no names takes ImageNet's for any thousand classes.
        labels = [str(i) for i in range(model.num_classes)]
    # The variant's tag and class names say nothing of what this model learned.
    architecture, _, tag = folder.name.partition(".")
    model.pretrained_cfg["tag"] = tag if architecture == model.pretrained_cfg["architecture"] else ""
    model.pretrained_cfg.pop("label_names", None)
    # Newer timm remembers arguments by itself, and takes only what JSON can hold.
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": labels},
        model_args=source.model_args or None,
        safe_serialization=True,
    )
    _mend_config(folder / "config.json")


def _mend_config(file: Path) -> None:
    """Newer timm writes the number of classes twice, and transformers gives it to the model twice then."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if (classes := config.get("model_args", {}).pop("num_classes", None)) is not None:
        config.setdefault("num_classes", classes)
        file.write_text(json.dumps(config, indent=2), encoding="utf-8")


def draw_pictures(source: Source, folder: Path) -> dict[str, str]:
    """Draws what a card shows; gives file names and what they show."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures in the card: pip install matplotlib draws them", file=sys.stderr)
        return {}
    from ..plots import draw_curve, draw_depthwise_kernels, draw_patch_filters

    pictures = {}
    if "summary.csv" in source.files:
        draw_curve(folder / "summary.csv", folder / "curve.png")
        pictures["curve.png"] = "Loss and accuracy by epoch"
    draw_patch_filters(source.model, folder / "patch_filters.png")
    draw_depthwise_kernels(source.model, folder / "depthwise_kernels.png")
    return {
        **pictures,
        "patch_filters.png": "Filters of the patch embedding",
        "depthwise_kernels.png": "Depthwise kernels of the first, the middle and the last layer",
    }
