"""The embedded toy world: a tiny real model and pictures to learn from, so that everything runs without a download."""

from comfy_api.latest import io


class LoadToyWorld(io.ComfyNode):
    """The pack's own small models, one of SD1's type and one of Flux's."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoadToyWorld",
            display_name="Load Toy World",
            category="concepts/toy",
            description="Loads an embedded toy model: 128 x 128 pictures of simple objects on simple backgrounds. "
            "Works with every stock node and needs no download.",
            search_aliases=["tiny model", "test model", "toybox", "toy flux", "tiny flux"],
            inputs=[
                io.Combo.Input(
                    "type",
                    options=["SD1", "Flux"],
                    default="SD1",
                    optional=True,
                    tooltip="SD1: a UNet, one object per picture; sample with dpmpp_2m, karras. Flux: a diffusion "
                    "transformer, one or two objects; sample with euler, simple. cfg 3 and 20 steps for both.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Denoiser for 16 x 16 latents: noise prediction (SD1) or flow matching (Flux).",
                ),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="Text encoders with the tokenizers of the type: CLIP (SD1), T5 and CLIP (Flux). Their "
                    "words are those of the toy world.",
                ),
                io.Vae.Output(display_name="vae", tooltip="Autoencoder, 8x smaller latents."),
            ],
        )

    @classmethod
    def execute(cls, type="SD1") -> io.NodeOutput:
        from ..host import toybox, toydit  # not at every start

        return io.NodeOutput(*(toydit if type == "Flux" else toybox).load())


class LoadToyReferences(io.ComfyNode):
    """Pictures of a concept that no caption of the toy model ever named, or of two things to learn words from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoadToyReferences",
            display_name="Load Toy References",
            category="concepts/toy",
            description="Draws reference pictures of a concept that the toy model has never seen, or of two things "
            "side by side, with masks and captions.",
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
                    "two things: two known objects side by side, for Learn Modulation on the Flux toy world.",
                ),
                io.Int.Input(
                    "count",
                    default=5,
                    min=1,
                    max=64,
                    tooltip="Number of pictures; backgrounds and positions differ. 3 to 5 are usual for one concept, "
                    "1 for two things, of which every picture shows others.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Another seed gives other pictures of the same concept, for example to judge the result; "
                    "with two things, other objects.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="Pictures, 128 x 128."),
                io.Mask.Output(display_name="masks", tooltip="White where the concept is."),
                io.String.Output(
                    display_name="captions",
                    tooltip="One line per picture with {} in the concept's place. two things: lines with [words], for "
                    "the captions of Learn Modulation; an empty line before those of the next picture.",
                ),
            ],
        )

    @classmethod
    def execute(cls, subject, count, seed) -> io.NodeOutput:
        from ..demo import world  # not at every start
        from ..host.pictures import batch

        if subject == "two things":
            pairs = [world.two_things(seed + i) for i in range(count)]
            pictures, left, right = zip(*(world.render(*pair) for pair in pairs), strict=True)
            captions = "\n\n".join(world.marked_captions(pair) for pair in pairs)
            return io.NodeOutput(batch(pictures), batch(left).maximum(batch(right)), captions)
        scenes = world.references(subject, count, seed)
        drawn = [world.render(scene) for scene in scenes]
        captions = "\n".join(world.reference_caption(scene, "{}") for scene in scenes)
        return io.NodeOutput(batch([p for p, _ in drawn]), batch([m for _, m in drawn]), captions)


NODES = [LoadToyWorld, LoadToyReferences]
