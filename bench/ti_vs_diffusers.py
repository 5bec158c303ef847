"""A Textual Inversion step through the host's UNet against diffusers' ``textual_inversion.py`` on the same weights.

Half-width SD1.5 configuration, random weights, 256 px, fp32, batch 1, twenty steps. The peer does what its script does:
encodes the picture with the VAE every step, keeps AdamW over the whole vocabulary and restores every row but one. So
that both see the same numbers it is pinned to the mean of the VAE's posterior, to no weight decay, and to our draws of
picture, time and noise.
"""

import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from . import toy
from .runner import compare

STEPS, RATE, SIZE, SEED, WORD = 20, 5e-4, 256, 0, "toy"
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


def pictures() -> torch.Tensor:
    """Five pictures [5, h, w, 3] in 0..1."""
    return torch.rand(5, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(1))


def peers():
    """diffusers' UNet and VAE and transformers' CLIP-L, seeded: the weights of both sides."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(SEED)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(160, 320, 640, 640)
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


class Peak:
    """Resident memory in MB: at the start of the loop, and its peak since."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self.read("VmRSS")

    @staticmethod
    def read(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

    def report(self) -> dict:
        high = self.read("VmHWM")
        return {"peak_total": high, "peak_above_weights": high - self.start}


def draws(step: int, shape) -> tuple[int, torch.Tensor, torch.Tensor]:
    """(picture, time index, noise) of our loop's step."""
    from concepts.host.concept_set import ConceptSet
    from concepts.kernels.draws import generator, times

    data = ConceptSet(
        tuple(torch.zeros(shape[1:]) for _ in range(5)), (None,) * 5, (("a photo of {}",),) * 5, (False,) * 5
    )
    draw = generator(SEED, step, "step")
    (picture,), _ = data.draw(1, draw)
    when = times(1, "uniform", 0.0, 1.0, draw)
    return picture, (when * 1000).long().clamp(0, 999), torch.randn(shape, generator=draw)


def peer() -> dict:
    """diffusers' loop."""
    import diffusers
    import transformers
    from diffusers import DDPMScheduler

    toy.host()
    unet, vae, text = peers()
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    from comfy.sd1_clip import SD1Tokenizer

    plain = [int(t) for t, _ in SD1Tokenizer().tokenize_with_weights(f"a photo of {WORD}")["l"][0]]
    word = plain[4]
    text.resize_token_embeddings(49409)
    table = text.get_input_embeddings().weight
    with torch.no_grad():
        table[49408] = table[word]
    ids = torch.tensor([plain[:4] + [49408] + plain[5:]])
    images = pictures().movedim(-1, 1) * 2 - 1
    peak = Peak()
    table.requires_grad_(True)
    original = table.detach().clone()
    others = torch.ones(len(table), dtype=torch.bool)
    others[49408] = False
    optimiser = torch.optim.AdamW([table], lr=RATE, weight_decay=0.0)
    losses, stamps = [], [time.perf_counter()]
    for step in range(STEPS):
        picture, when, noise = draws(step, (1, 4, SIZE // 8, SIZE // 8))
        with torch.no_grad():
            latent = vae.encode(images[picture][None]).latent_dist.mode() * 0.18215
        hidden = text(ids)[0]
        predicted = unet(scheduler.add_noise(latent, noise, when), when, hidden).sample
        loss = F.mse_loss(predicted.float(), noise, reduction="mean")
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            table[others] = original[others]
        losses.append(float(loss.detach()))
        stamps.append(time.perf_counter())
    return report(losses, stamps, peak, {"diffusers": diffusers.__version__, "transformers": transformers.__version__})


def ours() -> dict:
    """The pack's loop, as the node calls it, without previews and autosaves."""
    unet, vae, text = peers()
    toy.host()
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sd
    import comfy.sd1_clip
    import comfy.supported_models
    import comfy.supported_models_base
    import comfy.utils
    import comfyui_version

    from concepts.host import learn
    from concepts.host.concept_set import make_set
    from concepts.host.learn_tokens import TokenSession, TokenSettings

    cpu = torch.device("cpu")
    with torch.inference_mode():
        config = comfy.supported_models.SD15(dict(UNET))
        config.set_inference_dtype(torch.float32, None)
        config.unet_config["num_heads"], config.unet_config["num_head_channels"] = 8, -1
        model = comfy.model_base.BaseModel(config, device=cpu)
        names = comfy.utils.unet_to_diffusers(UNET)
        state = {names[k]: v for k, v in unet.state_dict().items()}
        model.diffusion_model.load_state_dict(state)
        model = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
        clip = comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "load_device": cpu, "offload_device": cpu})
        clip.cond_stage_model.clip_l.transformer.load_state_dict(
            {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text.state_dict().items()},
            strict=False,
        )
        ddconfig = {
            "double_z": True,
            "z_channels": 4,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": 64,
            "ch_mult": [1, 2, 4, 4],
            "num_res_blocks": 2,
            "attn_resolutions": [],
            "dropout": 0.0,
        }
        autoencoder = comfy.sd.VAE(
            sd=dict(vae.state_dict()), dtype=torch.float32, config={"params": {"ddconfig": ddconfig, "embed_dim": 4}}
        )
        del unet, vae, text, state
        data = make_set(autoencoder, [pictures()], [], ["a photo of {}"])
        del autoencoder
    stamps, peak = [], Peak()

    class Clock(learn.Progress):
        def __init__(self, *args):
            super().__init__(*args)
            stamps.append(time.perf_counter())

        def show(self, done, latent=None):
            super().show(done, latent)
            stamps.append(time.perf_counter())

    learn.Progress = Clock
    settings = TokenSettings("bench", steps=STEPS, init_text=WORD, learning_rate=RATE, seed=SEED)
    with torch.inference_mode():
        done = learn.learn(TokenSession(model, clip, data, settings), preview_every=0, save_every=0)
    # The first interval also holds the loss before learning; the median passes over it.
    return report(done.losses, stamps, peak, {"ComfyUI": comfyui_version.__version__})


def report(losses: list[float], stamps: list[float], peak: Peak, versions: dict) -> dict:
    steps = [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
    return {"seconds": statistics.median(steps), "losses": losses, "versions": versions, **peak.report()}


def check(ours: dict, peer: dict) -> float:
    """Largest relative difference of the losses. Raises: AssertionError above 1e-4."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], peer["losses"], strict=True))
    assert worst < 1e-4, f"the two sides did not compute the same losses: {worst:.1e} apart"
    return worst


def main(options, rest) -> int:
    if options.side:
        print(json.dumps({"ours": ours, "peer": peer}[options.side]()))
        return 0
    return compare("ti_vs_diffusers", check, options.repeats, options.accept_noise)
