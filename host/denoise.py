"""Running the host's denoiser with gradients, one conditioning per sample, for every model family."""

from collections.abc import Callable

import comfy.conds
import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch

from ..carriers.errors import CarrierMismatch

ROWS = "concept_rows"
"""Key in ``transformer_options``: which rows of ``Denoiser``'s batch a pass holds."""
OVERRIDE = "optimized_attention_override"
"""The host's key in ``transformer_options`` for what stands in for its attention."""
SAMPLERS, SCHEDULERS = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
"""What the host has."""


def space_of(sampling) -> tuple[str, float]:
    """Prediction space of a model's ``model_sampling`` and its sigma_data (comfy/model_sampling.py).

    Raises: NotImplementedError naming the class.
    """
    known = [("flow", "CONST"), ("x0", "X0"), ("edm", "EDM"), ("v", "V_PREDICTION"), ("eps", "EPS")]  # v subclasses eps
    for space, name in known:
        kind = getattr(comfy.model_sampling, name, None)
        if kind is not None and isinstance(sampling, kind):
            return space, float(getattr(sampling, "sigma_data", 1.0))
    raise NotImplementedError(f"Models that sample with {type(sampling).__mro__[1].__name__} cannot be learned on yet.")


def sigmas_at(sampling, times: torch.Tensor, shifted: bool = True) -> torch.Tensor:
    """Noise levels [b], fp32, at training times in [0, 1] (1 = pure noise).

    Models with a table of discrete steps use exactly those steps; flow models apply their own shift, or with
    ``shifted`` False have the times themselves.
    """
    if space_of(sampling)[0] != "flow" and hasattr(sampling, "sigmas"):
        table = sampling.sigmas.detach().float().cpu()
        return table[(times * len(table)).long().clamp(0, len(table) - 1)]
    times = times.clamp(1e-3, 1 - 1e-3)
    if not shifted:
        return times.float().cpu()
    return torch.tensor([float(sampling.percent_to_sigma(float(1 - t))) for t in times], dtype=torch.float32)


def noise_time(sampling, sigma: torch.Tensor) -> torch.Tensor:
    """Training time [b] in 0..1 of noise levels [b]: the share of the model's timesteps below; of flow models sigma."""
    sigma = sigma.detach().float().cpu()
    if space_of(sampling)[0] == "flow" or not hasattr(sampling, "sigmas"):
        return sigma.clamp(0, 1)
    table = sampling.sigmas.detach().float().cpu()
    return (sigma[:, None].clamp_min(1e-20).log() - table.log()).abs().argmin(1) / len(table)


