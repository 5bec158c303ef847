"""ConceptPrism, stage 1 (arXiv 2602.19575): one target that all pictures share, and a residual for each of them.

The target is learned together with the residual of the picture at hand. What a residual holds must not matter to the
other pictures (exclusion), so what they share has nowhere to go but into the target.
"""

from dataclasses import dataclass

import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator
from ..kernels.fit import Adam
from ..kernels.losses import masked_mse, residual
from .captions import Prompts
from .denoise import sigmas_at
from .descriptions import caption_mean, description
from .exclusion import Anchor, Exclusion, anchor_count
from .learn_tokens import chosen_encoders
from .session import RunSettings, Session
from .text import Encoder, encoders, start_rows

MARK = "residual"
BOTH, ALONE = 0, 1
"""Prompts of ``Prompts``: target with residual, and the residual alone."""

PRESETS = {
    "paper": {
        "steps": 200,
        "learning_rate": 4e-4,
        "accumulate": 4,
        "residual_vectors": 8,
        "joined": True,
        "beta": 0.05,
        "decay": 1e-2,
    },
    "repository": {
        "steps": 200,
        "learning_rate": 5e-4,
        "accumulate": 1,
        "residual_vectors": 8,
        "joined": False,
        "beta": 0.05,
        "decay": 1e-2,
    },
    "flux repository": {
        "steps": 200,
        "learning_rate": 1e-4,
        "accumulate": 1,
        "residual_vectors": 1,
        "joined": False,
        "beta": 0.5,
        "decay": 1e-4,
        "encoders": ("t5xxl",),
        "shifted": False,
    },
    "custom": {},
}
"""What a preset fixes: the paper, and the authors' code (github.com/Minseo-Kimm/ConceptPrism) for SD2.1 and Flux."""


@dataclass(frozen=True)
class ResidualSettings(RunSettings):
    """How target and residuals are learned."""

    vectors: int = 1
    residual_vectors: int = 8
    """Per picture; 0 learns the target alone."""
    residual_init: str = "caption"
    """``caption``: mean of the encoder's last hidden states over the picture's caption; ``random``: as the target."""
    rescale: str = "auto"
    """``on``: residuals start with the vocabulary's mean norm; ``auto``: in T5 only."""
    init_text: str = ""
    """The concept's class word in captions, and what strength 0 falls back to."""
    joined: bool = True
    """"target with residual", or side by side."""
    beta: float = 0.05
    """Weight of exclusion; 0 leaves its passes out."""
    anchors: int = 3
    """Other pictures per exclusion loss."""
    reduction: str = "mean"
    """Over the anchors: ``mean`` or ``sum``."""
    space: str = "model"
    """Where predictions are compared: ``model``, or ``noise``, which weighs all noise levels of a v model alike."""
    null_bank: int = 0
    """Fixed (time, noise) pairs per anchor picture whose empty-prompt prediction is kept; 0 draws new ones."""
    decay: float = 1e-2
    clip: float = 1.0
    encoders: tuple[str, ...] = ()
    """Encoder keys to learn; empty for all."""
    shifted: bool = True
    """Flow models learn at noise levels with the shift that they sample with."""
    preset: str = "custom"
    """Which of ``PRESETS`` these settings come from."""


def preset(which: str, /, **values) -> ResidualSettings:
    """Settings from ``values``, of which those that ``PRESETS`` fixes are replaced."""
    return ResidualSettings(**values | PRESETS[which], preset=which)


def replaced(which: str, /, **values) -> str:
    """What a preset changes of ``values``, as a line; empty when nothing."""
    changed = [f"{k} {v} (asked {values[k]})" for k, v in PRESETS[which].items() if k in values and values[k] != v]
    return f"preset {which}: {', '.join(changed)}" if changed else ""


