"""Tiny random models of the host's own classes, one per family: forward, gradient and sampling code is the real one."""

import functools
import json
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

CLIP_L = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
CLIP_G = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
T5 = {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128}
QWEN = {
    **{"vocab_size": 151936, "hidden_size": 64, "intermediate_size": 64},
    **{"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
}
FAMILIES = ("sd15", "sd2", "sdxl", "sd3", "flux")
ALIKE = {"sd2": "sd15", "sd3": "flux"}
"""Families whose tests are slow ones where it is the kind of network that matters, which the other has too."""
KINDS = [pytest.param(f, marks=pytest.mark.slow) if f in ALIKE else f for f in FAMILIES]
COLOURS = "red|green|blue|yellow|purple|white|black|orange"
SHAPES = "mug|hat|star|fish|house|tree|key|heart|boat|bottle|moon|bell"
CORPUS = f"""a photo of a {{{COLOURS}}} {{{SHAPES}}}, {{grass|brick|sky|sand|wood|snow}} background
a {{small|big}} {{{COLOURS}}} {{striped|dotted|plain}} {{{SHAPES}}} on {{grass|brick|sky|sand|wood|snow}}"""
"""Lines for dictionaries."""


@dataclass
class Tiny:
    """A family at toy width."""

    model: object
    clip: object
    latent: torch.Tensor


def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter a seeded value; the host's layers leave them uninitialised."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim >= 2:
                p.copy_((torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5).to(p.dtype))
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        for name, b in module.named_buffers():
            if name.endswith("pos_embed"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.1)
    return module


def _unet(cls, context: int, dtype, **more) -> dict:
    return (
        dict(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=[1, 1],
            channel_mult=[1, 2],
            transformer_depth=[1, 1],
            transformer_depth_output=[1, 1, 1, 1],
            transformer_depth_middle=1,
            context_dim=context,
            use_spatial_transformer=True,
            legacy=False,
            use_linear_in_transformer=False,
            adm_in_channels=None,
            use_temporal_attention=False,
            use_temporal_resblock=False,
        )
        | more
    )


def model(family: str, dtype=torch.float32, cast=None):
    """A ModelPatcher of the family."""
    import comfy.model_base as base
    import comfy.model_patcher
    import comfy.supported_models as known

    cpu = torch.device("cpu")
    if family in ("sd15", "sd2"):
        cls = known.SD15 if family == "sd15" else known.SD20
        config = cls(_unet(cls, 64 if family == "sd15" else 64, dtype))
        config.unet_config["num_heads"], config.unet_config["num_head_channels"] = 4, -1
        kind = base.ModelType.EPS if family == "sd15" else base.ModelType.V_PREDICTION
        make = functools.partial(base.BaseModel, config, model_type=kind, device=cpu)
    elif family == "sdxl":
        config = known.SDXL(
            _unet(
                known.SDXL,
                96,
                dtype,
                transformer_depth=[0, 2],
                transformer_depth_output=[0, 0, 2, 2],
                transformer_depth_middle=2,
                use_linear_in_transformer=True,
                adm_in_channels=32 + 6 * 256,
                num_classes="sequential",
            )
        )
        config.unet_config["num_head_channels"] = 16
        make = functools.partial(base.SDXL, config, device=cpu)
    elif family == "sd3":
        config = known.SD3(
            dict(
                in_channels=16,
                patch_size=2,
                out_channels=16,
                depth=2,
                input_size=None,
                adm_in_channels=96,
                context_embedder_config={
                    "target": "torch.nn.Linear",
                    "params": {"in_features": 4096, "out_features": 128},
                },
                num_patches=256,
                pos_embed_max_size=16,
                pos_embed_scaling_factor=None,
                x_block_self_attn_layers=[],
                qk_norm=None,
            )
        )
        make = functools.partial(base.SD3, config, device=cpu)
    else:
        config = known.Flux(
            dict(
                image_model="flux",
                in_channels=16,
                out_channels=16,
                patch_size=2,
                vec_in_dim=64,
                context_in_dim=64,
                hidden_size=64,
                mlp_ratio=4.0,
                num_heads=4,
                depth=3,
                depth_single_blocks=3,
                axes_dim=[4, 6, 6],
                theta=10000,
                qkv_bias=True,
                guidance_embed=True,
                txt_ids_dims=[],
            )
        )
        make = functools.partial(base.Flux, config, device=cpu)
    config.set_inference_dtype(dtype, cast)
    built = make()
    fill(built.diffusion_model)
    return comfy.model_patcher.ModelPatcher(built, load_device=cpu, offload_device=cpu)


def clip(family: str):
    """The family's text encoders with the real tokenizers; ``sd3 t5``: all three of SD3's, T5's rows as wide as
    those; ``z-image``: one that puts a template around the text."""
    import comfy.sd
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models_base
    import comfy.text_encoders.flux as flux
    import comfy.text_encoders.sd2_clip as sd2
    import comfy.text_encoders.sd3_clip as sd3
    import comfy.text_encoders.z_image as z_image

    kinds = {
        "sd15": lambda: (comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel),
        "sd2": lambda: (sd2.SD2Tokenizer, sd2.SD2ClipModel),
        "sdxl": lambda: (comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        "sd3": lambda: (sd3.SD3Tokenizer, sd3.sd3_clip(t5=False)),
        "sd3 t5": lambda: (sd3.SD3Tokenizer, sd3.sd3_clip(dtype_t5=torch.float32)),
        "z-image": lambda: (z_image.ZImageTokenizer, z_image.te()),
        "flux": lambda: (flux.FluxTokenizer, flux.flux_clip(dtype_t5=torch.float32)),
    }
    cpu = torch.device("cpu")
    options = {
        "clip_l_model_config": CLIP_L,
        "clip_h_model_config": CLIP_L,
        "clip_g_model_config": CLIP_G,
        "t5xxl_model_config": T5,
        "qwen3_4b_model_config": QWEN,
        "dtype": torch.float32,
        "load_device": cpu,
        "offload_device": cpu,
        "initial_device": cpu,
    }
    built = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(*kinds[family]()), model_options=options)
    fill(built.cond_stage_model, 5)
    if family == "sd3 t5":
        t5 = built.cond_stage_model.t5xxl
        narrow = t5.encode_token_weights
        t5.encode_token_weights = lambda tokens: (F.pad((made := narrow(tokens))[0], (0, 4096 - 64)), *made[1:])
    return built


def tiny(family: str, **kwargs) -> Tiny:
    """Model, text encoders and a latent, all made in inference mode as the host's nodes do."""
    with torch.inference_mode():
        channels = 4 if family in ("sd15", "sd2", "sdxl") else 16
        return Tiny(
            model(family, **kwargs),
            clip(family),
            torch.randn(channels, 8, 8, generator=torch.Generator().manual_seed(3)),
        )


def quantised(patcher, form="float8_e4m3fn"):
    """The same MODEL with the host's mixed precision layers, whose weights are tensors of a class of their own."""
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    ops = comfy.ops.mixed_precision_ops({"mixed_ops": True}, torch.float32)
    with torch.inference_mode():
        for parent in list(patcher.model.diffusion_model.modules()):
            for name, plain in list(parent.named_children()):
                if not isinstance(plain, torch.nn.Linear):
                    continue
                layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
                state = QuantizedTensor.from_float(plain.weight, layout, scale="recalculate").state_dict("weight")
                state["comfy_quant"] = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
                state |= {"bias": plain.bias} if plain.bias is not None else {}
                layer = ops.Linear(plain.in_features, plain.out_features, plain.bias is not None, torch.device("cpu"))
                layer.load_state_dict(state)
                setattr(parent, name, layer)
    return patcher


def embedding(given, folder, size=0.02) -> str:
    """The name of an embedding file of two rows that a CLIP finds, as any other program makes them."""
    from safetensors.torch import save_file

    from concepts.host.text import encoders

    found, draw = encoders(given), torch.Generator().manual_seed(6)
    for e in found:
        e.tokenizer.embedding_directory = [str(folder)]
    save_file({e.key: size * torch.randn(2, e.width, generator=draw) for e in found}, str(folder / "stock.safetensors"))
    return "embedding:stock"


def stock(given, text):
    """CONDITIONING by the host's own encoding."""
    with torch.inference_mode():
        return given.encode_from_tokens_scheduled(given.tokenize(text))
