"""A sparse autoencoder over the token features of a text encoder: what a word is made of, in memory and in its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..kernels.sae import Coder
from .concept import check_name
from .errors import CarrierError, CarrierFileError
from .files import OWN, STATE, VERSION, digest, replace_file, verify
from .modulation import NORMS

LARGEST = 1 << 35
"""Bytes of a dictionary's file, optimiser state included."""
PARTS = {"encoder": "md", "encoder_bias": "m", "decoder": "md", "decoder_bias": "d", "mean": "d", "scale": "d"}
OPTIONAL = {"threshold": "m", "usage": "m"}
MEASURED = ("fvu", "l0", "measured_tokens", "silent", "silent_tokens")
"""Facts that hold for one k alone."""


@dataclass(frozen=True)
class Dictionary:
    """An encoder and a decoder with m latents over tokens of width d.

    Tensors are copied to the CPU as ordinary (never inference-mode) tensors.
    Raises: CarrierError when a part is missing or of another shape than the others imply, or holds no finite numbers.
    """

    name: str
    """Letters, digits, - and _."""
    tensors: Mapping[str, torch.Tensor]
    """encoder, decoder [m, d]; encoder_bias [m]; decoder_bias, mean, scale [d]; fp32. Tokens enter as
    (x - mean) scale. ``threshold`` [m], where a latent is active above it; ``usage`` [m], its mean over a corpus."""
    k: int
    """Active latents per token; 0 where ``threshold`` decides."""
    info: Mapping[str, Any] = field(default_factory=dict)
    """JSON facts: source, settings, FVU. ``norm``: one of NORMS, what is done to each token first. ``encoder``: the
    text encoder's key. ``words``: per latent the corpus words that fire it most, as [word, activation]. ``dead``: share
    of latents that counted as dead when learning ended; ``silent``: of those that no one of ``silent_tokens`` fires."""
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Optimiser state for continuing; may be empty."""

    def __post_init__(self):
        check_name(self.name, "dictionary")
        try:
            info = json.loads(json.dumps(dict(self.info), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise CarrierError(f"The facts about dictionary {self.name} cannot be written as JSON: {error}.") from error
        with torch.inference_mode(False):
            tensors = {k: v.detach().to("cpu", torch.float32, copy=True).contiguous() for k, v in self.tensors.items()}
            state = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in self.state.items()}
        self._check(tensors, info)
        for name, value in (("tensors", tensors), ("info", info), ("state", state)):
            object.__setattr__(self, name, value)

    def _check(self, tensors: Mapping[str, torch.Tensor], info: Mapping[str, Any]) -> None:
        missing, more = PARTS.keys() - tensors.keys(), tensors.keys() - PARTS.keys() - OPTIONAL.keys()
        if missing or more or tensors["encoder"].dim() != 2 or not tensors["encoder"].numel():
            raise CarrierError(
                f"Dictionary {self.name} is not whole: it lacks {', '.join(sorted(missing)) or 'nothing'} and holds "
                f"{', '.join(sorted(map(str, tensors))[:12])}; load or train it again."
            )
        sizes = dict(zip("md", tensors["encoder"].shape, strict=True))
        for key, axes in {**PARTS, **{k: v for k, v in OPTIONAL.items() if k in tensors}}.items():
            if tuple(tensors[key].shape) != tuple(sizes[a] for a in axes):
                raise CarrierError(
                    f"Dictionary {self.name}: {key} has shape {tuple(tensors[key].shape)}, which does not go with an "
                    f"encoder of {sizes['m']} latents for {sizes['d']} numbers; load or train it again."
                )
            if not bool(torch.isfinite(tensors[key]).all()):
                raise CarrierError(
                    f"Dictionary {self.name}: {key} holds numbers that are not finite; train it again with a lower "
                    "learning rate."
                )
        if bool((tensors["scale"] == 0).any()):
            raise CarrierError(f"Dictionary {self.name}: scale holds a zero, which cannot be undone; train it again.")
        if not _labels(info.get("words") or []):
            raise CarrierError(
                f"Dictionary {self.name}: words has to be one list per latent, of pairs of a word and its activation; "
                "load or train it again."
            )
        if info.get("norm", "none") not in NORMS:
            raise CarrierError(
                f"Dictionary {self.name} prepares tokens by {str(info['norm'])[:40]!r}, which this version does not "
                f"know ({', '.join(NORMS)}); update the pack."
            )
        if not isinstance(self.k, int) or not ("threshold" in tensors or self.k > 0):
            raise CarrierError(
                f"Dictionary {self.name} does not say how many of its {sizes['m']} latents are active (k is "
                f"{self.k}); give k when loading it."
            )
        if "threshold" not in tensors and self.k > sizes["m"]:
            raise CarrierError(
                f"Dictionary {self.name}: k is {self.k}, but there are {sizes['m']} latents; set k to at most "
                f"{sizes['m']}, or 0 for what the file says."
            )

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self.tensors["encoder"].shape[1]

    @property
    def size(self) -> int:
        """Latents."""
        return self.tensors["encoder"].shape[0]

    def coder(self, device="cpu") -> Coder:
        """It at work on ``device``."""
        parts = {k: v.to(device) for k, v in self.tensors.items() if k != "usage"}
        return Coder(parts, self.k, self.info.get("norm", "none"))

    def label(self, latent: int, count: int = 3) -> str:
        """The corpus words that fire a latent most; empty when none are known."""
        words = self.info.get("words") or []
        return ", ".join(word for word, _ in words[latent][:count]) if latent < len(words) else ""

    def summary(self) -> str:
        """What it is and where it is from, in a few lines."""
        active = "the latents above a threshold" if "threshold" in self.tensors else f"{self.k} latents"
        lines = [f"{self.name}: {self.size} latents for tokens of {self.width} numbers, {active} per token"]
        lines += [f"{key}: {value}" for key, value in sorted(self.info.items()) if key != "words"]
        named = sum(bool(words) for words in self.info.get("words") or [])
        lines.append(f"latents with corpus words: {named}")
        return "\n".join(lines)


def _labels(words: Any) -> bool:
    """Whether they are what ``info["words"]`` has to be."""
    return isinstance(words, list) and all(
        isinstance(one, list) and all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in one)
        for one in words
    )


def write_dictionary(dictionary: Dictionary, path: Path) -> None:
    """Writes ``path`` whole or not at all. Raises: CarrierFileError when the disk refuses, naming the file."""
    tensors = {**dictionary.tensors, **{STATE + k: v for k, v in dictionary.state.items()}}
    metadata = {
        OWN + "format": VERSION,
        OWN + "kind": "dictionary",
        OWN + "name": dictionary.name,
        OWN + "k": str(dictionary.k),
        OWN + "info": json.dumps(dictionary.info, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "sparse-autoencoder",
        "modelspec.implementation": "concept-carriers",
        "modelspec.title": dictionary.name,
    }
    metadata[OWN + "digest"] = digest(tensors, metadata)
    replace_file(Path(path), save(tensors, metadata))


def own_dictionary(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> Dictionary:
    """The dictionary in a parsed file of this pack. Raises: CarrierFileError for a damaged, newer or other file."""
    verify(tensors, metadata, path)
    if metadata.get(OWN + "kind") != "dictionary":
        raise CarrierFileError(f"{path} holds a concept, not a dictionary; load it with Load Concept.")
    try:
        return Dictionary(
            metadata[OWN + "name"],
            {k: v for k, v in tensors.items() if not k.startswith(STATE)},
            int(metadata[OWN + "k"]),
            json.loads(metadata[OWN + "info"]),
            {k.removeprefix(STATE): v for k, v in tensors.items() if k.startswith(STATE)},
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CarrierFileError(f"{path} is not a whole dictionary: {error}") from error
