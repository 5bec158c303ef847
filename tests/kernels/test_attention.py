"""Attention columns and losses against the naive formulas."""

import pytest
import torch
from torch.nn.functional import mse_loss

from concepts.kernels import attention


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(q, k, heads):
    """Probabilities [b, h, n, m], one head at a time."""
    size = q.shape[-1] // heads
    parts = [
        (a @ b.transpose(1, 2) / size**0.5).softmax(-1) for a, b in zip(q.split(size, 2), k.split(size, 2), strict=True)
    ]
    return torch.stack(parts, 1)


@pytest.fixture(
    params=[(1 << 19, 16), (40, 1), (130, 16), (1, 1)], ids=["whole", "4 and 2", "4 and 2 filled up", "single"]
)
def case(request, monkeypatch):
    for name, value in zip(("CACHED", "VECTOR"), request.param, strict=True):
        monkeypatch.setattr(attention, name, value)
    q, k, v, r = drawn(2, 6, 8), drawn(2, 5, 8, seed=1), drawn(2, 5, 8, seed=2), drawn(2, 7, 8, seed=3)
    columns, of_reference = torch.zeros(2, 5, 3).double(), torch.zeros(2, 7, 3).double()
    for b, keys in enumerate(([0, 2, 4], [1, 3, 4])):
        columns[b, keys, range(3)] = 1
        of_reference[b, keys, range(3)] = 1
    of_reference[0, :, 1] = torch.tensor([0, 0, 0.5, 0.5, 0, 0, 0])
    return q, k, v, r, columns, of_reference


@pytest.mark.parametrize("text", [1024, 3], ids=["text", "many keys"])
def test_attention_and_columns_equal_the_naive_ones(case, monkeypatch, text):
    monkeypatch.setattr(attention, "TEXT", text)
    q, k, v, _, columns, _ = case
    p = naive(q, k, 2)
    out, maps = attention.attend(q, k, v, 2, columns)
    torch.testing.assert_close(maps, p.mean(1) @ columns)
    torch.testing.assert_close(out, (p @ attention.split_heads(v, 2)).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention.attention_columns(q, k, 2, columns), maps)


@pytest.mark.parametrize("follow", [True, False])
def test_gradients_of_the_columns(case, follow):
    q, k, v, _, columns, _ = (x.requires_grad_(i < 3) for i, x in enumerate(case))
    weights = drawn(2, 6, 3, seed=4)
    if follow:
        assert torch.autograd.gradcheck(lambda *x: attention.attend(*x, 2, columns, True), (q, k, v))
        heads = [attention.split_heads(x, 2) for x in (q, k, v)]
        assert torch.autograd.gradcheck(lambda *x: attention.fused(*x, columns), heads)  # what CUDA takes
        return
    out, maps = attention.attend(q, k, v, 2, columns)
    found = torch.autograd.grad(out.square().sum() + (maps * weights).sum(), (q, k, v))
    plain = (naive(q, k, 2) @ attention.split_heads(v, 2)).square().sum()
    seen = ((naive(q.detach(), k, 2).mean(1) @ columns) * weights).sum()
    torch.testing.assert_close(found, torch.autograd.grad(plain + seen, (q, k, v)))


@pytest.mark.parametrize("width", [4, 40, 64])
def test_a_product_that_is_as_wide_as_its_queries_is_enough(width, monkeypatch):
    """As MPS has it; a tensor without memory stands for one of that device."""
    stock = attention.F.scaled_dot_product_attention

    def narrow(q, *args, **kwargs):
        return stock(q, *args, **kwargs)[..., : q.shape[-1]]

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", narrow)
    q, k, v = (torch.empty(2, 3, n, width, device="meta") for n in (9, 5, 5))
    out, maps = attention.fused(q, k, v, torch.empty(1, 5, 2, device="meta"))
    assert out.shape == (2, 3, 9, width) and maps.shape == (2, 9, 2)


def test_a_pass_keeps_its_inputs_only():
    q, k, v = (drawn(1, n, 8).requires_grad_() for n in (64, 77, 77))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        columns = torch.eye(77).double()[None, :, :2]
        _, maps = attention.attend(q, k, v, 2, columns)
        attention.attention_loss(q, k, v, 2, columns, columns)
    inputs = {t.untyped_storage().data_ptr() for t in (q, k, v, columns)}
    assert not [t for t in kept if t.numel() and t.untyped_storage().data_ptr() not in inputs]
    assert maps.shape == (1, 64, 2)


