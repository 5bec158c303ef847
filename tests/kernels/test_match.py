"""Matching against the whole matrix of cosines, and what follows from matches against fields with a known shift."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from concepts.kernels import match as matching
from concepts.kernels import nearest as near
from concepts.kernels.match import Pairs, at, match, refine, similarity, transfer


@pytest.fixture(params=[True, False], ids=["bf16", "fp32"])
def products(request, monkeypatch):
    """Both kinds of products, whatever this CPU has."""
    monkeypatch.setattr(near, "_bf16_is_fast", lambda device: request.param)
    return request.param


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def field(y, x, channels=96, seed=0, finest=0.6, slant=0.0):
    """Features [..., channels] that vary smoothly with the place, with ``slant`` along one diagonal above all."""
    waves = finest * drawn(2, channels, seed=seed)
    waves[1] += slant * waves[0]
    phases = 6.3 * torch.rand(channels, generator=torch.Generator().manual_seed(seed))
    return (y[..., None] * waves[0] + x[..., None] * waves[1] + phases).cos()


def grid_of(h, w, down=0.0, right=0.0, **kind):
    """The field [c, h, w], every cell looking ``down`` and ``right`` of its place."""
    y, x = torch.meshgrid(torch.arange(h) + float(down), torch.arange(w) + float(right), indexing="ij")
    return field(y, x, **kind).permute(2, 0, 1)


def clusters(count=1024, of=24, channels=64):
    """Nearly equal vectors in groups."""
    centres = drawn(-(-count // of), channels).repeat_interleave(of, 0)[:count]
    return centres + 1e-3 * drawn(count, channels, seed=1), centres + 1e-3 * drawn(count, channels, seed=2)


def cosines(a, b):
    return (F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).T).float()


def whole(a, b, mutual=True):
    """Pairs as {(first, second): cosine} out of the whole matrix."""
    table = cosines(a, b)
    nearest, back = table.argmax(1), table.argmax(0)
    return {(i, int(j)): table[i, j].item() for i, j in enumerate(nearest) if not mutual or back[j] == i}


def as_dict(pairs):
    return dict(zip(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True), pairs.score.tolist(), strict=True))


def same(pairs, expected):
    assert as_dict(pairs) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(pairs.score, pairs.score.sort(descending=True).values)
    assert pairs.first.dtype == pairs.second.dtype == torch.int64 and pairs.score.dtype == torch.float32


def both(n, m, c):
    """Features of which many of the second are noisy copies of the first."""
    base = drawn(max(n, m), c)
    return base[:n] + 0.7 * drawn(n, c, seed=1), base[:m].flip(0) + 0.7 * drawn(m, c, seed=2)


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("n, m, c", [(1, 1, 1), (5, 3, 2), (40, 700, 64), (700, 40, 64), (333, 290, 17), (257, 1, 300)])
def test_pairs_are_those_of_the_whole_matrix(products, monkeypatch, n, m, c, mutual):
    monkeypatch.setattr(near, "BLOCK", 1 << 14)
    a, b = both(n, m, c)
    same(match(a, b, mutual=mutual), whole(a, b, mutual))


@pytest.mark.parametrize("mutual", [True, False])
def test_the_nearest_may_point_the_other_way(products, mutual):
    one, spread = drawn(1, 96), torch.rand(256, 1, generator=torch.Generator().manual_seed(0)) + 0.3
    a, b = -one.repeat(60, 1) + drawn(60, 96, seed=1), -one + spread * drawn(256, 96, seed=2)
    a[:5] *= -1
    assert (cosines(a, b).amax(1) < 0).sum() == 5
    same(match(a, b, mutual=mutual), whole(a, b, mutual))
    same(match(b, a, mutual=mutual), whole(b, a, mutual))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_lengths(products, dtype):
    a, b = both(300, 310, 48)
    a, b = (a * torch.linspace(0.1, 30, 300)[:, None]).to(dtype), (b * 7).to(dtype)
    same(match(a, b), whole(a, b))


def spied(monkeypatch, name):
    given, original = [], getattr(near.Search, name)
    monkeypatch.setattr(near.Search, name, lambda *args: given.append(original(*args)) or given[-1])
    return given


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs torch 2.9")
@pytest.mark.parametrize("of, precision", [("cuda", "tf32"), ("mkldnn", "tf32"), ("mkldnn", "bf16")])
def test_precision_chosen_by_the_newer_settings(products, of, precision):
    """The older one then cannot be asked for."""
    backend = getattr(torch.backends, of).matmul
    kept, backend.fp32_precision = backend.fp32_precision, precision
    try:
        assert near._whole(torch.device("cpu")) == (of == "cuda")
        a, b = both(333, 290, 17)
        same(match(a, b), whole(a, b))
    finally:
        backend.fp32_precision = kept


def test_products_of_fp32_may_take_bf16(monkeypatch):
    """As torch's precision ``medium`` lets them."""

    def page_of(one, two, part, out):
        return out.copy_(one.unit(part).bfloat16().float() @ two.unit(slice(None)).bfloat16().float().T)

    monkeypatch.setattr(near, "_bf16_is_fast", lambda device: False)
    monkeypatch.setattr(near, "_whole", lambda device: False)
    monkeypatch.setattr(near, "page_of", page_of)
    a, b = clusters()
    same(match(a, b), whole(a, b))


