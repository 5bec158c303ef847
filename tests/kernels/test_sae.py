"""Sparse autoencoders by gather against the dense formulas: values, gradients, selections, nested parts, AuxK."""

from functools import partial

import pytest
import torch

from concepts.kernels.sae import above, auxiliary, batch_top, decode, dense, encode, fvu, nested, top

N, D, M, K = 40, 12, 96, 6


def made(n=N, d=D, m=M, dtype=torch.float64, seed=0):
    """x, encoder, encoder_bias, decoder, decoder_bias; all but x need gradients."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((n, d), (m, d), (m,), (m, d), (d,))
    x, *rest = (torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return x, *(r.requires_grad_() for r in rest)


def pre(x, encoder, encoder_bias, decoder, decoder_bias):
    return (x - decoder_bias) @ encoder.T + encoder_bias


def naive_top(p, k):
    """Row by row, with Python's sort."""
    mask = torch.zeros_like(p, dtype=torch.bool)
    for row in range(len(p)):
        for index in sorted(range(p.shape[1]), key=lambda i: -float(p[row, i].detach()))[:k]:
            mask[row, index] = True
    return p.relu() * mask


def naive_batch_top(p, k):
    flat = sorted(p.detach().relu().flatten().tolist(), reverse=True)
    return p.relu() * (p.relu() >= max(flat[k * len(p) - 1], 1e-300))


THETA = torch.linspace(0.5, 6, M, dtype=torch.float64)
WAYS = {
    "top": (partial(top, k=K), lambda p: naive_top(p, K)),
    "batch top": (partial(batch_top, k=K), lambda p: naive_batch_top(p, K)),
    "above": (partial(above, threshold=THETA), lambda p: p.relu() * (p > THETA)),
    "relu": (partial(above, threshold=torch.zeros(1, dtype=torch.float64)), lambda p: p.relu()),
}


