"""How exactly fp32 is multiplied, for a while."""

import contextlib

import torch

NEWER = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
NEWER = [backend for backend in NEWER if hasattr(backend, "fp32_precision")]
"""What torch's older setting overwrites, since torch 2.9."""


@contextlib.contextmanager
def fp32_products(precision: str):
    """torch's precision of fp32 products: ``highest``, or ``high``, which is TF32 on CUDA; put back as it was.

    Yields whether it is so: a program that chose by torch's newer settings, which cannot be mixed with this one, keeps
    what it chose.
    """
    try:
        kept = torch.get_float32_matmul_precision()
    except RuntimeError:
        yield False
        return
    newer = [backend.fp32_precision for backend in NEWER]
    torch.set_float32_matmul_precision(precision)
    try:
        yield True
    finally:
        torch.set_float32_matmul_precision(kept)
        for backend, own in zip(NEWER, newer, strict=True):
            backend.fp32_precision = own