@pytest.mark.parametrize("mutual", [True, False])
def test_near_ties_are_scored_again(products, monkeypatch, mutual):
    close, sure = spied(monkeypatch, "_near"), spied(monkeypatch, "_sure")
    a, b = clusters()
    rough = (F.normalize(a).bfloat16() @ F.normalize(b).bfloat16().T).argmax(1)
    assert (rough != cosines(a, b).argmax(1)).sum() > 100, "the case is too easy to show anything"
    same(match(a, b, mutual=mutual), whole(a, b, mutual))
    assert close and not sure


@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("finest", [0.05, 1e-3])
def test_smooth_features_are_matched_in_double_precision(products, monkeypatch, finest, mutual):
    monkeypatch.setattr(near, "BLOCK", 1 << 15)
    monkeypatch.setattr(near, "STRIP", 1 << 13)
    sure = spied(monkeypatch, "_sure")
    a, b = (grid_of(20, 24, shift, shift, finest=finest).flatten(1).T for shift in (0, 0.3))
    same(match(a, b, mutual=mutual), whole(a, b, mutual))
    assert bool(sure) == (products or finest < 0.01)


def test_blocks_of_both_kinds_agree_about_a_column(products, monkeypatch):
    monkeypatch.setattr(near, "STRIP", 64 * 32)
    close, sure = spied(monkeypatch, "_near"), spied(monkeypatch, "_sure")
    a, b = clusters(256, of=4)
    a[64:96] = a[64] + 1e-3 * drawn(32, 64, seed=3)
    b[:100] = a[64] + 1e-3 * drawn(100, 64, seed=4)
    same(match(a, b), whole(a, b))
    assert len(sure) == sum(found is None for found in close) and 0 < len(sure) < len(close)


@pytest.mark.parametrize("n, m, c", [(64, 64, 16), (33, 400, 1280), (500, 31, 9), (1, 3000, 40), (70, 70, 4000)])
def test_the_bound_of_a_block_holds(products, n, m, c):
    a, b = both(n, m, c)
    b[0] = a[0]
    a[-1, :], a[-1, 0] = 0, 1.00390625 * 3.7
    search = near.Search(near.Cells(a, None, "first"), near.Cells(b, None, "second"), True)
    for part in search.one.parts(search.rows):
        search._fill(part)
        found = search.page[: part.stop - part.start, :m].double()
        exact = F.normalize(a[part].double()) @ F.normalize(b.double()).T
        assert ((found - exact).abs() <= search.error + search.rounding * found.abs()).all()
        assert search.error < 0.02
        assert (search.page[part.stop - part.start :] == -2).all() and (search.page[:, m:] == -2).all()


