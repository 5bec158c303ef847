"""Pictures become latents once: sizes, masks, captions, mirror, and the draw of batches."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")


def build(toy, images, masks=(), texts=(), **more):
    from concepts.host.concept_set import make_set

    with torch.inference_mode():
        return make_set(toy[2], list(images), list(masks), list(texts), **more)


def picture(height=128, width=128, n=1, seed=0):
    return torch.rand(n, height, width, 3, generator=torch.Generator().manual_seed(seed))


def test_latents_are_those_of_the_stock_node(toy):
    import nodes

    image = picture()
    with torch.inference_mode():
        expected = nodes.VAEEncode().encode(toy[2], image)[0]["samples"]
    made = build(toy, [image])
    assert torch.equal(made.latents[0], expected[0].float()) and not made.latents[0].is_inference()


def test_any_sizes_become_buckets(toy):
    made = build(toy, [picture(128, 128, 2), picture(100, 140), picture(133, 129)])
    assert [tuple(z.shape[1:]) for z in made.latents] == [(16, 16), (16, 16), (12, 17), (16, 16)]
    assert made.buckets() == [[0, 1, 3], [2]]
    assert {tuple(made.latents[i].shape) for i in made.draw(4, torch.Generator().manual_seed(0))[0]} in (
        {(12, 16, 16)},
        {(12, 12, 17)},
    )


def test_resolution_keeps_the_shape(toy):
    made = build(toy, [picture(64, 256), picture(300, 300)], resolution=128)
    assert [tuple(z.shape[1:]) for z in made.latents] == [(8, 32), (16, 16)]


def test_masks_follow_the_picture(toy):
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :32] = 1
    made = build(toy, [picture()], [mask], mirror=True)
    assert made.mirrored == (False, True)
    left, right = made.masks
    assert left.shape == (1, 16, 16) and left[:, :, :7].min() == 1 and left[:, :, 9:].max() == 0
    assert torch.equal(right, left.flip(-1))


@pytest.mark.parametrize(
    "texts, count, expected",
    [([], 3, None), (["a {} here"], 3, ["a {} here"] * 3), (["<x> a", "b <x>"], 2, ["{} a", "b {}"])],
)
def test_captions(toy, texts, count, expected):
    made = build(toy, [picture(n=count)], texts=texts)
    assert len(made.captions) == count
    if expected is None:
        assert all("{}" in t for options in made.captions for t in options) and len(made.captions[0]) > 1
    else:
        assert [c for (c,) in made.captions] == expected


@pytest.mark.parametrize(
    "images, masks, texts, message",
    [
        ([], [], [], "no pictures"),
        ([(3,)], [torch.ones(2, 8, 8)], [], "3 pictures and 2 masks"),
        ([(1,)], [torch.zeros(1, 8, 8)], [], "empty"),
        ([(3,)], [], ["{} a", "{} b"], "3 pictures and 2 captions"),
        ([(1,)], [], ["a mug"], "write <name>"),
    ],
)
def test_what_does_not_match_is_refused(toy, images, masks, texts, message):
    with pytest.raises(ValueError, match=message):
        build(toy, [picture(n=n) for (n,) in images], masks, texts)


def test_a_mask_in_the_rim_that_is_cropped_off_is_empty(toy):
    """It would count the whole picture."""
    mask = torch.zeros(1, 100, 71)
    mask[0, :, 0] = 1
    with pytest.raises(ValueError, match="mask of picture 1 is empty, or lies in the rim"):
        build(toy, [picture(100, 71)], [mask])


def test_draws_depend_on_the_seed_alone(toy):
    made = build(toy, [picture(n=5)])
    draws = [made.draw(7, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert sorted(set(draws[0][0])) == [0, 1, 2, 3, 4]


def test_pictures_are_drawn_alike_whatever_their_size():
    from concepts.host.concept_set import ConceptSet

    latents = (*(torch.zeros(4, 8, 8),) * 4, torch.zeros(4, 8, 16))
    made, g = ConceptSet(latents, (None,) * 5, (("{}",),) * 5, (False,) * 5), torch.Generator().manual_seed(0)
    drawn = [made.draw(1, g)[0][0] for _ in range(1000)]
    assert all(150 < drawn.count(number) < 250 for number in range(5))


def test_a_vae_that_overflows_is_named(toy, monkeypatch):
    with torch.inference_mode():
        broken = toy[2].encode(picture()).fill_(float("nan"))
    monkeypatch.setattr(toy[2], "encode", lambda pixels: broken)
    with pytest.raises(ValueError, match="not finite for picture 1.*--fp32-vae"):
        build(toy, [picture()])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_pictures_and_masks_that_are_not_finite_are_named(toy, bad):
    images, masks = picture(n=2), torch.ones(2, 128, 128)
    images[1, 5, 5, 1] = bad
    with pytest.raises(ValueError, match="^Picture 2 holds numbers that are not finite"):
        build(toy, [images])
    masks[1, 5, 5] = bad
    with pytest.raises(ValueError, match="^Mask 2 holds numbers that are not finite"):
        build(toy, [picture(n=2)], [masks])


def test_grey_pictures_are_learned_as_coloured_ones(toy):
    grey, mask = picture()[..., :1], torch.zeros(1, 128, 128)
    mask[:, :64] = 1
    made, wanted = (build(toy, [p], [mask]) for p in (grey, grey.expand(-1, -1, -1, 3)))
    assert torch.equal(made.latents[0], wanted.latents[0]) and torch.equal(made.masks[0], wanted.masks[0])
    assert made.masks[0][0, :8].min() == 1 and made.masks[0][0, 8:].max() == 0
    with pytest.raises(ValueError, match="Picture 1 has 2 channels"):
        build(toy, [picture()[..., :2]])


def test_masks_have_one_channel_and_lie_between_0_and_1(toy):
    mask = 3 * torch.rand(2, 128, 128, generator=torch.Generator().manual_seed(0)) - 1
    made = build(toy, [picture(n=2)], [mask[:, None]])
    wanted = build(toy, [picture(n=2)], [mask.clamp(0, 1)])
    assert all(torch.equal(a, b) for a, b in zip(made.masks, wanted.masks, strict=True))
    with pytest.raises(ValueError, match=r"Mask 1 has shape \(3, 128, 128\).*convert it"):
        build(toy, [picture()], [torch.ones(1, 3, 128, 128)])
    with pytest.raises(ValueError, match="mask of picture 1 is empty"):
        build(toy, [picture()], [torch.full((1, 128, 128), -1.0)])


def test_encoding_shows_how_far_it_is_and_can_be_stopped(toy, monkeypatch):
    import comfy.model_management as management

    from concepts.host import concept_set

    shown, show = [], concept_set.Progress.show

    def pressed(self, done):
        shown.append((done, self.total))
        if done == 2:
            management.interrupt_current_processing()
        show(self, done)

    monkeypatch.setattr(concept_set.Progress, "show", pressed)
    with pytest.raises(management.InterruptProcessingException):
        build(toy, [picture(n=4)], mirror=True)
    assert shown == [(1, 4), (2, 4)]
