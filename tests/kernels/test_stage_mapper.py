"""The block that makes rows per stage out of a class word."""

import torch

from concepts.kernels import stage_mapper
from concepts.kernels.stage_mapper import heads_of, stage_rows, start


def made(stages=5, roles=2):
    g = torch.Generator().manual_seed(0)
    return start(128, stages, roles, g), torch.randn(3, 128, generator=g)


def test_every_row_starts_as_the_class_word():
    weights, word = made()
    rows = stage_rows(weights, word, 5, 2)
    assert rows.shape == (5, 1, 2, 1, 128)
    assert torch.equal(rows, word.mean(0).expand_as(rows))


def test_it_is_the_block_of_torch_layers():
    """Against nn.MultiheadAttention and nn.Linear with the same weights."""
    w, word = made()
    w = {k: torch.randn_like(v) / 10 if k.startswith("feed.out") else v for k, v in w.items()}
    x = word[None]
    for part in ("attention1", "attention2"):
        block = torch.nn.MultiheadAttention(128, 2, batch_first=True)
        with torch.no_grad():
            block.in_proj_weight.copy_(torch.cat([w[f"{part}.{n}.weight"] for n in ("query", "key", "value")]))
            block.out_proj.weight.copy_(w[f"{part}.out.weight"])
            block.out_proj.bias.copy_(w[f"{part}.out.bias"])
        y = torch.nn.functional.layer_norm(x, (128,))
        x = x + block(y, y, y, need_weights=False)[0]
    y = torch.nn.functional.layer_norm(x, (128,)) @ w["feed.gate.weight"].T
    y = (y[..., :512] * torch.nn.functional.gelu(y[..., 512:])) @ w["feed.out.weight"].T + w["feed.out.bias"]
    wanted = word.mean(0) + y[0].mean(0).view(5, 1, 2, 1, 128)
    torch.testing.assert_close(stage_rows(w, word, 5, 2), wanted)


def test_all_weights_get_a_gradient():
    weights, word = made(3, 1)
    weights["feed.out.weight"] += 0.01
    for value in weights.values():
        value.requires_grad_()
    stage_rows(weights, word, 3, 1).square().sum().backward()
    assert all(v.grad is not None and bool(v.grad.any()) for v in weights.values())


def test_heads_are_at_most_64_wide():
    assert [heads_of(w) for w in (32, 64, 65, 768, 1024, 1280, 4096)] == [1, 1, 5, 12, 16, 20, 64]


def test_wide_encoders_get_a_narrower_feed_forward(monkeypatch):
    for wide, inner in ((128, 512), (127, 128)):
        monkeypatch.setattr(stage_mapper, "WIDE", wide)
        assert made()[0]["feed.out.weight"].shape == (5 * 2 * 128, inner)
