"""The ground truth of the matching benchmark: where the renderer and the warps say that points go."""

import random

import numpy as np
import pytest
import torch

from concepts.bench import pck
from concepts.demo import world


@pytest.mark.parametrize("shape", world.SHAPES)
def test_points_of_an_object_go_where_the_renderer_draws_them(shape):
    a = world.Scene(shape=shape, background="grass", position="left", size="big", seed=3)
    b = world.replace(a, background="night", position="right", size="small", seed=8)
    masks = [world.pixels(world.render(s)[1]) > 127 for s in (a, b)]
    y, x = np.mgrid[:128, :128]
    there = np.stack([x, y], -1).reshape(-1, 2) + 0.5
    back = np.floor(pck.moved(there, b, a)).astype(int)
    inside = ((back >= 0) & (back < 128)).all(1)
    drawn = np.zeros(len(there), bool)
    drawn[inside] = masks[0][back[inside, 1], back[inside, 0]]
    both, either = drawn & masks[1].ravel(), drawn | masks[1].ravel()
    assert both.sum() / either.sum() > 0.8, "outlines are as wide on small objects as on big ones"
    assert np.allclose(pck.moved(pck.moved(there, a, b), b, a), there)


def test_points_are_inside_both_objects():
    rng = random.Random(5)
    for _ in range(12):
        made = pck.pair(rng)
        a, b = made.scenes
        assert (a.shape, a.pattern) == (b.shape, b.pattern) and a.colour != b.colour and a.background != b.background
        for points, mask in zip((made.points, made.truth), made.masks, strict=True):
            assert points.shape == (pck.POINTS, 2)
            assert mask[points[:, 1].astype(int), points[:, 0].astype(int)].all()
        y, x = made.masks[1].nonzero()
        assert made.side == max(np.ptp(x), np.ptp(y)) + 1
    again = random.Random(5)
    assert np.array_equal(pck.pair(again).points, pck.pair(random.Random(5)).points)


@pytest.mark.parametrize("kind", ["", "flip", "crop", "flip, crop, jitter"])
def test_warps_move_points_as_they_say(kind):
    """A picture whose colours are its places, looked up at both ends."""
    ramp = np.linspace(0, 1, 256, dtype=np.float32)
    picture = np.stack([*np.meshgrid(ramp, ramp), np.ones((256, 256), np.float32)], -1)
    made, warp = pck.warped(picture, np.random.default_rng(0), kind)
    assert made.shape == (128, 128, 3) and made.dtype == np.float32
    points = np.random.default_rng(1).uniform(0.1, 0.9, (20, 2)) * warp[1] + warp[0]
    x, y = (pck.landed(points, warp) * 128).astype(int).T
    if "jitter" not in kind:
        assert np.abs(made[y, x, :2] - points).max() < 0.02
    else:
        order = np.argsort(points[:, 0])
        assert (np.diff(made[y, x, 0][order]) > -0.03).all()


def test_a_place_is_right_within_a_share_of_the_object():
    found = [np.array([1.0, 5.0]), np.array([9.0, 3.0])]
    assert pck.right(found, [40.0, 40.0])[0] == 0.5
    assert pck.right(found, [40.0, 100.0])[0] == 0.75
    assert pck.right(found, [200.0, 200.0], 0.05)[:2] == (1.0, 1.0)


def test_maps_that_know_the_place_are_right(host):
    """Cells that hold their own place in the object, as Match Point reads them, against cells that hold noise."""
    pairs = [pck.pair(random.Random(seed)) for seed in range(4)]
    grids = []
    for made in pairs:
        for scene in made.scenes:
            y, x = np.mgrid[:32, :32] * 4 + 2.0
            flat = np.stack([x, y], -1).reshape(-1, 2)
            left, top, right, _ = world.box(scene)
            place = torch.from_numpy((flat - [left, top]) / (right - left)).float()
            grids.append(torch.cat([place.cos(), place.sin()], 1).T.reshape(4, 32, 32))
    sides = [p.side for p in pairs]
    known = pck.known(pairs)
    assert pck.right(pck.errors(torch.stack(grids), known), sides)[0] > 0.95
    noise = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert pck.right(pck.errors(noise, known), sides)[0] < 0.2
    assert pck.right(pck.guesses(pairs), sides)[0] < 0.3


def test_label_propagation_alone_follows_the_cells():
    a = torch.randn(32, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:32, 8:24] = 1
    moved = pck.propagated(a, a.roll(3, -1), mask) > 0.5
    there = mask[0].roll(24, -1) > 0.5
    assert (moved & there).sum() / (moved | there).sum() > 0.8
