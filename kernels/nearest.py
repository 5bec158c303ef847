"""Nearest neighbours by cosine between two sets of feature vectors, in memory that is linear in the cells.

Cosines are made a block at a time. Blocks are cheap and approximate; whatever may be nearest within a proven bound of
their error is scored again from the features in double precision.
"""

import contextlib

import torch

from .precision import fp32_products

BLOCK = 1 << 22
"""Cosines that exist at the same time: 8 MB in bf16."""
PIECE = 1 << 17
"""Elements of gathered features, which should stay in the cache while they are multiplied."""
STRIP = 1 << 20
"""Elements of features that are converted at the same time for a block."""
GROUP = 32
"""Cosines that share a maximum; only groups whose maximum is high enough are looked into."""
AWAY = 16
"""These three are so many times larger off the CPU, where calls cost more than memory does."""
FEW = 32
"""A block in which more than one cosine in so many is close to the best is computed in double precision instead."""
SMALL = 1 << 15
"""Multiplications that are too few for a block to pay."""
TINY = 1e-12
"""A vector shorter than this has no direction: its cosine with every other is 0."""


def most(elements: int, device: torch.device) -> int:
    """``BLOCK``, ``PIECE`` or ``STRIP`` of a device."""
    return elements if device.type == "cpu" else AWAY * elements


def _precise(device: torch.device) -> torch.dtype:
    return torch.float64 if device.type in ("cpu", "cuda") else torch.float32


def _whole(device: torch.device) -> bool:
    """Whether ``page_of`` multiplies fp32 in fp32."""
    if device.type == "cuda":
        with fp32_products("highest") as whole:
            return whole
    if device.type != "cpu":
        return False
    own = getattr(torch.backends.mkldnn, "matmul", None)
    if hasattr(own, "fp32_precision"):  # the older setting cannot be asked for where a program used this one
        return own.fp32_precision in ("none", "ieee")
    return torch.get_float32_matmul_precision() == "highest"


def _bf16_is_fast(device: torch.device) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    known = (getattr(torch.cpu, f"_is_{name}_supported", bool) for name in ("avx512_bf16", "amx_tile"))
    return any(test() for test in known)


