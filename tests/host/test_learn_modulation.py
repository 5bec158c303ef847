"""Learning directions of words on the host's own classes: stages, isolation, continuation, use in a prompt."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import write_concept
from concepts.carriers.foreign import read_any
from concepts.carriers.modulation import words as cached_of

from .test_learn import same
from .test_modulation import hooks, near, prompt, sample
from .tiny import tiny

pytestmark = pytest.mark.usefixtures("host")
CAPTIONS = "a girl with a [hat] and a [coat]\nA [coat], a [hat] on a girl"


@pytest.fixture(scope="module", params=["flux", "sd3"])
def made(request, toy):
    """A tiny model; the toy world's fixture sends outputs to a folder of the run."""
    found = tiny(request.param)
    found.family = request.param
    return found


@pytest.fixture(scope="module")
def flux(toy):
    found = tiny("flux")
    found.family = "flux"
    return found


def pictures(count=1, size=(8, 8), seed=0, mirrored=None):
    from concepts.host.concept_set import ConceptSet

    g = torch.Generator().manual_seed(seed)
    latents = tuple(torch.randn(16, *size, generator=g) for _ in range(count))
    return ConceptSet(latents, (None,) * count, (("a photo of {}",),) * count, mirrored or (False,) * count)


def settings(**changes):
    from concepts.host.learn_modulation import ModulationSettings

    given = {"steps": 4, "shared_steps": 2, "captions": CAPTIONS, "learning_rate": 1e-2, "hidden": 16, **changes}
    return ModulationSettings("p", **given)


def codes_of(made, text="a hat on a coat", words=("hat", "coat"), m=64, k=12, keep=0, seed=1):
    """Codes of words in a random dictionary, pruned to ``keep`` latents each unless 0."""
    from concepts.carriers.codes import contrast, prune
    from concepts.carriers.dictionary import Dictionary
    from concepts.host.meanings import encode_words
    from concepts.host.token_features import read

    with torch.inference_mode():
        d = read(made.clip, [text])[0].rows.shape[1]
        g = torch.Generator().manual_seed(seed)
        rows = torch.nn.functional.normalize(torch.randn(m, d, generator=g))
        parts = {"encoder": rows, "decoder": rows, "encoder_bias": torch.zeros(m), "decoder_bias": torch.zeros(d)}
        parts |= {"mean": torch.randn(d, generator=g) / 9, "scale": torch.full((d,), 3.0)}
        found = encode_words(made.clip, Dictionary("random", parts, k), text, list(words))
        return prune(found, contrast(found), keep, exclusive=True) if keep else found


def learn(made, data=None, earlier=None, others=None, codes=None, checkpointing="off", **changes):
    """One run as a node does it, in inference mode."""
    from concepts.host import learn as learning
    from concepts.host.learn_modulation import ModulationSession

    with torch.inference_mode():
        session = ModulationSession(
            made.model, made.clip, data or pictures(), settings(**changes), earlier, others=others, codes=codes
        )
        return learning.learn(session, preview_every=2, save_every=2, checkpointing=checkpointing)


def test_it_learns_and_leaves_the_model_as_it_was(made):
    before = {k: v.detach().clone() for k, v in made.model.model.state_dict().items()}
    plain = sample(made, prompt(made, "a girl with a hat and a coat"))
    done = learn(made, steps=24, shared_steps=12)
    assert done.after < done.before
    assert hooks(made) == 0 and same(before, made.model.model.state_dict())
    assert torch.equal(sample(made, prompt(made, "a girl with a hat and a coat")), plain)
    info = done.concept.info
    assert info["words"] == ["coat", "hat"] and info["steps"] == 24 and len(info["blocks"]) in (6, 2)
    assert not near(sample(made, prompt(made, "a girl with a <p:hat> and a <p:coat>", done.concept)), plain)


