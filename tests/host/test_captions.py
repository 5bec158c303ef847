"""Captions with marked words, for one picture and for several."""

import pytest
import torch

from .test_learn_modulation import pictures
from .test_variants import concept
from .tiny import FAMILIES, clip, embedding, tiny

pytestmark = pytest.mark.usefixtures("host")


def test_captions_of_several_pictures():
    from concepts.host.captions import marked_captions

    text = "a [hat]\nthe [hat]\n\na [coat]\n"
    assert marked_captions(text, pictures(2)) == (("a [hat]", "the [hat]"), ("a [coat]",))
    mirrored = pictures(4, mirrored=(False, True, False, True))
    assert marked_captions(text, mirrored) == (("a [hat]", "the [hat]"),) * 2 + (("a [coat]",),) * 2
    assert marked_captions("a [hat]", pictures(3)) == (("a [hat]",),) * 3


@pytest.mark.parametrize(
    "text, count, message",
    [
        (" \n", 1, "no caption"),
        ("a hat", 1, "marks no word"),
        ("a [hat]\na [coat]", 1, "do not mark the same words \\(coat, hat\\)"),
        ("a [hat]\n\na [coat]", 3, "3 pictures and 2 blocks"),
    ],
)
def test_captions_that_cannot_be_learned_are_refused(text, count, message):
    from concepts.host.captions import marked_captions

    with pytest.raises(ValueError, match=message):
        marked_captions(text, pictures(count))


@pytest.mark.parametrize("family", FAMILIES)
def test_captions_encoded_together_are_as_each_alone(family, monkeypatch):
    """Contexts, pooled vectors and gradients, with weights on words; every encoder runs once."""
    from concepts.host.captions import Prompts
    from concepts.host.gradients import training
    from concepts.host.text import encoders

    made, runs = tiny(family), []
    with training(made.model, made.clip.patcher):
        found = encoders(made.clip)
        draw = torch.Generator().manual_seed(0)
        rows = [{e.key: torch.randn(2, e.width, generator=draw).requires_grad_() for e in found} for _ in range(2)]
        texts = ["a photo of {}", "a (red:1.4) {} on grass"]
        prompts = Prompts(made.clip, texts, "thing", {"": dict.fromkeys(rows[0], 2)})
        prompts.ready()
        groups = [(0, [{"": rows[0]}]), (1, [{"": rows[1]}, {"": rows[0]}]), (1, [{"": rows[0]}])]

        def gradients(entries):
            total = sum((n + 1) * (e[0].square().mean() + _of(e[1])) for n, e in enumerate(entries))
            return torch.autograd.grad(total, [r for one in rows for r in one.values()])

        def _of(extra):
            return 0 if extra["pooled_output"] is None else extra["pooled_output"].square().mean()

        for encoder in found:
            forward = encoder.model.transformer.forward
            monkeypatch.setattr(
                encoder.model.transformer,
                "forward",
                lambda *a, _own=forward, _key=encoder.key, **k: runs.append(_key) or _own(*a, **k),
            )
        together = prompts.encode_groups(groups)
        assert sorted(runs) == sorted(e.key for e in found)
        alone = [prompts.encode_all(index, variants) for index, variants in groups]
        for (contexts, entry), (own, other) in zip(together, alone, strict=True):
            torch.testing.assert_close(contexts, own, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(entry[1], other[1], rtol=1e-4, atol=1e-5)
        pairs = zip(gradients([e for _, e in together]), gradients([e for _, e in alone]), strict=True)
        assert all(float((a - b).norm() / b.norm()) < 1e-4 for a, b in pairs)
    assert not any("encode" in vars(e.model) for e in found)


@pytest.mark.parametrize("size", [0.02, 4.0])
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_rows_of_embedding_files_are_left_alone(family, size, tmp_path):
    """A caption says what the prompt says, whatever numbers the file holds."""
    from concepts.host.captions import Prompts
    from concepts.host.prompt import encode_prompt
    from concepts.host.variants import Grid

    made = tiny(family)
    what, text = concept(made), f"a <mug> on {embedding(made.clip, tmp_path, size)} grass"
    with torch.inference_mode():
        ((context, _),) = encode_prompt(made.clip, text, [(what, 1.0)])
        prompts = Prompts(made.clip, [text], "", {"": dict.fromkeys(what.tensors, 2)})
        prompts.ready()
        entries, _ = prompts.conditions(Grid.of([what]), what.tensors, [0], torch.tensor([0]))
    torch.testing.assert_close(entries[0][0], context, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["a photo of {}", "{}", "a {} on sand"])
def test_marks_are_told_from_the_template_around_the_caption(text):
    from concepts.host.captions import Prompts

    made = clip("z-image")
    assert learned(Prompts(made, [text], "mug", {"": {"qwen3_4b": 2}}).tokens[0]["qwen3_4b"]) == 2


def learned(chunks) -> int:
    return sum(torch.is_tensor(token) for chunk in chunks for token, *_ in chunk)


def test_a_caption_without_learned_rows_is_named(monkeypatch):
    from concepts.carriers.errors import CarrierMismatch
    from concepts.host.captions import Prompts

    made = clip("sd15")
    own = made.tokenizer.tokenize_with_weights
    monkeypatch.setattr(
        type(made.tokenizer), "tokenize_with_weights", lambda self, text, *a, **k: own(text.replace(":", ""), *a, **k)
    )
    with pytest.raises(CarrierMismatch, match="the concept in the caption 'a {}'"):
        Prompts(made, ["a {}"], "mug", {"": {"clip_l": 1}})
    Prompts(made, ["a mug"], "mug", {"": {"clip_l": 1}})
