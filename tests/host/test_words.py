"""Marked words: found in the rows where the host's tokenizers put them, and refused with a sentence."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept

from .tiny import clip as tiny_clip
from .tiny import embedding, model, tiny

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module", params=["flux", "sd3", "sd15"])
def clip(request, host):
    return tiny(request.param).clip


def found(clip, text, key):
    """(word, the tokens in its rows) of every mark, for one encoder."""
    from concepts.host.text import encoders
    from concepts.host.words import PROMPT, rows_of, unmarked

    (encoder,) = (e for e in encoders(clip) if e.key == key)
    plain, marks = unmarked(text, PROMPT)
    flat = [token for chunk in clip.tokenize(plain)[encoder.slot] for token, *_ in chunk]
    rows = rows_of(clip.tokenize, [encoder], plain, marks)
    return [(m.word, [flat[r] for r in own]) for m, own in zip(marks, rows, strict=True)], rows, encoder


TEXTS = [
    "a photo of a <p:hat>",
    "<p:hat> and <p:coat>",
    "a <p:hat>, a (red <p:coat>:1.3); <p:hat>.",
    "hat, a <p:hat> and a hat beside a hatch",
    "(a (very) <p:northern lights>:1.2) over <p:northern lights:0.5>, northern lights",
    "a cat with a <p:cat> and a <p:house> of seven",
]


@pytest.mark.parametrize("text", TEXTS)
def test_words_are_where_their_tokens_are(clip, text):
    from concepts.host.text import encoders

    for key in [e.key for e in encoders(clip)]:
        pairs, rows, encoder = found(clip, text, key)
        for word, tokens in pairs:
            assert tokens == encoder.ids(word)
        every = [r for own in rows for r in own]
        assert len(set(every)) == len(every) and every == sorted(every)


def test_long_prompts_and_parts_of_words(clip):
    from concepts.host.text import encoders

    for key in [e.key for e in encoders(clip)]:
        long = "a tree, " * 40 + "a <p:hat> on a <p:coat>"
        pairs, rows, encoder = found(clip, long, key)
        assert [tokens for _, tokens in pairs] == [encoder.ids("hat"), encoder.ids("coat")]
        assert rows[0][0] > 77
        ((_, tokens),), _, _ = found(clip, "two <p:hat>s", key)
        assert tokens == encoder.ids("two hats")[len(encoder.ids("two")) :]


def test_embedding_files_beside_a_word_are_not_its_rows(clip, tmp_path):
    """The host reads them anew for every text."""
    from concepts.host.text import encoders

    file = embedding(clip, tmp_path)
    for key in [e.key for e in encoders(clip)]:
        pairs, _, encoder = found(clip, f"{file} a <p:hat> and a <p:coat> {file}", key)
        assert [tokens for _, tokens in pairs] == [encoder.ids("hat"), encoder.ids("coat")]


def test_rows_of_several_encoders_follow_each_other():
    from concepts.host.positions import read_from
    from concepts.host.words import rows_of, unmarked

    made = tiny("sd3")
    used = read_from(made.model, made.clip)
    plain, marks = unmarked("a <p:hat>")
    assert rows_of(made.clip.tokenize, used, plain, marks) == [[2]]
    doubled = [*used, *used]
    assert rows_of(made.clip.tokenize, doubled, plain, marks) == [[2, 79]]


@pytest.fixture(scope="module")
def flux(host):
    return tiny("flux").clip


def concept(name="p", words=("hat", "coat", "in", "to")) -> Concept:
    tensors = {f"word.{i}": torch.ones(1, 1, 64) for i in range(len(words))}
    info = {"words": list(words), "blocks": ["double.0"], "encoders": ["t5xxl"], "input": "dense"}
    return Concept(name, "modulation", tensors, info)


@pytest.mark.parametrize(
    "text, message",
    [
        ("a <q:hat>", "names <q:hat>, but the connected concepts are: <p>, <mug>"),
        ("a <p:shoe>", "not taught 'shoe'; its words are: hat, coat, in, to"),
        ("a <p>", "teaches single words; write one of <p:hat>, <p:coat>"),
        ("a <mug:hat>", "made of tokens and has no words of its own; write <mug>"),
        ("walk <p:in><p:to> it", "in one token of the text; put a blank between"),
    ],
)
def test_wrong_names_are_refused(flux, text, message):
    from concepts.host.prompt import encode_prompt

    mug = Concept("mug", "tokens", {"t5xxl": torch.ones(1, 1, 1, 1, 64)}, {"init_text": "mug"})
    with torch.inference_mode(), pytest.raises(ValueError, match=message):
        encode_prompt(flux, text, [(concept(), 1.0), (mug, 1.0)])


@pytest.mark.parametrize("longer", ["clip_l", "clip_g"])
def test_rows_behind_clips_of_unequal_chunks(longer):
    """The host cuts the longer of CLIP-L and CLIP-G, and T5's rows begin behind the shorter."""
    from concepts.host.positions import columns_of, read_from
    from concepts.host.prompt import encode_prompt
    from concepts.host.text import TOKENS, encoders
    from concepts.host.variants import PROMPTS

    with torch.inference_mode():
        sd3, flow = tiny_clip("sd3 t5"), model("sd3")
        found = {e.key: e for e in encoders(sd3)}
        used = [e.key for e in read_from(flow, sd3)]
        mug = Concept("mug", "tokens", {longer: torch.ones(1, 1, 1, 4, found[longer].width)}, {"init_text": "mug"})
        words = replace(concept(), info={**concept().info, "encoders": used})
        text = "a <p:hat> beside a <mug> and " + "x " * 66 + "<p:coat>"
        (entry,) = encode_prompt(sd3, text, [(mug, 1.0), (words, 1.0)], cached=True)
        tokens, t5 = entry[1][TOKENS], found["t5xxl"]
        chunks = {key: len(tokens[found[key].slot]) for key in ("clip_l", "clip_g")}
        assert chunks == {"clip_l": 1, "clip_g": 1} | {longer: 2}
        own = t5.model.encode_token_weights(tokens["t5xxl"])[0]
        columns = columns_of(flow, sd3, text, [mug], ["hat", "coat"])
    assert entry[0].shape[1] == columns.shape[1] == 77 + own.shape[1]
    ids = [None if torch.is_tensor(token) else token for token, *_ in tokens["t5xxl"][0]]
    places = [place.positions for mark in entry[1][PROMPTS] for place in mark.places]
    for number, (word, rows) in enumerate(zip(("hat", "coat"), places, strict=True)):
        piece = t5.ids(word)
        start = next(n for n in range(len(ids)) if ids[n : n + len(piece)] == piece)
        behind = [row for row in rows if row >= 77]
        assert torch.equal(entry[0][0, behind], own[0, start : start + len(piece)])
        assert columns[0, :, number].nonzero().flatten().tolist() == list(rows)
    assert min(places[0]) == 2 and (min(places[1]) < 77) == (used[0] != longer)


