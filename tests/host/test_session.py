"""What all learners share: interrupts, memory, names, parts of other models, and where the model looks."""

import importlib
from dataclasses import replace

import pytest
import torch

from concepts.carriers.errors import CarrierError, CarrierMismatch
from concepts.carriers.foreign import read_any

from .test_learn import growth, learn, same, settings, weights
from .tiny import FAMILIES, tiny

pytestmark = pytest.mark.usefixtures("host")
LEARNERS = {
    "kv": ("learn_kv", "KVSession", "KVSettings", {"init_text": "mug", "stages": 2}),
    "residual": ("learn_residual", "ResidualSession", "ResidualSettings", {"init_text": "mug", "anchors": 1}),
    "neti": ("learn_neti", "NetiSession", "NetiSettings", {"init_text": "mug"}),
    "locked": ("learn_locked", "LockedSession", "LockedSettings", {"init_text": "mug"}),
    "lora": ("learn_lora", "LoraSession", "LoraSettings", {"token_text": "sks mug"}),
}
"""Module, session, settings and what these need, of the learners besides tokens."""


def made_by(kind: str, toy, data, earlier=None, **changes):
    """A session of one of ``LEARNERS``."""
    module, one, given, needed = LEARNERS[kind]
    module = importlib.import_module(f"concepts.host.{module}")
    return getattr(module, one)(
        toy[0], toy[1], data, getattr(module, given)(**{"name": "mug", **needed, **changes}), earlier
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNERS)
def test_an_interrupt_keeps_what_any_learner_has_done(toy, mug_set, kind, monkeypatch):
    """Weights of the model are as before, the file goes on to what an unbroken run gives, and that one's is left."""
    import comfy.model_management as management

    from concepts.host import folders
    from concepts.host import learn as learning

    def run(steps, earlier=None):
        with torch.inference_mode():
            session = made_by(kind, toy, mug_set, earlier, steps=steps)
            return learning.learn(session, preview_every=0, save_every=0, checkpointing="off")

    before, whole = weights(toy), run(4)
    there, show = set(folders.output("autosave").iterdir()), learning.Progress.show

    def pressed(self, done, *pictures):
        if done == 2:
            management.interrupt_current_processing()
        show(self, done, *pictures)

    monkeypatch.setattr(learning.Progress, "show", pressed)
    with pytest.raises(management.InterruptProcessingException):
        run(4)
    monkeypatch.setattr(learning.Progress, "show", show)
    (file,) = set(folders.output("autosave").iterdir()) - there
    kept = read_any(file)
    assert read_any(whole.saved).info["steps"] == 4
    assert kept.info["steps"] == 2 and same(weights(toy), before) and not management.in_training
    rest = run(2, kept)
    assert same(rest.concept.tensors, whole.concept.tensors) and same(rest.concept.state, whole.concept.state)
    assert rest.losses == whole.losses and rest.terms == whole.terms


@pytest.mark.parametrize("kind", LEARNERS)
def test_a_name_that_cannot_be_written_is_refused_before_learning(toy, mug_set, kind):
    for name in ("my dog", "<mug>", ""):
        with pytest.raises(CarrierError, match="letters, digits"):
            made_by(kind, toy, mug_set, name=name)


@pytest.mark.parametrize("to_conds, scheduled", [(True, False), (False, True), (False, False)])
def test_a_clip_whose_hooks_learning_would_not_see_is_refused(toy, mug_set, to_conds, scheduled):
    """Those that it has once and for all are in its weights."""
    import comfy.hooks
    from comfy_extras.nodes_hooks import SetClipHooks

    hook, group = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0), comfy.hooks.HookGroup()
    hook.weights = {}
    group.add(hook)
    with torch.inference_mode():
        (hooked,) = SetClipHooks().apply_hooks(toy[1], scheduled, to_conds, group)
    for kind in LEARNERS:
        parts = (toy[0], hooked, *toy[2:])
        if not (to_conds or scheduled):
            assert made_by(kind, parts, mug_set)
            continue
        with pytest.raises(CarrierMismatch, match="schedule_clip off" if scheduled else "turn its apply_to_conds off"):
            made_by(kind, parts, mug_set)


