"""Text encoders of a connected CLIP: their vocabularies, and learned rows that take the place of words
(comfy/sd1_clip.py)."""

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from comfy.sd1_clip import SDTokenizer

from ..carriers.concept import Concept
from ..carriers.delta import bundled
from ..carriers.errors import CarrierMismatch
from .edits import read_edit
from .neti import read

NAMED = re.compile(r"<([A-Za-z0-9_-]{1,64})>")
"""A concept in a text."""
TOKENS = "concept_tokens"
"""Key in an entry: what ``clip.tokenize`` gave for its prompt, where its rows are no longer what the encoder says of
that alone."""
INNER = "concept-carriers-"
"""What names of rows begin with inside prompts; no file of the user's should be called so."""
PAIR = ("l", "g")
"""Slots of SDXL and SD3 whose rows lie beside each other."""
BEGINNINGS = "\u2581\u0120"
"""What names of tokens begin with where a word does, but for CLIP's."""
MARKS = 1e6
"""What rows that mark a place hold, plus their number: no row of words does, and fp32 still counts there."""


class Encoder(NamedTuple):
    """One text encoder inside a CLIP."""

    key: str
    """The host's ``embedding_key``: clip_l, clip_g, clip_h, t5xxl, ..."""
    slot: str
    """Its key in the host's token dict: l, g, t5xxl, ..."""
    tokenizer: SDTokenizer
    model: torch.nn.Module
    beside: tuple[str, ...] = ()
    """Slots of the encoders whose rows lie beside its own, to be cut to the shortest."""

    @property
    def vocabulary(self) -> torch.Tensor:
        """Token embedding [words, width], in the host's dtype; not a copy."""
        return self.model.transformer.get_input_embeddings().weight

    @property
    def width(self) -> int:
        """Length of an input row."""
        return self.vocabulary.shape[1]

    def ids(self, text: str) -> list[int]:
        """Token ids of plain text without start and end."""
        end = -1 if self.tokenizer.tokenizer_adds_end_token else None
        return list(self.tokenizer.tokenizer(text)["input_ids"][self.tokenizer.tokens_start : end])

    def spelt(self, ids: Sequence[int]) -> str:
        """What tokens of one word spell; CLIP has its letters in bytes, each under a name of its own."""
        names = self.tokenizer.inv_vocab
        word = "".join(str(names.get(n, n)).removesuffix("</w>").lstrip(BEGINNINGS) for n in ids)
        return word if word.isascii() else self.tokenizer.tokenizer.decode(list(ids)).strip()

    def rows(self, text: str) -> torch.Tensor:
        """Input rows [tokens, width] of plain text, fp32."""
        return self.vocabulary[self.ids(text)].detach().float().clone()


def encoders(clip) -> list[Encoder]:
    """Every encoder of a CLIP that takes token embeddings, known family or not.

    Raises: CarrierMismatch when none is found.
    """
    own = {name: t for name, t in vars(clip.tokenizer).items() if isinstance(t, SDTokenizer)}
    found = []
    for slot in clip.tokenize(""):
        name = next((n for n in (slot, f"clip_{slot}") if n in own), next(iter(own)) if len(own) == 1 else None)
        model = getattr(clip.cond_stage_model, name or "", None)
        if model is not None and hasattr(model, "transformer"):
            found.append(Encoder(own[name].embedding_key, slot, own[name], model))
    if not found:
        raise CarrierMismatch(
            f"The connected CLIP ({type(clip.tokenizer).__name__}) has no text encoder that takes "
            "token embeddings; connect another text encoder."
        )
    pair = [e.slot for e in found if e.slot in PAIR]
    return [e._replace(beside=tuple(pair)) if e.slot in pair else e for e in found]


def unhooked(hooks: list) -> None:
    """Raises: CarrierMismatch naming the hooks of a CLIP or CONDITIONING; they work in the host's sampling alone."""
    names = ", ".join(sorted({type(hook).__name__ for hook in hooks}))
    if names:
        raise CarrierMismatch(
            f"The CLIP brings hooks that change the model in sampling ({names}, from Set CLIP Hooks), which are not "
            "seen here; connect the CLIP from before that node, or turn its apply_to_conds off."
        )


