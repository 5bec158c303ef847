"""One gradient step for one prompt and one noise (Per-Query Visual Concept Learning, arXiv 2508.09045).

The picture that a prompt makes is compared with references at points that DIFT (arXiv 2306.03881) matches: in queries
and keys of the last self-attention (PDM, arXiv 2405.18025), and in every layer's map of the concept's word. The step
is taken on what was learned, at the rate it was learned with.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import comfy.model_management
import torch
import torch.nn.functional as F

from ..carriers import delta
from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..carriers.features import Features
from ..kernels.draws import generator, times
from ..kernels.fit import Adam, Diverged, fit
from ..kernels.losses import DISTANCES, pair_distance
from ..kernels.match import Pairs
from . import lora
from .attention import both
from .captions import Prompts
from .concept_set import ConceptSet
from .denoise import noise_time, sigmas_at
from .feature_hooks import captured
from .feature_places import preset
from .features import sigma_at, unscaled
from .gradients import loss_scale, training
from .loading import memory_of, planned
from .positions import columns_of
from .progress import Progress
from .query_points import TooFew, dift_of, points_of
from .session import RunSettings, Session
from .show import tap_of
from .text import NAMED, as_tokens, concept_rows
from .variants import Grid, layers_of

TEXTS = ("reference", "picture")
KEPT = 0.7
"""Part of what a learning step keeps per pass; by ``bench full_size`` 0.6 of SDXL's, 0.7 of Flux's."""


class Row(NamedTuple):
    """One picture in a pass of the model."""

    picture: int
    text: int
    """Number of its prompt (``TEXTS``)."""
    x: torch.Tensor
    """[1, c, h, w], as the model is given it."""
    sigma: torch.Tensor
    follows: bool
    """Whether gradients go through it."""
    read: bool = True
    """Whether features and maps are read, or else the denoised picture."""


@dataclass(frozen=True)
class RefineSettings(RunSettings):
    """How a concept is refined; the defaults are the paper's."""

    steps: int = 1
    self_attention: float = 1.0
    cross_attention: float = 1.0
    diffusion: float = 1.0
    """Weights of the three parts; 0 leaves a part out."""
    distance: str = "length"
    timestep: float = -1.0
    """That the network is told when features are read; below 0 the noisiest one."""
    noise: bool = False
    """Whether pictures get the noise of that timestep; the paper feeds them clean."""
    both_branches: bool = True
    """Whether the reference's features lead gradients too."""
    loss_text: str = "reference"
    """Whose prompt the diffusion loss of the references has; the paper's Eq. 3 writes the picture's."""
    mutual: bool = False
    minimum: float = -1.0
    ensemble: int = 8


@dataclass(frozen=True)
class Refined:
    """What one refinement gives."""

    concept: Concept
    before: dict[str, float]
    """Weighted parts of the loss; empty when nothing was done."""
    after: dict[str, float]
    pairs: tuple[Pairs, ...]
    """Cells of each reference and of the picture, on the grids of the features."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns per reference, and of the picture."""
    reason: str
    """Why the concept is as it was; empty when it is refined."""


def check(settings: RefineSettings, concept: Concept, texts: tuple[str, str]) -> None:
    """``texts``: of the references and of the picture. Raises: CarrierMismatch for another kind of concept; ValueError
    for an unknown setting, for weights of nothing, and for a text that does not name the concept alone."""
    if concept.kind not in ("tokens", "delta"):
        raise CarrierMismatch(
            f"Concept <{concept.name}> is made of {concept.kind}, and one step for one prompt is for vectors or "
            "low-rank weights; connect one from Learn Concept Tokens (mapper none), Residual Tokens, K/V Tokens or "
            "LoRA."
        )
    for value, known in ((settings.distance, DISTANCES), (settings.loss_text, TEXTS)):
        if value not in known:
            raise ValueError(f"Unknown choice {value!r}; known: {', '.join(known)}.")
    if not (settings.self_attention or settings.cross_attention or settings.diffusion):
        raise ValueError("All weights are 0, so there is nothing to follow; set one above 0.")
    for text in texts:
        if set(NAMED.findall(text)) != {concept.name}:
            raise ValueError(f"The text {text!r} must name <{concept.name}> and no other concept; write it so.")


