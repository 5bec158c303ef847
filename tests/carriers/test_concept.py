"""A concept in memory: validated, copied, an ordinary tensor whatever came in."""

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.delta import bundled
from concepts.carriers.errors import CarrierError
from concepts.carriers.modulation import row_width, words
from concepts.kernels import controller, neti


def tokens(n=2, width=8):
    return {"clip_l": torch.randn(1, 1, 1, n, width, generator=torch.Generator().manual_seed(0))}


def test_tensors_are_ordinary_copies_in_fp32():
    with torch.inference_mode():
        given = torch.ones(1, 1, 1, 1, 4, dtype=torch.bfloat16)
        made = Concept("mug", "tokens", {"clip_l": given}, state={"step": torch.tensor(3)})
    value = made.tensors["clip_l"]
    assert value.dtype == torch.float32 and not value.is_inference() and not made.state["step"].is_inference()
    given = torch.ones(1, 1, 1, 1, 4)
    made = Concept("mug", "tokens", {"clip_l": given})
    given.zero_()
    assert made.tensors["clip_l"].sum() == 4


def test_facts_become_what_json_gives_back():
    assert Concept("mug", "tokens", tokens(), {"range": (0, 1)}).info == {"range": [0, 1]}


def lora() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "lora_unet_a.lora_down.weight": torch.randn(2, 6, generator=g),
        "lora_unet_a.lora_up.weight": torch.randn(5, 2, generator=g),
        "lora_unet_a.alpha": torch.tensor(2.0),
        "bundle_emb.mug.clip_l": torch.randn(1, 1, 1, 2, 8, generator=g),
    }


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"bundle_emb.mug.clip_l": torch.zeros(1, 1, 1, 1, 8)}, "changes no layer"),
        (lora() | {"lora_unet_b.lora_up.weight": torch.zeros(2, 2)}, "not known"),
        ({k: v for k, v in lora().items() if "up" not in k}, "missing"),
        ({k: v for k, v in lora().items() if "alpha" not in k}, "missing"),
        (lora() | {"clip_l": torch.zeros(1, 1, 1, 1, 8)}, "not known"),
        (lora() | {"lora_unet_a.lora_up.weight": torch.zeros(5, 3)}, "expected"),
        (lora() | {"lora_unet_a.lora_up.weight": torch.zeros(0, 2)}, "expected"),
        (lora() | {"lora_unet_a.alpha": torch.ones(1)}, "expected"),
        ({k.replace("unet", "te"): v for k, v in lora().items()}, "lora_te_a .* expected"),
        (lora() | {"lora_unet_a.lora_up.weight": torch.full((5, 2), float("nan"))}, "not finite"),
        (lora() | {"lora_unet_a.alpha": torch.tensor(float("inf"))}, "not finite"),
        (lora() | {"bundle_emb.mug.clip_l": torch.zeros(2, 8)}, "rows of a text encoder"),
        (lora() | {"bundle_emb.mug.clip_l": torch.zeros(1, 1, 1, 0, 8)}, "rows of a text encoder"),
        (lora() | {"bundle_emb.a mug.clip_l": torch.zeros(1, 1, 1, 1, 8)}, "rows of a text encoder"),
    ],
)
def test_what_is_not_a_delta_is_refused(tensors, message):
    with pytest.raises(CarrierError, match=message):
        Concept("mug", "delta", tensors)


def test_a_delta_sums_up_its_layers_and_rows():
    tensors = lora()
    change = (tensors["lora_unet_a.lora_up.weight"] @ tensors["lora_unet_a.lora_down.weight"]).norm()
    for part, value in (("lora_down.weight", torch.ones(1, 4)), ("lora_up.weight", torch.ones(9, 1)), ("alpha", 3.0)):
        tensors[f"lora_unet_b.{part}"] = torch.as_tensor(value)
    text = Concept("mug", "delta", tensors).summary()
    said = ("2 layers from lora_unet_a to lora_unet_b", "rank 1 to 2, scale 1 to 3", "bundled rows of <mug>")
    assert text.startswith("<mug>: delta") and all(part in text for part in said)
    assert f"mean norm of a layer's change {(float(change) + 18) / 2:.4f}" in text


