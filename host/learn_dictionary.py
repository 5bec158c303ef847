"""Learning a dictionary of token features: a sparse autoencoder over what a text encoder says of many prompts.

TopK with AuxK (arXiv 2406.04093), BatchTopK (arXiv 2412.06410), Matryoshka by k (MSAE, arXiv 2502.20578) and by prefix
(arXiv 2503.17547). Features are made while learning and never held beyond one chunk of prompts.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import comfy.model_management
import torch

from ..carriers.concept import check_name
from ..carriers.dictionary import Dictionary, write_dictionary
from ..carriers.errors import CarrierMismatch
from ..kernels.draws import generator
from ..kernels.fit import Diverged, UnitRows, fit
from ..kernels.sae import Coder, auxiliary, batch_top, decode, encode, fvu, nested, top
from . import folders
from .corpus import Corpus
from .gradients import ordinary
from .learn import Kept
from .loading import advised
from .meanings import named
from .progress import Progress, say
from .token_features import read, spoken_encoder

KINDS = ("TopK", "BatchTopK", "Matryoshka by k", "Matryoshka by prefix")
CHUNK_STEPS = 8
"""Steps that draw their tokens from one chunk of prompts."""
AUX_WEIGHT = 1 / 32
WARM_UP = 50
"""Steps; not a share of the run, so that continuing is like not stopping."""
SMOOTH = 0.99
"""Of the running threshold of BatchTopK."""
LEARNED = ("encoder", "encoder_bias", "decoder", "decoder_bias")


@dataclass(frozen=True)
class DictionarySettings:
    """How a dictionary is learned; all of it is kept in its info. Raises: CarrierError for the name."""

    name: str
    kind: str = "TopK"
    expansion: int = 4
    """Latents per number of a token."""
    k: int = 32
    steps: int = 1000
    batch: int = 4096
    """Tokens per step."""
    learning_rate: float = 0.0
    """0: 2e-4 / sqrt(latents / 2^14)."""
    seed: int = 0
    reuse: int = 2
    """How often a token is drawn on average before its prompts give way to new ones."""
    dead_after: int = 100
    """Steps after which a latent that never fired counts as dead, and AuxK helps it."""
    precision: str = "fp32"
    """``bf16`` chooses candidates among the latents in bf16; their values stay fp32."""

    def __post_init__(self):
        check_name(self.name, "dictionary")


@dataclass(frozen=True)
class DictionaryLearned:
    """What learning hands back."""

    dictionary: Dictionary
    losses: list[float]
    saved: Path | None
    trouble: str
    """Why it is not on disk; empty when it is."""
    seconds: float
    apart: bool
    """Whether it was measured on prompts that it never learned from."""


class Stream:
    """Batches of token features out of a corpus; each depends on the seed and the step alone."""

    def __init__(self, clip, corpus: Corpus, settings: DictionarySettings, device):
        self.clip, self.corpus, self.settings, self.device = clip, corpus, settings, device
        encoder = spoken_encoder(clip)
        lengths = [len(encoder.ids(text)) for text in corpus.prompts(0, 64)]
        wanted = CHUNK_STEPS * settings.batch / settings.reuse / max(1.0, sum(lengths) / len(lengths))
        self.prompts = max(1, math.ceil(wanted))
        if corpus.distinct:
            self.prompts = min(self.prompts, corpus.distinct)
        self.current, self.rows = -1, None

    def chunk(self, number: int) -> torch.Tensor:
        """All features [tokens, width] of a chunk of prompts. Raises: ValueError when they hold no word."""
        if self.prompts == self.corpus.distinct:
            number = 0  # the whole corpus
        if number != self.current:
            parts, texts = [], self.corpus.prompts(number * self.prompts, self.prompts)
            for start in range(0, len(texts), 256):
                parts += [s.rows.to(self.device) for s in read(self.clip, texts[start : start + 256])]
                comfy.model_management.throw_exception_if_processing_interrupted()
            self.rows, self.current = ordinary(torch.cat(parts)), number
            if len(self.rows) < 2:
                raise ValueError("The corpus holds no words; write a prompt per line, or leave it empty.")
        return self.rows

    def batch(self, step: int) -> torch.Tensor:
        """Features [batch, width] of a step."""
        rows, draw = self.chunk(step // CHUNK_STEPS), generator(self.settings.seed, step, "tokens")
        count = self.settings.batch
        picked = torch.randperm(len(rows), generator=draw)
        if len(rows) < count:
            picked = torch.randint(len(rows), (count,), generator=draw)
        return rows[picked[:count].to(rows.device)]


class DictionarySession:
    """Parameters, the loss of a step, and what has to be remembered between steps."""

    def __init__(self, clip, corpus: Corpus, settings: DictionarySettings, earlier: Dictionary | None, device):
        if settings.kind not in KINDS:
            raise ValueError(f"There is no dictionary of kind {settings.kind!r}; known are {', '.join(KINDS)}.")
        self.settings, self.clip, self.device = settings, clip, device
        self.stream = Stream(clip, corpus, settings, device)
        first = self.stream.chunk(0)
        self.width = first.shape[1]
        self.size = settings.expansion * self.width
        if not 0 < settings.k <= self.size:
            raise ValueError(f"k is {settings.k}, but there are {self.size} latents; set k to at most that.")
        if earlier is None:
            self._start(first)
        else:
            self._continue(earlier)

    def _start(self, first: torch.Tensor) -> None:
        mean = first.mean(0)
        scale = self.width**0.5 / (first - mean).square().sum(1).mean().sqrt().clamp_min(1e-12)
        self.fixed = {"mean": mean, "scale": scale.expand(self.width).clone()}
        draw = generator(self.settings.seed, 0, "dictionary")
        rows = torch.randn(self.size, self.width, generator=draw)
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(self.device)
        zero = partial(torch.zeros, device=self.device)
        values = (rows, zero(self.size), rows.clone(), zero(self.width))
        self.parameters = dict(zip(LEARNED, values, strict=True))
        self.quiet = zero(self.size, dtype=torch.int64)
        self.threshold, self.state, self.past = zero(1) - 1, None, []

    def _continue(self, earlier: Dictionary) -> None:
        own = earlier.info.get("learned", {})
        same = ("kind", "k", "expansion")
        if not earlier.state or any(own.get(k) != getattr(self.settings, k) for k in same):
            have = ", ".join(f"{k} {own[k]}" for k in same if k in own) or "no training state"
            raise CarrierMismatch(
                f"Dictionary {earlier.name} has {have}; this node would learn "
                f"{', '.join(f'{k} {getattr(self.settings, k)}' for k in same)}. Continue with the same settings."
            )
        if earlier.width != self.width:
            raise CarrierMismatch(
                f"Dictionary {earlier.name} is of tokens of {earlier.width} numbers, this text encoder gives "
                f"{self.width}; connect the one it was learned on."
            )
        state = dict(earlier.state)
        self.past = state.pop("losses").tolist()  # fp64, which Apple's GPUs do not hold
        state = {k: v.to(self.device) for k, v in state.items()}
        self.fixed = {k: earlier.tensors[k].to(self.device) for k in ("mean", "scale")}
        self.parameters = {k: earlier.tensors[k].to(self.device, copy=True) for k in LEARNED}
        self.quiet, self.threshold = state.pop("quiet"), state.pop("threshold")
        self.state = state

    def optimiser(self) -> UnitRows:
        rate = self.settings.learning_rate or 2e-4 / (self.size / 2**14) ** 0.5
        return UnitRows(rate, warmup=WARM_UP)

    @property
    def dead(self) -> torch.Tensor:
        """Latents [m] that have not fired for a long while."""
        return self.quiet >= self.settings.dead_after

    def loss(self, parameters: Mapping[str, torch.Tensor], step: int, micro: int) -> torch.Tensor:
        """Unexplained variance of a batch, plus AuxK's, times the width: as large as the square error of a token.

        Clipping at a norm of 1 then acts in every step, which learns better (bench/dictionary.py). What the step
        has seen is remembered by ``finished``.
        """
        s, coder = self.settings, Coder(self.fixed, self.settings.k)
        with torch.no_grad():
            x = coder.prepared(self.stream.batch(step))[0]
        enc, enc_bias, dec, dec_bias = (parameters[k] for k in LEARNED)
        rough = enc.detach().bfloat16() if s.precision == "bf16" else None
        batched = s.kind in ("BatchTopK", "Matryoshka by prefix")
        values, indices = encode(x, enc, enc_bias, dec_bias, partial(batch_top if batched else top, k=s.k, rough=rough))
        if s.kind.startswith("Matryoshka"):
            by = s.kind.split()[-1]
            parts = nested(values, indices, dec, dec_bias, *self.levels("rank" if by == "k" else by))
            total = torch.stack([fvu(x, part) for part in parts]).mean()
        else:
            parts = [decode(values, indices, dec, dec_bias)]
            total = fvu(x, parts[-1])
        dead = self.dead
        if bool(dead.any()):
            k = min(max(1, self.width // 2), int(dead.sum()))
            total = total + AUX_WEIGHT * auxiliary(x, parts[-1], enc, enc_bias, dec, dec_bias, dead, k)
        with torch.no_grad():
            fired = torch.zeros(self.size, dtype=torch.bool, device=self.device)
            fired[indices[values > 0]] = True
            self.seen = fired, values[values > 0].min() if batched and bool((values > 0).any()) else None
        return total * self.width

    def levels(self, by: str) -> tuple[list[int], str]:
        """Ends of the nested parts, which count alike: halvings of k, or of the dictionary.

        MSAE's own levels of k double from 64 up to all latents.
        """
        whole = self.settings.k if by == "rank" else self.size
        return sorted({max(1, whole >> n) for n in range(4 if by == "rank" else 5)}), by

    def finished(self) -> None:
        """After the optimiser's step, so that an interrupt inside a step leaves nothing half done."""
        fired, smallest = self.seen
        self.quiet = torch.where(fired, 0, self.quiet + 1)
        if smallest is not None:
            known = bool(self.threshold >= 0)
            self.threshold = SMOOTH * self.threshold + (1 - SMOOTH) * smallest if known else smallest.view(1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a dictionary holds."""
        found = {**self.parameters, **self.fixed}
        if self.settings.kind in ("BatchTopK", "Matryoshka by prefix"):
            found["threshold"] = self.threshold.clamp_min(0).expand(self.size)
        return found

    def dictionary(self, state: Mapping[str, torch.Tensor], losses: list[float]) -> Dictionary:
        """The dictionary as it stands."""
        info = {
            "source": "this pack",
            "encoder": spoken_encoder(self.clip).key,
            "learned": {**asdict(self.settings), "steps": len(losses)},
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "dead": float(self.dead.float().mean()),
        }
        kept = {"losses": torch.tensor(losses, dtype=torch.float64), "quiet": self.quiet, "threshold": self.threshold}
        tensors = self.tensors()
        k = 0 if "threshold" in tensors else self.settings.k
        return Dictionary(self.settings.name, tensors, k, info, {**state, **kept})


def learn_dictionary(
    clip, text: str, settings: DictionarySettings, earlier: Dictionary | None = None, *, save_every: int = 200
) -> DictionaryLearned:
    """Learns a dictionary of this CLIP's words and names its latents.

    ``text``: the corpus (corpus.py). The state is on disk every ``save_every`` steps and after an interrupt or an
    error, in output/dictionaries; ``earlier`` continues from there, bit for bit on a CPU. The CLIP does not change.
    Raises: CarrierMismatch, ValueError, Diverged, the host's OOM with advice, the host's interrupt.
    """
    began, corpus = time.monotonic(), Corpus(text, settings.seed)
    kept = Kept(folders.dictionaries(), settings.name, write_dictionary)
    advice = (
        f"Out of memory while learning dictionary {settings.name} with batch {settings.batch} and expansion "
        f"{settings.expansion}: lower the batch or the expansion."
    )
    with advised(advice), torch.inference_mode(False), torch.enable_grad():
        session = DictionarySession(clip, corpus, settings, earlier, clip.patcher.load_device)
        losses, last = list(session.past), None
        progress, saved, good = Progress(settings.steps), None, None
        try:
            for step in fit(session.parameters, session.loss, session.optimiser(), settings.steps, state=session.state):
                good = saved
                session.finished()
                losses.append(step.loss / session.width)
                last, done = step.state, step.number - len(session.past)
                if save_every and done % save_every == 0:
                    saved = session.dictionary(last, losses)
                    kept.put(saved)
                if done % 10 == 0:
                    say(f"{done} of {settings.steps} steps, loss {losses[-1]:.4f}")
                progress.show(done)
            for parameter in session.parameters.values():
                parameter.requires_grad_(False)
            dictionary = named(clip, session.dictionary(last, losses), corpus)
        except Diverged as error:
            if last is None:
                advice = (
                    f"{f'Dictionary {earlier.name}' if earlier else 'The text encoder'} gives that as it is: start anew"
                )
            elif good is None:
                kept.drop()
                again = f"Continue from {earlier.name} again" if earlier else "Start again"
                advice = f"No autosave of this run is known to be good. {again}"
            else:
                where = kept.put(good) or f"It is in {kept.file.name} (output/dictionaries)."
                steps = good.info["learned"]["steps"]
                advice = f"Step {steps} is the last autosave known to be good. {where} Continue from it"
            before = f" (loss before {losses[-1]:.4f})" if losses else ""
            raise Diverged(
                f"The loss or its gradient is not finite at step {len(losses) + 1}{before}. {advice} with a lower "
                "learning rate."
            ) from error
        except BaseException:  # newer hosts raise interrupts outside Exception
            if last is not None:
                kept.put(session.dictionary(last, losses))
            raise
    trouble = kept.put(dictionary)
    return DictionaryLearned(dictionary, losses, kept.file, trouble, time.monotonic() - began, corpus.apart)


def learned_text(done: DictionaryLearned) -> str:
    """Summary of a learning run."""
    info, own = done.dictionary.info, done.dictionary
    lines = [
        f"{own.name}: {info['learned']['steps']} steps in {done.seconds:.1f} s, {own.size} latents for {own.width} "
        "numbers",
        f"loss: {info['loss_first']:.4f} first, {info['loss_last']:.4f} last",
        f"on {info['measured_tokens']} tokens of {'other' if done.apart else 'the same'} prompts: unexplained variance "
        f"(FVU) {info['fvu']:.4f}, active latents (L0) {info['l0']:.1f}",
        f"dead latents: {100 * info['dead']:.1f}%; silent in {info['silent_tokens']} measured tokens: "
        f"{100 * info['silent']:.1f}%",
        f"NOT SAVED: {done.trouble}" if done.trouble else f"saved: output/dictionaries/{done.saved.name}",
    ]
    if info["dead"] > 0.5:
        lines.append("Most latents are dead: lower expansion, raise the steps, or give a richer corpus.")
    return "\n".join(lines)