class RefineSession(Session):
    """A learned concept, references, and behind them the picture that a prompt made.

    ``data``: references of one size and the picture; captions that hold ``<name>``; masks of the references, or None
    for the word's own map; ``features``: DIFT's of the references (``read_before``), which else are read here.
    Raises: as ``check`` does; CarrierMismatch for another model.
    """

    def __init__(
        self,
        model,
        clip,
        data: ConceptSet,
        settings: RefineSettings,
        concept: Concept,
        features: Features | None = None,
    ):
        super().__init__(model, clip, data, settings)
        self.features = features
        check(settings, concept, (data.captions[0][0], data.captions[-1][0]))
        self.kind, self.given, self.tokens, self.last = concept.kind, concept, as_tokens(concept), len(data.latents) - 1
        self.places = lora.places(model, concept) if concept.kind == "delta" else {}
        at = settings.timestep if settings.timestep >= 0 else None
        self.wants = preset(model, "PDM", [], timestep=at, noise=settings.noise)
        self.passes = 2 * self.last + 1
        self.pairs: tuple[Pairs, ...] = ()
        self.grids: tuple[tuple[int, int], ...] = ()
        self.measured: list[dict[str, float]] = []

    def memory(self) -> float:
        """Rough bytes of activations, without recomputing."""
        return KEPT * memory_of(self.model, self.data, self.passes)

    # --- what is learned

    def prepare(self):
        """The concept's own tensors, and both prompts with its rows."""
        said = [self.data.captions[0][0], self.data.captions[-1][0]]
        phrase, named = f"<{self.given.name}>", [self.tokens] if self.tokens else []
        self.rows = concept_rows(self.clip, self.tokens) if self.tokens else {}
        if not self.tokens:
            phrase = self.given.info.get("token_text") or self.given.name
            said = [NAMED.sub(phrase, text) for text in said]
        counts = {"": {k: v.shape[-2] for k, v in self.rows.items()}} if self.tokens else {}
        self.prompts = Prompts(self.clip, said, "", counts)
        self.prompts.ready()
        self.grid = Grid.of(named)
        self.grid.fits(self.model.model)
        self.columns = [
            columns_of(self.model, self.clip, text, named, [phrase], tokens)
            for text, tokens in zip(said, self.prompts.tokens, strict=True)
        ]
        tensors = {k: v for k, v in self.given.tensors.items() if not k.endswith(delta.ALPHA)}
        if self.places:
            tensors = {k: v.to(self.model.load_device) for k, v in tensors.items()}
        return tensors, Adam(self.settings.learning_rate)

    def attached(self):
        """The factors beside the layers they change; none before they are there."""
        alphas = {k: v for k, v in self.given.tensors.items() if k.endswith(delta.ALPHA)}
        return lora.beside(self.model, self.places, lambda: alphas | getattr(self, "parameters", {}))

    def condition(self, parameters, pictures, captions, sigma):
        """The prompts numbered ``captions`` (``TEXTS``) with the rows of their noise levels."""
        own = parameters if self.kind == "tokens" else delta.bundled(parameters, self.given.name)
        rows = {key: own.get(key, plain) for key, plain in self.rows.items()}
        stages = self.grid.stages(noise_time(self.denoiser.sampling, sigma))
        return self.prompts.conditions(self.grid, rows, captions, stages)

    def refined(self) -> Concept:
        """The concept as it stands, for this prompt; it cannot be continued."""
        s = self.settings
        facts = {
            "prompt": self.data.captions[-1][0],
            "before": self.measured[0],
            "after": self.measured[-1],
            "updates": s.steps,
            "rate": s.learning_rate,
        }
        tensors = {**self.given.tensors, **self.parameters}
        return replace(self.given, tensors=tensors, info={**self.given.info, "refined": facts}, state={})

    # --- what is compared

    def find(self) -> None:
        """DIFT's features of all pictures, by the model without the concept; call before ``training``."""
        word = self.given.info.get("init_text")
        text = f"a photo of a {word}" if word else "a photo"
        how = (text, self.settings.ensemble, self.settings.seed)
        self.dift = dift_of(self.model, self.clip, self.data.latents, *how, self.features)

    def _branches(self) -> tuple[list[int], list[int]]:
        return list(range(self.last)), [self.last]

    def shown(self, text: int) -> list[Row]:
        """The pictures under a prompt (``TEXTS``) as their features are read."""
        d, s = self.denoiser, self.settings
        sigma = sigma_at(d, self.wants[0].timestep).to(d.device)

        def fed(x):
            if not s.noise:
                return unscaled(d, x, sigma)
            noise = torch.randn(x.shape[1:], generator=generator(s.seed, 0, "features")).to(d.device)
            return d.noised(x, noise[None], sigma)

        return [Row(i, text, fed(self.clean[i]), sigma, bool(text or s.both_branches)) for i in self._branches()[text]]

    def noised(self, draw: torch.Generator) -> list[Row]:
        """The references as the diffusion loss sees them."""
        d, s, references = self.denoiser, self.settings, self._branches()[0]
        when = times(len(references), s.time_law, s.time_low, s.time_high, draw)
        sigma = sigmas_at(d.sampling, when).to(d.device)
        clean = [self.clean[i] for i in references]
        noise = torch.randn(len(clean), *clean[0].shape[1:], generator=draw).to(d.device)
        x = [d.noised(*parts) for parts in zip(clean, noise.split(1), sigma.split(1), strict=True)]
        text = TEXTS.index(s.loss_text)
        return [Row(i, text, *parts, True, False) for i, *parts in zip(references, x, sigma.split(1), strict=True)]

    def passed(self, parameters, rows: list[Row]) -> list:
        """Per row queries and keys [c, h, w] and the word's maps [layers, h, w], or the denoised picture [c, h, w] of
        one that is not read. Rows of one size whose gradients are both wanted, or both not, share a pass if their texts
        have one length too, or are a UNet's, to which the host repeats the shorter."""
        groups, found, unet = {}, {}, bool(layers_of(self.model.model.diffusion_model))
        for number, row in enumerate(rows):
            length = None if unet else self.columns[row.text].shape[1]
            groups.setdefault((row.x.shape, row.follows, length), []).append(number)
        for (_, follows, _), numbers in groups.items():
            with torch.set_grad_enabled(torch.is_grad_enabled() and follows):
                found |= zip(numbers, self._together(parameters, [rows[n] for n in numbers]), strict=True)
        return [found[n] for n in range(len(rows))]

    def _together(self, parameters, rows: list[Row]) -> list:
        x, sigma = torch.cat([r.x for r in rows]), torch.cat([r.sigma for r in rows])
        entries, change = self.condition(parameters, [r.picture for r in rows], [r.text for r in rows], sigma)
        count = sum(row.read for row in rows)
        if not count:
            return list(self.denoiser(x, sigma, entries, change))
        assert all(row.read for row in rows[:count]), "those that are read come first"
        columns = [self.columns[r.text] if r.read else torch.zeros_like(self.columns[r.text]) for r in rows]
        for own, (encoded, _) in zip(columns, entries, strict=True):
            if own.shape[1] != encoded.shape[1]:
                raise CarrierMismatch(
                    f"The text encoder gave {encoded.shape[1]} rows for {own.shape[1]} tokens; connect the model's own "
                    "CLIP."
                )
        length = math.lcm(*(own.shape[1] for own in columns))  # to which the host repeats shorter texts
        tap = tap_of(self.model, torch.cat([own.repeat(1, length // own.shape[1], 1) for own in columns]), x)
        with captured(self.model, self.wants, x.shape[-2:], graph=True) as seen:
            denoised = self.denoiser(x, sigma, entries, both(change, tap))
        looks = torch.cat([seen.found[w.name][:count].float() for w in self.wants], 1)
        sizes: dict[tuple[int, int], list[torch.Tensor]] = {}
        for layer, own in tap.take().items():
            sizes.setdefault((layer.height, layer.width), []).append(own)
        maps = [torch.cat(own, -1)[:count].float().mT.unflatten(-1, size) for size, own in sizes.items()]
        maps = torch.cat([F.interpolate(m, looks.shape[-2:], mode="bilinear") for m in maps], 1)
        return [*zip(looks, maps, strict=True), *denoised[count:]]

    def losses(self, parameters, pictures, captions, when, draw):
        """The three parts, weighted."""
        s, found = self.settings, {}
        compared = self.shown(0) + self.shown(1) if s.self_attention or s.cross_attention else []
        noised = self.noised(draw) if s.diffusion else []
        out = self.passed(parameters, compared + noised)
        seen, denoised = out[: len(compared)], out[len(compared) :]
        if seen:
            if not self.pairs:
                maps = [maps for _, maps in seen]
                self.grids = tuple(tuple(m.shape[-2:]) for m in maps)
                self.pairs = points_of(self.dift, maps, self.data.masks, mutual=s.mutual, minimum=s.minimum)
            weights = {"self attention": s.self_attention, "cross attention": s.cross_attention}
            for part, (name, weight) in enumerate(weights.items()):
                flat = [one[part].flatten(1).T for one in seen]
                apart = [
                    pair_distance(own[pairs.first], flat[-1][pairs.second], s.distance)
                    for own, pairs in zip(flat, self.pairs, strict=False)
                    if len(pairs.first)
                ]
                if weight:
                    found[name] = weight * torch.stack(apart).mean()
        if noised:
            error = self.errors(
                [r.picture for r in noised], torch.cat([r.sigma for r in noised]), torch.stack(denoised)
            )
            found["diffusion"] = s.diffusion * error
        self.measured.append({k: float(v.detach()) for k, v in found.items()})
        return found


def refine(session: RefineSession, checkpointing: str = "auto") -> Refined:
    """Runs a session. The given concept stays as it is, whatever happens.

    When there is too little to compare, the result says why and holds the given concept.
    Raises: Diverged, the host's OOM with advice, the host's interrupt; what RefineSession and ``extract`` raise.
    """
    s, patchers = session.settings, (session.model, session.clip.patcher)
    progress = Progress(s.steps + 2)
    recompute, memory = planned(checkpointing, session.memory(), *patchers)
    try:
        session.find()
        progress.show(1)
        with training(*patchers, checkpointing=recompute, memory=memory), session.attached():
            session.begin()
            for step in fit(
                session.parameters, session.step_loss, session.optimiser, s.steps, scale=loss_scale(session.model)
            ):
                progress.show(1 + step.number)
            with torch.no_grad():
                session.step_loss(session.parameters, 0, 0)
            progress.show(2 + s.steps)
            concept = session.refined()
    except TooFew as error:
        return Refined(session.given, {}, {}, session.pairs, session.grids, str(error))
    except Diverged as error:
        raise Diverged(
            f"{error} Concept <{session.given.name}> is as it was; lower the learning rate, or leave out a part of the "
            "loss."
        ) from error
    except comfy.model_management.OOM_EXCEPTION as error:
        raise type(error)(
            f"Out of memory while refining <{session.given.name}>: turn checkpointing on, use fewer references, or "
            "make the picture smaller. The concept is as it was."
        ) from error
    return Refined(concept, session.measured[0], session.measured[-1], session.pairs, session.grids, "")
