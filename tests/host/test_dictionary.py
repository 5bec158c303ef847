"""Dictionaries of a real text encoder: features, corpus, learning and continuing, words, attribution."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.errors import CarrierError, CarrierMismatch
from concepts.carriers.foreign_dictionary import read_dictionary

from .tiny import COLOURS, CORPUS, SHAPES, clip, stock

pytestmark = pytest.mark.usefixtures("host")
TEXTS = ["a red mug on sand", "an umbrella, a (big:1.3) hat", "star " * 90, "wood"]


@pytest.fixture(scope="module", autouse=True)
def few_prompts(host):
    """Naming and measuring by fewer prompts than usual."""
    from concepts.host import meanings as words

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "NAMED_BY", 150)
        patch.setattr(words, "MEASURED_BY", 40)
        yield


def settings(**changes):
    from concepts.host.learn_dictionary import DictionarySettings

    return DictionarySettings(**{"name": "words", "k": 6, "expansion": 2, "steps": 12, "batch": 256, **changes})


def learn(toy, earlier=None, text=CORPUS, save_every=0, **changes):
    from concepts.host.learn_dictionary import learn_dictionary

    with torch.inference_mode():
        return learn_dictionary(toy[1], text, settings(**changes), earlier, save_every=save_every)


def test_features_are_rows_of_the_stock_conditioning(family):
    from concepts.host.token_features import read, spoken_encoder

    encoder = spoken_encoder(family)
    for text, one in zip(TEXTS, read(family, TEXTS), strict=True):
        cond = stock(family, text)[0][0]
        assert one.total == cond.shape[1] and len(one.ids) == len(one.places) == len(one.rows)
        torch.testing.assert_close(one.rows, cond[0, list(one.places)].float(), rtol=1e-4, atol=1e-4)
        plain = text.replace("(", "").replace(":1.3)", "")
        assert list(one.ids) == encoder.ids(plain)


def test_tokens_spell_words(family):
    from concepts.host.token_features import find_word, read, spoken_encoder, words_of

    encoder, (one,) = spoken_encoder(family), read(family, ["a photo of a hippogriff, a computer mouse"])
    spelled = words_of(encoder, one.ids)
    assert [w for w, _ in spelled] == ["a", "photo", "of", "a", "hippogriff", ",", "a", "computer", "mouse"]
    assert [n for _, numbers in spelled for n in numbers] == list(range(len(one.ids)))
    (beast,) = find_word(encoder, one.ids, "hippogriff")
    assert len(beast) > 1 and beast == spelled[4][1]
    assert find_word(encoder, one.ids, "computer mouse") == [spelled[7][1] + spelled[8][1]]
    assert len(find_word(encoder, one.ids, "a")) == 3 and not find_word(encoder, one.ids, "cat")


def test_words_beyond_ascii_are_spelled_as_they_are_written(family):
    from concepts.host.token_features import find_word, read, spoken_encoder, words_of

    encoder, (one,) = spoken_encoder(family), read(family, ["un café été noir"])
    spelled = words_of(encoder, one.ids)
    assert [w for w, _ in spelled] == ["un", "café", "été", "noir"]
    assert all(find_word(encoder, one.ids, word) == [numbers] for word, numbers in spelled)


@pytest.mark.parametrize(
    "text, word, count",
    [("a star, a starfish", "star", 1), ("two hats in a hatbox", "hat", 0), ("a beermug, (mug:1.2) mug's", "mug", 2)],
)
def test_words_are_not_found_inside_longer_ones(family, text, word, count):
    """T5 has pieces such as star + fish, CLIP such as beer + mug."""
    from concepts.host.token_features import find_word, read, spoken_encoder, words_of

    encoder, (one,) = spoken_encoder(family), read(family, [text])
    found = find_word(encoder, one.ids, word)
    assert len(found) == count
    assert all(numbers in [own for _, own in words_of(encoder, one.ids)] for numbers in found)


def test_a_corpus_draws_choices_and_holds_lines_back():
    from concepts.host.corpus import Corpus

    drawn = Corpus("a {red|blue} mug", 0)
    assert {drawn.prompt(n) for n in range(30)} == {"a red mug", "a blue mug"} and drawn.distinct == 0
    lines = [f"line {n}" for n in range(60)]
    one, other = Corpus("\n".join(lines), 0), Corpus("\n".join(lines), 1)
    assert one.distinct == 57 and len(one.held(100)) == 3
    assert one.apart and drawn.apart and not Corpus("a mug\na hat", 0).apart, "below twenty lines none is held back"
    rounds = one.prompts(0, 57), one.prompts(57, 57)
    assert set(rounds[0]) == set(rounds[1]) == set(lines) - set(one.held(3)) and rounds[0] != rounds[1]
    assert one.prompts(0, 9) == Corpus("\n".join(lines), 0).prompts(0, 9) != other.prompts(0, 9)
    bundled = Corpus("", 0)
    many = bundled.prompts(0, 2000)
    assert len(set(many)) > 1800 and not any(c in text for text in many for c in "{|}\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "Matryoshka by k", "Matryoshka by prefix"])
def test_every_kind_learns_saves_and_explains_more(toy, kind):
    before = {k: v.clone() for k, v in toy[1].cond_stage_model.state_dict().items()}
    done = learn(toy, kind=kind, steps=20)
    first = learn(toy, kind=kind, steps=1, seed=0)
    assert done.losses[-1] < done.losses[0] == first.losses[0]
    assert done.dictionary.info["fvu"] < first.dictionary.info["fvu"]
    assert (
        ("threshold" in done.dictionary.tensors)
        == ("threshold" in first.dictionary.tensors)
        == (done.dictionary.k == 0)
    )
    torch.testing.assert_close(done.dictionary.tensors["decoder"].norm(dim=1), torch.ones(128))
    kept = read_dictionary(done.saved)
    assert all(torch.equal(kept.tensors[k], v) for k, v in done.dictionary.tensors.items())
    assert kept.info == done.dictionary.info and done.trouble == ""
    assert all(torch.equal(v, before[k]) for k, v in toy[1].cond_stage_model.state_dict().items())


def test_what_is_reported_is_what_a_plain_pass_finds(toy, words):
    """FVU and L0 over the tokens of the held-out prompts, densely."""
    from concepts.host.corpus import Corpus
    from concepts.host.meanings import MEASURED_BY
    from concepts.host.token_features import read

    x = torch.cat([one.rows for one in read(toy[1], Corpus(CORPUS, 0).held(MEASURED_BY))]).clone()
    p = words.tensors
    z = (((x - p["mean"]) * p["scale"] - p["decoder_bias"]) @ p["encoder"].T + p["encoder_bias"]).relu()
    best = z.topk(words.k)
    z = torch.zeros_like(z).scatter(1, best.indices, best.values)
    rebuilt = (z @ p["decoder"] + p["decoder_bias"]) / p["scale"] + p["mean"]
    left = (x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()
    assert words.info["fvu"] == pytest.approx(float(left), rel=1e-3)
    assert words.info["l0"] == pytest.approx(float((z > 0).sum() / len(x)), rel=1e-3)
    assert words.info["measured_tokens"] == len(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TopK", "Matryoshka by prefix"])
def test_continuing_equals_one_run_bit_for_bit(toy, kind):
    same = {"kind": kind, "dead_after": 4}
    whole = learn(toy, steps=14, **same)
    part = learn(toy, steps=9, **same)
    rest = learn(toy, read_dictionary(part.saved), steps=5, **same)
    assert rest.losses == whole.losses
    assert all(torch.equal(rest.dictionary.tensors[k], v) for k, v in whole.dictionary.tensors.items())
    assert all(torch.equal(rest.dictionary.state[k], v) for k, v in whole.dictionary.state.items())


def test_continuing_leaves_the_earlier_dictionary_as_it_was(toy):
    """The host keeps it, and may continue from it again."""
    earlier = learn(toy, kind="BatchTopK", steps=2).dictionary
    parts = {**earlier.tensors, **earlier.state}
    before = {k: v.clone() for k, v in parts.items()}
    learn(toy, earlier, kind="BatchTopK", steps=2)
    assert "step" in parts and parts.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in parts.items())


def test_an_interrupt_keeps_the_last_step(toy, monkeypatch):
    import comfy.model_management as management

    from concepts.host import folders
    from concepts.host.progress import Progress

    def stop(self, done, latent=None):
        if done == 5:
            management.interrupt_current_processing()
            management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(Progress, "show", stop)
    with pytest.raises(management.InterruptProcessingException):
        learn(toy, name="stopped")
    (file,) = folders.dictionaries().glob("stopped*.safetensors")
    monkeypatch.undo()
    kept, whole = read_dictionary(file), learn(toy)
    assert kept.info["learned"]["steps"] == 5 and kept.state["losses"].tolist() == whole.losses[:5]
    assert learn(toy, kept, steps=7, name="stopped").losses == whole.losses


def test_memory_that_runs_out_keeps_the_last_step_and_says_what_to_lower(toy, monkeypatch):
    import comfy.model_management as management

    from concepts.host import folders
    from concepts.host.learn_dictionary import Stream

    batch = Stream.batch

    def full(self, step):
        if step == 3:
            raise management.OOM_EXCEPTION("CUDA out of memory.")
        return batch(self, step)

    monkeypatch.setattr(Stream, "batch", full)
    with pytest.raises(management.OOM_EXCEPTION, match="batch 256 and expansion 2: lower the batch or the expansion"):
        learn(toy, name="full")
    (file,) = folders.dictionaries().glob("full*.safetensors")
    assert read_dictionary(file).info["learned"]["steps"] == 3


def test_memory_that_runs_out_while_latents_are_named_keeps_all_steps(toy, monkeypatch):
    import comfy.model_management as management

    from concepts.host import folders, learn_dictionary

    def full(clip, dictionary, corpus):
        raise management.OOM_EXCEPTION("CUDA out of memory.")

    monkeypatch.setattr(learn_dictionary, "named", full)
    with pytest.raises(management.OOM_EXCEPTION, match="lower the batch or the expansion"):
        learn(toy, name="unnamed", save_every=0)
    (file,) = folders.dictionaries().glob("unnamed*.safetensors")
    kept = read_dictionary(file)
    assert kept.info["learned"]["steps"] == len(kept.state["losses"]) == settings().steps


def test_a_bad_name_is_refused_before_anything_is_learned():
    for name in ("my dog", "<mug>", ""):
        with pytest.raises(CarrierError, match="letters, digits"):
            settings(name=name)


def test_losses_shown_are_those_of_the_curve(toy, monkeypatch):
    """While it learns, and where it ends because a gradient is not finite."""
    from concepts.host import learn_dictionary
    from concepts.kernels.fit import Diverged

    shown, loss = [], learn_dictionary.DictionarySession.loss
    monkeypatch.setattr(learn_dictionary, "say", shown.append)
    curve = learn(toy).losses
    assert shown == [f"10 of 12 steps, loss {curve[9]:.4f}"]

    def broken(self, parameters, step, micro):
        more = (0 * parameters["decoder_bias"]).sum().sqrt() if step == 5 else 0  # 0, and its slope is not finite
        return loss(self, parameters, step, micro) + more

    monkeypatch.setattr(learn_dictionary.DictionarySession, "loss", broken)
    with pytest.raises(Diverged, match=rf"at step 6 \(loss before {curve[4]:.4f}\)"):
        learn(toy, name="broken")


@pytest.mark.parametrize("every, steps", [(2, 2), (3, 3), (5, 0)])
def test_what_a_broken_loss_leaves_gave_a_finite_one(toy, monkeypatch, every, steps):
    """The loss of step 5 depends on what step 4 left, that of step 6 on what step 5 left."""
    from concepts.host import folders, learn_dictionary
    from concepts.kernels.fit import Diverged

    loss = learn_dictionary.DictionarySession.loss

    def broken(self, parameters, step, micro):
        return loss(self, parameters, step, micro) * (float("nan") if step == (4 if every == 2 else 5) else 1)

    monkeypatch.setattr(learn_dictionary.DictionarySession, "loss", broken)
    there = set(folders.dictionaries().glob("*"))
    with pytest.raises(Diverged, match="lower learning rate") as error:
        learn(toy, name="left", save_every=every)
    made = set(folders.dictionaries().glob("*")) - there
    assert len(made) == bool(steps)
    assert (f"Step {steps} is" if steps else "No autosave of this run is known") in str(error.value)
    for file in made:
        assert read_dictionary(file).info["learned"]["steps"] == steps


def test_continuing_moves_no_fp64_to_the_device(toy):
    from concepts.host.corpus import Corpus
    from concepts.host.learn_dictionary import DictionarySession

    done = learn(toy, steps=2)
    with torch.inference_mode(False):
        meta = torch.device("meta")
        session = DictionarySession(toy[1], Corpus(CORPUS, 0), settings(), done.dictionary, meta)
    assert session.past == done.losses
    assert all(t.device == meta and t.dtype != torch.float64 for t in session.state.values())


def test_bf16_preselection_learns_the_same(toy):
    exact, rough = learn(toy, steps=6), learn(toy, steps=6, precision="bf16")
    assert rough.losses == pytest.approx(exact.losses, rel=2e-2)
    assert rough.losses[0] == pytest.approx(exact.losses[0], rel=1e-3)


def test_only_auxk_reaches_latents_that_never_fire(toy):
    """Encoder rows too short to be among the k largest stay as they are, until they count as dead."""
    from concepts.host.corpus import Corpus
    from concepts.host.learn_dictionary import DictionarySession
    from concepts.kernels.fit import fit

    moved = {}
    for dead_after in (3, 10**6):
        with torch.inference_mode(False), torch.enable_grad():
            own = settings(dead_after=dead_after)
            session = DictionarySession(toy[1], Corpus(CORPUS, 0), own, None, torch.device("cpu"))
            session.parameters["encoder"][64:] *= 1e-3
            start = session.parameters["encoder"][64:].clone()
            for step in fit(session.parameters, session.loss, session.optimiser(), 6):
                session.finished()
                assert step.number > 3 or torch.equal(session.parameters["encoder"][64:], start)
            moved[dead_after] = not torch.equal(session.parameters["encoder"][64:], start)
            assert bool(session.dead[64:].all()) == (dead_after == 3)
    assert moved == {3: True, 10**6: False}


def test_dead_are_those_that_learning_counted(toy):
    """Latents that are silent in the few tokens of a measurement are counted apart."""
    from concepts.host.learn_dictionary import learned_text

    fresh, late = (learn(toy, dead_after=n) for n in (10**6, 1))
    info = fresh.dictionary.info
    assert info["dead"] == 0 < info["silent"] and info["silent_tokens"] > info["measured_tokens"]
    assert late.dictionary.info["dead"] == float((late.dictionary.state["quiet"] >= 1).float().mean()) > 0
    text = learned_text(fresh)
    assert f"dead latents: 0.0%; silent in {info['silent_tokens']} measured tokens: {100 * info['silent']:.1f}%" in text


def test_settings_that_do_not_fit_are_refused(toy):
    done = learn(toy, steps=2)
    with pytest.raises(CarrierMismatch, match="Continue with the same settings"):
        learn(toy, done.dictionary, k=5)
    with pytest.raises(ValueError, match="set k to at most"):
        learn(toy, k=1000)
    with pytest.raises(CarrierMismatch, match="of tokens of 64 numbers"):
        with torch.inference_mode():
            other = clip("sdxl")
        learn((None, other), done.dictionary, steps=1)


def test_strongest_latents_are_named_after_their_words(toy, words):
    """Most colours and shapes have a strongest latent that the corpus calls by that word."""
    from concepts.host.meanings import encode_words, table

    wanted = [*COLOURS.split("|"), *SHAPES.split("|")]
    text = "\n".join(f"a photo of a {c} {s}" for c in COLOURS.split("|") for s in SHAPES.split("|"))
    with torch.inference_mode():
        codes = encode_words(toy[1], words, text, wanted)
    called = [w for w in wanted if w in words.label(codes.strongest(w, 1)[0][0], 5).split(", ")]
    assert len(called) > len(wanted) / 2, called
    assert len(codes.words["red"]) == len(SHAPES.split("|")) and codes.tokens["red"].shape[1] == 64
    shown = table(codes, 2)
    assert shown.count("active latents in") == len(wanted) and shown.count("#") == 0


def test_scores_as_small_as_gradients_are_told_apart(words):
    """And the picture draws others than of ten times these."""
    from concepts.carriers.codes import Codes
    from concepts.host.meanings import picture, table

    code = torch.zeros(1, words.size)
    code[0, :3] = torch.tensor([0.5, 12.345, 1.0])
    kept = {"mug": (torch.arange(3), torch.tensor([3.21e-5, 2e-6, 0.75]))}
    codes = Codes(words, ("a mug",), {"mug": code}, {"mug": torch.zeros(1, words.width)}, kept)
    shown = table(codes, 3)
    assert [line.split("score ")[1].split(" ")[0] for line in shown.splitlines()[1:]] == ["3.21e-05", "2e-06", "0.75"]
    larger = replace(codes, kept={word: (latents, 10 * scores) for word, (latents, scores) in kept.items()})
    assert not torch.equal(picture(codes, 2), picture(larger, 2))


def test_every_word_is_encoded_without_a_list(toy, words):
    from concepts.host.meanings import encode_words

    with torch.inference_mode():
        codes = encode_words(toy[1], words, "a red mug, a hat", [])
        assert list(codes.words) == ["a", "red", "mug", "hat"] and len(codes.words["a"]) == 2
        with pytest.raises(ValueError, match="No prompt holds cat; the words are: a, red, mug"):
            encode_words(toy[1], words, "a red mug, a hat", ["mug", "cat"])
        with pytest.raises(ValueError, match="no prompt"):
            encode_words(toy[1], words, " \n", [])
        with pytest.raises(CarrierMismatch, match="64 numbers of clip_l, this text encoder"):
            encode_words(clip("sdxl"), words, "a mug", [])
        other = replace(words, info={**words.info, "encoder": "clip_g"})
        with pytest.raises(CarrierMismatch, match="64 numbers of clip_g, this text encoder .clip_l. gives 64"):
            encode_words(toy[1], other, "a mug", [])


def test_attribution_is_activation_times_slope_of_the_loss(toy, words, mug_set):
    """Against the loss itself with each latent moved a little, the draw repeated by hand."""
    from concepts.host.attribution import gradient_scores
    from concepts.host.denoise import Denoiser, sigmas_at
    from concepts.host.meanings import encode_words
    from concepts.host.token_features import find_word, read, spoken_encoder
    from concepts.kernels.draws import generator

    text = "a photo of a red mug"
    with torch.inference_mode():
        codes = encode_words(toy[1], words, text, ["mug"])
        scores = gradient_scores(codes, toy[0], toy[1], mug_set, draws=1, seed=3)["mug"]
    active = codes.words["mug"][0].nonzero()[:, 0]
    assert set(scores.nonzero()[:, 0].tolist()) <= set(active.tolist()) and len(active) == words.k
    (one,) = read(toy[1], [text])
    (place,) = [one.places[n] for numbers in find_word(spoken_encoder(toy[1]), one.ids, "mug") for n in numbers]
    cond, facts = stock(toy[1], text)[0]
    draw = generator(3, 0, "attribution")
    d = Denoiser(toy[0])
    clean = d.clean(mug_set.latents[0][None])
    sigma = sigmas_at(d.sampling, torch.rand(1, generator=draw, dtype=torch.float64))
    noise = torch.randn(clean.shape, generator=draw)

    def loss(latent, amount):
        with torch.no_grad():
            moved = cond.clone()
            rows = cond[0, [place]].float().clone()
            moved[0, [place]] = words.coder().moved(rows, torch.full((1, 1), amount), torch.full((1, 1), int(latent)))
            estimate = d(d.noised(clean, noise, sigma), sigma, [[moved, dict(facts)]])
            return float(((estimate - clean) / sigma).square().double().mean())

    for latent in active:
        slope = (loss(latent, 0.05) - loss(latent, -0.05)) / 0.1
        wanted = abs(slope * float(codes.words["mug"][0, latent]))
        assert float(scores[latent]) == pytest.approx(wanted, rel=0.05, abs=1e-4)


def test_attribution_wants_a_prompt_per_picture(toy, words, mug_set):
    from concepts.host.attribution import gradient_scores
    from concepts.host.meanings import encode_words

    with torch.inference_mode():
        codes = encode_words(toy[1], words, "a mug\na red mug", ["mug"])
        with pytest.raises(ValueError, match="2 prompts and 5 pictures"):
            gradient_scores(codes, toy[0], toy[1], mug_set)


def test_a_mirrored_picture_has_the_prompt_of_its_original(toy, words, mug_set):
    from concepts.host.attribution import gradient_scores
    from concepts.host.meanings import encode_words

    data = replace(mug_set, **{k: v[:4] for k, v in vars(mug_set).items()})
    data = replace(data, mirrored=(False, True, False, True))
    with torch.inference_mode():
        codes = encode_words(toy[1], words, "a mug\na red hat", ["mug", "hat"])
        scores = gradient_scores(codes, toy[0], toy[1], data, draws=2)
    assert bool(scores["mug"].any()) and not bool(scores["hat"].any()), "both draws are of the first picture"


def test_one_picture_takes_its_prompts_in_turn(toy, words, mug_set):
    """Two draws of one picture with two prompts are the first draw of either, with the noise of its number."""
    from concepts.host import attribution
    from concepts.host.meanings import encode_words

    one = replace(mug_set, **{k: v[:1] for k, v in vars(mug_set).items() if isinstance(v, (list, tuple))})
    texts = ["a mug", "a red hat"]
    with torch.inference_mode():
        codes = encode_words(toy[1], words, "\n".join(texts), ["mug", "hat"])
        both = attribution.gradient_scores(codes, toy[0], toy[1], one, draws=2)
        assert all(bool(both[word].any()) for word in ("mug", "hat"))
        mug = attribution.gradient_scores(encode_words(toy[1], words, texts[0], ["mug"]), toy[0], toy[1], one, draws=1)
    torch.testing.assert_close(2 * both["mug"], mug["mug"])
