"""What all learners share: numbers that come over links, and ticks."""

import importlib
from types import SimpleNamespace

import pytest

NODES = [
    ("learn", "LearnTokens"),
    ("kv", "LearnKV"),
    ("locked", "LearnLocked"),
    ("residual", "LearnResiduals"),
    ("scene", "LearnScene"),
    ("lora", "LearnLora"),
    ("modulation", "LearnModulation"),
    ("dictionary", "TrainDictionary"),
]


@pytest.mark.parametrize("module, name", NODES)
def test_numbers_over_links_keep_to_the_widgets_range(host, module, name):
    """The host checks what stands in a widget, and not what arrives over a link."""
    from comfy_api.latest import io

    node = getattr(importlib.import_module(f"concepts.nodes.{module}"), name)
    inputs = node.define_schema().inputs
    numbers = [i for i in inputs if isinstance(i, (io.Int.Input, io.Float.Input))]
    given = {i.id: getattr(i, "default", None) for i in inputs} | {"model": None, "clip": None, "concept_set": None}
    listed = (lambda values: {k: [v] for k, v in values.items()}) if name == "LearnLora" else dict
    assert {"steps", "learning_rate", "batch", "seed"} <= {i.id for i in numbers}
    for one in numbers:
        for bad in (one.min - 1, one.max + 1, float("nan")):
            with pytest.raises(ValueError, match=f"^{one.id} is {bad}, but goes from {one.min} to {one.max}"):
                node.execute(**listed(given | {one.id: bad}))


@pytest.mark.parametrize(
    ("here", "ticked", "expected"),
    [
        (("clip_l", "clip_g"), ("clip_g",), ("clip_g",)),
        (("clip_l", "t5xxl"), ("clip_l", "clip_g", "t5xxl"), ("clip_l", "t5xxl")),
        (("clip_h",), ("other",), ("clip_h",)),
        (("clip_l",), ("other",), None),
        (("clip_h",), ("clip_l", "clip_g", "t5xxl"), None),
    ],
)
def test_ticks_choose_the_encoders(host, monkeypatch, here, ticked, expected):
    """No tick that fits is refused, where no choice would be every encoder."""
    from concepts.carriers.errors import CarrierMismatch
    from concepts.host import learn_tokens, text
    from concepts.nodes.inputs import chosen

    found = [SimpleNamespace(key=key) for key in here]
    for module in (text, learn_tokens):
        monkeypatch.setattr(module, "encoders", lambda clip: found)
    keys = chosen(None, {f"use_{key}": key in ticked for key in ("clip_l", "clip_g", "t5xxl", "other")})
    if expected:
        assert keys == expected
    else:
        with pytest.raises(CarrierMismatch, match="None of the chosen text encoders"):
            learn_tokens.chosen_encoders(None, keys)
