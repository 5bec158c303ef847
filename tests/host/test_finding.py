"""Points, masks and pictures found in features whose cells are known."""

import json

import pytest
import torch

from concepts.carriers.features import Features

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture
def moved():
    """Random features, and the same two cells further to the right; cells of 8 x 4 pixels."""
    grid = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    return Features({"dift": grid}, 24, 80), Features({"dift": torch.cat([grid.roll(2, -1), grid])}, 24, 80)


def test_a_point_is_found_where_its_cell_went(moved):
    from concepts.host.finding import places

    found = places(*moved, "dift", 28, 10)
    assert found.heat.shape == (2, 6, 10)
    assert [divmod(int(h.argmax()), 10) for h in found.heat] == [(2, 5), (2, 3)]
    assert found.heat.flatten(1).amax(1) == pytest.approx([1, 1], abs=1e-5)
    for (x, y), right in zip(found.best.tolist(), (44, 28), strict=True):
        assert abs(x - right) <= 4 and abs(y - 10) <= 2, "no further than half a cell"
    rows = json.loads(found.json())
    assert [row[:2] for row in rows] == [[28, 10]] * 2 and rows[0][2:4] == pytest.approx(
        found.best[0].tolist(), abs=1e-3
    )


def test_cells_that_reach_beyond_the_picture_keep_their_size():
    """Cells of 16 pixels, of which the last column reaches 8 beyond: heat, best place and mask are at one place."""
    from concepts.host.finding import places, transferred

    grid = torch.randn(1, 16, 2, 17, generator=torch.Generator().manual_seed(0))
    first, second = Features({"dift": grid}, 32, 264), Features({"dift": grid.roll(1, -1)}, 32, 264)
    found = places(first, second, "dift", 14 * 16 + 8, 8)
    assert abs(float(found.best[0, 0]) - (15 * 16 + 8)) <= 8 and float(found.heat.max()) == pytest.approx(1, abs=1e-5)
    assert found.masks().shape == (1, 32, 264) and int(found.masks()[0, 4].argmax()) in range(15 * 16 + 4, 15 * 16 + 12)
    mask = torch.zeros(1, 32, 264)
    mask[:, :16, 14 * 16 : 15 * 16] = 1
    seen = transferred(first, second, "dift", mask)
    assert seen.shape == (1, 32, 264) and int(seen[0, 4].argmax()) in range(15 * 16 + 4, 15 * 16 + 12)


def test_points_between_cells_are_between_their_features(moved):
    from concepts.host.finding import places

    first, _ = moved
    grid = first.maps["dift"][0]
    between = (grid[:, 2, 3] + grid[:, 2, 4]) / 2
    heat = places(first, first, "dift", 32, 10).heat[0]
    expected = torch.cosine_similarity(between[:, None, None], grid, dim=0)
    torch.testing.assert_close(heat, expected)


def test_heat_masks_compare_pictures(moved):
    from concepts.host.finding import places

    first, second = moved
    other = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(1))
    alone = Features({"dift": torch.cat([second.maps["dift"], other])}, 24, 80)
    found = places(first, alone, "dift", 28, 10)
    masks = found.masks()
    assert masks.shape == (3, 24, 80) and 0 <= masks.min() and masks.max() <= 1
    assert masks[0].max() > masks[2].max() + 0.1, "the third picture does not show it"


def test_the_middle_of_a_dot_is_the_point(moved):
    from concepts.host.finding import centre

    dot = torch.zeros(1, 48, 40)  # half as wide and twice as high as the picture
    dot[:, 20:22, 14:16] = 1
    assert centre(dot, moved[0]) == (30, 10.5)
    with pytest.raises(ValueError, match="mask is empty"):
        centre(dot * 0, moved[0])


@pytest.mark.parametrize("x, y", [(81, 3), (-1, 3), (3, 25), (float("nan"), 3)])
def test_points_outside_are_refused(moved, x, y):
    from concepts.host.finding import places

    with pytest.raises(ValueError, match="outside of the first picture, which is 80 x 24"):
        places(*moved, "dift", x, y)


def test_each_picture_is_shown_beside_the_first(moved):
    from concepts.host.finding import places, shown

    found = places(*moved, "dift", 28, 10)
    grey = shown(found, moved[0], None, None)
    assert grey.shape == (2, 24, 80 + 12 + 80, 3)
    assert grey[0, 10, 28 - 5].min() > 0.9, "a ring around the point"
    white = shown(found, moved[0], torch.ones(5, 5, 3), torch.zeros(1, 24, 80, 3))
    assert white[:, 0, 0].min() == 1 and (white[:, :, 92:] != grey[:, :, 92:]).any()


def test_a_mask_goes_where_its_part_went(moved):
    from concepts.host.finding import transferred

    mask = torch.zeros(1, 24, 80)
    mask[:, 8:16, 16:32] = 1
    found = transferred(*moved, "dift", mask)
    assert found.shape == (2, 24, 80)
    inside = found[0, 8:16, 32:48].mean()
    assert inside > 0.7 and found[0, 8:16, 56:].mean() < 0.3


