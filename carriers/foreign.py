"""Textual Inversion files of other programs, read without ever running what is in them."""

import io
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .concept import NAME, Concept
from .errors import CarrierError, CarrierFileError
from .files import from_parts, is_own, parse, read_bytes

LARGEST = 1 << 30
"""Bytes of an embedding, also in fp32; none comes near it."""
WIDTHS = {768: "clip_l", 1024: "clip_h", 1280: "clip_g", 4096: "t5xxl"}
"""Encoder keys (comfy/sd1_clip.py ``embedding_key``) by row width, for files that name none."""
ENCODERS = (*WIDTHS.values(), "umt5xxl", "umt5base", "t5base", "qwen3_8b", "qwen3vl_8b", "qwen3_06b", "hidream_o1")
ENCODERS += ("chinese_roberta", "jina_clip_2", "sam3_clip")
"""Encoder keys that a file may name: also those of the same widths, but for words, which may be a token's name."""
NAMES = {"t5": "t5xxl", "text_encoders_0": "clip_l", "text_encoders_1": "clip_g"}
"""Encoder keys by the names that diffusers' training scripts give them."""
BUNDLE = re.compile(r"bundle_emb\.(.+?)\.(string_to_param\.\*|[^.]+)")
WANTED = [torch.nn.ParameterDict, set]
"""What the authors of Textual Inversion save; torch allows sets by itself since 2.6."""


def read_any(path: Path) -> Concept:
    """A concept from a file of this pack, of Textual Inversion's authors, A1111 (.pt, SDXL too), diffusers or kohya, or
    the embedding that a LoRA bundles.

    Pickled files are read with torch's weights-only loader, which builds tensors and nothing else that could run.
    Raises: CarrierFileError saying what is wrong with the file.
    """
    path = Path(path)
    data = read_bytes(path)
    if pickled(data):
        return _foreign(unpickled(data, path), path)
    tensors, metadata = parse(data, path)
    return from_parts(tensors, metadata, path) if is_own(tensors, metadata) else _foreign(tensors, path)


def pickled(data: bytes) -> bool:
    """Whether a file is a pickle, in a zip or bare; the length of a safetensors header may begin with the same byte."""
    return data[:4] == b"PK\x03\x04" or data[:1] == b"\x80" and data[8:9] != b"{"


def unpickled(data: bytes, path: Path, what: str = "an embedding", largest: int = LARGEST) -> Mapping:
    """The tensors of a .pt, .pth or .bin file, by torch's weights-only loader.

    Raises: CarrierFileError naming ``what`` was wanted, when there is more than tensors in it.
    """
    try:
        size = len(data)
        if data[:2] == b"PK":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        if size > largest:
            raise CarrierFileError(f"it unpacks to more than {what} holds")
        with torch.serialization.safe_globals(WANTED):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle may raise anything, and torch then advises to run it
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        known = str(error) if isinstance(error, CarrierFileError) else "it is damaged, or of another kind"
        raise CarrierFileError(
            f"{path} is not {what} that can be loaded safely ({f'it asks for {asked[1][:80]}' if asked else known}). "
            "Only tensors are read from .pt and .bin files."
        ) from error
    if not isinstance(content, Mapping):
        raise CarrierFileError(f"{path} holds a {type(content).__name__}, not {what}.")
    return content


def _foreign(content: Mapping, path: Path) -> Concept:
    """Sorts the tensors of a foreign file by text encoder."""
    name, note = None, {}
    param = content.get("string_to_param")
    param = getattr(param, "_parameters", param)
    bundled = {m: v for k, v in content.items() if isinstance(k, str) and (m := BUNDLE.fullmatch(k))}
    if isinstance(param, Mapping):
        found, kind = dict(param), "A1111"
        name = content.get("name") if isinstance(content.get("name"), str) else None
        note = {k: content[k] for k in ("step", "sd_checkpoint_name") if isinstance(content.get(k), (int, str))}
    elif bundled:
        names = {m[1] for m in bundled}
        if len(names) > 1:
            raise CarrierFileError(
                f"{path} bundles several embeddings ({', '.join(sorted(names))}); save one of them to a file."
            )
        found = {m[2].removeprefix("string_to_param."): v for m, v in bundled.items()}
        kind, name = "bundle_emb", names.pop()
    else:
        found, kind = dict(content), "kohya" if "emb_params" in content else "diffusers"
    rows = {k: v for k, v in found.items() if isinstance(k, str) and torch.is_tensor(v) and _rows(v)}
    named = {k: NAMES.get(k, k) for k in rows}
    known = {named[k]: v for k, v in rows.items() if named[k] in ENCODERS}
    more = [k for k, v in found.items() if torch.is_tensor(v) and v.dim() and known.get(named.get(k)) is not v]
    if known and more:
        raise CarrierFileError(
            f"{path} holds vectors named {_listed(more)} beside those for {', '.join(known)}; which text encoder they "
            "are for is not known. Save a file without them."
        )
    if not known:
        if any(k.endswith((".lora_down.weight", ".lora_A.weight")) for k in map(str, found)):
            raise CarrierFileError(
                f"{path} is a LoRA of another program and bundles no token rows; use it with the stock LoRA loader."
            )
        if len(rows) != 1:
            raise CarrierFileError(f"{path} is not a Textual Inversion file: it holds {_listed(found)}.")
        ((label, value),) = rows.items()
        if value.shape[-1] not in WIDTHS:
            raise CarrierFileError(
                f"{path} has vectors of width {value.shape[-1]}; known are "
                f"{', '.join(f'{w} ({k})' for w, k in WIDTHS.items())}."
            )
        known = {WIDTHS[value.shape[-1]]: value}
        name = name or (label if label.startswith("<") else None)
    try:
        if sum(v.numel() for v in known.values()) > LARGEST // 4:
            raise CarrierError("It holds more numbers than an embedding does; take another file.")
        tensors = {k: v.detach().float().reshape(1, 1, 1, -1, v.shape[-1]) for k, v in known.items()}
        if wrong := [k for k, v in tensors.items() if not bool(v.isfinite().all())]:
            raise CarrierError(f"It holds numbers under {', '.join(wrong)} that are not finite; take another file.")
        return Concept(
            _name(name or path.stem), "tokens", tensors, {"source": f"{kind} embedding", "file": path.name, **note}
        )
    except (CarrierError, RuntimeError) as error:  # torch converts not every type
        raise CarrierFileError(f"{path}: {error}") from error


def _rows(value: torch.Tensor) -> bool:
    """Whether it is vectors; files can also hold tensors that are sparse, of uneven rows, or without numbers."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
    return plain and value.is_floating_point() and value.dim() in (1, 2) and value.numel() > 0


def _listed(keys: Iterable) -> str:
    return ", ".join(str(k)[:40] for k in list(keys)[:6]) or "nothing"


def _name(text: object) -> str:
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", str(text).strip("<>")).strip("_")[:64]
    return cleaned if NAME.fullmatch(cleaned) else "concept"
