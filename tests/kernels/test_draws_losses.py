"""Draws repeat by (seed, step, purpose); losses equal the papers' formulas written out."""

import pytest
import torch

from concepts.kernels.draws import LAWS, SLOTS, generator, linear_start, slot_rows, split_times, subset, times
from concepts.kernels.losses import exclusion, map_loss, masked_mse, pair_distance, residual


def test_draws_depend_on_every_part_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    values = {
        key: float(torch.rand(1, generator=generator(*key)))
        for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"), (1, 11, "a"), (11, 1, "a")]
    }
    assert len(set(values.values())) == 6
    assert float(torch.rand(1, generator=generator(0, 0, "a"))) == values[0, 0, "a"]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("law", LAWS)
def test_times_stay_in_range_and_follow_their_law(law):
    t = times(20000, law, 0.2, 0.8, torch.Generator().manual_seed(0))
    assert t.min() >= 0.2 and t.max() <= 0.8
    mean = {"uniform": 0.5, "logit-normal": 0.5, "high noise": 0.6, "low noise": 0.4}[law]
    assert float(t.mean()) == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("share", [0.92, 0.08])
def test_split_times_fall_on_either_side_by_their_share(share):
    t = split_times(20000, 0.8, share, torch.Generator().manual_seed(0))
    above = t >= 0.8
    assert t.min() >= 0 and t.max() <= 1 and float(above.double().mean()) == pytest.approx(share, abs=0.01)
    assert float(t[above].mean()) == pytest.approx(0.9, abs=0.01) and float(t[~above].mean()) == pytest.approx(
        0.4, abs=0.02
    )


