"""NeTI on every UNet family: learned, continued, kept, and used in prompts as it was learned."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import write_concept
from concepts.carriers.foreign import read_any

from .test_learn import ordinary_entry, same
from .test_variants import UNETS, near, prompt, recorded, sample
from .tiny import tiny

pytestmark = pytest.mark.usefixtures("host")


def session(model, clip, data, earlier=None, **changes):
    from concepts.host.learn_neti import NetiSession, NetiSettings

    settings = replace(NetiSettings("mug", steps=2, init_text="mug", batch=2, learning_rate=8e-3), **changes)
    return NetiSession(model, clip, data, settings, earlier)


def learn(*args, **changes):
    from concepts.host import learn as learning

    with torch.inference_mode():
        return learning.learn(session(*args, **changes), preview_every=0, save_every=0, checkpointing="off")


def pictures(made):
    """Two latents of a family with captions."""
    from concepts.host.concept_set import ConceptSet

    captions = (("a photo of {}",), ("a (red:1.2) {} on sand",))
    return ConceptSet((made.latent, 0.5 * made.latent), (None, None), captions, (False, False))


@pytest.fixture(scope="module", params=UNETS)
def unet(request, host):
    return tiny(request.param)


@pytest.fixture(scope="module")
def mug(unet) -> Concept:
    return learn(unet.model, unet.clip, pictures(unet), steps=1).concept


def test_learn_save_load_sample(unet, mug, tmp_path):
    from concepts.host.variants import layers_of

    info, names = mug.info, layers_of(unet.model.model.diffusion_model)
    assert mug.kind == "mapper" and info["layers"] == names and info["anchors"] == 10
    fresh = learn(unet.model, unet.clip, pictures(unet), steps=1, learning_rate=1e-6).concept
    for key, value in mug.tensors.items():
        fixed = key.endswith("frequencies")
        assert torch.equal(value, fresh.tensors[key]) == fixed, f"{key} was {'' if fixed else 'not '}learned"
    write_concept(mug, tmp_path / "mug.safetensors")
    loaded = read_any(tmp_path / "mug.safetensors")
    drawn = sample(unet, prompt(unet, "a photo of <mug>", loaded))
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, sample(unet, prompt(unet, "a photo of mug")))
    assert torch.equal(drawn, sample(unet, prompt(unet, "a photo of <mug>", mug)))


def test_strength_0_is_the_plain_word_bit_for_bit(unet, mug):
    from concepts.host.prompt import encode_prompt

    with torch.inference_mode():
        off = encode_prompt(unet.clip, "a photo of <mug>", [(mug, 0.0)])
    assert torch.equal(sample(unet, off), sample(unet, prompt(unet, "a photo of mug")))


def test_the_bypass_is_for_v_at_the_concept_only(unet, mug):
    """What the sampler sees: K as encoded, V moved by a fifth of its length, and only there."""
    from concepts.host.text import encoders

    model, calls = recorded(unet)
    sample(unet, prompt(unet, "a (red:1.2) photo of <mug> on (<mug>:1.5) sand", mug), cfg=1.0, model=model, steps=2)
    widths = [e.width for e in sorted(encoders(unet.clip), key=lambda e: e.key == "clip_g")]
    for _, key, value, _, _ in calls:
        moved = (value - key).abs().amax(-1)[0] > 0
        assert moved.nonzero().flatten().tolist() == [5, 7], "start, a, red, photo, of, <mug>, on, <mug>"
        for position, weight in ((5, 1.0), (7, 1.5)):
            parts = zip(key[0, position].split(widths), value[0, position].split(widths), strict=True)
            for k, v in parts:
                torch.testing.assert_close((v - k).norm(), weight * 0.2 * k.norm(), rtol=1e-4, atol=0)
    vectors = {tuple(key[0, 5, :4].tolist()) for _, key, *_ in calls}
    assert len(vectors) == len({(block[:2], sigma) for block, _, _, sigma, _ in calls}), "one per layer and time"


def test_with_other_concepts(unet, mug):
    rows = {e.key: torch.randn(2, 1, 1, 2, e.width) for e in _encoders(unet)}
    hat = Concept("hat", "tokens", rows, {"init_text": "hat"})
    both = prompt(unet, "<hat> and <mug>", mug, hat)
    model, calls = recorded(unet)
    assert near(sample(unet, both, batch=2)[:1], sample(unet, both))
    assert torch.isfinite(sample(unet, both, cfg=1.0, model=model)).all()
    for _, key, value, _, _ in calls:
        assert ((value - key).abs().amax(-1)[0] > 0).nonzero().flatten().tolist() == [4]


def _encoders(made):
    from concepts.host.text import encoders

    return encoders(made.clip)


@pytest.mark.slow
def test_continued_equals_one_run(toy, mug_set, tmp_path):
    whole = learn(*toy[:2], mug_set, steps=5, accumulate=2)
    first = learn(*toy[:2], mug_set, steps=3, accumulate=2)
    write_concept(first.concept, tmp_path / "first.safetensors")
    rest = learn(*toy[:2], mug_set, read_any(tmp_path / "first.safetensors"), steps=2, accumulate=2)
    assert same(whole.concept.tensors, rest.concept.tensors) and same(whole.concept.state, rest.concept.state)
    assert whole.losses == rest.losses and whole.concept.info["norms"] == rest.concept.info["norms"]


def test_continuing_keeps_the_inputs_and_lengths_of_the_file(unet, mug):
    """Whatever seed and class word this run has: the network was learned with those."""
    from concepts.kernels.neti import FIXED

    rest = learn(unet.model, unet.clip, pictures(unet), mug, steps=1, seed=9, init="random").concept
    fixed = [k for k in mug.tensors if k.endswith(FIXED)]
    assert fixed and all(torch.equal(rest.tensors[k], mug.tensors[k]) for k in fixed)
    assert rest.info["norms"] == mug.info["norms"]


def test_what_is_learned_is_what_the_prompt_uses(toy, mug_set):
    """At the middle of a part of the noise schedule, where the prompt reads the mapper."""
    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training
    from concepts.host.neti import TIMES
    from concepts.host.prompt import encode_prompt

    made = learn(*toy[:2], mug_set, steps=4).concept
    with torch.inference_mode():
        (cond,) = encode_prompt(toy[1], mug_set.captions[0][0].replace("{}", "<mug>"), [(made, 1.0)])
    with training(toy[0], toy[1].patcher):
        own = session(*toy[:2], mug_set, made)
        own.begin()
        d = Denoiser(toy[0])
        (hook,) = cond[1]["hooks"].hooks
        for part in (1, TIMES - 2):
            sigma = d.sampling.sigmas[[int((part + 0.5) / TIMES * len(d.sampling.sigmas))]].cpu()
            x = torch.randn(own.clean[0].shape)
            with torch.no_grad():
                learned = d(x, sigma, *own.condition(own.parameters, [0], [0], sigma))
                used = d(
                    x,
                    sigma,
                    [ordinary_entry(cond)],
                    lambda options: {**options, "wrappers": hook.transformers_dict["wrappers"]},
                )
            torch.testing.assert_close(used, learned, rtol=1e-4, atol=1e-5)


def test_nested_dropout_is_for_learning_only(toy, mug_set):
    from concepts.host.gradients import training

    made = learn(*toy[:2], mug_set, steps=2).concept
    with training(toy[0], toy[1].patcher), torch.no_grad():
        own = session(*toy[:2], mug_set, made)
        own.begin()
        assert own.fixed_loss(2) == own.fixed_loss(2)
        when = torch.tensor([0.4])

        def draw():
            return torch.Generator().manual_seed(0)

        (dropped,) = own.losses(own.parameters, [0], [0], when, draw()).values()
        assert dropped == own.losses(own.parameters, [0], [0], when, draw())["diffusion"]
        seen = [own.losses(own.parameters, [0], [0], when, torch.Generator().manual_seed(k)) for k in range(2)]
        assert seen[0] != seen[1]


@pytest.mark.slow
def test_learning_lowers_the_loss(toy, mug_set):
    done = learn(*toy[:2], mug_set, steps=20, batch=4)
    assert done.after < done.before


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_attention_is_refused(mug_set, family):
    made = tiny(family)
    with pytest.raises(CarrierMismatch, match="set mapper to none"):
        session(made.model, made.clip, mug_set)


def test_wrong_settings_and_other_concepts_are_refused(toy, mug_set):
    with pytest.raises(ValueError, match="class word"):
        learn(*toy[:2], mug_set, init_text="")
    assert learn(*toy[:2], mug_set, init_text="", init="random", steps=1).concept.info["norms"]["clip_l"] > 0
    rows = Concept("mug", "tokens", {"clip_l": torch.ones(1, 1, 1, 1, 64)})
    with pytest.raises(CarrierMismatch, match="would learn"):
        learn(*toy[:2], mug_set, rows)


@pytest.mark.parametrize(
    "changes", [{"vectors": 2}, {"geometry": "fixed norm"}, {"layers": "each"}, {"stages": 3}], ids=str
)
def test_settings_of_rows_are_refused(changes):
    from concepts.host.learn_neti import check_alone

    usual = {"vectors": 1, "geometry": "free", "layers": "shared", "stages": 1}
    check_alone(**usual)
    with pytest.raises(ValueError, match="cannot be combined with " + " ".join(map(str, *changes.items()))):
        check_alone(**{**usual, **changes})


def test_reports(toy, mug_set):
    from concepts.host.report import inspect_text, learned_text

    done = learn(*toy[:2], mug_set, steps=1)
    assert f"width; norm {done.concept.info['norms']['clip_l']:.3f}" in learned_text(done)
    text, marks = inspect_text(done.concept, toy[1], 2)
    assert "clip_l: a network of" in text and "nothing learned" not in text
    assert len(marks) == 2 * len(done.concept.info["layers"])