@pytest.mark.parametrize("coded", [None, 0, 4])
def test_a_prompt_sees_what_learning_saw(made, coded):
    """Live directions in the caption's own words give the preview's picture; the cached ones are their mean.

    ``coded``: latents that are kept per word, 0 for all active ones; None: the rows themselves.
    """
    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training
    from concepts.host.learn_modulation import ModulationSession
    from concepts.host.variants import PROMPTS

    codes = None if coded is None else codes_of(made, keep=coded)
    done = learn(made, captions="a [hat] on a [coat]", shared_steps=1, codes=codes)
    with torch.inference_mode():
        session = ModulationSession(
            made.model, made.clip, pictures(), settings(captions="a [hat] on a [coat]"), done.concept, codes=codes
        )
        with training(made.model, made.clip.patcher), torch.no_grad():
            session.begin()
            x, sigma = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.7])
            expected = session.denoiser(x, sigma, *session.condition(session.parameters, [0], [0], sigma))
    ((cond, facts),) = prompt(made, "a <p:hat> on a <p:coat>", done.concept)
    places = {p.positions: p.directions for p in facts[PROMPTS][0].places}
    stored = prompt(made, "a <p:hat> on a <p:coat>", done.concept, cached=True)[0][1][PROMPTS][0].places
    assert all(torch.allclose(p.directions, places[p.positions], atol=1e-5) for p in stored)
    assert [p.directions.shape[1] for p in stored] == [len(done.concept.info["blocks"])] * 2
    from concepts.host.show import changed

    entry, change = changed([cond, facts | {"guidance": 1.0}])
    with torch.inference_mode():
        got = Denoiser(made.model)(x, sigma, [entry], change)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_first_stage_has_one_direction_and_the_second_adds_to_it(flux):
    first = learn(flux, steps=2, shared_steps=2).concept
    assert all(len(v) == 1 for v in cached_of(first.tensors, first.info).values())
    assert not first.tensors["controller.block.out.weight"].any()
    second = learn(flux, earlier=first, steps=2, shared_steps=2).concept
    assert all(len(v) == 6 for v in cached_of(second.tensors, second.info).values())
    double = learn(flux, blocks="double blocks").concept
    assert double.info["blocks"] == ["double.0", "double.1", "double.2"]
    assert all((len(v), v.shape[2]) == (3, 64) for v in cached_of(double.tensors, double.info).values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype, cast", [("bfloat16", None), ("float8_e4m3fn", torch.float32)])
def test_base_weights_of_other_types_stay_and_words_learn(toy, dtype, cast):
    made = tiny("flux", dtype=getattr(torch, dtype), cast=cast)
    before = {k: v.detach().clone() for k, v in made.model.model.diffusion_model.named_parameters()}
    done = learn(made, steps=3, shared_steps=1)
    assert all(v.dtype == torch.float32 for v in done.concept.tensors.values())
    assert all(float(v.norm()) > 0 for v in cached_of(done.concept.tensors, done.concept.info).values())
    after = dict(made.model.model.diffusion_model.named_parameters())
    assert all(torch.equal(v.view(torch.uint8), after[k].view(torch.uint8)) for k, v in before.items())


def test_it_is_no_file_of_other_programs(flux):
    from concepts.host import folders

    done = learn(flux, steps=1)
    for folder in ("embeddings", "loras"):
        with pytest.raises(ValueError, match="only Concept Prompt can do"):
            folders.home(folder, done.concept)
    assert folders.home("concepts", done.concept).name == "concepts"


def test_times_follow_the_stage(flux):
    from concepts.host.learn_modulation import ModulationSession

    with torch.inference_mode():
        session = ModulationSession(flux.model, flux.clip, pictures(), settings(shared_steps=10))
        other = ModulationSession(flux.model, flux.clip, pictures(), settings(time_law="uniform", time_low=0.5))
    above = [
        float((session.times(4000, step, torch.Generator().manual_seed(0)) >= 0.8).double().mean()) for step in (9, 10)
    ]
    assert above == pytest.approx([0.92, 0.08], abs=0.02)
    assert other.times(100, 0, torch.Generator()).min() >= 0.5


def test_the_papers_times_are_noise_levels_whatever_the_shift(made):
    """Sampling shifts 0.8 to 0.92 and more; the border between the stages is the share of noise itself."""
    from concepts.host.denoise import Denoiser
    from concepts.host.learn_modulation import ModulationSession

    made.model.model.model_sampling.set_parameters(shift=3.0)
    when, found = torch.tensor([0.2, 0.8], dtype=torch.float64), []
    for law in ("two stages", "uniform"):
        session = ModulationSession(made.model, made.clip, pictures(), settings(time_law=law))
        session.denoiser = Denoiser(made.model)
        found.append(session.sigmas(when))
    torch.testing.assert_close(found[0], when.float())
    assert float(found[1][1]) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"isolation": 1.0}, {"accumulate": 2, "batch": 2}], ids=str)
def test_continued_equals_one_run(made, changes, tmp_path):
    others = pictures(3, seed=5)
    if changes.get("isolation"):
        changes = {**changes, "isolation_prompts": "a boat\na tree\na house"}
    kept = others if changes.get("isolation") else None
    whole = learn(made, others=kept, steps=5, shared_steps=2, **changes)
    first = learn(made, others=kept, steps=3, shared_steps=2, **changes)
    write_concept(first.concept, tmp_path / "first.safetensors")
    earlier = read_any(tmp_path / "first.safetensors")
    rest = learn(made, others=kept, earlier=earlier, steps=2, shared_steps=2, **changes)
    assert same(whole.concept.tensors, rest.concept.tensors) and same(whole.concept.state, rest.concept.state)
    assert whole.losses == rest.losses


