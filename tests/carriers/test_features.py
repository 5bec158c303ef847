"""Features in memory: ordinary tensors of their own, and refusals that name the map."""

import pytest
import torch

from concepts.carriers.errors import CarrierError
from concepts.carriers.features import Features


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_maps_are_ordinary_copies(dtype):
    with torch.inference_mode():
        given = torch.randn(2, 8, 4, 6).to(dtype)
        made = Features({"dift": given}, 32, 48)
    kept = made.map("dift")
    assert kept.dtype == torch.float32 and not kept.is_inference()
    assert torch.equal(kept, given.float())
    assert Features({"dift": given.transpose(2, 3)}, 32, 48).map("dift").is_contiguous()
    with torch.inference_mode():
        given.zero_()
    assert float(kept.abs().max()) > 0


def test_a_missing_map_is_named_with_those_there_are():
    made = Features({"query": torch.ones(1, 2, 3, 3), "key": torch.ones(1, 2, 3, 3)}, 8, 8)
    with pytest.raises(CarrierError, match="no map 'dift', but: query, key"):
        made.map("dift")


@pytest.mark.parametrize(
    "maps, message",
    [
        ({}, "no features"),
        ({"dift": torch.ones(2, 3, 4)}, r"dift has shape \(2, 3, 4\)"),
        ({"dift": torch.ones(2, 0, 4, 4)}, "dift has shape"),
        ({"dift": torch.ones(2, 3, 4, 4), "key": torch.ones(1, 3, 4, 4)}, "key has shape"),
        ({"dift": torch.full((1, 1, 2, 2), float("nan"))}, "dift holds numbers that are not finite"),
    ],
)
def test_what_is_no_feature_is_refused(maps, message):
    with pytest.raises(CarrierError, match=message):
        Features(maps, 8, 8)
