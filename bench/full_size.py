"""SDXL and Flux of full size on one GPU: what learning, refining and sampling cost in seconds and memory.

The host's own classes, random bf16 weights, 1024 px, batch 1; models and text encoders stay on the GPU. Steps of Learn
Concept Tokens and Learn Concept LoRA by the nodes' own loop; one refinement in units of a forward pass; sampling with
modulated words and with rows per stage and role against the plain prompt, in pairs that take turns. What needs more
memory than there is says so, and no failure ends the others. The host's dynamic VRAM, which its main.py turns on, is
off here. ``python -m bench full_size [NAMES]``: only the cases whose names hold one of these.
"""

import contextlib
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple

import torch

from . import modulation_cost, toy
from .runner import RESULTS, machine, ratio

DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
FLUX = {"hidden_size": 3072, "num_heads": 24, "context_in_dim": 4096, "vec_in_dim": 768}
"""What differs from ``modulation_cost.model``."""
ENCODERS: dict = {}
"""Changes of the text encoders' configurations, in the host's words."""
SIDE, STEPS, WARM, RANK, ENSEMBLE, PAIRS = 128, 6, 2, 8, 8, 5
"""SIDE: of the latents; WARM: steps that do not count."""
SAMPLING = {"sdxl": (8, 5.0, "dpmpp_2m", "karras"), "flux": (4, 1.0, "euler", "simple")}
"""Steps, cfg, sampler, scheduler; without guidance the host leaves the negative out."""
WORD, TEXTS = "toy", ("a photo of <toy>", "a photo of <toy> in the park")
MODES = ("off", "on")


class Parts(NamedTuple):
    """A family on the GPU."""

    model: object
    clip: object
    shape: tuple[int, int, int]
    """Of its latents."""
    weights: int
    """Bytes that are in use when nothing runs."""


# --- the GPU


def synchronise() -> None:
    torch.cuda.synchronize()


def release() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    torch.cuda.empty_cache()


def used() -> int:
    """Bytes of tensors."""
    return torch.cuda.memory_allocated()


def reset() -> None:
    torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Largest ``used`` since ``reset``."""
    return torch.cuda.max_memory_allocated()


def gpu() -> dict:
    """What ``machine`` does not say of it; memory in MB."""
    return {
        "gpu_memory": megabytes(torch.cuda.mem_get_info()[1]),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def megabytes(count: int) -> float:
    return round(count / 2**20, 1)


def memory(parts: Parts) -> dict:
    """MB since ``reset``."""
    return {"peak_above_weights": megabytes(peak() - parts.weights), "peak_total": megabytes(peak())}


def clocked(run: Callable) -> float:
    """Seconds until the GPU has done it."""
    synchronise()
    begun = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - begun


def spread(values: list[float]) -> dict:
    return {"median": statistics.median(values), "from": min(values), "to": max(values)}


# --- models


def encoders_of(tokenizer, model):
    """CLIP of the host's classes."""
    import comfy.sd
    import comfy.supported_models_base

    places = dict.fromkeys(("load_device", "offload_device", "initial_device"), DEVICE)
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    made = comfy.sd.CLIP(target, model_options={"dtype": DTYPE, **places, **ENCODERS})
    modulation_cost.fill(made.cond_stage_model, torch.Generator(DEVICE).manual_seed(5))
    return made


