"""Using concepts in prompts."""

from comfy_api.latest import io

from .sockets import connected, named_concepts


class EncodePrompt(io.ComfyNode):
    """A prompt with learned concepts in it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptEncodePrompt",
            display_name="Concept Prompt",
            category="concepts/use",
            description="Encodes a prompt in which <name> stands for a learned concept, and <name:word> for a word "
            "that one teaches. The result works in any sampler. Without a <name> it equals the stock text encoder bit "
            "for bit.",
            search_aliases=["clip text encode", "embedding", "textual inversion prompt", "tokenverse", "modulation"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoders of the model the concept was learned on."),
                io.String.Input(
                    "text",
                    default="a photo of <mug>",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Prompt with <name> for each concept. (<name>:1.2) weighs it like any word; long "
                    "prompts are split as usual. <picture1:hat> is the word hat as <picture1> from Learn Modulation "
                    "teaches it, <picture1:hat:0.8> four fifths of it.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="0: the plain word the concept started from. 1: as learned. Above 1 exaggerates. A number "
                    "in <picture1:hat:0.8> multiplies it for this word.",
                ),
                named_concepts(),
                io.Combo.Input(
                    "directions",
                    options=["live", "cached"],
                    default="live",
                    optional=True,
                    advanced=True,
                    tooltip="Of concepts from Learn Modulation. live: made anew for the words of this prompt. cached: "
                    "those stored while learning, the mean over its captions.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="Positive or negative conditioning for any sampler."
                )
            ],
        )

    @classmethod
    def execute(cls, clip, text, strength, concepts, directions="live") -> io.NodeOutput:
        from ..host.prompt import encode_prompt  # not at every start

        given = [(c, strength) for c in connected(concepts)]
        return io.NodeOutput(encode_prompt(clip, text, given, cached=directions == "cached"))


NODES = [EncodePrompt]
