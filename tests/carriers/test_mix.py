"""Two concepts become one: exact ends, shapes that fit or are refused."""

from dataclasses import replace

import pytest
import torch

from concepts.carriers.concept import Concept
from concepts.carriers.errors import CarrierMismatch
from concepts.carriers.mix import mix
from concepts.kernels import neti
from concepts.kernels.mix import lerp, slerp

NAMES = ["input.1", "input.2", "middle.0", "output.0"]


def concept(stages=1, layers=1, roles=1, vectors=2, width=6, seed=0, keys=("clip_l",), names=NAMES) -> Concept:
    g = torch.Generator().manual_seed(seed)
    rows = {k: torch.randn(stages, layers, roles, vectors, width, generator=g) for k in keys}
    return Concept("ab"[seed], "tokens", rows, {"init_text": "ab"[seed], "layers": names if layers > 1 else []})


def rows(made: Concept) -> torch.Tensor:
    return made.tensors["clip_l"]


@pytest.mark.parametrize("mode", ["slerp", "linear", "stages"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 2), (2, 4, 1)])
def test_the_ends_are_exact(mode, shape):
    a, b = concept(*shape), concept(*shape, seed=1)
    assert torch.equal(rows(mix(a, b, "m", mode, 0.0)), rows(a))
    assert torch.equal(rows(mix(a, b, "m", mode, 1.0)), rows(b))
    made = mix(a, b, "m", mode, 0.5)
    assert made.name == "m" and made.info["mixed"] == ["a", "b"] and made.info["init_text"] == "a"
    assert not torch.equal(rows(made), rows(a).expand_as(rows(made)))


@pytest.mark.parametrize("mode, way", [("slerp", slerp), ("linear", lerp)])
@pytest.mark.parametrize("amount", [0.0, 0.25])
def test_an_axis_of_one_serves_for_all(mode, way, amount):
    a, b = concept(3, 1, 1), concept(1, 4, 2, seed=1)
    whole = (rows(c).expand(3, 4, 2, 2, 6) for c in (a, b))
    assert torch.equal(rows(mix(a, b, "m", mode, amount)), way(*whole, amount))


@pytest.mark.parametrize("a_layers, b_layers, given", [(4, 4, ()), (4, 1, ()), (1, 4, NAMES), (1, 1, NAMES)])
def test_layers(a_layers, b_layers, given):
    a, b = concept(1, a_layers), concept(1, b_layers, seed=1)
    made = mix(a, b, "m", "layers", 1.0, 1, 3, given)
    assert made.info["layers"] == NAMES
    x, y = (rows(c).expand(1, 4, 1, 2, 6) for c in (a, b))
    assert torch.equal(rows(made), torch.cat([y[:, :1], x[:, 1:3], y[:, 3:]], 1))
    assert torch.equal(rows(mix(a, b, "m", "layers", 0.0, 1, 3, given)), x)


@pytest.mark.parametrize(
    "amount, of_a, of_b", [(0.03, 19, 1), (0.05, 19, 1), (0.3, 7, 3), (0.5, 1, 1), (0.25, 3, 1), (1.0, 0, 1)]
)
def test_stages_of_plain_concepts(amount, of_a, of_b):
    a, b = concept(), concept(seed=1)
    made = rows(mix(a, b, "m", "stages", amount))
    assert torch.equal(made, torch.cat([rows(a)] * of_a + [rows(b)] * of_b))


def test_stages_of_concepts_with_stages():
    a, b = concept(5), concept(1, seed=1)
    made = rows(mix(a, b, "m", "stages", 0.35))
    assert torch.equal(made[:3], rows(a)[:3]) and torch.equal(made[3:], rows(b).expand(2, 1, 1, 2, 6))


@pytest.mark.parametrize(
    "a, b, given, message",
    [
        (concept(3), concept(2, seed=1), (), "has 3 stages"),
        (concept(1, 4), concept(1, 3, seed=1, names=NAMES[:3]), (), "not the same ones"),
        (concept(1, 4), concept(1, 4, seed=1, names=NAMES[::-1]), (), "not the same ones"),
        (concept(vectors=2), concept(vectors=1, seed=1), (), "same number of vectors"),
        (concept(width=6), concept(width=8, seed=1), (), "same text encoders"),
        (concept(), concept(seed=1, keys=("clip_l", "clip_g")), (), "clip_g"),
    ],
)
def test_what_does_not_fit_is_refused(a, b, given, message):
    with pytest.raises(CarrierMismatch, match=message):
        mix(a, b, "m", layers=given)


def test_layers_need_names_and_a_range():
    a, b = concept(), concept(seed=1)
    with pytest.raises(ValueError, match="connect a model"):
        mix(a, b, "m", "layers")
    with pytest.raises(ValueError, match="at most 4"):
        mix(a, b, "m", "layers", layers=NAMES)
    with pytest.raises(ValueError, match="from_layer below to_layer"):
        mix(a, b, "m", "layers", 1.0, 2, 2, NAMES)
    with pytest.raises(CarrierMismatch, match="not the same ones"):
        mix(concept(1, 4), b, "m", "layers", 1.0, 1, 2, NAMES[::-1])
    with pytest.raises(ValueError, match="0 to 1"):
        mix(a, b, "m", amount=1.5)
    with pytest.raises(ValueError, match="'cubic'.*use one of"):
        mix(a, b, "m", "cubic")


def test_the_models_layers_count_only_where_layers_are_mixed():
    assert mix(concept(1, 4), concept(seed=1), "m", layers=NAMES[::-1]).info["layers"] == NAMES


def test_mappers_are_refused():
    parts = neti.start(1, 4, torch.Generator().manual_seed(0), anchors=2, hidden=5, count=6)
    info = {"layers": ["middle.0"], "anchors": 2, "norms": {"clip_l": 1.0}}
    mapper = Concept("deep", "mapper", {f"clip_l.{k}": v for k, v in parts.items()}, info)
    with pytest.raises(CarrierMismatch, match="mapper set to none"):
        mix(concept(), mapper, "m")


def test_loras_are_refused():
    parts = {"lora_down.weight": torch.zeros(1, 3), "lora_up.weight": torch.zeros(3, 1), "alpha": torch.tensor(1.0)}
    lora = Concept("deep", "delta", {f"lora_unet_a.{key}": value for key, value in parts.items()})
    with pytest.raises(CarrierMismatch, match="kind delta.*connect one from Learn Concept Tokens"):
        mix(concept(), lora, "m")


def test_a_mix_knows_the_text_encoders_that_it_was_learned_with():
    a = replace(concept(), info={**concept().info, "clip": ["clip_l"]})
    assert mix(a, concept(seed=1), "m").info["clip"] == ["clip_l"]