def test_masked_loss_needs_a_mask(toy, mug_set):
    bare = replace(mug_set, masks=(None,) * 5)
    with pytest.raises(ValueError, match="no picture has a mask"):
        learn(toy, bare, masked_loss=True)
    one = replace(mug_set, masks=(mug_set.masks[0], *(None,) * 4))
    assert len(learn(toy, one, masked_loss=True, steps=1).losses) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_shows_where_it_looks(family, mug_set):
    from concepts.host.gradients import training
    from concepts.host.learn_tokens import TokenSession

    made = tiny(family)
    with torch.inference_mode():
        data = replace(
            mug_set,
            latents=(made.latent,) * 2,
            masks=(None,) * 2,
            captions=(("a {} on sand",),) * 2,
            mirrored=(False,) * 2,
        )
        session = TokenSession(made.model, made.clip, data, settings())
        with training(made.model, made.clip.patcher):
            session.begin()
            seen = session.seen()
    assert seen is not None and seen.shape[-1] == 3 and bool(torch.isfinite(seen).all()) and float(seen.std()) > 0


@pytest.mark.parametrize("what, passes", [("mismatch", False), ("op", False), ("interrupt", True), ("memory", True)])
def test_what_cannot_be_shown_ends_no_run(toy, mug_set, monkeypatch, caplog, what, passes):
    import comfy.model_management as management

    from concepts.host import session

    error = {
        "mismatch": CarrierMismatch("replaced"),
        "op": NotImplementedError("no such op on this device"),
        "interrupt": management.InterruptProcessingException(),
        "memory": torch.cuda.OutOfMemoryError(),
    }[what]

    def tap_of(*given):
        raise error

    monkeypatch.setattr(session, "tap_of", tap_of)
    if passes:
        with pytest.raises(type(error)):
            learn(toy, mug_set, steps=1)
    else:
        assert len(learn(toy, mug_set, steps=1).losses) == 1
        assert f"where <mug> is seen cannot be shown: {error}" in caplog.text


@pytest.mark.parametrize("other", ["clip", "latent"])
def test_parts_of_another_model_are_named(mug_set, other):
    one, two = tiny("sd15"), tiny("sdxl" if other == "clip" else "flux")
    latent = (two if other == "latent" else one).latent
    data = replace(mug_set, latents=(latent,), masks=(None,), captions=(("a {}",),), mirrored=(False,))
    clip = (two if other == "clip" else one).clip
    message = "own CLIP" if other == "clip" else "own VAE"
    with pytest.raises(CarrierMismatch, match=f"another kind of model; connect the model's {message}"):
        learn((one.model, clip), data)


def test_a_caption_that_one_encoder_cuts_ends_no_run(mug_set):
    """The rows of SDXL's two encoders are cut to the shorter, so columns of the longer one are too many."""
    from concepts.host.gradients import training
    from concepts.host.learn_tokens import TokenSession

    made = tiny("sdxl")
    with torch.inference_mode():
        texts = ("a {} on" + " sand" * 50,)
        data = replace(mug_set, latents=(made.latent,), masks=(None,), captions=(texts,), mirrored=(False,))
        session = TokenSession(made.model, made.clip, data, settings(vectors=32, encoders=("clip_g",)))
        with training(made.model, made.clip.patcher):
            session.begin()
            seen = session.seen()
    assert seen is not None and bool(torch.isfinite(seen).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", LEARNERS)
def test_memory_stays_flat_with_any_learner(toy, mug_set, kind):
    """Resident memory after 50 runs within 3% of that after ten."""
    from concepts.host import learn as learning

    def cycle(seed):
        with torch.inference_mode():
            session = made_by(kind, toy, mug_set, steps=1, seed=seed)
            learning.learn(session, preview_every=0, save_every=0, checkpointing="off")

    assert growth(cycle, 10, 50) <= 1.03


@pytest.mark.parametrize("names", [[], ["attention"], ["prior"], ["exclusion"], ["isolation"], ["attention", "prior"]])
def test_a_line_has_room_on_the_node(toy, mug_set, names):
    made = made_by("lora", toy, mug_set, steps=9999)
    for part in (0.9, 9e-5, 123456.0):
        made.past, made.terms = [], {"diffusion": [0.003], **{name: [0.003 * part] for name in names}}
        said = made.line(9999, 0.003)
        assert len(said) <= 60 and said.startswith("step 9999 of 9999; loss 0.0030")
        assert not names or f", {names[0]} / diffusion " in said
    made.terms |= {name: [0.003 * 0.904] for name in names}
    assert not names or f", {names[0]} / diffusion 0.90" in made.line(3, 0.003)
