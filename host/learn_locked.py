"""Perfusion (arXiv 2305.01644): a row of the encoder's input, and per layer a gated rank-one edit behind the encoder,
whose keys stay the class word's.

The edit is made on the rows that K and V are projected from (kernels/rank_one.py), so that no weight changes.
"""

import functools
from dataclasses import dataclass

import torch

from ..carriers.concept import Concept
from ..carriers.edit import DIRECTION, DUAL, KEYS, ROW, VALUES
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator
from ..kernels.fit import Adam
from ..kernels.rank_one import edited, pull
from .captions import Prompts, picked
from .corpus import Corpus
from .neti import places
from .session import RunSettings, Session
from .text import MARKS, encode_many, encoders, start_rows
from .variants import layers_of

CLASS_TEXT = "a photo of a {}"
"""Where the class word's encoding is taken from."""
PROMPTS, AT_ONCE = 512, 32
"""Prompts of the bundled grammar that the covariance is estimated from, and how many are encoded together."""
RIDGE = 1e-3
"""What is added to the covariance's diagonal, as a share of its mean."""
KEPT = 0.99
"""What the direction keeps of itself in a step; the rest is the concept's encoding."""


@dataclass(frozen=True)
class LockedSettings(RunSettings):
    """How an edit is learned; rates, beta and tau are those of lucidrains/perfusion-pytorch."""

    steps: int = 400
    learning_rate: float = 0.03
    """Of what comes into the rows' place."""
    token_learning_rate: float = 0.006
    """Of the rows that the encoders read."""
    init_text: str = ""
    beta: float = 0.75
    """Likeness to the direction at which the gate is half open."""
    tau: float = 0.1
    """Width of the gate."""
    lock_keys: bool = True
    """K gets the class word's encoding; else what is learned for each layer, as V does."""


class LockedSession(Session):
    """One row per encoder, the gate's direction, and a target per layer. Raises: CarrierMismatch for a model without
    cross-attention; ValueError for a gate without width."""

    kind = "edit"

    def __init__(self, model, clip, data, settings: LockedSettings, earlier: Concept | None = None):
        super().__init__(model, clip, data, settings, earlier)
        self.layers = layers_of(model.model.diffusion_model)
        if not self.layers:
            raise CarrierMismatch(
                f"{type(model.model).__name__} attends to text and picture together, so it has no keys and values of "
                "the text to lock and to learn; use SD1.5, SD2 or SDXL."
            )
        if settings.tau <= 0:
            raise ValueError(f"tau is {settings.tau}, and the gate needs a width above 0.")

    def prepare(self):
        """Everything starts at the class word: its rows, and its encoding as direction and targets."""
        s, found = self.settings, encoders(self.clip)
        start = {
            ROW + e.key: start_rows(e, "word", s.init_text, 1, generator(s.seed, 0, f"start {e.key}")).cpu()
            for e in found
        }
        texts = sorted({CLASS_TEXT, *(t for options in self.data.captions for t in options)})
        self.index = {t: i for i, t in enumerate(texts)}
        self.prompts = Prompts(self.clip, texts, s.init_text, {"": dict.fromkeys((e.key for e in found), 1)})
        self.prompts.ready()
        self.places = [sorted({p.position for p in places(found, t, MARKS)}) for t in self.prompts.tokens]
        with torch.no_grad():
            self.factor = torch.linalg.cholesky(covariance(self.clip))
            ((contexts, _),) = self._encoded(start, [self.index[CLASS_TEXT]]).values()
        word = contexts[0, self.places[self.index[CLASS_TEXT]]].mean(0).cpu()
        each = word.repeat(len(self.layers), 1)
        start |= {DIRECTION: word, VALUES: each}
        known = self.earlier if self.earlier and self.earlier.kind == self.kind else None
        self.fixed = {KEYS: known.tensors[KEYS] if known else word[None]} if s.lock_keys else {}
        start |= {} if s.lock_keys else {KEYS: each.clone()}
        rates = {k: s.token_learning_rate for k in start if k.startswith(ROW)}
        return start, Adam(s.learning_rate, rates=rates, plain={DIRECTION: 1 - KEPT})

    def _encoded(self, parameters, texts: list[int]) -> dict[int, tuple[torch.Tensor, list]]:
        """Context [1, tokens, width] and conditioning entry of each different caption, before the edit."""
        rows = {"": {k.removeprefix(ROW): v for k, v in parameters.items() if k.startswith(ROW)}}
        wanted = list(dict.fromkeys(texts))
        return dict(zip(wanted, self.prompts.encode_groups([(t, [rows]) for t in wanted]), strict=True))

    def _dual(self, direction: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(direction.detach().double()[:, None], self.factor)[:, 0].float()

    def tensors(self):
        return {**self.fixed, **self.parameters, DUAL: self._dual(self.parameters[DIRECTION])}

    def condition(self, parameters, pictures, captions, sigma, seen: list | None = None):
        """The pictures' captions as every layer reads them; the concept's encodings [width] are put into ``seen``."""
        s, targets = self.settings, {**self.fixed, **parameters}
        texts = [self.index[self.data.captions[i][c]] for i, c in zip(pictures, captions, strict=True)]
        encoded, made = self._encoded(parameters, texts), {}
        direction = parameters[DIRECTION].detach()
        for text, ((context,), _) in encoded.items():
            gate = [v[None].to(context) for v in (direction, self._dual(direction))]
            made[text] = [
                edited(context, *gate, targets[part].to(context)[:, None], s.beta, s.tau) for part in (KEYS, VALUES)
            ]
        for text in texts if seen is not None else ():
            seen += [encoded[text][0][0, self.places[text]].mean(0).to(direction)] if self.places[text] else []
        number = {name: layer for layer, name in enumerate(self.layers)}

        def context(sample: int, name: str, role: int) -> torch.Tensor:
            found = made[texts[sample]][role]
            return found[min(number[name], len(found) - 1)]

        entries = [encoded[text][1] for text in texts]
        return entries, picked(entries, context)

    def losses(self, parameters, pictures, captions, when, draw):
        """The diffusion loss, and nothing that moves the direction to the concept's encoding."""
        seen: list[torch.Tensor] = []
        condition = functools.partial(self.condition, seen=seen)
        loss = self.diffusion(parameters, pictures, captions, when, draw, condition)
        if seen:
            loss = loss + pull(parameters[DIRECTION], torch.stack(seen).mean(0))
        return {"diffusion": loss}

    def watched(self):
        return self.prompts.tokens[self.index[self.data.captions[0][0]]]

    def facts(self):
        return {"encoders": [e.key for e in encoders(self.clip)], "layers": self.layers}


def covariance(clip) -> torch.Tensor:
    """Uncentred covariance [width, width], fp64, of all rows of text that layers read for ``PROMPTS`` prompts of the
    bundled grammar, with a ridge; the same for the same encoders. Call after ``ready``."""
    prompts, total, count = Corpus("", 0).prompts(0, PROMPTS), 0.0, 0
    for first in range(0, PROMPTS, AT_ONCE):
        many = [clip.tokenize(text) for text in prompts[first : first + AT_ONCE]]
        rows = torch.cat([cond.flatten(0, 1) for cond, _ in encode_many(clip, many)]).cpu().double()
        total, count = total + rows.T @ rows, count + len(rows)
    found = total / count
    found.diagonal().add_(RIDGE * float(found.diagonal().mean()))
    return found
