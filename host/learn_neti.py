"""NeTI (arXiv 2305.15391): a small network of time and layer, learned instead of the word vectors themselves."""

import functools
from dataclasses import dataclass

import torch

from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..carriers.mapper import networks
from ..kernels.draws import generator
from ..kernels.fit import Adam
from ..kernels.neti import ANCHORS, FIXED, HIDDEN, STEPS, mapped, start, truncation
from .captions import Prompts, picked
from .denoise import noise_time
from .learn_tokens import chosen_encoders
from .neti import places, with_bypass
from .session import RunSettings, Session
from .text import MARKS, encoders
from .variants import layers_of

DECAY = 1e-2
"""Weight decay of the authors' AdamW."""


@dataclass(frozen=True)
class NetiSettings(RunSettings):
    """How a mapper is learned."""

    init: str = "word"
    """``random``: word vectors of the vocabulary's mean length; else of that of the words of ``init_text``."""
    init_text: str = ""
    encoders: tuple[str, ...] = ()
    """Encoder keys to learn; empty for all."""


def check_alone(**settings) -> None:
    """Raises: ValueError when a setting of learned rows asks for what a mapper does in its own way."""
    usual = {"vectors": 1, "geometry": "free", "layers": "shared", "stages": 1}
    changed = [f"{name} {value}" for name, value in settings.items() if value != usual[name]]
    if changed:
        raise ValueError(
            f"NeTI makes one vector per layer and time by itself, so it cannot be combined with {', '.join(changed)}; "
            f"set {', '.join(f'{k} to {v}' for k, v in usual.items())}, or mapper to none."
        )


class NetiSession(Session):
    """One mapper per text encoder; every cross-attention layer sees the caption with the vector of its own."""

    kind = "mapper"

    def __init__(self, model, clip, data, settings: NetiSettings, earlier: Concept | None = None):
        super().__init__(model, clip, data, settings, earlier)
        self.encoders = chosen_encoders(clip, settings.encoders)
        self.layers = layers_of(model.model.diffusion_model)
        if not self.layers:
            raise CarrierMismatch(
                f"{type(model.model).__name__} attends to text and picture together, so it has no layers that NeTI "
                "could tell apart; set mapper to none, or use SD1.5, SD2 or SDXL."
            )

    def prepare(self):
        """Random networks: at the start the vectors have the class word's length, not its direction."""
        s, known = self.settings, self.earlier if self.earlier and self.earlier.kind == self.kind else None
        parts = networks(known.tensors) if known else {}
        self.norms = known.info["norms"] if known else {e.key: self._norm(e) for e in self.encoders}
        values, self.fixed = {}, {}
        for e in self.encoders:
            draw, own = generator(s.seed, 0, f"start {e.key}"), parts.get(e.key, {})
            for part, value in start(len(self.layers), e.width, draw, frequencies=own.get(FIXED)).items():
                (self.fixed if part == FIXED else values)[f"{e.key}.{part}"] = value
        texts = sorted({t for options in self.data.captions for t in options})
        self.index = {t: i for i, t in enumerate(texts)}
        self.prompts = Prompts(
            self.clip, texts, s.init_text or "thing", {"": dict.fromkeys((e.key for e in self.encoders), 1)}
        )
        self.prompts.ready()
        self.places = [places(encoders(self.clip), tokens, MARKS) for tokens in self.prompts.tokens]
        return values, Adam(s.learning_rate, decay=DECAY)

    def _norm(self, encoder) -> float:
        rows = encoder.vocabulary.detach().float()
        if self.settings.init != "random":
            rows = encoder.rows(self.settings.init_text)
            if not len(rows):
                raise ValueError(
                    f"NeTI takes the length of its vectors from a class word, and there is none in "
                    f"{self.settings.init_text!r}; write one such as 'mug' in init_text, or set init to random."
                )
        return float(rows.norm(dim=-1).mean())

    def tensors(self):
        return {**self.fixed, **self.parameters}

    def condition(self, parameters, pictures, captions, sigma, kept=None):
        """The pictures' captions once per layer; ``kept``: per encoder key the hidden units [b, layers] that count."""
        times = noise_time(self.denoiser.sampling, sigma) * STEPS
        parts, layers = networks({**self.fixed, **parameters}), torch.arange(len(self.layers))
        entries, contexts = [], []
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            text, words, bypass = self.index[self.data.captions[picture][caption]], {}, {}
            for e in self.encoders:
                units = kept[e.key][number] if kept else None
                when = times[number].expand(len(layers))
                words[e.key], bypass[e.key] = mapped(parts[e.key], when, layers, self.norms[e.key], units)
            many = [{"": {k: v[layer : layer + 1] for k, v in words.items()}} for layer in layers.tolist()]
            plain, entry = self.prompts.encode_all(text, many)
            contexts.append((plain, with_bypass(plain, self.places[text], bypass)))
            entries.append(entry)
        names = {name: layer for layer, name in enumerate(self.layers)}
        return entries, picked(entries, lambda sample, name, role: contexts[sample][role][names[name]])

    def losses(self, parameters, pictures, captions, when, draw):
        """The diffusion loss under nested dropout."""
        shape = (len(pictures), len(self.layers))
        kept = {e.key: truncation(shape[0] * shape[1], HIDDEN, draw).view(shape) for e in self.encoders}
        condition = functools.partial(self.condition, kept=kept)
        return {"diffusion": self.diffusion(parameters, pictures, captions, when, draw, condition)}

    def watched(self):
        return self.prompts.tokens[self.index[self.data.captions[0][0]]]

    def facts(self):
        return {
            "encoders": [e.key for e in self.encoders],
            "layers": self.layers,
            "anchors": ANCHORS,
            "norms": {e.key: self.norms[e.key] for e in self.encoders},
        }
