"""The toy world's diffusion transformer: the host's Flux, T5 and CLIP at toy width (comfy/ldm/flux/model.py).

The file holds ``model.diffusion_model.*`` and ``text_encoders.t5xxl.*``; autoencoder and CLIP-L, whose pooled vector
modulates, are those of ``toybox-unet.safetensors``. Of T5's token embedding only the rows are stored that training ever
touched, with their ids; every other row is its seeded initial value.
"""

from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import folder_paths
import torch

from . import toybox
from .toybox import LATENT_CHANNELS, TEXT, WIDTH, ToyLatent

FILE = toybox.FILE.with_name("toybox-dit.safetensors")
TABLE = "transformer.shared.weight"
T5_WIDTH = 96
TOKENS = 40
"""Rows of every prompt, at least; longer ones have more."""
DIT = {
    "image_model": "flux",
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "patch_size": 2,
    "vec_in_dim": WIDTH,
    "context_in_dim": T5_WIDTH,
    "hidden_size": 144,
    "mlp_ratio": 4.0,
    "num_heads": 4,
    "depth": 3,
    "depth_single_blocks": 5,
    "axes_dim": [12, 12, 12],
    "theta": 10000,
    "qkv_bias": True,
    "guidance_embed": False,
    "txt_ids_dims": [],
}
T5 = {"d_model": T5_WIDTH, "num_layers": 3, "num_heads": 4, "d_kv": 24, "d_ff": 256}


class ToyFlux(comfy.supported_models.Flux):
    """Flux at toy width; a shift of 0 leaves the sampler's noise levels as they are."""

    sampling_settings = {"shift": 0.0}


class ToyFluxTokenizer(comfy.text_encoders.flux.FluxTokenizer):
    """The host's tokenizers; learned rows are as wide as the toy encoders."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})
        self.clip_l.embedding_size = WIDTH
        self.t5xxl.embedding_size, self.t5xxl.min_length = T5_WIDTH, TOKENS


def initial_table() -> torch.Tensor:
    """Seeded initial token embedding [32128, T5_WIDTH]; also what an unstored row holds."""
    return torch.randn(32128, T5_WIDTH, generator=torch.Generator().manual_seed(32128))


def build_model(latent: ToyLatent | None = None) -> comfy.model_patcher.ModelPatcher:
    """The denoiser with uninitialised weights, wrapped the way the host's loaders do it."""
    config = ToyFlux(dict(DIT))
    config.latent_format = latent or ToyLatent()
    config.set_inference_dtype(torch.float32, None)
    offload = comfy.model_management.unet_offload_device()
    model = comfy.model_base.Flux(config, device=offload)
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), offload)


def build_clip(embeddings: list[str] | None = None) -> comfy.sd.CLIP:
    """Both text encoders with uninitialised weights; ``embeddings``: folders for the stock ``embedding:name``."""
    target = comfy.supported_models_base.ClipTarget(
        ToyFluxTokenizer, comfy.text_encoders.flux.flux_clip(dtype_t5=torch.float32)
    )
    return comfy.sd.CLIP(
        target,
        embedding_directory=embeddings,
        model_options={"clip_l_model_config": dict(TEXT), "t5xxl_model_config": dict(T5), "dtype": torch.float32},
    )


def stored(path: Path | None) -> torch.Tensor:
    """Ids of the tokens whose rows a packed file holds; none without a file."""
    if path is None:
        return torch.zeros(0, dtype=torch.long)
    return toybox.read(path)[0]["text_encoders.t5xxl.token_ids"].long()


def load(path: Path = FILE):
    """Reads the transformer, and what it shares with the toy world's checkpoint.

    Returns: (MODEL, CLIP, VAE) for the stock nodes. Raises: FileNotFoundError.
    """
    state, latent = toybox.read(path)
    _, base, vae = toybox.load()
    model, clip = build_model(latent), build_clip(folder_paths.get_folder_paths("embeddings"))
    model.model.diffusion_model.load_state_dict(toybox.below(state, "model.diffusion_model."))
    text = toybox.whole_table(toybox.below(state, "text_encoders.t5xxl."), TABLE, initial_table())
    clip.cond_stage_model.t5xxl.load_state_dict(text, strict=False)
    clip.cond_stage_model.clip_l.load_state_dict(base.cond_stage_model.clip_l.state_dict())
    return model, clip, vae
