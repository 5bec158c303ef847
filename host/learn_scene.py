"""Break-A-Scene, phase 1 (arXiv 2305.16311): several things of one picture, each with its mask, as words of their own.

Every step draws some of the things: their words make the prompt, their masks together bound the diffusion loss, and the
attention map of each word is pulled to the mask of its thing.
"""

import math
from dataclasses import dataclass, replace

import torch

from ..carriers.concept import Concept, check_name
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator, subset
from ..kernels.fit import Adam
from ..kernels.losses import masked_mse, residual
from .attention import AttentionTap, chosen, maps_of
from .captions import Prompts
from .concept_set import ConceptSet
from .gradients import training
from .learn_tokens import chosen_encoders
from .overlays import background, grid
from .positions import learned_columns
from .scene_masks import apart, scene_masks
from .session import RunSettings, Session
from .show import tap_of
from .text import start_rows
from .variants import layers_of


@dataclass(frozen=True)
class SceneSettings(RunSettings):
    """How the words of a scene are learned; the defaults are those of the authors' first phase.

    Raises: CarrierError where ``<name1>`` and so on are no names.
    """

    steps: int = 400
    learning_rate: float = 5e-4
    masked_loss: bool = True
    things: tuple[str, ...] = ()
    """Per thing the class word that it starts from."""
    vectors: int = 1
    """Per thing."""
    attention_weight: float = 0.01
    """0 takes no maps."""
    attention_layers: str = "quarter"
    encoders: tuple[str, ...] = ()
    """Encoder keys to learn; empty for all."""

    def __post_init__(self):
        super().__post_init__()
        check_name(f"{self.name}{len(self.things)}")


