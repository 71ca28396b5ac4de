"""Finds images of one folder that are in another too, whatever their size or encoding.

    python benchmarks/near_duplicates.py ants_bees tiny-imagenet-200 --above 0.9

Pre-training on a photograph that later stands among the test images flatters fine-tuning. Each image is shrunk to
16 x 16 pixels, those of the first folder twice (whole, and its central square, as datasets are made either way); the
figure is the greatest correlation of the pixels, 1 for the same picture.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from arguments import existing_folder, named_errors
from PIL import Image, ImageOps

from convmixer_timm.images import find_images, load_image

SIDE = 16


def fingerprints(file: Path, square: bool) -> list[np.ndarray]:
    """One unit vector (768) of the whole image, and one of its central square if ``square``."""
    image = load_image(file)
    views = [image.resize((SIDE, SIDE), Image.Resampling.BOX)]
    if square:
        views.append(ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.BOX))
    pixels = [np.asarray(view, dtype=np.float32).ravel() for view in views]
    centred = [p - p.mean() for p in pixels]
    return [p / max(float(np.linalg.norm(p)), 1e-6) for p in centred]


def pairs(few: Path, many: Path, above: float) -> list[tuple[float, Path, Path]]:
    """Correlation, image of ``few``, image of ``many`` for every pair above the limit; most similar first."""
    files, others = find_images([few]), find_images([many])
    with ThreadPoolExecutor() as pool:
        queries = np.array(list(pool.map(lambda f: fingerprints(f, True), files)))  # [files, 2 views, 768]
        index = np.array([views[0] for views in pool.map(lambda f: fingerprints(f, False), others)])
    found = []
    for file, views in zip(files, queries, strict=False):
        similarity = (index @ views.T).max(1)
        found += [(float(similarity[i]), file, others[i]) for i in np.flatnonzero(similarity > above)]
    return sorted(found, reverse=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("few", type=existing_folder)
    parser.add_argument("many", type=existing_folder)
    parser.add_argument("--above", type=float, default=0.9, metavar="CORRELATION")
    args = parser.parse_args()
    with named_errors(parser):
        found = pairs(args.few, args.many, args.above)
    for similarity, file, other in found:
        print(f"{similarity:.3f}  {file}  {other}")
    few, many = {file for _, file, _ in found}, {other for _, _, other in found}
    print(f"above {args.above}: {len(few)} images of {args.few}, {len(many)} of {args.many}")
