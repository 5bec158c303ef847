"""Fused changes: the least squares that they solve, and the cases that are known."""

import pytest
import torch

from concepts.kernels.fusion import change, fused


def made(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def three(width=12, rows=(40, 9, 25)):
    """Ups, downs of three concepts, and their inputs [width, n]."""
    return (
        [made(7, 2, seed=i) for i in range(3)],
        [made(2, width, seed=10 + i) for i in range(3)],
        [made(width, n, seed=20 + i) * (1 + i) for i, n in enumerate(rows)],
    )


def test_it_is_the_least_squares_solution():
    """Against one stacked system, whose last rows are the ridge; a fourth concept is to stay as it is."""
    ups, downs, inputs = three()
    inputs.append(made(12, 6, seed=30))
    grams = [x @ x.T for x in inputs]
    found = sum(u @ d for u, d in zip(ups, fused(downs, grams, 1e-2), strict=True))
    pull = (1e-2 * sum(float(g.diagonal().mean()) for g in grams)) ** 0.5
    deltas = [u @ d for u, d in zip(ups, downs, strict=True)] + [torch.zeros(7, 12, dtype=torch.float64)]
    left = torch.cat([*(x.T for x in inputs), pull * torch.eye(12, dtype=torch.float64)])
    right = torch.cat([*((d @ x).T for d, x in zip(deltas, inputs, strict=True)), pull * sum(deltas).T])
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution.T)


def test_no_step_from_it_lowers_the_error():
    ups, downs, inputs = three()
    grams = [x @ x.T for x in inputs]
    best = sum(u @ d for u, d in zip(ups, fused(downs, grams, 0.0), strict=True)).requires_grad_(True)
    error = sum(((u @ d - best) @ x).square().sum() for u, d, x in zip(ups, downs, inputs, strict=True))
    (slope,) = torch.autograd.grad(error, best)
    assert float(slope.abs().max()) < 1e-8 * float(error)


def test_one_alone_comes_out_as_it_is():
    down, x = made(2, 12), made(12, 5)
    (found,) = fused([down], [x @ x.T])
    torch.testing.assert_close(found, down)


def test_inputs_apart_keep_both_exactly():
    ups, downs, _ = three()
    first, second = torch.zeros(12, 30, dtype=torch.float64), torch.zeros(12, 30, dtype=torch.float64)
    first[:6], second[6:] = made(6, 30), made(6, 30, seed=1)
    new = fused(downs[:2], [first @ first.T, second @ second.T], 1e-12)
    whole = sum(u @ d for u, d in zip(ups[:2], new, strict=True))
    for up, down, x in zip(ups, downs, (first, second), strict=False):
        torch.testing.assert_close(whole @ x, up @ down @ x, rtol=1e-6, atol=1e-8)


def test_inputs_nobody_had_see_the_sum():
    _, downs, _ = three()
    seen, unseen = torch.zeros(12, 12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    seen[:6, :6], unseen[9] = torch.eye(6, dtype=torch.float64), 1.0
    for new, old in zip(fused(downs, [seen] * 3), downs, strict=True):
        torch.testing.assert_close(new @ unseen, old @ unseen)


def test_no_inputs_at_all_give_the_sum():
    _, downs, _ = three()
    for new, old in zip(fused(downs, [torch.zeros(12, 12)] * 3), downs, strict=True):
        torch.testing.assert_close(new, old)


def test_inputs_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        fused([made(2, 3)], [torch.full((3, 3), float("nan"))])


def test_the_change_is_that_of_the_outputs():
    ups, downs, inputs = three()
    whole = sum(u @ d for u, d in zip(ups, downs, strict=True)) @ inputs[0]
    assert change(ups, downs, inputs[0] @ inputs[0].T) == pytest.approx(float(whole.square().sum()))
