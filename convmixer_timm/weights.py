"""A finished training run, packed as timm and the Hugging Face Hub read a checkpoint.

The folder holds ``model.safetensors`` and ``config.json``, which timm's ``local-dir:`` and ``hf-hub:`` load,
``args.yaml`` with every setting (itself a ``train.py --config``), ``summary.csv`` with the history, and the card,
``README.md``.
"""

import csv
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

__all__ = ["Evaluation", "pack_run"]

_PATHS = ("data", "data_dir", "output", "config", "initial_checkpoint", "pretrained_path", "class_map")

_CARD = """
# {name}

ConvMixer of dim {dim}, depth {depth}, kernel {kernel_size}, patch {patch_size}: {params:.2f} M parameters.
Trained for {epochs} epochs on {train_data}.

| top-1 | top-5 | measured on |
|---|---|---|
| {top1:.2f} | {top5:.2f} | {test_data} |

## Use

```python
import convmixer_timm  # registers the architecture
import timm

model = timm.create_model("{name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

or `convmixer-timm predict IMAGE --model {name}`.

## Training

One run with seed {seed}, {hours:.1f} hours on {machine}.
The weights are those of the last epoch{ema}; the test images were looked at once, after it.
`args.yaml` has every setting, `summary.csv` the history{history}. To train it again:

```
convmixer-timm run train --config args.yaml --data-dir DATA
```

## Citation

```bibtex
@article{{trockman2023patches,
  title   = {{Patches Are All You Need?}},
  author  = {{Asher Trockman and J. Zico Kolter}},
  journal = {{Transactions on Machine Learning Research}},
  year    = {{2023}},
  url     = {{https://arxiv.org/abs/2201.09792}}
}}
```
"""


@dataclass(frozen=True)
class Evaluation:
    """What a card says of a run beyond what its folder tells: accuracies in percent, and on what they were measured."""

    top1: float
    top5: float
    train_data: str
    test_data: str
    machine: str
    hours: float


def _portable_args(path: Path) -> dict:
    """The run's arguments without the folders of the machine that it ran on, and as for a run from the start."""
    args = {**yaml.safe_load(path.read_text()), "resume": ""}
    return {k: Path(v).name if k in _PATHS and v else v for k, v in args.items()}


def pack_run(run: Path, target: Path, evaluation: Evaluation, ema: bool = False) -> None:
    """Packs the last epoch of a run of timm's ``train.py``.

    Args:
        run: The run's output folder.
        target: Folder to make, named ``architecture.tag``; one that exists is replaced as a whole.
        evaluation: What the card has to say.
        ema: Take the averaged weights.

    Raises:
        FileNotFoundError: If the run has no ``last.pth.tar``, ``args.yaml`` or ``summary.csv``.
        ValueError: If `target`'s name is not the run's architecture and a tag.
    """
    for name in ("last.pth.tar", "args.yaml", "summary.csv"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} is no finished train.py run: it has no {name}")
    args = _portable_args(run / "args.yaml")
    architecture, _, tag = target.name.partition(".")
    if architecture != args["model"].split(".")[0] or not tag:
        raise ValueError(f"The folder must be named {args['model']}.TAG, got {target.name}")
    if ema and not args["model_ema"]:
        raise ValueError(f"{run} has no averaged weights")
    model: Any = timm.create_model(
        architecture,
        num_classes=args["num_classes"],
        in_chans=args["in_chans"],
        global_pool=args["gp"],
        **args["model_kwargs"],
    )
    timm.models.load_checkpoint(model, str(run / "last.pth.tar"), use_ema=ema)
    model.pretrained_cfg["tag"] = tag

    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".tmp-") as temporary:
        folder = Path(temporary) / target.name
        model_args = args["model_kwargs"] or None  # newer timm remembers them by itself
        timm.models.save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
        (folder / "args.yaml").write_text(yaml.safe_dump(args))
        shutil.copy(run / "summary.csv", folder)
        (folder / "README.md").write_text(_card(model, target.name, args, run / "summary.csv", evaluation, ema))
        if target.exists():
            os.replace(target, Path(temporary) / "old")
        os.replace(folder, target)


def _card(model, name: str, args: dict, summary: Path, evaluation: Evaluation, ema: bool) -> str:
    with summary.open() as file:
        rows = list(csv.DictReader(file))
    depthwise = model.blocks[0][0].fn[0]
    metrics = {"Top 1 Accuracy": evaluation.top1, "Top 5 Accuracy": evaluation.top5}
    data = ModelCardData(
        license="mit",
        library_name="timm",
        tags=["image-classification", "timm", "convmixer"],
        datasets=["cifar10"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="cifar10",
                dataset_name=evaluation.test_data,
                metric_type="accuracy",
                metric_name=metric,
                metric_value=value,
            )
            for metric, value in metrics.items()
        ],
    )
    history = " with the accuracy on the held-out images" if "eval_top1" in rows[0] else ""
    body = _CARD.format(
        name=name,
        dim=model.num_features,
        depth=len(model.blocks),
        kernel_size=depthwise.kernel_size[0],
        patch_size=model.stem[0].kernel_size[0],
        params=sum(p.numel() for p in model.parameters()) / 1e6,
        epochs=len(rows),
        seed=args["seed"],
        ema=", averaged (EMA)" if ema else "",
        history=history,
        **vars(evaluation),
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{body}"))
