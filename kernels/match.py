"""Which cells of two feature grids show the same point, and what follows from it: places, heat maps, moved masks."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import nearest as near


class Pairs(NamedTuple):
    """Pairs of flat cells [k] int64 of the first and the second grid and their cosines [k] fp32, best first."""

    first: torch.Tensor
    second: torch.Tensor
    score: torch.Tensor


@torch.no_grad()
def match(
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    mutual: bool = True,
    minimum: float = -1.0,
    best: int = 0,
    first_mask: torch.Tensor | None = None,
    second_mask: torch.Tensor | None = None,
) -> Pairs:
    """Nearest neighbour by cosine of every cell of a among the cells of b, as DIFT matches (arXiv 2306.03881).

    a [n, c], b [m, c] of any floating dtype and length, for a grid [c, h, w] ``grid.flatten(1).T``; masks [n], [m] bool
    restrict the cells; ``mutual`` keeps pairs of which each is the other's nearest; ``minimum`` is the lowest cosine,
    ``best`` the number of pairs to keep, 0 for all. The pairs are those of all n x m cosines in double precision
    rounded to fp32, the lowest cell winning a tie, whatever dtype the products run in; memory is linear in n + m. (On a
    device without double precision: those of fp32 products.)
    Returns: Pairs, by descending cosine, then by first cell. Raises: ValueError for features that are empty, not
    finite or of different widths, and for a mask that is empty or of another size.
    """
    if a.shape[-1:] != b.shape[-1:] or a.device != b.device:
        raise ValueError(
            f"The features are {list(a.shape)} on {a.device} and {list(b.shape)} on {b.device}; extract both with the "
            "same settings, on one device."
        )
    one, two = near.Cells(a, first_mask, "first"), near.Cells(b, second_mask, "second")
    i, j = near.Search(one, two, mutual).run()
    score = near.scores_of(one, two, i, j)
    order = score.argsort(descending=True, stable=True)
    order = order[score[order] >= minimum][: best or None]
    return Pairs(one.cells(i[order]), two.cells(j[order]), score[order])


@torch.no_grad()
def refine(pairs: Pairs, a: torch.Tensor, b_grid: torch.Tensor) -> torch.Tensor:
    """Where between the cells the second points of pairs lie: the peak of a quadratic through 3 x 3 cosines.

    a [n, c] as given to ``match``, b_grid [c, h, w]. The quadratic goes through the cell and its four neighbours, and
    the corners give its mixed term: on smooth fields nearer the peak than least squares over all nine. A cell on the
    border has no offset across it, and no point moves further than half a cell.
    Returns: (y, x) [k, 2] fp32 in cells, whole numbers being cell centres.
    """
    c, h, w = b_grid.shape
    flat, places = b_grid.flatten(1).T, []
    steps = torch.tensor([-1, 0, 1], device=b_grid.device)
    size = max(1, near.most(near.PIECE, b_grid.device) // c)
    for first, second in zip(pairs.first.split(size), pairs.second.split(size), strict=True):
        y, x = second // w, second % w
        rows, columns = (y[:, None] + steps).clamp(0, h - 1), (x[:, None] + steps).clamp(0, w - 1)
        around = flat[rows[:, :, None] * w + columns[:, None]].float()
        f = F.cosine_similarity(around, a[first].float()[:, None, None], dim=-1, eps=near.TINY)
        inside = torch.stack([(y > 0) & (y < h - 1), (x > 0) & (x < w - 1)], 1)
        lines = torch.stack([f[:, :, 1], f[:, 1, :]], 1)
        slope, bend = (lines[..., 2] - lines[..., 0]) / 2, lines[..., 2] - 2 * lines[..., 1] + lines[..., 0]
        (gy, gx), (yy, xx) = slope.unbind(1), bend.unbind(1)
        xy = (f[:, 2, 2] - f[:, 2, 0] - f[:, 0, 2] + f[:, 0, 0]) / 4
        area = yy * xx - xy * xy
        whole = inside.all(1) & (area > 0) & (yy < 0)
        together = torch.stack([xy * gx - xx * gy, xy * gy - yy * gx], 1) / torch.where(whole, area, 1)[:, None]
        # Where there is no peak in two dimensions, each axis is followed on its own.
        alone = torch.where(inside & (bend < 0), -slope / torch.where(bend < 0, bend, -1), 0)
        offset = torch.where(whole[:, None], together, alone).clamp(-0.5, 0.5)
        places.append(torch.stack([y, x], 1) + offset)
    return torch.cat(places) if places else b_grid.new_empty(0, 2, dtype=torch.float32)


def at(grid: torch.Tensor, y, x) -> torch.Tensor:
    """Features at fractional cells, bilinear between cell centres, those of the border outside of them.

    grid [c, h, w]; y and x in cells, numbers or tensors [k].
    Returns: [c] or [k, c] in the grid's dtype.
    """
    _, h, w = grid.shape
    y, x = (torch.as_tensor(v, dtype=torch.float32, device=grid.device) for v in (y, x))
    y, x = y.clamp(0, h - 1), x.clamp(0, w - 1)
    top, left = y.long().clamp(max=max(0, h - 2)), x.long().clamp(max=max(0, w - 2))
    down, right = y - top, x - left
    flat, found = grid.flatten(1).T, 0
    for rows, tall in ((top, 1 - down), ((top + 1).clamp(max=h - 1), down)):
        for columns, wide in ((left, 1 - right), ((left + 1).clamp(max=w - 1), right)):
            found = found + flat[rows * w + columns].float() * (tall * wide)[..., None]
    return found.to(grid.dtype)


@torch.no_grad()
def similarity(vector: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Heat map [h, w] fp32 of the cosines of one point's vector [c] with the cells of a grid [c, h, w].

    Raises: ValueError for features that are empty, not finite or of different widths.
    """
    if len(vector) != len(grid):
        raise ValueError(f"The point has {len(vector)} channels and the grid {len(grid)}; extract both alike.")
    point, cells = near.Cells(vector[None], None, "point's"), near.Cells(grid.flatten(1).T, None, "grid's")
    second = torch.arange(cells.count, device=grid.device)
    return near.scores_of(point, cells, torch.zeros_like(second), second).view(grid.shape[1:])


