"""Attention with maps out of its log-sum-exp against the naive formulas."""

import pytest
import torch

from concepts.kernels import flash

from .test_attention import drawn

FIRST = 5


def keys(count: int):
    """Two columns: one key, and the mean of two, other ones per sample; the keys that count, and their weights."""
    columns = torch.zeros(2, count, 2, dtype=torch.float64)
    columns[:, 1, 0] = 1
    columns[0, [2, 4], 1], columns[1, [2, 3], 1] = 0.5, 0.5
    chosen = columns.sum((0, 2)).nonzero()[:, 0]
    return columns, chosen, columns[:, chosen]


def naive(q, k, v, columns):
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2), p.mean(1)[:, FIRST:] @ columns


def given(tokens: int, width: int) -> list[torch.Tensor]:
    return [drawn(2, 3, tokens, width, seed=seed).requires_grad_() for seed in range(3)]


def test_values_and_gradients_equal_the_naive_ones():
    inputs, (columns, chosen, weights) = given(11, 8), keys(11)

    def joint(*x):
        return flash.joint(*x, chosen, weights, FIRST)

    assert flash.usable(*inputs)
    for found, expected in zip(joint(*inputs), naive(*inputs, columns), strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(joint, inputs)


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-20, 0.0])
def test_an_output_that_little_depends_on_leaves_the_maps_gradient_exact(scale):
    """As in a last block, where the picture is not looked at and the maps are."""
    inputs, (columns, chosen, weights) = given(40, 8), keys(40)
    of_maps, of_out = drawn(2, 40 - FIRST, 2, seed=3), drawn(2, 40, 24, seed=4) * scale

    def gradients(out, maps):
        return torch.autograd.grad((out * of_out).sum() + (maps * of_maps).sum(), inputs)

    expected = gradients(*naive(*inputs, columns))
    for found, exact in zip(gradients(*flash.joint(*inputs, chosen, weights, FIRST)), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-18, 1e-24])
def test_gradients_of_any_size_are_finite(dtype, size):
    """Of the maps alone, as deep models have them: the stand-ins must not overflow."""
    inputs, (columns, chosen, weights) = given(40, 8), keys(40)
    narrow = [x.detach().to(dtype).requires_grad_() for x in inputs]
    of_maps = size * drawn(2, 40 - FIRST, 2, seed=3)
    found = torch.autograd.grad((flash.joint(*narrow, chosen, weights, FIRST)[1] * of_maps.float()).sum(), narrow)
    exact = torch.autograd.grad((naive(*inputs, columns)[1] * of_maps).sum(), inputs, allow_unused=True)
    for a, b in zip(found[:2], exact[:2], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < (1e-4 if dtype == torch.float32 else 5e-2)
    assert float(found[2].double().norm()) < 1e-6 * size


def test_what_else_a_kernel_gives_travels_to_its_backward(monkeypatch):
    """CUDA's gives tensors that may be missing, and numbers."""
    inputs, (_, chosen, weights) = given(11, 8), keys(11)
    forward, backward, seen, more = flash._forward, flash._backward, [], (None, torch.ones(1), 11, None, torch.zeros(1))
    monkeypatch.setattr(flash, "_forward", lambda *x: (*forward(*x), *more))
    monkeypatch.setattr(flash, "_backward", lambda *x: seen.extend(x[6:]) or backward(*x[:6]))
    flash.joint(*inputs, chosen, weights, FIRST)[1].sum().backward()
    assert seen[0] is None and seen[2:4] == [11, None] and [float(seen[1]), float(seen[4])] == [1, 0]


def test_fp16_and_narrower_values_are_left_to_others():
    """O' may leave the range of fp16."""
    q, k, v = given(11, 8)
    assert not flash.usable(q.half(), k.half(), v.half()) and not flash.usable(q, k, v[..., :4])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_a_gpu_gives_the_values_and_gradients_of_float64(width, weight):
    """Relative norm of the difference; a text of 300 keys and a picture of 24 x 25."""
    plain, (columns, chosen, weights) = given(900, width), keys(900)
    of_maps = 500 * drawn(2, 900 - FIRST, 2, seed=3)

    def found(inputs, run):
        out, maps = run(*inputs)
        total = weight * out.double().square().sum() + (maps * of_maps.to(maps)).sum()
        return [out, maps, *torch.autograd.grad(total, inputs)]

    half = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in plain]
    assert flash.usable(*half) and not flash.usable(*(x.float() for x in half))
    ours = found(half, lambda *x: flash.joint(*x, chosen.cuda(), weights.cuda(), FIRST))
    exact = found(plain, lambda *x: naive(*x, columns))
    for a, b in zip(ours, exact, strict=True):
        assert float((a.double().cpu() - b).norm()) < 2e-2 * float(b.norm()) + 1e-6
