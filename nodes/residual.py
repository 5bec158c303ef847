"""Learning one target and a residual per picture (ConceptPrism)."""

from comfy_api.latest import io

from . import inputs as shared
from .sockets import Concept, told


class LearnResiduals(io.ComfyNode):
    """ConceptPrism, stage 1 (arXiv 2602.19575)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLearnResiduals",
            display_name="Learn Residual Tokens",
            category="concepts/learn",
            description="Learns what all pictures share as one concept, and what only one picture has (its background, "
            "pose, light) as a residual of its own, so that the concept is not stained by it (ConceptPrism, stage 1).",
            search_aliases=["conceptprism", "disentangle", "textual inversion", "background", "exclusion", "train"],
            is_output_node=True,
            inputs=[
                *shared.sources("mug"),
                io.Combo.Input(
                    "preset",
                    options=["paper", "repository", "flux repository", "custom"],
                    default="paper",
                    tooltip="custom: the widgets count. Any other replaces steps, learning_rate, accumulate, "
                    "residual_length, joining, beta and weight_decay. paper: 200, 4e-4, 4, 8, with, 0.05, 0.01. "
                    "repository: 200, 5e-4, 1, 8, side by side, 0.05, 0.01. flux repository: 200, 1e-4, 1, 1, side by "
                    "side, 0.5, 1e-4, T5-XXL alone, noise levels without shift. All other widgets always count.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip="What the concept is, for example: mug. Stands in its place in the captions, and is what "
                    "strength 0 falls back to. The concept itself starts from noise.",
                ),
                io.Int.Input(
                    "residual_length",
                    default=8,
                    min=0,
                    max=32,
                    tooltip="Vectors per picture; 8 in the paper. 0 learns the concept alone, without residuals.",
                ),
                io.Float.Input(
                    "beta",
                    default=0.05,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="Weight of exclusion: a residual must change nothing in the other pictures. 0.05 in the "
                    "paper, 0.5 in its Flux code. 0 turns it off, with its cost.",
                ),
                io.Combo.Input(
                    "residual_init",
                    options=["caption", "random"],
                    default="caption",
                    tooltip="Where residuals start: what the text encoder says about the picture's caption, as in the "
                    "paper (captions of 8 to 32 words), or noise with the vocabulary's statistics.",
                ),
                io.Combo.Input(
                    "joining",
                    options=["with", "side by side"],
                    default="with",
                    tooltip="Prompt while learning: <concept> with <residual>, as in the paper, or both side by side, "
                    "as in its code.",
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=32,
                    tooltip="Vectors of the concept per text encoder; 1 in the paper, where more follow prompts less.",
                ),
                *shared.pace(
                    200,
                    4e-4,
                    "Optimiser steps; 200 in the paper.",
                    "Step size of AdamW; 4e-4 in the paper. The toy world needs 0.01.",
                ),
                *shared.noise(4),
                io.Int.Input(
                    "anchors",
                    default=3,
                    min=1,
                    max=16,
                    advanced=True,
                    tooltip="Other pictures per picture and step on which exclusion is measured, at most as many as "
                    "there are; 3 in the paper. They run in one pass with the picture itself.",
                ),
                io.Combo.Input(
                    "reduction",
                    options=["mean", "sum"],
                    default="mean",
                    advanced=True,
                    tooltip="Exclusion over the anchors: the mean, as in the paper's equation and code, or the sum, as "
                    "in its algorithm.",
                ),
                io.Combo.Input(
                    "exclusion_space",
                    options=["model", "noise"],
                    default="model",
                    advanced=True,
                    tooltip="Where predictions are compared. noise: as predicted noise also with v models, whose own "
                    "space weighs noisy times more. No difference for SD1.5, SDXL, SD3 and Flux.",
                ),
                io.Int.Input(
                    "null_bank",
                    default=0,
                    min=0,
                    max=1000,
                    advanced=True,
                    tooltip="0: new noise for every anchor, as in the paper. Above 0: so many fixed draws per picture, "
                    "whose empty-prompt predictions are computed once; saves one pass a step.",
                ),
                io.Combo.Input(
                    "rescale",
                    options=["auto", "on", "off"],
                    default="auto",
                    advanced=True,
                    tooltip="Residuals that start from captions get the mean norm of the vocabulary. auto: in T5 only; "
                    "off is the paper's code.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=0.0001,
                    advanced=True,
                    tooltip="Of AdamW, on the vectors that a step used; 0.01 in the paper's code.",
                ),
                io.Float.Input(
                    "clip_norm",
                    default=1.0,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Largest norm of the whole gradient; 1 in the paper's code. 0: any.",
                ),
                *shared.ticks(),
                *shared.keeping(),
                *shared.continued(),
            ],
            outputs=[
                *shared.outputs(),
                Concept.Output(
                    display_name="residuals",
                    is_output_list=True,
                    tooltip="One concept per picture, called residual1, residual2, ...: what only that picture has. "
                    "None with residual_length 0.",
                ),
                io.String.Output(
                    display_name="residual_prompts",
                    is_output_list=True,
                    tooltip="A photo of each residual, as a list beside residuals: connect both to Concept Prompt to "
                    "see what each picture's residual absorbed.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concept_set, continue_from=None, **values) -> io.NodeOutput:
        from ..host.learn_residual import ResidualSession, preset, replaced  # not at every start

        shown = {
            k: values[k] for k in ("vectors", "residual_init", "beta", "anchors", "reduction", "null_bank", "rescale")
        }
        asked = shared.run_settings(cls, values) | {
            **shown,
            "residual_vectors": values["residual_length"],
            "init_text": values["class_word"].strip(),
            "joined": values["joining"] == "with",
            "space": values["exclusion_space"],
            "decay": values["weight_decay"],
            "clip": values["clip_norm"],
            "encoders": shared.chosen(clip, values),
        }
        session = ResidualSession(model, clip, concept_set, preset(values["preset"], **asked), continue_from)
        _, given, text = shared.run(session, values)
        text = "\n".join(filter(None, (text, replaced(values["preset"], **asked))))
        given = (*given[:-1], text)
        return told(text, *given, *session.drawn())


NODES = [LearnResiduals]
