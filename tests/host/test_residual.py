"""ConceptPrism: both losses against one pass per anchor, on every kind of model; continuing; what comes out."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import parse, read_bytes, write_concept
from concepts.carriers.foreign import read_any
from concepts.kernels.draws import generator, times

from .tiny import tiny

pytestmark = pytest.mark.usefixtures("host")
ROWS = {
    "target only": {"residual_vectors": 0},
    "+ residual": {"beta": 0.0, "residual_init": "random"},
    "+ exclusion": {"residual_init": "random"},
    "+ initialisation": {},
}


def settings(**changes):
    from concepts.host.learn_residual import ResidualSettings

    return ResidualSettings(
        "mug", **{"steps": 3, "learning_rate": 0.01, "init_text": "mug", "beta": 0.5, "residual_vectors": 3} | changes
    )


def session(toy, data, earlier=None, **changes):
    from concepts.host.learn_residual import ResidualSession

    return ResidualSession(toy[0], toy[1], data, settings(**changes), earlier)


def learn(toy, data, earlier=None, **changes):
    from concepts.host import learn as learning

    with torch.inference_mode():
        made = session(toy, data, earlier, **changes)
        return learning.learn(made, preview_every=0, save_every=0), made.residuals()


def pictures(latent: torch.Tensor, count: int = 4, odd: int = 0, mirrored: bool = False):
    """A set of random latents; the last ``odd`` are larger; ``mirrored``: every second one mirrors the one before."""
    from concepts.host.concept_set import ConceptSet

    g = torch.Generator().manual_seed(1)
    shape = latent.shape
    sizes = [shape] * (count - odd) + [(shape[0], shape[1], shape[2] + 4)] * odd
    return ConceptSet(
        tuple(torch.randn(size, generator=g) for size in sizes),
        (None,) * count,
        tuple((f"a {{}} number {i} on sand",) for i in range(count)),
        tuple(mirrored and bool(i % 2) for i in range(count)),
    )


def naive(made, parameters, chosen, when, draw, count=3) -> tuple[torch.Tensor, torch.Tensor]:
    """Reconstruction and exclusion, every prediction in a pass of its own, losses written out (arXiv 2602.19575)."""
    from concepts.host.denoise import sigmas_at

    d, keys = made.denoiser, [e.key for e in made.encoders]

    def predicted(x, sigma, prompt, rows):
        denoised = d(x, sigma, [made.prompts.encode(prompt, rows)])
        if d.space == "v":  # comfy/model_sampling.py: x0 = x / (1 + s^2) - v s / sqrt(1 + s^2)
            return (x / (1 + sigma**2) - denoised) * (1 + sigma**2) ** 0.5 / sigma
        return (x - denoised) / sigma  # eps, and the velocity of a flow

    def target(clean, noise, sigma):
        return {
            "eps": noise,
            "flow": noise - clean,
            "v": noise / (1 + sigma**2) ** 0.5 - clean * sigma / (1 + sigma**2) ** 0.5,
        }[d.space]

    noise, errors, apart = torch.randn(torch.cat([made.clean[i] for i in chosen]).shape, generator=draw), [], []
    for number, i in enumerate(chosen):
        residual = {k: parameters[f"residual.{k}"][i] for k in keys}
        both = {"": {k: parameters[k][0, 0, 0] for k in keys}, "residual": residual}
        clean, n, sigma = made.clean[i], noise[number : number + 1], sigmas_at(d.sampling, when[number : number + 1])
        errors.append(predicted(d.noised(clean, n, sigma), sigma, 0, both) - target(clean, n, sigma))
        order = [j for j in torch.randperm(len(made.clean), generator=draw).tolist() if j != i]
        alike = [j for j in order if made.clean[j].shape == clean.shape]
        for j in [*alike, *(j for j in order if j not in alike)][:count]:
            sigma = sigmas_at(d.sampling, times(1, "uniform", 0.0, 1.0, draw))
            x = d.noised(made.clean[j], torch.randn(made.clean[j].shape, generator=draw), sigma)
            with torch.no_grad():
                null = predicted(x, sigma, 2, {})
            apart.append((predicted(x, sigma, 1, {"residual": residual}) - null).square().mean())
    return torch.stack([e.square().mean() for e in errors]).mean(), torch.stack(apart).mean()


def gradients(loss, parameters) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return dict(zip(parameters, found, strict=True))


@pytest.fixture(params=["toy", "sd15", "sd2", "sdxl", "sd3", "flux"])
def family(request):
    """(model, clip) and a latent of each kind of model."""
    if request.param == "toy":
        made = request.getfixturevalue("toy")
        return made[:2], torch.zeros(12, 16, 16)
    made = tiny(request.param)
    return (made.model, made.clip), made.latent


@pytest.mark.slow
@pytest.mark.parametrize("odd", [0, 2, 3], ids=lambda n: f"{n} odd")
def test_losses_equal_one_pass_per_anchor(family, odd):
    """Values and gradients; all pictures of one size, some anchors of another, or all of them."""
    from concepts.host.gradients import training

    parts, latent = family
    chosen = [0, 1][: 4 - odd]
    with training(parts[0], parts[1].patcher):
        made = session(parts, pictures(latent, 4, odd))
        made.begin()
        parameters = {k: v.requires_grad_() for k, v in made.parameters.items()}
        when = torch.tensor([0.3, 0.8], dtype=torch.float64)
        found = made.losses(parameters, chosen, [0] * len(chosen), when[: len(chosen)], generator(0, 0, "test"))
        wanted = naive(made, parameters, chosen, when, generator(0, 0, "test"))
        torch.testing.assert_close(found["diffusion"], wanted[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(found["exclusion"], 0.5 * wanted[1], rtol=1e-3, atol=0)
        for ours, theirs in ((found["diffusion"], wanted[0]), (found["exclusion"], 0.5 * wanted[1])):
            theirs = gradients(theirs, parameters)
            for key, value in gradients(ours, parameters).items():
                if theirs[key] is None or not theirs[key].any():
                    assert value is None or not value.any(), f"{key} learns from a loss that does not see it"
                else:
                    assert float((value - theirs[key]).norm() / theirs[key].norm()) < 1e-3, key
        apart = gradients(found["exclusion"], parameters)
        for key in (e.key for e in made.encoders):
            assert apart[key] is None or not apart[key].any(), "exclusion must not reach the target"
            assert apart[f"residual.{key}"][chosen].any() and not apart[f"residual.{key}"][2:].any()


def test_the_empty_prompt_gets_no_gradient_and_is_encoded_once(toy, mug_set, monkeypatch):
    from concepts.host.captions import Prompts
    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training

    encoded, calls, stock, model = [], [], Prompts.encode_groups, Denoiser.__call__

    def encode(self, groups):
        encoded.append([index for index, _ in groups])
        return stock(self, groups)

    def call(self, x, *args):
        calls.append((len(x), torch.is_grad_enabled()))
        return model(self, x, *args)

    monkeypatch.setattr(Prompts, "encode_groups", encode)
    monkeypatch.setattr(Denoiser, "__call__", call)
    with training(toy[0], toy[1].patcher):
        made = session(toy, mug_set)
        made.begin()
        for step in range(3):
            made.step_loss(made.parameters, step, 0)
    assert encoded == [[2]] + 3 * [[0, 1]], "two prompts a step, together, and the empty one once"
    assert calls == 3 * [(4, True), (3, False)], "one pass that learns, one that does not"


def test_the_bank_keeps_what_it_draws(toy, mug_set):
    """With a bank of two draws per picture: the exact loss of these draws, and no further passes once it is full."""
    from concepts.host.gradients import training

    with training(toy[0], toy[1].patcher):
        made = session(toy, mug_set, null_bank=2)
        made.begin()
        other, draw = made.exclusion, generator(0, 0, "test")
        entry = made.prompts.encode(1, made._rows(made.parameters, 0))
        picked = [other.anchor(i, entry, draw) for i in (1, 2, 1, 1, 1, 1)]
        assert len(other.bank) in (2, 3) and all(a.null.shape == a.x.shape for a in picked)
        assert len({float(a.sigma) for a in picked if torch.equal(a.null, picked[0].null)}) == 1
        estimate = torch.cat([made.denoiser(a.x, a.sigma, [a.entry]) for a in picked])
        kept = other.loss(picked, estimate)
        exact = session(toy, mug_set)
        exact.begin()
        torch.testing.assert_close(kept, exact.exclusion.loss(picked, estimate), rtol=1e-4, atol=0)
        full = session(toy, mug_set, null_bank=1)
        full.begin()
        for step in range(12):
            full.step_loss(full.parameters, step, 0)
        assert len(full.exclusion.bank) == 5


def test_the_sum_is_the_mean_times_the_anchors(toy, mug_set):
    from concepts.host.gradients import training

    found = []
    with training(toy[0], toy[1].patcher), torch.no_grad():
        for changes in ({}, {"reduction": "sum"}, {"beta": 1.0}):
            made = session(toy, mug_set, **changes)
            made.begin()
            draw = generator(0, 0, "test")
            found.append(float(made.losses(made.parameters, [0], [0], torch.tensor([0.5]), draw)["exclusion"]))
    assert found[1] == pytest.approx(3 * found[0], rel=1e-5) and found[2] == pytest.approx(2 * found[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"accumulate": 2, "null_bank": 2}, {"batch": 2}, {"residual_vectors": 0}], ids=str)
def test_continued_equals_one_run(toy, mug_set, changes, tmp_path):
    whole, all_of_it = learn(toy, mug_set, steps=3, **changes)
    first, _ = learn(toy, mug_set, steps=2, **changes)
    write_concept(first.concept, tmp_path / "first.safetensors")
    rest, residuals = learn(toy, mug_set, read_any(tmp_path / "first.safetensors"), steps=1, **changes)
    for a, b in zip([whole.concept, *all_of_it], [rest.concept, *residuals], strict=True):
        assert all(torch.equal(v, b.tensors[k]) for k, v in a.tensors.items()) and a.name == b.name
    assert whole.concept.state.keys() == rest.concept.state.keys()
    assert all(torch.equal(v, rest.concept.state[k]) for k, v in whole.concept.state.items())
    assert whole.losses == rest.losses and whole.terms == rest.terms and len(whole.losses) == 3
    if rest.terms:
        parts = torch.tensor([rest.terms["diffusion"], rest.terms["exclusion"]]).sum(0)
        torch.testing.assert_close(parts, torch.tensor(rest.losses))


@pytest.mark.parametrize("row", ROWS)
def test_rows_of_the_ablation(toy, mug_set, row):
    """Every row of the paper's Table 2 is a setting; all start with the same target and draw the same pictures."""
    from concepts.host.gradients import training

    with training(toy[0], toy[1].patcher):
        made = session(toy, mug_set, **ROWS[row])
        made.begin()
        plain = session(toy, mug_set, **ROWS[row] | {"beta": 0.0})
        plain.begin()
        alone = session(toy, mug_set, residual_vectors=0)
        alone.begin()
        assert torch.equal(made.start["clip_l"], alone.start["clip_l"])
        found, without = (
            other.losses(other.parameters, [2], [0], torch.tensor([0.5]), generator(0, 0, "test"))
            for other in (made, plain)
        )
        assert set(found) == ({"diffusion", "exclusion"} if made.excluding else {"diffusion"})
        assert made.excluding == (row in ("+ exclusion", "+ initialisation"))
        torch.testing.assert_close(found["diffusion"], without["diffusion"], rtol=1e-5, atol=0)
        assert set(made.parameters) == ({"clip_l"} if row == "target only" else {"clip_l", "residual.clip_l"})
        if row != "target only":
            same = (made.start["residual.clip_l"][:, :1] == made.start["residual.clip_l"]).all()
            assert bool(same) == (row == "+ initialisation")


