"""What the registered variants cost and which weights there are for them."""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Variant", "table", "variants"]


@dataclass(frozen=True)
class Variant:
    """One registered ConvMixer: its name, parameters, multiply-adds at its input size (C, H, W), and weights."""

    name: str
    params: int
    macs: int
    input_size: tuple[int, int, int]
    weights: tuple[str, ...]


def variants() -> list[Variant]:
    """All registered ConvMixers, by timm's order of names. Nothing is computed: the models are made without data."""
    out = []
    for name in timm.list_models("convmixer*"):
        model: Any = timm.create_model(name, device="meta").eval()
        size = tuple(model.pretrained_cfg["input_size"])
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *size, device="meta"))
        out.append(
            Variant(
                name=name,
                params=sum(p.numel() for p in model.parameters()),
                macs=counter.get_total_flops() // 2,
                input_size=size,
                weights=tuple(timm.list_pretrained(f"{name}.*")),
            )
        )
    return out


def table() -> list[str]:
    """The registered ConvMixers as lines of text."""
    rows = [("variant", "params (M)", "GMACs", "input", "weights")]
    for v in variants():
        size = "x".join(map(str, v.input_size))
        rows.append((v.name, f"{v.params / 1e6:.2f}", f"{v.macs / 1e9:.2f}", size, ", ".join(v.weights) or "-"))
    name, *widths = (max(len(row[i]) for row in rows) for i in range(4))
    return [
        "  ".join([f"{row[0]:<{name}}", *(f"{row[i]:>{width}}" for i, width in enumerate(widths, 1)), row[4]])
        for row in rows
    ]
