"""Features of two pictures as matches in pixels, and pictures of them."""

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ..carriers.errors import CarrierMismatch
from ..carriers.features import Features
from ..kernels import match as kernel
from .overlays import HOT
from .pictures import batch


@dataclass(frozen=True)
class Matches:
    """Points of two pictures that belong together, best first."""

    first: torch.Tensor
    """[k, 2] x and y in pixels of the first picture."""
    second: torch.Tensor
    score: torch.Tensor
    """Cosine [k]."""
    first_size: tuple[int, int]
    """Height and width in pixels."""
    second_size: tuple[int, int]

    def json(self) -> str:
        """A list of [x, y, x, y, cosine], best first."""
        rows = torch.cat([self.first, self.second, self.score[:, None]], 1).tolist()
        return json.dumps([[round(v, 3) for v in row] for row in rows])

    def tracks(self, frames: int) -> dict[str, torch.Tensor]:
        """The host's TRACKS: straight paths [frames, k, 2] from each first point to its second, in the first picture's
        pixels, all of them visible [frames, k] (comfy_extras/nodes_wanmove.py)."""
        scale = self.first.new_tensor(
            [a / b for a, b in zip(self.first_size[::-1], self.second_size[::-1], strict=True)]
        )
        path = torch.lerp(self.first, self.second * scale, torch.linspace(0, 1, frames)[:, None, None])
        return {"track_path": path, "track_visibility": torch.ones(path.shape[:2], dtype=torch.bool)}


def grid_of(features: Features, name: str, picture: int) -> torch.Tensor:
    """One map [c, h, w]. Raises: ValueError when there is no such picture; CarrierError listing the maps."""
    maps = features.map(name)
    if not 0 <= picture < len(maps):
        raise ValueError(f"There is no picture {picture}; the features are of {len(maps)}, counted from 0.")
    return maps[picture]


