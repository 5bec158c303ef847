"""Small pictures that nodes show: batches of PIL images, loss curves, bars; numbers and labels, no plotting library."""

from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageDraw

WIDTH = 640
"""Of curves and bars in pixels."""


def batch(images: list[Image.Image]) -> torch.Tensor:
    """PIL pictures of one size -> IMAGE [n, h, w, 3] or MASK [n, h, w], 0..1."""
    return torch.from_numpy(np.stack([np.asarray(i) for i in images]).astype(np.float32) / 255)


def loss_curve(losses: list[float], title: str, height: int = 360) -> torch.Tensor:
    """Losses and their running mean over 5% of the run -> IMAGE [1, height, WIDTH, 3]; nan leaves a gap."""
    image = Image.new("RGB", (WIDTH, height), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = 56, 28, WIDTH - 14, height - 30
    known = np.isfinite(losses)
    low, high = np.min(losses, where=known, initial=np.inf), np.max(losses, where=known, initial=-np.inf)
    span = (high - low) or 1.0
    window = max(1, len(losses) // 20)
    sums, counts = (
        np.convolve(v, np.ones(window), "full")[: len(losses)] for v in (np.where(known, losses, 0.0), known)
    )
    mean = sums / np.maximum(counts, 1)

    def line(values, fill, width):
        points = [
            (left + (right - left) * i / max(1, len(values) - 1), bottom - (bottom - top) * (v - low) / span)
            for i, v in enumerate(values)
        ]
        for seen, run in groupby(range(len(points)), known.__getitem__):
            run = [points[i] for i in run]
            if seen and len(run) > 1:
                draw.line(run, fill=fill, width=width)

    draw.rectangle([left, top, right, bottom], outline=(200, 200, 200))
    line(np.where(known, losses, low), (170, 200, 230), 1)
    line(mean, (20, 80, 160), 2)
    draw.text((left, 8), title, fill=(30, 30, 30))
    draw.text((6, top), f"{high:.3g}", fill=(90, 90, 90))
    draw.text((6, bottom - 10), f"{low:.3g}", fill=(90, 90, 90))
    draw.text((left, bottom + 8), "1", fill=(90, 90, 90))
    draw.text((right - 34, bottom + 8), str(len(losses)), fill=(90, 90, 90))
    return batch([image])


def loss_curves(named: dict[str, list[float]], title: str) -> torch.Tensor:
    """One ``loss_curve`` per name, from top to bottom, each on its own scale -> IMAGE [1, h, w, 3]."""
    height = 360 if len(named) == 1 else 240
    return torch.cat([loss_curve(v, f"{title} {k}".strip(), height=height) for k, v in named.items()], 1)


def bars(rows: list[tuple[str, float]], title: str, adapt: bool = False) -> torch.Tensor:
    """Labelled horizontal bars for values in 0..1, or up to their largest (``adapt``) -> IMAGE [1, h, WIDTH, 3]."""
    most = max([1e-12, *(value for _, value in rows)]) if adapt else 1.0
    image = Image.new("RGB", (WIDTH, 40 + 20 * max(1, len(rows))), (250, 250, 250))
    draw = ImageDraw.Draw(image)
    draw.text((12, 10), title, fill=(30, 30, 30))
    for number, (label, value) in enumerate(rows):
        y = 34 + 20 * number
        draw.text((12, y), label.encode("latin-1", "replace").decode("latin-1"), fill=(30, 30, 30))
        draw.rectangle(
            [220, y + 1, 220 + (WIDTH - 300) * max(0.0, min(1.0, value / most)), y + 13], fill=(70, 130, 190)
        )
        draw.text((WIDTH - 66, y), f"{value:.3g}" if adapt else f"{value:.3f}", fill=(90, 90, 90))
    return batch([image])
