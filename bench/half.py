"""SD1.5 with random weights, at half its width and 256 px or whole: diffusers' modules, and the host's alike."""

import time

import torch

from .runner import Peak

SIZE, SEED, WORD = 256, 0, "toy"
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 160,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
VAE_WIDTHS = (64, 128, 256, 256)


def whole() -> None:
    """From here on the width of SD1.5 itself, and pictures of 512 px."""
    global SIZE, VAE_WIDTHS
    SIZE, VAE_WIDTHS = 512, (128, 256, 512, 512)
    UNET.update(image_size=64, model_channels=320)


def pictures() -> torch.Tensor:
    """Five pictures [5, h, w, 3] in 0..1."""
    return torch.rand(5, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1))


def peers():
    """diffusers' UNet and VAE and transformers' CLIP-L, seeded: the weights of all sides."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(SEED)
    widths = [UNET["model_channels"] * times for times in UNET["channel_mult"]]
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8, cross_attention_dim=768, attention_head_dim=8, block_out_channels=widths
    )
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=VAE_WIDTHS,
        layers_per_block=2,
        latent_channels=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            eos_token_id=49407,
        )
    )
    return [m.eval().requires_grad_(False) for m in (unet, vae, text)]


def scheduler():
    """SD1.5's noise schedule in diffusers."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def model_of(state: dict | None, dtype: torch.dtype = torch.float32):
    """MODEL with diffusers' UNet weights, or none yet, kept and computed with in ``dtype``."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    cpu = torch.device("cpu")
    config = comfy.supported_models.SD15(dict(UNET))
    config.set_inference_dtype(dtype, None)
    config.unet_config["num_heads"], config.unet_config["num_head_channels"] = 8, -1
    model = comfy.model_base.BaseModel(config, device=cpu)
    names = comfy.utils.unet_to_diffusers(UNET)
    if state is not None:
        model.diffusion_model.load_state_dict({names[k]: v for k, v in state.items()})
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def autoencoder(vae):
    """The host's VAE with diffusers' weights."""
    import comfy.sd

    ddconfig = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": VAE_WIDTHS[0],
        "ch_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return comfy.sd.VAE(
        sd=dict(vae.state_dict()), dtype=torch.float32, config={"params": {"ddconfig": ddconfig, "embed_dim": 4}}
    )


def parts(unet, vae, text, dtype: torch.dtype = torch.float32):
    """(MODEL, CLIP, concept set of the five pictures); call after ``toy.host()``."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models_base

    from concepts.host.concept_set import make_set

    cpu = torch.device("cpu")
    with torch.inference_mode():
        model = model_of(unet.state_dict(), dtype)
        target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "load_device": cpu, "offload_device": cpu})
        clip.cond_stage_model.clip_l.transformer.load_state_dict(
            {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text.state_dict().items()},
            strict=False,
        )
        return model, clip, make_set(autoencoder(vae), [pictures()], [], ["a photo of {}"])


def clocked(session) -> tuple[object, list[float], Peak]:
    """What the session learns, as a node runs it without previews and autosaves; when each step ended; memory."""
    from concepts.host import learn

    stamps, peak = [], Peak()

    class Clock(learn.Progress):
        def __init__(self, *args):
            super().__init__(*args)
            stamps.append(time.perf_counter())

        def show(self, done, latent=None):
            super().show(done, latent)
            stamps.append(time.perf_counter())

    learn.Progress = Clock
    with torch.inference_mode():
        done = learn.learn(session, preview_every=0, save_every=0)
    # The first interval also holds the loss before learning; the median passes over it.
    return done, stamps, peak
