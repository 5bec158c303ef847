"""What all learners share: numbers that come over links."""

import importlib

import pytest

NODES = [
    ("learn", "LearnTokens"),
    ("kv", "LearnKV"),
    ("residual", "LearnResiduals"),
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