def test_presets_replace_what_they_fix_and_nothing_else(host):
    from concepts.host.learn_residual import PRESETS, ResidualSettings, preset, replaced

    values = {"name": "mug", "steps": 7, "learning_rate": 1.0, "beta": 3.0, "seed": 5, "anchors": 2, "joined": False}
    assert preset("custom", **values) == ResidualSettings(**values)
    paper = preset("paper", **values)
    assert (paper.steps, paper.learning_rate, paper.accumulate, paper.beta, paper.joined) == (200, 4e-4, 4, 0.05, True)
    assert (paper.seed, paper.anchors, paper.preset) == (5, 2, "paper")
    assert preset("flux repository", **values).steps == 200 and preset("repository", **values).accumulate == 1
    assert all(set(p) <= set(vars(paper)) for p in PRESETS.values())
    assert "learning_rate 0.0004 (asked 1.0)" in replaced("paper", **values) and not replaced("custom", **values)
    assert "joined" not in replaced("repository", **values), "as asked"


def test_the_preset_of_flux_has_the_noise_levels_of_its_authors(host):
    """Their scheduler shifts nothing before it samples: uniform, for pictures and anchors."""
    from concepts.host.gradients import training
    from concepts.host.learn_residual import ResidualSession, preset

    made, draw = tiny("flux"), generator(0, 0, "test")
    chosen = preset("flux repository", name="mug", init_text="mug")
    with training(made.model, made.clip.patcher):
        learner = ResidualSession(made.model, made.clip, pictures(made.latent), chosen)
        learner.begin()
        when = learner.times(2000, 0, draw)
        _, of_anchors = learner.exclusion.noised(learner.clean[0].expand(2000, -1, -1, -1), when, draw)
    quartiles = torch.tensor([0.25, 0.5, 0.75])
    for levels in (of_anchors, learner.sigmas(when)):
        torch.testing.assert_close(levels.quantile(quartiles), quartiles, rtol=0, atol=0.03)


