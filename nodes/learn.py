"""Learning a concept's word vectors."""

from comfy_api.latest import io

from . import inputs as shared
from .sockets import told


class LearnTokens(io.ComfyNode):
    """Textual Inversion (arXiv 2208.01618) and Directional Textual Inversion on the connected model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLearnTokens",
            display_name="Learn Concept Tokens",
            category="concepts/learn",
            description="Learns new word vectors from pictures (Textual Inversion). Neither the model nor the text "
            "encoder changes. "
            "The state is saved while it learns; an interrupt keeps it in output/concepts/autosave.",
            search_aliases=["textual inversion", "embedding training", "ti", "train", "directional textual inversion"],
            is_output_node=True,
            inputs=[
                *shared.sources("mug"),
                io.Combo.Input(
                    "init",
                    options=["word", "text", "random"],
                    default="word",
                    tooltip="Where the vectors start: the mean of a word, the words of a text in order, or noise "
                    "with the "
                    "vocabulary's statistics.",
                ),
                io.String.Input(
                    "init_text",
                    default="",
                    tooltip="The class word or text to start from, for example: mug. Also what "
                    "the concept falls back to at strength 0.",
                ),
                io.Int.Input(
                    "vectors",
                    default=1,
                    min=1,
                    max=32,
                    tooltip="Vectors per text encoder. More hold more detail and follow prompts less; 1 to 4 are "
                    "usual.",
                ),
                *shared.pace(
                    400,
                    0.005,
                    "Optimiser steps. The toy world needs 200 to 400; the papers use 400 to 6,000 on SD1.5.",
                    "Step size. 0.005 is Textual Inversion's; 0.01 is usual with a fixed norm. Too high: "
                    "the loss jumps.",
                ),
                io.Combo.Input(
                    "geometry",
                    options=["free", "fixed norm"],
                    default="free",
                    tooltip="free: Textual Inversion. fixed norm: Directional Textual Inversion, where only the "
                    "direction of a "
                    "vector is learned and its norm stays that of the start.",
                ),
                io.Float.Input(
                    "prior",
                    default=1e-4,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    advanced=True,
                    tooltip="Pull towards the class word's direction with a fixed norm (kappa of Directional TI, "
                    "1e-4 there). "
                    "0 turns it off.",
                ),
                *shared.noise(),
                *shared.ticks(),
                *shared.keeping(),
                io.Combo.Input(
                    "layers",
                    options=["shared", "each"],
                    default="shared",
                    optional=True,
                    advanced=True,
                    tooltip="each: rows of their own for every cross-attention layer (P+: 16 layers in SD1.5, 500 "
                    "steps). Not for SD3 and Flux, which have none.",
                ),
                io.Int.Input(
                    "stages",
                    default=1,
                    min=1,
                    max=10,
                    optional=True,
                    advanced=True,
                    tooltip="Rows of their own for so many equal parts of the noise schedule (ProSpect: 10). 1: the "
                    "same rows from noise to picture.",
                ),
                io.Combo.Input(
                    "mapper",
                    options=["none", "NeTI"],
                    default="none",
                    optional=True,
                    advanced=True,
                    tooltip="NeTI: instead of vectors, a small network that makes them from time and layer (paper: "
                    "1000 steps, learning_rate 0.001 x batch 2 x accumulate 4). Of init_text it takes only the length. "
                    "Wants vectors 1, geometry free, layers shared, stages 1; not for SD3 and Flux.",
                ),
                *shared.continued(),
            ],
            outputs=shared.outputs(),
        )

    @classmethod
    def execute(
        cls, model, clip, concept_set, continue_from=None, layers="shared", stages=1, mapper="none", **values
    ) -> io.NodeOutput:
        from ..host.learn_neti import NetiSession, NetiSettings, check_alone  # not at every start
        from ..host.learn_tokens import TokenSession, TokenSettings

        same = shared.run_settings(cls, values | {"stages": stages}) | {
            "init": values["init"],
            "init_text": values["init_text"].strip(),
            "encoders": shared.chosen(clip, values),
        }
        own = {"vectors": values["vectors"], "geometry": values["geometry"], "layers": layers, "stages": stages}
        if mapper == "NeTI":
            check_alone(**own)
            session = NetiSession(model, clip, concept_set, NetiSettings(**same), continue_from)
        else:
            settings = TokenSettings(**same, **own, kappa=values["prior"])
            session = TokenSession(model, clip, concept_set, settings, continue_from)
        _, given, text = shared.run(session, values)
        return told(text, *given)


NODES = [LearnTokens]
