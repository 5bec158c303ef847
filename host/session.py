"""What one learning run consists of, whatever the carrier: pictures, conditioning, losses, previews, the concept."""

import contextlib
import hashlib
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import comfy.model_management
import torch

from ..carriers.concept import Concept, check_name
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator, times
from ..kernels.losses import masked_mse, residual
from .attention import both
from .concept_set import ConceptSet
from .denoise import Denoiser, sigmas_at
from .gradients import ordinary
from .overlays import background, mask_of, overlay
from .positions import learned_columns
from .show import tap_of
from .text import constant, encoders

LINE = 60
"""Characters of a line that a node has room for."""


@dataclass(frozen=True)
class RunSettings:
    """What every learner asks; all of it is kept in the concept's info. Raises: CarrierError for the name."""

    name: str
    steps: int = 500
    learning_rate: float = 5e-3
    batch: int = 1
    accumulate: int = 1
    time_law: str = "uniform"
    time_low: float = 0.0
    time_high: float = 1.0
    masked_loss: bool = False
    seed: int = 0

    def __post_init__(self):
        check_name(self.name)


class Session:
    """One learning run. A learner says what is learned (``prepare``, ``tensors``), what each picture is conditioned on
    (``condition``), and, when there is more than the diffusion loss, which (``losses``)."""

    kind = "tokens"
    passes = 1
    """How often each picture of a batch goes through the model at once; for the estimate of memory."""

    def __init__(self, model, clip, data: ConceptSet, settings: RunSettings, earlier: Concept | None = None):
        """Raises: ValueError for a masked loss without masks; CarrierMismatch for a CLIP that ``constant`` refuses."""
        constant(clip)
        self.model, self.clip, self.data, self.settings, self.earlier = model, clip, data, settings, earlier
        if settings.masked_loss and all(mask is None for mask in data.masks):
            raise ValueError(
                "masked_loss counts the masked area alone, and no picture has a mask; connect masks in Make Concept "
                "Set, or turn masked_loss off."
            )

    # --- what a learner says

    def gather(self) -> None:
        """What the model has to make before it learns; called first, with the model as the host left it."""

    def prepare(self) -> tuple[dict[str, torch.Tensor], object]:
        """Start values of everything learned, fp32, and the optimiser; called once inside ``training``."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """What the concept holds, from ``parameters``."""
        return dict(self.parameters)

    def condition(self, parameters: Mapping[str, torch.Tensor], pictures: list[int], captions: list[int], sigma):
        """Host conditioning entries for ``pictures`` at ``sigma`` [b]; a change of ``transformer_options`` or None."""
        raise NotImplementedError

    def losses(self, parameters, pictures: list[int], captions: list[int], when: torch.Tensor, draw: torch.Generator):
        """Name -> scalar, summed to the loss; ``diffusion`` is the one that before and after are compared by."""
        return {"diffusion": self.diffusion(parameters, pictures, captions, when, draw)}

    def times(self, count: int, step: int, draw: torch.Generator) -> torch.Tensor:
        """Training times [count] of a step."""
        s = self.settings
        return times(count, s.time_law, s.time_low, s.time_high, draw)

    def sigmas(self, when: torch.Tensor) -> torch.Tensor:
        """Noise levels [b] at training times."""
        return sigmas_at(self.denoiser.sampling, when).to(self.denoiser.device)

    def facts(self) -> dict:
        """What else the concept's info says."""
        return {}

    def watched(self):
        """Tokens of the first picture's caption, as ``captions.Prompts`` has them; None when no rows are learned."""
        return None

    def attached(self) -> contextlib.AbstractContextManager:
        """Whatever must be on the model while it learns."""
        return contextlib.nullcontext()

    # --- the same for all

    def line(self, done: int, loss: float) -> str:
        """What the node says after ``done`` of its steps: also other terms as parts of the diffusion loss, as far as
        there is room."""
        text, terms = f"step {done} of {self.settings.steps}; loss {loss:.4f}", self.own_terms()
        for name in [k for k in terms if k != "diffusion"]:
            part = terms[name][-1] / max(terms["diffusion"][-1], 1e-12)
            more = f", {name} / diffusion {part:{'.2f' if 0.01 <= part < 100 else '.0e'}}"
            text += more if len(text + more) <= LINE else ""
        return text

    def own_terms(self) -> dict[str, list[float]]:
        """Those of ``terms`` that this run added to; an earlier one may have had others."""
        return {k: v for k, v in self.terms.items() if len(v) > len(self.past)}

    def begin(self) -> None:
        """Model, pictures, start values or those of the earlier run; call inside ``training``."""
        self.denoiser = Denoiser(self.model)
        self.clean = [self.denoiser.clean(ordinary(latent)[None]) for latent in self.data.latents]
        self.start, self.optimiser = self.prepare()
        state = dict(self.earlier.state) if self.earlier else {}
        curves = {k: state.pop(k).tolist() for k in list(state) if k == "losses" or k.startswith("losses.")}
        self.past = curves.pop("losses", [])
        self.terms = {k.removeprefix("losses."): v for k, v in curves.items()}
        hidden = {k.removeprefix("parameter."): state.pop(k) for k in list(state) if k.startswith("parameter.")}
        device = next(iter(self.start.values())).device
        self.state = {k: v if k == "step" else v.to(device) for k, v in state.items()}
        found = self._checked({**self.earlier.tensors, **hidden}) if self.earlier else self.start
        self.parameters = {k: found[k].to(device, torch.float32, copy=True) for k in self.start}

    def _checked(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        wanted = {k: tuple(v.shape) for k, v in self.start.items()}
        have = {k: tuple(v.shape) for k, v in found.items()}
        if self.earlier.kind != self.kind or any(have.get(k) != shape for k, shape in wanted.items()):
            raise CarrierMismatch(
                f"Concept <{self.earlier.name}> holds {_brief(have)}, this node would learn {_brief(wanted)}; continue "
                "with the same node, model, encoders and widgets, such as vectors, layers, stages, mapper and rank."
            )
        return found

    def diffusion(self, parameters, pictures, captions, when, draw, condition=None) -> torch.Tensor:
        """Mean diffusion loss of a batch of pictures of one size."""
        d = self.denoiser
        clean = torch.cat([self.clean[i] for i in pictures])
        noise = torch.randn(clean.shape, generator=draw).to(d.device)
        sigma = self.sigmas(when)
        entries, change = (condition or self.condition)(parameters, pictures, captions, sigma)
        return self.errors(pictures, sigma, d(d.noised(clean, noise, sigma), sigma, entries, change))

    def errors(self, pictures: list[int], sigma: torch.Tensor, denoised: torch.Tensor) -> torch.Tensor:
        """Mean diffusion loss of pictures of one size that the model denoised from ``sigma`` [b]."""
        clean = torch.cat([self.clean[i] for i in pictures])
        error = residual(self.denoiser.space, sigma, denoised, clean, self.denoiser.sigma_data)
        return masked_mse(error, self._mask(pictures, clean)).mean()

    def _mask(self, pictures: list[int], like: torch.Tensor) -> torch.Tensor | None:
        if not self.settings.masked_loss:
            return None
        masks = [self.data.masks[i] for i in pictures]
        return torch.stack([torch.ones_like(like[0, :1]) if m is None else ordinary(m).to(like) for m in masks])

    def step_loss(self, parameters, step: int, micro: int) -> torch.Tensor:
        """The loss of one step; every draw depends on the seed and the step alone."""
        s = self.settings
        draw = generator(s.seed, step * s.accumulate + micro, "step")
        pictures, captions = self.data.draw(s.batch, draw)
        when = self.times(len(pictures), step, draw)
        found = self.losses(parameters, pictures, captions, when, draw)
        if len(found) > 1:
            for name, value in found.items():
                curve = self.terms.setdefault(name, [])
                del curve[step + bool(micro) :]
                curve += [math.nan] * (step - len(curve))  # of steps without this term
                curve += [0.0] * (step + 1 - len(curve))
                curve[step] += float(value.detach()) / s.accumulate
        return sum(found.values())

    def fixed_loss(self, count: int = 8) -> float:
        """Loss at ``count`` fixed pictures, noises and evenly spread times: what before and after are compared by."""
        s, total = self.settings, 0.0
        with torch.no_grad():
            for k in range(count):
                draw = generator(s.seed, k, "fixed")
                when = torch.tensor([s.time_low + (s.time_high - s.time_low) * (k + 0.5) / count], dtype=torch.float64)
                pictures, captions = self.data.draw(1, draw)
                total += float(self.diffusion(self.parameters, pictures, captions, when, draw))
        return total / count

    def preview(self, levels: int = 4) -> torch.Tensor:
        """A quick picture [1, c, h, w] in model space: ``levels`` Euler steps from one fixed noise, no guidance."""
        d, s = self.denoiser, self.settings
        with torch.no_grad():
            sigma = torch.cat([sigmas_at(d.sampling, torch.linspace(0.999, 0.25, levels)), torch.zeros(1)]).to(d.device)
            noise = torch.randn(self.clean[0].shape, generator=generator(s.seed, 0, "preview")).to(d.device)
            x = d.noised(torch.zeros_like(noise), noise, sigma[:1])
            for now, then in zip(sigma[:-1], sigma[1:], strict=True):
                denoised = d(x, now[None], *self.condition(self.parameters, [0], [0], now[None]))
                x = denoised + (x - denoised) * (then / now)
            return denoised

    def seen(self) -> torch.Tensor | None:
        """Where the first picture, half noised, looks at the learned rows: a picture [h, w, 3]; None where it cannot be
        told.

        Raises: the host's interrupt and OOM alone, since learning needs no such picture.
        """
        management = comfy.model_management
        try:
            return self._seen()
        except (management.InterruptProcessingException, management.OOM_EXCEPTION):
            raise
        except Exception as error:
            logging.warning("concept-carriers: where <%s> is seen cannot be shown: %s", self.settings.name, error)
            return None

    def _seen(self) -> torch.Tensor | None:
        tokens, d = self.watched(), self.denoiser
        try:
            columns = learned_columns(self.model, self.clip, tokens) if tokens else None
        except CarrierMismatch:
            columns = None
        if columns is None:
            return None
        with torch.no_grad():
            clean, sigma = self.clean[0], self.sigmas(torch.tensor([0.5]))
            noise = torch.randn(clean.shape, generator=generator(self.settings.seed, 0, "looks")).to(clean)
            entries, change = self.condition(self.parameters, [0], [0], sigma)
            tap = tap_of(self.model, columns, clean)
            d(d.noised(clean, noise, sigma), sigma, entries, both(change, tap))
        picture = background(d.model.latent_format, clean)
        maps, pixels = {k: v[0] for k, v in tap.take().items()}, picture.shape[0] // clean.shape[-2]
        return overlay(picture, mask_of([maps], 0, *picture.shape[:2], pixels)[0])

    def concept(self, state: Mapping[str, torch.Tensor], losses: list[float], **facts) -> Concept:
        """The concept as it stands."""
        tensors, kept = self.tensors(), {}
        if state:
            curves = {"losses": losses, **{f"losses.{k}": v[: len(losses)] for k, v in self.terms.items()}}
            kept = {k: torch.tensor(v, dtype=torch.float64) for k, v in curves.items()}
            kept |= {f"parameter.{k}": v for k, v in self.parameters.items() if k not in tensors}
        info = {
            **asdict(self.settings),
            "steps": len(losses),
            "architecture": type(self.denoiser.model.model_config).__name__,
            "base": self.fingerprint,
            "clip": [e.key for e in encoders(self.clip)],
            **self.facts(),
            **facts,
        }
        if losses:
            info |= {"loss_first": losses[0], "loss_last": losses[-1]}
        return Concept(self.settings.name, self.kind, tensors, info, {**state, **kept})


def _brief(shapes: Mapping[str, tuple]) -> str:
    """Shapes of a few tensors; LoRAs have hundreds."""
    shown = [f"{k} {'x'.join(map(str, v))}" for k, v in list(shapes.items())[:4]]
    return ", ".join(shown) + (f" and {len(shapes) - 4} more" if len(shapes) > 4 else "")


def fingerprint(model) -> str:
    """Short name of a base model: hash of its parameter names, shapes and a few values of each, without patches."""
    digest, alike, first = hashlib.blake2b(digest_size=8), {}, {}
    held = model.model.diffusion_model.state_dict()
    for key, kept in model.backup.items():  # the weights themselves hold the patches of whichever clone is loaded
        own = kept.weight.state_dict(key) if hasattr(kept.weight, "state_dict") else {key: kept.weight}
        held |= {name: v for k, v in own.items() if (name := k.removeprefix("diffusion_model.")) in held}
    named = sorted(held.items())
    for name, value in named:
        plain = type(value) in (torch.Tensor, torch.nn.Parameter)
        alike.setdefault((value.device, value.dtype) if plain else name, []).append((name, value.flatten()[:8]))
    for some in alike.values():  # one copy from the device for all, as each waits for what runs there
        names, values = zip(*some, strict=True)
        together = torch.cat(values) if len(values) > 1 else values[0]
        first |= zip(names, together.float().cpu().split([len(v) for v in values]), strict=True)
    for name, value in named:
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(first[name].numpy().tobytes())
    return digest.hexdigest()
