"""Key-locked edits on every UNet family: learned, continued, kept, and used in prompts as they were learned."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import write_concept
from concepts.carriers.foreign import read_any

from .test_learn import ordinary_entry, same
from .test_neti import pictures
from .test_variants import concept, near, prompt, recorded, sample
from .tiny import KINDS, tiny

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(autouse=True)
def few(request, monkeypatch):
    """Prompts enough for a covariance of tiny encoders."""
    from concepts.host import learn_locked

    if "whole_corpus" not in request.fixturenames:
        monkeypatch.setattr(learn_locked, "PROMPTS", 32)


@pytest.fixture
def whole_corpus():
    """Asks for as many prompts as users have."""


def session(model, clip, data, earlier=None, **changes):
    from concepts.host.learn_locked import LockedSession, LockedSettings

    settings = replace(LockedSettings("mug", steps=2, init_text="mug", batch=2), **changes)
    return LockedSession(model, clip, data, settings, earlier)


def learn(*args, **changes):
    from concepts.host import learn as learning

    with torch.inference_mode():
        return learning.learn(session(*args, **changes), preview_every=0, save_every=0, checkpointing="off")


@pytest.fixture(scope="module", params=KINDS[:3])
def unet(request, host):
    return tiny(request.param)


@pytest.fixture(scope="module")
def mug(unet) -> Concept:
    with pytest.MonkeyPatch.context() as patch:
        from concepts.host import learn_locked

        patch.setattr(learn_locked, "PROMPTS", 32)
        return learn(unet.model, unet.clip, pictures(unet), lock_keys=False).concept


def random_edit(made, name="mug", seed=0, locked=True, **info) -> Concept:
    """An edit whose parts have nothing to do with each other."""
    from concepts.host.text import encoders
    from concepts.host.variants import layers_of

    g = torch.Generator().manual_seed(seed)
    names, width = layers_of(made.model.model.diffusion_model), prompt(made, "")[0][0].shape[-1]
    parts = {f"row.{e.key}": torch.randn(1, e.width, generator=g) for e in encoders(made.clip)}
    direction = torch.randn(width, generator=g)
    parts |= {"direction": direction, "dual": direction / 2 + 0.1 * torch.rand(width, generator=g) * direction.sign()}
    parts |= {"keys": torch.randn(1 if locked else len(names), width, generator=g)}
    parts |= {"values": torch.randn(len(names), width, generator=g)}
    return Concept(name, "edit", parts, {"init_text": "mug", "layers": names, "beta": 0.2, "tau": 0.3} | info)


def plain(whole: Concept) -> Concept:
    """Its row alone."""
    rows = {k.removeprefix("row."): v[None, None, None] for k, v in whole.tensors.items() if k.startswith("row.")}
    return Concept(whole.name, "tokens", rows, whole.info)


def by_hand(rows, whole: Concept, layer: int, role: str, strength=1.0) -> torch.Tensor:
    """The edit row by row."""
    t, out = whole.tensors, []
    for row in rows:
        s = (t["dual"] @ row) / (t["dual"] @ t["direction"])
        gate = 1 / (1 + torch.exp(-(s - whole.info["beta"]) / whole.info["tau"]))
        target = t[role][layer if len(t[role]) > 1 else 0]
        out.append(row + strength * (gate * target - s * t["direction"]))
    return torch.stack(out)


@pytest.mark.parametrize("locked", [True, False])
def test_the_sampler_sees_the_formula_in_every_layer(unet, locked):
    made = random_edit(unet, locked=locked)
    text, names = "a (red:1.2) photo of <mug> on (<mug>:1.5) sand", made.info["layers"]
    (rows,) = prompt(unet, text, plain(made))[0][0]
    model, calls = recorded(unet)
    sample(unet, prompt(unet, text, made), cfg=1.0, model=model, steps=1)
    assert len({block[:2] for block, *_ in calls}) == len(names)
    for block, key, value, _, _ in calls:
        layer = names.index(f"{block[0]}.{block[1]}")
        torch.testing.assert_close(key[0], by_hand(rows, made, layer, "keys"), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value[0], by_hand(rows, made, layer, "values"), rtol=1e-4, atol=1e-4)


def test_strength_scales_the_row_and_the_edit(unet):
    from concepts.host.prompt import encode_prompt
    from concepts.host.text import encoders

    made = random_edit(unet)
    word = {e.key: e.rows("mug").mean(0) for e in encoders(unet.clip)}
    half = {f"row.{k}": ((made.tensors[f"row.{k}"] + v) / 2) for k, v in word.items()}
    (rows,) = prompt(unet, "a <mug>", plain(Concept("mug", "edit", {**made.tensors, **half}, made.info)))[0][0]
    with torch.inference_mode():
        positive = encode_prompt(unet.clip, "a <mug>", [(made, 0.5)])
        off = encode_prompt(unet.clip, "a <mug>", [(made, 0.0)])
    model, calls = recorded(unet)
    sample(unet, positive, cfg=1.0, model=model, steps=1)
    torch.testing.assert_close(calls[0][2][0], by_hand(rows, made, 0, "values", 0.5), rtol=1e-4, atol=1e-4)
    assert torch.equal(off[0][0], prompt(unet, "a mug")[0][0]) and "hooks" not in off[0][1]


def test_before_the_first_step_the_prompt_is_the_class_words_but_for_the_gate(unet):
    """Direction, targets and row are the class word's, so that each row only moves along its encoding."""
    from concepts.host.gradients import training

    with training(unet.model, unet.clip.patcher):
        own = session(unet.model, unet.clip, pictures(unet))
        own.begin()
        own.fingerprint = ""
        made = own.concept({}, [])
    encoding = prompt(unet, "a photo of a mug")[0][0][0, 5]
    assert near(made.tensors["direction"], encoding) and near(made.tensors["keys"][0], encoding)
    assert all(near(row, encoding) for row in made.tensors["values"])
    (rows,), seen = prompt(unet, "a red mug on sand")[0][0], torch.zeros(0)
    model, calls = recorded(unet)
    sample(unet, prompt(unet, "a red <mug> on sand", made), cfg=1.0, model=model, steps=1)
    for _, key, value, _, _ in calls:
        torch.testing.assert_close(value[0], by_hand(rows, made, 0, "values"), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(key, value, rtol=1e-4, atol=1e-5)
        seen = value[0]
    like = rows @ made.tensors["dual"] / (made.tensors["direction"] @ made.tensors["dual"])
    moved = (torch.sigmoid((like - 0.75) / 0.1) - like)[:, None] * made.tensors["direction"]
    torch.testing.assert_close(seen, rows + moved, rtol=1e-3, atol=1e-4)


def test_several_edits_are_taken_away_together(unet):
    """Naively: what is left is blind to both directions, and each gate adds its own target."""
    one, two = random_edit(unet), random_edit(unet, "hat", seed=1, beta=0.1, init_text="hat")
    shared = one.tensors["direction"] + 0.3 * two.tensors["direction"]
    two = Concept("hat", "edit", {**two.tensors, "direction": shared, "dual": shared / 2}, two.info)
    one = Concept("mug", "edit", {**one.tensors, "dual": one.tensors["direction"] / 2}, one.info)
    (rows,) = prompt(unet, "a <mug> and <hat>", plain(one), plain(two))[0][0]
    model, calls = recorded(unet)
    sample(unet, prompt(unet, "a <mug> and <hat>", one, two), cfg=1.0, model=model, steps=1)
    rest = calls[0][2][0].clone()
    for own in (one, two):
        gate = torch.sigmoid(
            (rows @ own.tensors["dual"] / (own.tensors["direction"] @ own.tensors["dual"]) - own.info["beta"])
            / own.info["tau"]
        )
        rest -= gate[:, None] * own.tensors["values"][0]
    duals = torch.stack([one.tensors["dual"], two.tensors["dual"]])
    assert float((rest @ duals.T).abs().max()) < 1e-3 * float((rows @ duals.T).abs().max())
    inside = torch.linalg.lstsq(duals.T, (rows - rest).T).residuals
    assert not len(inside) or float(inside.max()) < 1e-3, "only along the two directions"


def test_with_rows_of_other_concepts_and_batches(unet):
    made, deep = random_edit(unet), concept(unet, stages=2, layers=9, roles=2, name="hat", seed=1)
    both = prompt(unet, "<hat> and <mug>", made, deep)
    assert near(sample(unet, both, batch=2)[:1], sample(unet, both))
    one = replace(deep, tensors={k: v[:1, :1, :1] for k, v in deep.tensors.items()})
    (rows,) = prompt(unet, "<hat> and <mug>", plain(made), one)[0][0]
    model, calls = recorded(unet)
    sample(unet, prompt(unet, "<hat> and <mug>", made, one), cfg=1.0, model=model, steps=1)
    torch.testing.assert_close(calls[0][2][0], by_hand(rows, made, 0, "values"), rtol=1e-4, atol=1e-4)


def test_learn_save_load_sample(unet, mug, tmp_path):
    """Every part moved, in every layer; K too where it was asked for."""
    from concepts.host.gradients import training

    with training(unet.model, unet.clip.patcher):
        own = session(unet.model, unet.clip, pictures(unet), lock_keys=False)
        own.begin()
    for key, value in own.start.items():
        moved = (mug.tensors[key] != value).reshape(len(value), -1) if value.dim() > 1 else mug.tensors[key] != value
        assert bool(moved.any(-1).all()), key
    write_concept(mug, tmp_path / "mug.safetensors")
    loaded = read_any(tmp_path / "mug.safetensors")
    drawn = sample(unet, prompt(unet, "a photo of <mug>", loaded), steps=2)
    assert torch.isfinite(drawn).all()
    assert torch.equal(drawn, sample(unet, prompt(unet, "a photo of <mug>", mug), steps=2))
    assert not torch.equal(drawn, sample(unet, prompt(unet, "a photo of mug"), steps=2))


def test_locked_keys_stay_and_the_direction_follows_the_encoding(toy, mug_set):
    """One step at a time by hand: 0.99 of itself and 0.01 of the mean encoding over the batch."""
    from concepts.host.gradients import training

    first = learn(*toy[:2], mug_set, steps=1, accumulate=2).concept
    again = learn(*toy[:2], mug_set, first, steps=1, accumulate=2).concept
    assert torch.equal(first.tensors["keys"], again.tensors["keys"]) and len(first.tensors["keys"]) == 1
    assert (again.tensors["values"] != first.tensors["values"]).any(1).all()
    with training(toy[0], toy[1].patcher), torch.no_grad():
        own = session(*toy[:2], mug_set, first, accumulate=2)
        own.begin()
        seen: list = []
        from concepts.kernels.draws import generator

        for micro in range(2):
            taken, captions = mug_set.draw(2, generator(0, 2 + micro, "step"))
            own.condition(own.parameters, taken, captions, torch.ones(len(taken)), seen=seen)
    wanted = 0.99 * first.tensors["direction"] + 0.01 * torch.stack(seen).mean(0)
    torch.testing.assert_close(again.tensors["direction"], wanted, rtol=1e-4, atol=1e-6)
    solved = own.factor @ own.factor.T @ first.tensors["dual"].double()
    torch.testing.assert_close(solved.float(), first.tensors["direction"], rtol=1e-3, atol=1e-4)


def test_gradients_are_those_of_the_formula(toy, mug_set):
    """By finite differences, along a random way through values and row."""
    from concepts.host.gradients import training

    with training(toy[0], toy[1].patcher):
        own = session(*toy[:2], mug_set)
        own.begin()
        draw = torch.Generator().manual_seed(0)
        for name in ("values", "row.clip_l"):
            value = own.parameters[name].requires_grad_()
            way = 0.02 * torch.randn(value.shape, generator=draw)

            def loss(step, name=name, way=way, value=value):
                moved = {**own.parameters, name: value.detach() + step * way}
                return own.losses(moved, [0], [0], torch.tensor([0.5]), torch.Generator().manual_seed(1))["diffusion"]

            own.losses(own.parameters, [0], [0], torch.tensor([0.5]), torch.Generator().manual_seed(1))[
                "diffusion"
            ].backward()
            with torch.no_grad():
                slope = float(loss(1.0) - loss(-1.0)) / 2
            assert float((value.grad * way).sum()) == pytest.approx(slope, rel=0.05), name
            for parameter in own.parameters.values():
                parameter.grad = None


def test_what_is_learned_is_what_the_prompt_uses(toy, mug_set):
    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training
    from concepts.host.prompt import encode_prompt

    made = learn(*toy[:2], mug_set, learning_rate=0.3).concept
    with torch.inference_mode():
        (cond,) = encode_prompt(toy[1], mug_set.captions[0][0].replace("{}", "<mug>"), [(made, 1.0)])
    with training(toy[0], toy[1].patcher):
        own = session(*toy[:2], mug_set, made)
        own.begin()
        d = Denoiser(toy[0])
        (hook,) = cond[1]["hooks"].hooks
        sigma, x = torch.tensor([3.0]), torch.randn(own.clean[0].shape)
        with torch.no_grad():
            learned = d(x, sigma, *own.condition(own.parameters, [0], [0], sigma))
            wrappers = hook.transformers_dict["wrappers"]
            used = d(x, sigma, [ordinary_entry(cond)], lambda options: {**options, "wrappers": wrappers})
        torch.testing.assert_close(used, learned, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("lock_keys", [True, False])
def test_continued_equals_one_run(toy, mug_set, lock_keys, tmp_path):
    """Also with another class word, as the keys are those of the file."""
    given = {"accumulate": 2, "lock_keys": lock_keys}
    whole, first = learn(*toy[:2], mug_set, steps=5, **given), learn(*toy[:2], mug_set, steps=3, **given)
    write_concept(first.concept, tmp_path / "first.safetensors")
    rest = learn(*toy[:2], mug_set, read_any(tmp_path / "first.safetensors"), steps=2, **given, init_text="hat")
    assert same(whole.concept.tensors, rest.concept.tensors) and same(whole.concept.state, rest.concept.state)
    assert whole.losses == rest.losses


@pytest.mark.slow
def test_learning_lowers_the_loss_and_opens_the_gate_at_the_concept(toy, mug_set, whole_corpus):
    done = learn(*toy[:2], mug_set, steps=20, batch=4)
    assert done.after < done.before
    one, text = done.concept, mug_set.captions[0][0].replace("{}", "<mug>")
    (rows,) = prompt_of(toy, text, plain(one))
    like = rows @ one.tensors["dual"] / (one.tensors["direction"] @ one.tensors["dual"])
    place = text.replace(",", " ,").split().index("<mug>") + 1
    assert float(like[place]) > 0.75


def prompt_of(toy, text, *concepts):
    from concepts.host.prompt import encode_prompt

    with torch.inference_mode():
        return encode_prompt(toy[1], text, [(c, 1.0) for c in concepts])[0][0]


def test_where_the_model_looks_is_shown(unet, mug):
    """In previews of learning, and in Show Attention."""
    from concepts.host.gradients import training
    from concepts.host.show import look

    with training(unet.model, unet.clip.patcher):
        own = session(unet.model, unet.clip, pictures(unet), mug, lock_keys=False)
        own.begin()
        seen = own.seen()
    assert seen is not None and float(seen.std()) > 0
    with torch.inference_mode():
        (found,) = look(unet.model, unet.clip, unet.latent, "a <mug> on sand", [mug], ["<mug>", "sand"], [0.5], 0)
    assert found.stage == "" and all(torch.isfinite(v).all() and v.shape[1] == 2 for v in found.maps.values())


@pytest.mark.parametrize("family", KINDS[3:])
def test_joint_attention_is_refused(mug_set, family):
    made = tiny(family)
    with pytest.raises(CarrierMismatch, match="no keys and values of the text to lock"):
        session(made.model, made.clip, mug_set)
    edit = random_edit(tiny("sd15"))
    with pytest.raises(CarrierMismatch):
        sample(made, prompt(made, "a <mug>", edit), cfg=1.0)


def test_wrong_settings_and_other_concepts_are_refused(toy, mug_set):
    with pytest.raises(ValueError, match="class word"):
        learn(*toy[:2], mug_set, init_text="")
    with pytest.raises(ValueError, match="tau"):
        session(*toy[:2], mug_set, tau=0.0)
    rows = Concept("mug", "tokens", {"clip_l": torch.ones(1, 1, 1, 1, 64)})
    with pytest.raises(CarrierMismatch, match="would learn"):
        learn(*toy[:2], mug_set, rows)
    made = random_edit(tiny("sd15"))
    narrow = {k: v if k.startswith("row.") else v[..., :8] for k, v in made.tensors.items()}
    with pytest.raises(CarrierMismatch, match="edits rows of 8 numbers"):
        prompt_of(toy, "a <mug>", Concept("mug", "edit", narrow, made.info))


def test_nodes_that_cannot_use_an_edit_say_so(toy, mug_set):
    """With the sentences that they have for other kinds."""
    from concepts.carriers.mix import mix
    from concepts.host import folders, lora
    from concepts.host.learn_lora import LoraSession, LoraSettings
    from concepts.host.learn_tokens import TokenSession, TokenSettings
    from concepts.host.prompt import encode_prompt
    from concepts.host.refine import RefineSettings, check

    made = random_edit(tiny("sd15"))
    with pytest.raises(CarrierMismatch, match="of kind edit, and only tokens can be mixed"):
        mix(made, made, "both")
    with pytest.raises(CarrierMismatch, match="made of edit and changes no weights; connect it to Concept Prompt"):
        lora.apply(toy[0], made, 1.0)
    with pytest.raises(CarrierMismatch, match="made of edit, and one step for one prompt"):
        check(RefineSettings("mug"), made, ("a <mug>", "a <mug>"))
    lora_settings = LoraSettings("mug", token_text="a {}")
    with pytest.raises(CarrierMismatch, match="bundles no token rows"):
        LoraSession(*toy[:2], mug_set, lora_settings, tokens=made)
    with pytest.raises(CarrierMismatch, match="made of edit, and only a LoRA can be continued"):
        LoraSession(*toy[:2], mug_set, lora_settings, made)
    with pytest.raises(CarrierMismatch, match="would learn"):
        from concepts.host import learn as learning

        with torch.inference_mode():
            learning.learn(TokenSession(*toy[:2], mug_set, TokenSettings("mug", steps=1, init_text="mug"), made))
    with pytest.raises(ValueError, match="made of edit and has no words of its own"):
        encode_prompt(toy[1], "a <mug:hat>", [(made, 1.0)])
    for folder, message in (("embeddings", "no embedding; choose concepts"), ("loras", "no LoRA; choose concepts")):
        with pytest.raises(ValueError, match=message):
            folders.home(folder, made)


def test_reports(toy, mug_set):
    from concepts.host.report import inspect_text, learned_text

    done = learn(*toy[:2], mug_set, steps=1)
    assert "with locked keys; gate at 0.75" in learned_text(done)
    text, marks = inspect_text(done.concept, toy[1], 2)
    assert "clip_l: 1 vectors" in text and len(marks) == 2 and marks[0][0] == "clip_l 1: mug"
