"""Learning a LoRA on the toy world: continuation, class pictures, captions, rows, slots, attention loss."""

import contextlib
from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.delta import DOWN, UP, layers
from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import write_concept
from concepts.carriers.foreign import read_any

from .test_learn import same, sampled, weights
from .tiny import FAMILIES, tiny

pytestmark = pytest.mark.usefixtures("host")


def settings(**changes):
    from concepts.host.learn_lora import LoraSettings

    given = {"steps": 4, "batch": 2, "learning_rate": 1e-3, "token_text": "sks mug", **changes}
    return LoraSettings("mug", **given)


def learn(toy, data, earlier=None, tokens=None, residuals=(), prior=None, checkpointing="off", **changes):
    """One run as a node does it, in inference mode."""
    from concepts.host import learn as learning
    from concepts.host.learn_lora import LoraSession

    with torch.inference_mode():
        session = LoraSession(
            toy[0], toy[1], data, settings(**changes), earlier, tokens=tokens, residuals=residuals, prior=prior
        )
        return learning.learn(session, preview_every=2, save_every=2, checkpointing=checkpointing)


def rows(name="mug", n=1, seed=0, shape=(1, 1, 1), **info) -> Concept:
    g = torch.Generator().manual_seed(seed)
    return Concept(name, "tokens", {"clip_l": torch.randn(*shape, n, 128, generator=g) * 0.1}, info)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_weights_of_other_types_stay_and_learn(dtype, mug_set):
    """Small types with the host's cast to fp32: the factors get gradients, the base weights stay bit for bit."""
    from concepts.host.learn import learn as run
    from concepts.host.learn_lora import LoraSession

    made = tiny("sd15", dtype=getattr(torch, dtype), cast=torch.float32)
    data = replace(mug_set, latents=tuple(v[:4, :8, :8] for v in mug_set.latents), masks=(None,) * 5)
    before = {k: v.detach().clone() for k, v in made.model.model.diffusion_model.named_parameters()}
    with torch.inference_mode():
        done = run(LoraSession(made.model, made.clip, data, settings(steps=3)), preview_every=0, save_every=0)
    moved = [v for k, v in done.concept.tensors.items() if k.endswith(UP)]
    assert all(float(v.norm()) > 0 for v in moved)
    after = dict(made.model.model.diffusion_model.named_parameters())
    assert all(torch.equal(v.view(torch.uint8), after[k].view(torch.uint8)) for k, v in before.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2, "clip": 0.0},
        {"class_text": "a mug", "class_pictures": 2},
        {"tokens": True, "residuals": True, "token_text": ""},
        {"slot": 2},
        {"tokens": True, "token_text": "", "tokens_learning_rate": 1e-2},
    ],
    ids=str,
)
def test_continued_equals_one_run(toy, mug_set, changes, tmp_path, monkeypatch):
    from concepts.host import class_pictures

    monkeypatch.setattr(class_pictures, "STEPS", 3)
    width = toy_width(toy)
    given = dict(changes)
    if given.pop("tokens", False):
        given["tokens"] = fitted(rows(), width)
    if given.pop("residuals", False):
        given["residuals"] = tuple(fitted(rows(f"r{i}", 8, i + 1), width) for i in range(5))
    whole = learn(toy, mug_set, steps=5, **given)
    first = learn(toy, mug_set, steps=3, **given)
    write_concept(first.concept, tmp_path / "first.safetensors")
    rest = learn(toy, mug_set, earlier=read_any(tmp_path / "first.safetensors"), steps=2, **given)
    assert same(whole.concept.tensors, rest.concept.tensors)
    assert same(whole.concept.state, rest.concept.state)
    assert whole.losses == rest.losses and len(whole.losses) == 5


def toy_width(toy) -> int:
    from concepts.host.text import encoders

    return encoders(toy[1])[0].width


def fitted(concept: Concept, width: int) -> Concept:
    """The same concept with rows of this width."""
    return replace(concept, tensors={k: v[..., :width].contiguous() for k, v in concept.tensors.items()})


