"""Low-rank weight deltas learned from pictures: DreamBooth (arXiv 2208.12242) with LoRA (arXiv 2106.09685).

With frozen rows of a learned concept and of each picture's residual in the prompts it is the second stage of
ConceptPrism; with keys and values of cross-attention, and the rows learned along, it learns what Custom Diffusion
(arXiv 2212.04488) does, with rows per layer what ED-LoRA (Mix-of-Show, arXiv 2305.18292) learns of the UNet, with a
slot what Orthogonal Adaptation (arXiv 2312.02432) does.
"""

from collections import ChainMap
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..carriers import delta
from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..carriers.files import LARGEST
from ..kernels.draws import slot_rows, times
from ..kernels.fit import Adam
from . import lora
from .captions import Prompts
from .class_attention import ClassAttention
from .class_pictures import draw_class
from .concept_set import ConceptSet
from .denoise import noise_time
from .gradients import ordinary
from .session import RunSettings, Session
from .text import as_tokens, concept_rows, encoders, words_of
from .variants import Grid, layers_of

ROWS = "rows."
"""Begins the names of parameters that are rows, per encoder key."""


@dataclass(frozen=True)
class LoraSettings(RunSettings):
    """How a delta is learned."""

    rank: int = 4
    targets: str = "attention"
    """One of ``lora.CHOICES``."""
    single_blocks: bool = False
    token_text: str = ""
    """Stands in the concept's place; ``{}`` in it for the rows of a concept. Empty: the rows alone."""
    class_text: str = ""
    class_pictures: int = 0
    prior_weight: float = 1.0
    attention_weight: float = 0.0
    """Of AttnDreamBooth's attention loss; 0 takes no maps."""
    slot: int = 0
    """Whose directions of a shared basis the layers read; 0: any, which are learned."""
    tokens_learning_rate: float = 0.0
    """Of the named rows; 0: they stay."""
    decay: float = 0.01
    clip: float = 1.0


