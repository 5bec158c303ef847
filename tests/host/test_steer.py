"""Latents of a word turned up, down and off in the conditioning of a prompt."""

import pytest
import torch

from concepts.carriers.dictionary import Dictionary
from concepts.carriers.errors import CarrierMismatch

from .tiny import stock, tiny

pytestmark = pytest.mark.usefixtures("host")
PROMPTS = ("a red mug on sand", "a (red:1.4) mug, (on:0.6) sand", "a red mug " * 30)


def steer(given, cond, dictionary, latents="3", mode="add", amount=2.0, text="a red mug on sand", word="mug"):
    from concepts.host.steer import steered

    with torch.inference_mode():
        return steered(given, cond, dictionary, text, word, latents, mode, amount)


def dictionary_for(given) -> Dictionary:
    """Random latents of the right width."""
    from concepts.host.token_features import read

    d = read(given, ["a"])[0].rows.shape[1]
    g = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.normalize(torch.randn(40, d, generator=g))
    parts = {"encoder": rows, "encoder_bias": torch.zeros(40), "decoder": rows, "decoder_bias": torch.zeros(d)}
    return Dictionary("random", parts | {"mean": torch.zeros(d), "scale": torch.full((d,), 3.0)}, 5)


def test_only_the_words_rows_move(family):
    from concepts.host.token_features import find_word, read, spoken_encoder

    given, text = dictionary_for(family), "a red mug on sand"
    before = stock(family, text)
    after, report = steer(family, before, given, "3, 7")
    (one,) = read(family, [text])
    (numbers,) = find_word(spoken_encoder(family), one.ids, "mug")
    places = [one.places[n] for n in numbers]
    change = (after[0][0] - before[0][0])[0].float()
    assert change.abs().sum(1).nonzero()[:, 0].tolist() == places
    wanted = 2 * (given.tensors["decoder"][3] + given.tensors["decoder"][7]) / 3
    torch.testing.assert_close(change[places], wanted.expand(len(places), -1), rtol=1e-3, atol=1e-4)
    pooled = before[0][1].get("pooled_output")
    assert pooled is None or torch.equal(after[0][1]["pooled_output"], pooled)
    assert f"{len(places)} tokens" in report and "mug #3: " in report


def test_without_a_word_every_row_moves(toy, words):
    before = stock(toy[1], "a red mug on sand")
    change = (steer(toy[1], before, words, word=" ")[0][0][0] - before[0][0])[0]
    wanted = 2 * words.tensors["decoder"][3] / words.tensors["scale"]
    torch.testing.assert_close(change, wanted.expand_as(change), rtol=1e-3, atol=1e-4)


def test_amounts_that_change_nothing_give_the_conditioning_itself(toy, words):
    before = stock(toy[1], "a red mug on sand")
    assert steer(toy[1], before, words, mode="add", amount=0.0)[0] is before
    assert steer(toy[1], before, words, mode="scale", amount=1.0)[0] is before


def test_scaling_by_zero_takes_a_latent_away(toy, words):
    from concepts.host.meanings import encode_words

    with torch.inference_mode():
        latent, value = encode_words(toy[1], words, "a red mug on sand", ["mug"]).strongest("mug", 1)[0]
    before = stock(toy[1], "a red mug on sand")
    after, report = steer(toy[1], before, words, str(latent), "scale", 0.0)
    assert f"mug #{latent}: {value:.3f} -> 0.000" in report
    change = (after[0][0] - before[0][0])[0]
    row = change[change.abs().sum(1).nonzero()[0, 0]]
    torch.testing.assert_close(
        row, -value * words.tensors["decoder"][latent] / words.tensors["scale"], rtol=1e-3, atol=1e-4
    )
    idle = next(
        n
        for n in range(words.size)
        if n != latent and "0.000" in steer(toy[1], before, words, str(n))[1].split("->")[0]
    )
    assert torch.equal(steer(toy[1], before, words, str(idle), "scale", 0.0)[0][0][0], before[0][0])


def test_steering_what_is_not_there_is_refused(toy, words):
    before = stock(toy[1], "a red mug on sand")
    for changes, message in [
        ({"word": "cat"}, "its words are: a, red, mug, on, sand"),
        ({"latents": "999999"}, "no latent of words"),
        ({"latents": " "}, "latents is empty; write numbers from 0 to"),
        ({"latents": "1.5"}, "no latent"),
        ({"mode": "twist"}, "add, scale"),
        ({"text": "a <mug> on sand"}, "plain prompts"),
        ({"text": "a mug " * 60}, "connect the conditioning of the same prompt"),
    ]:
        with pytest.raises(ValueError, match=message):
            steer(toy[1], before, words, **changes)


