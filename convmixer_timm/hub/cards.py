"""Model cards: what a checkpoint's README.md says, and how it keeps what people wrote into it."""

import re
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData, RepoCard

from ..errors import one_line
from ..inference.loading import split_name

__all__ = [
    "Evaluation",
    "Training",
    "adopt_card",
    "around_marks",
    "compose_card",
    "is_marked",
    "link_page",
    "listed",
    "make_card",
    "merge_cards",
    "put_between",
    "read_card",
    "rename_in_card",
]

BEGIN = "<!-- Written by convmixer-timm, and anew by each publish, up to the closing mark. Text outside stays. -->"
END = "<!-- convmixer-timm: closing mark -->"

_PAGE = "**[Try it in your browser]({})**\n\n"

_CITATION = """```bibtex
@article{trockman2023patches,
  title   = {Patches Are All You Need?},
  author  = {Asher Trockman and J. Zico Kolter},
  journal = {Transactions on Machine Learning Research},
  year    = {2023},
  url     = {https://arxiv.org/abs/2201.09792}
}
```"""


_AGAIN = """`args.yaml` has every setting, `summary.csv` the history. To train it again:

```
{launcher} run train --config args.yaml --data-dir DATA
```"""


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent, and on what they were measured; no top-5 of a few classes."""

    top1: float
    top5: float | None
    data: str


@dataclass(frozen=True)
class Training:
    """What a card says of a run.

    Attributes:
        args: The arguments of ``train.py``.
        epochs: Epochs in ``summary.csv``.
        weights: Which weights these are: 'those of the last epoch', …
        data: What it was trained on, in words.
        dataset: The same as the Hub names a dataset; empty for one that isn't there.
        cost: Hours and machine, or nothing.
        start: Name of the weights that it started from, or nothing.
        teacher: Name of the model that it was distilled from, or nothing.
        base_model: Those as the Hub names a model; empty for ones that aren't there.
        resumed: What else was trained before, where the arguments don't tell, or nothing.
        again: How to repeat it, where ``args.yaml`` alone doesn't: a run that was resumed with other settings.
        processes: How many trained together, each on a batch of its own.
    """

    args: dict[str, Any]
    epochs: int
    weights: str
    data: str
    dataset: str = ""
    cost: str = ""
    start: str = ""
    teacher: str = ""
    base_model: str = ""
    resumed: str = ""
    again: str = ""
    processes: int = 1


def make_card(
    model: Any,
    name: str,
    load_name: str,
    training: Training | None = None,
    evaluation: Evaluation | None = None,
    pictures: dict[str, str] | None = None,
) -> str:
    """The card of a checkpoint.

    Args:
        model: The model, for its sizes and its licence.
        name: Title of the card.
        load_name: What `timm.create_model` loads it by.
        training: Of a run by ``train.py``; without it the card says nothing of the training.
        evaluation: Without it the card states no accuracy.
        pictures: What they show, by file name.
    """
    depthwise = model.blocks[0][0].fn[0]
    size = " x ".join(map(str, model.pretrained_cfg["input_size"][1:]))
    facts = (
        f"ConvMixer of dim {model.num_features}, depth {len(model.blocks)}, kernel {depthwise.kernel_size[0]}, "
        f"patch {model.stem[0].kernel_size[0]}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{model.num_classes} classes, images of {size}."
    )
    parts = [f"# {name}", facts]
    if training:
        start = f", from the weights of `{training.start}`" if training.start else ""
        teacher = f" Its teacher was `{training.teacher}`." if training.teacher else ""
        epochs = f"{training.epochs} epoch{'s' * (training.epochs != 1)}"
        parts.append(f"Trained for {epochs} on {training.data}{start}.{teacher}")
    if evaluation:
        figures = {f"top-{k}": f"{value:.2f}" for k, value in _accuracies(evaluation).items()}
        columns = {**figures, "measured on": evaluation.data}
        lines = (columns, [text.replace("|", "\\|") for text in columns.values()])
        head, row = (f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"{head}\n{'|---' * len(columns)}|\n{row}")
    else:
        parts.append("No accuracy was measured with these weights.")
    parts.append(_use(load_name))
    if training:
        together = f"torchrun --nproc-per-node={training.processes} -m convmixer_timm"
        again = _AGAIN.format(launcher=together if training.processes > 1 else "convmixer-timm")
        parts.append(
            f"""## Training

