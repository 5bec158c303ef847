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
    alone = Features({"dift": torch.cat([second.maps["dift"], torch.randn(1, 16, 6, 10)])}, 24, 80)
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
