"""Features of pictures out of the middle of the model."""

from comfy_api.latest import io

from .sockets import Features, connected, named_concepts, told


class ExtractFeatures(io.ComfyNode):
    """What the model holds of pictures, cell by cell."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptExtractFeatures",
            display_name="Extract Features",
            category="concepts/match",
            description="Reads what the model holds of a picture in its middle: features by which equal parts of "
            "different pictures are found (DIFT, PDM), and maps of words.",
            search_aliases=["dift", "pdm", "diffusion features", "correspondence", "semantic features"],
            inputs=[
                io.Model.Input("model", tooltip="SD1.5, SD2, SDXL, SD3 or Flux. It stays as it is."),
                io.Clip.Input("clip", tooltip="The model's text encoders."),
                io.String.Input(
                    "text",
                    default="a photo",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="Prompt that the pictures are looked at under, with <name> for each concept. DIFT's "
                    "authors name the class: a photo of a cat.",
                ),
                io.Combo.Input(
                    "preset",
                    options=["DIFT", "PDM", "DIFT + PDM", "custom"],
                    default="DIFT",
                    tooltip="DIFT: what a part is, for matching. PDM: how it looks, for telling one from another of "
                    "its kind. custom: only the block, layer and words named below.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words of the prompt or <name>, separated by commas, whose attention maps are kept too.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides the noises; the same ones for every picture.",
                ),
                named_concepts(),
                io.Image.Input("image", optional=True, tooltip="Pictures, all of the batch; needs vae."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes image, once for all noises."),
                io.Latent.Input("latent", optional=True, tooltip="Instead of image: latents, all of the batch."),
                io.Int.Input(
                    "timestep",
                    default=-1,
                    min=-1,
                    max=1000,
                    advanced=True,
                    tooltip="Noise level that the model is told, 0 clean to 1000 noise. Low keeps detail, high keeps "
                    "only what things are. -1: the preset's (DIFT 261, PDM 999; SD3 and Flux 260, "
                    "1000).",
                ),
                io.String.Input(
                    "block",
                    default="",
                    advanced=True,
                    tooltip="Block for DIFT, such as output_blocks.5. Empty: the family's. A wrong name lists all.",
                ),
                io.String.Input(
                    "layer",
                    default="",
                    advanced=True,
                    tooltip="Self-attention for queries and keys, such as "
                    "output_blocks.11.1.transformer_blocks.0.attn1 or single_blocks.37. Empty: the last one.",
                ),
                io.Int.Input(
                    "ensemble",
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="Noises that features are averaged over: more is steadier and takes as many passes. 0: the "
                    "preset's (DIFT 8). Without noise one is enough.",
                ),
                io.Combo.Input(
                    "add_noise",
                    options=["auto", "on", "off"],
                    default="auto",
                    advanced=True,
                    tooltip="on: the picture gets the timestep's noise. off: it stays clean and the model is told the "
                    "timestep. auto: DIFT on, PDM off.",
                ),
            ],
            outputs=[
                Features.Output(display_name="features", tooltip="For Show Features, and for matching."),
                io.String.Output(display_name="report", tooltip="What was read, from which layer, at which timestep."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        text,
        preset,
        words,
        seed,
        concepts=None,
        image=None,
        vae=None,
        latent=None,
        timestep=-1,
        block="",
        layer="",
        ensemble=0,
        add_noise="auto",
    ) -> io.NodeOutput:
        from ..host.features import extracted  # not at every start

        given = connected(concepts)
        by_hand = {
            "timestep": None if timestep < 0 else timestep,
            "noise": {"auto": None, "on": True, "off": False}[add_noise],
            "ensemble": ensemble or None,
            "block": block.strip(),
            "layer": layer.strip(),
        }
        features, report = extracted(model, clip, text, given, preset, words, seed, image, vae, latent, **by_hand)
        return told(report, features, report)


class ShowFeatures(io.ComfyNode):
    """Features as colours."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptShowFeatures",
            display_name="Show Features",
            category="concepts/match",
            description="Shows features as colours: their three main directions as red, green and blue, the same for "
            "all pictures, so that equal parts get equal colours.",
            search_aliases=["pca", "dift", "visualize features", "principal components"],
            inputs=[
                Features.Input("features", tooltip="From Extract Features."),
                io.Combo.Input(
                    "kind",
                    options=["auto", "dift", "query", "key", "value", "attention"],
                    default="auto",
                    tooltip="Which map to show; auto: the first one that was extracted. attention: a colour mix of all "
                    "words.",
                ),
                Features.Input(
                    "second_features",
                    optional=True,
                    tooltip="Other pictures in the same colours; extracted with the same model and settings.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Foreground of the pictures, one each or one for all: colours are spent on it alone, the "
                    "rest is dark.",
                ),
                io.Mask.Input("second_mask", optional=True, tooltip="Foreground of the second features' pictures."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images",
                    tooltip="A picture each, those of second_features behind and scaled to the same size.",
                )
            ],
        )

    @classmethod
    def execute(cls, features, kind, second_features=None, mask=None, second_mask=None) -> io.NodeOutput:
        from ..host.feature_pictures import coloured  # not at every start

        return io.NodeOutput(coloured(features, kind, second_features, mask, second_mask))


NODES = [ExtractFeatures, ShowFeatures]
