"""Sparse autoencoders of other programs, told by their keys and read without ever running what is in them.

SAELens, EleutherAI's sparsify (SAeUron's too), OpenAI's (sdxl-unbox's and Concept Steerers' too), dictionary_learning
and MSAE. All become one form (dictionary.py): latents along the first axis, the decoder's bias taken off the input.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from .dictionary import LARGEST, MEASURED, Dictionary, own_dictionary
from .errors import CarrierError, CarrierFileError
from .files import is_own, parse, read_bytes
from .foreign import pickled, unpickled

CONFIGS = ("cfg.json", "config.json")
Found = tuple[dict[str, torch.Tensor], int, dict]
"""Parts, k (0: not told, or a threshold decides) and what else is to be known."""


def read_dictionary(path: Path, k: int = 0) -> Dictionary:
    """A dictionary from a file of this pack or of another program, whose cfg.json or config.json lies beside it.

    ``k``: active latents per token instead of what the file says; needed where it says nothing.
    Pickled files are read with torch's weights-only loader, which builds tensors and nothing else.
    Raises: CarrierFileError saying what is wrong with the file, with the keys found where none are known.
    """
    path = Path(path)
    data = read_bytes(path, LARGEST)
    if pickled(data):
        content = unpickled(data, path, "a dictionary", LARGEST)
    else:
        content, metadata = parse(data, path)
        if is_own(content, metadata):
            return _asked(own_dictionary(content, metadata, path), k, path)
    inner = content.get("state_dict")
    content = inner if isinstance(inner, Mapping) else content
    for source, wanted, make in LAYOUTS:
        if all(_has(content, key) for key in wanted):
            try:
                parts, found, info = make(content, _config(path))
                return Dictionary(_name(path), _whole(parts), _k(k, found, parts), {"source": source, **info})
            except CarrierError as error:
                raise CarrierFileError(f"{path} ({source}): {error}") from error
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
                raise CarrierFileError(
                    f"{path} looks like a dictionary of {source}, but its parts do not fit together ({error}); copy "
                    "it again."
                ) from error
    raise CarrierFileError(
        f"{path} is no dictionary of a known kind: its keys are {_listed(content)}. Known are those of this pack, "
        "SAELens, sparsify, OpenAI (sdxl-unbox, Concept Steerers), dictionary_learning and MSAE."
    )


def _listed(content: Mapping) -> str:
    return ", ".join(str(key)[:40] for key in list(content)[:12]) or "nothing"


def _has(content: Mapping, key: str) -> bool:
    outer, _, inner = key.partition("/")
    held = content.get(outer)
    return isinstance(held, Mapping) and inner in held if inner else torch.is_tensor(held)


def _config(path: Path) -> dict:
    """What lies beside the weights. Raises: CarrierError when it is no JSON."""
    for name in CONFIGS:
        file = path.parent / name
        if file.is_file():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
                return found if isinstance(found, dict) else {}
            except (OSError, ValueError) as error:
                raise CarrierError(f"{name} beside it cannot be read ({error}); copy it again.") from error
    return {}


def _name(path: Path) -> str:
    """The file's name, or its folder's where all files of a program are called alike."""
    plain = path.stem in ("sae_weights", "sae", "ae", "state_dict", "model", "checkpoint", "sae_checkpoint")
    cleaned = re.sub(r"[^A-Za-z0-9_-]+", "_", path.parent.name if plain else path.stem).strip("_")[:64]
    return cleaned or "dictionary"


def _asked(own: Dictionary, k: int, path: Path) -> Dictionary:
    """With ``k``, and then without what was measured at another."""
    try:
        k = _k(k, own.k, own.tensors)
        info = {key: value for key, value in own.info.items() if key not in MEASURED}
        return own if k == own.k else replace(own, k=k, info=info)
    except CarrierError as error:
        raise CarrierFileError(f"{path}: {error}") from error


def _k(asked: int, found: int, parts: Mapping[str, torch.Tensor]) -> int:
    if asked and "threshold" in parts:
        raise CarrierError("A threshold decides which of its latents are active; set k to 0.")
    return asked or found


def _whole(parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With everything that a file may leave out."""
    m, d = parts["encoder"].shape
    full = {"mean": torch.zeros(d), "scale": torch.ones(d), **parts}
    full |= {key: full[key].float().expand(size) for key, size in (("scale", d), ("mean", d)) if full[key].numel() == 1}
    if "threshold" in full:
        full["threshold"] = full["threshold"].float().expand(m)
    return full


def _parts(encoder, encoder_bias, decoder, decoder_bias, **more) -> dict[str, torch.Tensor]:
    named = {"encoder": encoder, "encoder_bias": encoder_bias, "decoder": decoder, "decoder_bias": decoder_bias, **more}
    return {k: torch.as_tensor(v).detach().float() for k, v in named.items()}


def _refused(config: Mapping, **allowed: tuple) -> None:
    """Raises: CarrierError when a setting has a value that would need other arithmetic."""
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            raise CarrierError(f"{key} is {config[key]!r}; only {', '.join(map(repr, values))} can be read.")


def _msae(content: Mapping, config: Mapping) -> Found:
    model = content["model"]
    mean, scale = content.get("mean_center"), content.get("scaling_factor")
    parts = _parts(
        *(model["encoder"].T, model["latent_bias"], model["decoder"], model["pre_bias"]),
        mean=0.0 if mean is None else mean,
        scale=1.0 if scale is None else scale,
    )
    return parts, int(content.get("k") or config.get("k") or 0), {}