class LoraSession(Session):
    """Factors of low rank, and the rows that prompts name where these are learned along; captions whose rows stay are
    encoded once."""

    kind = "delta"

    def __init__(
        self,
        model,
        clip,
        data: ConceptSet,
        settings: LoraSettings,
        earlier: Concept | None = None,
        *,
        tokens: Concept | None = None,
        residuals: tuple[Concept, ...] = (),
        prior: ConceptSet | None = None,
    ):
        """``tokens``: whose rows the prompts name, by default those that ``earlier`` bundles; ``residuals``: one per
        picture; ``prior``: class pictures.

        Raises: ValueError and CarrierMismatch when these do not fit each other.
        """
        super().__init__(model, clip, data, settings, earlier)
        if earlier and earlier.kind != self.kind:
            raise CarrierMismatch(
                f"Concept <{earlier.name}> is made of {earlier.kind}, and only a LoRA can be continued here; connect "
                "it to tokens if its rows are to be named."
            )
        self.chosen = lora.layers(model, settings.targets, settings.single_blocks)
        if (size := 12 * lora.size(model, self.chosen, settings.rank)) > LARGEST:  # factors and two moments, fp32
            raise ValueError(
                f"A LoRA of rank {settings.rank} on {len(self.chosen)} layers has {size >> 20} MiB with what Adam "
                f"keeps, and files of this pack at most {LARGEST >> 20}; lower rank, or choose fewer layers."
            )
        self.tokens = _rows_of(tokens) if tokens else (as_tokens(earlier) if earlier else None)
        if settings.tokens_learning_rate and not self.tokens:
            raise ValueError(
                "tokens_learning_rate moves the rows of a concept, and none is connected to tokens; connect one, or "
                "set it to 0."
            )
        self.residuals = [_plain(_rows_of(r)) for r in residuals]
        self.prior = prior if settings.prior_weight else None
        joiner = " with " if all(r.info.get("joined", True) for r in residuals) else " "
        self.captions = captions(data, settings, self.tokens is not None, len(residuals), joiner)
        self.kept: dict | None = None if settings.tokens_learning_rate else {}
        self.fixed: dict[str, torch.Tensor] = {}
        if earlier and (before := earlier.info.get("slot", 0)) != settings.slot:
            raise CarrierMismatch(f"Concept <{earlier.name}> was learned with slot {before}; continue with that one.")
        before = earlier.info.get("tokens_learning_rate", 0.0) if earlier and earlier.state else None
        if before is not None and bool(before) != bool(settings.tokens_learning_rate):
            raise CarrierMismatch(
                f"Concept <{earlier.name}> was learned with tokens_learning_rate {before:g}, and its training state is "
                "of that; set it so again, or save the concept without training state and continue from that."
            )
        if settings.slot:
            slot_rows(lora.narrowest(model, self.chosen), settings.rank, settings.slot)  # raises before class pictures
        if settings.attention_weight:
            self._check_attention(len(residuals))
        if (self.prior or settings.class_pictures) and settings.prior_weight:
            self.passes = 2
            if not settings.class_text:
                raise ValueError("Class pictures need class_text, for example: a mug. Write it, or do without them.")

    def _check_attention(self, residuals: int) -> None:
        if not layers_of(self.model.model.diffusion_model):
            raise CarrierMismatch(
                f"{type(self.model.model).__name__} attends to text and picture together and has no maps to compare; "
                "set attention_weight to 0, or use SD1.5, SD2 or SDXL."
            )
        if not (self.tokens and self.tokens.info.get("init_text")) or residuals:
            raise ValueError(
                "attention_weight holds the maps of learned rows to those of the class word they began at; connect "
                "tokens that began at one, without residuals, or set it to 0."
            )

    def gather(self):
        """Draws the class pictures that nobody connected, as large as the most frequent picture."""
        s = self.settings
        if self.passes == 2 and self.prior is None:
            like = self.data.latents[max(self.data.buckets(), key=len)[0]]
            self.prior = draw_class(self.model, self.clip, s.class_text, s.class_pictures, like, s.seed, s.batch)
        if self.prior:
            self.captions += [tuple(t.replace("{}", s.class_text) for t in texts) for texts in self.prior.captions]

    def prepare(self):
        """Gaussian down, zero up; the prompts with their frozen rows."""
        s = self.settings
        rows, self.others, counts = {}, {}, {}
        if self.tokens:
            rows = concept_rows(self.clip, self.tokens)
            counts[""] = {k: v.shape[-2] for k, v in rows.items()}
        for number, residual in enumerate(self.residuals):
            every = concept_rows(self.clip, residual)
            self.others[f"r{number}"] = {k: v[0, 0, 0] for k, v in every.items()}
            counts[f"r{number}"] = {k: v.shape[-2] for k, v in every.items()}
        self.rows = rows
        self.grid = Grid.of([self.tokens] if self.tokens else [])
        self.grid.fits(self.model.model)
        texts = sorted({t for options in self.captions for t in options})
        self.index = {t: i for i, t in enumerate(texts)}
        self.prompts = Prompts(self.clip, texts, "", counts)
        self.prompts.ready()
        if s.attention_weight:
            word = self.tokens.info["init_text"]
            self.held = ClassAttention(encoders(self.clip)[0], self.prompts, texts, word, "moments", "half")
        if self.prior:
            self.clean += [self.denoiser.clean(ordinary(latent)[None]) for latent in self.prior.latents]
        start = lora.start(self.model, self.chosen, s.rank, s.seed, s.slot)
        if s.slot:
            self.fixed = {k: start.pop(k) for k in list(start) if k.endswith(delta.DOWN)}
            if self.earlier:
                self.fixed |= {k: v.to(self.fixed[k]) for k, v in self.earlier.tensors.items() if k in self.fixed}
        moved = self.tokens.tensors if s.tokens_learning_rate else ()
        start |= {ROWS + key: self.rows[key].to(self.model.load_device) for key in moved}
        rates = {ROWS + key: s.tokens_learning_rate for key in moved}
        return start, Adam(s.learning_rate, decay=s.decay, clip=s.clip, rates=rates)

    def _checked(self, found):
        """Rows of an earlier LoRA without training state are those that it bundles."""
        return super()._checked({**{k: v for k, v in self.start.items() if k.startswith(ROWS)}, **found})

    def attached(self):
        """The factors beside the model's layers; none before they are there."""
        return lora.beside(self.model, self.chosen, lambda: ChainMap(getattr(self, "parameters", {}), self.fixed))

    def tensors(self):
        """Factors with alpha = rank, and the rows that prompts need."""
        found = {**self.fixed, **{k: v for k, v in self.parameters.items() if not k.startswith(ROWS)}}
        found |= {name + delta.ALPHA: torch.tensor(float(self.settings.rank)) for name in self.chosen}
        bundle = {**self.tokens.tensors, **self._learned(self.parameters)} if self.tokens else {}
        return found | {f"{delta.BUNDLE}{self.settings.name}.{key}": value for key, value in bundle.items()}

    def _texts(self, pictures: list[int], captions: list[int]) -> list[int]:
        return [self.index[self.captions[i][c]] for i, c in zip(pictures, captions, strict=True)]

    def _learned(self, parameters) -> dict[str, torch.Tensor]:
        """Rows that are learned along, per encoder key, where that encoder has its vocabulary."""
        rows = {k.removeprefix(ROWS): v for k, v in parameters.items() if k.startswith(ROWS)}
        return {k: v.to(self.rows[k].device) for k, v in rows.items()}

    def condition(self, parameters, pictures, captions, sigma):
        """The pictures' captions with the rows of their noise levels."""
        texts = self._texts(pictures, captions)
        stages = self.grid.stages(noise_time(self.denoiser.sampling, sigma))
        rows = {**self.rows, **self._learned(parameters)}
        return self.prompts.conditions(self.grid, rows, texts, stages, self.others, self.kept)

    def losses(self, parameters, pictures, captions, when, draw):
        """The diffusion loss, that of as many class pictures, weighted (DreamBooth), and that of the concept's maps."""
        weight, given = self.settings.attention_weight, (parameters, pictures, captions, when, draw)
        found = (
            self.held.losses(self, weight, self._texts(pictures, captions), *given)
            if weight
            else super().losses(*given)
        )
        if self.prior:
            s, first = self.settings, len(self.data.latents)
            of_class, said = self.prior.draw(len(pictures), draw)
            when = times(len(of_class), s.time_law, s.time_low, s.time_high, draw)
            prior = self.diffusion(parameters, [first + i for i in of_class], said, when, draw)
            found["prior"] = s.prior_weight * prior
        return found

    def _mask(self, pictures: list[int], like: torch.Tensor) -> torch.Tensor | None:
        of_class = pictures[0] >= len(self.data.latents)
        return None if of_class else super()._mask(pictures, like)

    def facts(self):
        """Also what ``as_tokens`` needs of the concept whose rows are bundled."""
        found: dict = {"lora_layers": len(self.chosen), "residuals": len(self.residuals)}
        if self.tokens:
            found |= {k: self.tokens.info[k] for k in ("init_text", "layers") if k in self.tokens.info}
        return found


