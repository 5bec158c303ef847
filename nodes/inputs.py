"""Inputs and outputs that all learners share, in the order in which they stand on a node."""

import torch
from comfy_api.latest import io

from ..kernels.draws import LAWS
from .sockets import RATE, Concept, ConceptSet


def sources(name: str, said: str = "write <name> in prompts") -> list:
    """Model, text encoders, pictures, and the concept's name; ``said``: how prompts call it."""
    return [
        io.Model.Input("model", tooltip="Model to learn against. It stays as it is."),
        io.Clip.Input("clip", tooltip="The model's text encoders, which read the captions. They stay as they are."),
        ConceptSet.Input("concept_set", tooltip="From Make Concept Set."),
        io.String.Input("name", default=name, tooltip=f"Name of the concept: {said}. Letters, digits, - and _."),
    ]


def pace(steps: int, rate: float, steps_tip: str, rate_tip: str) -> list:
    """Steps, learning rate, batch and seed."""
    return [
        io.Int.Input("steps", default=steps, min=1, max=100000, tooltip=steps_tip),
        io.Float.Input("learning_rate", default=rate, min=RATE, max=1.0, step=RATE, tooltip=rate_tip),
        io.Int.Input(
            "batch",
            default=1,
            min=1,
            max=64,
            tooltip="Pictures per forward pass. More is steadier and needs more memory.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip="Decides noise, timesteps and picture order. The same seed gives the same concept.",
        ),
    ]


def noise(
    accumulate: int = 1,
    laws: tuple[str, ...] = LAWS,
    law_tip: str = "Which noise levels are trained. logit-normal is usual for SD3 and Flux, whose levels are then "
    "shifted as in sampling.",
    masked: bool = True,
) -> list:
    """Accumulation, noise levels (the first of ``laws`` unless said otherwise), and whether to count the mask alone."""
    mask = io.Boolean.Input(
        "masked_loss",
        default=False,
        advanced=True,
        tooltip="Count only the masked area of each picture, so that backgrounds are not learned.",
    )
    return [
        io.Int.Input(
            "accumulate",
            default=accumulate,
            min=1,
            max=64,
            advanced=True,
            tooltip="Batches per optimiser step: the effect of a larger batch without its memory.",
        ),
        io.Combo.Input("timestep_law", options=list(laws), default=laws[0], advanced=True, tooltip=law_tip),
        io.Float.Input(
            "timestep_low",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Lowest trained time; 0 is a clean picture.",
        ),
        io.Float.Input(
            "timestep_high",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Highest trained time; 1 is pure noise. Must be above timestep_low.",
        ),
        *([mask] if masked else []),
    ]


def ticks() -> list:
    """Which text encoders get vectors."""
    return [
        io.Boolean.Input(
            "use_clip_l", default=True, advanced=True, tooltip="Learn vectors for CLIP-L (SD1.5, SDXL, SD3, Flux)."
        ),
        io.Boolean.Input("use_clip_g", default=True, advanced=True, tooltip="Learn vectors for CLIP-G (SDXL, SD3)."),
        io.Boolean.Input("use_t5xxl", default=True, advanced=True, tooltip="Learn vectors for T5-XXL (SD3, Flux)."),
        io.Boolean.Input(
            "use_other", default=True, advanced=True, tooltip="Learn vectors for any other text encoder, such as SD2's."
        ),
    ]


def keeping() -> list:
    """Previews, autosaves and checkpointing."""
    return [
        io.Int.Input(
            "preview_every",
            default=25,
            min=0,
            max=10000,
            advanced=True,
            tooltip="Steps between live previews. Each costs four forward passes; where vectors are learned, a fifth "
            "shows where the model looks at them. 0 turns previews off.",
        ),
        io.Int.Input(
            "save_every",
            default=50,
            min=0,
            max=10000,
            advanced=True,
            tooltip="Steps between autosaves to output/concepts/autosave. 0: only at the end and on an interrupt.",
        ),
        io.Combo.Input(
            "checkpointing",
            options=["auto", "on", "off"],
            default="auto",
            advanced=True,
            tooltip="Recompute blocks instead of keeping them: 1.4 to 1.9 times as long, far less memory, same result.",
        ),
    ]


def continued() -> list:
    """The socket for going on."""
    return [
        Concept.Input(
            "continue_from",
            optional=True,
            tooltip="A concept of the same shape to go on from, with its optimiser state: N then M more "
            "steps equal N + M.",
        )
    ]


def outputs(user: str = "Concept Prompt") -> list:
    """What every learner gives; ``user``: the nodes that draw with it."""
    return [
        Concept.Output(display_name="concept", tooltip=f"The learned concept. Connect to {user} or Save Concept."),
        io.Image.Output(display_name="loss_curve", tooltip="Loss per step and its running mean."),
        io.LossMap.Output(display_name="loss_map", tooltip="The losses, for the host's Plot Loss Graph."),
        io.Latent.Output(
            display_name="previews",
            tooltip="Quick estimates of one fixed noise along the way; decode them to see it learn.",
        ),
        io.String.Output(
            display_name="report", tooltip="Steps, loss before and after, seconds, norms, and where it was saved."
        ),
    ]


def chosen(clip, values: dict) -> tuple[str, ...]:
    """Encoder keys of this CLIP that are ticked in a node's ``values``."""
    from ..host.text import encoders  # not at every start

    wanted = {key: values[f"use_{key}"] for key in ("clip_l", "clip_g", "t5xxl")}
    return tuple(e.key for e in encoders(clip) if wanted.get(e.key, values["use_other"])) or ("none ticked",)


def single(lists: dict) -> dict:
    """The values of a node that takes lists for the sake of one input. Raises: ValueError where several arrived."""
    for key, value in lists.items():
        if value is not None and len(value) != 1:
            raise ValueError(f"{key} got a list of {len(value)}; connect a single one.")
    return {k: v[0] for k, v in lists.items() if v is not None}


def within(node, values: dict) -> None:
    """Raises: ValueError for a number outside its widget's range, which the host does not check in links."""
    for one in node.define_schema().inputs:
        if isinstance(one, (io.Int.Input, io.Float.Input)) and one.id in values:
            value = values[one.id]
            if not one.min <= value <= one.max:  # nor is nan
                raise ValueError(
                    f"{one.id} is {value}, but goes from {one.min} to {one.max}; look at what is linked to it."
                )


def run_settings(node, values: dict) -> dict:
    """A node's shared ``values`` as arguments of RunSettings. Raises: ValueError as ``within``."""
    within(node, values)
    same = ("name", "steps", "learning_rate", "batch", "accumulate", "masked_loss", "seed")
    return {k: values[k] for k in same} | {f"time_{k}": values[f"timestep_{k}"] for k in ("law", "low", "high")}


def run(session, values: dict) -> tuple:
    """Learns with a learner's session as a node's ``values`` say. Returns: result, values of ``outputs()``, report."""
    from ..host.learn import learn  # not at every start
    from ..host.pictures import loss_curves
    from ..host.report import learned_text

    shown = {k: values[k] for k in ("preview_every", "save_every", "checkpointing")}
    done = learn(session, **shown)
    text = learned_text(done)
    curve = loss_curves({"": done.losses, **done.terms}, f"<{done.concept.name}>")
    losses = {"loss": [torch.tensor(v) for v in done.losses]}
    return done, (done.concept, curve, losses, {"samples": done.previews}, text), text
