"""Learning the things of one picture."""

from comfy_api.latest import io

from . import inputs as shared
from .sockets import Concept, told


class LearnScene(io.ComfyNode):
    """Break-A-Scene, phase 1 (arXiv 2305.16311)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLearnScene",
            display_name="Learn Scene Tokens",
            category="concepts/learn",
            description="Learns several things of one picture, each marked by a mask, as words of their own "
            "(Break-A-Scene, phase 1). Every step names some of them, counts the picture inside their masks alone, and "
            "pulls each word's attention to its mask.",
            search_aliases=["break-a-scene", "multi concept", "one image", "union sampling", "masked loss", "train"],
            is_output_node=True,
            inputs=[
                *shared.sources("scene", "write <name1>, <name2>, ... in prompts, a number per mask"),
                io.Mask.Input(
                    "masks",
                    tooltip="One mask per thing as a batch (Batch Masks), white where it is; 1 to 8, about four work "
                    "best. Of the picture's shape, in any size. The ground can be a thing too: Invert Mask.",
                ),
                io.String.Input(
                    "words",
                    default="mug\nbeach",
                    multiline=True,
                    tooltip="A line per mask, in their order: the class word that the thing's vectors start from.",
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=32,
                    tooltip="Vectors of each thing per text encoder; 1 in the paper. More hold more and follow prompts "
                    "less.",
                ),
                *shared.pace(
                    400,
                    5e-4,
                    "Optimiser steps; 400 in the paper.",
                    "Step size; 5e-4 in the paper's code. The toy world needs 0.01.",
                ),
                io.Float.Input(
                    "attention_weight",
                    default=0.01,
                    min=0.0,
                    max=100.0,
                    step=1e-5,
                    tooltip="Weight of the loss between each word's attention and its mask; 0.01 in the paper. 0 turns "
                    "it off, the only form for SD3 and Flux.",
                ),
                io.Combo.Input(
                    "attention_layers",
                    options=["half", "quarter", "all"],
                    default="quarter",
                    advanced=True,
                    tooltip="Whose maps are held to the masks: those of a quarter of the latent's side (16 x 16 for "
                    "SD1.5 at 512 px, as in the paper), half, or all. The toy world has no quarter.",
                ),
                *shared.noise(masked=False),
                *shared.ticks(),
                *shared.keeping(),
                *shared.continued(),
            ],
            outputs=[
                *shared.outputs(),
                io.Image.Output(
                    display_name="attention", tooltip="Where the picture looks at each word, per size of maps."
                ),
                Concept.Output(
                    display_name="concepts",
                    is_output_list=True,
                    tooltip="One concept per thing, called name1, name2, ...: to save, mix or rename one alone.",
                ),
                io.String.Output(
                    display_name="prompts",
                    is_output_list=True,
                    tooltip="A photo of each thing, as a list beside concepts: connect both to Concept Prompt to see "
                    "what each word learned.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, clip, concept_set, masks, continue_from=None, **values) -> io.NodeOutput:
        from ..carriers.scene import things  # not at every start
        from ..host.learn_scene import SceneSession, SceneSettings

        settings = SceneSettings(
            **shared.run_settings(cls, values | {"masked_loss": True}),
            **{k: values[k] for k in ("vectors", "attention_weight", "attention_layers")},
            things=tuple(line.strip() for line in values["words"].splitlines() if line.strip()),
            encoders=shared.chosen(clip, values),
        )
        session = SceneSession(model, clip, concept_set, masks, settings, continue_from)
        done, given, text = shared.run(session, values)
        concepts = things(done.concept)
        text += "\n" + ", ".join(f"<{c.name}> from {c.info['init_text']}" for c in concepts)
        prompts = [f"a photo of <{c.name}>" for c in concepts]
        return told(text, *given[:-1], text, session.picture(), concepts, prompts)


NODES = [LearnScene]
