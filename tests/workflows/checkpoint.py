"""A checkpoint the stock loader takes for SD1.5: its UNet cut to one level, CLIP-L in full, the tiny VAE; random."""

from pathlib import Path

import torch
from safetensors.torch import save_file

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}


def write(path: Path) -> None:
    """Writes the checkpoint in fp16, in the key layout of SD1.5."""
    import comfy.model_base
    import comfy.sd1_clip
    import comfy.supported_models
    import comfy.taesd.taesd

    config = comfy.supported_models.SD15(dict(UNET))
    config.unet_config["num_heads"], config.unet_config["num_head_channels"] = 8, -1
    parts = {
        "model.diffusion_model.": comfy.model_base.BaseModel(config, device="cpu").diffusion_model,
        "cond_stage_model.": comfy.sd1_clip.SD1ClipModel(dtype=torch.float32).clip_l,
        "first_stage_model.": comfy.taesd.taesd.TAESD(),
    }
    draw, state = torch.Generator().manual_seed(0), {}
    for prefix, part in parts.items():
        for key, value in part.state_dict().items():
            filled = (
                torch.randn(value.shape, generator=draw) * 0.03
                if value.ndim > 1
                else torch.full(value.shape, float("weight" in key or "scale" in key))
            )
            state[prefix + key] = filled.half()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