def test_bundled_rows_are_found_after_renaming():
    rows = lora()["bundle_emb.mug.clip_l"]
    assert torch.equal(bundled(lora(), "mug")["clip_l"], rows)
    assert torch.equal(bundled(lora(), "cup")["clip_l"], rows)
    two = lora() | {"bundle_emb.cup.clip_l": rows + 1}
    assert torch.equal(bundled(two, "cup")["clip_l"], rows + 1) and bundled(two, "jar") == {}


@pytest.mark.parametrize("name", ["", "a mug", "<mug>", "m" * 65, "m\u00fcg", None, "a/b"])
def test_names(name):
    with pytest.raises(CarrierError, match="letters, digits"):
        Concept(name, "tokens", tokens())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "lora"}, "does not know"),
        ({"tensors": {}}, "no vectors"),
        ({"tensors": {"clip_l": torch.zeros(2, 8)}}, "shape"),
        ({"tensors": {"clip_l": torch.zeros(1, 1, 1, 0, 8)}}, "shape"),
        ({"tensors": {"a.b": torch.zeros(1, 1, 1, 1, 8)}}, "text encoder"),
        ({"tensors": {"clip_l": torch.full((1, 1, 1, 1, 8), float("nan"))}}, "not finite"),
        ({"tensors": {"clip_l": torch.full((1, 1, 1, 1, 8), float("inf"))}}, "not finite"),
        ({"tensors": {"clip_l": torch.zeros(1, 1, 3, 1, 8)}}, "1 layers and 3 roles"),
        ({"tensors": {"clip_l": torch.zeros(1, 2, 1, 1, 8)}, "info": {"layers": ["input.1"]}}, "names 1 layers"),
        ({"info": {"x": float("inf")}}, "JSON"),
        ({"info": {"x": object()}}, "JSON"),
    ],
)
def test_what_is_not_a_concept_is_refused(changes, message):
    with pytest.raises(CarrierError, match=message):
        Concept(**{"name": "mug", "kind": "tokens", "tensors": tokens(), **changes})


def test_summary_says_what_is_inside():
    rows = torch.tensor([[3.0, 4.0], [0.0, 1.0]]).view(1, 1, 1, 2, 2)
    text = Concept("mug", "tokens", {"clip_l": rows}, {"loss_last": 0.25}, {"step": torch.tensor(3)}).summary()
    said = ("<mug>", "2 vectors, 2 width; mean norm 3.000", "loss_last: 0.25", "can continue")
    assert all(part in text for part in said)


MAPPER = {"layers": ["input.1", "middle.0"], "anchors": 2, "norms": {"clip_l": 0.5}}


def mapper(**changes):
    made = neti.start(2, 4, torch.Generator().manual_seed(0), anchors=2, hidden=5, count=6) | changes
    return {f"clip_l.{k}": v for k, v in made.items() if v is not None}


@pytest.mark.parametrize(
    "tensors, info, message",
    [
        ({}, MAPPER, "no mapper"),
        (mapper(), {}, "no mapper"),
        (mapper(), {**MAPPER, "anchors": 0}, "no mapper"),
        (mapper(), {**MAPPER, "norms": {}}, "length of the word vectors"),
        (mapper(), {**MAPPER, "norms": {"clip_l": 0}}, "length of the word vectors"),
        (mapper(), {**MAPPER, "layers": ["input.1"]}, "1 layers and 2 times"),
        (mapper(), {**MAPPER, "anchors": 3}, "2 layers and 3 times"),
        (mapper(frequencies=None), MAPPER, "not whole"),
        (mapper(**{"norm2.bias": torch.zeros(4)}), MAPPER, "not whole"),
        (mapper(**{"output.bias": torch.zeros(())}), MAPPER, "not whole"),
        (mapper(**{"output.bias": torch.zeros(7), "output.weight": torch.zeros(7, 5)}), MAPPER, "not whole"),
        (mapper(more=torch.zeros(1)), MAPPER, "not whole"),
        (mapper(**{"norm1.bias": torch.full((5,), float("inf"))}), MAPPER, "not finite"),
    ],
)
def test_what_is_not_a_mapper_is_refused(tensors, info, message):
    with pytest.raises(CarrierError, match=message):
        Concept("mug", "mapper", tensors, info)


