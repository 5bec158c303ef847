"""Textual Inversion inside the running host: rows of the text encoders' input, learned from a ConceptSet."""

import contextlib
import hashlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import comfy.model_management
import comfy.utils
import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierFileError, CarrierMismatch
from ..carriers.files import write_concept
from ..kernels.draws import generator, times
from ..kernels.fit import Adam, Diverged, Sphere, fit
from ..kernels.losses import masked_mse, residual
from . import folders
from .concept_set import ConceptSet
from .denoise import Denoiser, sigmas_at
from .gradients import ordinary, training
from .progress import Progress
from .text import Prompts, encoders, start_rows


@dataclass(frozen=True)
class TokenSettings:
    """How tokens are learned; everything here is kept in the concept's info."""

    name: str
    steps: int = 500
    vectors: int = 1
    init: str = "word"
    init_text: str = ""
    learning_rate: float = 5e-3
    batch: int = 1
    accumulate: int = 1
    geometry: str = "free"
    kappa: float = 1e-4
    time_law: str = "uniform"
    time_low: float = 0.0
    time_high: float = 1.0
    masked_loss: bool = False
    seed: int = 0
    encoders: tuple[str, ...] = ()
    """Encoder keys to learn; empty for all."""


@dataclass(frozen=True)
class Learned:
    """What a learner hands back."""

    concept: Concept
    losses: list[float]
    before: float
    """Loss on fixed noise before learning, in the model's own prediction space."""
    after: float
    previews: torch.Tensor
    """Estimates of one fixed noise along the way [k, c, h, w], as VAE latents."""
    saved: Path
    trouble: str
    """Why it is not on disk; empty when it is."""
    seconds: float


