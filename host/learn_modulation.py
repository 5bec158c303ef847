"""TokenVerse (arXiv 2501.12224): words of a picture's captions learned as directions in the model's modulation space;
with codes of the words SAEPer, which reads sparse activations in the place of rows.

One network (kernels/controller.py) reads each marked word's row of the text and gives its direction; text encoder and
model stay as they are. First it learns one direction for all blocks, mostly at high noise, then also what each block
adds, mostly below. Optional isolation: in half of the steps the picture stands beside one of something else, whose half
must come out as without directions.
"""

from dataclasses import dataclass, replace

import torch

from ..carriers import modulation as carrier
from ..carriers.codes import Codes
from ..carriers.concept import Concept
from ..carriers.errors import CarrierMismatch
from ..carriers.files import digest
from ..kernels.controller import BLOCK_PARTS, coded, dense, directions, reading_of, start
from ..kernels.draws import generator, split_times
from ..kernels.fit import Adam
from ..kernels.losses import masked_mse, residual
from . import isolation, modulation
from .captions import Prompts, marked_captions
from .concept_set import ConceptSet
from .denoise import sigmas_at
from .gradients import ordinary
from .meanings import checked
from .positions import read_from
from .session import RunSettings, Session
from .words import CAPTION, rows_of, spelt, unmarked

LAW = "two stages"
BORDER, SHARE = 0.8, 0.92
"""First stage: so many of the times above the border; second stage: so many below."""


@dataclass(frozen=True)
class ModulationSettings(RunSettings):
    """How directions are learned."""

    captions: str = ""
    """Lines with marked words; an empty line begins those of the next picture, if there is one block per picture."""
    shared_steps: int = 800
    """Steps, those of earlier runs included, that learn one direction for all blocks; later ones learn each block's."""
    blocks: str = "all"
    """One of ``modulation.CHOICES``."""
    hidden: int = 768
    guidance: float = 1.0
    """Of models that have it distilled (Flux), while learning."""
    isolation: float = 0.0
    """Weight of the isolation loss, 1 in our reading of the paper; 0 for none."""
    isolation_prompts: str = ""
    """Lines: what the other pictures show; empty for ``isolation.OTHERS``."""
    time_law: str = LAW