def test_summary_of_a_mapper():
    text = Concept("mug", "mapper", mapper(), MAPPER).summary()
    assert "clip_l: a network of" in text and "2 layers and 2 times, 4 width; norm 0.500" in text


def modulation(**changes):
    """Two words, one of two pieces, and the network that makes them."""
    g = torch.Generator().manual_seed(3)
    network = controller.start(5, 6, 2, 4, g)
    tensors = {"word.0": torch.randn(2, 1, 6, generator=g), "word.1": torch.randn(1, 2, 6, generator=g)}
    tensors |= {f"controller.{k}": v for k, v in network.items()}
    info = {
        "words": ["hat", "computer mouse"],
        "blocks": ["double.0", "single.0"],
        "encoders": ["t5xxl"],
        "input": "dense",
    }
    return tensors, info | changes


@pytest.mark.parametrize(
    "change, info, message",
    [
        ({}, {"words": []}, "does not say which words"),
        ({}, {"words": ["hat", "hat"]}, "does not say which words"),
        ({}, {"words": ["hat", "a:b"]}, "does not say which words"),
        ({}, {"blocks": "double.0"}, "does not say which words"),
        ({}, {"encoders": None}, "does not say which words"),
        ({"word.2": torch.zeros(1, 1, 6)}, {}, "word.2 is not known"),
        ({"word.1": None}, {}, "word.1 is missing"),
        ({"controller.block.gate": None}, {}, "block.gate is missing"),
        ({"controller.more": torch.zeros(1)}, {}, "not known"),
        ({"word.0": torch.zeros(3, 1, 6)}, {}, "does not fit 2 blocks"),
        ({"word.0": torch.zeros(6)}, {}, "does not fit"),
        ({"word.1": torch.zeros(1, 0, 6)}, {}, "does not fit"),
        ({"word.1": torch.zeros(1, 2, 7)}, {}, "does not fit 2 blocks of width 6"),
        ({"controller.block.gate": torch.ones(3, 4)}, {}, "does not fit"),
        ({"controller.shared.in.weight": torch.zeros(4)}, {}, "does not fit"),
        ({"word.0": torch.full((1, 1, 6), float("nan"))}, {}, "not finite"),
        ({"controller.block.out.weight": torch.full((6, 4), float("inf"))}, {}, "not finite"),
    ],
)
def test_what_is_not_a_modulation_is_refused(change, info, message):
    tensors, facts = modulation(**info)
    with pytest.raises(CarrierError, match=message):
        Concept("p", "modulation", {k: v for k, v in (tensors | change).items() if v is not None}, facts)


def test_a_modulation_with_and_without_its_network_or_biases():
    tensors, info = modulation()
    whole = Concept("p", "modulation", tensors, info)
    assert list(words(whole.tensors, whole.info)) == ["hat", "computer mouse"]
    lines = "\n".join(whole.contents())
    assert "hat: a direction for each of 2 blocks, 1 pieces, 6 width" in lines and "5 inputs" in lines
    assert "computer mouse: one direction for all blocks, 2 pieces" in lines
    cached = Concept("p", "modulation", {k: v for k, v in tensors.items() if k.startswith("word.")}, info)
    assert "no network" in cached.summary()
    Concept("p", "modulation", {k: v for k, v in tensors.items() if not k.endswith(".bias")}, info)