@pytest.mark.parametrize("text", PROMPTS)
def test_several_in_a_row_take_the_same_text(family, text):
    """The second one finds rows that the first one changed, by a word or all of them."""
    given = dictionary_for(family)
    cond = stock(family, text)
    for word in ("mug", "", "red"):
        cond, _ = steer(family, cond, given, text=text, word=word, amount=40.0)
    for rounded in (cond[0][0].bfloat16(), cond[0][1]), (stock(family, text)[0][0].bfloat16(), {}):
        assert "mug #3" in steer(family, [rounded], given, text=text)[1]


@pytest.mark.parametrize("other", ["a red hat on sand", "a mug on red sand", "mug"])
def test_another_prompt_of_the_same_length_is_refused(family, other):
    given, text = dictionary_for(family), "a red mug on sand"
    for cond in (stock(family, other), steer(family, stock(family, other), given, text=other, word="")[0]):
        with pytest.raises(ValueError, match="The conditioning is not that of 'a red mug on sand'"):
            steer(family, cond, given, text=text)


@pytest.mark.parametrize("other", ["a red hat on sand", "a green mug on sand", "a mug on red sand"])
def test_words_of_another_prompt_are_told_from_a_trained_encoders(toy, words, other):
    with pytest.raises(ValueError, match="The conditioning is not that of"):
        steer(toy[1], stock(toy[1], other), words)


def test_rows_that_hooks_of_a_schedule_change_are_taken(toy, words):
    """They are others than the encoder's own, and so tell nothing about the prompt."""
    ((cond, facts),) = stock(toy[1], "a red mug on sand")
    changed, scheduled = [[cond * 1.5, facts]], toy[1].clone()
    with pytest.raises(ValueError, match="The conditioning is not that of"):
        steer(toy[1], changed, words)
    scheduled.use_clip_schedule = True
    assert "mug #3" in steer(scheduled, changed, words)[1]


def test_words_behind_a_concept_are_found_by_the_tokens_of_its_prompt(family):
    """Their rows are others than in a plain prompt, their places are the same for a word of as many tokens."""
    from concepts.carriers.concept import Concept
    from concepts.host.prompt import encode_prompt
    from concepts.host.text import encoders
    from concepts.host.token_features import spoken_encoder

    given, pieces, text = dictionary_for(family), len(spoken_encoder(family).ids("mug")), "a red mug on sand"
    for count in (pieces, pieces + 1):
        rows = {e.key: torch.randn(1, 1, 1, count, e.width) for e in encoders(family)}
        with torch.inference_mode():
            cond = encode_prompt(family, "a red <x> on sand", [(Concept("x", "tokens", rows), 0.7)])
        if count > pieces:
            with pytest.raises(ValueError, match="is not that of"):
                steer(family, cond, given, word="sand", text=text)
            continue
        for word in ("sand", "mug"):
            cond, report = steer(family, cond, given, word=word, text=text)
            assert f"{word} #3" in report
        with pytest.raises(ValueError, match="is not that of"):
            steer(family, cond, given, word="sand", text="a red mug in sand")


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_modulated_words_stay_so(host, name):
    """In whichever order: directions hang on marks, which steering keeps."""
    from concepts.host.modulation import attach

    from .test_modulation import places_of, prompt, sample, taught

    made = tiny(name)
    made.family = name
    given, marked = dictionary_for(made.clip), prompt(made, "a red <p:hat> on sand", taught(made))
    plain = steer(made.clip, stock(made.clip, "a red hat on sand"), given, text="a red hat on sand", word="hat")[0]
    got, report = steer(made.clip, marked, given, text="a red hat on sand", word="hat")
    with torch.inference_mode():
        expected = [attach(entry, places_of(marked)) for entry in plain]
    drawn = sample(made, got, cfg=3.0)
    assert "hat #3" in report and torch.equal(drawn, sample(made, expected, cfg=3.0))
    assert not any(torch.equal(drawn, sample(made, other, cfg=3.0)) for other in (plain, marked))


def test_rows_per_layer_are_refused(toy, words):
    from concepts.carriers.concept import Concept
    from concepts.host.prompt import encode_prompt
    from concepts.host.variants import layers_of

    names = layers_of(toy[0].model.diffusion_model)
    layered = Concept("x", "tokens", {"clip_l": torch.randn(1, len(names), 1, 1, 64)}, {"layers": names})
    with torch.inference_mode():
        cond = encode_prompt(toy[1], "a red <x> on sand", [(layered, 1.0)])
    with pytest.raises(CarrierMismatch, match="per stage, layer or role"):
        steer(toy[1], cond, words)
