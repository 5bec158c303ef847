"""Mixing word vectors: the ends, the way between them, and the cases without one."""

import math

import pytest
import torch

from concepts.kernels.mix import lerp, noisy_stages, outer_layers, slerp


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mix", [slerp, lerp])
def test_the_ends_are_exact(mix):
    a, b = rows(3, 5), rows(3, 5, seed=1)
    assert torch.equal(mix(a, b, 0.0), a) and torch.equal(mix(a, b, 1.0), b)
    assert mix(a, b, 0.0) is not a


def test_slerp_against_the_formula():
    a, b = rows(4, 6).double(), rows(4, 6, seed=1).double()
    b[0] = a[0] + 0.05 * b[0]
    for amount in (0.1, 0.5, 0.8):
        mixed = slerp(a, b, amount)
        for x, y, z in zip(a, b, mixed, strict=True):
            u, v = x / x.norm(), y / y.norm()
            angle = math.acos(float(u @ v))
            way = (math.sin((1 - amount) * angle) * u + math.sin(amount * angle) * v) / math.sin(angle)
            torch.testing.assert_close(z, way * ((1 - amount) * x.norm() + amount * y.norm()))


def test_equal_parallel_and_zero_rows():
    a = rows(2, 5)
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    torch.testing.assert_close(slerp(a, torch.zeros_like(a), 0.25), 0.75 * a)
    torch.testing.assert_close(slerp(torch.zeros_like(a), a, 0.25), 0.25 * a)
    near = a + 1e-5 * rows(2, 5, seed=3)
    torch.testing.assert_close(slerp(a, near, 0.5), (a + near) / 2)


@pytest.mark.parametrize("off", [0.0, 1e-6, 1e-2])
def test_opposite_rows_keep_their_length(off):
    a = torch.nn.functional.normalize(torch.cat([rows(2, 5), torch.eye(5)[:1]]), dim=-1)
    b = torch.nn.functional.normalize(-a + off * rows(3, 5, seed=2), dim=-1)
    middle = slerp(a, b, 0.5)
    torch.testing.assert_close(middle.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close((middle * a).sum(-1), torch.zeros(3), rtol=0, atol=0.02)


def test_inner_layers_stay():
    a, b = rows(1, 6, 1, 2, 4), rows(1, 6, 1, 2, 4, seed=1)
    for amount in (0.0, 0.5, 1.0):
        mixed, way = outer_layers(a, b, amount, 2, 4), slerp(a, b, amount)
        assert torch.equal(mixed, torch.cat([way[:, :2], a[:, 2:4], way[:, 4:]], 1))


def test_stages():
    a, b = rows(5, 1, 1, 1, 3), rows(5, 1, 1, 1, 3, seed=1)
    assert torch.equal(noisy_stages(a, b, 0), a) and torch.equal(noisy_stages(a, b, 5), b)
    mixed = noisy_stages(a, b, 2)
    assert torch.equal(mixed[:3], a[:3]) and torch.equal(mixed[3:], b[3:])
