"""The gated edit against naive loops and against Perfusion's own form on a projection's output; its gradient."""

import math

import pytest
import torch

from concepts.kernels.rank_one import edited, pull


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def metric(width=6):
    """An uncentred covariance and its inverse."""
    rows = draw(50, width, seed=1)
    c = rows.T @ rows / 50
    return c, torch.linalg.inv(c)


def test_one_edit_is_the_papers_formula_row_by_row():
    rows, i, u, (_, inverse), w = draw(5, 6), draw(6, seed=2), draw(3, 6, seed=3), metric(), draw(4, 6, seed=4)
    found = edited(rows, i[None], (inverse @ i)[None], u[:, None], 0.75, 0.1)
    assert found.shape == (3, 5, 6)
    for m, e in enumerate(rows):
        s = float(i @ inverse @ e) / float(i @ inverse @ i)
        g = 1 / (1 + math.exp(-(s - 0.75) / 0.1))
        for layer, target in enumerate(u):
            h = w @ (e - s * i) + (w @ target) * g
            torch.testing.assert_close(w @ found[layer, m], h)


def test_an_open_gate_puts_the_target_in_the_place_of_the_direction():
    i, u, (_, inverse) = draw(6, seed=2), draw(6, seed=3), metric()
    parts = (i[None], (inverse @ i)[None], u[None])
    torch.testing.assert_close(edited(i[None], *parts, 0.5, 1e-3)[0], u)
    other = draw(6, seed=5)
    other = other - (i @ inverse @ other) / (i @ inverse @ i) * i
    torch.testing.assert_close(edited(other[None], *parts, 0.5, 1e-3)[0], other)


def test_several_edits_leave_what_is_orthogonal_in_the_metric():
    """Perfusion's own way: an orthonormal basis of the directions, in coordinates where the metric is the usual one."""
    rows, i, u, (c, inverse) = draw(5, 6), draw(3, 6, seed=2), draw(3, 6, seed=3), metric()
    beta, tau, strength = torch.tensor([0.75, 0.6, 0.7]), torch.tensor([0.1, 0.2, 0.3]), torch.ones(3)
    found = edited(rows, i, i @ inverse, u, beta, tau, strength.double())
    root = torch.linalg.inv(torch.linalg.cholesky(c))
    basis, _ = torch.linalg.qr(root @ i.T)
    for m, e in enumerate(rows):
        white = root @ e
        rest = torch.linalg.solve(root, white - basis @ (basis.T @ white))
        for j in range(3):
            s = (i[j] @ inverse @ e) / (i[j] @ inverse @ i[j])
            rest = rest + torch.sigmoid((s - beta[j]) / tau[j]) * u[j]
        torch.testing.assert_close(found[m], rest)


def test_strength_scales_each_edit():
    rows, i, u, (_, inverse) = draw(5, 6), draw(2, 6, seed=2), draw(2, 6, seed=3), metric()
    one = edited(rows, i[:1], i[:1] @ inverse, u[:1], 0.75, 0.1)
    torch.testing.assert_close(edited(rows, i[:1], i[:1] @ inverse, u[:1], 0.75, 0.1, 0.5), (one + rows) / 2)
    assert torch.equal(edited(rows, i, i @ inverse, u, 0.75, 0.1, torch.zeros(2).double()), rows)


def test_the_same_direction_twice_is_taken_away_once():
    rows, i, (_, inverse) = draw(5, 6).float(), draw(1, 6, seed=2).float(), metric()
    dual = i @ inverse.float()
    once = edited(rows, i, dual, torch.zeros(1, 6), 0.75, 0.1)
    twice = edited(rows, i.repeat(2, 1), dual.repeat(2, 1), torch.zeros(2, 6), 0.75, 0.1)
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5)


def test_gradients():
    i, (_, inverse) = draw(1, 6, seed=2), metric()

    def run(rows, targets):
        return edited(rows, i, i @ inverse, targets, 0.75, 0.4)

    assert torch.autograd.gradcheck(run, (draw(3, 6).requires_grad_(), draw(2, 1, 6, seed=3).requires_grad_()))


@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_descending_the_pull_is_a_moving_average(scale):
    value, target = draw(6).requires_grad_(), draw(6, seed=2)
    loss = pull(value, target)
    assert float(loss.detach()) == 0
    (loss * scale).backward()
    torch.testing.assert_close((value - 0.01 * value.grad / scale).detach(), (0.99 * value + 0.01 * target).detach())