class Attention:
    """``optimized_attention_override`` of a ``Denoiser``'s passes.

    Learning has torch's own product, as SageAttention and the host's flash op have no backward pass; also its passes
    without gradient, which are compared with those that have one. Every other pass is as the user chose.
    """

    def __init__(self, earlier: Callable | None, device: torch.device):
        """``earlier``: another node's override of the same MODEL."""
        self.earlier, self.on_cpu = earlier, comfy.model_management.is_device_cpu(device)

    def learns(self) -> bool:
        """Whether a pass of now is one of learning: those of other nodes run in the host's inference mode."""
        return not torch.is_inference_mode_enabled()

    def __call__(self, chosen: Callable, q: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Attention as the host's functions have it; ``chosen``: the one of them that it would take."""
        if self.learns():
            return attention_pytorch(q, *args, **kwargs)
        if self.earlier:
            return self.earlier(chosen, q, *args, **kwargs)
        # what the host chooses on CPUs (sub-quadratic, attention.py) is slower in fp32
        return (attention_pytorch if self.on_cpu and q.dtype == torch.float32 else chosen)(q, *args, **kwargs)


def context_width(network) -> int | None:
    """Numbers per row of text that a network takes; None where it is not one of those known here."""
    for name, part in network.named_modules():
        if name in ("txt_in", "context_embedder") or name.endswith("attn2.to_k"):
            return getattr(part, "in_features", None)
    return None


class Denoiser:
    """A loaded MODEL as a differentiable function of noised latents and conditionings."""

    def __init__(self, patcher):
        self.patcher, self.model = patcher, patcher.model
        self.sampling = self.model.model_sampling
        self.space, self.sigma_data = space_of(self.sampling)
        self.device, self.width = patcher.load_device, context_width(self.model.diffusion_model)
        options = comfy.patcher_extension.copy_nested_dicts(patcher.model_options.get("transformer_options", {}))
        if patcher.wrappers:  # sampling merges them in prepare_model_patcher (sampler_helpers.py)
            comfy.patcher_extension.merge_nested_dicts(
                options.setdefault("wrappers", {}), patcher.wrappers, copy_dict1=False
            )
        self.options = {**options, OVERRIDE: Attention(options.get(OVERRIDE), self.device)}

    def clean(self, latents: torch.Tensor) -> torch.Tensor:
        """VAE latents -> the model's own scale, on its device, fp32."""
        return self.model.process_latent_in(latents.to(self.device, torch.float32))

    def noised(self, clean: torch.Tensor, noise: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Forward process of this family."""
        return self.sampling.noise_scaling(sigma.view(-1, *[1] * (clean.ndim - 1)), noise, clean, max_denoise=False)

    def inputs(self, entries: list, like: torch.Tensor) -> list[tuple[list[int], dict]]:
        """Host conditioning entries, one per row of ``like`` [b, c, h, w] -> per pass its rows, and model inputs,
        differentiable.

        The host's own route (samplers.process_conds) adds whatever the family wants: pooled vectors, sizes, guidance.
        One pass is enough unless texts differ in length and the family's are not repeated to that of others: SD3's.
        """
        conds = comfy.sampler_helpers.convert_cond(entries)
        conds = comfy.samplers.process_conds(
            self.model, like, {"positive": conds}, self.device, latent_image=torch.zeros_like(like), seed=0
        )["positive"]
        groups: dict[tuple, list[int]] = {}
        parts = [{k: v.process_cond(batch_size=1, area=None) for k, v in c["model_conds"].items()} for c in conds]
        for row, part in enumerate(parts):
            fixed = ((k, v.cond.shape) for k, v in part.items() if type(v) is comfy.conds.CONDRegular)
            groups.setdefault(tuple(fixed), []).append(row)
        passes = []
        for rows in groups.values():
            joined = comfy.samplers.cond_cat([parts[row] for row in rows])
            passes.append((rows, {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in joined.items()}))
        return passes

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, entries: list, change=None) -> torch.Tensor:
        """Denoised estimate [b, c, h, w], fp32. ``change``: transformer_options -> those of this call.

        Raises: CarrierMismatch for latents or texts of another kind of model.
        """
        kind, channels = type(self.model).__name__, self.model.latent_format.latent_channels
        if x.shape[1] != channels:
            raise CarrierMismatch(
                f"The latent has {x.shape[1]} channels, and {kind} takes {channels}: it is of another kind of model; "
                "connect the model's own VAE, or a latent of it."
            )
        if wrong := {cond.shape[-1] for cond, _ in entries} - {self.width or entries[0][0].shape[-1]}:
            raise CarrierMismatch(
                f"The text encoder gives rows of {min(wrong)} numbers, and {kind} takes {self.width}: it is of another "
                "kind of model; connect the model's own CLIP."
            )
        passes, found = self.inputs(entries, x), {}
        for rows, inputs in passes:
            some, levels = (x, sigma) if len(passes) == 1 else (x[rows], sigma[rows])
            options = comfy.patcher_extension.copy_nested_dicts(self.options)
            options |= {"sigmas": levels, "cond_or_uncond": [0], "uuids": [0]}  # what other packs' patches look up
            options[ROWS] = rows
            options = change(options) if change else options
            out = self.model.apply_model(some, levels, transformer_options=options, **inputs).float()
            found |= zip(rows, out, strict=True)
        return out if len(passes) == 1 else torch.stack([found[row] for row in range(len(x))])
