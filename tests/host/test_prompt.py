"""Prompts with concepts: equal to the stock encoder where nothing is learned, and to a stock embedding where it is."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.files import write_concept

from .tiny import FAMILIES, clip

pytestmark = pytest.mark.usefixtures("host")
PLAIN = [
    "",
    "a red mug on sand",
    "a (red:1.3) mug, ((large))",
    "a mug " * 60,
    r"a \(red\) mug",
    "embedding:nothing-here on sand",
    "a < b > c, <>, < cup >",
]


def rows(encoders, n=2, seed=0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {e.key: torch.randn(1, 1, 1, n, e.width, generator=g) for e in encoders}


def concept(clip, name="mug", n=2, seed=0, **info) -> Concept:
    from concepts.host.text import encoders

    return Concept(name, "tokens", rows(encoders(clip), n, seed), {"init_text": "mug", **info})


def stock(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def ours(clip, text, *concepts):
    from concepts.host.prompt import encode_prompt

    with torch.inference_mode():
        return encode_prompt(clip, text, [c if isinstance(c, tuple) else (c, 1.0) for c in concepts])


def equal(a, b) -> bool:
    pairs = [
        (x, y)
        for (x, p), (y, q) in zip(a, b, strict=True)
        for x, y in [(x, y), (p.get("pooled_output"), q.get("pooled_output"))]
    ]
    return all(x is y is None or torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, host):
    with torch.inference_mode():
        return clip(request.param)


@pytest.mark.parametrize("text", PLAIN)
def test_without_a_concept_it_is_the_stock_encoder(family, text):
    assert equal(ours(family, text), stock(family, text))
    assert equal(ours(family, text, concept(family)), stock(family, text))


def test_equals_the_stock_embedding_of_the_saved_file(family, tmp_path):
    """The file alone, through stock nodes only, gives the same conditioning."""
    learned = concept(family)
    write_concept(learned, tmp_path / "learned.safetensors", {"prompt": "{}"})
    for tokenizer in vars(family.tokenizer).values():
        if hasattr(tokenizer, "embedding_directory"):
            tokenizer.embedding_directory = [str(tmp_path)]
    pairs = [
        ("a photo of <mug> on sand", "a photo of embedding:learned on sand"),
        ("<mug>", "embedding:learned"),
        ("a (<mug>:1.3) and (red <mug>)", "a (embedding:learned:1.3) and (red embedding:learned)"),
        ("<mug>, on sand", "embedding:learned , on sand"),
        ("word " * 80 + "<mug>", "word " * 80 + "embedding:learned"),
        (r"a \(<mug>\) on sand", r"a \( embedding:learned \) on sand"),
        ("a :) (<mug>) b", "a :) ( embedding:learned ) b"),
        ("a (<mug> b", "a ( embedding:learned b"),
        ("a <mug>) b", "a embedding:learned ) b"),
    ]
    for mine, theirs in pairs:
        result = ours(family, mine, learned)
        assert equal(result, stock(family, theirs)), mine
        assert not equal(result, stock(family, mine.replace("<mug>", "mug"))), mine


def test_strength_0_is_the_plain_word_and_1_the_concept(family):
    learned = concept(family)
    text, plain = "a photo of <mug> on sand", stock(family, "a photo of mug on sand")
    assert equal(ours(family, text, (learned, 0.0)), plain)
    assert not equal(ours(family, text, (learned, 0.5)), plain)
    assert not equal(ours(family, text, (learned, 0.5)), ours(family, text, learned))


@pytest.mark.parametrize("text", ["a <mug>, red", "a (<mug>:1.3).", "<mug>"])
def test_a_plain_word_stands_where_its_name_stood(family, text):
    """No blank parts it from a comma, which T5 would read as another token."""
    plain = stock(family, text.replace("<mug>", "mug"))
    assert equal(ours(family, text, (concept(family), 0.0)), plain)
    assert equal(ours(family, "a<mug>s", (concept(family), 0.0)), stock(family, "a mug s"))


def test_the_clip_stays_as_it_is(family):
    tokenizers = dict(vars(family.tokenizer))
    before = stock(family, "a red mug")
    ours(family, "a <mug>", concept(family))
    assert vars(family.tokenizer) == tokenizers and equal(stock(family, "a red mug"), before)


def test_two_concepts_keep_their_places(toy):
    a, b = concept(toy[1], "one", seed=1), concept(toy[1], "two", seed=2)
    both = ours(toy[1], "<one> and <two>", a, b)
    assert equal(both, ours(toy[1], "<one> and <two>", b, a))
    assert not equal(both, ours(toy[1], "<two> and <one>", a, b))


def test_names_are_checked(toy):
    one = concept(toy[1], "one")
    with pytest.raises(ValueError, match=r"<other>.*connected concepts are: <one>"):
        ours(toy[1], "<other> on sand", one)
    with pytest.raises(ValueError, match="connected concepts are: none"):
        ours(toy[1], "<other> on sand")
    with pytest.raises(ValueError, match="rename"):
        ours(toy[1], "<one>", one, one)


def test_a_concept_of_another_model_is_refused(toy):
    wide = Concept("mug", "tokens", {"clip_l": torch.zeros(1, 1, 1, 1, 768)})
    with pytest.raises(CarrierMismatch, match=r"768.*64"):
        ours(toy[1], "<mug>", wide)
    with pytest.raises(CarrierMismatch, match="clip_g.*clip_l"):
        ours(toy[1], "<mug>", Concept("mug", "tokens", {"clip_g": torch.zeros(1, 1, 1, 1, 1280)}))


@pytest.mark.parametrize(
    "text", ["a <mug:hat:0,8>", "a <mug:>", "a < mug:hat:x > on sand", "a < mug >", "<mug>, <mug >"]
)
def test_what_is_nearly_a_mark_is_no_plain_text(family, text):
    with pytest.raises(ValueError, match="would be read as plain text; write <mug>"):
        ours(family, text, concept(family))
    text = text.replace("<mug>", "mug")
    assert equal(ours(family, text), stock(family, text)), "without the concept it is text like any other"


def test_an_encoder_that_was_not_there_in_learning_is_named(family):
    from concepts.host.text import encoders

    keys = [e.key for e in encoders(family)]
    known = concept(family)
    part = replace(known, tensors={keys[0]: known.tensors[keys[0]]}, info={"init_text": "mug", "clip": keys})
    if len(keys) == 1:
        assert ours(family, "a <mug>", part)
        return
    ours(family, "a <mug>", part)  # it was there and nothing was learned for it
    with pytest.raises(CarrierMismatch, match=f"learned with {keys[0]}, and .*{keys[1]}"):
        ours(family, "a <mug>", replace(part, info={"clip": keys[:1]}))


def test_a_residual_is_nothing_to_encoders_it_never_learned(family):
    from concepts.host.text import concept_rows, encoders

    keys = [e.key for e in encoders(family)]
    whole = concept(family, name="residual1")
    facts = {"residual_of": "mug", "clip": keys}
    part = replace(whole, tensors={keys[-1]: whole.tensors[keys[-1]]}, info=facts)
    rows = concept_rows(family, part)
    assert [rows[k].shape[-2] for k in keys] == [0] * (len(keys) - 1) + [2]
    if len(keys) > 1:
        alone, without = ours(family, "a <residual1>", part), stock(family, "a ")
        assert len(alone) == len(without)


@pytest.mark.parametrize("text", ["a photo of a <mug>", "<mug>", "a <mug>, red", "a <mug> on sand"])
def test_a_name_is_told_from_the_template_around_the_text(text):
    from concepts.host.text import TOKENS

    with torch.inference_mode():
        made = clip("z-image")
    one, two = (ours(made, text, concept(made, seed=seed)) for seed in (0, 1))
    assert not equal(one, two) and not equal(one, stock(made, text))
    said = [token for chunk in one[0][1][TOKENS]["qwen3_4b"] for token, *_ in chunk]
    assert sum(torch.is_tensor(token) for token in said) == 2
    plain = ours(made, text.replace(",", ""), (concept(made), 0.0))
    assert equal(plain, stock(made, text.replace(",", "").replace("<mug>", "mug")))


def test_a_concept_that_no_tokenizer_reads_is_named(monkeypatch):
    with torch.inference_mode():
        made = clip("sd15")
    own = made.tokenizer.tokenize_with_weights
    monkeypatch.setattr(
        type(made.tokenizer), "tokenize_with_weights", lambda self, text, *a, **k: own(text.replace(":", ""), *a, **k)
    )
    with pytest.raises(CarrierMismatch, match="SD1Tokenizer.* in the place of <mug>"):
        ours(made, "a <mug>", concept(made))


def test_tokenizers_without_their_encoder_say_nothing(caplog):
    with torch.inference_mode():
        made = clip("sd3")
    ours(made, "a <mug>", concept(made))
    assert "does not exist" not in caplog.text
