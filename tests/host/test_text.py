"""Text encoders of every family, and what learned rows begin at."""

import pytest
import torch

from .tiny import FAMILIES, clip, stock

pytestmark = pytest.mark.usefixtures("host")


@pytest.mark.parametrize("init", ["word", "text", "random"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_start_rows(toy, init, count):
    from concepts.host.text import encoders, start_rows

    (encoder,) = encoders(toy[1])
    start = start_rows(encoder, init, "a red mug", count, torch.Generator().manual_seed(0))
    assert start.shape == (count, 64) and start.dtype == torch.float32
    assert len(start.unique(dim=0)) == count
    if init != "random" and (init, count) != ("text", 2):  # three words over two vectors: one is a mean of two
        words = encoder.rows("a red mug")
        near = words.mean(0, keepdim=True) if init == "word" or count == 1 else words
        assert all(float((near - row).norm(dim=-1).min()) < 0.6 * float(row.norm()) for row in start)


def test_every_family_lists_its_encoders(host):
    from concepts.host.text import encoders

    keys = {f: [e.key for e in encoders(clip(f))] for f in FAMILIES}
    assert (
        keys["sd15"] == ["clip_l"]
        and set(keys["sdxl"]) == {"clip_l", "clip_g"}
        and set(keys["flux"]) == {"clip_l", "t5xxl"}
    )
    assert len(keys["sd2"]) == 1 and set(keys["sd3"]) >= {"clip_l", "clip_g"}


def test_names_stand_between_blanks_of_their_own():
    """The host knows a row behind a blank or a new line; other text stays as it is."""
    from concepts.host.text import fill

    names = {"mug": "embedding:x", "hat": "cap"}
    assert fill("<mug>, a\n<mug> (<mug>:1.2) my<mug>s", names) == (
        "embedding:x , a\nembedding:x ( embedding:x :1.2) my embedding:x s"
    )
    assert fill("big<hat>s <hat>, <cup>", names) == "big cap s cap, <cup>"


@pytest.mark.parametrize("skipped", [None, -2])
def test_an_encoder_is_set_up_for_its_own_clip(toy, skipped):
    """Whatever layer the clone that shares it was read at last."""
    from concepts.host.token_features import read

    own, other = toy[1].clone(), toy[1].clone()
    own.clip_layer(skipped)
    other.clip_layer(-3 if skipped else -2)
    text = "a red mug"
    expected = stock(own, text)[0][0][0]
    assert not torch.allclose(stock(other, text)[0][0][0], expected, atol=1e-2)
    (spoken,) = read(own, [text])
    torch.testing.assert_close(spoken.rows, expected[list(spoken.places)])
