"""A LoRA step against ComfyUI's own TrainLoraNode at its defaults, in the same ComfyUI on the same weights.

Half-width SD1.5 configuration, random weights in bf16, 256 px, batch 1, rank 8. The core's node adapts every layer,
through merged weights, and recomputes the whole network; ours is Learn Concept LoRA with its default layers
(``attention``), and with ``all linear``. The two do not learn the same layers, so only time and memory are compared.
``nox -s bench -- lora_vs_core``
"""

import json
import math
import time

import torch

from . import half, toy
from .runner import Peak, compare, timed

STEPS, RANK, RATE, DTYPE = 10, 8, 5e-4, torch.bfloat16


def made():
    """(MODEL, CLIP, concept set)."""
    modules = half.peers()
    toy.host()
    return half.parts(*modules, DTYPE)


def peer() -> dict:
    """TrainLoraNode; what the schema gives no default for is connected."""
    model, clip, data = made()
    import comfyui_version
    from comfy_extras import nodes_train

    # The node copies the model by loading it again from where a stock loader got it.
    weights = {k: v.clone() for k, v in model.model.diffusion_model.state_dict().items()}

    def again(disable_dynamic=False):
        copy = half.model_of(None, DTYPE)
        copy.model.diffusion_model.load_state_dict(weights)
        return copy

    model.cached_patcher_init = (again, ())
    stamps = []

    class Clock:
        def __init__(self, total):
            stamps.append(time.perf_counter())

        def update(self, count):
            stamps.append(time.perf_counter())

    nodes_train.ProgressBar = Clock
    schema = nodes_train.TrainLoraNode.define_schema()
    values = {i.id: [i.default] for i in schema.inputs if getattr(i, "default", None) is not None}
    with torch.inference_mode():
        (positive,) = [clip.encode_from_tokens_scheduled(clip.tokenize(f"a photo of {half.WORD}"))]
        latents = [{"samples": latent[None]} for latent in data.latents]
        connected = {"model": [model], "latents": latents, "positive": [positive], "steps": [STEPS], "rank": [RANK]}
        peak = Peak()
        done = nodes_train.TrainLoraNode.execute(**values | connected)
    (losses,) = [part["loss"] for part in done.args if isinstance(part, dict) and "loss" in part]
    return timed(losses, stamps, peak, {"ComfyUI": comfyui_version.__version__})


def ours(targets: str = "attention") -> dict:
    """Learn Concept LoRA."""
    parts = made()
    import comfyui_version

    from concepts.host.learn_lora import LoraSession, LoraSettings

    settings = LoraSettings("bench", steps=STEPS, learning_rate=RATE, rank=RANK, targets=targets, token_text=half.WORD)
    done, stamps, peak = half.clocked(LoraSession(*parts, settings))
    assert all(map(math.isfinite, done.losses))
    return timed(done.losses, stamps, peak, {"ComfyUI": comfyui_version.__version__})


def main(options, rest) -> int:
    if options.side:
        sides = {"peer": peer, "ours": ours, "all linear": lambda: ours("all linear")}
        print(json.dumps(sides[options.side]()))
        return 0
    return compare("lora_vs_core", options.repeats, options.accept_noise, sides=("ours", "all linear"))