def test_marks_are_read_and_taken_out():
    from concepts.host.words import CAPTION, unmarked

    plain, marks = unmarked("A girl with a [Computer  Mouse] and [hat].", CAPTION)
    assert plain == "A girl with a Computer  Mouse and hat."
    assert [(m.word, plain[m.start : m.end]) for m in marks] == [("computer mouse", "Computer  Mouse"), ("hat", "hat")]
    plain, marks = unmarked("<a: red hat >, <b:hat: .8 > <b:hat:0,8>")
    assert plain == "red hat, hat <b:hat:0,8>"
    assert [(m.word, m.strength) for m in marks] == [("red hat", 1), ("hat", 0.8)]
    plain, marks = unmarked("<a:hat>, <b:hat:0.8> <c> <d:hat:-1.5> [x]")
    assert plain == "hat, hat <c> hat [x]" and [(m.name, m.strength) for m in marks] == [
        ("a", 1),
        ("b", 0.8),
        ("d", -1.5),
    ]


def test_cached_directions_of_another_number_of_pieces_are_their_mean():
    from concepts.host.words import Mark, Word, directions_of

    stored = torch.arange(12.0).reshape(1, 3, 4)
    info = {"words": ["hat"], "blocks": ["double.0"], "encoders": ["t5xxl"], "input": "dense"}
    word = Word(Mark("p", "hat", 1.0, 0, 3), Concept("p", "modulation", {"word.0": stored}, info), 2.0)
    torch.testing.assert_close(directions_of(word, torch.zeros(3, 9)), 2 * stored.movedim(1, 0))
    mean = 2 * stored.mean(1).expand(2, -1)[:, None]
    torch.testing.assert_close(directions_of(word, torch.zeros(2, 9)), mean)