def sdxl() -> tuple:
    """MODEL and CLIP."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sdxl_clip
    import comfy.supported_models

    config = comfy.supported_models.SDXL(dict(SDXL))
    config.unet_config |= SDXL  # the class has heads of its own
    config.set_inference_dtype(DTYPE, None)
    made = comfy.model_base.SDXL(config, device=DEVICE)
    modulation_cost.fill(made.diffusion_model, torch.Generator(DEVICE).manual_seed(0))
    model = comfy.model_patcher.ModelPatcher(made, load_device=DEVICE, offload_device=DEVICE)
    return model, encoders_of(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)


def flux() -> tuple:
    """MODEL and CLIP."""
    import comfy.text_encoders.flux as text

    return modulation_cost.model(FLUX, DTYPE, DEVICE), encoders_of(text.FluxTokenizer, text.flux_clip(dtype_t5=DTYPE))


def write(path: str) -> None:
    """SDXL as a checkpoint for the stock loader, with the tiny VAE.

    ``path``: of a .safetensors file.
    """
    import comfy.sd
    import comfy.taesd.taesd

    with torch.inference_mode():
        vae = comfy.taesd.taesd.TAESD()
        modulation_cost.fill(vae, torch.Generator().manual_seed(7))
        comfy.sd.save_checkpoint(path, *sdxl(), SimpleNamespace(get_sd=vae.state_dict))


def load(family: str) -> Parts:
    """The family on the GPU, as a node would get it."""
    import comfy.model_management

    with torch.inference_mode():
        model, clip = {"sdxl": sdxl, "flux": flux}[family]()
        comfy.model_management.load_models_gpu([model, clip.patcher])
    release()
    return Parts(model, clip, (model.model.latent_format.latent_channels, SIDE, SIDE), used())


def sizes(parts: Parts) -> dict:
    """Parameters, and MB of all weights."""
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in networks(parts).items()}
    return {"parameters": count, "weights": megabytes(parts.weights)}


def networks(parts: Parts) -> dict[str, torch.nn.Module]:
    return {"model": parts.model.model.diffusion_model, "text encoders": parts.clip.cond_stage_model}


# --- learning


def latents(parts: Parts, count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode(False):
        return [torch.randn(parts.shape, generator=draw) for _ in range(count)]


@contextlib.contextmanager
def watched() -> Iterator[list[float]]:
    """When each step of ``learn`` ended, memory counted from the first; one look before and after, instead of eight,
    and previews of one step."""
    from concepts.host import learn

    stamps: list[float] = []
    kept = learn.Progress, learn.Session.fixed_loss, learn.Session.preview

    class Clock(learn.Progress):
        def __init__(self, *args):
            super().__init__(*args)
            synchronise()
            reset()
            stamps.append(time.perf_counter())

        def show(self, done, latent=None):
            super().show(done, latent)
            synchronise()
            stamps.append(time.perf_counter())

    learn.Progress = Clock
    learn.Session.fixed_loss, learn.Session.preview = lambda s: kept[1](s, 1), lambda s: kept[2](s, 1)
    try:
        yield stamps
    finally:
        learn.Progress, learn.Session.fixed_loss, learn.Session.preview = kept


def learning(parts: Parts, kind: str, checkpointing: str) -> dict:
    """A step of Learn Concept Tokens or Learn Concept LoRA."""
    from concepts.host.concept_set import ConceptSet
    from concepts.host.learn import learn
    from concepts.host.learn_lora import LoraSession, LoraSettings
    from concepts.host.learn_tokens import TokenSession, TokenSettings
    from concepts.host.loading import memory_of

    grounds = ("sand", "grass", "wood")
    said = tuple((f"a photo of {{}} on {ground}",) for ground in grounds)
    data = ConceptSet(tuple(latents(parts, 3)), (None,) * 3, said, (False,) * 3)
    steps = {"steps": WARM + STEPS}
    with torch.inference_mode():
        if kind == "tokens":
            session = TokenSession(parts.model, parts.clip, data, TokenSettings("full", init_text="mug", **steps))
        else:
            settings = LoraSettings("full", learning_rate=1e-4, rank=RANK, token_text="sks mug", **steps)
            session = LoraSession(parts.model, parts.clip, data, settings)
        with watched() as stamps:
            done = learn(session, preview_every=0, save_every=0, checkpointing=checkpointing)
            after = memory(parts)
    each = [b - a for a, b in zip(stamps, stamps[1:], strict=False)][WARM:]
    estimate = megabytes(memory_of(parts.model, data, 1))
    return {"seconds": spread(each), **after, "estimated_memory": estimate, "losses": done.losses}


# --- refining


@torch.inference_mode()
def forward(parts: Parts) -> float:
    """Seconds of a pass without gradient, the median of ten."""
    from concepts.host.denoise import Denoiser
    from concepts.host.gradients import training
    from concepts.host.prompt import encode_prompt

    (entry,) = encode_prompt(parts.clip, "a photo", [])
    with training(parts.model), torch.no_grad():
        d = Denoiser(parts.model)
        x, sigma = d.clean(latents(parts, 1)[0][None]), torch.full((1,), 0.5, device=d.device)
        return statistics.median([clocked(lambda: d(x, sigma, [entry])) for _ in range(11)][1:])


def refinement(parts: Parts):
    """A session on one reference, covered by its mask, and a picture that is a little like it."""
    from concepts.carriers.concept import Concept
    from concepts.host.concept_set import ConceptSet
    from concepts.host.refine import RefineSession, RefineSettings
    from concepts.host.text import encoders

    one, other = latents(parts, 2)
    mask = torch.ones(1, *parts.shape[1:])
    said = ((TEXTS[0],), (TEXTS[1],))
    data = ConceptSet((one, 0.7 * one + 0.7 * other), (mask, None), said, (False, False))
    rows = {e.key: e.rows(WORD)[:1][None, None, None] for e in encoders(parts.clip)}
    concept = Concept("toy", "tokens", rows, {"init_text": WORD})
    settings = RefineSettings("toy", learning_rate=5e-3, ensemble=ENSEMBLE, minimum=-1.0)
    return RefineSession(parts.model, parts.clip, data, settings, concept)


def step(session, checkpointing: str) -> None:
    """All of a refinement behind its features: set up, losses, gradient, optimiser."""
    from concepts.host.gradients import training
    from concepts.kernels.fit import fit

    patchers = (session.model, session.clip.patcher)
    with training(*patchers, checkpointing=checkpointing == "on", memory=session.memory()), session.attached():
        session.begin()
        for _ in fit(session.parameters, session.step_loss, session.optimiser, 1):
            pass


@torch.inference_mode()
def refining(parts: Parts, checkpointing: str, repeats: int) -> dict:
    """Refine for Prompt, without the loss after the step that its report adds."""
    unit, finds, steps = forward(parts), [], []
    for number in range(repeats + 1):
        session = refinement(parts)
        if number == 1:  # the first warms up
            reset()
        found = clocked(session.find), clocked(lambda s=session: step(s, checkpointing))
        if number:
            finds.append(found[0])
            steps.append(found[1])
    return {
        "forward": unit,
        "find": spread(finds),
        "step": spread(steps),
        "passes": spread([(a + b) / unit for a, b in zip(finds, steps, strict=True)]),
        "pairs": sum(len(p.first) for p in session.pairs),
        "measured": session.measured[-1],
        **memory(parts),
    }


# --- sampling


def prompts(family: str, parts: Parts) -> tuple[dict, list]:
    """Name -> conditioning, ``plain`` among them; the negative."""
    from concepts.carriers.concept import Concept
    from concepts.host.text import encoders

    if family == "flux":
        found = modulation_cost.conditionings(
            parts.model, FLUX["context_in_dim"], FLUX["hidden_size"], FLUX["vec_in_dim"]
        )
        return found, found["plain"]
    draw, found = torch.Generator().manual_seed(0), {}
    for name, shape in {"plain": (1, 1, 1), "K/V split, 5 stages": (5, 1, 2)}.items():
        rows = {e.key: 0.1 * torch.randn(*shape, 1, e.width, generator=draw) for e in encoders(parts.clip)}
        concept = Concept("mug", "tokens", rows, {"layers": []})
        found[name] = toy.prompt((None, parts.clip), "a photo of a <mug> on grass", concept)
    return found, toy.prompt((None, parts.clip), "")


@torch.inference_mode()
def sampling(family: str, parts: Parts, name: str) -> dict:
    """Stock sampling with the prompt ``name`` against the plain one."""
    (found, negative), (steps, cfg, *how) = prompts(family, parts), SAMPLING[family]
    sides, peaks, pairs = (found["plain"], found[name]), [], []

    def seconds(positive) -> float:
        synchronise()
        return modulation_cost.seconds(parts.model, positive, negative, cfg, parts.shape, steps, tuple(how))

    for positive in sides:
        reset()
        seconds(positive)  # warms up too
        peaks.append(peak())
    for number in range(PAIRS):
        order = sides if number % 2 == 0 else sides[::-1]
        taken = [seconds(positive) for positive in order]
        pairs.append(taken if number % 2 == 0 else taken[::-1])
    plain, own = zip(*pairs, strict=True)
    return {
        **dict(zip(("with / without", "from", "to"), ratio(own, plain), strict=True)),
        "seconds": spread(own),
        "plain_seconds": spread(plain),
        "extra_peak": megabytes(peaks[1] - peaks[0]),
        **memory(parts),
    }


# --- all of it


def cases(family: str, repeats: int) -> dict[str, Callable[[Parts], dict]]:
    """Name -> what measures it."""
    found: dict = {}
    for kind in ("tokens", "lora"):
        for mode in MODES:
            found[f"{family} {kind} checkpointing {mode}"] = lambda parts, k=kind, m=mode: learning(parts, k, m)
    for mode in MODES:
        found[f"{family} refine checkpointing {mode}"] = lambda parts, m=mode: refining(parts, m, repeats)
    words = ["K/V split, 5 stages"] if family == "sdxl" else [f"5 words of {n}" for n in modulation_cost.PIECES]
    for name in words:
        found[f"{family} sampling {name}"] = lambda parts, n=name: sampling(family, parts, n)
    return found


def attempt(run: Callable[[], dict]) -> dict:
    """What it gives, or why it gave nothing."""
    import comfy.model_management

    try:
        found = run()
    except comfy.model_management.OOM_EXCEPTION as error:
        found = {"out of memory": str(error)[:400], "peak_total": megabytes(peak())}
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-1500:]}
    release()  # only now does the error hold no tensors
    return found


def main(options, rest) -> int:
    toy.host()
    import comfyui_version

    facts = {**machine(), **gpu(), "comfyui": comfyui_version.__version__, "dtype": str(DTYPE), "side": 8 * SIDE}
    file = RESULTS / "full_size.json"
    before = json.loads(file.read_text()) if rest and file.exists() else {}
    report = {"case": "full_size", "machine": facts, "families": {}, "table": {}}
    if before.get("machine") == facts:  # a few cases anew beside the others
        report |= {k: before[k] for k in ("families", "table")}
    failed = 0
    for family in SAMPLING:
        wanted = {k: v for k, v in cases(family, options.repeats).items() if not rest or any(r in k for r in rest)}
        if not wanted:
            continue
        begun, held = time.perf_counter(), []
        report["families"][family] = attempt(lambda held=held, f=family: sizes(held.append(load(f)) or held[0]))
        print(f"{family}: {report['families'][family]}, {time.perf_counter() - begun:.1f} s", flush=True)
        for name, run in wanted.items() if held else ():
            begun = time.perf_counter()
            found = report["table"][name] = attempt(lambda run=run, held=held: run(held[0]))
            failed += "failed" in found
            print(f"{name} ({time.perf_counter() - begun:.1f} s): {json.dumps(found)}", flush=True)
            file.write_text(json.dumps(report, indent=1) + "\n")
        failed += not held
        held.clear()
        release()
        print(f"{family}: {megabytes(used())} MB are left", flush=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failed else 0
