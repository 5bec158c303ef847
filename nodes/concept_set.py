"""Pictures to learn from."""

from comfy_api.latest import io

from .sockets import ConceptSet


class MakeSet(io.ComfyNode):
    """Pictures of one concept, encoded once."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMakeSet",
            display_name="Make Concept Set",
            category="concepts/learn",
            description="Gathers pictures of one concept with masks and captions, and encodes them once. Pictures "
            "may have any "
            "sizes; each is resized and cropped to what the VAE takes.",
            search_aliases=["dataset", "training images", "captions"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures of the concept, as one batch or a list; 3 to 5 are usual."),
                io.Vae.Input("vae", tooltip="The model's own VAE."),
                io.Mask.Input(
                    "masks",
                    optional=True,
                    tooltip="One mask per picture, white where the concept is. Used when the "
                    "learner's masked loss is on.",
                ),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="One caption for all pictures, or one line per picture, with {} or <name> in the concept's "
                    "place. Empty: template sentences.",
                ),
                io.Combo.Input(
                    "template",
                    options=["object", "style"],
                    default="object",
                    tooltip="Which sentences to use when there are no captions: for a thing, or for a way of drawing.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Pictures are resized to about this many pixels squared, keeping their shape. 0 keeps "
                    "sizes; "
                    "512 for SD1.5, 1024 for SDXL and Flux.",
                ),
                io.Boolean.Input(
                    "mirror",
                    default=False,
                    tooltip="Also learn from mirrored pictures. Not for text, faces, or captions that say left or "
                    "right.",
                ),
            ],
            outputs=[ConceptSet.Output(display_name="concept_set", tooltip="Connect to a learner.")],
        )

    @classmethod
    def execute(cls, images, vae, captions, template, resolution, mirror, masks=None) -> io.NodeOutput:
        from ..host.concept_set import make_set  # not at every start

        texts = [line.strip() for text in captions for line in text.splitlines() if line.strip()]
        return io.NodeOutput(
            make_set(
                vae[0], images, masks or [], texts, template=template[0], resolution=resolution[0], mirror=mirror[0]
            )
        )


NODES = [MakeSet]
