"""Which pixels look at a word: the node's path on every family, and that it is told when it cannot be."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.errors import CarrierMismatch

from .test_variants import concept
from .tiny import KINDS, Tiny, embedding, tiny

pytestmark = pytest.mark.usefixtures("host")
TEXT = "a photo of <mug>, grass and a xylophone"


@pytest.fixture(scope="module", params=KINDS)
def made(request, host):
    return tiny(request.param)


def look(made, words, times=(0.5,), text=TEXT, seed=0, **shape):
    from concepts.host.show import look

    with torch.inference_mode():
        return look(made.model, made.clip, made.latent, text, [concept(made, **shape)], list(words), list(times), seed)


def test_maps_are_shares_of_each_pixel(made):
    """Over all words of the prompt they are positive and sum to less than one."""
    (found,) = look(made, ["a", "photo", "<mug>", "grass", "xylophone"])
    assert found.maps and not found.stage
    for layer, seen in found.maps.items():
        assert seen.shape == (layer.height * layer.width, 5)
        assert bool((seen > 0).all()) and bool((seen.sum(1) < 1).all())


def test_the_model_draws_the_same_afterwards(made):
    from .test_variants import prompt, sample

    before = sample(made, prompt(made, "a mug"), cfg=1.0, steps=2)
    look(made, ["<mug>"])
    assert torch.equal(sample(made, prompt(made, "a mug"), cfg=1.0, steps=2), before)


@pytest.mark.parametrize("size", [0.02, 4.0])
def test_rows_of_embedding_files_are_no_concepts(made, size, tmp_path):
    """Two of them shift the concept's rows by two, in prompts and in captions."""
    from concepts.host.captions import Prompts
    from concepts.host.positions import columns_of, learned_columns

    file, what = embedding(made.clip, tmp_path, size), concept(made)

    def columns(text):
        prompts = Prompts(made.clip, [text], "", {"": dict.fromkeys(what.tensors, 2)})
        found = columns_of(made.model, made.clip, text, [what], ["<mug>"])
        assert torch.equal(learned_columns(made.model, made.clip, prompts.tokens[0]), found)
        return found

    plain, shifted = columns("a <mug> on grass"), columns(f"{file} a <mug> on {file} grass")
    assert torch.equal(shifted, plain.roll(2, 1))


def test_stages_change_with_the_time(made):
    found = look(made, ["<mug>"], (0.2, 0.8), stages=2)
    assert [one.stage for one in found] == ["stage 1 of 2", "stage 2 of 2"]
    assert any(not torch.equal(a, b) for a, b in zip(found[0].maps.values(), found[1].maps.values(), strict=True))


def test_stages_are_those_that_the_noise_level_chooses():
    """SD3 shifts its times: 0.3 is sampled at a noise level of 0.56, in the second of two stages."""
    made = tiny("sd3")
    made.model.model.model_sampling.set_parameters(shift=3.0)
    assert [one.stage for one in look(made, ["<mug>"], (0.2, 0.3), stages=2)] == ["stage 1 of 2", "stage 2 of 2"]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_concepts_of_any_kind_are_looked_at(family, mug_set):
    from concepts.host.show import look as looking

    from .test_lora import random_delta
    from .test_neti import learn, pictures

    made = tiny(family)
    without = random_delta(made.model)
    bundle = {f"bundle_emb.mug.{key}": rows for key, rows in concept(made).tensors.items()}
    with_rows = Concept("mug", "delta", {**without.tensors, **bundle})
    mapper = learn(made.model, made.clip, pictures(made), steps=1).concept
    for used, stages in ((mapper, 10), (with_rows, 1), (without, 1)):
        text = f"a photo of <{used.name}> on grass"
        with torch.inference_mode():
            (found,) = looking(made.model, made.clip, made.latent, text, [used], [f"<{used.name}>"], [0.45], 0)
            (beside,) = looking(made.model, made.clip, made.latent, "grass", [used], ["grass"], [0.45], 0)
        assert found.maps and all(bool((seen > 0).all()) for seen in found.maps.values())
        assert found.stage == (f"stage {stages // 2} of {stages}" if stages > 1 else "") and beside.maps