class Session:
    """One learning run: rows in, concept out, all state in between."""

    def __init__(self, model, clip, data: ConceptSet, settings: TokenSettings, earlier: Concept | None):
        self.model, self.clip, self.data, self.settings, self.earlier = model, clip, data, settings, earlier
        chosen = [e for e in encoders(clip) if not settings.encoders or e.key in settings.encoders]
        if not chosen:
            have = ", ".join(e.key for e in encoders(clip))
            raise CarrierMismatch(
                f"None of the chosen text encoders is in this CLIP, which has {have}; tick one of these."
            )
        self.encoders = chosen

    def begin(self) -> None:
        """Rows, captions and optimiser; call inside ``training``."""
        s = self.settings
        self.denoiser = Denoiser(self.model)
        self.start = {
            e.key: start_rows(e, s.init, s.init_text, s.vectors, generator(s.seed, 0, f"start {e.key}")).cpu()
            for e in self.encoders
        }
        self.rows = {k: v.clone() for k, v in (self._earlier_rows() or self.start).items()}
        self.state = dict(self.earlier.state) if self.earlier else {}
        self.past = self.state.pop("losses", torch.zeros(0, dtype=torch.float64)).tolist()
        texts = sorted({t for options in self.data.captions for t in options})
        self.index = {t: i for i, t in enumerate(texts)}
        self.prompts = Prompts(self.clip, texts, s.init_text or "thing", {k: len(v) for k, v in self.rows.items()})
        self.prompts.ready()
        self.clean = [self.denoiser.clean(ordinary(latent)[None]) for latent in self.data.latents]
        words = (
            {e.key: e.rows(s.init_text).mean(0).cpu() for e in self.encoders}
            if s.geometry == "fixed norm" and s.init_text
            else {}
        )
        prior = {k: (v / v.norm()).expand_as(self.rows[k]) for k, v in words.items()}
        self.optimiser = (
            Sphere(prior, s.learning_rate, s.kappa) if s.geometry == "fixed norm" else Adam(s.learning_rate)
        )

    def _earlier_rows(self) -> dict[str, torch.Tensor] | None:
        if self.earlier is None:
            return None
        rows = {k: v[0, 0, 0] for k, v in self.earlier.tensors.items()}
        wanted = {k: tuple(v.shape) for k, v in self.start.items()}
        have = {k: tuple(v.shape) for k, v in rows.items()}
        if wanted != have:
            raise CarrierMismatch(
                f"Concept <{self.earlier.name}> holds {have}, this node would learn {wanted}; continue with the "
                "same model, encoders and number of vectors."
            )
        return rows

    def loss(
        self,
        rows: Mapping[str, torch.Tensor],
        pictures: list[int],
        captions: list[int],
        when: torch.Tensor,
        draw: torch.Generator,
    ) -> torch.Tensor:
        """Mean diffusion loss of a batch of pictures of one size."""
        d = self.denoiser
        clean = torch.cat([self.clean[i] for i in pictures])
        noise = torch.randn(clean.shape, generator=draw).to(d.device)
        sigma = sigmas_at(d.sampling, when).to(d.device)
        texts = [self.index[self.data.captions[i][c]] for i, c in zip(pictures, captions, strict=True)]
        encoded = {t: self.prompts.encode(t, rows) for t in dict.fromkeys(texts)}
        denoised = d(d.noised(clean, noise, sigma), sigma, [encoded[t] for t in texts])
        error = residual(d.space, sigma, denoised, clean, d.sigma_data)
        return masked_mse(error, self._mask(pictures, clean)).mean()

    def _mask(self, pictures: list[int], like: torch.Tensor) -> torch.Tensor | None:
        if not self.settings.masked_loss:
            return None
        masks = [self.data.masks[i] for i in pictures]
        return torch.stack([torch.ones_like(like[0, :1]) if m is None else ordinary(m).to(like) for m in masks])

    def step_loss(self, rows, step: int, micro: int) -> torch.Tensor:
        """The loss of one step; every draw depends on the seed and the step alone."""
        s = self.settings
        draw = generator(s.seed, step * s.accumulate + micro, "step")
        pictures, captions = self.data.draw(s.batch, draw)
        return self.loss(
            rows, pictures, captions, times(len(pictures), s.time_law, s.time_low, s.time_high, draw), draw
        )

    def fixed_loss(self, count: int = 8) -> float:
        """Loss at ``count`` fixed pictures, noises and evenly spread times: what before and after are compared by."""
        s, total = self.settings, 0.0
        with torch.no_grad():
            for k in range(count):
                draw = generator(s.seed, k, "fixed")
                when = torch.tensor([s.time_low + (s.time_high - s.time_low) * (k + 0.5) / count], dtype=torch.float64)
                pictures, captions = self.data.draw(1, draw)
                total += float(self.loss(self.rows, pictures, captions, when, draw))
        return total / count

    def preview(self, levels: int = 4) -> torch.Tensor:
        """A quick picture [1, c, h, w] in model space: ``levels`` Euler steps from one fixed noise, no guidance."""
        d, s = self.denoiser, self.settings
        with torch.no_grad():
            sigma = torch.cat([sigmas_at(d.sampling, torch.linspace(0.999, 0.25, levels)), torch.zeros(1)]).to(d.device)
            entry = [self.prompts.encode(self.index[self.data.captions[0][0]], self.rows)]
            noise = torch.randn(self.clean[0].shape, generator=generator(s.seed, 0, "preview")).to(d.device)
            x = d.noised(torch.zeros_like(noise), noise, sigma[:1])
            for now, then in zip(sigma[:-1], sigma[1:], strict=True):
                denoised = d(x, now[None], entry)
                x = denoised + (x - denoised) * (then / now)
            return denoised

    def concept(self, state: Mapping[str, torch.Tensor], losses: list[float], **facts) -> Concept:
        """The concept as it stands."""
        history = {"losses": torch.tensor(losses, dtype=torch.float64)} if state else {}
        info = {
            **asdict(self.settings),
            "encoders": [e.key for e in self.encoders],
            "steps": len(losses),
            "architecture": type(self.denoiser.model.model_config).__name__,
            "base": self.fingerprint,
            **facts,
        }
        if losses:
            info |= {"loss_first": losses[0], "loss_last": losses[-1]}
        return Concept(
            self.settings.name,
            "tokens",
            {k: v.detach().cpu()[None, None, None] for k, v in self.rows.items()},
            info,
            {**{k: v.detach().cpu() for k, v in state.items()}, **history},
        )


