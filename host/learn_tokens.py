"""Textual Inversion and what is only a setting of it: rows of the text encoders' input, learned from pictures.

Shared rows: arXiv 2208.01618. One per cross-attention layer: P+ (arXiv 2303.09522). One per stage of the noise
schedule: ProSpect (arXiv 2305.16225). Fixed norm: Directional Textual Inversion.
"""

from dataclasses import dataclass

from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator
from ..kernels.fit import Adam, Sphere
from .captions import Prompts
from .denoise import noise_time
from .session import RunSettings, Session
from .text import encoders, start_rows
from .variants import Grid, layers_of


@dataclass(frozen=True)
class TokenSettings(RunSettings):
    """How tokens are learned."""

    vectors: int = 1
    init: str = "word"
    init_text: str = ""
    geometry: str = "free"
    kappa: float = 1e-4
    encoders: tuple[str, ...] = ()
    """Encoder keys to learn; empty for all."""
    layers: str = "shared"
    """``each``: rows of their own for every cross-attention layer."""
    stages: int = 1
    """Equal intervals of the training timesteps with rows of their own."""


class TokenSession(Session):
    """Rows that are parameters themselves."""

    def __init__(self, model, clip, data, settings: TokenSettings, earlier: Concept | None = None):
        super().__init__(model, clip, data, settings, earlier)
        self.encoders = chosen_encoders(clip, settings.encoders)
        self.layers = chosen_layers(model) if settings.layers == "each" else []

    def prepare(self):
        """One start row per vector, the same in every stage and layer."""
        s = self.settings
        start = {
            e.key: start_rows(e, s.init, s.init_text, s.vectors, generator(s.seed, 0, f"start {e.key}"))
            .cpu()
            .repeat(s.stages, len(self.layers) or 1, 1, 1, 1)
            for e in self.encoders
        }
        self.grid = Grid.of([Concept(s.name, "tokens", start, self.facts())])
        texts = sorted({t for options in self.data.captions for t in options})
        self.index = {t: i for i, t in enumerate(texts)}
        counts = {"": dict.fromkeys(start, s.vectors)}
        self.prompts = Prompts(self.clip, texts, s.init_text or "thing", counts)
        self.prompts.ready()
        if s.geometry != "fixed norm":
            return start, Adam(s.learning_rate)
        words = {e.key: e.rows(s.init_text).mean(0).cpu() for e in self.encoders} if s.init_text else {}
        return start, Sphere({k: v / v.norm() for k, v in words.items()}, s.learning_rate, s.kappa)

    def condition(self, parameters, pictures, captions, sigma):
        """The pictures' captions with the rows of their noise levels."""
        texts = [self.index[self.data.captions[i][c]] for i, c in zip(pictures, captions, strict=True)]
        stages = self.grid.stages(noise_time(self.denoiser.sampling, sigma))
        return self.prompts.conditions(self.grid, parameters, texts, stages)

    def watched(self):
        return self.prompts.tokens[self.index[self.data.captions[0][0]]]

    def facts(self):
        return {"encoders": [e.key for e in self.encoders], "layers": self.layers}


def chosen_encoders(clip, keys: tuple[str, ...]) -> list:
    """The encoders of ``clip`` that are learned. Raises: CarrierMismatch when none of the keys is there."""
    found = [e for e in encoders(clip) if not keys or e.key in keys]
    if not found:
        have = ", ".join(e.key for e in encoders(clip))
        raise CarrierMismatch(
            f"None of the chosen text encoders is in this CLIP, which has {have}; tick one of these, or choose another "
            "preset where a preset decides."
        )
    return found


def chosen_layers(model) -> list[str]:
    """Names of the model's cross-attention layers. Raises: CarrierMismatch when it has none."""
    names = layers_of(model.model.diffusion_model)
    if not names:
        raise CarrierMismatch(
            f"{type(model.model).__name__} attends to text and picture together, so it has no layers that could have "
            "rows of their own; set layers to shared, or use SD1.5, SD2 or SDXL."
        )
    return names
