"""SD1.5 at its full size, with random weights: shapes, memory and gradients are those of the real model."""

import math

import pytest
import torch

from .tiny import fill

pytestmark = [pytest.mark.usefixtures("host"), pytest.mark.slow]
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}


@pytest.fixture(scope="module")
def full(host, tmp_path_factory):
    """MODEL and CLIP in fp16 that compute in fp32, and pictures of 256 px."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models
    import comfy.supported_models_base
    import folder_paths

    from concepts.host.concept_set import ConceptSet

    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("full")))
    cpu = torch.device("cpu")
    with torch.inference_mode():
        config = comfy.supported_models.SD15(dict(UNET))
        config.unet_config["num_heads"], config.unet_config["num_head_channels"] = 8, -1
        config.set_inference_dtype(torch.float16, torch.float32)
        base = comfy.model_base.BaseModel(config, device=cpu)
        assert sum(p.numel() for p in base.diffusion_model.parameters()) == 859_520_964
        fill(base.diffusion_model)
        model = comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)
        target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float16, "load_device": cpu, "offload_device": cpu})
        fill(clip.cond_stage_model)
    g = torch.Generator().manual_seed(0)
    torch.set_num_threads(2)
    latents = tuple(torch.randn(4, 32, 32, generator=g) for _ in range(3))
    captions = tuple((f"a photo of {{}} on {ground}",) for ground in ("sand", "grass", "wood"))
    data = ConceptSet(latents, (None,) * 3, captions, (False,) * 3)
    yield model, clip, data
    torch.set_num_threads(1)


def learned(session):
    """What two checkpointed steps give; every loss is finite."""
    from concepts.host.learn import learn

    with torch.inference_mode():
        done = learn(session, preview_every=0, save_every=0, checkpointing="on")
    assert all(map(math.isfinite, [*done.losses, done.before, done.after]))
    return done.concept


@pytest.mark.parametrize("changes", [{}, {"layers": "each", "stages": 2}], ids=str)
def test_tokens(full, changes):
    from concepts.host.learn_tokens import TokenSession, TokenSettings

    made = learned(TokenSession(*full, TokenSettings("mug", steps=2, init_text="mug", **changes)))
    assert made.tensors["clip_l"].shape == (2 if changes else 1, 16 if changes else 1, 1, 1, 768)


def test_residual_tokens(full):
    """Reconstruction and two anchors in one batch of three."""
    from concepts.host.learn_residual import ResidualSession, ResidualSettings

    session = ResidualSession(*full, ResidualSettings("mug", steps=2, init_text="mug"))
    assert learned(session).tensors["clip_l"].shape == (1, 1, 1, 1, 768)
    assert [r.tensors["clip_l"].shape[-2:] for r in session.residuals()] == [(8, 768)] * 3


def test_kv_tokens(full):
    """The self-attention module of the paper's width, and maps of a half of the latent's side."""
    from concepts.host.learn_kv import KVSession, KVSettings

    made = learned(KVSession(*full, KVSettings("mug", steps=2, init_text="mug")))
    assert made.tensors["clip_l"].shape == (5, 1, 2, 1, 768)


def test_lora(full):
    """Query, key, value and output of both attentions in 16 blocks."""
    from concepts.host.learn_lora import LoraSession, LoraSettings

    made = learned(LoraSession(*full, LoraSettings("mug", steps=2, token_text="sks mug")))
    ups = [v for k, v in made.tensors.items() if k.endswith("lora_up.weight")]
    assert len(ups) == 128 and all(bool(v.any()) for v in ups)