class ModulationSession(Session):
    """Directions of marked words out of one small network."""

    kind = "modulation"

    def __init__(
        self,
        model,
        clip,
        data: ConceptSet,
        settings: ModulationSettings,
        earlier: Concept | None = None,
        *,
        others: ConceptSet | None = None,
        codes: Codes | None = None,
    ):
        """``others``: pictures of something else for the isolation loss, one per line of ``isolation_prompts``.
        ``codes``: the network reads the activations of these latents (SAEPer) instead of the whole row.

        Raises: ValueError for captions that mark no word or not the same ones, CarrierMismatch for a model without
        modulation of text tokens, or codes that are not of these words and this text encoder.
        """
        super().__init__(
            model, clip, replace(data, captions=marked_captions(settings.captions, data)), settings, earlier
        )
        self.blocks = modulation.chosen_blocks(model.model.diffusion_model, settings.blocks)
        self.used = read_from(model, clip)
        self.words = sorted({m.word for texts in self.data.captions for t in texts for m in unmarked(t, CAPTION)[1]})
        self.codes = codes
        if codes is not None:
            self._check_codes(codes)
        self.others, self.beside = others, isolation.beside(settings.isolation_prompts)
        if settings.isolation:
            self.passes = 2
            isolation.check(data, others, settings.isolation_prompts)

    def _check_codes(self, codes: Codes) -> None:
        lost = [w for w in self.words if w not in {spelt(word) for word in codes.words}]
        if lost:
            raise CarrierMismatch(
                f"The captions mark {', '.join(lost)}, but codes has: {', '.join(codes.words)}. Encode these words "
                "with Encode Words and connect them, pruned or not."
            )
        if len(self.used) > 1:
            raise CarrierMismatch(
                f"{type(self.model.model).__name__} reads words off several text encoders here, a dictionary those of "
                "one; codes work with Flux. Disconnect codes."
            )

    def _checked(self, found):
        facts, before = self._code_facts() if self.reading else {}, self.earlier.info
        if any(before.get(key) != facts.get(key) for key in ("latents", "dictionary_digest")):
            raise CarrierMismatch(
                f"Concept <{self.earlier.name}> reads {before.get('input', 'dense')} rows of other latents or another "
                "dictionary; continue with the codes it was learned on, or start anew."
            )
        if self.reading:
            before = carrier.reading(self.earlier.tensors)
            if self.earlier.info["words"] != self.words or not torch.equal(before["kept"], self.reading["kept"].cpu()):
                raise CarrierMismatch(
                    f"Concept <{self.earlier.name}> reads other latents per word; continue with the codes and the "
                    "words it was learned on, or start anew."
                )
            self.reading = {k: v.to(self.denoiser.device) for k, v in before.items()}  # what its network is used to
        return super()._checked(found)

    def gather(self):
        """Draws the pictures beside the concept's that nobody connected, as large as these."""
        if self.settings.isolation and self.others is None:
            self.others = isolation.drawn(self.model, self.clip, self.data, self.beside, self.settings.seed)

    def prepare(self):
        """The network at its start; captions encoded once, with the rows of their words."""
        s, texts = self.settings, sorted({t for options in self.data.captions for t in options})
        self.index = {t: i for i, t in enumerate(texts)}
        self.aside = [self.denoiser.clean(ordinary(v)[None]) for v in self.others.latents] if s.isolation else []
        self.plain = Prompts(self.clip, [unmarked(t, CAPTION)[0] for t in texts], "", {})
        self.plain.ready()
        self.encoded = [self._entry(self.plain, i) for i in range(len(texts))]
        self.rows = [self._rows(t) for t in texts]
        self.reading = self._reading() if self.codes is not None else {}
        self._check_read()
        width, draw = self.model.model.diffusion_model.hidden_size, generator(s.seed, 0, "start controller")
        inputs = len(self.reading["bias"]) if self.reading else self.encoded[0][0].shape[-1]
        made = start(inputs, width, len(self.blocks), s.hidden, draw, biases=not self.reading)
        values = {carrier.CONTROLLER + k: v.to(self.denoiser.device) for k, v in made.items()}
        late = {carrier.CONTROLLER + k: s.shared_steps for k in BLOCK_PARTS}
        return values, Adam(s.learning_rate, clip=1.0, late=late)

    def _check_read(self) -> None:
        for word in self.words if self.reading else ():
            seen = [self.encoded[i][0][0, own] for i, words in enumerate(self.rows) for w, own in words if w == word]
            if not bool(self._read(word, torch.cat(seen).to(self.denoiser.device, torch.float32)).any()):
                raise CarrierMismatch(
                    f"None of the latents of {word!r} is active where the captions have it, so it would learn nothing; "
                    "encode the captions themselves in Encode Words, or keep more latents in Prune Code."
                )

    def _reading(self) -> dict[str, torch.Tensor]:
        """The latents that any word keeps, as ``words.READINGS`` reads them; all active ones where none was pruned."""
        codes = {spelt(word): self.codes.mean(word) for word in self.codes.words}
        means = torch.stack([codes[word] for word in self.words])
        self.latents = (means > 0).any(0).nonzero()[:, 0]
        rows = [self.encoded[i][0][0, own] for i, words in enumerate(self.rows) for _, own in words]
        rows = torch.cat(rows).float()
        checked(self.clip, self.codes.dictionary, rows.shape[1])
        coder = self.codes.dictionary.coder(rows.device)
        with torch.no_grad():
            made = reading_of(coder, self.latents.to(rows.device), ordinary(rows))
        kept = (means[:, self.latents] > 0) if self.codes.kept else torch.ones(len(means), len(self.latents))
        return {k: v.to(self.denoiser.device) for k, v in {**made, "kept": kept.float()}.items()}

    def _read(self, word: str, features: torch.Tensor) -> torch.Tensor:
        """Inputs [n, m] of the network out of a word's rows [n, width] of the text."""
        if not self.reading:
            return dense(features)
        kept = self.reading["kept"][self.words.index(word)]
        return coded(self.reading, features, kept, self.codes.dictionary.info.get("norm", "none"))

    def _entry(self, prompts: Prompts, index: int) -> list:
        with torch.no_grad():
            cond, extra = prompts.encode(index, {})
        return [cond.detach(), {**extra, "guidance": self.settings.guidance}]

    def _rows(self, text: str) -> list[tuple[str, list[int]]]:
        """(word, rows of the context) of every mark of a caption."""
        plain, marks = unmarked(text, CAPTION)
        found = rows_of(self.clip.tokenize, self.used, plain, marks)
        return [(mark.word, rows) for mark, rows in zip(marks, found, strict=True)]

    def _directions(self, parameters, text: torch.Tensor, words: list[tuple[str, list[int]]]) -> torch.Tensor:
        """Directions [n, blocks, width] of words, one after the other, out of all rows [rows, width] of a text."""
        own = {k.removeprefix(carrier.CONTROLLER): v for k, v in parameters.items()}
        text = text.to(next(iter(own.values())).device, torch.float32)
        return directions(own, torch.cat([self._read(word, text[rows]) for word, rows in words]))

    def _placements(self, parameters, entries: list, rows: list) -> list[modulation.Placement]:
        """Every sample's words, each with its own rows and directions."""
        made = []
        for sample, (entry, words) in enumerate(zip(entries, rows, strict=True)):
            every = tuple(row for _, own in words for row in own)
            made_here = self._directions(parameters, entry[0][0], words)
            place = modulation.Place(every, made_here, self.blocks, self.settings.name)
            made.append(modulation.Placement((sample,), place))
        return made

    def condition(self, parameters, pictures, captions, sigma):
        """The pictures' captions, their words modulated."""
        texts = [self.index[self.data.captions[i][c]] for i, c in zip(pictures, captions, strict=True)]
        entries = [self.encoded[t] for t in texts]
        return entries, modulation.modulating(self._placements(parameters, entries, [self.rows[t] for t in texts]))

    def sigmas(self, when):
        """The paper's times are the share of noise itself, whatever shift the model samples with."""
        return sigmas_at(self.denoiser.sampling, when, self.settings.time_law != LAW).to(self.denoiser.device)

    def times(self, count, step, draw):
        """The paper's law, or that of every learner."""
        if self.settings.time_law != LAW:
            return super().times(count, step, draw)
        return split_times(count, BORDER, SHARE if step < self.settings.shared_steps else 1 - SHARE, draw)

    def losses(self, parameters, pictures, captions, when, draw):
        """The diffusion loss; in half of the steps beside another picture, with the isolation loss on its half."""
        if not self.settings.isolation:
            return super().losses(parameters, pictures, captions, when, draw)
        if float(torch.rand((), generator=draw)) < 0.5:
            found = super().losses(parameters, pictures, captions, when, draw)
            return {**found, "isolation": torch.zeros(())}
        return self._isolated(parameters, pictures, captions, when, draw)

    def _isolated(self, parameters, pictures, captions, when, draw) -> dict[str, torch.Tensor]:
        d, chosen = self.denoiser, torch.randint(len(self.aside), (len(pictures),), generator=draw).tolist()
        left, right = (torch.cat([v[i] for i in n]) for v, n in ((self.clean, pictures), (self.aside, chosen)))
        clean = torch.cat([left, right], -1)
        noise = torch.randn(clean.shape, generator=draw).to(d.device)
        sigma = self.sigmas(when)
        x = d.noised(clean, noise, sigma)
        texts = [
            isolation.HALVES.format(self.data.captions[i][c], self.beside[o])
            for i, c, o in zip(pictures, captions, chosen, strict=True)
        ]
        both = Prompts(self.clip, [unmarked(t, CAPTION)[0] for t in texts], "", {})
        entries, rows = [self._entry(both, i) for i in range(len(texts))], [self._rows(t) for t in texts]
        with torch.no_grad():
            kept = d(x, sigma, entries)
        moved = d(x, sigma, entries, modulation.modulating(self._placements(parameters, entries, rows)))
        error, drift = (residual(d.space, sigma, moved, v, d.sigma_data) for v in (clean, kept))
        half = left.shape[-1]
        return {
            "diffusion": masked_mse(error[..., :half], self._mask(pictures, left)).mean(),
            "isolation": self.settings.isolation * drift[..., half:].square().mean(),
        }

    def tensors(self):
        """The network, what it reads, and per word the mean of its directions over the captions."""
        found, network = dict(self.parameters), self.parameters
        found |= {carrier.READS + k: v for k, v in self.reading.items()}
        with torch.no_grad():
            for number, word in enumerate(self.words):
                seen = [(i, own) for i, words in enumerate(self.rows) for w, own in words if w == word]
                pieces = [len(own) for _, own in seen]
                usual = max(set(pieces), key=pieces.count)
                seen = [(i, own) for i, own in seen if len(own) == usual]
                made = [self._directions(network, self.encoded[i][0][0], [(word, own)]) for i, own in seen]
                every = torch.stack(made).mean(0)
                each = bool(network[f"{carrier.CONTROLLER}block.out.weight"].any())
                found[f"{carrier.WORD}{number}"] = (every if each else every[:, :1]).movedim(1, 0)
        return found

    def facts(self):
        return {
            "words": self.words,
            "blocks": list(self.blocks),
            "encoders": [e.key for e in self.used],
            "input": "codes" if self.reading else "dense",
            **(self._code_facts() if self.reading else {}),
        }

    def _code_facts(self) -> dict:
        own = self.codes.dictionary
        return {
            "norm": own.info.get("norm", "none"),
            "latents": self.latents.tolist(),
            "dictionary": own.name,
            "dictionary_digest": digest(own.tensors, {}),
        }