def constant(clip) -> None:
    """Raises: CarrierMismatch for a CLIP that brings hooks for the model, or whose own change along the sampling."""
    unhooked(getattr(clip.apply_hooks_to_conds, "hooks", []))
    if clip.use_clip_schedule:
        raise CarrierMismatch(
            "The CLIP is another at each stage of sampling (Set CLIP Hooks), and one is learned with; connect the CLIP "
            "from before that node, or turn its schedule_clip off."
        )


def ready(clip) -> None:
    """Sets a loaded encoder up as the host does before encoding (sd.py encode_from_tokens)."""
    model = clip.cond_stage_model
    model.reset_clip_options()
    if clip.layer_idx is not None:
        model.set_clip_options({"layer": clip.layer_idx})
    model.set_clip_options({"execution_device": clip.patcher.load_device})


def start_rows(encoder: Encoder, init: str, text: str, count: int, draw: torch.Generator) -> torch.Tensor:
    """First value [count, width] of learned rows, fp32.

    ``init``: ``word`` repeats the mean row of ``text``; ``text`` spreads its token rows over the vectors; ``random``
    draws with the vocabulary's mean and deviation. Repeated rows differ by 1% of their norm so that they can part.
    Raises: ValueError when a text is needed and this encoder finds no token in it.
    """
    if init == "random":
        table = encoder.vocabulary.detach().float()
        return table.mean(0) + table.std(0) * torch.randn(count, table.shape[1], generator=draw).to(table.device)
    words = encoder.rows(text)
    if not len(words):
        raise ValueError(
            f"There is no word to start from in {text!r}; write a class word such as 'mug'. Learn Concept Tokens can "
            "also start at random."
        )
    if init == "word" or len(words) == 1:
        rows = words.mean(0, keepdim=True).expand(count, -1)
    elif len(words) >= count:
        rows = torch.stack([part.mean(0) for part in words.tensor_split(count)])
    else:
        rows = words.repeat(-(-count // len(words)), 1)[:count]
    noise = torch.randn(rows.shape, generator=draw).to(rows.device)
    return rows + (0.01 * rows.norm(dim=-1, keepdim=True) / rows.shape[1] ** 0.5 * noise if count > 1 else 0)


def with_rows(clip, table: Mapping[str, Mapping[str, torch.Tensor]]):
    """A CLIP whose tokenizers resolve ``embedding:<name>`` from ``table`` (name -> encoder key -> [n, width]) first.

    The model is shared, the input CLIP stays as it is; gradients flow into the rows.
    """
    clone = clip.clone()
    clone.tokenizer = copy.copy(clip.tokenizer)
    for name, tokenizer in list(vars(clip.tokenizer).items()):
        if isinstance(tokenizer, SDTokenizer):
            setattr(clone.tokenizer, name, _resolving(tokenizer, table))
    return clone


def _resolving(tokenizer: SDTokenizer, table) -> SDTokenizer:
    own = copy.copy(tokenizer)
    own.embedding_directory = tokenizer.embedding_directory if tokenizer.embedding_directory is not None else []
    stock = type(tokenizer)._try_get_embedding
    named = len(stock(own, "-")) == 3  # newer hosts return (embedding, name, leftover)

    def resolve(text):
        name, _, rest = text.partition(" ")
        if name not in table:
            return stock(own, text)
        # SD3 has tokenizers of encoders that are not there
        rows = table[name].get(own.embedding_key, torch.zeros(0, own.embedding_size))
        return (rows, name, rest.strip()) if named else (rows, rest.strip())

    own._try_get_embedding = resolve
    return own


def mark_rows(numbers: torch.Tensor, width: int) -> torch.Tensor:
    """Rows [n, width] for ``with_rows`` that only mark a place, by ``numbers`` [n] from 0 on."""
    return (MARKS + numbers.float())[:, None].repeat(1, width)


def mark_of(token) -> int | None:
    """The number of a token that marks a place; None for words, and for rows of embedding files."""
    return int(token[0]) - int(MARKS) if torch.is_tensor(token) and float(token[0]) >= MARKS else None


def shown_marks(tokens: Mapping) -> set[int]:
    """Numbers of all marks in a token dict."""
    return {mark_of(token) for chunks in tokens.values() for chunk in chunks for token, *_ in chunk} - {None}


def not_read(clip, what: str) -> CarrierMismatch:
    """The error for learned rows that no tokenizer of the CLIP puts into its tokens."""
    return CarrierMismatch(
        f"The tokenizers of this CLIP ({type(clip.tokenizer).__name__}) put no learned rows in the place of {what}, so "
        "they would do nothing; connect another text encoder."
    )


def fill(text: str, names: Mapping[str, str]) -> str:
    """Replaces ``<name>`` by the host's ``embedding:`` syntax under an internal name, or by a plain word.

    The first between blanks, as the host knows it wherever it stands; a bracket may be one of the text, which begins no
    segment, and some tokenizers put a template around the text, whose words are no part of the name. A word only apart
    from other words.
    """

    def swap(match):
        before, after, name = text[: match.start()][-1:], text[match.end() :][:1], names[match[1]]
        if not name.startswith("embedding:"):
            return " " * before.isalnum() + name + " " * after.isalnum()
        return ("" if before in ("", " ", "\n") else " ") + name + ("" if after == " " else " ")

    return NAMED.sub(lambda m: swap(m) if m[1] in names else m[0], text)


def words_of(token_text: str, rows: bool) -> str:
    """What stands for a LoRA's concept in prompts, ``{}`` for its ``rows``; empty when nothing does."""
    return NAMED.sub("{}", token_text.strip()) or ("{}" if rows else "")


def plain_rows(concept: Concept, encoder: Encoder, count: int) -> torch.Tensor:
    """What strength 0 stands for: the rows of the word the concept started from, else the vocabulary's mean."""
    text = concept.info.get("init_text") or ""
    words = encoder.rows(text) if text else encoder.vocabulary.detach().float().mean(0, keepdim=True)
    return words.mean(0, keepdim=True).expand(count, -1)


def as_tokens(concept: Concept) -> Concept | None:
    """The rows that a prompt can name: the concept itself, or what a delta bundles; None when it bundles nothing."""
    if concept.kind == "tokens":
        return concept
    rows = bundled(concept.tensors, concept.name)
    return Concept(concept.name, "tokens", rows, concept.info) if rows else None


def named_rows(concept: Concept) -> Concept | None:
    """As ``as_tokens``, also for a mapper: its reading at every part of the noise schedule; and for an edit."""
    if concept.kind == "edit":
        return read_edit(concept)
    return as_tokens(read(concept)[0] if concept.kind == "mapper" else concept)


def concept_rows(clip, concept: Concept, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """Rows [stages, layers, roles, n, width] per encoder key for one concept in this CLIP, fp32.

    Encoders that did not learn get its plain word, [1, 1, 1, n, width]; nothing for a residual.
    Raises: CarrierMismatch naming both sides when a width differs, no encoder fits, or one was not there in learning.
    """
    here = encoders(clip)
    fits = {e.key for e in here} & set(concept.tensors)
    if not fits:
        raise CarrierMismatch(
            f"Concept <{concept.name}> holds {_sizes(concept)}, this CLIP has "
            f"{widths(here)}; learn it again with this model, or connect the model it was learned on."
        )
    there, rows = concept.info.get("clip"), {}
    lost = [e.key for e in here if e.key not in concept.tensors and e.key not in (there or ())]
    if lost and there:
        raise CarrierMismatch(
            f"Concept <{concept.name}> was learned with {', '.join(there)}, and {', '.join(lost)} of this CLIP would "
            "read a plain word in its place. Learn it again with this model, or connect the model it was learned on."
        )
    if lost:
        logging.warning(
            "concept-carriers: <%s> holds nothing for %s, which reads its plain word", concept.name, ", ".join(lost)
        )
    for encoder in here:
        if encoder.key not in concept.tensors:
            text = "" if "residual_of" in concept.info else concept.info.get("init_text") or "thing"
            rows[encoder.key] = encoder.rows(text)[None, None, None]
            continue
        learned = concept.tensors[encoder.key]
        if learned.shape[-1] != encoder.width:
            raise CarrierMismatch(
                f"Concept <{concept.name}> holds {_sizes(concept)}, but {encoder.key} of this CLIP expects "
                f"rows of {encoder.width}; learn it again with this model."
            )
        own = learned.to(encoder.vocabulary.device, copy=True)
        if strength != 1.0:
            base = plain_rows(concept, encoder, learned.shape[-2])
            own = base + strength * (own - base)
        rows[encoder.key] = own
    return rows


def _sizes(concept: Concept) -> str:
    return ", ".join(f"{k} {' x '.join(map(str, v.shape))}" for k, v in concept.tensors.items())


def widths(found: list[Encoder]) -> str:
    return ", ".join(f"{e.key} ({e.width})" for e in found)


class _Asked(Exception):
    """What an encoder would be given."""


@contextlib.contextmanager
def _encoding(found: list[Encoder], as_instead: Callable):
    """Puts ``as_instead(encoder)`` in the place of what runs each encoder (comfy/sd1_clip.py ``encode``)."""
    for encoder in found:
        encoder.model.encode = as_instead(encoder)
    try:
        yield
    finally:
        for encoder in found:
            del encoder.model.encode


def encode_many(clip, many: list[dict]) -> list[list]:
    """Host conditionings [cond, extras] of token dicts, differentiably, each as the host's own route makes it.

    Encoders run once for all of those whose chunks are of one length.
    """
    model, found = clip.cond_stage_model, encoders(clip)

    def asked(encoder: Encoder, tokens: dict) -> list:
        """The chunks that the encoder would run on, with what the host adds."""
        try:
            encoder.model.encode_token_weights(tokens[encoder.slot])
        except _Asked as given:
            return given.args[0]
        return []

    def ask(_):
        def refuse(chunks):
            raise _Asked(chunks)

        return refuse

    answers = {}
    if len(many) > 1:
        with _encoding(found, ask):
            chunks = {e.slot: [asked(e, tokens) for tokens in many] for e in found}
        for e in found:
            if all(chunks[e.slot]) and len({len(chunk) for own in chunks[e.slot] for chunk in own}) == 1:
                whole = e.model.encode([chunk for own in chunks[e.slot] for chunk in own])
                answers[e.slot] = iter(_shared(whole, [len(own) for own in chunks[e.slot]]))
    entries = []
    with _encoding([e for e in found if e.slot in answers], lambda e: lambda _: next(answers[e.slot])):
        for tokens in many:
            cond, pooled, *extra = model.encode_token_weights(tokens)
            entries.append([cond, {"pooled_output": pooled, **(extra[0] if extra else {})}])
    return entries


def _shared(whole: tuple, counts: list[int]) -> list[tuple]:
    """What an encoder gave for all chunks together, as it would have given it for each of ``counts`` in turn."""
    out, pooled, *extra = whole
    parts = [out.split(counts), [None] * len(counts) if pooled is None else pooled.split(counts)]
    if extra:
        split = {k: v.split(counts) if torch.is_tensor(v) else [v] * len(counts) for k, v in extra[0].items()}
        parts.append([{k: v[n] for k, v in split.items()} for n in range(len(counts))])
    # weights of words are written into the rows, and what was split must not be written to
    return [(one.clone(), *rest) for one, *rest in zip(*parts, strict=True)]


def end_to_end(many: list[dict]) -> dict:
    """The chunks of several token dicts as those of one."""
    return {slot: [chunk for tokens in many for chunk in tokens[slot]] for slot in many[0]}


def even(tokens: dict) -> bool:
    """Whether all encoders have equally many chunks; the host cuts what they give to the shortest."""
    return len({len(chunks) for chunks in tokens.values()}) == 1


def variant(rows: torch.Tensor, cell: tuple[int, int, int]) -> torch.Tensor:
    """Rows [n, width] of one (stage, layer, role); an axis of length one serves them all."""
    stage, layer, role = (min(i, size - 1) for i, size in zip(cell, rows.shape, strict=False))
    return rows[stage, layer, role]