class Cells:
    """The chosen cells of x [n, c], and one over the length of each; rows are converted only when they are used."""

    def __init__(self, x: torch.Tensor, mask: torch.Tensor | None, name: str):
        if x.ndim != 2 or not x.is_floating_point() or not x.numel():
            raise ValueError(
                f"The {name} features are {list(x.shape)} {x.dtype}; give floating point numbers [cells, channels], "
                "at least one of each."
            )
        if mask is not None and (mask.shape != x.shape[:1] or mask.dtype != torch.bool or not mask.any()):
            raise ValueError(
                f"The {name} mask must be bool [{len(x)}] with at least one cell set; resize the mask to the grid, "
                "or leave it out."
            )
        self.x, self.index = x, None if mask is None else mask.nonzero()[:, 0].to(x.device)
        self.count = len(x) if mask is None else len(self.index)
        dtype = _precise(x.device)
        lengths = [torch.linalg.vector_norm(self.take(part, x.dtype), dim=1, dtype=dtype) for part in self.parts()]
        lengths = torch.cat(lengths)
        if not lengths.isfinite().all():
            raise ValueError(
                f"The {name} features contain NaN or infinity; extract them again in a wider dtype (fp32 or bf16)."
            )
        self.scale = torch.where(lengths < TINY, 0, 1 / lengths)

    def parts(self, rows: int = 0) -> list[slice]:
        rows = rows or max(1, most(PIECE, self.x.device) // self.x.shape[1])
        return [slice(start, min(start + rows, self.count)) for start in range(0, self.count, rows)]

    def take(self, part, dtype: torch.dtype) -> torch.Tensor:
        return (self.x[part] if self.index is None else self.x[self.index[part]]).to(dtype)

    def unit(self, part) -> torch.Tensor:
        return self.take(part, torch.float32) * self.scale[part, None].float()

    def cells(self, which: torch.Tensor) -> torch.Tensor:
        return which if self.index is None else self.index[which]


def scores_of(one: Cells, two: Cells, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    """Cosines [k] of pairs, rounded to fp32 once: independent of the size and the order of blocks."""
    dtype, found = _precise(one.x.device), [one.scale.new_empty(0)]
    rows = max(1, most(PIECE, one.x.device) // one.x.shape[1])
    for p, q in zip(i.split(rows), j.split(rows), strict=True):
        found.append((one.take(p, dtype) * two.take(q, dtype)).sum(1) * one.scale[p] * two.scale[q])
    return torch.cat(found).float()


def page_of(one: Cells, two: Cells, part: slice, out: torch.Tensor) -> torch.Tensor:
    """Cosines of a part of one's cells with all of two's into out [part, cells], with two's features as they are."""
    first = one.unit(part)
    # a looser bound costs more than products in fp32 do
    with fp32_products("highest") if out.device.type == "cuda" else contextlib.nullcontext():
        for tile in two.parts(max(GROUP, most(STRIP, out.device) // two.x.shape[1])):
            torch.mm(first, two.take(tile, torch.float32).T, out=out[:, tile])
    return out.mul_(two.scale.float())


def peaks(page: torch.Tensor) -> torch.Tensor:
    """Maxima of page [a, GROUP, b] over its groups, [a, b]; in bf16 exact only where they are 0 or more.

    There they are found as integers, which keep the order of floats without a sign and are faster to compare.
    """
    if page.dtype != torch.bfloat16:
        return page.amax(1)
    return page.view(torch.int16).amax(1).view(torch.bfloat16)


def settle(group: torch.Tensor, other: torch.Tensor, count: int, scores) -> tuple[torch.Tensor, torch.Tensor]:
    """The best candidate of each group, the lowest one of equals; scores(which) is asked where there are several.

    Returns: [count] of ``other``, -1 in an empty group; the best score [count], infinite where none was needed.
    """
    several = group.bincount(minlength=count)[group] > 1
    score = torch.full_like(group, torch.inf, dtype=torch.float32)
    score[several] = scores(several)
    top = score.new_full((count,), -torch.inf).scatter_reduce_(0, group, score, "amax")
    equal = score == top[group]
    lowest = other.new_full((count,), 2**31 - 1)  # MPS reduces in 32 bits
    lowest.scatter_reduce_(0, group[equal], other[equal], "amin")
    return torch.where(top == -torch.inf, -1, lowest), top


class Search:
    """Nearest neighbours of two sets of cells, a block of the first set's rows at a time."""

    def __init__(self, one: Cells, two: Cells, both_ways: bool):
        self.one, self.two, self.both_ways = one, two, both_ways
        device = one.x.device
        n, m = one.count, two.count
        self.width = -(-m // GROUP) * GROUP
        rows = min(most(BLOCK, device) // self.width, most(STRIP, device) // one.x.shape[1], n + GROUP - 1)
        self.rows = max(1, rows // GROUP) * GROUP
        self.table = None
        # Sums of c products of unit vectors in fp32 are within c 2^-24 of the cosine, twice that where sums truncate;
        # 8 more are for the roundings of lengths, floors and scores.
        self.error, self.rounding = (one.x.shape[1] + 8) * 2.0**-23, 0.0
        if _bf16_is_fast(device):
            self._round()
        elif not _whole(device):
            self.error += 2.02 * 2.0**-8  # products of fp32 may take TF32 or bf16 then
        # Products of very few elements may be summed in bf16 by other code than the larger ones.
        self.approximate = _precise(device) == torch.float64 and n * m * one.x.shape[1] > SMALL
        dtype = torch.float32 if self.table is None else self.table.dtype
        self.page = torch.full((self.rows, self.width), -2, dtype=dtype, device=device) if self.approximate else None
        self.top = torch.full((m,), -2.0, device=device)
        self.open, self.size = [], 0

    def _round(self) -> None:
        two, worst = self.two, 0.0
        self.table = torch.empty(two.count, two.x.shape[1], dtype=torch.bfloat16)
        for part in two.parts():
            unit = two.unit(part)
            self.table[part] = unit
            worst = max(worst, float((unit - self.table[part]).norm(dim=1).max()))
        self.error, self.of_second, self.rounding = self.error + worst, worst, 2.0**-8

    def _floor(self, top: torch.Tensor) -> torch.Tensor:
        """What an approximate cosine must reach when the highest one is ``top``, else its cosine is lower.

        With e >= |approximate before rounding - cosine| and unit roundoff u (2^-8 in bf16, whose results are rounded
        too), cosines of approximate values p and q < p differ in the same direction if p - q > 2 (e + u |p|) / (1 - u).
        By Cauchy and Schwarz e = |a - a'| + |b - b'| + |a - a'| |b - b'| + (c + 8) 2^-23 for unit vectors rounded to
        a' and b'.
        """
        return top - 2 * (self.error + self.rounding * top.abs()) / (1 - self.rounding)

    def _fill(self, part: slice) -> None:
        rows, m = part.stop - part.start, self.two.count
        self.page[rows:] = -2
        if self.table is None:
            page_of(self.one, self.two, part, self.page[:rows, :m])
            return
        unit = self.one.unit(part)
        rounded = unit.bfloat16()
        wrong = float((unit - rounded).norm(dim=1).max())
        self.error = max(self.error, wrong + self.of_second * (1 + wrong) + (unit.shape[1] + 8) * 2.0**-23)
        torch.mm(rounded, self.table.T, out=self.page[:rows, :m])

    def _near(self, part: slice) -> torch.Tensor | None:
        """Nearest second cell of each row of a part; None when too many are nearly the nearest, or one is below 0."""
        self._fill(part)
        rows, m, few = part.stop - part.start, self.two.count, self.rows * self.width // FEW
        page = self.page.view(self.rows, GROUP, -1)[:rows]
        groups = peaks(page)
        floor = self._floor(groups.amax(1).float())
        if floor.min() < 0 and self.table is not None:
            return None
        i, g = (groups >= floor[:, None]).nonzero(as_tuple=True)
        near = page[i[:few], :, g[:few]] >= floor[i[:few], None]
        if len(i) > few or near.sum() > few:
            return None
        hit, member = near.nonzero(as_tuple=True)
        i, j = i[hit], member * page.shape[2] + g[hit]
        if self.both_ways:
            page = self.page.view(-1, GROUP, self.width)[..., :m]
            groups = peaks(page).float()
            top = torch.maximum(self.top, groups.amax(0))
            floor = self._floor(top)
            if floor.min() < 0 and self.table is not None:
                return None
            g, k = (groups >= floor).nonzero(as_tuple=True)
            values = page[g[:few], :, k[:few]]
            near = values >= floor[k[:few], None]
            if len(k) > few or near.sum() > few:
                return None
            hit, member = near.nonzero(as_tuple=True)
            self._keep(part.start + g[hit] * GROUP + member, k[hit], values[hit, member].float(), top)
        at = i + part.start
        return settle(i, j, rows, lambda which: scores_of(self.one, self.two, at[which], j[which]))[0]

    def _sure(self, part: slice) -> torch.Tensor:
        """As ``_near``, with all cosines of the part in double precision where the device has it."""
        dtype = _precise(self.one.x.device)
        first = self.one.take(part, dtype)
        along, above = [], []
        for tile in self.two.parts(max(GROUP, most(STRIP, first.device) // 2 // first.shape[1])):
            cosines = first @ self.two.take(tile, dtype).T
            cosines = (cosines * self.one.scale[part, None] * self.two.scale[tile]).float()
            score, j = cosines.max(1)
            along.append((score, j + tile.start))
            above.append(cosines.max(0))
        score, j = (torch.stack(x) for x in zip(*along, strict=True))
        nearest = j.gather(0, score.argmax(0, keepdim=True))[0]
        if self.both_ways:
            score, i = (torch.cat(x) for x in zip(*above, strict=True))
            self._keep(part.start + i, torch.arange(len(i), device=i.device), score, torch.maximum(self.top, score))
        return nearest

    def _keep(self, i, j, value, top) -> None:
        """Candidates for the nearest first cell of each second one, in memory that is linear in the cells."""
        self.top = top
        self.open.append((i, j, value))
        self.size += len(i)
        if self.size > 8 * (self.one.count + self.two.count):
            i, j, value = self._left()
            if len(i) > 4 * (self.one.count + self.two.count):
                near, best = settle(
                    j, i, self.two.count, lambda which: scores_of(self.one, self.two, i[which], j[which])
                )
                j = (near >= 0).nonzero()[:, 0]
                i, value = near[j], torch.where(best[j] == torch.inf, self.top[j], best[j])
            self.open, self.size = [(i, j, value)], len(i)

    def _left(self):
        i, j, value = (torch.cat(x) for x in zip(*self.open, strict=True))
        which = value >= self._floor(self.top)[j]
        return i[which], j[which], value[which]

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs as positions among the chosen cells."""
        nearest = []
        for part in self.one.parts(self.rows):
            found = self._near(part) if self.approximate else None
            nearest.append(self._sure(part) if found is None else found)
        second = torch.cat(nearest)
        first = torch.arange(len(second), device=second.device)
        if not self.both_ways:
            return first, second
        i, j, _ = self._left()
        wanted = torch.zeros_like(self.top, dtype=torch.bool).index_fill_(0, second, True)[j]
        i, j = i[wanted], j[wanted]
        back, _ = settle(j, i, self.two.count, lambda which: scores_of(self.one, self.two, i[which], j[which]))
        mutual = back[second] == first
        return first[mutual], second[mutual]