@torch.no_grad()
def transfer(
    mask: torch.Tensor, a_grid: torch.Tensor, b_grid: torch.Tensor, *, nearest: int = 5, temperature: float = 0.1
) -> torch.Tensor:
    """Where a mask of one picture is in another: the geometric mean of two votes.

    mask [h, w], bool or 0 to 1, of the cells of a_grid [c, h, w]; b_grid [c, h', w']. PDM's (arXiv 2405.18025): every
    cell of the mask votes for the cells of b that are most alike, as many as the mask has (PDM: 100 of 4,096), and sums
    are divided by the largest. Label propagation as DIFT uses it for video (arXiv 2306.03881): every cell of b takes
    the mean of the mask at its ``nearest`` cells in a, weighed by the softmax of cosine / ``temperature``. The first
    alone takes in what is only a little alike; the second what a has nothing alike for, such as another ground.
    Returns: [h', w'] fp32, 0 to 1. Raises: ValueError for a mask of another size, for features that are empty, not
    finite or of different widths, and for a number that is not positive.
    """
    if mask.shape != a_grid.shape[1:] or len(a_grid) != len(b_grid):
        raise ValueError(
            f"A mask {list(mask.shape)} does not fit grids {list(a_grid.shape)} and {list(b_grid.shape)}; resize the "
            "mask to the first grid, and extract both grids with the same settings."
        )
    if nearest < 1 or temperature <= 0:
        raise ValueError(f"nearest {nearest} and temperature {temperature} must both be above 0.")
    labels = mask.flatten().to(a_grid.device, torch.float32)
    inside = labels > 0
    if not inside.any():
        return labels.new_zeros(b_grid.shape[1:])
    first, second = a_grid.flatten(1).T, b_grid.flatten(1).T
    one, two = near.Cells(second, None, "second"), near.Cells(first, None, "first")
    own = []
    for _, cosines, cells in _most_alike(one, two, nearest):
        own.append(((cosines / temperature).softmax(1) * labels[cells]).sum(1))
    votes, weights = torch.zeros_like(one.scale, dtype=torch.float32), labels[inside]
    for part, _, cells in _most_alike(near.Cells(first, inside, "first"), one, max(1, round(float(labels.sum())))):
        votes.index_add_(0, cells.flatten(), weights[part, None].expand_as(cells).flatten())
    return (torch.cat(own) * votes / votes.max()).sqrt().clamp(0, 1).view(b_grid.shape[1:])


def _most_alike(one: near.Cells, two: near.Cells, count: int):
    """(part, cosines [part, count], cells of two [part, count]) for one's cells in turn, highest cosines first."""
    block, strip = (near.most(n, one.x.device) for n in (near.BLOCK, near.STRIP))
    rows = max(1, min(block // 4 // two.count, strip // one.x.shape[1]))
    page = torch.empty(min(rows, one.count), two.count, device=one.scale.device)
    for part in one.parts(rows):
        cosines = near.page_of(one, two, part, page[: part.stop - part.start])
        yield part, *cosines.topk(min(count, two.count))