def test_a_residual_starts_as_the_mean_of_its_caption(toy, mug_set):
    """The encoder's last states over the caption's own tokens; rescaled it has the vocabulary's norm."""
    from concepts.host.gradients import training
    from concepts.host.text import encoders

    (encoder,) = encoders(toy[1])
    with training(toy[0], toy[1].patcher):
        made = session(toy, mug_set)
        made.begin()
        scaled = session(toy, mug_set, rescale="on")
        scaled.begin()
        text = mug_set.captions[1][0].replace("{}", "mug")
        count = len(encoder.ids(text))
        with torch.no_grad():
            (whole,) = toy[1].encode_from_tokens_scheduled(toy[1].tokenize(text))
    torch.testing.assert_close(made.start["residual.clip_l"][1, 0], whole[0][0, 1 : 1 + count].mean(0))
    norms = scaled.start["residual.clip_l"].norm(dim=-1)
    torch.testing.assert_close(norms, encoder.vocabulary.float().norm(dim=-1).mean().expand_as(norms))


def test_reading_a_caption_leaves_the_encoders_layer(host):
    """SDXL's conditions on the last but one, and captions are read at the last."""
    from concepts.host.descriptions import caption_mean
    from concepts.host.text import encoders

    made = tiny("sdxl")
    for encoder in encoders(made.clip):
        before = encoder.model.layer
        with torch.inference_mode():
            caption_mean(encoder, "a red mug on a wooden table")
        assert encoder.model.layer == before != "last"