@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients_are_the_dense_ones(way):
    select, by_hand = WAYS[way]
    x, *parts = made()
    x.requires_grad_()
    values, indices = encode(x, parts[0], parts[1], parts[3], select)
    rebuilt = decode(values, indices, parts[2], parts[3])
    z = by_hand(pre(x, *parts))
    wanted = z @ parts[2] + parts[3]
    torch.testing.assert_close(dense(values, indices, M), z)
    torch.testing.assert_close(rebuilt, wanted)
    weights = torch.randn(N, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    ours = torch.autograd.grad((rebuilt * weights).sum() + values.square().sum(), [x, *parts])
    theirs = torch.autograd.grad((wanted * weights).sum() + z.square().sum(), [x, *parts])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


SMALL = {
    "top": partial(top, k=2),
    "batch top": partial(batch_top, k=2),
    "above": partial(above, threshold=THETA[:8]),
    "relu": partial(above, threshold=torch.zeros(1, dtype=torch.float64)),
}


@pytest.mark.parametrize("way", SMALL)
def test_gradcheck(way):
    x, *parts = made(n=3, d=4, m=8)
    x.requires_grad_()

    def whole(x, encoder, encoder_bias, decoder, decoder_bias):
        code = encode(x, encoder, encoder_bias, decoder_bias, SMALL[way])
        return decode(*code, decoder, decoder_bias)

    assert torch.autograd.gradcheck(whole, (x, *parts))


def test_codes_begin_with_the_largest():
    x, *parts = made()
    for select, _ in WAYS.values():
        values, _ = encode(x, parts[0], parts[1], parts[3], select)
        assert bool((values[:, :-1] >= values[:, 1:]).all())


def test_batch_top_counts_over_all_tokens():
    x, encoder, *_ = made()
    x[: N // 2] *= 0.01  # tokens that have little to say
    x[-1] *= 100
    values, indices = batch_top(x, encoder, torch.zeros(M, dtype=torch.float64), K)
    counts = (values > 0).sum(1)
    assert int(counts.sum()) == K * N and int(counts[: N // 2].max()) < K and int(counts.max()) > 4 * K
    torch.testing.assert_close(dense(values, indices, M), naive_batch_top(x @ encoder.T, K))


def test_batch_top_gives_no_more_than_what_is_above_zero():
    x, encoder, *_ = made()
    bias = torch.full((M,), -6.0, dtype=torch.float64)
    values, indices = batch_top(x, encoder, bias, K)
    expected = (x @ encoder.T + bias).relu()
    assert 0 < int((expected > 0).sum()) < K * N
    torch.testing.assert_close(dense(values, indices, M), expected)


def test_above_means_above_the_threshold_and_above_zero():
    x, threshold = torch.tensor([[1.0, -0.5], [2.0, 3.0], [-2.0, 0.5]]), torch.tensor([-1.0, -1.0])
    assert dense(*above(x, torch.eye(2), torch.zeros(2), threshold), 2).tolist() == [[1, 0], [2, 3], [0, 0.5]]
    assert dense(*above(x, torch.eye(2), torch.zeros(2), -threshold), 2).tolist() == [[0, 0], [2, 3], [0, 0]]


@pytest.mark.parametrize("m", [4096, 1000])
def test_rough_choice_finds_the_same_latents(m):
    """bf16 candidates, exact values: the support is that of the exact choice."""
    x, encoder, bias, _, _ = made(300, 256, m, torch.float32)
    exact, found = top(x, encoder, bias, 32), top(x, encoder, bias, 32, encoder.bfloat16())
    assert torch.equal(exact[1].sort(1).values, found[1].sort(1).values)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-5, atol=1e-4)


def test_more_latents_than_there_are():
    x, *parts = made(m=4)
    values, indices = encode(x, parts[0], parts[1], parts[3], partial(top, k=9))
    assert values.shape == (N, 4)
    torch.testing.assert_close(dense(values, indices, 4), pre(x, *parts).relu())


@pytest.mark.parametrize("by, ends", [("rank", (2, 4, K)), ("prefix", (10, 40, M))])
def test_nested_parts_against_masks(by, ends):
    x, *parts = made()
    values, indices = encode(x, parts[0], parts[1], parts[3], partial(top, k=K))
    found = nested(values, indices, parts[2], parts[3], ends, by)
    p = pre(x, *parts)
    z = naive_top(p, K)
    for end, rebuilt in zip(ends, found, strict=True):
        part = naive_top(p, end) if by == "rank" else torch.cat([z[:, :end], torch.zeros(N, M - end)], 1)
        torch.testing.assert_close(rebuilt, part @ parts[2] + parts[3])
    torch.testing.assert_close(found[-1], decode(values, indices, parts[2], parts[3]))
    grads = torch.autograd.grad(sum(f.square().sum() for f in found), parts)
    dense_parts = [naive_top(p, e) if by == "rank" else z * (torch.arange(M) < e) for e in ends]
    wanted = torch.autograd.grad(sum((q @ parts[2] + parts[3]).square().sum() for q in dense_parts), parts)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_unexplained_variance():
    x = made()[0]
    assert float(fvu(x, x)) == 0
    torch.testing.assert_close(fvu(x, x.mean(0).expand_as(x)), torch.ones((), dtype=torch.float64))
    half = fvu(x, (x + x.mean(0)) / 2)
    torch.testing.assert_close(half, torch.full((), 0.25, dtype=torch.float64))
    assert float(fvu(torch.ones(3, 2), torch.ones(3, 2))) == 0


@pytest.mark.parametrize("k", [3, 500])
def test_auxk_against_the_dense_formula(k):
    x, *parts = made()
    dead = torch.arange(M) % 3 == 0
    rebuilt = decode(*encode(x, parts[0], parts[1], parts[3], partial(top, k=K)), parts[2], parts[3])
    found = auxiliary(x, rebuilt, *parts, dead, k)
    z = naive_top(pre(x, *parts).masked_fill(~dead, -1e9), min(k, int(dead.sum())))
    error = (x - rebuilt).detach()
    wanted = (error - z @ parts[2]).square().sum() / (error - error.mean(0)).square().sum()
    torch.testing.assert_close(found, wanted)
    for a, b in zip(torch.autograd.grad(found, parts), torch.autograd.grad(wanted, parts), strict=True):
        torch.testing.assert_close(a, b)
    assert float(auxiliary(x, rebuilt, *parts, torch.zeros(M, dtype=torch.bool), k)) == 0
