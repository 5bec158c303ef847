"""The precision of fp32 products, and what others chose."""

import pytest
import torch

from concepts.kernels.precision import NEWER, fp32_products

needs_newer = pytest.mark.skipif(not NEWER, reason="needs torch 2.9")


def chosen():
    return torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in NEWER]


def choose(older, newer):
    torch.set_float32_matmul_precision(older)
    for backend, precision in zip(NEWER, newer, strict=True):
        backend.fp32_precision = precision


@pytest.fixture(autouse=True)
def put_back():
    kept = chosen()
    yield
    choose(*kept)


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("wanted", ["highest", "high"])
def test_it_is_put_back_as_it_was(before, wanted):
    torch.set_float32_matmul_precision(before)
    kept = chosen()
    with pytest.raises(KeyboardInterrupt), fp32_products(wanted) as done:
        assert done and torch.get_float32_matmul_precision() == wanted
        raise KeyboardInterrupt
    assert chosen() == kept


@needs_newer
@pytest.mark.parametrize("wanted", ["highest", "high"])
@pytest.mark.parametrize(
    "older, newer", [("highest", ("none", "none")), ("high", ("ieee", "tf32")), ("medium", ("tf32", "ieee"))]
)
def test_what_the_newer_settings_say_is_put_back_too(older, newer, wanted):
    """Those that were never touched go on following what is above them."""
    choose(older, newer)
    kept = chosen()
    with fp32_products(wanted) as done:
        assert done and torch.get_float32_matmul_precision() == wanted
    assert chosen() == kept == (older, list(newer))


@needs_newer
def test_a_choice_by_the_newer_settings_stays():
    choose("highest", ("tf32", "none"))
    with fp32_products("highest") as done:
        assert not done and [backend.fp32_precision for backend in NEWER] == ["tf32", "none"]