def test_a_caption_of_sd2_is_read_where_the_model_reads_it(host):
    """Files of diffusers lack the encoder's last layer, so whatever memory held stands there."""
    from concepts.host.descriptions import caption_mean
    from concepts.host.text import encoders

    made, text = tiny("sd2"), "a red mug on a wooden table"
    (encoder,) = encoders(made.clip)
    with torch.inference_mode():
        for parameter in encoder.model.transformer.text_model.encoder.layers[-1].parameters():
            parameter.fill_(torch.nan)
        conditioned = made.clip.encode_from_tokens(made.clip.tokenize(text))[0]
        found = caption_mean(encoder, text)
    torch.testing.assert_close(found, conditioned[1 : 1 + len(encoder.ids(text))].mean(0))


def test_one_picture_is_refused_with_the_reason(toy, mug_set):
    from concepts.host.concept_set import ConceptSet

    one = ConceptSet(*((v[0],) for v in (mug_set.latents, mug_set.masks, mug_set.captions, mug_set.mirrored)))
    with pytest.raises(ValueError, match="only one picture"):
        learn(toy, one)
    done, residuals = learn(toy, one, beta=0.0)
    assert len(residuals) == 1 and len(done.losses) == 3
    twice = ConceptSet(*(2 * v for v in (one.latents, one.masks, one.captions)), (False, True))
    with pytest.raises(ValueError, match="only one picture"):
        learn(toy, twice)


