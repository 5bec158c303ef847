"""Gradients of ComfyUI's own TrainLoraNode against torch's copy-on-write of what the host changes in place.

SD1.5 and Flux of the host's classes at toy width, one step of the node at its defaults in fp32, the same draws. Flux
adds residuals in place: without recomputing the node raises, with it (its default) the recomputed pass reads what the
first one has changed. tests/host/test_lora.py holds the gradients of Learn Concept LoRA on the same models to 1e-4.
``nox -s bench -- core_gradients``
"""

import importlib.util
import json
import sys

import torch

from . import toy
from .runner import RESULTS, machine


class Keep:
    """An optimiser that keeps the first gradients and moves nothing."""

    def __init__(self, parameters):
        self.param_groups, self.found = [{"params": list(parameters)}], None

    def step(self):
        self.found = [p.grad.clone() for p in self.param_groups[0]["params"]]

    def zero_grad(self):
        pass


def models():
    """The tests' tiny models; the host has a package ``tests`` of its own."""
    spec = importlib.util.spec_from_file_location("tiny", toy.PACK / "tests" / "host" / "tiny.py")
    sys.modules["tiny"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(family: str, checkpointing: bool) -> list[torch.Tensor]:
    """Of all adapters after one step; without checkpointing those of copy-on-write."""
    from comfy_extras import nodes_train

    tiny = models()
    optimisers, kept = [], nodes_train._create_optimizer
    nodes_train._create_optimizer = lambda name, parameters, rate: optimisers.append(Keep(parameters)) or optimisers[-1]

    def again(disable_dynamic=False):
        with torch.inference_mode(False):
            return tiny.model(family)

    made = tiny.tiny(family)
    made.model.cached_patcher_init = (again, ())  # the node copies a model by loading it again
    schema = nodes_train.TrainLoraNode.define_schema()
    values = {i.id: [i.default] for i in schema.inputs if getattr(i, "default", None) is not None}
    values |= {
        "steps": [1],
        "gradient_checkpointing": [checkpointing],
        "training_dtype": ["fp32"],
        "lora_dtype": ["fp32"],
    }
    with torch.inference_mode():
        positive = made.clip.encode_from_tokens_scheduled(made.clip.tokenize("a mug"))
    torch.manual_seed(0)  # the node draws its start values from torch's own state
    try:
        positive = [[c.clone(), {k: v.clone() if torch.is_tensor(v) else v for k, v in e.items()}] for c, e in positive]
        connected = {
            "model": [made.model],
            "latents": [{"samples": made.latent[None].clone()}] * 2,
            "positive": [positive],
        }
        if checkpointing:
            nodes_train.TrainLoraNode.execute(**values | connected)
        else:
            with torch.autograd.graph.allow_mutation_on_saved_tensors():
                nodes_train.TrainLoraNode.execute(**values | connected)
    finally:
        nodes_train._create_optimizer = kept
    return optimisers[0].found


def main(options, rest) -> int:
    toy.host()
    table = {}
    for family in ("sd15", "flux"):
        right, found = gradients(family, False), gradients(family, True)
        errors = sorted(float((f - r).norm() / r.norm()) for f, r in zip(found, right, strict=True) if r.any())
        whole = float(torch.cat([(f - r).flatten() for f, r in zip(found, right, strict=True)]).norm())
        whole /= float(torch.cat([r.flatten() for r in right]).norm())
        table[family] = {"relative error": whole, "median": errors[len(errors) // 2], "largest": errors[-1]}
        print(f"{family}: " + ", ".join(f"{k} {v:.2g}" for k, v in table[family].items()))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "core_gradients.json").write_text(json.dumps({"table": table, "machine": machine()}, indent=1) + "\n")
    return 0