@pytest.mark.slow
def test_learning_lowers_the_loss_and_the_sampler_sees_it(toy, mug_set):
    """What Apply Concept gives denoises as the session did, and strength 0 samples bit for bit as before."""
    from concepts.host import lora
    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training
    from concepts.host.learn_lora import LoraSession

    before, picture = weights(toy), sampled(toy)
    done = learn(toy, mug_set, steps=25, batch=4, learning_rate=3e-3)
    assert done.after < 0.97 * done.before
    assert same(weights(toy), before) and torch.equal(sampled(toy), picture)
    with torch.inference_mode():
        applied, nothing = lora.apply(toy[0], done.concept, 1.0), lora.apply(toy[0], done.concept, 0.0)
    assert torch.equal(sampled((nothing, toy[1])), picture)
    assert not torch.allclose(sampled((applied, toy[1])), picture, atol=1e-3)
    estimates = []
    for model in (toy[0], applied):
        with training(model, toy[1].patcher), torch.no_grad():
            session = LoraSession(model, toy[1], mug_set, settings(), done.concept)
            session.begin()
            if model is toy[0]:
                context = session.attached()
            else:
                context = contextlib.nullcontext()
            sigma, x = torch.tensor([2.0]), torch.ones(session.clean[0].shape)
            with context:
                estimates.append(Denoiser(model)(x, sigma, *session.condition(session.parameters, [0], [0], sigma)))
    torch.testing.assert_close(estimates[1], estimates[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(sampled(toy), picture) and same(weights(toy), before)


@pytest.mark.slow
def test_an_interrupt_leaves_model_and_concept(toy, mug_set, monkeypatch):
    import comfy.model_management as management

    from concepts.host import learn as learning

    before, picture = weights(toy), sampled(toy)
    fresh = learn(toy, mug_set, steps=6)
    there, show = set(fresh.saved.parent.iterdir()), learning.Progress.show

    def pressed(self, done, *pictures):
        if done == 3:
            management.interrupt_current_processing()
        show(self, done, *pictures)

    monkeypatch.setattr(learning.Progress, "show", pressed)
    with pytest.raises(management.InterruptProcessingException):
        learn(toy, mug_set, steps=6)
    monkeypatch.setattr(learning.Progress, "show", show)
    (file,) = set(fresh.saved.parent.iterdir()) - there
    kept = read_any(file)
    assert kept.info["steps"] == 3 and kept.state["losses"].tolist() == fresh.losses[:3]
    assert same(weights(toy), before) and torch.equal(sampled(toy), picture)
    assert not any(m._forward_hooks for m in toy[0].model.modules())
    rest = learn(toy, mug_set, earlier=kept, steps=3)
    assert same(rest.concept.tensors, fresh.concept.tensors)


@pytest.mark.slow
def test_class_pictures_are_drawn_by_the_model_and_held_on_to(toy, mug_set, monkeypatch):
    """The same seed draws the same pictures; the prior term sees them with the class words and without a mask."""
    from concepts.host import class_pictures
    from concepts.host.class_pictures import draw_class

    monkeypatch.setattr(class_pictures, "STEPS", 6)
    a, b = (draw_class(toy[0], toy[1], "a red mug", 3, mug_set.latents[0], 5, batch) for batch in (3, 2))
    for one, other in zip(a.latents, b.latents, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(a.latents[0], a.latents[1], atol=1e-2)
    asked = []
    given = {"steps": 3, "class_text": "a red mug", "masked_loss": True}
    done = learn(toy, mug_set, prior=spied(a, asked), prior_weight=0.5, **given)
    assert asked == [2] * 3, "as many class pictures as concept pictures, each step"
    assert set(done.terms) == {"diffusion", "prior"} and all(v > 0 for v in done.terms["prior"])
    whole = learn(toy, mug_set, prior=a, prior_weight=1.0, **given)
    assert whole.terms["prior"][0] == pytest.approx(2 * done.terms["prior"][0], rel=1e-5)
    off = learn(toy, mug_set, prior=a, prior_weight=0.0, **given)
    assert not off.terms and off.losses[0] == pytest.approx(done.terms["diffusion"][0], rel=1e-6)


@contextlib.contextmanager
def begun(toy, data, earlier=None, prior=None, **changes):
    """A session at its first step."""
    from concepts.host.gradients import training
    from concepts.host.learn_lora import LoraSession

    session = LoraSession(toy[0], toy[1], data, settings(**changes), earlier, prior=prior)
    with torch.inference_mode():
        session.gather()
        with training(toy[0], toy[1].patcher), session.attached():
            session.begin()
            yield session


def test_the_prior_term_is_of_the_class_pictures(toy, mug_set, monkeypatch):
    """Not of the concept's, which come first."""
    of_class = replace(mug_set, latents=tuple(v + 3 for v in mug_set.latents), captions=(("a photo of {}",),) * 5)
    seen = []
    with begun(toy, mug_set, prior=of_class, class_text="a red mug") as session:
        condition = session.condition

        def spied(parameters, pictures, captions, sigma):
            said = [session.captions[i][c] for i, c in zip(pictures, captions, strict=True)]
            seen.append((torch.cat([session.clean[i] for i in pictures]), said))
            return condition(parameters, pictures, captions, sigma)

        monkeypatch.setattr(session, "condition", spied)
        session.step_loss(session.parameters, 0, 0)
        known = [session.denoiser.clean(v[None])[0] for v in of_class.latents]
    (_, own), (shown, said) = seen
    assert all("sks mug" in text for text in own) and said == ["a photo of a red mug"] * 2
    assert all(any(torch.equal(one, other) for other in known) for one in shown)


def spied(data, asked: list):
    """A set that notes how many pictures are drawn from it."""

    class Spied(type(data)):
        def draw(self, count, generator):
            asked.append(count)
            return super().draw(count, generator)

    return Spied(data.latents, data.masks, data.captions, data.mirrored)


def test_captions_say_token_and_residual():
    from concepts.host.concept_set import ConceptSet
    from concepts.host.learn_lora import captions

    latent = torch.zeros(4, 8, 8)
    texts = (("a photo of {}", "{} by {}"), ("{} on sand",))
    data = ConceptSet((latent,) * 2, (None,) * 2, texts, (False, False))
    assert captions(data, settings(), False, 0) == [("a photo of sks mug", "sks mug by sks mug"), ("sks mug on sand",)]
    assert captions(data, settings(token_text=""), True, 2) == [
        ("a photo of {} with {r0}", "{} with {r0} by {}"),
        ("{} with {r1} on sand",),
    ]
    assert captions(data, settings(token_text="<mug> mug"), True, 0)[1] == ("{} mug on sand",)
    double = ConceptSet((latent,) * 4, (None,) * 4, (texts[1],) * 4, (False, True, False, True))
    assert captions(data, settings(token_text=""), True, 2, " ")[1] == ("{} {r1} on sand",)
    shared = [t for (t,) in captions(double, settings(token_text=""), True, 2)]
    assert shared == [f"{{}} with {{r{n}}} on sand" for n in (0, 0, 1, 1)]
    own = [t for (t,) in captions(double, settings(token_text=""), True, 4)]
    assert own == [f"{{}} with {{r{n}}} on sand" for n in range(4)]
    for changes, tokens, residuals, message in (
        ({"token_text": ""}, False, 0, "sks mug"),
        ({}, True, 0, "does not name"),
        ({"token_text": "<mug>"}, False, 0, "no tokens"),
        ({"token_text": ""}, True, 3, "one per picture"),
    ):
        with pytest.raises(ValueError, match=message):
            captions(data, settings(**changes), tokens, residuals)


@pytest.mark.parametrize(("info", "said"), [({}, "{} with {r0}"), ({"joined": False}, "{} {r0}")])
def test_residuals_stand_as_they_were_learned(toy, mug_set, info, said):
    from concepts.host.learn_lora import LoraSession

    width = toy_width(toy)
    residuals = tuple(fitted(rows(f"r{i}", **info), width) for i in range(5))
    given, named = settings(token_text=""), fitted(rows(init_text="mug"), width)
    session = LoraSession(toy[0], toy[1], mug_set, given, tokens=named, residuals=residuals)
    assert said in session.captions[0][0]
    assert session.facts()["init_text"] == "mug", "what strength 0 of the bundled rows stands for"


@pytest.mark.slow
def test_frozen_rows_are_those_of_the_stock_path(toy, mug_set):
    """Target and residual in the session's captions equal the same rows in Concept Prompt; the result bundles them."""
    from concepts.host.gradients import training
    from concepts.host.learn_lora import LoraSession
    from concepts.host.prompt import encode_prompt

    width = toy_width(toy)
    target, others = fitted(rows(init_text="mug"), width), [fitted(rows(f"r{i}", 8, i + 1), width) for i in range(5)]
    data = replace(mug_set, captions=(("a photo of {} on sand",),) * 5)
    with training(toy[0], toy[1].patcher), torch.no_grad():
        session = LoraSession(toy[0], toy[1], data, settings(token_text=""), tokens=target, residuals=tuple(others))
        session.begin()
        entries, change = session.condition({}, [3, 1], [0, 0], torch.tensor([0.5, 3.0]))
        assert change is None and len(session.kept) == 2
    for entry, number in zip(entries, (3, 1), strict=True):
        given = [(target, 1.0), (others[number], 1.0)]
        with torch.inference_mode():
            ((stock, _),) = encode_prompt(toy[1], f"a photo of <mug> with <r{number}> on sand", given)
        torch.testing.assert_close(entry[0], stock, rtol=1e-5, atol=1e-5)
    done = learn(toy, data, tokens=target, residuals=tuple(others), token_text="")
    assert torch.equal(done.concept.tensors["bundle_emb.mug.clip_l"], target.tensors["clip_l"])
    with torch.inference_mode():
        ((mine, _),) = encode_prompt(toy[1], "a <mug>", [(done.concept, 1.0)])
        ((theirs, _),) = encode_prompt(toy[1], "a <mug>", [(target, 1.0)])
        assert torch.equal(mine, theirs)
        words = learn(toy, mug_set).concept
        ((mine, _),) = encode_prompt(toy[1], "a <mug>", [(words, 1.0)])
        ((theirs, _),) = toy[1].encode_from_tokens_scheduled(toy[1].tokenize("a sks mug"))
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_rows_per_layer_and_stage_are_learned_against(toy, mug_set, tmp_path):
    from concepts.host.text import as_tokens
    from concepts.host.variants import layers_of

    names = layers_of(toy[0].model.diffusion_model)
    deep = fitted(rows(shape=(2, len(names), 1), layers=names), toy_width(toy))
    done = learn(toy, mug_set, tokens=deep, token_text="")
    write_concept(done.concept, tmp_path / "deep.safetensors")
    kept = as_tokens(read_any(tmp_path / "deep.safetensors"))
    assert torch.equal(kept.tensors["clip_l"], deep.tensors["clip_l"]) and kept.info["layers"] == names
    made = tiny("flux")
    with pytest.raises(CarrierMismatch, match="no cross-attention"):
        learn(
            (made.model, made.clip), mug_set, tokens=fitted(rows(shape=(1, 2, 1), layers=["a", "b"]), 64), token_text=""
        )


@pytest.mark.slow
def test_what_does_not_fit_is_refused(toy, mug_set):
    from concepts.host import lora
    from concepts.host.learn_lora import LoraSession

    done = learn(toy, mug_set).concept
    with pytest.raises(CarrierMismatch, match="Concept Prompt"):
        lora.apply(toy[0], rows(), 1.0)
    with pytest.raises(CarrierMismatch, match="no such layer"):
        lora.apply(tiny("flux").model, done, 1.0)
    name = layers(done.tensors)[0]
    wider = dict(done.tensors) | {name + DOWN: torch.zeros(4, 999)}
    with pytest.raises(CarrierMismatch, match="999"):
        lora.apply(toy[0], replace(done, tensors=wider), 1.0)
    with pytest.raises(CarrierMismatch, match="continue"):
        learn(toy, mug_set, earlier=done, rank=2)
    with pytest.raises(CarrierMismatch, match="bundles no token rows"):
        LoraSession(toy[0], toy[1], mug_set, settings(token_text=""), tokens=done)
    with pytest.raises(ValueError, match="class_text"):
        LoraSession(toy[0], toy[1], mug_set, settings(class_pictures=2))


def test_factors_too_large_to_keep_are_refused_before_learning(toy, mug_set, monkeypatch):
    from concepts.host import learn_lora, lora

    monkeypatch.setattr(learn_lora, "LARGEST", 1 << 20)
    with pytest.raises(ValueError, match="rank 64 on .* layers has [0-9]+ MiB .* at most 1; lower rank"):
        learn(toy, mug_set, rank=64)
    chosen = lora.layers(toy[0], "attention")
    held = lora.start(toy[0], chosen, 3, 0).values()
    assert lora.size(toy[0], chosen, 3) == sum(v.numel() for v in held)


def test_a_slot_fixes_what_the_layers_read(toy, mug_set):
    """Changes of two slots have no input in common; those of one have, and so have those without."""
    made = {slot: learn(toy, mug_set, steps=2, slot=slot).concept.tensors for slot in (0, 1, 2)}

    def shared(a, b):
        parts = [(n + UP, n + DOWN) for n in layers(a)]
        both = [((a[u] @ a[d]) @ (b[u] @ b[d]).T).norm() for u, d in parts]
        alone = [(a[u] @ a[d]).norm() * (b[u] @ b[d]).norm() for u, d in parts]
        return float(sum(both) / sum(alone))

    assert all(float(t[k].abs().max()) > 0 for t in made.values() for k in t if k.endswith(UP))
    assert shared(made[1], made[2]) < 1e-5 and shared(made[0], made[1]) > 1e-2
    again = learn(toy, mug_set, steps=1, slot=2, seed=9).concept.tensors
    assert all(torch.equal(again[k], made[2][k]) for k in again if k.endswith(DOWN))
    lengths = [torch.cat([t[k].norm(dim=1) for k in t if k.endswith(DOWN)]).mean() for t in (made[0], made[1])]
    assert float(lengths[0] / lengths[1]) == pytest.approx(1, abs=0.05), "so a learning rate means the same"


def test_another_slot_or_one_without_room_is_refused(toy, mug_set):
    done = learn(toy, mug_set, steps=1, slot=3).concept
    for slot in (0, 4):
        with pytest.raises(CarrierMismatch, match="learned with slot 3; continue with that one"):
            learn(toy, mug_set, earlier=done, slot=slot)
    with pytest.raises(ValueError, match="room for rank .* lower the rank"):
        learn(toy, mug_set, slot=1, rank=64)


def test_rows_are_learned_along_by_their_own_rate(toy, mug_set, tmp_path):
    from concepts.host.text import as_tokens

    tokens = fitted(rows(n=2), toy_width(toy))
    same_rows = learn(toy, mug_set, tokens=tokens, token_text="", steps=2)
    moved = learn(toy, mug_set, tokens=tokens, token_text="", steps=2, tokens_learning_rate=1e-2)
    assert torch.equal(as_tokens(same_rows.concept).tensors["clip_l"], tokens.tensors["clip_l"])
    write_concept(moved.concept, tmp_path / "mug.safetensors")
    found = as_tokens(read_any(tmp_path / "mug.safetensors")).tensors["clip_l"]
    far = (found - tokens.tensors["clip_l"]).abs()
    assert 1e-2 < float(far.max()) < 2.1e-2 and float(far.median()) > 1e-3, "two steps of Adam"
    ups = [torch.cat([v.flatten() for k, v in d.concept.tensors.items() if k.endswith(UP)]) for d in (same_rows, moved)]
    assert float(ups[1].abs().max()) < 2.1e-3 and not torch.equal(*ups)
    bare = replace(moved.concept, state={})
    more = learn(toy, mug_set, earlier=bare, token_text="", steps=1, tokens_learning_rate=1e-2)
    assert float((as_tokens(more.concept).tensors["clip_l"] - found).abs().max()) < 1.1e-2, "from where they were"
    for earlier, rate in ((moved.concept, 0.0), (same_rows.concept, 1e-2)):
        with pytest.raises(CarrierMismatch, match="set it so again, or save the concept without training state"):
            learn(toy, mug_set, earlier=earlier, token_text="", tokens_learning_rate=rate)
    with pytest.raises(ValueError, match="none is connected to tokens"):
        learn(toy, mug_set, tokens_learning_rate=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_rows_beside_layers(family):
    """A step of rows moves the loss by what their gradient says, through encoder and LoRA."""
    from concepts.host.concept_set import ConceptSet
    from concepts.host.gradients import training
    from concepts.host.learn_lora import ROWS, LoraSession
    from concepts.host.text import encoders

    made = tiny(family)
    data = ConceptSet((made.latent,), (None,), (("a photo of {}",),), (False,))
    g = torch.Generator().manual_seed(3)
    tokens = Concept(
        "mug", "tokens", {e.key: torch.randn(1, 1, 1, 2, e.width, generator=g) * 0.1 for e in encoders(made.clip)}
    )
    given = settings(token_text="", tokens_learning_rate=1e-3, batch=1)
    with torch.inference_mode():
        session = LoraSession(made.model, made.clip, data, given, tokens=tokens)
        session.fingerprint = ""
        with training(made.model, made.clip.patcher), session.attached():
            session.begin()
            p = session.parameters
            for key, value in p.items():
                if key.endswith(UP):
                    value.copy_(torch.randn(value.shape, generator=g) * 0.1)
            keys = [k for k in p if k.startswith(ROWS)]
            assert len(keys) == len(tokens.tensors)
            leaves = {k: p[k].requires_grad_(True) for k in keys}
            session.step_loss(p, 0, 0).backward()
            way = {k: torch.randn(v.shape, generator=g) for k, v in leaves.items()}
            told = sum(float((leaves[k].grad * way[k]).sum()) for k in keys)
            with torch.no_grad():
                ends = [session.step_loss(p | {k: p[k] + s * 1e-3 * way[k] for k in keys}, 0, 0) for s in (1, -1)]
    assert told == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=0.02, abs=1e-4)


def test_continuing_keeps_the_directions_of_the_file(toy, mug_set):
    """Whatever basis made them: what was learned belongs to them."""
    with begun(toy, mug_set, slot=1) as first:
        made = Concept("mug", "delta", dict(first.tensors()), {"slot": 1})
    turned = replace(made, tensors={k: v.flip(0) if k.endswith(DOWN) else v for k, v in made.tensors.items()})
    with begun(toy, mug_set, turned, slot=1) as session:
        kept = session.tensors()
    assert all(torch.equal(v, turned.tensors[k]) for k, v in kept.items() if k.endswith(DOWN))


def test_tokens_cannot_be_continued(toy, mug_set):
    with pytest.raises(CarrierMismatch, match="only a LoRA can be continued here; .*connect it to tokens"):
        learn(toy, mug_set, earlier=rows(), token_text="sks mug")


@pytest.mark.slow
def test_the_attention_loss_holds_the_maps_to_the_class_words(toy, mug_set):
    """AttnDreamBooth's later stages: a larger weight leaves a smaller distance."""
    target = fitted(rows(init_text="mug"), toy_width(toy))
    given = {"tokens": target, "token_text": "", "steps": 12, "learning_rate": 3e-3}
    off, on = (learn(toy, mug_set, attention_weight=w, **given) for w in (1e-6, 3.0))
    assert set(on.terms) == {"diffusion", "attention"}
    assert on.terms["attention"][0] == pytest.approx(3e6 * off.terms["attention"][0], rel=1e-3)
    assert sum(on.terms["attention"][-3:]) / 3e6 < sum(off.terms["attention"][-3:])
    recomputed = learn(toy, mug_set, checkpointing="on", attention_weight=3.0, **given)
    assert recomputed.terms["attention"] == pytest.approx(on.terms["attention"], rel=1e-3)


def test_each_vector_is_held_to_the_class_word(toy, mug_set):
    """As the authors' loss does, and not their mean; a caption without the concept has nothing to hold."""
    from concepts.host.gradients import training
    from concepts.host.learn_lora import LoraSession

    target = fitted(rows(n=2, init_text="mug"), toy_width(toy))
    data = replace(mug_set, captions=(("a photo of {}",), ("a photo",), *mug_set.captions[2:]))
    with training(toy[0], toy[1].patcher):
        made = LoraSession(toy[0], toy[1], data, settings(token_text="", attention_weight=2.0), tokens=target)
        made.begin()
        _, own, other = made.held.compared(made.index["a photo of {}"])
        _, *without = made.held.compared(made.index["a photo"])
    first = own[:, 0].argmax()
    assert torch.equal(own, torch.eye(len(own))[:, first : first + 2])
    assert torch.equal(other, torch.eye(len(other))[:, first].expand(2, -1).T)
    assert [c.shape[1] for c in without] == [0, 0]


def test_the_attention_loss_needs_rows_and_maps(toy, mug_set):
    from concepts.host.learn_lora import LoraSession

    target = fitted(rows(init_text="mug"), toy_width(toy))
    wanted = settings(token_text="", attention_weight=2.0)
    for what in ({}, {"tokens": replace(target, info={})}, {"tokens": target, "residuals": (target,) * 5}):
        given = wanted if what else settings(attention_weight=2.0)
        with pytest.raises(ValueError, match="class word they began at"):
            LoraSession(toy[0], toy[1], mug_set, given, **what)
    made = tiny("flux")
    with pytest.raises(CarrierMismatch, match="attention_weight to 0"):
        LoraSession(made.model, made.clip, mug_set, wanted, tokens=fitted(rows(init_text="mug"), 64))
