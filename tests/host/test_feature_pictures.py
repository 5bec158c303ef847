"""Features as colours: one basis for all pictures, masks, and what cannot be shown together."""

import pytest
import torch

from concepts.carriers.errors import CarrierError, CarrierMismatch
from concepts.carriers.features import Features

pytestmark = pytest.mark.usefixtures("host")


def made(channels=6, pictures=2, seed=0, side=4, **more):
    g = torch.Generator().manual_seed(seed)
    return Features({"key": torch.randn(pictures, channels, side, side, generator=g), **more}, 8, 16)


def coloured(*args, **kwargs):
    from concepts.host.feature_pictures import coloured

    with torch.inference_mode():
        return coloured(*args, **kwargs)


def test_equal_features_get_equal_colours():
    """Anywhere: in another picture of the socket, and in the second one with another grid."""
    one = made()
    maps = one.map("key").clone()
    maps[1, :, 3, 0] = maps[0, :, 0, 0]
    other = torch.randn(1, 6, 2, 2)
    other[0, :, 1, 1] = maps[0, :, 0, 0]
    image = coloured(Features({"key": maps}, 8, 16), "auto", Features({"key": other}, 32, 32))
    assert image.shape == (3, 8, 16, 3) and 0 <= float(image.min()) and float(image.max()) <= 1
    torch.testing.assert_close(image[0, 0, 0], image[1, 7, 0])
    torch.testing.assert_close(image[0, 0, 0], image[2, 7, 15])
    assert not torch.allclose(image[0, 0, 0], image[0, 0, 15], atol=1e-2)


def test_colours_are_spent_inside_the_mask():
    given = made(pictures=1)
    maps = given.map("key").clone()
    maps[..., :2] *= 100
    mask = torch.ones(1, 8, 16)
    mask[..., :8] = 0
    inside = coloured(Features({"key": maps}, 8, 16), mask=mask)[0, :, 8:]
    assert float(coloured(Features({"key": maps}, 8, 16), mask=mask)[0, :, :8].max()) == pytest.approx(0.1)
    assert float(inside.std()) > 5 * float(coloured(Features({"key": maps}, 8, 16))[0, :, 8:].std())


def test_cells_that_reach_beyond_the_picture_keep_their_size():
    """Cells of 16 pixels: the last row reaches 12 beyond, the last column 8. The second picture is drawn half as large,
    and the mask is three times as large as the first one."""
    given = torch.randn(1, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    image = coloured(Features({"key": given}, 52, 72), "auto", Features({"key": given}, 104, 144))
    assert torch.allclose(image[0], image[1], atol=1e-5)
    for y, x in ((15, 15), (16, 16), (47, 63), (48, 64)):
        assert torch.equal(image[0, y, x], image[0, y // 16 * 16, x // 16 * 16])
    assert not torch.equal(image[0, 47, 63], image[0, 47, 64]) and not torch.equal(image[0, 47, 63], image[0, 48, 63])
    mask = torch.zeros(1, 156, 216)
    mask[:, : 2 * 48, : 3 * 48] = 1
    shown = coloured(Features({"key": given}, 52, 72), mask=mask)[0]
    dark = (shown == shown.new_tensor(0.1)).all(-1)
    assert bool(dark[32:].all()) and bool(dark[:, 48:].all()) and not bool(dark[:32, :48].any())


def test_kinds_are_chosen_by_name():
    words = {"attention a": torch.rand(2, 1, 4, 4), "attention b": torch.rand(2, 1, 4, 4)}
    given = made(dift=torch.randn(2, 5, 4, 4), **words)
    shown = {kind: coloured(given, kind) for kind in ("auto", "key", "dift", "attention")}
    assert torch.equal(shown["auto"], shown["key"]) and not torch.equal(shown["key"], shown["dift"])
    assert float((shown["attention"][..., 2] - 0.5).abs().max()) == 0, "two words have two directions"
    with pytest.raises(CarrierError, match="no map 'query', but: key, dift, attention a, attention b"):
        coloured(given, "query")


def test_what_has_no_common_basis_is_refused():
    with pytest.raises(CarrierMismatch, match="6 and 7 channels"):
        coloured(made(), "auto", made(7))
    with pytest.raises(CarrierMismatch, match="3 masks for 2 pictures"):
        coloured(made(), mask=torch.ones(3, 8, 16))
    with pytest.raises(ValueError, match="cover no cell"):
        coloured(made(), mask=torch.zeros(1, 8, 16))


@pytest.fixture(scope="module")
def scenes(host):
    """Eight pictures of one mug in other places, their masks."""
    from concepts.demo import world
    from concepts.host.pictures import batch

    drawn = [world.render(s) for s in world.references("cross-mug", 8, 0)]
    return batch([p for p, _ in drawn]), batch([m for _, m in drawn])


def test_cells_of_the_toy_worlds_mug_find_the_mug(toy, scenes):
    """Nearest neighbours by cosine hit it at least twice as often as a random cell does; those of the latent less."""
    from concepts.host.feature_pictures import cells_in
    from concepts.host.features import extracted

    pictures, masks = scenes
    with torch.inference_mode():
        latents = toy[2].encode(pictures)
        found, report = extracted(*toy[:2], "a photo of a mug", [], "DIFT", "mug", 0, image=pictures, vae=toy[2])
    assert (found.height, found.width) == (128, 128) and "8 pictures of 128 x 128, 8 passes of ToyWorld" in report
    assert "half of the decoder" in report and "mean of 8 noises" in report

    def hits(maps):
        inside, rate, chance = cells_in(masks, maps, (128, 128)), 0.0, 0.0
        unit = torch.nn.functional.normalize(maps.movedim(1, -1), dim=-1)
        for a in range(8):
            b = (a + 1) % 8
            best = (unit[a][inside[a]] @ unit[b].flatten(0, 1).T).argmax(1)
            rate += float(inside[b].flatten()[best].float().mean()) / 8
            chance += float(inside[b].float().mean()) / 8
        return rate, chance

    rate, chance = hits(found.map("dift"))
    assert rate > 2 * chance and rate > hits(latents.clone())[0]