def test_the_worst_errors_within_the_bound_stay_candidates(products):
    a, b = both(100, 100, 64)
    search = near.Search(near.Cells(a, None, "first"), near.Cells(b, None, "second"), True)
    cosine = torch.linspace(-1, 1, 4001)
    error = search.error - 8 * 2**-23  # which is for the roundings of lengths, sums like these, and scores
    over, under = ((cosine + e).to(search.page.dtype).float() for e in (error, -error))
    assert (under >= search._floor(over)).all()
    assert (search._floor(over) > over - 4 * search.error - 6 * search.rounding * over.abs()).all()


@pytest.mark.parametrize("stretch", [1.0, 4.0])
def test_the_lowest_cell_wins_a_tie(products, stretch):
    once = drawn(100, 64)
    a, b = once.repeat(2, 1), torch.cat([once, stretch * once])
    found = match(a, b)
    assert found.first.sort().values.tolist() == list(range(100)) and torch.equal(found.first, found.second)
    assert (found.score == 1).all() and torch.equal(found.first, torch.arange(100)), "equal scores keep their order"
    assert match(a, b, mutual=False).second.tolist() == list(range(100)) * 2


def test_minima_in_32_bits_are_enough(products, monkeypatch):
    """As MPS takes them of numbers of 64."""
    stock = torch.Tensor.scatter_reduce_

    def narrow(own, dim, index, source, reduce):
        if own.dtype != torch.int64:
            return stock(own, dim, index, source, reduce)
        return own.copy_(stock(own.int(), dim, index, source.int(), reduce))

    monkeypatch.setattr(torch.Tensor, "scatter_reduce_", narrow)
    a, b = both(40, 700, 64)
    same(match(a, b), whole(a, b))


def test_equal_features_match_once(products):
    a = drawn(1, 64).expand(300, 64)
    assert as_dict(match(a, a)) == {(0, 0): 1.0}
    assert set(as_dict(match(a, a, mutual=False))) == {(i, 0) for i in range(300)}


def test_vectors_without_direction_are_no_error(products):
    a, b = both(200, 200, 32)
    a[7], b[:2] = 1e-13, 0
    found = as_dict(match(a, b, mutual=False))
    assert found[7, 0] == 0.0 and len(found) == 200


def test_masks_restrict_both_sides(products):
    a, b = both(400, 300, 32)
    one, two = drawn(400, seed=5) > 0.3, drawn(300, seed=6) > -0.2
    i, j = one.nonzero()[:, 0].tolist(), two.nonzero()[:, 0].tolist()
    inside = whole(a[one], b[two])
    same(match(a, b, first_mask=one, second_mask=two), {(i[p], j[q]): score for (p, q), score in inside.items()})
    assert inside != whole(a, b)


def test_minimum_and_best(products):
    a, b = both(300, 300, 8)
    everything = match(a, b)
    limit = everything.score[40].item()
    kept = match(a, b, minimum=limit)
    assert len(kept.first) == 41 and all(torch.equal(x, y[:41]) for x, y in zip(kept, everything, strict=True))
    assert all(torch.equal(x, y[:7]) for x, y in zip(match(a, b, best=7), everything, strict=True))
    assert len(match(a, b, minimum=limit, best=1000).first) == 41
    assert not len(match(a, b, minimum=1.1).first)


def test_a_noisy_permutation_is_found(products):
    base, order = drawn(600, 128), torch.randperm(600, generator=torch.Generator().manual_seed(9))
    found = match(base + 0.5 * drawn(600, 128, seed=1), base[order] + 0.5 * drawn(600, 128, seed=2))
    assert len(found.first) == 600 and torch.equal(order[found.second], found.first)