@pytest.mark.slow
def test_a_coded_concept_continues_and_survives_its_file(flux, tmp_path):
    codes = codes_of(flux, keep=4)
    given = {"codes": codes, "captions": "a [hat] on a [coat]", "shared_steps": 2}
    whole, first = (learn(flux, steps=n, **given) for n in (5, 3))
    write_concept(first.concept, tmp_path / "first.safetensors")
    rest = learn(flux, earlier=read_any(tmp_path / "first.safetensors"), steps=2, **given)
    assert same(whole.concept.tensors, rest.concept.tensors) and whole.losses == rest.losses
    info, kept = whole.concept.info, whole.concept.tensors["reading.kept"]
    assert (
        info["input"] == "codes"
        and info["dictionary"] == "random"
        and "controller.shared.in.bias" not in whole.concept.tensors
    )
    assert kept.sum(1).tolist() == [4, 4] and kept.shape[1] == len(info["latents"]) == 8, "exclusive: no latent twice"
    assert codes.kept["hat"][0].sort().values.tolist() == [
        n for n, k in zip(info["latents"], kept[1], strict=True) if k
    ]
    with pytest.raises(CarrierMismatch, match="other latents per word"):
        other = first.concept.tensors | {"reading.kept": torch.ones_like(kept)}
        learn(flux, earlier=replace(first.concept, tensors=other), steps=1, **given)
    for other in (codes_of(flux, keep=4, seed=2), codes_of(flux, keep=3), None):
        with pytest.raises(CarrierMismatch, match="other latents or another"):
            learn(flux, earlier=first.concept, steps=1, **{**given, "codes": other})


def test_a_word_without_an_active_latent_is_named(flux):
    done = learn(flux, codes=codes_of(flux, keep=1), captions="a [hat] on a [coat]")
    deaf = dict(done.concept.tensors) | {"reading.threshold": done.concept.tensors["reading.threshold"] + 1e3}
    with pytest.raises(CarrierMismatch, match="None of the latents.*'hat'.*cached"):
        prompt(flux, "a <p:hat>", replace(done.concept, tensors=deaf))
    prompt(flux, "a <p:hat>", replace(done.concept, tensors=deaf), cached=True)


def test_a_word_without_an_active_latent_in_the_captions_is_named(flux):
    codes = codes_of(flux, keep=1)
    deaf = replace(codes.dictionary, tensors=codes.dictionary.tensors | {"threshold": torch.full((64,), 1e3)})
    with pytest.raises(CarrierMismatch, match="None of the latents of 'coat' is active where the captions have it"):
        learn(flux, codes=replace(codes, dictionary=deaf), captions="a [hat] on a [coat]")


def test_captions_of_learned_names_and_marked_isolation_lines(flux):
    from concepts.host.learn_modulation import ModulationSession

    with pytest.raises(ValueError, match="name <mug>"):
        learn(flux, captions="<mug> beside a [hat]")
    lines = settings(isolation=1.0, isolation_prompts="a [boat]\n a tree")
    assert ModulationSession(flux.model, flux.clip, pictures(), lines).beside == ["a boat", "a tree"]


def test_codes_that_do_not_fit_are_refused(flux, monkeypatch):
    from concepts.host import learn_modulation

    with pytest.raises(CarrierMismatch, match="The captions mark girl, but codes has: hat, coat"):
        learn(flux, codes=codes_of(flux), captions="a [hat] on a [girl]")
    both = learn_modulation.read_from(flux.model, flux.clip) * 2
    monkeypatch.setattr(learn_modulation, "read_from", lambda model, clip: both)
    with pytest.raises(CarrierMismatch, match="codes work with Flux"):
        learn(flux, codes=codes_of(flux), captions="a [hat] on a [coat]")