One run with seed {training.args.get("seed")}{training.cost}. The weights are {training.weights}.
{training.resumed or training.again or again}"""
        )
    parts += [f"![{shown}]({file})" for file, shown in (pictures or {}).items()]
    parts.append(f"## Citation\n\n{_CITATION}")
    data = ModelCardData(
        license=model.pretrained_cfg.get("license") or "mit",
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "convmixer"],
        datasets=[training.dataset] if training and training.dataset else None,
        metrics=["accuracy"] if evaluation else None,
        **_base(training),
        **_model_index(name, training, evaluation),
    )
    return compose_card(data, "\n\n".join([BEGIN, *parts, END]))


def _base(training: Training | None) -> dict[str, Any]:
    if not (training and training.base_model):
        return {}
    return {"base_model": training.base_model, "base_model_relation": "finetune"}


def _use(load_name: str) -> str:
    """How timm loads it, and from the Hub also transformers."""
    text = f"""## Use

With the Python package `convmixer-timm` installed:

```python
import convmixer_timm  # registers the architecture
import timm

model = timm.create_model("{load_name}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

or `convmixer-timm predict IMAGE --model {load_name}`."""
    scheme, location = split_name(load_name)
    if scheme != "hf-hub":
        return text
    repo_id, _, revision = location.partition("@")
    at = f', revision="{revision}"' if revision else ""
    return f"""{text} With transformers:

```python
import convmixer_timm  # registers the architecture
from transformers import pipeline