def test_kornia_finds_the_same(products):
    from kornia.feature import match_mnn

    for n, m in ((300, 280), (280, 300)):
        a, b = both(n, m, 12)
        _, theirs = match_mnn(F.normalize(a), F.normalize(b))
        found = match(a, b)
        assert set(as_dict(found)) == set(map(tuple, theirs.tolist())) and 50 < len(theirs) < 270


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        given = found if isinstance(found, (tuple, list)) else (found,)
        self.elements = max(self.elements, *(x.numel() for x in given if isinstance(x, torch.Tensor)), 0)
        return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "smooth", "equal"])
def test_memory_is_linear_in_the_cells(products, monkeypatch, kind):
    monkeypatch.setattr(near, "BLOCK", 1 << 16)
    n, c = 2000, 32
    a, b = {
        "random": lambda: both(n, n, c),
        "smooth": lambda: [grid_of(40, 50, s, channels=c).flatten(1).T for s in (0, 0.4)],
        "equal": lambda: [torch.ones(n, c)] * 2,
    }[kind]()
    with Largest() as seen:
        match(a, b)
        transfer(torch.ones(40, 50), a.T.reshape(c, 40, 50), b.T.reshape(c, 40, 50))
    assert n * c <= seen.elements <= 1 << 17 < n * n
    with Largest() as seen:
        cosines(a, b)
    assert seen.elements == n * n, "what would be seen"


def test_what_stays_open_is_linear_in_the_cells(products, monkeypatch):
    monkeypatch.setattr(near, "BLOCK", 1 << 15)
    a, b = clusters()
    search, given = near.Search(near.Cells(a, None, "first"), near.Cells(b, None, "second"), True), []
    keep = search._keep
    monkeypatch.setattr(search, "_keep", lambda *args: given.append(len(args[0])) or keep(*args))
    i, j = search.run()
    assert sum(len(part[0]) for part in search.open) <= 8 * 2048 < sum(given)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == set(whole(a, b))


@pytest.mark.parametrize(
    "given, words",
    [
        ({"a": torch.full((4, 8), torch.nan)}, "first features contain NaN"),
        ({"b": torch.full((4, 8), torch.inf)}, "second features contain NaN or infinity; extract"),
        ({"a": torch.ones(0, 8)}, "first features are .0, 8.*give"),
        ({"b": torch.ones(4, 8).long()}, "second features.*floating point"),
        ({"b": torch.ones(4, 9)}, "extract both with the same settings"),
        ({"first_mask": torch.ones(5, dtype=torch.bool)}, "first mask.*resize"),
        ({"second_mask": torch.zeros(4, dtype=torch.bool)}, "second mask.*at least one cell"),
        ({"second_mask": torch.ones(4)}, "second mask must be bool"),
    ],
)
def test_what_cannot_be_matched_is_said(given, words):
    with pytest.raises(ValueError, match=words):
        match(**{"a": drawn(4, 8), "b": drawn(4, 8)} | given)


