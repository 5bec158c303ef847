"""Writes small dictionaries with the programs that other people train them with, and what these make of some tokens.

Run once, in an environment that has the programs of bench/dictionary.py (``PEERS``):
``PYTHONPATH=out/bench/peers python tests/carriers/peers/make.py``. Every folder gets the program's own files and
``expected.safetensors`` with tokens x [n, d], codes z [n, m] and reconstructions.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
N, D, M, K = 9, 8, 24, 3


def noise(module: torch.nn.Module) -> torch.nn.Module:
    """Every parameter moved a little, so that no bias is zero and nothing is tied."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            own = 0.1 * torch.randn(parameter.shape, generator=g)
            parameter.add_(own.abs() if "threshold" in name else own)
    return module


def keep(folder: str, encode, decode) -> None:
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        z = encode(x)
        z = (z.to_dense() if z.is_sparse else z).contiguous()
        save_file({"x": x, "z": z, "rebuilt": decode(z).contiguous()}, HERE / folder / "expected.safetensors")


def dictionary_learning() -> None:
    from dictionary_learning.dictionary import AutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    made = {
        "AutoEncoderTopK": AutoEncoderTopK(D, M, K),
        "BatchTopKSAE": BatchTopKSAE(D, M, K),
        "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(D, M, K, [6, 18]),
        "JumpReluAutoEncoder": JumpReluAutoEncoder(D, M),
        "AutoEncoder": AutoEncoder(D, M),
    }
    for name, ae in made.items():
        folder = HERE / f"dictionary_learning-{name}"
        folder.mkdir(exist_ok=True)
        noise(ae)
        if hasattr(ae, "threshold") and ae.threshold.numel() == 1:
            ae.threshold.fill_(0.6)
        torch.save(ae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": M} | ({"k": K} if hasattr(ae, "k") else {})
        (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
        keep(folder.name, ae.encode, ae.decode)


def sparsify() -> None:
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify import sparse_coder as module
    from sparsify.utils import eager_decode

    module.decoder_impl = eager_decode
    coder = noise(SparseCoder(D, SparseCoderConfig(num_latents=M, k=K)))
    coder.save_to_disk(HERE / "sparsify")

    def encode(x):
        out = coder.encode(x)
        return torch.zeros(N, M).scatter(1, out.top_indices, out.top_acts)

    keep("sparsify", encode, lambda z: coder.decode(*z.topk(K)))


def sae_lens() -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    made = {
        "topk": TopKSAE(TopKSAEConfig(d_in=D, d_sae=M, k=K)),
        "topk-rescaled": TopKSAE(TopKSAEConfig(d_in=D, d_sae=M, k=K, rescale_acts_by_decoder_norm=True)),
        "topk-layer-norm": TopKSAE(TopKSAEConfig(d_in=D, d_sae=M, k=K, normalize_activations="layer_norm")),
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=M)),
        "standard": StandardSAE(StandardSAEConfig(d_in=D, d_sae=M, apply_b_dec_to_input=False)),
        "standard-length": StandardSAE(
            StandardSAEConfig(d_in=D, d_sae=M, normalize_activations="constant_norm_rescale")
        ),
    }
    for name, sae in made.items():
        noise(sae).save_model(HERE / f"SAELens-{name}")
        keep(f"SAELens-{name}", sae.encode, sae.decode)


if __name__ == "__main__":
    torch.manual_seed(0)
    dictionary_learning()
    sparsify()
    sae_lens()