class SceneSession(Session):
    """One tensor per encoder key, [1, 1, 1, things * vectors, width]."""

    def __init__(
        self,
        model,
        clip,
        data: ConceptSet,
        masks: torch.Tensor,
        settings: SceneSettings,
        earlier: Concept | None = None,
    ):
        """``masks``: MASK batch [n, h, w], one per thing; those of ``data`` and its captions are not used.

        Raises: ValueError as ``scene_masks`` does, or for an unknown choice of layers; CarrierMismatch when maps are
        asked of a model without cross-attention.
        """
        self.covers = scene_masks(data, masks, settings.things)
        together = tuple(c.amax(0, keepdim=True) for c in self.covers)
        data = replace(data, masks=together, captions=(("",),) * len(together))
        super().__init__(model, clip, data, settings, earlier)
        self.encoders = chosen_encoders(clip, settings.encoders)
        chosen(settings.attention_layers)
        if settings.attention_weight and not layers_of(model.model.diffusion_model):
            raise CarrierMismatch(
                f"{type(model.model).__name__} attends to text and picture together, so a word's map cannot be held to "
                "a mask here; set attention_weight to 0, or use SD1.5, SD2 or SDXL."
            )
        self.all = tuple(range(len(settings.things)))

    def _checked(self, found):
        before = list(self.earlier.info.get("things") or ())
        if before != list(self.settings.things):
            raise CarrierMismatch(
                f"Concept <{self.earlier.name}> holds the words of {', '.join(before) or 'no scene'}, this node would "
                f"learn those of {', '.join(self.settings.things)}; continue with the same words in the same order."
            )
        return super()._checked(found)

    def prepare(self):
        """Every thing's rows at its class word."""
        s, start = self.settings, {}
        for e in self.encoders:
            draw = generator(s.seed, 0, f"start {e.key}")
            rows = torch.cat([start_rows(e, "word", word, s.vectors, draw).cpu() for word in s.things])
            start[e.key] = rows[None, None, None]
        self.counts = {str(thing): dict.fromkeys(start, s.vectors) for thing in self.all}
        self.whole = self.prompts([self.all])
        self.whole.ready()
        return start, Adam(s.learning_rate)

    def prompts(self, drawn: list[tuple[int, ...]]) -> Prompts:
        """A prompt per tuple of things, which names them in this order."""
        texts = ["a photo of " + " and ".join(f"{{{thing}}}" for thing in own) for own in drawn]
        words = {str(thing): word for thing, word in enumerate(self.settings.things)}
        return Prompts(self.clip, texts, words, self.counts)

    def _entries(self, prompts: Prompts, parameters) -> list:
        parts = {key: value[0, 0, 0].split(self.settings.vectors) for key, value in parameters.items()}
        rows = {str(thing): {key: own[thing] for key, own in parts.items()} for thing in self.all}
        return [entry for _, entry in prompts.encode_groups([(n, [rows]) for n in range(len(prompts.tokens))])]

    def condition(self, parameters, pictures, captions, sigma):
        """All things in their order."""
        return self._entries(self.whole, parameters) * len(pictures), None

    def losses(self, parameters, pictures, captions, when, draw):
        """The diffusion loss inside the masks of the things drawn, and the weighted loss of their maps."""
        s, d, tap = self.settings, self.denoiser, None
        clean = torch.cat([self.clean[i] for i in pictures])
        noise = torch.randn(clean.shape, generator=draw).to(clean)
        drawn = [subset(len(self.all), draw) for _ in pictures]
        alike = list(dict.fromkeys(drawn))
        which = [alike.index(own) for own in drawn]
        prompts, sigma = self.prompts(alike), self.sigmas(when)
        encoded = self._entries(prompts, parameters)
        entries = [encoded[n] for n in which]
        if s.attention_weight:
            tap = AttentionTap(maps_of(self._columns(prompts)[which], follow_queries=True), s.attention_layers)
        denoised = d(d.noised(clean, noise, sigma), sigma, entries, tap.change if tap else None)
        error = residual(d.space, sigma, denoised, clean, d.sigma_data)
        covers = torch.stack([self.covers[i] for i in pictures]).to(clean)
        counted = torch.stack([torch.zeros(len(self.all)).index_fill(0, torch.tensor(own), 1) for own in drawn])
        counted = counted.to(clean)
        union = (covers * counted[..., None, None]).amax(1, keepdim=True) if s.masked_loss else None
        found = {"diffusion": masked_mse(error, union).mean()}
        return found | ({"attention": s.attention_weight * apart(tap.take(), covers, counted)} if tap else {})

    def _columns(self, prompts: Prompts) -> torch.Tensor:
        """Columns [b, m, things] of several prompts, repeated as the host repeats their contexts."""
        columns = [learned_columns(self.model, self.clip, t, len(self.all)) for t in prompts.tokens]
        length = math.lcm(*(c.shape[1] for c in columns))
        return torch.cat([c.repeat(1, length // c.shape[1], 1) for c in columns])

    def watched(self):
        return self.whole.tokens[0]

    def facts(self):
        return {
            "encoders": [e.key for e in self.encoders],
            "layers": [],
            "init_text": " and ".join(self.settings.things),
        }

    def picture(self) -> torch.Tensor:
        """IMAGE: where the picture, half noised, looks at each word; a grey pixel where that cannot be told. Call after
        learning."""
        d, clean = self.denoiser, self.clean[0]
        try:
            columns = learned_columns(self.model, self.clip, self.watched(), len(self.all))
        except CarrierMismatch:
            return torch.full((1, 1, 1, 3), 0.5)
        with training(self.model, self.clip.patcher), torch.no_grad():
            self.whole.ready()
            sigma = self.sigmas(torch.tensor([0.5]))
            noise = torch.randn(clean.shape, generator=generator(self.settings.seed, 0, "looks")).to(clean)
            tap = tap_of(self.model, columns, clean)
            d(d.noised(clean, noise, sigma), sigma, self._entries(self.whole, self.parameters), tap.change)
        names = [f"<{self.settings.name}{thing + 1}>" for thing in self.all]
        picture = background(self.model.model.latent_format, clean)
        maps = {layer: seen[0] for layer, seen in tap.take().items()}
        return grid(picture, names, [("", maps)], picture.shape[0] // clean.shape[-2])