classify = pipeline("image-classification", model="{repo_id}"{at})
```

Without the first import timm knows its own architectures only: of others it says `Unknown model`, and transformers
that they are not supported in your version of timm."""


def _accuracies(evaluation: Evaluation) -> dict[int, float]:
    return {k: value for k, value in ((1, evaluation.top1), (5, evaluation.top5)) if value is not None}


def _model_index(name: str, training: Training | None, evaluation: Evaluation | None) -> dict[str, Any]:
    if not evaluation:
        return {}
    results = [
        EvalResult(
            task_type="image-classification",
            # What the Hub calls images of one's own.
            dataset_type=(training.dataset if training else "") or "imagefolder",
            dataset_name=evaluation.data,
            metric_type="accuracy",
            metric_name=f"Top {k} Accuracy",
            metric_value=value,
        )
        for k, value in _accuracies(evaluation).items()
    ]
    return {"model_name": name, "eval_results": results}


def read_card(text: str, kind: type[RepoCard] = ModelCard) -> RepoCard:
    """A card of a text that people may have edited.

    Raises:
        ValueError: If its metadata can't be read; the message is one line.
    """
    try:
        return kind(text, ignore_metadata_errors=True)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        reason = one_line(error)
        raise ValueError(f"the metadata at the top of its README.md can't be read, mend it first: {reason}") from error


def listed(value: Any) -> list[Any]:
    """What metadata names, where one thing may stand without a list."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def link_page(card: str, address: str) -> str:
    """A model's card with a line for its page, below the title."""
    line = _PAGE.format(address)
    return re.sub(re.escape(BEGIN) + r"\n\n(# .*\n\n)?", lambda found: found[0] + line, card, count=1)


def compose_card(data: CardData, text: str) -> str:
    """A card of metadata and text, as a file."""
    return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def is_marked(card: str | None) -> bool:
    """Whether a card is one that an earlier publish wrote."""
    return card is not None and around_marks(card) is not None


def around_marks(text: str) -> tuple[str, str] | None:
    """What stands before and after the marked part of a card; None where it isn't marked."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    return (before, after) if begin and end else None


def put_between(generated: str, around: tuple[str, str]) -> str:
    """A marked text with what people wrote before and after it."""
    parts = (around[0].strip(), generated.strip(), around[1].strip())
    return "\n\n".join(part for part in parts if part)


def merge_cards(new: str, old: str) -> str:
    """A new card with what people wrote into the old one.

    The text outside the marks stays where it is; an old card without marks stays whole, above the new one. Metadata
    that only the old card has, or that people choose (the licence, say), stays; name and accuracies are the new ones,
    as they belong to the weights, and so is what an earlier publish wrote of its data and of its start. A link to the
    model's page stays, as the page does.

    Raises:
        ValueError: As from `read_card`.
    """
    mine, theirs = ModelCard(new), read_card(old)
    link = re.compile(re.escape(_PAGE).replace(re.escape("{}"), "(.*)"))
    if (page := link.search(theirs.text)) and not link.search(mine.text):
        mine = ModelCard(link_page(new, page[1]))
    marks = around_marks(theirs.text)
    text = put_between(mine.text, marks or (theirs.text, ""))
    # As it stands there: huggingface_hub's older classes take a word for a list of letters.
    ours, kept = mine.data.to_dict(), read_card(old, RepoCard).data.to_dict()
    started = False
    if marks:  # what an earlier publish wrote of its training
        base = str(kept.get("base_model"))
        names = (f"`hf-hub:{base}", f"`{base.rpartition('/')[2]}`")
        started = any(f"from the weights of {name}" in theirs.text for name in names)
        measured = {result.dataset_type for result in getattr(theirs.data, "eval_results", None) or ()}
        learned = re.search(r"^Trained for \d+ epochs? on ([^\s,]+)", theirs.text, re.MULTILINE)
        if learned:  # "cifar10" is the Hub's uoft-cs/cifar10
            measured |= {name for name in map(str, listed(kept.get("datasets"))) if _is_named(name, learned[1])}
        kept["datasets"] = [name for name in listed(kept.get("datasets")) if str(name) not in measured]
        kept["metrics"] = [name for name in listed(kept.get("metrics")) if name != "accuracy"]
    for key in ("model-index", *(("base_model", "base_model_relation") if started or "base_model" in ours else ())):
        kept.pop(key, None)
    merged = {**ours, **kept, "library_name": ours["library_name"]}
    for key in ("tags", "datasets", "metrics"):
        both = listed(ours.get(key))
        both += [name for name in listed(kept.get(key)) if name not in both]
        merged.pop(key, None)
        if both:
            merged[key] = both
    return compose_card(ModelCardData(**merged), text)


def _is_named(dataset: str, words: str) -> bool:
    """Whether a card's words for what was trained on mean a dataset of the Hub."""
    name = dataset.rpartition("/")[2]
    return words.rstrip(".") in (dataset, name, name.removesuffix("-1k"))  # "imagenet" is ILSVRC/imagenet-1k


def adopt_card(own: str, generated: str) -> str:
    """Somebody's own card, marked as what a publish may write anew, with the metadata that it lacks.

    Raises:
        ValueError: As from `read_card`.
    """
    card = read_card(own)
    if BEGIN in card.text:
        return own
    metadata = {**ModelCard(generated).data.to_dict(), **card.data.to_dict()}
    return compose_card(ModelCardData(**metadata), f"{BEGIN}\n\n{card.text.strip()}\n\n{END}")


def rename_in_card(card: str, load_name: str) -> str:
    """A card of `make_card` for the same checkpoint, loaded from elsewhere; somebody's own card as it is."""
    before, begin, rest = card.partition(BEGIN)
    use = re.compile(r"## Use\n.*?(?=\n\n(?:## |!\[|<!--))", re.DOTALL)
    return before + begin + use.sub(lambda _: _use(load_name), rest, count=1)
