"""K and V tokens on the toy world: start, losses, exact continuation, and what sampling gets."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import write_concept
from concepts.carriers.foreign import read_any

from .test_learn import ordinary_entry, same, sampled, weights
from .tiny import tiny

pytestmark = pytest.mark.usefixtures("host")


def settings(**changes):
    from concepts.host.learn_kv import KVSettings

    return replace(KVSettings("mug", steps=3, init_text="mug", stages=2), **changes)


def session(toy, data, earlier=None, **changes):
    from concepts.host.learn_kv import KVSession

    return KVSession(toy[0], toy[1], data, settings(**changes), earlier)


def learn(toy, data, earlier=None, checkpointing="off", **changes):
    from concepts.host import learn as learning

    with torch.inference_mode():
        return learning.learn(
            session(toy, data, earlier, **changes), preview_every=0, save_every=0, checkpointing=checkpointing
        )


def begun(toy, data, **changes):
    """A session as it stands before the first step."""
    from concepts.host.gradients import training

    made = session(toy, data, **changes)
    with training(toy[0], toy[1].patcher):
        made.begin()
    return made


@pytest.mark.parametrize("mapper", ["self-attention", "free"])
def test_the_first_step_starts_at_the_class_word(toy, mug_set, mapper):
    from concepts.host.text import encoders

    made = begun(toy, mug_set, mapper=mapper, stages=5)
    rows = made.tensors()["clip_l"]
    assert rows.shape == (5, 1, 2, 1, 64)
    assert torch.equal(rows, encoders(toy[1])[0].rows("mug").mean(0).expand_as(rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mapper": "free", "attention_layers": "all", "batch": 2},
        {"attention_loss": "logits", "accumulate": 2},
        {"attention_loss": "moments", "split": False},
    ],
    ids=str,
)
def test_continued_equals_one_run(toy, mug_set, changes, tmp_path):
    whole, first = learn(toy, mug_set, **changes), learn(toy, mug_set, **changes, steps=2)
    write_concept(first.concept, tmp_path / "first.safetensors")
    rest = learn(toy, mug_set, read_any(tmp_path / "first.safetensors"), **changes, steps=1)
    assert same(whole.concept.tensors, rest.concept.tensors) and same(whole.concept.state, rest.concept.state)
    assert whole.losses == rest.losses and whole.terms == rest.terms
    roles = 1 if changes.get("split") is False else 2
    assert whole.concept.tensors["clip_l"].shape == (2, 1, roles, 1, 64)


def test_one_stage_and_no_split_is_textual_inversion(toy, mug_set):
    from concepts.host import learn as learning
    from concepts.host.learn_tokens import TokenSession, TokenSettings

    plain = TokenSettings("mug", steps=3, init_text="mug", vectors=1)
    with torch.inference_mode():
        wanted = learning.learn(TokenSession(toy[0], toy[1], mug_set, plain), preview_every=0, save_every=0)
    found = learn(
        toy, mug_set, mapper="free", stages=1, split=False, attention_weight=0.0, learning_rate=plain.learning_rate
    )
    assert same(found.concept.tensors, wanted.concept.tensors) and found.losses == wanted.losses
    assert not found.terms


@pytest.mark.slow
def test_the_attention_loss_is_reported_and_pulls(toy, mug_set):
    from concepts.host.report import learned_text

    free = {"mapper": "free", "learning_rate": 0.02, "steps": 8, "stages": 1, "attention_layers": "all"}
    off = learn(toy, mug_set, **free, attention_weight=1e-6)
    on = learn(toy, mug_set, **free, attention_weight=0.1)
    assert set(on.terms) == {"diffusion", "attention"} and len(on.terms["attention"]) == 8
    assert on.losses[3] == pytest.approx(on.terms["diffusion"][3] + on.terms["attention"][3])
    assert on.terms["attention"][0] == pytest.approx(1e5 * off.terms["attention"][0], rel=1e-4)
    assert on.terms["attention"][-1] / 1e5 < off.terms["attention"][-1], "the loss keeps the map near the class word's"
    assert "of the diffusion loss" in learned_text(on)


def test_at_the_class_word_the_attention_loss_is_zero(toy, mug_set):
    done = learn(toy, mug_set, attention_layers="all", steps=1)
    assert done.terms["attention"][0] < 1e-9


@pytest.mark.slow
def test_checkpointing_and_the_host_stay_as_they_were(toy, mug_set):
    before, picture = weights(toy), sampled(toy)
    plain = learn(toy, mug_set, mapper="free", attention_weight=0.1)
    again = learn(toy, mug_set, mapper="free", attention_weight=0.1, checkpointing="on")
    for key, value in plain.concept.tensors.items():
        torch.testing.assert_close(value, again.concept.tensors[key], rtol=1e-4, atol=1e-6)
    for name, curve in plain.terms.items():
        assert curve == pytest.approx(again.terms[name], rel=1e-4, abs=1e-9)
    assert same(weights(toy), before) and torch.equal(sampled(toy), picture)


def test_what_is_learned_is_what_the_prompt_uses(toy, mug_set):
    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training
    from concepts.host.prompt import encode_prompt

    done = learn(toy, mug_set, mapper="free", learning_rate=0.05)
    assert len(done.concept.tensors["clip_l"].reshape(4, -1).unique(dim=0)) == 4, "every row was learned"
    with torch.inference_mode():
        (cond,) = encode_prompt(toy[1], mug_set.captions[0][0].replace("{}", "<mug>"), [(done.concept, 1.0)])
    with training(toy[0], toy[1].patcher):
        made = session(toy, mug_set, done.concept, mapper="free")
        made.begin()
        d = Denoiser(toy[0])
        (hook,) = cond[1]["hooks"].hooks
        for level in (0.5, 20.0):
            sigma, x = torch.tensor([level]), torch.randn(made.clean[0].shape)
            with torch.no_grad():
                learned = d(x, sigma, *made.condition(made.parameters, [0], [0], sigma))
                wrappers = hook.transformers_dict["wrappers"]
                used = d(x, sigma, [ordinary_entry(cond)], lambda options, w=wrappers: {**options, "wrappers": w})
            torch.testing.assert_close(used, learned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_other_unets(family, mug_set):
    made = tiny(family)
    data = replace(mug_set, latents=(made.latent.clone(),) * 5)
    done = learn(
        (made.model, made.clip), data, stages=1, mapper="free", learning_rate=0.1, attention_weight=0.1, steps=2
    )
    assert max(done.terms["attention"]) > 0
    assert all(v.shape[:3] == (1, 1, 2) for v in done.concept.tensors.values())


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_attention_has_stages_only(family, mug_set):
    made = tiny(family)
    data = replace(mug_set, latents=(made.latent.clone(),) * 5)
    parts = (made.model, made.clip)
    for changes in ({"attention_weight": 0.0}, {"split": False}):
        with pytest.raises(CarrierMismatch, match="split_kv off and set attention_weight to 0"):
            session(parts, data, **changes)
    done = learn(parts, data, mapper="free", attention_weight=0.0, split=False, steps=2)
    assert done.concept.info["text_paths"] == "no split"
    assert all(v.shape[:3] == (2, 1, 1) for v in done.concept.tensors.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_text": ""}, "class word"),
        ({"mapper": "mlp"}, "self-attention, free"),
        ({"attention_loss": "max"}, "probabilities, logits"),
        ({"attention_layers": "third"}, "half, quarter"),
        ({"attention_layers": "quarter"}, "1/1, 1/2"),
    ],
)
def test_wrong_settings_say_what_to_do(toy, mug_set, changes, message):
    with pytest.raises(ValueError, match=message):
        learn(toy, mug_set, **changes)


def test_a_module_too_large_to_keep_is_refused(toy, mug_set, monkeypatch):
    from concepts.host import learn_kv

    monkeypatch.setattr(learn_kv, "LARGEST", 1 << 20)
    with pytest.raises(ValueError, match="mapper free"):
        learn(toy, mug_set)


def test_a_learned_concept_shows_where_it_looks(toy, mug_set):
    from concepts.host import learn as learning

    made = session(toy, mug_set)
    with torch.inference_mode():
        learning.learn(made, preview_every=0, save_every=0)
        clean, looks = made.looks()
        assert made.picture().ndim == 4
    assert [label for label, _ in looks] == ["stage 1 of 2", "stage 2 of 2"] and clean.shape == (1, 12, 16, 16)
    for _, maps in looks:
        assert len(maps) == 6 and all(m.shape == (k.height * k.width, 1) for k, m in maps.items())


def test_terms_add_up_to_the_loss_of_a_step(toy, mug_set):
    """Whose batches are several."""
    done = learn(toy, mug_set, mapper="free", attention_weight=0.1, accumulate=2, steps=1)
    assert done.losses == pytest.approx([sum(parts) for parts in zip(*done.terms.values(), strict=True)])


def test_terms_are_those_of_this_run(toy, mug_set):
    """On, off and on again: what a run does not measure it does not show, and its steps are a gap in the curve."""
    from concepts.host.pictures import loss_curves
    from concepts.host.report import learned_text

    def run(earlier, weight):
        made = session(toy, mug_set, earlier, mapper="free", attention_weight=weight, steps=2)
        with torch.inference_mode():
            from concepts.host import learn as learning

            return made, learning.learn(made, preview_every=0, save_every=0)

    made, first = run(None, 0.1)
    cut = made.concept(first.concept.state, first.losses[:1])
    assert cut.state["losses.attention"].tolist() == first.terms["attention"][:1], "as when a later step broke"
    made, second = run(first.concept, 0.0)
    assert not second.terms and "weighted" not in learned_text(second)
    assert made.line(2, 0.003) == "step 2 of 2; loss 0.0030"
    assert second.concept.state["losses.attention"].tolist() == first.terms["attention"]
    _, third = run(second.concept, 0.1)
    for name, curve in third.terms.items():
        assert curve[:2] == first.terms[name] and [v == v for v in curve] == [True, True, False, False, True, True]
    assert "nan" not in learned_text(third)
    assert bool(torch.isfinite(loss_curves(third.terms, "mug")).all())


def test_a_gap_in_a_curve_stays_empty():
    """Also at its beginning, where the loss of maps was turned on later."""
    from concepts.host.pictures import loss_curve

    gap, known = [float("nan")] * 20, [1.0, 2.0] * 20
    whole, middle, first = (
        loss_curve(v, "")[0] for v in (known * 2 + known[:20], known + gap + known, gap * 2 + known)
    )
    empty = whole[50, 3]
    assert torch.equal(whole[30:325, 60:250], middle[30:325, 60:250])
    assert bool((middle[30:325, 310:370] == empty).all()) and bool((first[30:325, 60:330] == empty).all())
    assert bool((whole[30:325, 310:370] != empty).any()) and bool((first[30:325, 370:620] != empty).any())