class ResidualSession(Session):
    """Parameters: the target's rows per encoder key, and ``residual.<key>`` [pictures, n, width]."""

    def __init__(self, model, clip, data, settings: ResidualSettings, earlier: Concept | None = None):
        super().__init__(model, clip, data, settings, earlier)
        self.encoders = chosen_encoders(clip, settings.encoders)
        self.owners = torch.tensor([not m for m in data.mirrored]).cumsum(0).sub(1).tolist()
        """Number of the residual of each picture; a mirrored picture has that of its original."""
        self.excluding = bool(settings.beta and settings.residual_vectors)
        if self.excluding and max(self.owners) < 1:
            raise ValueError(
                "Exclusion asks that a picture's residual changes nothing in the other pictures, and there is only one "
                "picture; measured on its own picture it would forbid what reconstruction asks for. Add pictures in "
                "Make Concept Set, or set beta to 0."
            )
        self.passes = 1 + anchor_count(settings.anchors, self.owners) if self.excluding else 1

    # --- what is learned

    def _checked(self, found):
        counts = {len(v) for k, v in found.items() if k.startswith(f"{MARK}.")}
        if self.settings.residual_vectors and counts - {max(self.owners) + 1}:
            raise CarrierMismatch(
                f"Concept <{self.earlier.name}> has residuals of {counts.pop()} pictures, and here are "
                f"{max(self.owners) + 1}; continue with the pictures that it was learned on, in their order."
            )
        return super()._checked(found)

    def prepare(self):
        """Random target rows, residual rows from the captions, and every prompt tokenised; AdamW."""
        s = self.settings
        own = {"": {e.key: s.vectors for e in self.encoders}}
        texts = ["{}"]
        if s.residual_vectors:
            own[MARK] = {e.key: s.residual_vectors for e in self.encoders}
            texts = [f"{{}} with {{{MARK}}}" if s.joined else f"{{}} {{{MARK}}}", f"{{{MARK}}}"]
        self.prompts = Prompts(self.clip, [*texts, ""], s.init_text or "thing", own)
        self.prompts.ready()
        start = {e.key: self._target_start(e) for e in self.encoders}
        if s.residual_vectors:
            start |= {f"{MARK}.{e.key}": self._residual_start(e) for e in self.encoders}
        if self.excluding:
            with torch.no_grad():
                null = self.prompts.encode(len(texts), {})
            self.exclusion = Exclusion(self.denoiser, self.clean, self.owners, s, null)
        return {k: v.cpu() for k, v in start.items()}, Adam(s.learning_rate, decay=s.decay, clip=s.clip)

    def _target_start(self, encoder: Encoder) -> torch.Tensor:
        draw = generator(self.settings.seed, 0, f"start {encoder.key}")
        return start_rows(encoder, "random", "", self.settings.vectors, draw)[None, None, None]

    def _residual_start(self, encoder: Encoder) -> torch.Tensor:
        """First value [pictures, n, width] of the residuals in one encoder."""
        s, originals = self.settings, [i for i, m in enumerate(self.data.mirrored) if not m]
        if s.residual_init == "random":
            draw = generator(s.seed, 0, f"start residual {encoder.key}")
            rows = start_rows(encoder, "random", "", len(originals) * s.residual_vectors, draw)
            return rows.view(len(originals), s.residual_vectors, -1)
        means = torch.stack([caption_mean(encoder, description(self.data, i, s.init_text)) for i in originals])
        if s.rescale == "on" or s.rescale == "auto" and encoder.key.startswith("t5"):
            norm = encoder.vocabulary.detach().float().norm(dim=-1).mean()
            means = means * (norm / means.norm(dim=-1, keepdim=True))
        return means[:, None].repeat(1, s.residual_vectors, 1)

    def tensors(self):
        """The target; residuals are part of the training state, see ``residuals``."""
        return {e.key: self.parameters[e.key] for e in self.encoders}

    def facts(self):
        return {"encoders": [e.key for e in self.encoders], "pictures": max(self.owners) + 1}

    def drawn(self) -> tuple[list, list]:
        """The residuals, and a prompt for each. Without any: None, and what has the host leave out those who would draw
        it, since it cannot walk an empty list (execution.py)."""
        residuals = self.residuals()
        return residuals or [None], [f"a photo of <{r.name}>" for r in residuals] or [ExecutionBlocker(None)]

    def residuals(self) -> list[Concept]:
        """One concept per picture, ``<residual1>`` and so on: "a photo of <residual2>" shows what it absorbed."""
        if not self.settings.residual_vectors:
            return []
        info = {
            "residual_of": self.settings.name,
            "joined": self.settings.joined,
            "clip": [e.key for e in encoders(self.clip)],
            "architecture": type(self.denoiser.model.model_config).__name__,
            "base": self.fingerprint,
        }
        return [
            Concept(
                f"{MARK}{number + 1}",
                "tokens",
                {e.key: self.parameters[f"{MARK}.{e.key}"][number][None, None, None] for e in self.encoders},
                {**info, "picture": number + 1},
            )
            for number in range(max(self.owners) + 1)
        ]

    # --- what pictures are conditioned on

    def _rows(self, parameters, picture: int) -> dict:
        rows = {"": {e.key: parameters[e.key][0, 0, 0] for e in self.encoders}}
        if self.settings.residual_vectors:
            own = self.owners[picture]
            rows[MARK] = {e.key: parameters[f"{MARK}.{e.key}"][own] for e in self.encoders}
        return rows

    def condition(self, parameters, pictures, captions, sigma):
        """The target with each picture's residual."""
        asked = [(BOTH, [self._rows(parameters, i)]) for i in pictures]
        return [entry for _, entry in self.prompts.encode_groups(asked)], None

    def sigmas(self, when):
        """As the settings shift them."""
        return sigmas_at(self.denoiser.sampling, when, self.settings.shifted).to(self.denoiser.device)

    def watched(self):
        return self.prompts.tokens[BOTH]

    # --- losses

    def losses(self, parameters, pictures, captions, when, draw):
        """Reconstruction, and beta times exclusion; both in one pass where the anchors have the pictures' size."""
        if not self.excluding:
            return super().losses(parameters, pictures, captions, when, draw)
        s, d, other = self.settings, self.denoiser, self.exclusion
        clean = torch.cat([self.clean[i] for i in pictures])
        x, sigma = other.noised(clean, when, draw)
        asked = [(prompt, [self._rows(parameters, i)]) for prompt in (BOTH, ALONE) for i in pictures]
        encoded = [entry for _, entry in self.prompts.encode_groups(asked)]
        entries, residuals = encoded[: len(pictures)], encoded[len(pictures) :]
        groups: dict[tuple, list[Anchor]] = {clean.shape[1:]: []}
        for picture, alone in zip(pictures, residuals, strict=True):
            for anchor in other.anchors(picture, draw):
                groups.setdefault(self.clean[anchor].shape[1:], []).append(other.anchor(anchor, alone, draw))
        own = groups[clean.shape[1:]]
        denoised = d(
            torch.cat([x, *(a.x for a in own)]),
            torch.cat([sigma, *(a.sigma for a in own)]),
            [*entries, *(a.entry for a in own)],
        )
        error = residual(d.space, sigma, denoised[: len(x)], clean, d.sigma_data)
        terms = [other.loss(own, denoised[len(x) :])] if own else []
        for members in list(groups.values())[1:]:
            inputs, levels = torch.cat([a.x for a in members]), torch.cat([a.sigma for a in members])
            terms.append(other.loss(members, d(inputs, levels, [a.entry for a in members])))
        total = torch.cat(terms).mean() * (other.count if s.reduction == "sum" else 1)
        return {"diffusion": masked_mse(error, self._mask(pictures, clean)).mean(), "exclusion": s.beta * total}