def _rows_of(concept: Concept) -> Concept:
    found = as_tokens(concept)
    if found is None:
        raise CarrierMismatch(
            f"Concept <{concept.name}> bundles no token rows; connect a concept from Learn Concept Tokens, or write "
            "token_text."
        )
    return found


def _plain(residual: Concept) -> Concept:
    if any(v.shape[:3] != (1, 1, 1) for v in residual.tensors.values()):
        raise CarrierMismatch(
            f"Residual <{residual.name}> has rows per stage, layer or role; connect what Learn Residual Tokens gives."
        )
    return residual


def captions(
    data: ConceptSet, settings: LoraSettings, tokens: bool, residuals: int, joiner: str = " with "
) -> list[tuple[str, ...]]:
    """Per picture its captions as they are learned with: ``{}`` for the rows, ``{r<i>}`` for those of a residual.

    ``joiner``: between them, as the residuals were learned. Mirrored pictures share the residual of the picture before
    them when there are only as many residuals as pictures.
    Raises: ValueError when nothing stands for the concept, or residuals and pictures do not match.
    """
    phrase = words_of(settings.token_text, tokens)
    if not phrase:
        raise ValueError(
            "Nothing stands for the concept in prompts: connect tokens, or write token_text, for example: sks mug."
        )
    if ("{}" in phrase) != tokens:
        raise ValueError(
            f"token_text {settings.token_text!r} names the concept's rows, but no tokens are connected; connect them."
            if not tokens
            else f"Tokens are connected, but token_text {settings.token_text!r} does not name them; clear it, or write "
            "{} where they stand."
        )
    count, numbers = len(data.latents), [n - 1 for n in accumulate(not m for m in data.mirrored)]
    if residuals == count:
        numbers = list(range(count))
    elif residuals and residuals != numbers[-1] + 1:
        raise ValueError(
            f"There are {count} pictures and {residuals} residuals; connect one per picture, in order, or none."
        )
    said = []
    for texts, number in zip(data.captions, numbers, strict=True):
        first = phrase + (f"{joiner}{{r{number}}}" if residuals else "")
        parts = [text.partition("{}") for text in texts]
        said.append(tuple(a + (first if mark else "") + b.replace("{}", phrase) for a, mark, b in parts))
    return said
