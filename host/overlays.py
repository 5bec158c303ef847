"""Attention maps as pictures: a labelled grid of overlays, and masks."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .attention import Layer
from .pictures import batch

LABEL = 16
"""Height of a line of text in pixels."""
SIDE = 256
"""Longest side of a picture out of a latent, in pixels, unless the latent's is longer."""
HOT = torch.tensor([[0.0, 0.0, 0.3], [0.2, 0.3, 0.9], [0.1, 0.8, 0.6], [1.0, 0.9, 0.1], [0.9, 0.1, 0.0]])
"""Colours from no attention to the map's highest value."""


def by_scale(maps: Mapping[Layer, torch.Tensor], column: int) -> dict[int, torch.Tensor]:
    """Latent pixels per map pixel -> mean map [h, w] over the layers of that size, largest maps first.

    maps: layer -> [n, c].
    """
    groups: dict[int, list[torch.Tensor]] = {}
    for layer, seen in maps.items():
        groups.setdefault(layer.scale, []).append(seen[:, column].reshape(layer.height, layer.width).float().cpu())
    return {scale: torch.stack(groups[scale]).mean(0) for scale in sorted(groups)}


def mask_of(
    maps: list[Mapping[Layer, torch.Tensor]], column: int, height: int, width: int, pixels: int
) -> torch.Tensor:
    """MASK [1, height, width]: the mean of the map over layer groups and passes, spread to 0..1.

    ``pixels``: of the mask per latent pixel's side.
    """
    size = (height, width)
    parts = [_sized(one, size, scale * pixels) for each in maps for scale, one in by_scale(each, column).items()]
    return _spread(torch.stack([p / p.mean().clamp_min(1e-12) for p in parts]).mean(0))[None]


def _sized(one: torch.Tensor, size: tuple[int, int], cell: int) -> torch.Tensor:
    # not stretched over the picture: the last cells may lie in part outside of it
    far = [cells * cell for cells in one.shape]
    return F.interpolate(one[None, None], far, mode="bilinear")[0, 0, : size[0], : size[1]]


def _spread(one: torch.Tensor) -> torch.Tensor:
    one = one.nan_to_num(0.0, 0.0, 0.0)  # a model that learns at too high a rate gives these
    low, high = one.min(), one.max()
    return (one - low) / (high - low).clamp_min(1e-12)


def background(latent_format, latent: torch.Tensor) -> torch.Tensor:
    """A picture [h, w, 3] of a model-space latent [1, c, h, w] by the family's colour factors; grey without them."""
    factors, bias = latent_format.latent_rgb_factors, getattr(latent_format, "latent_rgb_factors_bias", None)
    height, width = latent.shape[-2:]
    grow = max(1, SIDE // max(height, width))
    if factors is None or len(factors) != latent.shape[1]:
        return torch.full((height * grow, width * grow, 3), 0.5)
    colour = latent[0].float().cpu().movedim(0, -1) @ torch.tensor(factors).float()
    colour = ((colour + (torch.tensor(bias) if bias is not None else 0) + 1) / 2).clamp(0, 1)
    return F.interpolate(colour.movedim(-1, 0)[None], scale_factor=grow, mode="bilinear")[0].movedim(0, -1)


def overlay(picture: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    """Picture [h, w, 3] under the colours of a map [h, w]; the strongest pixels hide most of it."""
    heat = _spread(one)
    place = heat * (len(HOT) - 1)
    low = place.floor().clamp(max=len(HOT) - 2).long()
    colour = torch.lerp(HOT[low], HOT[low + 1], (place - low)[..., None])
    return torch.lerp(picture.float().cpu(), colour, (0.25 + 0.5 * heat)[..., None])


def grid(
    picture: torch.Tensor, words: list[str], passes: list[tuple[str, Mapping[Layer, torch.Tensor]]], pixels: int
) -> torch.Tensor:
    """IMAGE [1, H, W, 3]: a row per word, a column per pass and size of maps.

    picture [h, w, 3] in 0..1; ``passes``: label and layer -> [n, words]; ``pixels``: of the picture per latent pixel's
    side. Each overlay is spread over its own range; the number below it is the share of the attention that the word
    has, in percent.
    """
    columns = [(label, scale) for label, maps in passes for scale in by_scale(maps, 0)]
    height, width = picture.shape[:2]
    left = 8 + 7 * max(len(w) for w in words)
    size = (left + len(columns) * (width + 4), 2 * LABEL + len(words) * (height + LABEL + 4))
    image = Image.new("RGB", size, (250, 250, 250))
    draw = ImageDraw.Draw(image)
    for x, (label, scale) in enumerate(columns):
        draw.text((left + x * (width + 4), 2), label, fill=(30, 30, 30))
        draw.text((left + x * (width + 4), LABEL), f"1/{scale} size", fill=(90, 90, 90))
    for y, word in enumerate(words):
        top = 2 * LABEL + y * (height + LABEL + 4)
        draw.text((4, top + height // 2), word.encode("latin-1", "replace").decode("latin-1"), fill=(30, 30, 30))
        cells = [pair for _, maps in passes for pair in by_scale(maps, y).items()]
        for x, (scale, one) in enumerate(cells):
            shown = (overlay(picture, _sized(one, (height, width), scale * pixels)) * 255).round().byte().numpy()
            image.paste(Image.fromarray(shown), (left + x * (width + 4), top))
            draw.text((left + x * (width + 4), top + height + 1), f"{100 * float(one.mean()):.1f}%", fill=(90, 90, 90))
    return batch([image])
