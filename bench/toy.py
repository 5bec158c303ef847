"""The toy world in this process, for benchmarks: load, prompt, draw with the stock sampler."""

import hashlib
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch

PACK = Path(__file__).resolve().parent.parent
HOW = STEPS, CFG, SAMPLER, SCHEDULER = 20, 3.0, "dpmpp_2m", "karras"
FLOW = 20, 3.0, "euler", "simple"
"""The same for the transformer."""


def alias() -> None:
    """The pack as package ``concepts`` in this process."""
    package = types.ModuleType("concepts")
    package.__path__ = [str(PACK)]
    sys.modules["concepts"] = package


def host() -> None:
    """ComfyUI from COMFYUI_PATH, and the pack as package ``concepts``, in this process; on the GPU if there is one."""
    alias()
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    kept, sys.argv = sys.argv, sys.argv[:1] + ([] if torch.cuda.is_available() else ["--cpu"])
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401

    sys.argv = kept
    import folder_paths
    import utils.install_util  # noqa: F401

    folder_paths.set_output_directory(str(PACK / "out" / "bench"))


def load(kind: str = "unet"):
    """(MODEL, CLIP, VAE) as the node gives them; ``kind``: unet or transformer."""
    from concepts.host import toybox, toydit

    with torch.inference_mode():
        return (toybox if kind == "unet" else toydit).load()


def weights(file: str) -> str:
    """A name of packed weights that changes with them; ``file``: in the demo's folder."""
    return hashlib.blake2b((PACK / "demo" / file).read_bytes(), digest_size=4).hexdigest()


@torch.inference_mode()
def draw(toy, conditionings: list, seed: int, at_once: int = 50, how: tuple = HOW) -> np.ndarray:
    """Pictures uint8 [n, 128, 128, 3], one per conditioning, with the stock KSampler and fixed settings."""
    import comfy.hooks
    import nodes

    model, clip, vae = toy
    (empty,) = nodes.CLIPTextEncode().encode(clip, "")
    pictures = []
    for start in range(0, len(conditionings), at_once):
        part = conditionings[start : start + at_once]
        hooks = comfy.hooks.HookGroup.combine_all_hooks([c[0][1].get("hooks") for c in part])
        # one row of the batch each; a hook knows its own row
        facts = {"hooks": hooks} if hooks else {}
        if part[0][0][1].get("pooled_output") is not None:
            facts["pooled_output"] = torch.cat([c[0][1]["pooled_output"] for c in part])
        rows = [[torch.cat([c[0][0] for c in part]), facts]]
        (latent,) = nodes.EmptyLatentImage().generate(128, 128, len(part))
        (latent,) = nodes.common_ksampler(model, seed + start, *how, rows, empty, latent)
        (images,) = nodes.VAEDecode().decode(vae, latent)
        pictures.append((images * 255).round().byte().numpy())
    return np.concatenate(pictures)


@torch.inference_mode()
def prompt(toy, text: str, *concepts):
    """Conditioning of a prompt, through the pack's own encoder."""
    from concepts.host.prompt import encode_prompt

    return encode_prompt(toy[1], text, [(c, 1.0) for c in concepts])
