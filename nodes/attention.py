"""Looking at attention."""

from comfy_api.latest import io

from .sockets import connected, named_concepts


class ShowAttention(io.ComfyNode):
    """Attention maps of words, over a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptShowAttention",
            display_name="Show Attention",
            category="concepts/inspect",
            description="Shows which pixels of a picture look at which word of a prompt, learned concepts included, at "
            "one or several noise levels.",
            search_aliases=["attention map", "daam", "heatmap", "cross attention", "segment by word"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2, SDXL, SD3 or Flux. It stays as it is."),
                io.Clip.Input("clip", tooltip="The model's text encoders."),
                io.String.Input(
                    "text",
                    default="a photo of <mug>",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Prompt that the picture is looked at under, with <name> for each concept.",
                ),
                io.String.Input(
                    "words",
                    default="<mug>, photo",
                    tooltip="Words of the prompt to show, separated by commas: plain words or <name>.",
                ),
                io.String.Input(
                    "noise_levels",
                    default="0.5",
                    tooltip="Times of the noise schedule, 0 clean to 1 pure noise, separated by commas. A concept with "
                    "five stages shows all of them at 0.1, 0.3, 0.5, 0.7, 0.9.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides the noise that is laid over the picture.",
                ),
                named_concepts(),
                io.Image.Input("image", optional=True, tooltip="Picture to look at; needs vae. The first of a batch."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes image, or decodes latent for the background."),
                io.Latent.Input("latent", optional=True, tooltip="Instead of image: a latent. The first of a batch."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="overlays",
                    tooltip="A row per word, a column per noise level and size of maps; below each, the word's share "
                    "of the attention.",
                ),
                io.Mask.Output(display_name="mask", tooltip="Map of the first word, mean over all shown, from 0 to 1."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, text, words, noise_levels, seed, concepts=None, image=None, vae=None, latent=None
    ) -> io.NodeOutput:
        from ..host.show import shown  # not at every start

        return io.NodeOutput(
            *shown(model, clip, text, connected(concepts), words, noise_levels, seed, image, vae, latent)
        )


NODES = [ShowAttention]
