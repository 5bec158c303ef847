"""The embedded toy world: a tiny real model and pictures to learn from, so that everything runs without a download."""

from comfy_api.latest import io


class LoadToyWorld(io.ComfyNode):
    """The pack's own small SD1-type model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoadToyWorld",
            display_name="Load Toy World",
            category="concepts/toy",
            description="Loads the embedded toy model: 128 x 128 pictures of simple objects on simple backgrounds. "
            "Works with every stock node and needs no download.",
            search_aliases=["tiny model", "test model", "toybox"],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="SD1-type denoiser (noise prediction) for 16 x 16 latents."
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="Text encoder with CLIP's tokenizer; its words are those of the toy world.",
                ),
                io.Vae.Output(display_name="vae", tooltip="Autoencoder, 8x smaller latents."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        from ..host import toybox  # not at every start

        return io.NodeOutput(*toybox.load())


class LoadToyReferences(io.ComfyNode):
    """Pictures of a concept that no caption of the toy model ever named."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoadToyReferences",
            display_name="Load Toy References",
            category="concepts/toy",
            description="Draws reference pictures of a concept that the toy model has never seen, with masks and "
            "captions.",
            search_aliases=["example images", "toy dataset", "training images"],
            inputs=[
                io.Combo.Input(
                    "subject",
                    options=[
                        "crown",
                        "umbrella",
                        "rocket",
                        "duck",
                        "cross-mug",
                        "bolt-house",
                        "clover-bottle",
                        "zigzag-mug",
                        "ring-heart",
                        "quartered-bell",
                        "red-blue-hat",
                        "white-green-star",
                        "purple-orange-fish",
                        "poster-style",
                    ],
                    default="cross-mug",
                    tooltip="What is on the pictures: new outlines, emblems, patterns, two-colour objects or a style.",
                ),
                io.Int.Input(
                    "count",
                    default=5,
                    min=1,
                    max=64,
                    tooltip="Number of pictures; backgrounds and positions differ. 3 to 5 are usual for one concept.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    tooltip="Another seed gives other pictures of the same concept, for example to judge the result.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Pictures, 128 x 128."),
                io.Mask.Output(display_name="masks", tooltip="White where the concept is."),
                io.String.Output(
                    display_name="captions", tooltip="One line per picture with {} in the concept's place."
                ),
            ],
        )

    @classmethod
    def execute(cls, subject, count, seed) -> io.NodeOutput:
        from ..demo import world  # not at every start
        from ..host.pictures import batch

        scenes = world.references(subject, count, seed)
        drawn = [world.render(scene) for scene in scenes]
        captions = "\n".join(world.reference_caption(scene, "{}") for scene in scenes)
        return io.NodeOutput(batch([p for p, _ in drawn]), batch([m for _, m in drawn]), captions)


NODES = [LoadToyWorld, LoadToyReferences]
