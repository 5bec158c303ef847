"""What a caption says about a picture, and where in a text encoder it lies."""

import torch

from .concept_set import OBJECT, STYLE, ConceptSet
from .text import Encoder


def description(data: ConceptSet, picture: int, word: str) -> str:
    """The user's caption of a picture with ``word`` in the concept's place.

    Raises: ValueError when there are only template sentences, which describe nothing.
    """
    found = data.captions[picture]
    if found in (OBJECT, STYLE):
        raise ValueError(
            "Residuals start from a caption of each picture, and there are only template sentences. Describe the "
            "pictures in Make Concept Set (8 to 32 words: subject, background, composition, lighting, style), or set "
            "residual_init to random."
        )
    return " ".join(found[0].replace("{}", word).split())


def caption_mean(encoder: Encoder, text: str) -> torch.Tensor:
    """Mean [width], fp32, of the last hidden states over the tokens of ``text`` without start, end and padding.

    Of SD2's encoder what the model conditions on: it is the last state in diffusers' files, which end there.
    Raises: ValueError when there is no token, or the states do not have the width of the encoder's input.
    """
    chunks = encoder.tokenizer.tokenize_with_weights(text, return_word_ids=True)
    own = torch.tensor([[bool(word) for *_, word in chunk] for chunk in chunks])
    if not own.any():
        raise ValueError(f"The caption {text!r} has no words; describe each picture, or set residual_init to random.")
    model = encoder.model
    kept, model.layer = model.layer, model.layer if encoder.key == "clip_h" else "last"
    try:
        with torch.no_grad():
            states = torch.cat([model([[token for token, *_ in chunk]])[0] for chunk in chunks]).float()
    finally:
        model.layer = kept
    if states.shape[-1] != encoder.width:
        raise ValueError(
            f"{encoder.key} gives states of width {states.shape[-1]} and takes rows of {encoder.width}, so residuals "
            "cannot start from captions; set residual_init to random."
        )
    return states[own.to(states.device)].mean(0)
