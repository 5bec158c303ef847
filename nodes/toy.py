"""The embedded toy world: a tiny real model and pictures to learn from, so that everything runs without a download."""

import functools

from comfy_api.latest import io


class LoadToyWorld(io.ComfyNode):
    """The pack's own small models."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoadToyWorld",
            display_name="Load Toy World",
            category="concepts/toy",
            description="Loads the embedded toy model: 128 x 128 pictures of simple objects on simple backgrounds. "
            "Works with every stock node and needs no download.",
            search_aliases=["tiny model", "test model", "toybox", "toy flux"],
            inputs=[
                io.Combo.Input(
                    "type",
                    options=["SD1", "Flux"],
                    default="SD1",
                    optional=True,
                    tooltip="SD1: a UNet with CLIP, for everything but Learn Modulation. Flux: a transformer with CLIP "
                    "and T5 that also draws two objects side by side; sample it with euler, simple, cfg 3.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="Denoiser for 16 x 16 latents: noise prediction (SD1) or flow (Flux)."
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="Text encoders with the usual tokenizers; their words are those of the toy world.",
                ),
                io.Vae.Output(display_name="vae", tooltip="Autoencoder, 8x smaller latents."),
            ],
        )

    @classmethod
    def execute(cls, type="SD1") -> io.NodeOutput:
        from ..host import toybox, toydit  # not at every start

        return io.NodeOutput(*(toybox if type == "SD1" else toydit).load())


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
                        "two things",
                    ],
                    default="cross-mug",
                    tooltip="What is on the pictures: new outlines, emblems, patterns, two-colour objects or a style. "
                    "two things: two ordinary objects side by side, their captions with marked words for Learn "
                    "Modulation; each seed is another pair, so take count 1.",
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
        from PIL import ImageChops  # not at every start

        from ..demo import world
        from ..host.pictures import batch

        if subject == "two things":
            scenes = [world.two_things(seed + i) for i in range(count)]
            captions = "\n\n".join(world.marked_captions(both) for both in scenes)
        else:
            scenes = [(scene,) for scene in world.references(subject, count, seed)]
            captions = "\n".join(world.reference_caption(scene, "{}") for (scene,) in scenes)
        drawn = [world.render(*objects) for objects in scenes]
        masks = [functools.reduce(ImageChops.lighter, own) for _, *own in drawn]
        return io.NodeOutput(batch([picture for picture, *_ in drawn]), batch(masks), captions)


NODES = [LoadToyWorld, LoadToyReferences]
