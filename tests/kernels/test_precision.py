"""The precision of fp32 products, and what others chose."""

import pytest
import torch

from concepts.kernels.precision import fp32_products


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("wanted", ["highest", "high"])
def test_it_is_put_back_as_it_was(before, wanted):
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        with pytest.raises(KeyboardInterrupt), fp32_products(wanted) as done:
            assert done and torch.get_float32_matmul_precision() == wanted
            raise KeyboardInterrupt
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(kept)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="needs torch 2.9")
def test_a_choice_by_the_newer_settings_stays():
    backend = torch.backends.cuda.matmul
    kept = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        with fp32_products("highest") as done:
            assert not done and backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = kept
