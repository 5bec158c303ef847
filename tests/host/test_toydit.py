"""The toy transformer is a Flux to the host and to the pack: stock sampling, prompts, attention, modulation."""

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


def test_the_packed_one_loads_and_draws_by_its_words(host):
    """What the node gives: two colours of a word make different pictures, and decode to pictures."""
    from concepts.host import toydit

    from .test_variants import prompt, sample

    with torch.inference_mode():
        model, clip, vae = toydit.load()
    made = Tiny(model, clip, torch.zeros(toydit.LATENT_CHANNELS, 16, 16))
    red, again, blue = (
        sample(made, prompt(made, f"a photo of a {c} plain mug, sand background"), prompt(made, ""), cfg=3.0, steps=8)
        for c in ("red", "red", "blue")
    )
    with torch.inference_mode():
        pictures = [vae.decode(x)[0].mean((0, 1)) for x in (red, blue)]
    assert torch.equal(red, again)
    assert float(pictures[0][0] - pictures[1][0]) > 0.02 and float(pictures[1][2] - pictures[0][2]) > 0.02


def test_missing_weights_say_how_to_get_them(host, tmp_path):
    from concepts.host import toydit

    with pytest.raises(FileNotFoundError, match="Reinstall the pack"):
        toydit.load(tmp_path / "none.safetensors")
