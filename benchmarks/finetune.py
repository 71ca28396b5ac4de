"""Fine-tuning a bundled checkpoint on a small set of images, against training the same model from scratch.

    python benchmarks/finetune.py DATA --num-classes 2 --results FILE

DATA has train/CLASS/IMAGE and VAL/CLASS/IMAGE. Every run takes the recipe `finetune`, and counts the last epoch's
accuracy, so that no epoch is chosen by the images that it is measured on.
"""

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
import yaml
from arguments import existing_folder, missing_folders, new_file, positive, pretrained_model

from convmixer_timm.training.launch import RECIPES

# What differs from the recipe. A head alone: every other layer's learning rate falls below what is trained at all.
SETTINGS = {
    "pretrained": {},
    "pretrained, head only": {"layer_decay": 0.1, "layer_decay_no_opt_scale": 0.5},
    "from scratch": {"pretrained": False, "layer_decay": None},
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=existing_folder)
    parser.add_argument("--num-classes", type=positive, required=True)
    parser.add_argument("--val-split", default="val")
    parser.add_argument("--model", type=pretrained_model, help="checkpoint (the recipe's)")
    parser.add_argument("--epochs", type=positive, help="(the recipe's)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--results", type=new_file, help="CSV to write")
    args = parser.parse_args()
    if missing := missing_folders(args.data, "train", args.val_split):
        parser.error(missing)
    recipe = yaml.safe_load((RECIPES / "finetune.yaml").read_text(encoding="utf-8"))
    recipe |= {key: value for key in ("model", "epochs") if (value := getattr(args, key))}
    recipe |= {"num_classes": args.num_classes, "val_split": args.val_split, "val_interval": recipe["epochs"]}

    rows = []
    for seed in range(args.seeds):
        for name in args.settings:
            with tempfile.TemporaryDirectory() as folder:
                config = Path(folder) / "config.yaml"
                config.write_text(yaml.safe_dump({**recipe, **SETTINGS[name], "seed": seed}), encoding="utf-8")
                command = [sys.executable, "-m", "convmixer_timm", "train", str(config), "--output", folder]
                command += ["--experiment", "run", "--data-dir", str(args.data)]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr)
                with (Path(folder) / "run" / "summary.csv").open(encoding="utf-8") as file:
                    *_, last = csv.DictReader(file)
            rows.append({"data": args.data.name, "model": recipe["model"], "setting": name, "seed": seed})
            rows[-1] |= {"epochs": recipe["epochs"], "top1": f"{float(last['eval_top1']):.2f}"}
            print(*rows[-1].values(), sep="  ", flush=True)
    print(f"torch {torch.__version__}, timm {timm.__version__}")
    for name in args.settings:
        top1 = [float(row["top1"]) for row in rows if row["setting"] == name]
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        print(f"{name:24}{statistics.mean(top1):6.1f} (standard deviation {spread:.1f}, {len(top1)} seeds)")
    if args.results:
        with args.results.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
