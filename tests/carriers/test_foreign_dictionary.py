"""Sparse autoencoders of other programs: codes and reconstructions as their own arithmetic, and never any code.

Files in ``peers/`` were written by the programs themselves with what they make of the same tokens (peers/make.py);
layouts of programs that are in no package index are written here.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from concepts.carriers.errors import CarrierFileError
from concepts.carriers.foreign_dictionary import read_dictionary
from concepts.kernels.sae import dense

PEERS = Path(__file__).resolve().parent / "peers"
N, D, M, K = 9, 8, 24, 3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = draw(N, D, seed=1) * 2 + 0.5
W_E, W_D, B_E, B_D = draw(M, D, seed=2), draw(M, D, seed=3), 0.1 * draw(M, seed=4), 0.3 * draw(D, seed=5)
THETA, FACTOR = draw(M, seed=6).abs(), 0.5 + draw(M, seed=9).abs()


def top(p, k=K):
    best = p.relu().topk(k)
    return torch.zeros_like(p).scatter(1, best.indices, best.values)


def pre(x=X):
    return (x - B_D) @ W_E.T + B_E


def plain(z):
    return z, z @ W_D + B_D


def layer_norm():
    mean, std = X.mean(-1, keepdim=True), X.std(-1, keepdim=True) + 1e-5
    z = top(pre((X - mean) / std))
    return z, (z @ W_D + B_D) * std + mean


def msae():
    mean, scale = draw(D, seed=8), 1.7
    z = top(pre((X - mean) * scale))
    return z, (z @ W_D + B_D) / scale + mean


OPENAI = {"encoder.weight": W_E, "decoder.weight": W_D.T.contiguous(), "pre_bias": B_D, "latent_bias": B_E}
OPENAI["stats_last_nonzero"] = torch.zeros(M, dtype=torch.long)
LINEAR = {"encoder.weight": W_E, "encoder.bias": B_E, "decoder.weight": W_D.T.contiguous()}
MATRICES = {"W_enc": W_E.T.contiguous(), "b_enc": B_E, "W_dec": W_D, "b_dec": B_D}
SPARSIFY = {"encoder.weight": W_E, "encoder.bias": B_E, "W_dec": W_D, "b_dec": B_D}
LENS = {"d_in": D, "d_sae": M, "dtype": "float32", "apply_b_dec_to_input": True, "normalize_activations": "none"}
BATCH = {"k": torch.tensor(K), "threshold": torch.tensor(0.8)}
NORM = W_D.norm(dim=1)
OPENAI_TOPK = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
MSAE = {"encoder": W_E.T.contiguous(), "decoder": W_D, "pre_bias": B_D, "latent_bias": B_E}
MSAE = {"model": MSAE, "mean_center": draw(D, seed=8), "scaling_factor": 1.7, "target_norm": D**0.5}
RAW = (X @ W_E.T + B_E).relu()
CASES = {
    "OpenAI, sdxl-unbox": ("state_dict.pth", OPENAI, {"k": K, "n_dirs_local": M}, lambda: plain(top(pre()))),
    "OpenAI, wrapped": ("state_dict.pth", {"state_dict": OPENAI}, {"k": K}, lambda: plain(top(pre()))),
    "OpenAI, its own TopK": ("ae.pt", {**OPENAI, **OPENAI_TOPK}, {}, layer_norm),
    "OpenAI, ReLU": ("ae.pt", {**OPENAI, "activation": "ReLU"}, {}, lambda: plain(pre().relu())),
    "sparsify": ("sae.safetensors", SPARSIFY, {"k": K, "activation": "topk"}, lambda: plain(top(pre()))),
    "sparsify, SAeUron": (
        *("sae.safetensors", SPARSIFY, {"k": K, "input_unit_norm": True, "batch_topk": False, "sample_topk": False}),
        layer_norm,
    ),
    "dictionary_learning TopK": (
        *("ae.pt", {**LINEAR, "b_dec": B_D, **BATCH}, {"trainer": {"dict_class": "AutoEncoderTopK", "k": K}}),
        lambda: plain(top(pre())),
    ),
    "dictionary_learning BatchTopK": (
        *("ae.pt", {**LINEAR, "b_dec": B_D, **BATCH}, {"trainer": {"dict_class": "BatchTopKSAE", "k": K}}),
        lambda: plain(pre().relu() * (pre() > 0.8)),
    ),
    "dictionary_learning Matryoshka": (
        *("ae.pt", {**MATRICES, **BATCH, "group_sizes": torch.tensor([8, 16])}, {}),
        lambda: plain(pre().relu() * (pre() > 0.8)),
    ),
    "dictionary_learning standard": ("ae.pt", {**LINEAR, "bias": B_D}, {}, lambda: plain(pre().relu())),
    "dictionary_learning JumpReLU": (
        *("ae.pt", {**MATRICES, "threshold": THETA}, {"trainer": {"dict_class": "JumpReluAutoEncoder"}}),
        lambda: plain(RAW * (RAW > THETA)),
    ),
    "SAELens topk": (
        *("sae_weights.safetensors", MATRICES, {**LENS, "architecture": "topk", "k": K}),
        lambda: plain(top(pre())),
    ),
    "SAELens topk, rescaled": (
        "sae_weights.safetensors",
        MATRICES,
        {**LENS, "architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
        lambda: (top(pre() * NORM), top(pre() * NORM) / NORM @ W_D + B_D),
    ),
    "SAELens jumprelu": (
        *("sae_weights.safetensors", {**MATRICES, "threshold": THETA}, {**LENS, "architecture": "jumprelu"}),
        lambda: plain(pre().relu() * (pre() > THETA)),
    ),
    "SAELens batchtopk, a checkpoint": (
        "sae_weights.safetensors",
        {**MATRICES, "topk_threshold": torch.tensor(0.8, dtype=torch.float64)},
        {**LENS, "architecture": "batchtopk", "k": float(K), "normalize_activations": None},
        lambda: plain(pre().relu() * (pre() > 0.8)),
    ),
    "SAELens standard": (
        "sae_weights.safetensors",
        MATRICES,
        {**LENS, "architecture": "standard", "apply_b_dec_to_input": False},
        lambda: plain(RAW),
    ),
    "SAELens, finetuned": (
        "sae_weights.safetensors",
        {**MATRICES, "finetuning_scaling_factor": FACTOR},
        {**LENS, "architecture": "topk", "k": K, "finetuning_scaling_factor": True},
        lambda: (top(pre()), FACTOR * top(pre()) @ W_D + B_D),
    ),
    "SAELens, finetuned long ago": (
        "sae_weights.safetensors",
        {**MATRICES, "scaling_factor": FACTOR},
        {**LENS, "architecture": "standard", "finetuning_scaling_factor": True},
        lambda: (pre().relu(), FACTOR * pre().relu() @ W_D + B_D),
    ),
    "SAELens, not finetuned": (
        "sae_weights.safetensors",
        {**MATRICES, "scaling_factor": torch.ones(M)},
        {**LENS, "architecture": "standard", "finetuning_scaling_factor": False},
        lambda: plain(pre().relu()),
    ),
    "SAELens layer norm": (
        "sae_weights.safetensors",
        MATRICES,
        {**LENS, "architecture": "topk", "k": K, "normalize_activations": "layer_norm"},
        layer_norm,
    ),
    "MSAE": ("msae.pt", MSAE, {"k": K}, msae),
    "MSAE, its own k": ("msae.pt", {**MSAE, "k": K}, {}, msae),
}


def store(folder: Path, file: str, content: dict, config: dict) -> Path:
    path = folder / file
    save_file(content, path) if file.endswith("s") else torch.save(content, path)
    if config:
        (folder / ("cfg.json" if file.endswith("s") else "config.json")).write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("case", CASES)
def test_codes_are_those_of_the_program(case, tmp_path):
    file, content, config, by_hand = CASES[case]
    found = read_dictionary(store(tmp_path, file, content, config))
    z, rebuilt = by_hand()
    torch.testing.assert_close(dense(*found.coder().encode(X), M), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.coder().rebuilt(X), rebuilt, rtol=1e-4, atol=1e-4)
    assert found.info["source"] in case


@pytest.mark.parametrize("folder", sorted(p.name for p in PEERS.iterdir() if p.is_dir()))
def test_what_the_programs_wrote_themselves(folder):
    """Their file, their tokens, their codes and reconstructions."""
    (file,) = (p for p in (PEERS / folder).iterdir() if p.suffix != ".json" and p.name != "expected.safetensors")
    expected = load_file(PEERS / folder / "expected.safetensors")
    coder = read_dictionary(file).coder()
    z = dense(*coder.encode(expected["x"]), expected["z"].shape[1])
    assert float(expected["z"].abs().max()) > 0
    torch.testing.assert_close(z, expected["z"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coder.rebuilt(expected["x"]), expected["rebuilt"], rtol=1e-4, atol=1e-4)


def test_k_can_be_given_where_the_file_has_none(tmp_path):
    path = store(tmp_path, "odd.pth", OPENAI, {})
    with pytest.raises(CarrierFileError, match="give k when loading"):
        read_dictionary(path)
    assert read_dictionary(path, 5).k == 5
    relu = store(tmp_path, "relu.pt", {**LINEAR, "bias": B_D}, {})
    with pytest.raises(CarrierFileError, match="set k to 0"):
        read_dictionary(relu, 5)


@pytest.mark.parametrize(
    "file, content, config, message",
    [
        ("a.pt", {"weird": W_E, "other": B_E}, {}, "its keys are weird, other"),
        ("a.pt", {}, {}, "its keys are nothing"),
        ("a.safetensors", MATRICES, {}, "cfg.json"),
        ("a.safetensors", MATRICES, {**LENS, "architecture": "gated"}, "architecture is gated"),
        *(
            ("a.safetensors", MATRICES, {**LENS, "architecture": kind}, f"is {kind}, and a threshold .* are .*W_enc")
            for kind in ("jumprelu", "batchtopk")
        ),
        *(
            ("a.safetensors", MATRICES, {**LENS, "normalize_activations": norm}, f"is {norm!r}; only .*'layer_norm'")
            for norm in ("expected_average_only_in", "covariance_whitening", True)
        ),
        *(
            ("a.safetensors", {**MATRICES, **more}, {**LENS, "finetuning_scaling_factor": True}, message)
            for more, message in (({}, "its factors are missing"), ({"scaling_factor": FACTOR[:5]}, "do not fit"))
        ),
        ("a.safetensors", SPARSIFY, {"k": K, "activation": "groupmax"}, "groupmax"),
        ("a.safetensors", SPARSIFY, {"k": K, "batch_topk": True}, "batch_topk is True"),
        ("a.safetensors", SPARSIFY, {"k": K, "sample_topk": True}, "sample_topk is True"),
        ("a.safetensors", SPARSIFY, {"k": K, "transcode": True}, "transcode"),
        *(
            ("a.safetensors", SPARSIFY, {"k": K, name: True}, f"{name} is True")
            for name in ("signed", "embed_skip", "gram_lookup")
        ),
        ("a.pt", {**OPENAI, "activation": "Identity"}, {"k": K}, "activation is 'Identity'"),
        ("a.safetensors", {**SPARSIFY, "W_dec": W_D[:5]}, {"k": K}, "has shape"),
        ("a.pt", {**OPENAI, "encoder.weight": B_E}, {"k": K}, "do not fit|not whole"),
    ],
)
def test_other_files_are_refused_with_a_sentence(file, content, config, message, tmp_path):
    with pytest.raises(CarrierFileError, match=message):
        read_dictionary(store(tmp_path, file, content, config))


def test_a_broken_config_is_named(tmp_path):
    path = store(tmp_path, "sae.safetensors", SPARSIFY, {"k": K})
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(CarrierFileError, match="cfg.json beside it cannot be read"):
        read_dictionary(path)


class Hostile:
    """Its pickle would make a folder when loaded."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def test_code_in_a_pickle_is_never_run(tmp_path):
    marker = tmp_path / "marker"
    torch.save({**OPENAI, "x": Hostile(marker)}, tmp_path / "evil.pth")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    for name in ("evil.pth", "module.pth"):
        with pytest.raises(CarrierFileError, match="dictionary that can be loaded safely"):
            read_dictionary(tmp_path / name)
    assert not marker.exists()
