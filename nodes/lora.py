"""Learning weight deltas, and putting them on a model."""

from comfy_api.latest import io

from . import inputs as shared
from .sockets import Concept, ConceptSet, told


class LearnLora(io.ComfyNode):
    """DreamBooth with LoRA, and the second stage of ConceptPrism, on the connected model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLearnLora",
            display_name="Learn Concept LoRA",
            category="concepts/learn",
            description="Learns a low-rank change of the model's attention from pictures (DreamBooth with LoRA), as a "
            "stock LoRA file. The connected model stays as it is. The state is saved while it learns; an interrupt "
            "keeps it in output/concepts/autosave.",
            search_aliases=[
                *("lora training", "dreambooth", "train", "fine-tune", "conceptprism", "custom diffusion"),
                *("orthogonal adaptation", "merge loras"),
            ],
            is_output_node=True,
            is_input_list=True,
            inputs=[
                *shared.sources("mug", "with tokens, prompts say <name>, and else token_text"),
                io.String.Input(
                    "token_text",
                    default="",
                    tooltip="What stands for the concept in the captions, for example: sks mug (DreamBooth: a rare "
                    "word and the class). Empty with tokens connected: their rows; {} in it stands for them.",
                ),
                *shared.pace(
                    500,
                    1e-4,
                    "Optimiser steps. DreamBooth with LoRA: 500. ConceptPrism: 120, at most 200.",
                    "Step size. DreamBooth with LoRA: 0.0001. ConceptPrism: 0.0004.",
                ),
                io.Int.Input(
                    "rank",
                    default=4,
                    min=1,
                    max=256,
                    tooltip="Rank of each layer's change; alpha equals it. 4 in DreamBooth with LoRA and ConceptPrism.",
                ),
                io.Combo.Input(
                    "layers",
                    options=["attention", "cross attention", "keys and values", "all linear"],
                    default="attention",
                    tooltip="What changes. attention: all of it, as ConceptPrism does; on Flux that of the double "
                    "blocks. keys and values: of cross-attention, as Custom Diffusion does. all linear: every linear "
                    "layer inside the blocks. SD3 and Flux have no cross-attention.",
                ),
                io.String.Input(
                    "class_text",
                    default="",
                    tooltip="What class pictures show, for example: a mug. They are drawn and learned with it; in the "
                    "captions of class_set it stands for the concept.",
                ),
                io.Int.Input(
                    "class_pictures",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Pictures of class_text that the model draws first, to hold on to what it knows "
                    "(DreamBooth: 200). 0: none. Not used when class_set is connected.",
                ),
                io.Float.Input(
                    "prior_weight",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Weight of the loss on class pictures. DreamBooth: 1. 0 turns it off.",
                ),
                *shared.noise(),
                io.Boolean.Input(
                    "single_blocks",
                    default=False,
                    advanced=True,
                    tooltip="Flux only: also change linear1 and linear2 of the single blocks.",
                ),
                io.Float.Input(
                    "weight_decay",
                    default=0.01,
                    min=0.0,
                    max=1.0,
                    step=1e-4,
                    advanced=True,
                    tooltip="Decoupled decay of AdamW. ConceptPrism: 0.01.",
                ),
                io.Float.Input(
                    "clip_gradient",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Largest norm of the whole gradient. ConceptPrism: 1. 0: no limit.",
                ),
                *shared.keeping(),
                Concept.Input(
                    "tokens",
                    optional=True,
                    tooltip="A learned concept whose rows stand in the captions. They stay as they are, unless "
                    "tokens_learning_rate moves them, and are saved along.",
                ),
                Concept.Input(
                    "residuals",
                    optional=True,
                    tooltip="From Learn Residual Tokens: one per picture, in order. Each caption then reads concept "
                    "with residual, so that the LoRA need not learn what only one picture shows (ConceptPrism).",
                ),
                ConceptSet.Input(
                    "class_set",
                    optional=True,
                    tooltip="Other things of the class, from Make Concept Set, instead of drawn class pictures.",
                ),
                *shared.continued(),
                io.Float.Input(
                    "attention_weight",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Holds mean and variance of the concept's attention maps to those of the class word that "
                    "tokens began at (AttnDreamBooth: 2). 0: none. SD1.5, SD2 and SDXL.",
                ),
                io.Int.Input(
                    "slot",
                    default=0,
                    min=0,
                    max=16,
                    optional=True,
                    advanced=True,
                    tooltip="1 to 16: reads directions that LoRAs of other slots do not, so that several on one model "
                    "are to disturb each other less; give each its own (Orthogonal Adaptation: rank 20, all linear, "
                    "strength 0.6). Rank is at most a sixteenth of a layer's width. 0: any directions, learned too.",
                ),
                io.Float.Input(
                    "tokens_learning_rate",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=1e-6,
                    optional=True,
                    advanced=True,
                    tooltip="Step size of the rows of tokens, which are then learned too. Mix-of-Show and Orthogonal "
                    "Adaptation: 0.001, with learning_rate 0.0001 and 0.00001. Custom Diffusion: 0.00001 for both, "
                    "with keys and values. 0: the rows stay as they are.",
                ),
            ],
            outputs=shared.outputs("Apply Concept, with tokens to Concept Prompt too,"),
        )

    @classmethod
    def execute(cls, residuals=None, **lists) -> io.NodeOutput:
        from ..host.learn_lora import LoraSession, LoraSettings  # not at every start

        values = shared.single(lists)
        settings = LoraSettings(
            **shared.run_settings(cls, values),
            rank=values["rank"],
            targets=values["layers"],
            single_blocks=values["single_blocks"],
            token_text=values["token_text"].strip(),
            class_text=values["class_text"].strip(),
            class_pictures=values["class_pictures"],
            prior_weight=values["prior_weight"],
            attention_weight=values.get("attention_weight", 0.0),
            slot=values.get("slot", 0),
            tokens_learning_rate=values.get("tokens_learning_rate", 0.0),
            decay=values["weight_decay"],
            clip=values["clip_gradient"],
        )
        model, clip, data = values["model"], values["clip"], values["concept_set"]
        session = LoraSession(
            model,
            clip,
            data,
            settings,
            values.get("continue_from"),
            tokens=values.get("tokens"),
            residuals=tuple(r for r in residuals or () if r is not None),
            prior=values.get("class_set"),
        )
        _, given, text = shared.run(session, values)
        return told(text, *given)


class ApplyCarrier(io.ComfyNode):
    """A model with a learned delta on it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptApplyCarrier",
            display_name="Apply Concept",
            category="concepts/use",
            description="Puts a concept from Learn Concept LoRA on a model, as the stock LoRA loader does. Concepts "
            "made of tokens go to Concept Prompt instead.",
            search_aliases=["load lora", "lora loader", "use lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model it was learned on. It stays as it is."),
                Concept.Input("concept", tooltip="From Learn Concept LoRA, or from Load Concept."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="0: the model as it is, bit for bit. 1: as learned. Less follows prompts more.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="Connect to a sampler.")],
        )

    @classmethod
    def execute(cls, model, concept, strength) -> io.NodeOutput:
        from ..host import lora  # not at every start

        return io.NodeOutput(lora.apply(model, concept, strength))


NODES = [LearnLora, ApplyCarrier]
