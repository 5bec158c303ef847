"""One step for one prompt: features, pairs, losses and gradient as a plain reading of the paper has them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from concepts.carriers.concept import Concept
from concepts.carriers.delta import ALPHA, BUNDLE, UP
from concepts.carriers.errors import CarrierMismatch

from .test_features import hooks, states
from .test_lora import random_delta
from .test_variants import concept
from .tiny import KINDS, stock, tiny

pytestmark = pytest.mark.usefixtures("host")
TEXTS = ("a photo of <mug>", "a <mug> on grass, far away")


@pytest.fixture(scope="module", params=KINDS)
def made(request, host):
    return tiny(request.param)


@pytest.fixture
def few(monkeypatch, host):
    """Random weights may look at two cells only."""
    from concepts.host import query_points as module

    monkeypatch.setattr(module, "FEWEST", 1)


def settings(**changes):
    from concepts.host.refine import RefineSettings

    return RefineSettings("mug", learning_rate=1e-2, ensemble=2, **changes)


def pictures(made, references=1, mask=None, texts=TEXTS):
    from concepts.host.concept_set import ConceptSet

    with torch.inference_mode(False):
        g = torch.Generator().manual_seed(4)
        channels, *sides = made.latent.shape
        latents = [torch.randn(channels, *(2 * side for side in sides), generator=g) for _ in range(references + 1)]
    captions = ((texts[0],),) * references + ((texts[1],),)
    return ConceptSet(tuple(latents), (mask,) * references + (None,), captions, (False,) * (references + 1))


def session(made, what=None, data=None, features=None, **changes):
    from concepts.host.refine import RefineSession

    what = concept(made) if what is None else what
    return RefineSession(made.model, made.clip, data or pictures(made), settings(**changes), what, features)


def refine(made, *args, checkpointing="off", **changes):
    from concepts.host.refine import refine

    with torch.inference_mode():
        return refine(session(made, *args, **changes), checkpointing)


def extracted(made, latent, text, what, words):
    """Queries, keys and the word's map out of the node's own pass."""
    from concepts.host.feature_places import preset
    from concepts.host.features import extract

    with torch.inference_mode():
        return extract(made.model, made.clip, latent[None], preset(made.model, "PDM", words), text, [what])


def test_a_batch_is_no_picture(made):
    from concepts.host.query import refined

    one, batch = ({"samples": torch.zeros(count, *made.latent.shape)} for count in (1, 2))
    for latent, given in ((batch, {}), (one, {"generated": batch})):
        with pytest.raises(ValueError, match="a batch of 2"):
            refined(made.model, made.clip, None, concept(made), TEXTS[1], None, latent, settings(), {}, **given)


@pytest.mark.parametrize("kind", ["tokens", "delta"])
@pytest.mark.parametrize("negative", [None, "sand"], ids=str)
def test_the_picture_is_the_samplers(host, kind, negative):
    """Bit for bit what stock nodes make of the same inputs, those of a latent besides its samples too."""
    import nodes

    from concepts.host import lora
    from concepts.host.prompt import encode_prompt
    from concepts.host.query import sampled

    made = tiny("sd15")
    what = concept(made) if kind == "tokens" else random_delta(made.model)
    g = torch.Generator().manual_seed(2)
    mask = torch.zeros(1, 64, 64)
    mask[:, :32] = 1
    latent = {"samples": torch.randn(1, *made.latent.shape, generator=g), "noise_mask": mask, "batch_index": [3]}
    with torch.inference_mode():
        positive = encode_prompt(made.clip, TEXTS[1], [(what, 1.0)])
        against = stock(made.clip, negative or "")
        model = lora.apply(made.model, what, 1.0) if kind == "delta" else made.model
        how = (5, 2, 4.0, "euler", "normal")
        (expected,) = nodes.common_ksampler(model, *how, positive, against, latent, denoise=0.7)
        how = dict(zip(("seed", "steps", "cfg", "sampler", "scheduler"), how, strict=True), denoise=0.7)
        given = None if negative is None else against
        found = sampled(made.model, made.clip, what, TEXTS[1], given, latent, **how)
    assert torch.equal(found, expected["samples"])


def test_features_are_those_of_extract(made):
    from concepts.host.gradients import training

    one = session(made)
    with torch.inference_mode(), training(made.model, made.clip.patcher):
        one.begin()
        for value in one.parameters.values():
            value.requires_grad_(True)
        seen = one.passed(one.parameters, one.shown(0) + one.shown(1))
        assert all(part.requires_grad for pair in seen for part in pair)
    for (looks, maps), latent, text in zip(seen, one.data.latents, TEXTS, strict=True):
        found = extracted(made, latent, text, one.given, ["<mug>"])
        assert torch.allclose(looks.detach(), torch.cat([found.map("query")[0], found.map("key")[0]]), atol=1e-4)
        mean = F.interpolate(found.map("attention <mug>"), looks.shape[-2:], mode="bilinear")[0, 0]
        assert torch.allclose(maps.detach().mean(0), mean, atol=2e-3)


@pytest.mark.parametrize("far", ["far away", "far away, " + "very " * 260 + "far"], ids=["short", "long"])
def test_rows_of_a_pass_are_as_each_alone(made, far):
    """Features of two prompts and the diffusion loss, also where one prompt is longer; each size has a pass."""
    from concepts.host.gradients import training

    data = pictures(made, references=2, texts=(TEXTS[0], f"a <mug> on grass, {far}"))
    wide = torch.cat([data.latents[1], data.latents[1]], -1)
    one = session(made, data=replace(data, latents=(data.latents[0], data.latents[0] + 1, wide)))
    with torch.inference_mode(), training(made.model, made.clip.patcher), torch.no_grad():
        one.begin()
        read, wide = one.shown(0), one.shown(1)
        read += [row._replace(text=1) for row in read]
        noised = one.noised(torch.Generator().manual_seed(0))
        for together in (read + wide + noised, read + noised):
            alone = [one.passed(one.parameters, [row])[0] for row in together]
            for found, expected in zip(one.passed(one.parameters, together), alone, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_losses_and_pairs_are_the_papers(made, few):
    """The picture's nearest cell of every cell of the reference's object, and norms of differences there."""
    from concepts.host.gradients import training

    one = session(made)
    with torch.inference_mode():
        one.find()
        with training(made.model, made.clip.patcher):
            one.begin()
            with torch.no_grad():
                found = one.losses(one.parameters, [0], [0], None, torch.Generator().manual_seed(0))
                (looks, maps), (other, others) = one.passed(one.parameters, one.shown(0) + one.shown(1))
    dift = [F.interpolate(d[None], looks.shape[-2:], mode="bilinear")[0].flatten(1).double() for d in one.dift]
    cosine = F.normalize(dift[0], dim=0).T @ F.normalize(dift[1], dim=0)
    inside = [m.mean(0).flatten() > m.mean(0).max() / 2 for m in (maps, others)]
    expected = {(a, int(cosine[a].argmax())) for a in inside[0].nonzero()[:, 0].tolist()}
    expected = {(a, b) for a, b in expected if inside[1][b]}
    (pairs,) = one.pairs
    assert set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == expected and expected
    for name, first, second in (("self attention", looks, other), ("cross attention", maps, others)):
        lengths = [(first.flatten(1)[:, a] - second.flatten(1)[:, b]).norm() for a, b in expected]
        assert float(found[name]) == pytest.approx(float(torch.stack(lengths).mean()), rel=1e-4)
    assert set(found) == {"self attention", "cross attention", "diffusion"}


def test_the_step_goes_down_by_the_rate(made, few):
    """A fresh Adam moves every number that has a gradient by the rate; the model and the concept stay."""
    before, what = states(made), concept(made)
    kept = {k: v.clone() for k, v in what.tensors.items()}
    done = refine(made, what)
    assert not done.reason and set(done.before) == set(done.after) and len(done.pairs[0].first)
    moved = {k: (done.concept.tensors[k] - v).abs() for k, v in kept.items()}
    assert any(float(m.max()) == pytest.approx(1e-2, rel=1e-3) for m in moved.values())
    assert all(float(m.max()) < 1.01e-2 for m in moved.values())
    assert all(torch.equal(what.tensors[k], v) for k, v in kept.items())
    assert all(torch.equal(v, before[k]) for k, v in states(made).items()) and hooks(made) == 0
    assert done.concept.name == "mug" and not done.concept.state
    assert done.concept.info["refined"]["prompt"] == TEXTS[1]


@pytest.mark.parametrize("parts", [{"cross_attention": 0, "diffusion": 0}, {"self_attention": 0, "diffusion": 0}, {}])
def test_gradients_are_those_of_differences(host, parts):
    """Central differences of the loss along the gradient, in every part; with recomputed blocks the same."""
    from concepts.host.gradients import training

    made, slopes = tiny("sd15"), []
    for checkpointing in (False, True):
        one = session(made, **parts)
        with torch.inference_mode():
            one.find()
            with training(made.model, made.clip.patcher, checkpointing=checkpointing):
                one.begin()
                rows = {k: v.requires_grad_(True) for k, v in one.parameters.items()}
                one.step_loss(rows, 0, 0).backward()
                slope = {k: v.grad.clone() for k, v in rows.items()}
                slopes.append(slope["clip_l"])
                if checkpointing:
                    continue
                length = slope["clip_l"].norm()
                step = 2e-3 * slope["clip_l"] / length
                with torch.no_grad():
                    high, low = (float(one.step_loss({"clip_l": rows["clip_l"] + s * step}, 0, 0)) for s in (1, -1))
                assert (high - low) / 4e-3 == pytest.approx(float(length), rel=0.03)
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-7)


def test_recomputed_blocks_give_the_same_gradient(made, few):
    """Where text and picture attend together too: the maps come out of blocks that are computed once more."""
    from concepts.host.gradients import training

    found = []
    for checkpointing in (False, True):
        one = session(made)
        with torch.inference_mode():
            one.find()
            with training(made.model, made.clip.patcher, checkpointing=checkpointing):
                one.begin()
                rows = {k: v.requires_grad_(True) for k, v in one.parameters.items()}
                loss = one.step_loss(rows, 0, 0)
                loss.backward()
                found.append((float(loss.detach()), torch.cat([v.grad.flatten() for v in rows.values()])))
    (plain, slope), (again, recomputed) = found
    assert again == pytest.approx(plain, rel=1e-6) and slope.norm() > 0
    assert torch.allclose(recomputed, slope, rtol=1e-3, atol=1e-4 * float(slope.abs().max()))


def test_checkpointing_refines_to_the_same(made, few):
    plain, recomputed = refine(made), refine(made, checkpointing="on")
    for key, value in plain.concept.tensors.items():
        # a first step of Adam is the sign of the gradient, which is chance where that is nearly zero
        assert float((value - recomputed.concept.tensors[key]).abs().gt(1e-4).float().mean()) < 0.05


def dift(made, data, text="a photo of a thing", seed=0, **by_hand):
    """Of the references, as Extract Features reads it."""
    from concepts.host.feature_places import preset
    from concepts.host.features import extract

    with torch.inference_mode():
        wants = preset(made.model, "DIFT", [], **by_hand)
        return extract(made.model, made.clip, torch.stack(data.latents[:-1]), wants, text, seed=seed)


def test_features_of_the_references_can_be_given(made, few, monkeypatch):
    """The same concept as without, and only the picture is read; settings of a node of its own hold for both."""
    from concepts.host import query_points as module

    data, what, read, extract = pictures(made, references=2), concept(made), [], module.extract

    def counted(model, clip, latents, *rest, **more):
        read.append(len(latents))
        return extract(model, clip, latents, *rest, **more)

    monkeypatch.setattr(module, "extract", counted)
    plain = refine(made, what, data)
    kept = refine(made, what, data, features=dift(made, data, "a photo of a mug", ensemble=2))
    assert read == [3, 1]
    for key, value in plain.concept.tensors.items():
        torch.testing.assert_close(kept.concept.tensors[key], value, atol=1e-4, rtol=0)
    other = session(made, what, data, features=dift(made, data, seed=3, ensemble=1, timestep=100.0))
    with torch.inference_mode(), monkeypatch.context() as patched:
        patched.delattr("concepts.host.features.prompted")  # their prompt is not encoded again
        other.find()
    picture = dift(made, replace(data, latents=data.latents[1:] * 2), seed=3, ensemble=1, timestep=100.0).map("dift")[1]
    torch.testing.assert_close(other.dift[-1], picture, atol=1e-4, rtol=1e-4)


def test_features_of_other_pictures_are_refused(host):
    from concepts.host.query_points import read_before

    made, size = tiny("sd15"), (64, 64)
    given = dift(made, pictures(made))
    assert read_before(made.model, given, 1, size).timestep == 261
    for count, other in ((2, size), (1, (64, 128))):
        with pytest.raises(ValueError, match="extract them from the same pictures"):
            read_before(made.model, given, count, other)
    with pytest.raises(ValueError, match="of other pictures than image \\(number 1, 2\\)"):
        two, swapped = pictures(made, references=2), [1, 0, 2]
        data = replace(two, latents=tuple(two.latents[i] for i in swapped))
        session(made, data=data, features=dift(made, two)).find()
    with pytest.raises(CarrierMismatch, match="were read by model"):
        read_before(tiny("sdxl").model, given, 1, size)
    named = replace(given, info={**given.info, "prompt": "a <mug>"})
    with pytest.raises(ValueError, match="under plain words"):
        read_before(made.model, named, 1, size)


def drawn(scale=1):
    """One thing in four places: IMAGE."""
    from concepts.demo import world

    made = [world.pixels(world.render(s)[0]) for s in world.references("crown", 4, 0)]
    images = torch.tensor(np.stack(made)).movedim(-1, 1) / 255
    sized = torch.nn.functional.interpolate(images, scale_factor=scale, mode="bicubic", antialias=True)
    return sized.clamp(0, 1).movedim(1, -1)


def test_pictures_are_told_apart_at_any_size(toy):
    """One thing in several places against itself at half and at twice the size."""
    from concepts.host.feature_places import preset
    from concepts.host.features import extract
    from concepts.host.query_points import same_pictures

    with torch.inference_mode():
        own = toy[2].encode(drawn())
        features = extract(*toy[:2], own, preset(toy[0], "DIFT", [], ensemble=1), "a photo")
        for scale in (0.5, 1, 2):
            same_pictures(features, toy[2].encode(drawn(scale)))
        with pytest.raises(ValueError, match="number 1, 2, 3, 4"):
            same_pictures(features, own.roll(1, 0))


def test_wrong_references_are_told_before_sampling(toy, monkeypatch):
    from concepts.host import query
    from concepts.host.feature_places import preset
    from concepts.host.features import extract
    from concepts.host.text import encoders

    def sampled(*given, **more):
        raise AssertionError("sampled first")

    monkeypatch.setattr(query, "sampled", sampled)
    model, clip, vae = toy
    (encoder,) = encoders(clip)
    rows = encoder.rows("mug")[:1][None, None, None]
    what = Concept("mug", "tokens", {encoder.key: rows}, {"init_text": "mug"})
    images, latent = drawn(), {"samples": torch.zeros(1, 4, 16, 16)}
    given = (model, clip, vae, what, TEXTS[1], images, latent, settings(), {})
    with torch.inference_mode():
        features = extract(model, clip, vae.encode(images.roll(1, 0)), preset(model, "DIFT", []), "a photo")
        with pytest.raises(ValueError, match="other pictures"):
            query.refined(*given, features=features)
        with pytest.raises(ValueError, match="not refined. A reference's mask is empty"):
            query.refined(*given, mask=torch.zeros(4, 128, 128), strict=True)
        with pytest.raises(ValueError, match="'a photo of a mug' must name <mug>"):
            query.refined(*given, reference_text="a photo of a mug")
        nothing = settings(self_attention=0.0, cross_attention=0.0, diffusion=0.0)
        with pytest.raises(ValueError, match="All weights are 0"):
            query.refined(*given[:7], nothing, {})


def test_features_of_the_references_fit_once_a_lora_was_sampled(toy, few):
    from concepts.host.feature_places import preset
    from concepts.host.features import extract
    from concepts.host.query import refined

    model, clip, vae = toy
    what, images, latent = random_delta(model), drawn()[:1], {"samples": torch.zeros(1, 12, 16, 16)}
    sampling = {"seed": 0, "steps": 1, "cfg": 1.0, "sampler": "euler", "scheduler": "simple", "denoise": 1.0}
    with torch.inference_mode():
        features = extract(model, clip, vae.encode(images), preset(model, "DIFT", [], ensemble=1), "a photo")
        given = (model, clip, vae, what, TEXTS[1], images, latent, settings(self_attention=0.0), sampling)
        done, *_ = refined(*given, features=features, strict=True)
    assert done.info["refined"]["prompt"] == TEXTS[1]


def test_rows_per_stage_layer_and_role(host):
    made = tiny("sd15")
    what = concept(made, stages=2, layers=2, roles=2)
    done = refine(made, what, diffusion=0.0)
    moved = (done.concept.tensors["clip_l"] - what.tensors["clip_l"]).abs().amax((-1, -2))
    assert not bool(moved[0].any())  # features are read where noise is highest
    assert bool((moved[1, :-1] > 0).all())
    assert moved[1, -1, 0] > 0 and moved[1, -1, 1] == 0  # the last map is followed by nothing that is compared


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_lora_and_the_rows_in_it(host, family):
    made = tiny(family)
    rows = concept(made)
    what = random_delta(made.model)
    tensors = {k: v / 2 if k.endswith(ALPHA) else v for k, v in what.tensors.items()}  # a scale of its own
    tensors |= {f"{BUNDLE}mug.{k}": v for k, v in rows.tensors.items()}
    what = Concept("mug", "delta", tensors, {"init_text": "mug"})
    done = refine(made, what)
    assert not done.reason
    moved = {k for k, v in done.concept.tensors.items() if not torch.equal(v, tensors[k])}
    assert any(k.startswith(BUNDLE) for k in moved) and any(k.endswith(UP) for k in moved)
    assert not any(k.endswith(ALPHA) for k in moved)
    assert hooks(made) == 0


def test_a_lora_is_seen_as_the_host_applies_it(host):
    from concepts.host import lora
    from concepts.host.gradients import training

    made = tiny("sd15")
    what = random_delta(made.model)
    what = replace(what, info={"token_text": "sks mug"}, tensors={**what.tensors})
    what = replace(what, tensors={k: v / 2 if k.endswith(ALPHA) else v for k, v in what.tensors.items()})
    one = session(made, what)
    with torch.inference_mode(), training(made.model, made.clip.patcher), one.attached():
        one.begin()
        with torch.no_grad():
            beside = one.passed(one.parameters, one.shown(1))[0][0]
    patched = replace(made, model=lora.apply(made.model, what, 1.0))
    found = extracted(patched, one.data.latents[1], "a sks mug on grass, far away", concept(made), ["sks mug"])
    assert torch.allclose(beside, torch.cat([found.map("query")[0], found.map("key")[0]]), atol=1e-4)


def test_what_cannot_be_compared_comes_back_as_it_is(host):
    made = tiny("sd15")
    what = concept(made)
    done = refine(made, what, minimum=1.0)
    assert done.concept is what and "Only 0 points" in done.reason and "minimum_score" in done.reason
    empty = torch.zeros(1, *(2 * side for side in made.latent.shape[-2:]))
    done = refine(made, what, pictures(made, mask=empty))
    assert done.concept is what and "covers no cell" in done.reason


@pytest.mark.parametrize("strict", [False, True])
def test_too_few_points_hand_back_the_concept_or_end_the_run(toy, strict):
    from concepts.host.query import refined

    what, images = random_delta(toy[0]), drawn()[:1]
    given = (*toy, what, TEXTS[1], images, {"samples": torch.zeros(1, 12, 16, 16)}, settings(minimum=1.0), {})
    with torch.inference_mode():
        made = {"samples": toy[2].encode(drawn()[1:2])}
        if strict:
            with pytest.raises(ValueError, match="Concept <mug> was not refined. Only 0 points"):
                refined(*given, generated=made, strict=True)
            return
        done, matches, before, report = refined(*given, generated=made)
        assert torch.equal(before, toy[2].decode(made["samples"]))
    assert done is what and report.startswith("<mug> is as it was. Only 0 points") and torch.equal(matches, before)


def test_a_mask_restricts_the_reference(host):
    made = tiny("sd15")
    sides = [2 * side for side in made.latent.shape[-2:]]
    mask = torch.zeros(1, *sides)
    mask[:, 2:6, 1:5] = 1
    what = replace(concept(made), state={"step": torch.ones(1)})
    done = refine(made, what, pictures(made, references=2, mask=mask))
    assert not done.concept.state, "what is for one prompt cannot be continued"
    rows, columns = done.grids[0]
    side = sides[1] // columns
    assert len(done.pairs) == 2
    for pairs in done.pairs:
        y, x = pairs.first // columns * side, pairs.first % columns * side
        assert bool(((y >= 2) & (y < 6) & (x >= 1) & (x < 5)).all())


@pytest.mark.slow
def test_options_change_what_they_say(host):
    made = tiny("sd15")
    base = refine(made)
    for changes in (
        {"both_branches": False},
        {"timestep": 400.0},
        {"noise": True},
        {"distance": "square"},
        {"loss_text": "picture"},
    ):
        other = refine(made, **changes)
        assert not other.reason and not torch.equal(other.concept.tensors["clip_l"], base.concept.tensors["clip_l"])
    assert refine(made, seed=3).before["diffusion"] != base.before["diffusion"]
    assert torch.equal(refine(made).concept.tensors["clip_l"], base.concept.tensors["clip_l"])
    assert set(refine(made, self_attention=0.0, cross_attention=0.0).before) == {"diffusion"}


def test_an_interrupt_leaves_model_and_concept(host, monkeypatch):
    from comfy.model_management import InterruptProcessingException

    from concepts.host import refine as module

    made, before = tiny("sd15"), None
    what, before = concept(made), states(made)

    def pressed(self, done, latent=None):
        if done >= 2:
            raise InterruptProcessingException

    monkeypatch.setattr(module.Progress, "show", pressed)
    with pytest.raises(InterruptProcessingException):
        refine(made, what)
    assert all(torch.equal(v, before[k]) for k, v in states(made).items()) and hooks(made) == 0


def test_numbers_that_are_not_finite_are_named(host, monkeypatch):
    from concepts.host import refine as module
    from concepts.kernels.fit import Diverged

    made = tiny("sd15")
    monkeypatch.setattr(module, "pair_distance", lambda *_: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(Diverged, match="is as it was; lower the learning rate"):
        refine(made)


def test_what_does_not_fit_is_refused(host):
    made = tiny("sd15")
    with pytest.raises(ValueError, match="must name <mug> and no other"):
        session(made, data=pictures(made, texts=("a photo of <mug>", "a <mug> and a <cup>")))
    with pytest.raises(ValueError, match="Unknown choice 'far'; known: length, square"):
        session(made, distance="far")
    with pytest.raises(ValueError, match="All weights are 0"):
        refine(made, self_attention=0.0, cross_attention=0.0, diffusion=0.0)
    with pytest.raises(CarrierMismatch, match="has no such layer"):
        session(made, random_delta(tiny("flux").model))
    mapper = replace(concept(made))
    object.__setattr__(mapper, "kind", "mapper")
    with pytest.raises(CarrierMismatch, match="made of mapper"):
        session(made, mapper)
