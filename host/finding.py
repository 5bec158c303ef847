"""Where a point or the masked part of one picture is in other pictures, and which of them show it."""

import json
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..carriers.features import Features
from ..kernels import match as kernel
from .feature_places import ROLES
from .matching import both, covered, in_cells, in_pixels, picture_mask, picture_of, points, reach, side_by_side
from .overlays import overlay
from .pictures import bars, batch


class Places(NamedTuple):
    """One point of the first picture in each of the second ones."""

    point: tuple[float, float]
    """x and y in pixels of the first picture."""
    heat: torch.Tensor
    """Cosines [n, h, w] of the point with the cells of every picture."""
    best: torch.Tensor
    """[n, 2] x and y in pixels of the place that is most alike, between the cells."""
    size: tuple[int, int]
    """Height and width of the second pictures in pixels."""

    def json(self) -> str:
        """A list of [x, y, x, y, cosine], one per picture."""
        rows = [
            [*self.point, *place, score]
            for place, score in zip(self.best.tolist(), self.heat.flatten(1).amax(1).tolist(), strict=True)
        ]
        return json.dumps([[round(v, 3) for v in row] for row in rows])

    def masks(self) -> torch.Tensor:
        """MASK [n, H, W]: the cosines, 0 for the lowest of all pictures and 1 for the highest."""
        low, high = self.heat.min(), self.heat.max()
        spread = (self.heat - low) / (high - low).clamp_min(1e-12)
        return in_pixels(spread, self.size)


def centre(mask: torch.Tensor, features: Features) -> tuple[float, float]:
    """x and y of the middle of a MASK [1 or n, H, W] in pixels of the features' pictures.

    Raises: ValueError for an empty one.
    """
    one = picture_mask(mask).double().clamp(0, 1)
    total = float(one.sum())
    if total < 1e-6:
        raise ValueError("The mask is empty, so there is no point; paint a dot into it, or disconnect it and set x, y.")
    height, width = one.shape
    x = float((one.sum(0) * (torch.arange(width) + 0.5)).sum()) / total
    y = float((one.sum(1) * (torch.arange(height) + 0.5)).sum()) / total
    return x * features.width / width, y * features.height / height


def places(first: Features, second: Features, name: str, x: float, y: float) -> Places:
    """Where a point of the first features' first picture is in each of the second features' pictures.

    x and y in pixels. Features between cells are bilinear, and the best cell is refined as ``kernels.match.refine``.
    Raises: ValueError for a point outside of the picture, and as ``both`` does.
    """
    if not (0 <= x <= first.width and 0 <= y <= first.height):
        raise ValueError(
            f"The point {x:g}, {y:g} is outside of the first picture, which is {first.width} x {first.height}; "
            "x counts from its left and y from its top, in pixels."
        )
    heat, best, size = [], [], (second.height, second.width)
    for number in range(len(second.map(name))):
        a, b = both(first, second, name, 0, number)
        down, right = reach(a.shape[1:], (first.height, first.width))
        vector = kernel.at(a, y * a.shape[1] / down - 0.5, x * a.shape[2] / right - 0.5)
        seen = kernel.similarity(vector, b)
        cell = seen.argmax().view(1)
        pair = kernel.Pairs(torch.zeros_like(cell), cell, seen.flatten()[cell])
        best.append(points(*kernel.refine(pair, vector[None], b).unbind(1), b.shape[1:], size))
        heat.append(seen)
    return Places((x, y), torch.stack(heat), torch.cat(best), size)


def shown(found: Places, first: Features, one: torch.Tensor | None, others: torch.Tensor | None) -> torch.Tensor:
    """IMAGE [n, H, W, 3]: the first picture and the point on the left, each other one under its heat on the right.

    one [h, w, 3] and others [m, h, w, 3] of any size, or None for grey. Every overlay is spread over its own range.
    """
    pages = []
    left = picture_of(one, (first.height, first.width))
    for number, (heat, place) in enumerate(zip(found.heat, found.best.tolist(), strict=True)):
        own = None if others is None else others[min(number, len(others) - 1)]
        hot = overlay(batch([picture_of(own, found.size)])[0], in_pixels(heat[None], found.size)[0])
        page, draw, start = side_by_side(left, picture_of(hot, found.size))
        for x, y in (found.point, (place[0] + start, place[1])):
            for radius, colour in ((6, (20, 20, 20)), (5, (255, 255, 255)), (4, (20, 20, 20))):
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], outline=colour)
        pages.append(page)
    return batch(pages)


