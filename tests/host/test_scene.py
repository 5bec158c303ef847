"""Words of one picture's things: start, draws, both losses written out, continuing, and what can be done with them."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.errors import CarrierError, CarrierMismatch
from concepts.carriers.files import parse, read_bytes, write_concept
from concepts.carriers.foreign import read_any
from concepts.carriers.scene import things
from concepts.kernels.draws import generator, subset

from .test_learn import same, sampled, weights
from .tiny import KINDS, tiny

pytestmark = pytest.mark.usefixtures("host")


def settings(**changes):
    from concepts.host.learn_scene import SceneSettings

    return replace(
        SceneSettings("scene", steps=3, learning_rate=0.01, things=("mug", "sand"), attention_layers="half"), **changes
    )


def session(toy, data, masks, earlier=None, **changes):
    from concepts.host.learn_scene import SceneSession

    return SceneSession(toy[0], toy[1], data, masks, settings(**changes), earlier)


def learn(toy, data, masks, earlier=None, checkpointing="off", **changes):
    from concepts.host import learn as learning

    with torch.inference_mode():
        made = session(toy, data, masks, earlier, **changes)
        return learning.learn(made, preview_every=0, save_every=0, checkpointing=checkpointing)


def begun(toy, data, masks, **changes):
    """A session as it stands before the first step."""
    from concepts.host.gradients import training

    made = session(toy, data, masks, **changes)
    with training(toy[0], toy[1].patcher):
        made.begin()
    return made


@pytest.fixture
def one(mug_set):
    """A picture, and the masks of its object and its ground."""
    data = replace(mug_set, **{k: getattr(mug_set, k)[:1] for k in ("latents", "masks", "captions", "mirrored")})
    mask = mug_set.masks[0].repeat_interleave(8, 1).repeat_interleave(8, 2)
    return data, torch.cat([mask, 1 - mask])


def halves(*shape) -> torch.Tensor:
    """Masks of the left and the right half."""
    left = torch.zeros(shape)
    left[:, : shape[1] // 2] = 1
    return torch.stack([left, 1 - left])


def of(latent: torch.Tensor, mirrored: bool = False):
    """A set of one picture, and of its mirrored copy."""
    from concepts.host.concept_set import ConceptSet

    latents = (latent.clone(), latent.flip(-1).clone())[: 1 + mirrored]
    count = len(latents)
    return ConceptSet(latents, (None,) * count, (("a {}",),) * count, (False, True)[:count])


@pytest.mark.parametrize("vectors", [1, 3])
def test_things_start_at_their_class_words(toy, one, vectors):
    from concepts.host.text import encoders

    rows = begun(toy, *one, vectors=vectors).parameters["clip_l"]
    assert rows.shape == (1, 1, 1, 2 * vectors, 64)
    for own, word in zip(rows[0, 0, 0].split(vectors), ("mug", "sand"), strict=True):
        wanted = encoders(toy[1])[0].rows(word).mean(0).expand_as(own)
        assert torch.equal(own, wanted) if vectors == 1 else float((own - wanted).norm() / wanted.norm()) < 0.02


def test_one_thing_that_is_the_whole_picture_is_textual_inversion(toy, one):
    """Bit for bit, with the loss counted inside a mask that leaves nothing out."""
    from concepts.host import learn as learning
    from concepts.host.learn_tokens import TokenSession, TokenSettings

    data = replace(one[0], captions=(("a photo of {}",),), masks=(torch.ones(1, 16, 16),))
    plain = TokenSettings("mug", steps=3, learning_rate=0.01, init_text="mug", masked_loss=True, batch=2)
    with torch.inference_mode():
        wanted = learning.learn(TokenSession(toy[0], toy[1], data, plain), preview_every=0, save_every=0)
    found = learn(toy, data, torch.ones(1, 128, 128), things=("mug",), attention_weight=0.0, batch=2)
    assert same(found.concept.tensors, wanted.concept.tensors) and found.losses == wanted.losses
    assert (found.before, found.after) == (wanted.before, wanted.after) and not found.terms


def naive(made, parameters, drawn, when, draw):
    """Both losses with a pass per sample, written out; the maps by a tap of each word alone."""
    from concepts.host.attention import AttentionTap, maps_of
    from concepts.host.denoise import sigmas_at
    from concepts.host.positions import columns_of
    from concepts.host.prompt import encode_prompt

    d, s = made.denoiser, made.settings
    noise, errors, apart = torch.randn(len(drawn), *made.clean[0].shape[1:], generator=draw), [], []
    made.fingerprint = ""
    words = things(made.concept({}, []))
    for number, own in enumerate(drawn):
        text = "a photo of " + " and ".join(f"<{words[i].name}>" for i in own)
        (cond,) = encode_prompt(made.clip, text, [(w, 1.0) for w in words])
        sigma, clean = sigmas_at(d.sampling, when[number : number + 1]), made.clean[0]
        columns = columns_of(made.model, made.clip, text, words, [f"<{words[i].name}>" for i in own])
        tap = AttentionTap(maps_of(columns, True), s.attention_layers)
        n = noise[number : number + 1]
        denoised = d(d.noised(clean, n, sigma), sigma, [cond], tap.change)
        union = torch.stack([made.covers[0][i] for i in own]).amax(0)
        assert d.space == "eps"
        error = ((d.noised(clean, n, sigma) - denoised) / sigma - n)[0]
        errors.append((error.square() * union).sum() / (len(error) * union.sum()))
        mean = torch.stack([m[0] for m in tap.take().values()]).mean(0)
        for column, thing in enumerate(own):
            seen = mean[:, column].view(8, 8)
            small = made.covers[0][thing].unflatten(0, (8, 2)).unflatten(2, (8, 2)).mean((1, 3))
            apart.append((seen / seen.max() - small).square().mean() / len(own))
    return torch.stack(errors).mean(), torch.stack(apart).sum() / len(drawn)


def test_losses_are_those_of_the_things_drawn(toy, one):
    """Against a pass per sample through Concept Prompt; the gradient reaches the rows of the things drawn alone."""
    from concepts.host.gradients import training

    masks, words = torch.cat([one[1], halves(128, 128)]), ("mug", "sand", "grass", "wood")
    when = torch.tensor([0.3, 0.8], dtype=torch.float64)
    with training(toy[0], toy[1].patcher):
        made = session(toy, one[0], masks, things=words, attention_weight=0.5)
        made.begin()
        parameters = {k: v.requires_grad_() for k, v in made.parameters.items()}
        shape = (2, *made.clean[0].shape[1:])
        for seed in range(20):  # one that leaves a thing out
            draw = generator(0, seed, "test")
            torch.randn(shape, generator=draw)
            drawn = [subset(4, draw) for _ in range(2)]
            if len({i for own in drawn for i in own}) == 3 and len(drawn[0]) != len(drawn[1]):
                break
        found = made.losses(parameters, [0, 0], [0, 0], when, generator(0, seed, "test"))
        (gradient,) = torch.autograd.grad(sum(found.values()), list(parameters.values()))
        with torch.no_grad():
            diffusion, apart = naive(made, parameters, drawn, when, generator(0, seed, "test"))
    torch.testing.assert_close(found["diffusion"].detach(), diffusion, rtol=1e-4, atol=0)
    torch.testing.assert_close(found["attention"].detach(), 0.5 * apart, rtol=1e-4, atol=0)
    reached = gradient[0, 0, 0].any(-1).nonzero()[:, 0].tolist()
    assert reached == sorted({i for own in drawn for i in own})


def test_steps_repeat_their_draws(toy, one):
    """As functions of seed and step; every thing comes up, alone and with others."""
    from concepts.host.gradients import training

    with training(toy[0], toy[1].patcher), torch.no_grad():
        made = session(toy, *one, attention_weight=0.0)
        made.begin()
        values, drawn, prompts = [], [], made.prompts
        made.prompts = lambda own: drawn.extend(own) or prompts(own)
        for step in (0, 1, 2, 3, 4, 5, 0):
            values.append(float(made.step_loss(made.parameters, step, 0)))
        again = session(toy, *one, attention_weight=0.0, seed=1)
        again.begin()
        assert values[0] == values[-1] != values[1] and drawn[0] == drawn[-1]
        assert float(again.step_loss(again.parameters, 0, 0)) != values[0]
    assert {len(own) for own in drawn} == {1, 2} and {i for own in drawn for i in own} == {0, 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "vectors": 2}, {"batch": 2, "attention_weight": 0.0}], ids=str
)
def test_continued_equals_one_run(toy, one, changes, tmp_path):
    whole, first = learn(toy, *one, **changes), learn(toy, *one, **changes, steps=2)
    write_concept(first.concept, tmp_path / "first.safetensors")
    rest = learn(toy, *one, read_any(tmp_path / "first.safetensors"), **changes, steps=1)
    assert same(whole.concept.tensors, rest.concept.tensors) and same(whole.concept.state, rest.concept.state)
    assert whole.losses == rest.losses and whole.terms == rest.terms


@pytest.mark.slow
def test_the_attention_loss_pulls_maps_to_the_masks(toy, one):
    """At fixed noise, and more than without it."""
    from concepts.host.gradients import training

    def left(done) -> float:
        with training(toy[0], toy[1].patcher), torch.no_grad():
            made = session(toy, *one, done.concept if done else None, attention_weight=1.0)
            made.begin()
            when = torch.full((4,), 0.5, dtype=torch.float64)
            return float(made.losses(made.parameters, [0] * 4, [0] * 4, when, generator(0, 0, "test"))["attention"])

    run = {"steps": 12, "batch": 2, "learning_rate": 0.02}
    on, off = (left(learn(toy, *one, attention_weight=weight, **run)) for weight in (0.5, 0.0))
    assert on < 0.9 * left(None) and on < off


@pytest.mark.slow
def test_checkpointing_and_the_host_stay_as_they_were(toy, one):
    before, picture = weights(toy), sampled(toy)
    plain = learn(toy, *one, attention_weight=0.5)
    again = learn(toy, *one, attention_weight=0.5, checkpointing="on")
    for key, value in plain.concept.tensors.items():
        torch.testing.assert_close(value, again.concept.tensors[key], rtol=1e-4, atol=1e-6)
    for name, curve in plain.terms.items():
        assert curve == pytest.approx(again.terms[name], rel=1e-4)
    assert same(weights(toy), before) and torch.equal(sampled(toy), picture)


def test_masks_are_brought_to_the_latent_as_those_of_a_set(toy):
    """Also where a picture's rim is cut; twice as large they are the same, and mirrored for a mirrored copy."""
    from concepts.host.concept_set import make_set
    from concepts.host.scene_masks import scene_masks

    draw = torch.Generator().manual_seed(0)
    mask = (torch.rand(1, 150, 134, generator=draw) > 0.5).float()
    with torch.inference_mode():
        data = make_set(toy[2], [torch.rand(1, 150, 134, 3, generator=draw)], [mask], [], mirror=True)
    small, flipped = scene_masks(data, mask, ("mug",))
    assert data.latents[0].shape[-2:] == small.shape[-2:]
    torch.testing.assert_close(small, data.masks[0], rtol=0, atol=0.15)
    assert torch.equal(flipped, small.flip(-1))
    mask, exact = mask[:, :144, :128], replace(data, latents=(torch.zeros(12, 18, 16),) * 2)
    wanted = torch.nn.functional.interpolate(mask[None], (18, 16), mode="area")[0]
    for size in (1, 2):
        larger = mask.repeat_interleave(size, 1).repeat_interleave(size, 2)
        torch.testing.assert_close(scene_masks(exact, larger, ("mug",))[0], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_other_models(kind):
    """UNets hold maps to masks; others say what to set, and learn without."""
    made = tiny(kind)
    parts, masks, joint = (made.model, made.clip), halves(64, 64), kind in ("sd3", "flux")
    if joint:
        with pytest.raises(CarrierMismatch, match="set attention_weight to 0"):
            session(parts, of(made.latent), masks)
    weight = 0.0 if joint else 0.5
    done = learn(parts, of(made.latent, mirrored=True), masks, attention_weight=weight, steps=2, batch=2)
    assert bool(done.terms) != joint and (joint or min(done.terms["attention"]) > 0)
    assert all(v.shape[3] == 2 for v in done.concept.tensors.values())
    assert [c.name for c in things(done.concept)] == ["scene1", "scene2"]


def test_text_encoders_that_do_not_learn_read_the_class_words(host):
    from concepts.host.text import encoders

    made = tiny("sdxl")
    masks = halves(64, 64)
    own = begun((made.model, made.clip), of(made.latent), masks, encoders=("clip_g",))
    (first, _) = encoders(made.clip)
    assert set(own.parameters) == {"clip_g"}
    assert [torch.equal(own.whole.plain[str(i)]["clip_l"], first.rows(w)) for i, w in enumerate(("mug", "sand"))]


def test_a_kept_scene_gives_all_of_its_words(toy, one, tmp_path):
    """Which is what a cancelled run leaves: one file, whatever it is called when it is loaded."""
    from concepts.host.prompt import encode_prompt
    from concepts.nodes.sockets import connected

    done = learn(toy, *one, vectors=2, steps=1, learning_rate=0.1)
    write_concept(done.concept, tmp_path / "scene.safetensors")
    kept = replace(read_any(tmp_path / "scene.safetensors"), name="room")
    assert [c.name for c in connected({"concept0": kept, "concept1": None})] == ["room", "room1", "room2"]
    assert [c.info["init_text"] for c in things(kept)] == ["mug", "sand"]
    rows = torch.cat([c.tensors["clip_l"] for c in things(kept)], 3)
    assert torch.equal(rows, done.concept.tensors["clip_l"])
    with torch.inference_mode():
        given = [(c, 1.0) for c in connected({"concept0": kept})]
        seen = [encode_prompt(toy[1], f"a photo of <{name}>", given)[0][0] for name in ("room", "room1", "room2")]
    assert len({float(c.sum()) for c in seen}) == 3
    write_concept(replace(kept, state={}), tmp_path / "stock.safetensors")
    tensors, _ = parse(read_bytes(tmp_path / "stock.safetensors"), tmp_path)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {"clip_l": (4, 64)}, "a stock embedding of all things"


def test_only_scenes_have_things(toy, one):
    done = learn(toy, *one, steps=1)
    odd = replace(done.concept, info={**done.concept.info, "things": ["a", "b", "c"]})
    assert not things(odd) and not things(things(done.concept)[0])
    with pytest.raises(CarrierError, match="64 letters"):
        things(replace(done.concept, name="n" * 64))


def test_where_the_words_are_seen_is_a_picture(toy, one):
    from concepts.host import learn as learning

    made = session(toy, *one, steps=1)
    with torch.inference_mode():
        learning.learn(made, preview_every=1, save_every=0)
        assert made.seen().shape[2] == 3
        shown = made.picture()
    assert shown.ndim == 4 and shown.shape[1] > 2 * 256, "a row per thing"


def test_continuing_another_scene_is_refused(toy, one):
    done = learn(toy, *one, steps=1)
    with pytest.raises(CarrierMismatch, match="the words of mug, sand, this node would learn those of mug, grass"):
        learn(toy, *one, done.concept, things=("mug", "grass"))
    with pytest.raises(CarrierMismatch, match="mug, sand"):
        learn(toy, one[0], one[1][:1], done.concept, things=("mug",), vectors=2)


@pytest.mark.parametrize(
    "changes, masks, message",
    [
        ({"things": ("mug",)}, halves(8, 8), "masks has 2 masks and words has 1 lines; write one line per mask"),
        ({"things": ("mug", "sand", "sky")}, halves(8, 8), "2 masks and words has 3 lines"),
        ({}, torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]), r"Mask 2 \(sand\) is empty"),
        ({}, torch.stack([torch.ones(256, 256), torch.eye(256) * 0.01]), r"Mask 2 \(sand\) covers less than one"),
        ({"things": ("mug",) * 9}, torch.ones(9, 8, 8), "at most 8 things"),
        ({"things": ("mug", "")}, halves(8, 8), "class word"),
        ({"attention_layers": "third"}, halves(8, 8), "half, quarter"),
        ({"attention_layers": "quarter"}, halves(8, 8), "1/1, 1/2"),
        ({"name": "n" * 64}, halves(8, 8), "64 letters"),
    ],
)
def test_what_cannot_be_learned_says_what_to_do(toy, one, changes, masks, message):
    with pytest.raises((ValueError, CarrierError), match=message):
        learn(toy, one[0], masks, **changes)


def test_a_scene_is_one_picture_and_masks_may_be_alike(toy, mug_set, one):
    with pytest.raises(ValueError, match="concept_set has 5 pictures, and a scene is one picture"):
        learn(toy, mug_set, one[1])
    assert len(learn(toy, one[0], torch.ones(2, 128, 128), steps=1).losses) == 1
