"""Packs a finished training run as a bundled checkpoint and records it in the manifest.

    python benchmarks/pack.py output/train/cifar10_e25 convmixer_256_8.e25_cifar10 --results test.csv \\
        --train-data "CIFAR-10's training images" --test-data "CIFAR-10's test images" --machine "one GPU" --hours 0.5

RESULTS is what ``validate.py --results-file`` wrote for the run's last checkpoint on the test images, at which one
looks once, when the training is over.
"""

import argparse
import csv
from dataclasses import replace

import timm
from arguments import existing_file, existing_folder, named_errors

from convmixer_timm.convmixer import WEIGHTS_DIR
from convmixer_timm.hub.cards import Evaluation
from convmixer_timm.hub.packing import pack
from convmixer_timm.hub.sources import read_run
from convmixer_timm.hub.verify import record
from convmixer_timm.inference.labels import read_labels

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=existing_folder)
    parser.add_argument("name", help="architecture.tag")
    parser.add_argument("--results", type=existing_file, required=True, help="of validate.py, CSV")
    parser.add_argument("--ema", action="store_true", help="take the averaged weights")
    for option in ("--train-data", "--test-data", "--machine"):
        parser.add_argument(option, required=True)
    parser.add_argument("--hours", type=float, required=True)
    parser.add_argument("--dataset", help="as the Hub names it, OWNER/NAME")
    parser.add_argument("--labels", type=existing_file, help="names of the classes, one a line; else the run's own")
    parser.add_argument("--input-size", type=int, nargs=3, metavar="N", help="of the results, if not the training's")
    parser.add_argument("--crop-pct", type=float, help="of the results, if not the training's")
    parser.add_argument("--again", help="how to repeat a run that was resumed with other settings, as Markdown")
    args = parser.parse_args()
    with args.results.open(encoding="utf-8") as file:
        measured = [(row.get("top1"), row.get("top5")) for row in csv.DictReader(file)]
    if len(measured) != 1 or not all(measured[0]):
        parser.error(f"{args.results} is to have one line with its top1 and top5, as validate.py writes it")
    top1, top5 = map(float, measured[0])
    with named_errors(parser):
        labels = read_labels(args.labels) if args.labels else None
        source = read_run(args.run, labels=labels, checkpoint="last.pth.tar", ema=args.ema)
    assert source.training is not None
    if args.input_size:
        source.model.pretrained_cfg["input_size"] = tuple(args.input_size)
    if args.crop_pct:
        source.model.pretrained_cfg["crop_pct"] = args.crop_pct
    time = f"{args.hours:.1f} hours" if args.hours >= 1 else f"{args.hours * 60:.1f} minutes"
    training = replace(
        source.training,
        data=args.train_data,
        dataset=args.dataset or source.training.dataset,
        cost=f", {time} on {args.machine}",
        again=args.again or source.training.again,
        resumed="" if args.again else source.training.resumed,
    )
    evaluation = Evaluation(
        top1=top1,
        top5=top5,
        data=f"{args.test_data}, looked at once, after the training",
    )
    pack(replace(source, training=training, evaluation=evaluation), WEIGHTS_DIR / args.name)
    if args.name in timm.list_pretrained():
        record([args.name])
    else:
        print(
            f"Packed. Write the line of {args.name} into convmixer_timm/convmixer.py, and run this again to record it."
        )