class Ranking(NamedTuple):
    """Pictures by how surely they show a thing."""

    order: list[tuple[int, float]]
    """Number of the picture and its score, best first."""
    maps: list[str]
    """What the scores are made from."""

    def json(self) -> str:
        """A list of [picture, score], best first."""
        return json.dumps([[number, round(score, 4)] for number, score in self.order])

    def text(self) -> str:
        """The order and the maps in words."""
        return ", ".join(f"picture {n}: {score:.3f}" for n, score in self.order) + f"; by {', '.join(self.maps)}"

    def chart(self) -> torch.Tensor:
        """IMAGE [1, h, w, 3] of bars."""
        return bars([(f"picture {n}", score) for n, score in self.order], f"which shows it, by {', '.join(self.maps)}")


def ranked(reference: Features, candidates: Features, mask: torch.Tensor | None) -> Ranking:
    """Which candidates show the masked part of the reference's first picture.

    PDM's retrieval (arXiv 2405.18025): every cell inside has a nearest cell by DIFT; the score is the mean over these
    pairs of DIFT's cosine times the cosine of queries, and the same with keys, of which the mean is taken. Of queries
    and keys, those that either side lacks are left out; without both, DIFT's cosine stands alone.
    Raises: ValueError for a mask that covers no cell, and as ``both`` does.
    """
    looks = [role for role in ROLES[:2] if role in reference.maps and role in candidates.maps]
    scores = []
    for number in range(len(candidates.map("dift"))):
        a, b = both(reference, candidates, "dift", 0, number)
        inside = covered(mask, a, "reference's", size=(reference.height, reference.width))
        found = kernel.match(a.flatten(1).T, b.flatten(1).T, mutual=False, first_mask=inside)
        score, alike = found.score, []
        for role in looks:
            one, two = both(reference, candidates, role, 0, number)
            own = (one, found.first, a, (reference.height, reference.width))
            other = (two, found.second, b, (candidates.height, candidates.width))
            alike.append(F.cosine_similarity(at_cells(*own), at_cells(*other)))
        scores.append(float((score * torch.stack(alike).mean(0) if alike else score).mean()))
    order = sorted(enumerate(scores), key=lambda pair: -pair[1])
    return Ranking(order, ["dift", *looks])


def at_cells(grid: torch.Tensor, cells: torch.Tensor, like: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Features [k, c] of a grid [c, h, w] at the centres of flat cells [k] of another grid of the same picture (height,
    width)."""
    (down, right), (own_down, own_right) = (
        [far // n for far, n in zip(reach(g.shape[1:], size), g.shape[1:], strict=True)] for g in (like, grid)
    )
    y, x = cells // like.shape[2], cells % like.shape[2]
    return kernel.at(grid, (y + 0.5) * (down / own_down) - 0.5, (x + 0.5) * (right / own_right) - 0.5)


def transferred(first: Features, second: Features, name: str, mask: torch.Tensor) -> torch.Tensor:
    """MASK [n, H, W] of the second features' pictures: where the first picture's ``mask`` is in each of them.

    Raises: ValueError for an empty mask, and as ``both`` does.
    """
    if not bool((picture_mask(mask) > 0).any()):
        raise ValueError("The mask is empty, so there is nothing to find; paint the part into it.")
    found = []
    for number in range(len(second.map(name))):
        a, b = both(first, second, name, 0, number)
        own = in_cells(picture_mask(mask), a.shape[-2:], (first.height, first.width))
        found.append(in_pixels(kernel.transfer(own, a, b)[None], (second.height, second.width))[0])
    return torch.stack(found).clamp(0, 1)