@pytest.mark.slow
def test_checkpointing_changes_nothing(made):
    plain, recomputed = (learn(made, batch=2, checkpointing=c).concept for c in ("off", "on"))
    for key, value in plain.tensors.items():
        torch.testing.assert_close(value, recomputed.tensors[key], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_an_interrupt_keeps_the_concept_and_the_host(flux, monkeypatch):
    import comfy.model_management as management

    from concepts.host import folders
    from concepts.host import learn as learning

    show = learning.Progress.show

    def pressed(self, done, *pictures):
        show(self, done, *pictures)
        if done == 3:
            raise management.InterruptProcessingException()

    monkeypatch.setattr(learning.Progress, "show", pressed)
    with pytest.raises(management.InterruptProcessingException):
        learn(flux, steps=9, seed=11)
    monkeypatch.undo()
    newest = max(folders.output("autosave").glob("p*.safetensors"), key=lambda f: f.stat().st_mtime_ns)
    assert read_any(newest).info["steps"] == 3 and hooks(flux) == 0
    rest = learn(flux, earlier=read_any(newest), steps=6, seed=11)
    assert same(rest.concept.tensors, learn(flux, steps=9, seed=11).concept.tensors)


@pytest.mark.slow
def test_isolation_holds_the_other_half(flux):
    """Its term is reported, is zero without directions, and falls when it weighs a lot."""
    others = pictures(2, seed=5)
    given = {"others": others, "isolation_prompts": "a boat\na tree", "steps": 14, "shared_steps": 14}
    weak, strong = learn(flux, isolation=1e-6, **given), learn(flux, isolation=100.0, **given)
    drift = [sum(d.terms["isolation"][-6:]) / w for d, w in ((weak, 1e-6), (strong, 100.0))]
    assert 0 < drift[1] < 0.5 * drift[0]
    beside = [bool(v) for v in weak.terms["isolation"]]
    assert not all(beside) and any(beside), "in some steps the picture stands alone"
    assert weak.terms["isolation"][beside.index(True)] < 1e-6 * max(drift)


def test_isolation_pictures_are_drawn_when_nobody_connects_them(flux, monkeypatch):
    from concepts.host import class_pictures

    monkeypatch.setattr(class_pictures, "STEPS", 2)
    done = learn(flux, isolation=1.0, isolation_prompts="a boat\na tree", steps=3)
    assert "isolation" in done.terms and len(done.terms["isolation"]) == 3


def test_isolation_pictures_of_one_text_differ(flux, monkeypatch):
    from concepts.host import class_pictures, isolation

    monkeypatch.setattr(class_pictures, "STEPS", 1)
    made = isolation.drawn(flux.model, flux.clip, pictures(), ["a boat"] * 2, 0)
    assert not torch.allclose(*made.latents, atol=1e-2)


def test_the_isolation_caption_names_both_halves_and_marks_the_left_words_alone():
    from concepts.host.isolation import HALVES
    from concepts.host.words import CAPTION, unmarked

    plain, marks = unmarked(HALVES.format("a [hat]", "a hat on a table"), CAPTION)
    assert plain.startswith("A picture divided into two parts. The left part is a hat. The right part is a hat on")
    assert [plain[m.start : m.end] for m in marks] == ["hat"] and marks[0].start == plain.index("hat")


def test_what_does_not_fit_is_refused(flux):
    from concepts.host.learn_modulation import ModulationSession

    with pytest.raises(CarrierMismatch, match="does not modulate text tokens"):
        learn(tiny("sd15"))
    two = replace(pictures(2), latents=(torch.zeros(16, 8, 8), torch.zeros(16, 8, 12)))
    with pytest.raises(ValueError, match="side by side, and these have 2 sizes"):
        learn(flux, two, isolation=1.0)
    for others, prompts, message in (
        (pictures(2, (8, 12)), "a\nb", "as large as"),
        (pictures(2), "a boat", "one line per picture"),
        (pictures(2), "", "one line per picture"),
    ):
        with torch.inference_mode(), pytest.raises(ValueError, match=message):
            ModulationSession(
                flux.model, flux.clip, pictures(), settings(isolation=1.0, isolation_prompts=prompts), others=others
            )
    other = learn(flux, steps=1, hidden=8).concept
    with pytest.raises(CarrierMismatch, match="continue with the same node"):
        learn(flux, earlier=other)


def test_the_graph_learns_saves_loads_and_draws(flux, tmp_path):
    """Both nodes as a workflow runs them, with a file between them."""
    from concepts.host.variants import PROMPTS
    from concepts.nodes.modulation import LearnModulation
    from concepts.nodes.prompt import EncodePrompt

    values = {
        w.id: w.default for w in LearnModulation.define_schema().inputs if getattr(w, "default", None) is not None
    }
    values |= {"captions": CAPTIONS, "steps": 3, "shared_steps": 2, "hidden": 16, "isolation_prompts": "a boat"}
    with torch.inference_mode():
        done = LearnModulation.execute(
            model=flux.model, clip=flux.clip, concept_set=pictures(), isolation_set=pictures(seed=2), **values
        )
        concept, curve, losses, latents, report = done.args
        assert "hat: a direction for each of 6 blocks" in report and "isolation loss" in report
        assert curve.ndim == 4 and len(losses["loss"]) == 3 and latents["samples"].shape[1:] == (16, 8, 8)
        write_concept(concept, tmp_path / "picture1.safetensors")
        read = replace(read_any(tmp_path / "picture1.safetensors"), name="other")
        made = [
            EncodePrompt.execute(flux.clip, f"a <{c.name}:hat:2>", 0.5, {"concept0": c}, **more).args[0]
            for c, more in ((concept, {}), (read, {}), (read, {"directions": "cached"}))
        ]
    first, again, cached = (m[0][1][PROMPTS][0].places[0].directions for m in made)
    assert torch.equal(first, again) and not torch.equal(again, cached)
    assert torch.equal(sample(flux, made[0]), sample(flux, made[1]))
