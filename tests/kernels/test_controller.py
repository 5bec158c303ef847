"""The network of directions against loops written out, its start, and what it does without biases."""

import pytest
import torch

from concepts.kernels.controller import BLOCK_PARTS, PARTS, coded, dense, directions, reading_of, start
from concepts.kernels.sae import Coder
from concepts.kernels.sae import dense as whole


def made(biases=True, dtype=torch.float64):
    """Weights with output layers that are not zero."""
    draw = torch.Generator().manual_seed(0)
    parts = start(5, 4, 3, 6, draw, biases)
    for part in ("shared", "block"):
        parts[f"{part}.out.weight"] = torch.randn(4, 6, generator=draw)
    return {k: v.to(dtype) for k, v in parts.items()}


def naive(parts, x, biases):
    """One token, one block, one number at a time."""

    def silu(v):
        return v * torch.sigmoid(v)

    def unit(part, row, u):
        bias = parts[f"{part}.in.bias"][u] if biases else 0.0
        return silu(sum(parts[f"{part}.in.weight"][u, i] * row[i] for i in range(5)) + bias)

    out = torch.zeros(len(x), 3, 4, dtype=torch.float64)
    for n, row in enumerate(x):
        for block in range(3):
            for o in range(4):
                out[n, block, o] = sum(
                    parts["shared.out.weight"][o, u] * unit("shared", row, u)
                    + parts["block.out.weight"][o, u] * parts["block.gate"][block, u] * unit("block", row, u)
                    for u in range(6)
                )
    return out


@pytest.mark.parametrize("biases", [True, False])
def test_directions_equal_the_loops(biases):
    parts = made(biases)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = naive(parts, x, biases)
    torch.testing.assert_close(directions(parts, x), expected)
    parts["block.out.weight"] = torch.zeros_like(parts["block.out.weight"])
    shared = directions(parts, x, each_block=False)
    assert shared.shape == (2, 1, 4)
    torch.testing.assert_close(directions(parts, x), shared.expand(-1, 3, -1))


def test_gradients():
    parts = {k: v.requires_grad_() for k, v in made().items()}
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    keys = list(parts)
    assert torch.autograd.gradcheck(lambda x, *v: directions(dict(zip(keys, v, strict=True)), x), (x, *parts.values()))


def test_it_starts_at_zero_and_the_seed_decides():
    first, again, other = (start(5, 4, 3, 6, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert set(first) == {*PARTS, *BLOCK_PARTS}
    assert not directions(first, torch.randn(7, 5)).any()
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert any(not torch.equal(v, other[k]) for k, v in first.items())
    assert bool(((first["block.gate"] - 1).abs() < 0.5).all())


def test_without_biases_nothing_gives_nothing():
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    assert not directions(made(biases=False), zeros).any() and directions(made(), zeros).any()


def test_inputs_have_one_scale():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(dense(x * torch.tensor([[1e-3], [1.0], [1e3]])), dense(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dense(x).square().mean(-1), torch.ones(3))
    assert torch.isfinite(dense(torch.zeros(1, 8))).all()


def coder(norm="none", threshold=False, m=24, d=7, k=5) -> Coder:
    g = torch.Generator().manual_seed(3)
    parts = {"encoder": torch.randn(m, d, generator=g), "decoder": torch.randn(m, d, generator=g)}
    parts |= {"encoder_bias": torch.randn(m, generator=g) / 4, "decoder_bias": torch.randn(d, generator=g) / 4}
    parts |= {"mean": torch.randn(d, generator=g), "scale": 0.5 + torch.rand(d, generator=g)}
    if threshold:
        parts["threshold"] = torch.randn(m, generator=g)
    return Coder({key: v.double() for key, v in parts.items()}, k, norm)


@pytest.mark.parametrize("norm", ["none", "layer", "length"])
def test_activations_of_some_latents_equal_the_dictionarys(norm):
    """With a threshold exactly, but for the one factor that brings all that are active near 1."""
    own = coder(norm, threshold=True)
    x = torch.randn(90, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    latents, kept = torch.tensor([3, 8, 20, 23]), torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    found = coded(reading_of(own, latents, x), x, kept, norm)
    every = whole(*own.encode(x), 24)
    torch.testing.assert_close(found, every[:, latents] * kept / every[every > 0].square().mean().sqrt())
    assert bool((found[:, [0, 1, 3]] > 0).any(0).all())


def test_a_dictionary_that_is_silent_is_read_as_it_is():
    own, x = coder(threshold=True), torch.ones(2, 7, dtype=torch.float64)
    own.parts["threshold"] += 1e3
    found = reading_of(own, torch.arange(24), x)
    assert torch.equal(found["weight"], own.parts["encoder"] * own.parts["scale"])


def test_the_k_largest_become_a_threshold():
    """Half of the tokens keep all that TopK lets through, the others lose the weakest or gain some."""
    own, x = coder(), torch.randn(400, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = whole(*own.encode(x), 24)
    found = coded(reading_of(own, torch.arange(24), x), x, torch.ones(24, dtype=torch.float64), "none")
    factor = found.max() / expected.max()
    same = (found > 0) == (expected > 0)
    assert float(same.double().mean()) > 0.9
    torch.testing.assert_close(found[same], factor * expected[same])
    assert float(found[found > 0].square().mean().sqrt()) == pytest.approx(1, abs=0.1)