def test_a_lora_without_rows_is_looked_for_by_its_words(host):
    from concepts.host.positions import columns_of

    from .test_lora import random_delta

    made = tiny("sd15")
    what = replace(random_delta(made.model), info={"token_text": "red hat"})
    with torch.inference_mode():
        found = columns_of(made.model, made.clip, "a <mug> on grass", [what], ["<mug>"])
        assert torch.equal(found, columns_of(made.model, made.clip, "a red hat on grass", [], ["red hat"]))


def test_wrong_words_and_times_are_named(made):
    with pytest.raises(
        ValueError, match="does not hold cat; its words are: a, photo, of, <mug>, grass, and, xylophone"
    ):
        look(made, ["cat", "grass"])
    with pytest.raises(ValueError, match="from 0 to 1"):
        look(made, ["grass"], (1.5,))


def test_words_are_not_looked_for_inside_longer_ones(made):
    from concepts.host.positions import columns_of

    def rows(text, word):
        with torch.inference_mode():
            return columns_of(made.model, made.clip, text, [concept(made)], [word])[0, :, 0].nonzero()[:, 0].tolist()

    assert rows("a star, a starfish", "star") == rows("a star", "star")
    assert rows("a mug<mug>mug, a beermug", "mug") == rows("a mug<mug>mug", "mug")
    with pytest.raises(ValueError, match="does not hold hat; its words are: two, hats"):
        rows("two hats", "hat")


def test_hooks_of_the_clip_that_change_the_model_are_refused(made):
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks

    hook, group = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0), comfy.hooks.HookGroup()
    hook.weights = {}
    group.add(hook)
    for to_conds in (True, False):
        with torch.inference_mode():
            (hooked,) = SetClipHooks().apply_hooks(made.clip, False, to_conds, group)
        if to_conds:
            with pytest.raises(CarrierMismatch, match="WeightHook.*turn its apply_to_conds off"):
                look(Tiny(made.model, hooked, made.latent), ["grass"])
        else:
            assert look(Tiny(made.model, hooked, made.latent), ["grass"])


def test_joint_maps_are_those_of_q_and_k():
    """SD3: rows of the picture over all keys, text first, mean over heads."""
    import comfy.ldm.modules.diffusionmodules.mmdit as mmdit

    made, kept = tiny("sd3"), []
    stock = mmdit.optimized_attention

    def noted(q, k, v, *args, **kwargs):
        kept.append((q, k, kwargs["heads"]))
        return stock(q, k, v, *args, **kwargs)

    mmdit.optimized_attention = noted
    try:
        (found,) = look(made, ["grass"], text="grass")
    finally:
        mmdit.optimized_attention = stock
    assert len(kept) == len(found.maps) == 2
    for (q, k, heads), (layer, seen) in zip(kept, found.maps.items(), strict=True):
        q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
        p = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        torch.testing.assert_close(seen[:, 0], p[0, -layer.height * layer.width :, 1], rtol=1e-4, atol=1e-6)


def test_other_families_are_refused():
    made = tiny("flux")
    made.model.model.__class__ = type("Other", (type(made.model.model),), {})
    with pytest.raises(CarrierMismatch, match="context of Other is not known"):
        look(made, ["grass"])


@pytest.fixture(scope="module")
def scene(toy):
    """A picture of the toy world with the mask of its object and its caption."""
    import random

    from concepts.demo import world
    from concepts.host.pictures import batch

    drawn = world.named_scene(random.Random(0))
    picture, mask = world.render(drawn)
    return batch([picture]), batch([mask])[0], world.caption(drawn, random.Random(0), full=True), drawn


