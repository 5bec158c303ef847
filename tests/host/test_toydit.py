"""The toy transformer is a Flux to the host and to the pack: stock sampling, prompts, attention, modulation."""

import random

import pytest
import torch

from .tiny import Tiny, fill

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def made(host) -> Tiny:
    from concepts.host import toydit

    with torch.inference_mode():
        model, clip = toydit.build_model(), toydit.build_clip()
        fill(model.model.diffusion_model)
        fill(clip.cond_stage_model, 5)
        return Tiny(model, clip, torch.zeros(toydit.LATENT_CHANNELS, 16, 16))


def test_it_is_small_enough_and_samples_with_stock_nodes(made):
    from .test_variants import prompt, sample

    assert sum(p.numel() for p in made.model.model.diffusion_model.parameters()) <= 8_000_000
    positive = prompt(made, "a red mug on the left and a blue star on the right")
    assert positive[0][0].shape[1] == 40
    found = sample(made, positive, steps=2)
    assert found.shape == (1, *made.latent.shape) and bool(found.isfinite().all())
    assert not torch.equal(found, sample(made, prompt(made, "a fish"), steps=2))


def test_the_hosts_flux_nodes_take_it(host):
    """A shifted schedule is sampled, and the preview is a picture of the toy VAE's colours."""
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    from concepts.host.progress import Progress
    from concepts.nodes.toy import LoadToyWorld

    from .test_variants import prompt, sample

    with torch.inference_mode():
        model, clip, _ = LoadToyWorld.execute("Flux").result
        (shifted,) = ModelSamplingFlux().patch(model, 1.15, 0.5, 1024, 1024)
    packed = Tiny(model, clip, torch.zeros(12, 16, 16))
    plain, moved = (sample(packed, prompt(packed, "a fish"), steps=3, model=m) for m in (model, shifted))
    assert bool(moved.isfinite().all()) and not torch.equal(plain, moved)
    _, picture, _ = Progress(1, model).previewer.decode_latent_to_preview_image("JPEG", moved)
    assert min(picture.size) >= 16 and max(high - low for low, high in picture.getextrema()) > 30


def test_words_have_maps_and_places(made):
    from concepts.host.modulation import chosen_blocks
    from concepts.host.show import look

    with torch.inference_mode():
        (seen,) = look(made.model, made.clip, made.latent, "a red mug and a star", [], ["mug"], [0.5], 0)
    assert len(seen.maps) == 8 and all(m.shape == (64, 1) for m in seen.maps.values())
    assert len(chosen_blocks(made.model.model.diffusion_model, "all")) == 8


def test_training_pictures_hold_one_or_two_objects():
    from concepts.demo import train_dit

    scenes = train_dit.scenes_of(200, 0)
    assert 0.4 < sum(len(s) == 2 for s in scenes) / 200 < 0.6
    weights = train_dit.weights_around_objects([s for s in scenes if len(s) == 2][:8])
    assert weights.shape == (8, 1, 16, 16) and torch.allclose(weights.mean((2, 3)), torch.ones(8, 1))
    left, right = weights[..., :8].amax((1, 2, 3)), weights[..., 8:].amax((1, 2, 3))
    assert torch.equal(left, right)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_second_picture_of_a_round_has_one_object_mostly_of_its_textures(number):
    from concepts.demo import train_dit, world

    scenes = train_dit.patterned_scenes(200, number)
    half = [one for (one,) in scenes[::2]]
    assert sum(s.pattern in train_dit.TEXTURES[min(number, 1)] for s in half) > 70
    named = [s for both in scenes for s in both if s.shape in world.SHAPES]
    assert not any(world.held_out(s.shape, s.colour, s.pattern) for s in named)
    assert scenes != train_dit.patterned_scenes(200, (number + 1) % 3)


def test_missing_weights_say_how_to_get_them(host, tmp_path):
    from concepts.host import toydit

    with pytest.raises(FileNotFoundError, match="Reinstall the pack"):
        toydit.load(tmp_path / "none.safetensors")


@pytest.mark.slow
def test_the_packed_one_draws_what_words_say(toy):
    """12 prompts through the node, sampled as its help page says."""
    import nodes

    from concepts.demo import judge, measure, world
    from concepts.nodes.toy import LoadToyWorld

    rng, seen, said = random.Random("words"), [], []
    with torch.inference_mode():
        model, clip, vae = LoadToyWorld.execute("Flux").result
        (negative,) = nodes.CLIPTextEncode().encode(clip, "")
        (latent,) = nodes.EmptyLatentImage().generate(world.SIZE, world.SIZE, 1)
        for seed in range(12):
            scene = world.named_scene(rng, None)
            (positive,) = nodes.CLIPTextEncode().encode(clip, world.caption(scene, rng, full=True))
            (made,) = nodes.common_ksampler(model, seed, 20, 3.0, "euler", "simple", positive, negative, latent)
            seen += nodes.VAEDecode().decode(vae, made)
            said.append({name: getattr(scene, name) for name in ("colour", "shape", "background")})
    right = measure.accuracy(judge.load(), torch.cat(seen), said)
    assert min(right.values()) >= 0.8, right


def test_captions_longer_than_the_padding_share_a_batch(made):
    """T5 pads to a least length alone; the isolation loss's captions exceed it here, each by its own number."""
    from concepts.host.captions import Prompts
    from concepts.host.concept_set import ConceptSet
    from concepts.host.learn import learn
    from concepts.host.learn_modulation import ModulationSession, ModulationSettings

    long = "a red mug " * 15
    texts = Prompts(made.clip, ["a red mug", long, long + "and a star"], "", {})
    assert {len(t["t5xxl"][0]) for t in texts.tokens} == {len(made.clip.tokenize(long + "and a star")["t5xxl"][0])}
    assert texts.tokens[0]["t5xxl"][0][:40] == [t[:2] for t in made.clip.tokenize("a red mug")["t5xxl"][0]]
    g = torch.Generator().manual_seed(0)
    latents = tuple(torch.randn(*made.latent.shape, generator=g) for _ in range(4))
    data, others = (ConceptSet(v, (None,) * 2, (("x",),) * 2, (False,) * 2) for v in (latents[:2], latents[2:]))
    given = {"isolation": 1.0, "isolation_prompts": "a boat on water\na tall green tree on sand, grass background"}
    settings = ModulationSettings("p", steps=3, batch=2, captions="a [mug] beside a [star]\na [star], a [mug]", **given)
    with torch.inference_mode():
        done = learn(
            ModulationSession(made.model, made.clip, data, settings, others=others), preview_every=0, save_every=0
        )
    assert len(done.losses) == 3 and any(done.terms["isolation"])
