"""What reading images costs a training: a recipe's ``train.py`` against its own steps on a batch that is there already.

    python benchmarks/epoch.py cifar10_e25 --dataset torch/cifar10 --data-dir DIR

Both by turns, on all cores. ``train.py``'s rate is that of its log over the last epoch's steps after the first hundred,
when its workers have started. With ``--epochs 2`` a folder's images are in memory by then.
"""

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time

import timm
import torch
import yaml
from arguments import positive
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2

import convmixer_timm  # noqa: F401  registers the variants
from convmixer_timm.training.launch import RECIPES

LOG = re.compile(r"Train: (\d+) \[ *(\d+)/\d+.*?Time: *[\d.]+s, *[\d.]+/s +\( *([\d.]+)s")


def steps_alone(recipe: dict, steps: int) -> float:
    """Images a second of training on one batch again and again."""
    model = timm.create_model(recipe["model"], num_classes=recipe["num_classes"])
    size = recipe.get("input_size") or model.pretrained_cfg["input_size"]
    images = torch.randn(recipe["batch_size"], *size)
    if recipe.get("channels_last"):
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.rand(len(images), recipe["num_classes"]).softmax(1)
    optimizer = create_optimizer_v2(model, recipe["opt"], recipe["lr"], recipe["weight_decay"])
    loss_function = SoftTargetCrossEntropy()
    seconds = []
    for _ in range(20 + steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.get("amp", False)):
            loss = loss_function(model(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return len(images) / statistics.mean(seconds[20:])


def of_train(recipe: str, args: list[str], batch_size: int, epochs: int) -> float:
    """Images a second of ``train.py``'s last epoch, its first hundred steps left out."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--output", folder, "--experiment", "run", "--epochs", str(epochs), "--warmup-epochs", "0"]
        command = [sys.executable, "-m", "convmixer_timm", "train", recipe, *options, *args, "--log-interval", "100"]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.stdout)
    means = {int(step): float(mean) for epoch, step, mean in LOG.findall(done.stdout) if int(epoch) == epochs - 1}
    last = max(means, default=0)
    if last <= 100:
        sys.exit(f"an epoch of {last + 1} steps is too short: the first hundred are left out")
    return batch_size * (last - 100) / ((last + 1) * means[last] - 101 * means[100])


if __name__ == "__main__":
    settings = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))}
    recipes = [name for name, recipe in settings.items() if "num_classes" in recipe]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=recipes, help=", ".join(recipes), metavar="RECIPE")
    parser.add_argument("--steps", type=positive, default=150, help="without data")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--epochs", type=positive, default=1, help="of train.py; the last one counts")
    args, others = parser.parse_known_args()
    recipe = settings[args.recipe]
    rates: dict[str, list[float]] = {"steps alone": [], "train.py": []}
    for _ in range(args.repeats):
        rates["steps alone"].append(steps_alone(recipe, args.steps))
        rates["train.py"].append(of_train(args.recipe, others, recipe["batch_size"], args.epochs))
    for name, values in rates.items():
        print(f"{name:12}{statistics.median(values):6.0f} images/s ({min(values):.0f} to {max(values):.0f})")
    alone, train = (statistics.median(values) for values in rates.values())
    print(f"train.py keeps {train / alone:.2f}")
    print(f"{recipe['model']}, torch {torch.__version__}, timm {timm.__version__}")
