"""The toy world's model, built from the host's own classes (comfy/supported_models.py, sd1_clip.py, sd.py).

The file holds the usual checkpoint keys (``model.diffusion_model.*``, ``cond_stage_model.*``, ``first_stage_model.*``)
with one economy: of the 49,408 rows of the token embedding only those that training ever touched are stored, with
their ids; every other row is its seeded initial value.
"""

import json
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch

FILE = Path(__file__).resolve().parent.parent / "demo" / "toybox-unet.safetensors"
WIDTH = 64
LATENT_CHANNELS = 12
UNET = {
    "image_size": 16,
    "in_channels": LATENT_CHANNELS,
    "out_channels": LATENT_CHANNELS,
    "model_channels": 64,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": -1,
    "context_dim": WIDTH,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
TEXT = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
VAE = {
    "params": {
        "embed_dim": LATENT_CHANNELS,
        "ddconfig": {
            "double_z": True,
            "z_channels": LATENT_CHANNELS,
            "resolution": 128,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 64,
            "ch_mult": [1, 1, 1, 1],
            "num_res_blocks": 0,
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }
}
TABLE = "transformer.text_model.embeddings.token_embedding.weight"


class ToyLatent(comfy.latent_formats.LatentFormat):
    """12-channel latents, 8x smaller than the picture."""

    latent_channels = LATENT_CHANNELS

    def __init__(self, scale_factor: float = 1.0, rgb: list | None = None, bias: list | None = None):
        self.scale_factor = scale_factor
        self.latent_rgb_factors = rgb
        self.latent_rgb_factors_bias = bias


class ToyWorld(comfy.supported_models.SD15):
    """SD1-type model at toy width."""

    unet_extra_config = {"num_heads": 4, "num_head_channels": -1}


class ToyClip(comfy.sd1_clip.SD1ClipModel):
    """CLIP text encoder at toy width, under the host's name for CLIP-L."""


class ToyTokenizer(comfy.sd1_clip.SD1Tokenizer):
    """The host's CLIP tokenizer; learned rows are WIDTH wide."""

    def __init__(self, embedding_directory=None, tokenizer_data=None):
        super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})
        self.clip_l.embedding_size = WIDTH


def initial_table() -> torch.Tensor:
    """Seeded initial token embedding [49408, WIDTH]; also what an unstored row holds."""
    return torch.randn(49408, WIDTH, generator=torch.Generator().manual_seed(49408)) * 0.1


def build_model(latent: ToyLatent | None = None) -> comfy.model_patcher.ModelPatcher:
    """The denoiser with uninitialised weights, wrapped the way the host's loaders do it."""
    config = ToyWorld(dict(UNET))
    config.latent_format = latent or ToyLatent()
    config.set_inference_dtype(torch.float32, None)
    offload = comfy.model_management.unet_offload_device()
    model = comfy.model_base.BaseModel(config, device=offload)
    return comfy.model_patcher.ModelPatcher(model, comfy.model_management.get_torch_device(), offload)


def build_clip(embeddings: list[str] | None = None) -> comfy.sd.CLIP:
    """The text encoder with uninitialised weights; ``embeddings``: folders for the stock ``embedding:name``."""
    target = comfy.supported_models_base.ClipTarget(ToyTokenizer, ToyClip)
    return comfy.sd.CLIP(
        target,
        embedding_directory=embeddings,
        model_options={"clip_l_model_config": dict(TEXT), "dtype": torch.float32},
    )


def build_vae(state: dict) -> comfy.sd.VAE:
    """The autoencoder with the given weights."""
    vae = comfy.sd.VAE(sd=state, config=VAE, dtype=torch.float32)
    vae.latent_channels = LATENT_CHANNELS
    return vae


def read(path: Path) -> tuple[dict, ToyLatent]:
    """Tensors of a packed file, fp32, and its latents' scale and preview colours.

    Raises: FileNotFoundError saying how to make the file again.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"The toy world's weights are missing: {path}. Reinstall the pack, or see nox -s train."
        )
    state, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    facts = json.loads(metadata["toybox"])
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    return state, ToyLatent(facts["scale_factor"], facts["rgb"], facts["rgb_bias"])


def below(state: dict, prefix: str) -> dict:
    """The tensors under a prefix, without it."""
    return comfy.utils.state_dict_prefix_replace(state, {prefix: ""}, filter_keys=True)


def whole_table(text: dict, name: str, table: torch.Tensor) -> dict:
    """``text`` with the stored rows of its embedding ``name`` put into ``table``, all initial rows."""
    table[text.pop("token_ids").long()] = text[name]
    return {**text, name: table}


def load(path: Path = FILE):
    """Reads the toy world's checkpoint.

    Returns: (MODEL, CLIP, VAE) for the stock nodes. Raises: FileNotFoundError.
    """
    state, latent = read(path)
    model, clip = build_model(latent), build_clip(folder_paths.get_folder_paths("embeddings"))
    model.model.diffusion_model.load_state_dict(below(state, "model.diffusion_model."))
    text = whole_table(below(state, "cond_stage_model."), TABLE, initial_table())
    clip.cond_stage_model.clip_l.load_state_dict(text, strict=False)
    return model, clip, build_vae(below(state, "first_stage_model."))
