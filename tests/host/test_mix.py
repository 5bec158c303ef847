"""Mix Concepts and NeTI as the graph runs them."""

import pytest
import torch

from .test_variants import concept, prompt, sample
from .tiny import tiny

pytestmark = pytest.mark.usefixtures("host")


def mixed(made, mode, amount=1.0, model=None):
    from concepts.nodes.mix import MixCarriers

    a, b = concept(made, name="cat"), concept(made, name="hat", seed=1)
    with torch.inference_mode():
        return MixCarriers.execute(a, b, mode, amount, 2, 4, " both ", model).args[0], a, b


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_layers_of_the_connected_model(family):
    from concepts.host.variants import layers_of

    made = tiny(family)
    both, a, b = mixed(made, "layers", model=made.model)
    names = layers_of(made.model.model.diffusion_model)
    assert both.name == "both" and both.info["layers"] == names
    for key, rows in both.tensors.items():
        for layer in range(len(names)):
            assert torch.equal(rows[:, layer], (a if 2 <= layer < 4 else b).tensors[key][:, 0])
    drawn = sample(made, prompt(made, "a <both>", both))
    assert torch.isfinite(drawn).all()
    assert not torch.equal(drawn, sample(made, prompt(made, "a <cat>", a)))


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_between_and_by_stages_on_every_kind_of_model(family):
    made = tiny(family)
    both, a, b = mixed(made, "slerp")
    assert torch.equal(prompt(made, "a <both>", both)[0][0], prompt(made, "a <hat>", b)[0][0])
    both, a, b = mixed(made, "stages", 0.5)
    drawn = [sample(made, prompt(made, f"a <{c.name}>", c), cfg=1.0) for c in (both, a, b)]
    assert torch.isfinite(drawn[0]).all() and not any(torch.equal(drawn[0], other) for other in drawn[1:])


def test_the_learner_takes_a_mapper_and_refuses_settings_of_rows(toy, mug_set):
    from concepts.nodes.learn import LearnTokens

    values = {w.id: w.default for w in LearnTokens.define_schema().inputs if getattr(w, "default", None) is not None}
    values |= {"steps": 1, "init_text": "mug", "mapper": "NeTI"}
    with torch.inference_mode():
        made = LearnTokens.execute(*toy[:2], mug_set, **values).args[0]
        assert made.kind == "mapper" and made.info["steps"] == 1
        with pytest.raises(ValueError, match="vectors 2"):
            LearnTokens.execute(*toy[:2], mug_set, **{**values, "vectors": 2})
