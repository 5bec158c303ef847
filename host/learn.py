"""The learning loop inside the running host: any session; shown, saved, continued alike."""

import hashlib
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierFileError
from ..carriers.files import write_concept
from ..kernels.fit import Diverged, fit
from . import folders
from .gradients import loss_scale, training
from .loading import advised, memory_of, planned
from .progress import Progress, say
from .session import Session, fingerprint


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
    terms: dict[str, list[float]] = field(default_factory=dict)
    """Parts of the loss per step, weighted as they were added; empty when there is one."""


def learn(session: Session, *, preview_every: int = 25, save_every: int = 50, checkpointing: str = "auto") -> Learned:
    """Runs a session to its end.

    Neither model nor clip changes. The state is on disk every ``save_every`` steps, and after an interrupt or an error
    the last finished step is; the session's ``earlier`` concept continues from there, bit for bit on a CPU. A disk that
    refuses is reported in the result and never ends the learning.
    Raises: CarrierMismatch, Diverged, the host's OOM with advice, the host's interrupt, RuntimeError if nothing was
    learned.
    """
    began, settings = time.monotonic(), session.settings
    session.gather()
    session.fingerprint = fingerprint(session.model)
    memory = memory_of(session.model, session.data, settings.batch * session.passes)
    patchers = (session.model, session.clip.patcher)
    recompute, memory = planned(checkpointing, memory, *patchers)
    file = folders.output("autosave") / f"{settings.name}-{short(settings)}.safetensors"
    autograd = training(*patchers, checkpointing=recompute, memory=memory)
    advice = (
        f"Out of memory while learning <{settings.name}> with batch {settings.batch}: lower the batch (raise "
        "accumulate instead), make the pictures smaller in Make Concept Set, or turn checkpointing on."
    )
    with advised(advice), autograd, session.attached():
        session.begin()
        losses, previews, last = list(session.past), [session.preview()], session.state
        progress = Progress(settings.steps, session.model)
        before = session.fixed_loss()
        try:
            for step in fit(
                session.parameters,
                session.step_loss,
                session.optimiser,
                settings.steps,
                accumulate=settings.accumulate,
                state=session.state,
                scale=loss_scale(session.model),
            ):
                losses.append(step.loss)
                last, done = step.state, step.number - len(session.past)
                shown = bool(preview_every) and (done % preview_every == 0 or done == settings.steps)
                if shown:
                    previews.append(session.preview())
                if save_every and done % save_every == 0:
                    keep(session.concept(last, losses), file)
                say(f"{session.line(done)}; loss {step.loss:.4f}")
                progress.show(done, *((previews[-1], session.seen()) if shown else ()))
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
        if all(torch.equal(session.parameters[k], v) for k, v in session.start.items()):
            raise RuntimeError(
                "Nothing was learned: what is learned did not move. Raise the learning rate or the number of steps."
            )
        trouble = keep(concept, file)
        shown = session.denoiser.model.process_latent_out(torch.cat(previews)).cpu()
    return Learned(concept, losses, before, after, shown, file, trouble, time.monotonic() - began, session.terms)


def keep(concept: Concept, file: Path) -> str:
    """Writes the autosave; returns why it could not, and logs it, instead of ending the run."""
    try:
        write_concept(concept, file)
        return ""
    except CarrierFileError as error:
        logging.warning("concept-carriers: <%s> is not saved: %s", concept.name, error)
        return str(error)


def short(settings) -> str:
    """A few letters that differ from those of other settings, for file names."""
    return hashlib.blake2b(repr(settings).encode(), digest_size=3).hexdigest()