def test_the_toy_model_looks_at_the_object(toy, scene):
    """Pixels of the object look more at its word than the rest does."""
    from concepts.host.show import shown

    picture, mask, caption, drawn = scene
    with torch.inference_mode():
        image, found = shown(toy[0], toy[1], caption, [], f"{drawn.shape}, a", "0.3, 0.6", 0, picture, toy[2])
    assert image.ndim == 4 and image.shape[0] == 1 and 0 <= float(image.min()) and float(image.max()) <= 1
    assert found.shape == (1, *mask.shape) and float(found.min()) == 0 and float(found.max()) == 1
    assert float(found[0][mask > 0.5].mean()) > 1.3 * float(found[0][mask < 0.5].mean())


@pytest.mark.parametrize("side, pixels, scale", [(65, 8, 8), (17, 8, 2), (17, 15, 2), (85, 3, 4)])
def test_cells_that_reach_beyond_the_picture_keep_their_size(side, pixels, scale):
    """A hot cell lies where its latent pixels are, also where a latent stands for the picture."""
    from concepts.host.attention import Layer
    from concepts.host.overlays import grid, mask_of

    cells, size = -(-side // scale), side * pixels
    hot = torch.zeros(cells, cells)
    hot[-2, -3] = 1
    maps = {Layer("input.1", 0, scale, cells, cells): hot.reshape(-1, 1)}
    mask, cell = mask_of([maps], 0, size, size, pixels)[0], scale * pixels
    y, x = ((mask == mask.max()).nonzero().float().mean(0) + 0.5).tolist()
    assert (y, x) == pytest.approx(((cells - 1.5) * cell, (cells - 2.5) * cell), abs=1)
    page = grid(torch.zeros(size, size, 3), ["a"], [("t", maps)], pixels)[0, 32 : 32 + size, 15 : 15 + size]
    red = page[..., 0] - page[..., 2]
    assert int(red.argmax()) // size == pytest.approx((cells - 1.5) * cell, abs=cell / 2)


def test_cells_that_fill_the_picture_are_spread_over_it():
    from concepts.host.attention import Layer
    from concepts.host.overlays import mask_of

    seen = torch.rand(5 * 10, 1, generator=torch.Generator().manual_seed(0))
    spread = torch.nn.functional.interpolate(seen.reshape(1, 1, 5, 10), (60, 120), mode="bilinear")[0]
    spread = spread / spread.mean()
    expected = (spread - spread.min()) / (spread.max() - spread.min())
    assert torch.equal(mask_of([{Layer("input.1", 0, 4, 5, 10): seen}], 0, 60, 120, 3), expected)


def test_a_latent_will_do_and_a_picture_is_needed(toy, scene):
    from concepts.host.show import shown

    with torch.inference_mode():
        latent = {"samples": toy[2].encode(scene[0])}
        for vae in (None, toy[2]):
            image, _ = shown(toy[0], toy[1], "a mug", [], "mug", "0.5", 0, latent=latent, vae=vae)
            assert torch.isfinite(image).all()
        for changes, message in (
            ({}, "connect image and vae, or latent"),
            ({"image": scene[0]}, "needs the model's vae"),
            ({"image": scene[0], "vae": toy[2], "latent": latent}, "disconnect the other"),
            ({"words": " ,"}, "no word to show"),
            ({"levels": "half"}, "not 'half'"),
        ):
            given = {"words": "mug", "levels": "0.5", **changes}
            with pytest.raises(ValueError, match=message):
                shown(toy[0], toy[1], "a mug", [], seed=0, **given)


def test_a_map_without_numbers_still_gives_a_picture():
    """As a model gives it that learns at too high a rate; a preview must not hide what is wrong."""
    from concepts.host.overlays import overlay

    one = torch.rand(6, 5)
    for bad in (torch.full((6, 5), float("nan")), torch.where(one > 0.5, one, torch.inf)):
        shown = overlay(torch.rand(6, 5, 3), bad)
        assert shown.shape == (6, 5, 3) and bool(torch.isfinite(shown).all())
