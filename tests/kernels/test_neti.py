"""The mapper against a naive loop; nested dropout, bypass, gradients."""

import math

import pytest
import torch

from concepts.kernels import neti

SMALL = {"anchors": 3, "hidden": 5, "count": 6}


def network(layers=4, width=7, seed=0, **changes):
    return neti.start(layers, width, torch.Generator().manual_seed(seed), **{**SMALL, **changes})


def test_shapes_are_the_papers():
    made = neti.start(16, 768, torch.Generator().manual_seed(0))
    assert tuple(made) == neti.PARTS
    assert {k: tuple(v.shape) for k, v in made.items() if "norm" not in k and not k.endswith("bias")} == {
        "frequencies": (1024, 2),
        "input.weight": (160, 2048),
        "hidden1.weight": (128, 160),
        "hidden2.weight": (128, 128),
        "output.weight": (1536, 128),
    }
    deviation = made["frequencies"].std(0)
    torch.testing.assert_close(deviation, torch.tensor([0.03, 2.0]), rtol=0.1, atol=0)
    assert all(v.dtype == torch.float32 for v in made.values())
    for name, inputs in {"hidden1": 160, "hidden2": 128, "output": 128}.items():
        for part in ("weight", "bias"):
            assert 0.97 < float(made[f"{name}.{part}"].abs().max()) * inputs**0.5 <= 1


def test_the_seed_decides():
    a, b, c = network(), network(), network(seed=1)
    assert all(torch.equal(a[k], b[k]) for k in a) and not torch.equal(a["output.weight"], c["output.weight"])
    kept = network(seed=1, frequencies=a["frequencies"])
    assert torch.equal(kept["frequencies"], a["frequencies"]) and torch.equal(kept["input.weight"], a["input.weight"])


def test_the_input_layer_knows_the_anchors():
    """Each anchor answers strongest to its own encoding."""
    made = neti.start(4, 8, torch.Generator().manual_seed(0))
    times, layers = torch.arange(10).repeat_interleave(4) * 100.0, torch.arange(4).repeat(10)
    encoded = neti.encode(made["frequencies"], times, layers)
    torch.testing.assert_close(encoded.norm(dim=-1), torch.ones(40))
    assert torch.equal((encoded @ made["input.weight"].T).argmax(-1), torch.arange(40))


def naive(made, time, layer, norm, kept):
    """One row, number by number."""
    value = {k: v.double().tolist() for k, v in made.items()}
    angles = [time * w[0] + layer * w[1] for w in value["frequencies"]]
    state = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    size = math.sqrt(sum(x * x for x in state))
    state = [x / size for x in state]

    def dense(name, x):
        rows = zip(value[f"{name}.weight"], value[f"{name}.bias"], strict=True)
        return [sum(w * v for w, v in zip(row, x, strict=True)) + bias for row, bias in rows]

    state = dense("input", state)
    for number in "12":
        state = dense(f"hidden{number}", state)
        mean = sum(state) / len(state)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in state) / len(state) + 1e-5)
        scale, shift = value[f"norm{number}.weight"], value[f"norm{number}.bias"]
        state = [(x - mean) / deviation * s + b for x, s, b in zip(state, scale, shift, strict=True)]
        state = [x if x > 0 else 0.01 * x for x in state]
    out = dense("output", [x if i < kept else 0.0 for i, x in enumerate(state)])
    word, bypass = out[: len(out) // 2], out[len(out) // 2 :]
    size = math.sqrt(sum(x * x for x in word))
    return [norm * x / size for x in word], bypass


def test_values_equal_a_naive_loop():
    made = {k: v.double() for k, v in network().items()}
    times, layers, kept = torch.tensor([0.0, 123.0, 999.0]), torch.tensor([0, 3, 1]), torch.tensor([5, 2, 0])
    words, bypass = neti.mapped(made, times, layers, 0.4, kept)
    for row in range(3):
        word, more = naive(made, float(times[row]), int(layers[row]), 0.4, int(kept[row]))
        torch.testing.assert_close(words[row], torch.tensor(word, dtype=torch.float64))
        torch.testing.assert_close(bypass[row], torch.tensor(more, dtype=torch.float64))
    whole = neti.mapped(made, times, layers, 0.4)
    all_kept = neti.mapped(made, times, layers, 0.4, torch.full((3,), 5))
    assert all(torch.equal(a, b) for a, b in zip(whole, all_kept, strict=True))


def test_nested_dropout_keeps_a_prefix():
    """Units behind the prefix can be anything."""
    made, kept = network(), torch.tensor([2])
    other = dict(made, **{"output.weight": made["output.weight"].clone()})
    other["output.weight"][:, 2:] = 9.0
    where = torch.tensor([300.0]), torch.tensor([1])
    for a, b in zip(neti.mapped(made, *where, 1.0, kept), neti.mapped(other, *where, 1.0, kept), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(neti.mapped(made, *where, 1.0)[0], neti.mapped(other, *where, 1.0)[0])


def test_half_of_the_rows_are_truncated_evenly():
    kept = neti.truncation(20000, 8, torch.Generator().manual_seed(0))
    share = kept.bincount(minlength=9) / len(kept)
    torch.testing.assert_close(share, torch.tensor([1 / 16] * 8 + [0.5]), rtol=0, atol=0.01)
    assert (neti.truncation(50, 8, torch.Generator().manual_seed(0), chance=0.0) == 8).all()


def test_the_bypass_has_a_share_of_the_length():
    g = torch.Generator().manual_seed(0)
    state, bypass = torch.randn(3, 7, generator=g), 50 * torch.randn(3, 7, generator=g)
    moved = neti.bypassed(state, bypass) - state
    torch.testing.assert_close(moved.norm(dim=-1), 0.2 * state.norm(dim=-1))
    torch.testing.assert_close(torch.cosine_similarity(moved, bypass, -1), torch.ones(3))


@pytest.mark.parametrize("kept", [None, torch.tensor([5, 3])])
def test_gradients(kept):
    made = {k: v.double() for k, v in network(layers=2, width=3).items()}
    learned = [k for k in neti.PARTS if k != neti.FIXED]
    state = torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def function(*values):
        parts = dict(made, **dict(zip(learned, values, strict=True)))
        words, bypass = neti.mapped(parts, torch.tensor([10.0, 700.0]), torch.tensor([0, 1]), 0.5, kept)
        return words, neti.bypassed(state, bypass)

    assert torch.autograd.gradcheck(function, [made[k].clone().requires_grad_() for k in learned])
