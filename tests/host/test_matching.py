"""Matches in pixels, from features whose cells are known."""

import json

import pytest
import torch

from concepts.carriers.errors import CarrierError, CarrierMismatch
from concepts.carriers.features import Features

pytestmark = pytest.mark.usefixtures("host")
HOW = {"mutual": True, "minimum": -1.0, "best": 0, "finer": False}


@pytest.fixture
def moved():
    """Random features, and the same two cells further to the right; cells of 8 x 4 pixels."""
    grid = torch.randn(1, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    return Features({"dift": grid}, 24, 80), Features({"dift": grid.roll(2, -1)}, 24, 80)


def test_points_are_centres_of_cells_in_pixels(moved):
    from concepts.host.matching import matches

    found = matches(*moved, "dift", **HOW)
    assert len(found.score) == 60 and torch.allclose(found.score, torch.ones(60), atol=1e-5)
    x, y = found.first.unbind(1)
    assert x.min() == 4 and x.max() == 76 and y.min() == 2 and y.max() == 22
    assert torch.equal(found.second[:, 0], (x + 16) % 80) and torch.equal(found.second[:, 1], y)
    assert json.loads(found.json())[0][:2] == found.first[0].tolist()


def test_masks_restrict_and_too_small_ones_are_refused(moved):
    from concepts.host.matching import matches

    mask = torch.zeros(1, 24, 80)
    mask[:, :, 40:48] = 1
    found = matches(*moved, "dift", masks=(mask, None), **HOW)
    assert len(found.score) == 6 and set(found.first[:, 0].tolist()) == {44.0}
    mask.zero_()[:, 0, 0] = 1
    with pytest.raises(ValueError, match="second mask covers no cell"):
        matches(*moved, "dift", masks=(None, mask), **HOW)


@pytest.fixture
def odd():
    """Sides that are no multiples of a cell: of 16 pixels, the last column reaching 8 and the last row 12 beyond."""
    grid = torch.randn(1, 16, 4, 5, generator=torch.Generator().manual_seed(0))
    return Features({"dift": grid}, 52, 72)


def test_cells_that_reach_beyond_the_picture_keep_their_size(odd):
    from concepts.host.matching import matches

    found = matches(odd, odd, "dift", **HOW)
    x, y = (sorted(set(column.tolist())) for column in found.first.unbind(1))
    assert x == [8, 24, 40, 56, 71.5] and y == [8, 24, 40, 51.5], "centres, none outside of the picture"
    for size in ((52, 72), (104, 144), (26, 36)):
        mask, cell = torch.zeros(1, *size), size[0] // 13 * 4
        mask[..., 3 * cell :, 4 * cell :] = 1
        inside = matches(odd, odd, "dift", masks=(mask, None), **HOW)
        assert inside.first.tolist() == [[71.5, 51.5]]


def test_points_lie_inside_the_picture():
    """Half of the last cell does, at 520 pixels; the host leaves tracks outside out (nodes_wanmove.py)."""
    from concepts.host.matching import matches

    one = Features({"dift": torch.randn(1, 64, 33, 33, generator=torch.Generator().manual_seed(0))}, 520, 520)
    found = matches(one, one, "dift", **HOW)
    assert len(found.first) == 33 * 33 and float(found.first.max()) < 520 and float(found.second.max()) < 520


def test_what_cannot_be_compared_says_why(moved):
    from concepts.host.matching import matches

    first, second = moved
    with pytest.raises(CarrierError, match="dift"):
        matches(first, second, "query", **HOW)
    with pytest.raises(ValueError, match="no picture 3"):
        matches(first, second, "dift", (0, 3), **HOW)
    with pytest.raises(CarrierMismatch, match="16 channels in the first features and 8"):
        matches(first, Features({"dift": torch.randn(1, 8, 6, 10)}, 24, 80), "dift", **HOW)
    with pytest.raises(ValueError, match="lower minimum_score"):
        matches(first, Features({"dift": -second.maps["dift"]}, 24, 80), "dift", **HOW | {"minimum": 0.99})


def test_the_picture_holds_both_and_lines_between_them(moved):
    from concepts.host.matching import joined, matches

    found = matches(*moved, "dift", **HOW)
    plain = joined(found, None, None, 1)
    assert plain.shape == (1, 24, 80 + 12 + 80, 3)
    gap = plain[0, :, 81:91]
    assert (gap < 0.9).any() and (joined(found, torch.ones(9, 9, 3), None, 1)[0, :, :80] > 0.9).any()


def test_tracks_lead_from_first_to_second_points(moved):
    from concepts.host.matching import matches

    first, second = moved
    twice = Features(second.maps, 48, 160)
    found = matches(first, twice, "dift", **HOW)
    tracks = found.tracks(5)
    path, seen = tracks["track_path"], tracks["track_visibility"]
    assert path.shape == (5, 60, 2) and seen.shape == (5, 60) and seen.all()
    assert torch.equal(path[0], found.first) and torch.allclose(path[-1] * 2, found.second)
    assert torch.allclose(path[2], (path[0] + path[-1]) / 2)


def test_every_picture_has_its_own_mask(moved):
    from concepts.host.matching import matches

    first, second = moved
    pair = Features({"dift": torch.cat([first.maps["dift"], second.maps["dift"]])}, 24, 80)
    masks = torch.zeros(2, 24, 80)
    masks[0, :, 40:48], masks[1, :, 8:16] = 1, 1
    for picture, column in ((0, 44.0), (1, 12.0)):
        found = matches(pair, second, "dift", (picture, 0), masks=(masks, None), **HOW)
        assert set(found.first[:, 0].tolist()) == {column}
        alone = matches(pair, second, "dift", (picture, 0), masks=(masks[:1], None), **HOW)
        assert set(alone.first[:, 0].tolist()) == {44.0}, "a single mask is every picture's"
    with pytest.raises(ValueError, match="no mask for picture 2"):
        three = Features({"dift": torch.cat([first.maps["dift"]] * 3)}, 24, 80)
        matches(three, second, "dift", (2, 0), masks=(masks, None), **HOW)


def test_maps_that_only_look_alike_are_refused(moved):
    from concepts.host.matching import matches

    first, _ = moved
    looks = Features({"attention mug": torch.rand(1, 1, 6, 10)}, 24, 80)
    with pytest.raises(CarrierMismatch, match="one number each"):
        matches(looks, looks, "attention mug", **HOW)
    here = {"base": "a", "sources": {"dift": {"layer": "output_blocks.5", "timestep": 261}}}
    known = Features(first.maps, 24, 80, here)
    for there, message in (
        ({**here, "base": "b"}, "from model a in the first features and from b"),
        ({**here, "sources": {"dift": {"layer": "output_blocks.4"}}}, "from layer output_blocks.5"),
    ):
        with pytest.raises(CarrierMismatch, match=message):
            matches(known, Features(first.maps, 24, 80, there), "dift", **HOW)
    later = {**here, "sources": {"dift": {"layer": "output_blocks.5", "timestep": 400}}}
    assert len(matches(known, Features(first.maps, 24, 80, later), "dift", **HOW).score) == 60


def test_masks_are_read_where_features_are():
    """Under --gpu-only the host's masks lie on the GPU, which may lack doubles."""
    from concepts.host.finding import centre
    from concepts.host.matching import covered

    class Elsewhere(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            found = super().__torch_function__(func, types, args, kwargs or {})
            if func in (torch.Tensor.cpu, torch.Tensor.numpy):
                return found.as_subclass(torch.Tensor)
            assert func is not torch.Tensor.double, "MPS has no doubles"
            mixed = any(type(x) is torch.Tensor and x.ndim for x in args)
            assert not mixed, "tensors of two devices"
            return found

    mask = torch.zeros(2, 64, 64)
    mask[:, 16:32, 16:32] = 1
    features = Features({"dift": torch.ones(2, 4, 8, 8)}, 64, 64, {})
    there = mask.as_subclass(Elsewhere)
    assert centre(there, features) == centre(mask, features) == (24, 24)
    inside = covered(there, features.maps["dift"][0], "first", 1)
    assert type(inside) is torch.Tensor and torch.equal(inside, covered(mask, features.maps["dift"][0], "first", 1))
