"""Concepts on disk: one safetensors file, written atomically, checked completely when read.

Plain tokens lie under the encoder's key as [vectors, width], so the file is also a stock ``embedding:name`` file
(comfy/sd1_clip.py load_embed); deltas lie under their own names, so the file is also a stock LoRA. Everything else is
under ``concepts.``, what no other program knows under its kind, ``concepts.mapper.`` and the like; metadata carries a
SHA-256 over all of it.
"""

import contextlib
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save

from .concept import Concept
from .delta import BUNDLE
from .errors import CarrierFileError

VERSION = "1"
LARGEST = 1 << 33
"""Bytes that are read into memory."""
LONGEST_HEADER = 16 << 20
OWN = "concepts."
TOKENS, STATE = OWN + "tokens.", OWN + "state."
OURS = ("mapper", "modulation", "edit")
"""Kinds whose tensors no other program could read."""
SPECS = {
    "tokens": "textual-inversion",
    "delta": "lora",
    "mapper": "neti",
    "modulation": "tokenverse",
    "edit": "perfusion",
}
"""Names of the kinds in https://github.com/Stability-AI/ModelSpec."""
LONGEST = 100
"""Bytes of a file's name without its ending; disks take 255, Windows 260 with all folders."""
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def write_concept(concept: Concept, path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Writes ``path`` whole or not at all; an older file there stays until the new one is complete.

    ``notes``: extra metadata, such as prompt and workflow as JSON.
    Raises: CarrierFileError when the disk refuses, naming the file, and for more than could be read again.
    """
    tensors = dict(_placed(k, v, concept.kind) for k, v in concept.tensors.items())
    tensors |= {STATE + k: v for k, v in concept.state.items()}
    tensors = {k: v.contiguous() for k, v in tensors.items()}
    if (size := sum(v.nbytes for v in tensors.values())) > LARGEST:
        raise CarrierFileError(
            f"{path} would have {size} bytes, more than this pack reads ({LARGEST}); save it without training_state, "
            "or learn with a lower rank."
        )
    metadata = {
        **(notes or {}),
        OWN + "format": VERSION,
        OWN + "kind": concept.kind,
        OWN + "name": concept.name,
        OWN + "info": json.dumps(concept.info, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{concept.info.get('architecture', 'unknown')}/{SPECS[concept.kind]}",
        "modelspec.implementation": "concept-carriers",
        "modelspec.title": concept.name,
        "modelspec.trigger_phrase": f"<{concept.name}>",
    }
    metadata[OWN + "digest"] = digest(tensors, metadata)
    replace_file(Path(path), save(tensors, metadata))


def _placed(key: str, value: torch.Tensor, kind: str) -> tuple[str, torch.Tensor]:
    """Name and form in the file: token rows have five axes, nothing else has."""
    if kind in OURS:
        return f"{OWN}{kind}.{key}", value
    if value.dim() != 5:
        return key, value
    return (key, value[0, 0, 0]) if value.shape[:3] == (1, 1, 1) else (TOKENS + key, value)


def _taken(key: str, value: torch.Tensor, kind: str) -> tuple[str, torch.Tensor]:
    """What ``_placed`` was given."""
    if kind in OURS:
        return key.removeprefix(f"{OWN}{kind}."), value
    plain = not key.startswith(TOKENS) and (kind == "tokens" or key.startswith(BUNDLE))
    return key.removeprefix(TOKENS), value[None, None, None] if plain else value


def digest(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, types, shapes and numbers of tensors and over metadata but for the digest itself."""
    total = hashlib.sha256(
        json.dumps({k: v for k, v in metadata.items() if k != OWN + "digest"}, sort_keys=True).encode()
    )
    for key, value in sorted(tensors.items()):
        total.update(f"\0{key}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        total.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return total.hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Puts ``data`` at ``path``, whole or not at all. Raises: CarrierFileError when the disk refuses."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(part, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        old = ""
        with contextlib.suppress(OSError):
            old = " The older file there is unharmed." if path.stat().st_size else ""
        raise CarrierFileError(
            f"{path} could not be written ({error.strerror or error}); free some space or choose another "
            f"folder, then save again.{old}"
        ) from error
    if os.name != "nt":  # the new name itself must survive a power cut, where the folder can be told so
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def discard(path: Path) -> None:
    """Removes a file, if the disk lets us."""
    with contextlib.suppress(OSError):
        path.unlink()


def claim(folder: Path, name: str, taken: Callable[[Path], bool] | None = None) -> Path:
    """An empty file under a name that none has yet: ``name``, or ``name_2``, ``name_3``, ...

    ``taken``: whether a path may not be used though no file is there. Anything but letters of any script, digits,
    blank, dot, - and _ becomes _. Raises: CarrierFileError when the disk refuses.
    """
    stem = re.sub(r"[^\w .-]", "_", unicodedata.normalize("NFC", name.removesuffix(".safetensors"))).strip(" .")
    stem = stem.encode()[:LONGEST].decode(errors="ignore").strip(" .")
    stem = f"_{stem}" if not stem or RESERVED.fullmatch(stem) else stem
    number, path = 1, Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        while True:
            path = Path(folder) / f"{stem}{f'_{number}' if number > 1 else ''}.safetensors"
            number += 1
            if taken and taken(path):
                continue
            with contextlib.suppress(FileExistsError):
                path.open("xb").close()  # taken for us, also against a second process
                return path
    except (OSError, UnicodeError) as error:  # a disk may take ASCII alone
        why = getattr(error, "strerror", None) or error
        raise CarrierFileError(f"{path} could not be written ({why}); choose another folder or name.") from error


def write_new(
    concept: Concept,
    folder: Path,
    name: str,
    notes: Mapping[str, str] | None = None,
    taken: Callable[[Path], bool] | None = None,
) -> Path:
    """Writes to ``folder`` under a name no file has yet, as ``claim`` finds it; raises as ``write_concept`` does."""
    path = claim(folder, name, taken)
    try:
        write_concept(concept, path, notes)
    except BaseException:
        discard(path)
        raise
    return path


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """A whole file. Raises: CarrierFileError when it is missing, unreadable or far too large."""
    try:
        size = Path(path).stat().st_size
        if size > largest:
            raise CarrierFileError(f"{path} is {size} bytes large, which nothing of this pack is. Choose another file.")
        return Path(path).read_bytes()
    except OSError as error:
        raise CarrierFileError(f"{path} cannot be read ({error.strerror or error}).") from error


def parse(data: bytes, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Raises: CarrierFileError."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    if len(data) < 8 or len(header) != length or length > LONGEST_HEADER or not header.rstrip(b" ").endswith(b"}"):
        raise CarrierFileError(f"{path} is not a safetensors file, or it is cut off; copy or save it again.")
    try:
        metadata = json.loads(header).get("__metadata__", {})
        return dict(sorted(load(data).items())), dict(metadata)  # which come in an order of chance
    except Exception as error:  # safetensors and json raise what they like on hostile bytes
        raise CarrierFileError(f"{path} is damaged ({str(error)[:200]}); copy or save it again.") from error


def is_own(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bool:
    """Whether this pack wrote it, even if damaged since."""
    return any(k.startswith(OWN) for k in (*tensors, *metadata))


def verify(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Raises: CarrierFileError unless this pack wrote it, in a format that is known, and it is undamaged."""
    version = metadata.get(OWN + "format")
    if not is_own(tensors, metadata) or version is None:
        raise CarrierFileError(f"{path} was not written by this pack, or it is damaged.")
    if version != VERSION:
        raise CarrierFileError(f"{path} has format {version[:20]!r}, this version reads {VERSION}; update the pack.")
    if metadata.get(OWN + "digest") != digest(tensors, metadata):
        raise CarrierFileError(f"{path} is damaged: its checksum does not match. Copy or save it again.")


def from_parts(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], path: Path) -> Concept:
    """The concept in a parsed file of this pack. Raises: CarrierFileError."""
    verify(tensors, metadata, path)
    if metadata.get(OWN + "kind") == "dictionary":
        raise CarrierFileError(f"{path} holds a dictionary, not a concept; load it with Load Dictionary.")
    try:
        kind = metadata[OWN + "kind"]
        learned = dict(_taken(k, v, kind) for k, v in tensors.items() if not k.startswith(STATE))
        return Concept(
            metadata[OWN + "name"],
            kind,
            learned,
            json.loads(metadata[OWN + "info"]),
            {k.removeprefix(STATE): v for k, v in tensors.items() if k.startswith(STATE)},
        )
    except (KeyError, TypeError, ValueError, RecursionError) as error:  # of hostile facts
        raise CarrierFileError(f"{path} is not a whole concept: {error}") from error
