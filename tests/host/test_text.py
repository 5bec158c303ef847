"""Text encoders of every family, and what learned rows begin at."""

import pytest
import torch

from .tiny import FAMILIES, clip

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
