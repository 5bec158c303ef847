"""SeFi-IDE (arXiv 2402.00631): rows per stage for K and for V, and attention that stays like the class word's.

A small network makes all rows out of the class word; it is what is learned, and the rows are what is kept.
"""

from dataclasses import dataclass

import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..carriers.files import LARGEST
from ..kernels.attention import LOSSES
from ..kernels.draws import generator
from ..kernels.fit import Adam
from ..kernels.stage_mapper import stage_rows, start
from .attention import AttentionTap, both, chosen, maps_of
from .captions import Prompts
from .class_attention import ClassAttention
from .denoise import noise_time, sigmas_at
from .gradients import training
from .learn_tokens import chosen_encoders
from .overlays import background, grid
from .session import RunSettings, Session
from .text import start_rows
from .variants import Grid, layers_of

MAPPERS = ("self-attention", "free")


@dataclass(frozen=True)
class KVSettings(RunSettings):
    """How K and V tokens are learned; the defaults are the paper's, or ProSpect's where it says nothing."""

    steps: int = 600
    learning_rate: float = 1e-4
    init_text: str = ""
    stages: int = 5
    """Equal intervals of the training timesteps with rows of their own."""
    split: bool = True
    """Different rows for K and V."""
    mapper: str = "self-attention"
    attention_weight: float = 3e-3
    """lambda; 0 takes no maps."""
    attention_layers: str = "half"
    attention_loss: str = "probabilities"
    encoders: tuple[str, ...] = ()
    """Encoder keys to learn; empty for all."""


class KVSession(Session):
    """One vector per encoder, stage and role.

    Raises: CarrierMismatch when K and V, or maps, are asked of a model without cross-attention; ValueError for a
    setting that is not known or a module too large to be saved.
    """

    def __init__(self, model, clip, data, settings: KVSettings, earlier: Concept | None = None):
        super().__init__(model, clip, data, settings, earlier)
        self.encoders = chosen_encoders(clip, settings.encoders)
        self.roles = 2 if settings.split else 1
        chosen(settings.attention_layers)
        for value, known in ((settings.mapper, MAPPERS), (settings.attention_loss, LOSSES)):
            if value not in known:
                raise ValueError(f"Unknown choice {value!r}; known: {', '.join(known)}.")
        self.crossed = bool(layers_of(model.model.diffusion_model))
        if not self.crossed and (settings.split or settings.attention_weight):
            raise CarrierMismatch(
                f"{type(model.model).__name__} attends to text and picture together, so K and V have no prompts of "
                "their own and no maps to compare; turn split_kv off and set attention_weight to 0 (rows per stage "
                "remain), or use SD1.5, SD2 or SDXL."
            )

    def prepare(self):
        """The network's weights per encoder, or the rows themselves."""
        s = self.settings
        self.words = {e.key: e.rows(s.init_text) for e in self.encoders}
        rows = {
            e.key: start_rows(e, "word", s.init_text, 1, generator(s.seed, 0, f"start {e.key}"))
            .cpu()
            .repeat(s.stages, 1, self.roles, 1, 1)
            for e in self.encoders
        }
        self.grid = Grid.of([Concept(s.name, "tokens", rows, self.facts())])
        texts = sorted({t for options in self.data.captions for t in options})
        self.index = {t: i for i, t in enumerate(texts)}
        self.prompts = Prompts(self.clip, texts, s.init_text, {"": dict.fromkeys(rows, 1)})
        self.prompts.ready()
        self.held = ClassAttention(
            self.encoders[0], self.prompts, texts, s.init_text, s.attention_loss, s.attention_layers
        )
        if s.mapper == "free":
            return rows, Adam(s.learning_rate)
        device = next(iter(self.words.values())).device
        found = {}
        for e in self.encoders:
            draw = generator(s.seed, 0, f"mapper {e.key}")
            found |= {f"{e.key}.{k}": v.to(device) for k, v in start(e.width, s.stages, self.roles, draw).items()}
            if 12 * sum(v.numel() for v in found.values()) > LARGEST:  # weights and two moments, fp32
                raise ValueError(
                    f"The module for {', '.join(self.words)} is too large to be kept for continuing; choose the mapper "
                    "free, fewer stages, or fewer text encoders."
                )
        return found, Adam(s.learning_rate)

    def rows(self, parameters) -> dict[str, torch.Tensor]:
        """Rows [stages, 1, roles, 1, width] per encoder key, differentiable."""
        s = self.settings
        if s.mapper == "free":
            return dict(parameters)
        return {
            key: stage_rows(
                {k.removeprefix(f"{key}."): v for k, v in parameters.items() if k.startswith(f"{key}.")},
                word.to(next(iter(parameters.values()))),
                s.stages,
                self.roles,
            )
            for key, word in self.words.items()
        }

    def tensors(self):
        with torch.no_grad():
            return self.rows(self.parameters)

    def texts(self, pictures, captions) -> list[int]:
        """Numbers of the captions drawn."""
        return [self.index[self.data.captions[i][c]] for i, c in zip(pictures, captions, strict=True)]

    def condition(self, parameters, pictures, captions, sigma):
        """The pictures' captions with the rows of their noise levels."""
        stages = self.grid.stages(noise_time(self.denoiser.sampling, sigma))
        return self.prompts.conditions(self.grid, self.rows(parameters), self.texts(pictures, captions), stages)

    def losses(self, parameters, pictures, captions, when, draw):
        """The diffusion loss, and lambda times the attention loss of the chosen layers."""
        s = self.settings
        if not s.attention_weight:
            return super().losses(parameters, pictures, captions, when, draw)
        texts = self.texts(pictures, captions)
        return self.held.losses(self, s.attention_weight, texts, parameters, pictures, captions, when, draw)

    def watched(self):
        return self.prompts.tokens[self.index[self.data.captions[0][0]]]

    def facts(self):
        return {
            "encoders": [e.key for e in self.encoders],
            "layers": [],
            "text_paths": "K and V" if self.settings.split else "no split",
        }

    def looks(self) -> tuple[torch.Tensor, list[tuple[str, dict]]]:
        """The first picture in model space [1, c, h, w], and per stage a label and what each layer sees of the concept,
        layer -> [n, 1]; no stages for models without cross-attention. Call after learning."""
        s, found = self.settings, []
        with training(self.model, self.clip.patcher), torch.no_grad():
            self.prompts.ready()
            clean, text = self.clean[0], self.texts([0], [0])[0]
            own, _, concept = self.held.columns(text)
            for stage in range(s.stages if self.crossed else 0):
                sigma = sigmas_at(self.denoiser.sampling, torch.tensor([(stage + 0.5) / s.stages])).to(clean)
                noise = torch.randn(clean.shape, generator=generator(s.seed, stage, "looks")).to(clean)
                entries, change = self.condition(self.parameters, [0], [0], sigma)
                tap = AttentionTap(maps_of(own[None][..., concept]))
                noised = self.denoiser.noised(clean, noise, sigma)
                self.denoiser(noised, sigma, entries, both(change, tap))
                found.append((f"stage {stage + 1} of {s.stages}", {k: v[0] for k, v in tap.take().items()}))
        return clean, found

    def picture(self) -> torch.Tensor:
        """IMAGE: ``looks`` over the first picture; a grey pixel for models without cross-attention."""
        clean, passes = self.looks()
        if not passes:
            return torch.full((1, 1, 1, 3), 0.5)
        picture = background(self.model.model.latent_format, clean)
        return grid(picture, [f"<{self.settings.name}>"], passes, picture.shape[0] // clean.shape[-2])