@pytest.mark.parametrize("slant", [0.0, 0.8])
@pytest.mark.parametrize("down, right", [(0.3, -0.2), (-0.45, 0.1), (0.0, 0.0), (0.25, 0.4)])
def test_refine_finds_the_part_of_a_cell(down, right, slant):
    h, w = 12, 17
    b, a = (grid_of(h, w, *by, channels=1280, finest=0.3, slant=slant) for by in ((0, 0), (1 + down, right - 2)))
    a = a.flatten(1).T
    cells = torch.arange(h * w).view(h, w)
    inner = cells[1:-1, 1:-2].flatten()
    places = refine(Pairs(inner - w + 2, inner, torch.ones(len(inner))), a, b)
    error = places - torch.stack([inner // w + down, inner % w + right], 1)
    assert error.abs().max() < 0.1 and places.dtype == torch.float32
    if down or right:
        assert max(abs(down), abs(right)) > 0.1, "whole cells would pass"


@pytest.mark.parametrize(
    "yy, xx, xy, expected",
    [
        (-0.2, -0.4, 0.1, [0.022 / 0.07, 0.009 / 0.07]),
        (-0.2, 0.4, 0.1, [0.25, 0.0]),
        (0.2, -0.4, 0.1, [0.0, 0.05]),
        (-0.2, -0.4, 0.3, [0.25, 0.05]),
        (0.2, 0.4, 0.1, [0.0, 0.0]),
    ],
    ids=["peak", "peak in y", "peak in x", "slanted saddle", "hollow"],
)
def test_refine_of_nine_cosines(yy, xx, xy, expected):
    """Where there is no peak in two dimensions, each axis is followed on its own, and only upwards."""
    y, x = torch.meshgrid(torch.arange(-1.0, 2), torch.arange(-1.0, 2), indexing="ij")
    f = 0.3 + 0.05 * y + 0.02 * x + yy / 2 * y**2 + xx / 2 * x**2 + xy * x * y
    centre, b = torch.tensor([4]), torch.stack([f, (1 - f**2).sqrt()])
    found = refine(Pairs(centre, centre, torch.ones(1)), torch.eye(2)[:1].expand(9, 2), b)
    torch.testing.assert_close(found - 1, torch.tensor([expected]), rtol=1e-4, atol=1e-5)


def test_refine_at_borders_and_without_a_peak():
    h, w = 6, 7
    b, a = (grid_of(h, w, by, by, channels=1280, finest=0.3) for by in (0, 0.3))
    a = a.flatten(1).T
    cells = torch.tensor([0, 3, 2 * w, h * w - 1])
    y, x = refine(Pairs(cells, cells, torch.ones(4)), a, b).T
    assert y[[0, 1, 3]].tolist() == [0, 0, h - 1] and x[[0, 2, 3]].tolist() == [0, 0, w - 1]
    assert abs(x[1] - 3.3) < 0.1 and abs(y[2] - 2.3) < 0.1
    far = torch.tensor([2 * w + 3])
    offset = refine(Pairs(far, far + w + 2, torch.ones(1)), a, b) - torch.tensor([3.0, 5.0])
    assert offset.abs().max() <= 0.5
    flat = torch.ones(1280, h, w)
    assert refine(Pairs(far, far, torch.ones(1)), flat.flatten(1).T, flat).tolist() == [[2, 3]]
    assert refine(Pairs(far[:0], far[:0], torch.ones(0)), a, b).shape == (0, 2)


def test_refine_follows_the_pairs_in_pieces(monkeypatch):
    b, a = grid_of(9, 9), grid_of(9, 9, 0.2, 0.1).flatten(1).T
    cells = torch.arange(20, 60)
    pairs = Pairs(cells.flip(0), cells.flip(0), torch.ones(40))
    expected = refine(pairs, a, b)
    monkeypatch.setattr(matching.near, "PIECE", 96 * 7)
    torch.testing.assert_close(refine(pairs, a, b), expected)


def test_features_between_cells():
    grid = drawn(5, 6, 4)
    y, x = torch.tensor([0.0, 2.25, 5.0, 4.5, -1.0]), torch.tensor([0.0, 1.5, 3.0, 2.75, 9.0])
    places = torch.stack([x / 3 * 2 - 1, y / 5 * 2 - 1], 1)[None, None]
    expected = F.grid_sample(grid[None], places, align_corners=True, padding_mode="border")[0, :, 0].T
    torch.testing.assert_close(at(grid, y, x), expected)
    torch.testing.assert_close(at(grid, 2.25, 1.5), expected[1])
    assert at(grid.half(), 1, 2).dtype == torch.float16 and torch.equal(at(grid[:, :1, :1], 0, 0), grid[:, 0, 0])


def test_heat_map_of_a_point():
    grid = drawn(16, 5, 7).bfloat16()
    vector = at(grid, 3, 2)
    expected = F.cosine_similarity(vector.double()[:, None, None], grid.double(), dim=0).float()
    found = similarity(vector, grid)
    torch.testing.assert_close(found, expected)
    assert found.argmax() == 3 * 7 + 2
    with pytest.raises(ValueError, match="8 channels"):
        similarity(vector[:8], grid)


def disc(h, w, y, x, radius=5):
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_moves_with_the_features(monkeypatch, dtype):
    monkeypatch.setattr(near, "BLOCK", 1 << 14)
    a, b = grid_of(24, 30).to(dtype), grid_of(26, 28, -3, 2).to(dtype)
    moved, there = transfer(disc(24, 30, 10, 14), a, b), disc(26, 28, 13, 12)
    assert moved.shape == (26, 28) and moved.min() >= 0 and moved.max() <= 1
    overlap = ((moved > 0.5) & there).sum() / ((moved > 0.5) | there).sum()
    assert overlap > 0.9
    stayed = disc(26, 28, 10, 14)
    assert ((moved > 0.5) & stayed).sum() / ((moved > 0.5) | stayed).sum() < 0.6


def test_a_mask_takes_the_votes_of_both_sides():
    a, b, mask = drawn(8, 3, 4), drawn(8, 2, 5, seed=1), torch.rand(3, 4, generator=torch.Generator().manual_seed(2))
    mask[0] = 0
    table, label = cosines(b.flatten(1).T, a.flatten(1).T), mask.flatten()
    own, votes = [], torch.zeros(10)
    for row in table:
        best = sorted(range(12), key=lambda cell: -row[cell])[:3]
        weights = (row[best] / 0.2).exp()
        own.append((weights * label[best]).sum() / weights.sum())
    for cell in range(4, 12):
        for best in sorted(range(10), key=lambda other: -table[other, cell])[: round(float(label.sum()))]:
            votes[best] += label[cell]
    expected = (torch.stack(own) * votes / votes.max()).sqrt().view(2, 5)
    found = transfer(mask, a, b, nearest=3, temperature=0.2)
    torch.testing.assert_close(found, expected)
    assert 1 <= round(float(label.sum())) < 10, "else everybody votes for everything"
    torch.testing.assert_close(transfer(torch.ones(3, 4), a, b, nearest=50), torch.ones(2, 5))
    assert not transfer(torch.zeros(3, 4), a, b).any()


def test_another_ground_does_not_take_the_mask():
    """Grounds that have nothing in common: cells of b's ground are a little nearer to the object than to a's ground."""
    g = torch.Generator().manual_seed(0)
    part, ground, other = (torch.nn.functional.normalize(torch.randn(64, generator=g), dim=0) for _ in range(3))
    there = disc(16, 16, 6, 9, 3)
    a = torch.where(disc(16, 16, 8, 6, 3), part[:, None, None], ground[:, None, None])
    b = torch.where(there, part[:, None, None], (other + 0.3 * part)[:, None, None])
    a, b = (x + 0.03 * torch.randn(x.shape, generator=g) for x in (a, b))
    found = transfer(disc(16, 16, 8, 6, 3), a, b) > 0.5
    assert (found & there).sum() / (found | there).sum() > 0.9


@pytest.mark.parametrize(
    "given, words",
    [
        ({"mask": torch.ones(4, 3)}, "resize the mask"),
        ({"b_grid": torch.ones(9, 3, 4)}, "extract both grids"),
        ({"nearest": 0}, "nearest 0"),
        ({"temperature": 0.0}, "temperature 0.0"),
    ],
)
def test_what_cannot_be_moved_is_said(given, words):
    with pytest.raises(ValueError, match=words):
        transfer(**{"mask": torch.ones(3, 4), "a_grid": drawn(8, 3, 4), "b_grid": drawn(8, 3, 4)} | given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mutual", [True, False])
@pytest.mark.parametrize("case", ["apart", "near ties", "smooth"])
def test_a_gpu_finds_the_pairs_of_the_whole_matrix(case, mutual):
    if case == "smooth":
        a, b = (grid_of(20, 24, shift, shift, finest=1e-3).flatten(1).T for shift in (0, 0.3))
    else:
        a, b = both(700, 640, 96) if case == "apart" else clusters()
    same(match(a.cuda(), b.cuda(), mutual=mutual), whole(a, b, mutual))