def both(first: Features, second: Features, name: str, one: int, two: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The maps of both pictures. Raises: CarrierMismatch when they cannot be compared."""
    a, b = grid_of(first, name, one), grid_of(second, name, two)
    if len(a) == 1:
        raise CarrierMismatch(
            f"{name} says how much a cell belongs to a word, one number each, so no two cells differ by their cosine; "
            "choose dift, query, key or value."
        )
    sources = [(f.info.get("base"), f.info.get("sources", {}).get(name, {}).get("layer")) for f in (first, second)]
    for what, *values in zip(("model", "layer"), *sources, strict=True):
        if None not in values and values[0] != values[1]:
            raise CarrierMismatch(
                f"{name} comes from {what} {values[0]} in the first features and from {values[1]} in the second; "
                "extract both with the same model, block and layer."
            )
    if len(a) != len(b):
        raise CarrierMismatch(
            f"{name} has {len(a)} channels in the first features and {len(b)} in the second; extract both with the "
            "same model, block and layer."
        )
    return a, b


def picture_mask(mask: torch.Tensor, picture: int = 0) -> torch.Tensor:
    """The [H, W] of one picture in a MASK [H, W] or [n, H, W], on the CPU; a single one is every picture's.

    Raises: ValueError when there are several and none for this picture.
    """
    several = mask if mask.ndim == 3 else mask[None]
    if 1 < len(several) <= picture:
        raise ValueError(f"There is no mask for picture {picture}; the masks are {len(several)}, counted from 0.")
    return several[picture if len(several) > 1 else 0].cpu()  # as features are; --gpu-only leaves masks elsewhere


def reach(grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Pixels over which a grid (rows, columns) of a picture (height, width) reaches: cells are powers of two, as
    networks halve, and the last ones lie in part outside of a picture whose sides are no multiples of them."""
    return tuple(cells << (-(-side // cells) - 1).bit_length() for cells, side in zip(grid, size, strict=True))


def in_cells(mask: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """A MASK [H, W] of any size as shares of the cells [h, w] of a picture (height, width); outside as at its edge."""
    far = reach(grid, size)
    down, right = (round(own * (f / s - 1)) for own, f, s in zip(mask.shape, far, size, strict=True))
    whole = F.pad(mask[None, None].float(), (0, right, 0, down), mode="replicate")
    return F.interpolate(whole, grid, mode="area")[0, 0]


def in_pixels(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Maps [n, h, w] of cells over the pictures [n, height, width] that they are of."""
    spread = F.interpolate(maps[:, None], reach(maps.shape[-2:], size), mode="bilinear", align_corners=False)
    return spread[:, 0, : size[0], : size[1]]


def covered(
    mask: torch.Tensor | None, like: torch.Tensor, which: str, picture: int = 0, size: tuple[int, int] | None = None
) -> torch.Tensor | None:
    """Cells [h * w] of the grid ``like`` [c, h, w] that a picture's MASK covers by half.

    ``size``: height and width of the picture where the mask's are others.
    Raises: ValueError when it covers none, and as ``picture_mask`` does.
    """
    if mask is None:
        return None
    one = picture_mask(mask, picture)
    cells = in_cells(one, like.shape[-2:], size or one.shape).flatten() > 0.5
    if not bool(cells.any()):
        raise ValueError(
            f"The {which} mask covers no cell of the {like.shape[-2]} x {like.shape[-1]} grid by half; paint more, or "
            "extract features on a finer grid."
        )
    return cells


def points(y: torch.Tensor, x: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]) -> torch.Tensor:
    """Centres of cells of a grid (rows, columns) as [k, 2] x and y in pixels of a picture (height, width), at its last
    pixel where they are outside."""
    (height, width), (down, right) = grid, reach(grid, size)
    across, along = (x + 0.5) * right / width, (y + 0.5) * down / height
    return torch.stack([across.clamp(max=size[1] - 0.5), along.clamp(max=size[0] - 0.5)], 1)


def matches(first, second, name, pictures=(0, 0), masks=(None, None), *, mutual, minimum, best, finer) -> Matches:
    """Cells of two pictures that belong together.

    ``pictures``: which of either; ``masks``: MASKs or None; ``finer``: parts of a cell in the second picture.
    Raises: ValueError when nothing is left, and as ``both`` and ``covered`` do.
    """
    a, b = both(first, second, name, *pictures)
    sizes = ((first.height, first.width), (second.height, second.width))
    inside = [covered(*parts) for parts in zip(masks, (a, b), ("first", "second"), pictures, sizes, strict=True)]
    flat = [g.flatten(1).T for g in (a, b)]
    found = kernel.match(*flat, mutual=mutual, minimum=minimum, best=best, first_mask=inside[0], second_mask=inside[1])
    if not len(found.first):
        raise ValueError(
            f"No pair{' that is mutual' if mutual else ''} has a cosine of {minimum:g} or more; lower minimum_score"
            f"{', turn mutual off' if mutual else ''}, or paint larger masks."
        )
    y, x = (found.second // b.shape[2]).float(), (found.second % b.shape[2]).float()
    if finer:
        y, x = kernel.refine(found, flat[0], b).unbind(1)
    own = points((found.first // a.shape[2]).float(), (found.first % a.shape[2]).float(), a.shape[1:], sizes[0])
    return Matches(own, points(y, x, b.shape[1:], sizes[1]), found.score, *sizes)


def joined(found: Matches, one: torch.Tensor | None, two: torch.Tensor | None, shown: int) -> torch.Tensor:
    """IMAGE [1, H, W, 3]: both pictures side by side, the best ``shown`` matches as lines, coloured by score.

    one, two: [h, w, 3] of any size, or None for grey; they are drawn as large as the features say.
    """
    sides = [picture_of(p, size) for p, size in ((one, found.first_size), (two, found.second_size))]
    page, draw, left = side_by_side(*sides)
    low, high = (float(found.score[:shown].min()), float(found.score[:shown].max()))
    for a, b, score in reversed(list(zip(found.first[:shown], found.second[:shown], found.score[:shown], strict=True))):
        place = (float(score) - low) / (high - low or 1) * (len(HOT) - 1)
        part = min(int(place), len(HOT) - 2)
        colour = tuple(int(255 * v) for v in torch.lerp(HOT[part], HOT[part + 1], place - part))
        ends = [(float(a[0]), float(a[1])), (float(b[0]) + left, float(b[1]))]
        draw.line(ends, fill=colour, width=1)
        for x, y in ends:
            draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill=colour)
    return batch([page])


def side_by_side(left: Image.Image, right: Image.Image, gap: int = 12) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A page with both pictures, what draws on it, and the x at which the right one begins."""
    start = left.width + gap
    page = Image.new("RGB", (start + right.width, max(left.height, right.height)), (250, 250, 250))
    page.paste(left, (0, 0))
    page.paste(right, (start, 0))
    return page, ImageDraw.Draw(page), start


def picture_of(picture: torch.Tensor | None, size: tuple[int, int]) -> Image.Image:
    """A picture [h, w, 3] in 0..1 as large as height and width say; grey without one."""
    if picture is None:
        return Image.new("RGB", size[::-1], (128, 128, 128))
    array = (picture[..., :3].float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    return Image.fromarray(array).resize((size[1], size[0]), Image.BILINEAR)
