"""Whether an engine, or a file, gives what the model gives."""

import torch

from .calibration import spread

__all__ = ["TOLERANCES", "check_agreement", "difference", "images_to_compare"]

# In int8 a single image may be off by most of the largest logit where hardly one is of another class: there it is the
# root mean square that counts, a quarter at most for the bundled models and hundreds of CIFAR-10's images.
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.5}
_COMPARED = 32


def images_to_compare(batches: list[torch.Tensor], batch: int | None = None) -> torch.Tensor:
    """Some of the calibration images, of every class.

    Args:
        batches: Of images [N, in_chans, H, W].
        batch: What their number is a multiple of, where every batch has so many.
    """
    images = torch.cat(batches)
    return images[spread(len(images), _COMPARED if batch is None else max(_COMPARED // batch, 1) * batch)]


def difference(found: torch.Tensor, expected: torch.Tensor, precision: str) -> float:
    """How far outputs are from the model's in fp32.

    Returns:
        The largest difference as a share of the largest output; in int8 that of the root mean squares.
    """
    size = torch.linalg.vector_norm if precision == "int8" else lambda values: values.abs().max()
    # A head of zeros gives nothing else.
    return (size((found - expected).double()) / (size(expected.double()) or 1.0)).item()


def check_agreement(found: torch.Tensor, expected: torch.Tensor, precision: str, what: str = "outputs") -> None:
    """Raises RuntimeError where `difference` is more than `TOLERANCES` admit, or no number."""
    by, allowed = difference(found, expected, precision), TOLERANCES[precision]
    if by <= allowed:
        return
    if precision == "int8":
        raise RuntimeError(
            f"the {what} differ by {by:.2g} of their root mean square, more than {allowed}: "
            "more calibration images, of every class, may help"
        )
    raise RuntimeError(f"the {what} differ by {by:.2g} of the largest, more than {allowed}")
