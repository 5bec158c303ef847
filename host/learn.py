"""The learning loop inside the running host: any session; shown, saved, continued alike."""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierFileError
from ..carriers.files import claim, discard, write_concept
from ..kernels.fit import Diverged, fit
from . import folders
from .gradients import loss_scale, training
from .loading import advised, memory_of, planned
from .progress import Progress, say
from .session import Session, fingerprint

COPIED = 1 << 22
"""Bytes of learned tensors and moments that may be copied per step: at most 3% of a step on the toy world."""


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
    saved: Path | None
    trouble: str
    """Why it is not on disk; empty when it is."""
    seconds: float
    terms: dict[str, list[float]] = field(default_factory=dict)
    """Parts of the loss per step, weighted as they were added; nan at steps of earlier runs that had not this part.
    Empty when there is one."""


def learn(session: Session, *, preview_every: int = 25, save_every: int = 50, checkpointing: str = "auto") -> Learned:
    """Runs a session to its end.

    Neither model nor clip changes. The state is on disk every ``save_every`` steps, and after an interrupt or an error
    the last finished step is, in a file of this run's own; the session's ``earlier`` concept continues from there, bit
    for bit on a CPU. After a loss that is not finite the file holds a state that gave a finite one. A disk that refuses
    is reported in the result and never ends the learning.
    Raises: CarrierMismatch, Diverged, the host's OOM with advice, the host's interrupt, RuntimeError if nothing was
    learned.
    """
    began, settings = time.monotonic(), session.settings
    session.gather()
    session.fingerprint = fingerprint(session.model)
    memory = memory_of(session.model, session.data, settings.batch * session.passes)
    patchers = (session.model, session.clip.patcher)
    recompute, memory = planned(checkpointing, memory, *patchers)
    kept = Kept(folders.output("autosave"), settings.name, write_concept)
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
        if not math.isfinite(before):
            raise Diverged(f"The loss is not finite before learning. {_at_fault(session)}")
        known = Known(session.parameters)
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
                known.proven()
                losses.append(step.loss)
                last, done = step.state, step.number - len(session.past)
                shown = bool(preview_every) and (done % preview_every == 0 or done == settings.steps)
                saved = bool(save_every) and done % save_every == 0
                if saved or done % known.every == 0:
                    known.hold(last)
                if shown:
                    previews.append(session.preview())
                if saved:
                    kept.put(session.concept(last, losses))
                say(session.line(done, step.loss))
                progress.show(done, *((previews[-1], session.seen()) if shown else ()))
            after = session.fixed_loss()
            if not math.isfinite(after):
                raise Diverged(f"The loss on fixed noise is not finite after step {len(losses)}.")
        except Diverged as error:
            if len(losses) == len(session.past):
                raise Diverged(f"{error} {_at_fault(session)}") from error
            steps = known.restore(last)
            if steps:
                where = kept.put(session.concept(last, losses[:steps])) or (
                    f"It is in {kept.file.name} (output/concepts/autosave)."
                )
                advice = f"Step {steps} is the last one known to be good. {where} Continue from it"
            else:
                kept.drop()
                again = f"Continue from <{session.earlier.name}> again" if session.earlier else "Start again"
                advice = f"No step of this run is known to be good. {again}"
            raise Diverged(f"{error} {advice} with a lower learning rate.") from error
        except BaseException:  # newer hosts raise interrupts outside Exception
            if len(losses) > len(session.past):
                kept.put(session.concept(last, losses))
            raise
        concept = session.concept(last, losses, loss_before=before, loss_after=after)
        if all(torch.equal(session.parameters[k], v) for k, v in session.start.items()):
            raise RuntimeError(
                "Nothing was learned: what is learned did not move. Raise the learning rate or the number of steps."
            )
        trouble = kept.put(concept)
        shown = session.denoiser.model.process_latent_out(torch.cat(previews)).cpu()
    seconds, terms = time.monotonic() - began, session.own_terms()
    return Learned(concept, losses, before, after, shown, kept.file, trouble, seconds, terms)


def _at_fault(session: Session) -> str:
    """What to do when the loss is not finite though this run has not learned anything yet."""
    if session.earlier:
        return (
            f"Concept <{session.earlier.name}> gives that as it is after step {len(session.past)}: continue from an "
            "earlier state with a lower learning rate, or start anew."
        )
    return (
        "The model gives that with these pictures as it is: check the pictures and the model, or start ComfyUI with "
        "--force-fp32."
    )


class Known:
    """A copy on the CPU of the last state that gave a finite loss, since the state that a loss broke on gives it again:
    every draw depends on the seed and the step alone."""

    def __init__(self, parameters: Mapping[str, torch.Tensor]):
        """``parameters``: as ``fit`` changes them, in place."""
        self.parameters = parameters
        self.every = 1 + 3 * sum(p.nbytes for p in parameters.values()) // COPIED
        self.held = self.good = None

    def _tensors(self, state: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        return [v.detach() for v in (*self.parameters.values(), *(state[k] for k in sorted(state) if k != "step"))]

    def hold(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copies what a step left."""
        together = torch.cat([v.flatten() for v in self._tensors(state)]).cpu()  # one copy from a device, not hundreds
        self.held = int(state["step"]), together

    def proven(self) -> None:
        """What is held gave a finite loss."""
        self.good = self.held or self.good

    def restore(self, state: Mapping[str, torch.Tensor]) -> int:
        """Puts back what is known to be good; returns its number of steps, 0 where nothing is known."""
        if self.good is None:
            return 0
        steps, together = self.good
        tensors = self._tensors(state)
        for value, part in zip(tensors, together.split([v.numel() for v in tensors]), strict=True):
            value.copy_(part.view_as(value))
        state["step"].fill_(steps)
        return steps


class Kept:
    """The file of one run: from its first state on under a name that no other run's has."""

    def __init__(self, folder: Path, name: str, write: Callable[[object, Path], None]):
        self.folder, self.name, self.write = folder, name, write
        self.file: Path | None = None

    def put(self, what) -> str:
        """Writes the file; returns why it could not, and logs it, instead of ending the run."""
        first = self.file is None
        try:
            self.file = self.file or claim(self.folder, self.name, folders.shadowed)
            self.write(what, self.file)
            return ""
        except CarrierFileError as error:
            if first and self.file:
                discard(self.file)
                self.file = None
            logging.warning("concept-carriers: %s is not saved: %s", self.name, error)
            return str(error)

    def drop(self) -> None:
        """Removes the file."""
        if self.file:
            discard(self.file)
            self.file = None