def naive(reference, candidates, inside, number):
    """PDM's score cell by cell, for grids of one size."""
    one, two = ({k: v[i].flatten(1).T for k, v in f.maps.items()} for f, i in ((reference, 0), (candidates, number)))
    total = []
    for cell in inside.nonzero()[:, 0].tolist():
        score, nearest = torch.cosine_similarity(one["dift"][cell], two["dift"]).max(0)
        looks = [torch.cosine_similarity(one[k][cell], two[k][nearest], dim=0) for k in ("query", "key") if k in two]
        total.append(float(score * (sum(looks) / len(looks) if looks else 1)))
    return sum(total) / len(total)


def drawn(pictures, seed, *kinds):
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(pictures, 16, 6, 10, generator=g) for k in kinds}


@pytest.mark.parametrize("kinds", [("dift",), ("dift", "query"), ("dift", "query", "key")])
def test_pictures_are_ranked_as_pdm_ranks_them(kinds):
    from concepts.host.finding import ranked

    reference = Features(drawn(1, 0, *kinds), 24, 80)
    others = {
        k: v + reference.maps[k] * torch.tensor([0.2, 1.0, 0.5]).view(3, 1, 1, 1)
        for k, v in drawn(3, 1, *kinds).items()
    }
    candidates = Features(others, 24, 80)
    mask = torch.zeros(1, 24, 80)
    mask[:, 4:12, 16:48] = 1
    found = ranked(reference, candidates, mask)
    assert [n for n, _ in found.order] == [1, 2, 0] and found.maps == list(kinds)
    inside = torch.zeros(6, 10, dtype=torch.bool)
    inside[1:3, 2:6] = True
    for number, score in found.order:
        assert score == pytest.approx(naive(reference, candidates, inside.flatten(), number), abs=1e-5)
    assert json.loads(found.json())[0] == [1, pytest.approx(found.order[0][1], abs=1e-4)]


def test_the_mask_says_what_is_looked_for():
    from concepts.host.finding import ranked

    grid, other = drawn(1, 0, "dift")["dift"], drawn(2, 1, "dift")["dift"]
    other[0, :, :, :5], other[1, :, :, 5:] = grid[0, :, :, :5], grid[0, :, :, 5:]
    reference, candidates = Features({"dift": grid}, 24, 80), Features({"dift": other}, 24, 80)
    left = torch.zeros(1, 24, 80)
    left[:, :, :40] = 1
    assert ranked(reference, candidates, left).order[0] == (0, pytest.approx(1, abs=1e-5))
    assert ranked(reference, candidates, 1 - left).order[0] == (1, pytest.approx(1, abs=1e-5))
    assert ranked(reference, candidates, None).order[0][1] < 0.95
    with pytest.raises(ValueError, match="reference's mask covers no cell"):
        ranked(reference, candidates, left * 0)


def test_looks_of_a_finer_grid_are_read_at_the_same_places():
    from concepts.host.finding import ranked

    made = drawn(1, 0, "dift")
    fine = made["dift"].repeat_interleave(2, 2).repeat_interleave(2, 3)
    both = Features(made | {"key": fine}, 24, 80)
    assert ranked(both, both, None).order[0][1] == pytest.approx(1, abs=1e-5)
    swapped = Features(made | {"key": fine.roll(2, -1)}, 24, 80)
    assert abs(ranked(both, swapped, None).order[0][1]) < 0.2
    plain = ranked(both, Features(made, 24, 80), None)
    assert plain.maps == ["dift"] and "by dift" in plain.text() and plain.chart().shape[-1] == 3


def test_looks_are_read_at_the_same_places_where_cells_reach_beyond_the_picture():
    """40 pixels are 5 cells of 8, and 3 of 16, of which the last one reaches 8 beyond."""
    from concepts.host.finding import at_cells

    ramp = (torch.arange(5) * 8.0 + 4).expand(1, 5, 5)
    coarse = (torch.arange(3) * 16.0 + 8).expand(1, 3, 3)
    assert at_cells(ramp, torch.tensor([0, 4]), coarse, (40, 40))[:, 0].tolist() == [8, 24]
    assert at_cells(coarse, torch.tensor([1, 23]), ramp, (40, 40))[:, 0].tolist() == [12, 28]
    ramp, coarse = ramp.mT, coarse.mT  # and down
    assert at_cells(ramp, torch.tensor([0, 4]), coarse, (40, 40))[:, 0].tolist() == [8, 24]
    assert at_cells(coarse, torch.tensor([1, 23]), ramp, (40, 40))[:, 0].tolist() == [8, 36]


def test_an_empty_mask_is_no_part(moved):
    from concepts.host.finding import transferred

    with pytest.raises(ValueError, match="nothing to find"):
        transferred(*moved, "dift", torch.zeros(1, 24, 80))
    flat = torch.zeros(24, 80)
    flat[8:12, 24:32] = 1
    assert torch.equal(transferred(*moved, "dift", flat), transferred(*moved, "dift", flat[None]))