def coded():
    """As ``modulation``, of five latents of a dictionary over rows of width 9."""
    tensors, info = modulation(input="codes", norm="layer", dictionary="words")
    reading = {"weight": torch.ones(5, 9), "bias": torch.zeros(5), "threshold": torch.zeros(5)}
    reading["kept"] = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 1]])
    return tensors | {f"reading.{k}": v for k, v in reading.items()}, info


def test_a_modulation_by_latents_says_which_it_reads():
    made = Concept("p", "modulation", *coded())
    assert row_width(made.tensors) == 9 and row_width(modulation()[0]) == 5
    assert "latents of dictionary words; per word: hat 2, computer mouse 3" in made.summary()


@pytest.mark.parametrize(
    "change, info, message",
    [
        ({}, {"norm": "softmax"}, "how its dictionary prepares rows"),
        ({"reading.bias": None}, {}, "reading.bias is missing"),
        ({"reading.weight": torch.ones(4, 9)}, {}, "reading.weight has shape"),
        ({"reading.threshold": torch.zeros(1)}, {}, "reading.threshold has shape"),
        ({"reading.kept": torch.ones(1, 5)}, {}, "reading.kept has shape"),
    ],
)
def test_what_reads_no_latents_is_refused(change, info, message):
    tensors, facts = coded()
    with pytest.raises(CarrierError, match=message):
        Concept("p", "modulation", {k: v for k, v in (tensors | change).items() if v is not None}, facts | info)


def edit(**changes):
    """Of three layers that read rows of six numbers."""
    g = torch.Generator().manual_seed(4)
    parts = {"row.clip_l": (1, 4), "direction": (6,), "keys": (1, 6), "values": (3, 6)}
    tensors = {k: torch.randn(*shape, generator=g) for k, shape in parts.items()}
    tensors["dual"] = 2 * tensors["direction"]
    return {k: v for k, v in (tensors | changes).items() if v is not None}


EDIT = {"layers": ["input.1", "middle.0", "output.1"], "beta": 0.75, "tau": 0.1}


@pytest.mark.parametrize(
    "change, info, message",
    [
        ({}, {"layers": []}, "which layers"),
        ({}, {"layers": "input.1"}, "which layers"),
        ({}, {"layers": ["input.1"]}, "values has shape .3, 6., which does not fit 1 layers"),
        ({}, {"beta": None}, "how its gate opens"),
        ({}, {"tau": 0}, "how its gate opens"),
        ({"direction": None}, {}, "direction of its edit is missing"),
        ({"dual": None}, {}, "dual of its edit is missing"),
        ({"keys": torch.ones(2, 6)}, {}, "keys has shape"),
        ({"direction": torch.ones(5)}, {}, "does not fit"),
        ({"direction": torch.ones(())}, {}, "does not fit"),
        ({"row.clip_l": None}, {}, "no vector for a text encoder"),
        ({"row.clip_g": torch.ones(2, 4)}, {}, "not part of an edit"),
        ({"more": torch.ones(1, 4)}, {}, "not part of an edit"),
        ({"values": torch.full((3, 6), float("nan"))}, {}, "not finite"),
        ({"dual": -torch.ones(6), "direction": torch.ones(6)}, {}, "do not belong together"),
    ],
)
def test_what_is_not_an_edit_is_refused(change, info, message):
    with pytest.raises(CarrierError, match=message):
        Concept("mug", "edit", edit(**change), EDIT | info)


def test_summary_of_an_edit():
    text = Concept("mug", "edit", edit(), EDIT).summary()
    assert "clip_l: 1 vectors, 4 width" in text
    assert "3 layers of 6 width with locked keys; gate at 0.75, width 0.1" in text
    assert "keys of their own" in Concept("mug", "edit", edit(keys=torch.ones(3, 6)), EDIT).summary()
