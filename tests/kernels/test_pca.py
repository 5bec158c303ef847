"""Principal components against numpy's singular values, with a sign that can be relied on."""

import numpy as np
import pytest
import torch

from concepts.kernels.pca import principal, spread


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, c", [(200, 12), (9, 40)])
def test_directions_are_numpys(n, c):
    given = rows(n, c) * torch.linspace(3, 0.2, c) + 5
    mean, found = principal(given, 3)
    _, _, vt = np.linalg.svd(given.double().numpy() - given.double().numpy().mean(0))
    torch.testing.assert_close(mean, given.mean(0))
    for number in range(3):
        theirs = torch.from_numpy(vt[number]).float()
        theirs = theirs * theirs[theirs.abs().argmax()].sign()
        torch.testing.assert_close(found[:, number], theirs, rtol=1e-4, atol=1e-5)


def test_mirrored_rows_keep_the_sign():
    given = rows(50, 6)
    torch.testing.assert_close(principal(-given, 3)[1], principal(given, 3)[1], rtol=1e-4, atol=1e-5)


def test_directions_beyond_the_rank_are_zero():
    line = rows(30, 1) * torch.tensor([[0.6, 0.8, 0.0]])
    _, found = principal(line, 3)
    torch.testing.assert_close(found[:, 0], torch.tensor([0.6, 0.8, 0.0]))
    assert float(found[:, 1:].abs().max()) == 0
    assert principal(rows(20, 1), 3)[1].tolist() == [[1.0, 0.0, 0.0]]
    assert float(principal(torch.ones(4, 3), 3)[1].abs().max()) == 0


def test_colours_ignore_the_outermost_values():
    given = torch.cat([torch.arange(99.0), torch.tensor([1e6])])[:, None]
    found = spread(torch.cat([given, torch.ones(100, 1)], 1))
    assert float(found[0, 0]) == 0 and float(found[97, 0]) == 1 and float(found[49, 0]) == pytest.approx(47 / 95)
    assert found[:, 1].unique().tolist() == [0.5]