def _openai(content: Mapping, config: Mapping) -> Found:
    parts = _parts(content["encoder.weight"], content["latent_bias"], content["decoder.weight"].T, content["pre_bias"])
    inner = content.get("activation_state_dict")
    k = int((inner.get("k") if isinstance(inner, Mapping) else 0) or config.get("k") or 0)
    if content.get("activation") in ("ReLU", "Identity"):
        _refused(content, activation=("ReLU",))
        return {**parts, "threshold": torch.zeros(1)}, 0, {}
    return parts, k, {"norm": "layer"} if content.get("activation") == "TopK" else {}


def _sparsify(content: Mapping, config: Mapping) -> Found:
    _refused(config, activation=("topk",), signed=(False,), transcode=(False,), skip_connection=(False,))
    _refused(config, embed_skip=(False,), gram_lookup=(False,))
    _refused(config, batch_topk=(False,), sample_topk=(False,))  # SAeUron's: a token's code depends on the others
    parts = _parts(content["encoder.weight"], content["encoder.bias"], content["W_dec"], content["b_dec"])
    return parts, int(config.get("k") or 0), {"norm": "layer"} if config.get("input_unit_norm") else {}


def _linear(content: Mapping, config: Mapping) -> Found:
    """dictionary_learning's modules of two linear layers: TopK, BatchTopK, standard."""
    relu = "b_dec" not in content
    parts = _parts(
        *(content["encoder.weight"], content["encoder.bias"], content["decoder.weight"].T),
        content["bias"] if relu else content["b_dec"],
    )
    if relu:
        return {**parts, "threshold": torch.zeros(1)}, 0, {}
    return _batch(parts, content, config)


def _batch(parts: dict, content: Mapping, config: Mapping) -> Found:
    """BatchTopK counts over a batch while it learns, and goes by its threshold afterwards."""
    trainer = config.get("trainer") or {}
    threshold = float(content.get("threshold", -1.0))
    if ("group_sizes" in content or "Batch" in str(trainer.get("dict_class"))) and threshold >= 0:
        return {**parts, "threshold": torch.tensor([threshold])}, 0, {}
    return parts, int(content.get("k", trainer.get("k") or 0)), {}


def _matrices(content: Mapping, config: Mapping) -> Found:
    """SAELens, and dictionary_learning's Matryoshka and JumpReLU."""
    encoder, bias, decoder, offset = (content[key].float() for key in ("W_enc", "b_enc", "W_dec", "b_dec"))
    encoder = encoder.T
    trainer = config.get("trainer") or {}
    if "group_sizes" in content:
        return _batch(_parts(encoder, bias, decoder, offset), content, config)
    jump = trainer.get("dict_class") == "JumpReluAutoEncoder"
    if not jump and not config:
        raise CarrierError("cfg.json, which says how it is to be read, is missing; copy it into the same folder.")
    kind = "jumprelu" if jump else config.get("architecture", "standard")
    old = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    kind = "topk" if kind == "standard" and old == "topk" else kind
    if kind not in ("standard", "topk", "jumprelu", "batchtopk") or not jump and old not in ("relu", "topk"):
        raise CarrierError(f"Its architecture is {kind} with {old}; standard, topk, batchtopk and jumprelu are known.")
    if not config.get("apply_b_dec_to_input", not jump):
        bias = bias + encoder @ offset
    norms = {"none": "none", None: "none", False: "none", "layer_norm": "layer", "constant_norm_rescale": "length"}
    _refused(config, normalize_activations=tuple(norms))
    threshold = next((content[key] for key in ("threshold", "topk_threshold") if key in content), None)
    if threshold is None and kind in ("jumprelu", "batchtopk"):
        raise CarrierError(f"Its architecture is {kind}, and a threshold is missing; its keys are {_listed(content)}.")
    threshold = torch.zeros(1) if threshold is None else threshold.float()
    if config.get("rescale_acts_by_decoder_norm"):
        norm = decoder.norm(dim=1)
        encoder, bias, decoder = encoder * norm[:, None], bias * norm, decoder / norm[:, None]
    if config.get("finetuning_scaling_factor"):
        factor = content.get("finetuning_scaling_factor", content.get("scaling_factor"))
        if factor is None:
            raise CarrierError(f"It was finetuned, and its factors are missing; its keys are {_listed(content)}.")
        decoder = decoder * factor.float()[:, None]  # they multiply what is decoded, not the code
    info = {"norm": norms[config.get("normalize_activations")]}
    hook = (config.get("metadata") or config.get("meta") or config).get("hook_name")
    info |= {"hook": hook} if hook else {}
    info |= {"source": "dictionary_learning"} if jump else {}
    parts = _parts(encoder, bias, decoder, offset)
    if kind == "topk":
        return parts, int(config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k") or 0), info
    return {**parts, "threshold": threshold}, 0, info


LAYOUTS: list[tuple[str, tuple[str, ...], Callable[[Mapping, Mapping], Found]]] = [
    ("MSAE", ("model/encoder", "model/decoder", "model/pre_bias", "model/latent_bias"), _msae),
    ("OpenAI", ("encoder.weight", "decoder.weight", "pre_bias", "latent_bias"), _openai),
    ("sparsify", ("encoder.weight", "encoder.bias", "W_dec", "b_dec"), _sparsify),
    ("dictionary_learning", ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"), _linear),
    ("dictionary_learning", ("encoder.weight", "encoder.bias", "decoder.weight", "bias"), _linear),
    ("dictionary_learning", ("W_enc", "b_enc", "W_dec", "b_dec", "group_sizes"), _matrices),
    ("SAELens", ("W_enc", "b_enc", "W_dec", "b_dec"), _matrices),
]