def expected(kind, q, k, r, columns, of_reference):
    if kind == "logits":
        size = 4
        a, b = (
            torch.stack([x @ y.mT for x, y in zip(q.split(size, 2), z.split(size, 2), strict=True)], 1) for z in (k, r)
        )
        return ((a @ columns[:, None] - b @ of_reference[:, None]) / 2).square().mean()
    a, b = naive(q, k, 2) @ columns[:, None], naive(q, r, 2) @ of_reference[:, None]
    if kind == "probabilities":
        return (a - b).square().sum((2, 3)).mean() * 1024 / q.shape[1]
    total = 0.0
    for ours, theirs in zip(a, b, strict=True):  # as the authors of AttnDreamBooth, with a weight of 1 for the means
        total = total + mse_loss(ours.mean((0, 1)), theirs.mean((0, 1)))
        if kind == "moments":
            total = total + 2.5 * mse_loss(ours.var((0, 1)), theirs.var((0, 1)))
    return total / len(a)


@pytest.mark.parametrize("kind", attention.LOSSES)
def test_losses_equal_the_naive_ones(case, kind):
    q, k, _, r, columns, of_reference = case
    k.requires_grad_()
    found, wanted = (
        attention.attention_loss(q, k, r, 2, columns, of_reference, kind),
        expected(kind, q, k, r, columns, of_reference),
    )
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found, k), torch.autograd.grad(wanted, k))
    assert torch.autograd.gradcheck(lambda x: attention.attention_loss(q, x, r, 2, columns, of_reference, kind), (k,))


@pytest.mark.parametrize("kind", attention.LOSSES)
def test_columns_of_zeros_and_repeated_keys_change_nothing(case, kind):
    q, k, _, r, columns, of_reference = case
    plain = attention.attention_loss(q, k, r, 2, columns, of_reference, kind)
    more, of_more = (torch.cat([c, torch.zeros_like(c[..., :2])], -1) for c in (columns, of_reference))
    torch.testing.assert_close(attention.attention_loss(q, k, r, 2, more, of_more, kind), plain)
    twice = attention.attention_loss(q, k.repeat(1, 2, 1), r, 2, columns.repeat(1, 2, 1), of_reference, kind)
    torch.testing.assert_close(twice, plain)


def test_an_unknown_loss_is_named(case):
    q, k, _, r, columns, of_reference = case
    with pytest.raises(ValueError, match="Unknown attention loss 'max'"):
        attention.attention_loss(q, k, r, 2, columns, of_reference, "max")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("follow", [True, False])
@pytest.mark.parametrize("width", [40, 64, 128])
def test_a_gpu_gives_the_values_and_gradients_of_float64(dtype, near, follow, width):
    """Relative norm of the difference; keys of a text and of a picture with three columns."""
    for keys in (77, 1024):
        given = [drawn(2, n, 4 * width, seed=i).to(dtype) for i, n in enumerate((1024, keys, keys))]
        columns, weights = torch.eye(keys).double()[None, :, :3], 500 * drawn(2, 1024, 3, seed=4).to(dtype)

        def found(device, dtype, given=given, columns=columns, weights=weights):
            q, k, v = (x.to(device, dtype).detach().requires_grad_() for x in given)
            out, maps = attention.attend(q, k, v, 4, columns.to(device), follow)
            total = out.square().sum() + (maps * weights.to(device)).sum()
            return [out, maps, *torch.autograd.grad(total, (q, k, v))]

        for ours, exact in zip(found("cuda", dtype), found("cpu", torch.float64), strict=True):
            assert float((ours.double().cpu() - exact).norm() / exact.norm()) < near


@pytest.mark.parametrize("what", ["maps", *attention.LOSSES])
def test_what_is_kept_is_a_hundredth_of_all_maps(what):
    """Beside what goes in and the attention's own output: SD1.5's maps of 32 x 32 under 77 words."""
    q, k, v, other = (torch.randn(1, n, 8 * 80, requires_grad=True) for n in (1024, 77, 77, 77))
    columns, kept = torch.eye(77)[None, :, [5, 7]], {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if what == "maps":
            out, found = attention.attend(q, k, v, 8, columns)
        else:
            out, found = q, attention.attention_loss(q, k, other, 8, columns, columns, what)
    for tensor in (q, k, v, other, columns, out):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert found.requires_grad and found.nbytes + sum(kept.values()) <= 8 * 1024 * 77 * 4 / 100