@pytest.mark.parametrize("low, high", [(0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_an_empty_range_is_refused(low, high):
    with pytest.raises(ValueError, match="empty"):
        times(1, "uniform", low, high, torch.Generator())


def test_subsets_have_every_size_alike_and_any_order():
    """As random.randrange for the size and random.sample for the rest give them."""
    found = [subset(3, generator(0, step, "test")) for step in range(3000)]
    shares = [sum(len(own) == size for own in found) / len(found) for size in (1, 2, 3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)
    assert all(len(set(own)) == len(own) and set(own) <= {0, 1, 2} for own in found)
    pairs = [own for own in found if len(own) == 2]
    assert {own: pairs.count(own) / len(pairs) for own in set(pairs)} == {
        own: pytest.approx(1 / 6, abs=0.04) for own in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)]
    }
    assert found[7] == subset(3, generator(0, 7, "test")) and subset(1, generator(0, 0, "test")) == (0,)


@pytest.mark.parametrize("width, rank", [(64, 4), (100, 3), (320, 20)])
def test_rows_of_slots_are_one_orthonormal_basis(width, rank):
    whole = torch.cat([slot_rows(width, rank, slot) for slot in range(1, SLOTS + 1)])
    torch.testing.assert_close(whole @ whole.T, torch.eye(SLOTS * rank), rtol=0, atol=1e-5)
    less = slot_rows(width, rank - 1, 3)
    torch.testing.assert_close(less, slot_rows(width, rank, 3)[:-1], rtol=0, atol=1e-5)


def test_slots_that_do_not_exist_or_have_no_room_are_refused():
    for slot in (0, SLOTS + 1):
        with pytest.raises(ValueError, match="slots 1 to 16"):
            slot_rows(64, 1, slot)
    with pytest.raises(ValueError, match="64 numbers has room for rank 4, not 5; lower"):
        slot_rows(64, 5, 1)


def test_layers_start_between_plus_and_minus_one_over_the_root_of_their_inputs():
    drawn = linear_start((400, 50), 25, torch.Generator().manual_seed(0))
    assert [float(f) for f in (drawn.min(), drawn.mean(), drawn.max())] == pytest.approx([-0.2, 0, 0.2], abs=2e-3)


@pytest.mark.parametrize("space", ["eps", "v", "edm", "flow", "x0"])
def test_residual_equals_the_network_error(space):
    g = torch.Generator().manual_seed(0)
    x0, n, guess = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    sigma, sd = torch.tensor([0.3, 0.9], dtype=torch.float64), 0.5
    s = sigma.view(-1, 1, 1, 1)
    x = (1 - s) * x0 + s * n if space == "flow" else x0 + s * n
    if space in ("eps", "flow"):
        denoised, error = x - s * guess, guess - (n if space == "eps" else n - x0)
    elif space == "v":
        a = (s**2 + sd**2) ** 0.5
        denoised, error = x * sd**2 / a**2 - guess * s * sd / a, guess - (n * sd - x0 * s / sd) / a
    elif space == "edm":
        a = (s**2 + sd**2) ** 0.5
        denoised = x * sd**2 / a**2 + guess * s * sd / a
        error = guess - (x0 - x * sd**2 / a**2) * a / (s * sd)
    else:
        denoised, error = guess, guess - x0
    torch.testing.assert_close(residual(space, sigma, denoised, x0, sd), error)


def test_masked_mean_counts_only_the_mask():
    error = torch.randn(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(3, 1, 4, 4, dtype=torch.float64)
    mask[0, :, 1:3, 1:3], mask[1] = 1, 1
    values = masked_mse(error, mask)
    naive = torch.stack([error[0, :, 1:3, 1:3].square().mean(), error[1].square().mean(), error[2].square().mean()])
    torch.testing.assert_close(values, naive)
    assert torch.autograd.gradcheck(lambda e: masked_mse(e, mask), (error,))


@pytest.mark.parametrize("space", ["eps", "v", "edm", "flow"])
def test_exclusion_is_the_difference_of_two_predictions(space):
    """Written out with the networks' own outputs; gradients reach the first alone."""
    g = torch.Generator().manual_seed(0)
    x, first, second = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(3))
    sigma, sd = torch.tensor([0.3, 0.9], dtype=torch.float64), 0.5
    s = sigma.view(-1, 1, 1, 1)
    a = (s**2 + sd**2) ** 0.5

    def denoised(output):
        step = s * sd / a * (-1 if space == "edm" else 1) if space in ("v", "edm") else s
        return x - step * output

    naive = torch.stack([(first[i] - second[i]).square().mean() for i in range(2)])
    torch.testing.assert_close(exclusion(space, sigma, denoised(first), denoised(second), sd), naive)
    a, b = denoised(first).requires_grad_(), denoised(second).requires_grad_()
    exclusion(space, sigma, a, b, sd).sum().backward()
    assert b.grad is None
    assert torch.autograd.gradcheck(lambda e: exclusion(space, sigma, e, b, sd), (a,))


def test_maps_are_compared_with_masks_as_parts_of_their_maximum():
    """A thing at a time, as Break-A-Scene's code does; things that a sample does not draw count nothing."""
    g = torch.Generator().manual_seed(0)
    maps, masks = (torch.rand(3, 2, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    drawn = torch.tensor([[1, 1], [0, 1], [1, 0]], dtype=torch.float64)
    maps[1, 0] = 0
    naive = []
    for sample in range(3):
        own = [i for i in range(2) if drawn[sample, i]]
        apart = [((maps[sample, i] / maps[sample, i].max() - masks[sample, i]) ** 2).mean() for i in own]
        naive.append(sum(apart) / len(own))
    torch.testing.assert_close(map_loss(maps, masks, drawn), torch.stack(naive).mean())
    torch.testing.assert_close(map_loss(3 * maps, masks, drawn), torch.stack(naive).mean())
    assert float(map_loss(masks / masks.amax((-2, -1), True), masks / masks.amax((-2, -1), True), drawn)) == 0
    maps.requires_grad_()
    (gradient,) = torch.autograd.grad(map_loss(maps, masks, drawn), maps)
    assert bool(torch.isfinite(gradient).all()) and [bool(g.any()) for g in gradient.flatten(0, 1)] == (
        drawn.flatten().bool().tolist()
    )
    first = maps[[0, 2]].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: map_loss(m, masks[[0, 2]], drawn[[0, 2]]), (first,))


def test_distance_of_pairs_is_written_out_and_has_its_gradient():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(7, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lengths = [
        sum((x - y) ** 2 for x, y in zip(p, q, strict=True)) ** 0.5 for p, q in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert float(pair_distance(a, b).detach()) == pytest.approx(sum(lengths) / 7)
    assert float(pair_distance(a, b, "square").detach()) == pytest.approx(sum(v * v for v in lengths) / 35)
    for kind in ("length", "square"):
        assert torch.autograd.gradcheck(lambda x, y, kind=kind: pair_distance(x, y, kind), (a, b))
    with pytest.raises(ValueError, match="Unknown distance 'far'; known: length, square"):
        pair_distance(a, b, "far")


def test_equal_points_have_no_distance_and_no_gradient():
    a = torch.ones(3, 4, requires_grad=True)
    b = torch.ones(3, 4)
    b[0, 0] = 3
    pair_distance(a, b).backward()
    assert float(a.grad[0, 0]) == pytest.approx(-1 / 3) and not bool(a.grad[1:].any())