def fingerprint(model) -> str:
    """Short name of a base model: hash of its parameter names, shapes and a few values of each."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(model.model.diffusion_model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.flatten()[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def memory_of(model, data: ConceptSet, batch: int) -> float:
    """Rough bytes of activations of one training step: the host's estimate for sampling, four times."""
    largest = max((latent.shape for latent in data.latents), key=lambda s: s[-1] * s[-2])
    return 4 * model.memory_required([batch, *largest])


def learn_tokens(
    model,
    clip,
    data: ConceptSet,
    settings: TokenSettings,
    *,
    earlier: Concept | None = None,
    preview_every: int = 25,
    save_every: int = 50,
    checkpointing: str = "auto",
) -> Learned:
    """Learns rows for ``<name>`` so that the model draws the pictures of ``data``.

    Neither model nor clip changes. The state is on disk every ``save_every`` steps, and after an interrupt or an error
    the last finished step is; ``earlier`` continues from there, bit for bit on a CPU. A disk that refuses is reported
    in the result and never ends the learning.
    Raises: CarrierMismatch, Diverged, the host's OOM with advice, the host's interrupt, RuntimeError if nothing was
    learned.
    """
    began = time.monotonic()
    session = Session(model, clip, data, settings, earlier)
    session.fingerprint = fingerprint(model)
    memory = memory_of(model, data, settings.batch)
    management = comfy.model_management
    if checkpointing == "auto":
        recompute = not management.is_device_cpu(model.load_device) and memory > 0.8 * management.get_free_memory(
            model.load_device
        )
    else:
        recompute = checkpointing == "on"
    file = folders.output("autosave") / f"{settings.name}-{_short(settings)}.safetensors"
    with training(model, clip.patcher, checkpointing=recompute, memory=memory):
        session.begin()
        losses, previews, last = list(session.past), [session.preview()], session.state
        progress = Progress(settings.steps, model)
        before = session.fixed_loss()
        try:
            with _advice(settings):
                for step in fit(
                    session.rows,
                    session.step_loss,
                    session.optimiser,
                    settings.steps,
                    accumulate=settings.accumulate,
                    state=session.state,
                ):
                    losses.append(step.loss)
                    last, done = step.state, step.number - len(session.past)
                    shown = bool(preview_every) and (done % preview_every == 0 or done == settings.steps)
                    if shown:
                        previews.append(session.preview())
                    if save_every and done % save_every == 0:
                        keep(session.concept(last, losses), file)
                    progress.show(done, previews[-1] if shown else None)
        except BaseException as error:  # newer hosts raise interrupts outside Exception
            if len(losses) > len(session.past):
                lost = keep(session.concept(last, losses), file)
                if isinstance(error, Diverged):
                    where = lost or f"It is in {file.name} (output/concepts/autosave)."
                    raise Diverged(
                        f"{error} The state of step {len(losses)} is good. {where} Continue from it with a lower "
                        "learning rate."
                    ) from error
            raise
        after = session.fixed_loss()
        concept = session.concept(last, losses, loss_before=before, loss_after=after)
        if all(torch.equal(session.rows[k], v) for k, v in session.start.items()):
            raise RuntimeError(
                "Nothing was learned: the rows did not move. Raise the learning rate or the number of steps."
            )
        trouble = keep(concept, file)
        shown = session.denoiser.model.process_latent_out(torch.cat(previews)).cpu()
    return Learned(concept, losses, before, after, shown, file, trouble, time.monotonic() - began)


def keep(concept: Concept, file: Path) -> str:
    """Writes the autosave; returns why it could not, and logs it, instead of ending the run."""
    try:
        write_concept(concept, file)
        return ""
    except CarrierFileError as error:
        logging.warning("concept-carriers: <%s> is not saved: %s", concept.name, error)
        return str(error)


def _short(settings: TokenSettings) -> str:
    return hashlib.blake2b(repr(settings).encode(), digest_size=3).hexdigest()


@contextlib.contextmanager
def _advice(settings: TokenSettings):
    """Says what to lower when memory runs out."""
    try:
        yield
    except comfy.model_management.OOM_EXCEPTION as error:
        raise type(error)(
            f"Out of memory while learning <{settings.name}> with batch {settings.batch}: lower the batch (raise "
            "accumulate instead), make the pictures smaller in Make Concept Set, or turn checkpointing on."
        ) from error