def test_mirrored_pictures_share_a_residual_and_are_no_anchors(toy):
    made = session(toy, pictures(torch.zeros(12, 16, 16), 6, mirrored=True))
    from concepts.host.exclusion import Exclusion
    from concepts.host.gradients import training

    assert made.owners == [0, 0, 1, 1, 2, 2] and made.passes == 3
    with training(toy[0], toy[1].patcher):
        made.begin()
        assert made.parameters["residual.clip_l"].shape[0] == 3
        for step in range(8):
            anchors = made.exclusion.anchors(2, generator(0, step, "test"))
            assert sorted(made.owners[i] for i in anchors) == [0, 2]
        assert isinstance(made.exclusion, Exclusion)


def test_captions_must_describe(toy, mug_set):
    from concepts.host.concept_set import OBJECT

    bare = replace(mug_set, captions=(OBJECT,) * 5)
    with pytest.raises(ValueError, match="residual_init"):
        learn(toy, bare)
    assert len(learn(toy, bare, residual_init="random")[1]) == 5


def test_continuing_other_pictures_is_refused(toy, mug_set):
    done, _ = learn(toy, mug_set)
    fewer = replace(mug_set, **{k: getattr(mug_set, k)[:4] for k in ("latents", "masks", "captions", "mirrored")})
    with pytest.raises(CarrierMismatch, match="residuals of 5 pictures, and here are 4"):
        learn(toy, fewer, done.concept)


def test_residuals_and_target_work_in_prompts_and_files(toy, mug_set, tmp_path):
    from concepts.host.prompt import encode_prompt

    done, residuals = learn(toy, mug_set, vectors=2)
    assert [c.name for c in residuals] == [f"residual{i}" for i in range(1, 6)]
    with torch.inference_mode():
        (plain,) = encode_prompt(toy[1], "a photo of ", [])
        seen = [encode_prompt(toy[1], f"a photo of <{c.name}>", [(c, 1.0) for c in residuals])[0][0] for c in residuals]
        encode_prompt(toy[1], "<mug> with <residual2>", [(done.concept, 1.0), (residuals[1], 1.0)])
    assert len({float(c.sum()) for c in [plain[0], *seen]}) == 6
    write_concept(replace(done.concept, state={}), tmp_path / "target.safetensors")
    tensors, _ = parse(read_bytes(tmp_path / "target.safetensors"), tmp_path)
    assert {k: tuple(v.shape) for k, v in tensors.items()} == {"clip_l": (2, 64)}, "a stock embedding"


def test_noise_space_weighs_a_v_model_by_its_noise(host):
    from concepts.host.gradients import training

    made = tiny("sd2")
    with training(made.model, made.clip.patcher):
        found = {}
        for space in ("model", "noise"):
            one = session((made.model, made.clip), pictures(made.latent), space=space)
            one.begin()
            draw = generator(0, 0, "test")
            anchors = [one.exclusion.anchor(1, one.prompts.encode(1, one._rows(one.parameters, 0)), draw)]
            found[space] = one.exclusion.loss(anchors, torch.zeros_like(anchors[0].x))
        torch.testing.assert_close(found["model"], found["noise"] * (1 + anchors[0].sigma ** 2))
