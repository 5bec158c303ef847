"""A point or the masked part of one picture, found in others, and which of them show it."""

from comfy_api.latest import io

from .matching import sources
from .sockets import Features, told


class MatchPoint(io.ComfyNode):
    """DIFT's heat map of a point (arXiv 2306.03881)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMatchPoint",
            display_name="Match Point",
            category="concepts/match",
            description="Shows how alike every place of other pictures is to one point of a picture, and where it is "
            "most alike.",
            search_aliases=["heat map", "click point", "similarity map", "dift", "correspondence", "same part"],
            inputs=[
                *sources(),
                io.Float.Input(
                    "x", default=64.0, min=0.0, max=16384.0, step=1.0, tooltip="Pixels from the first picture's left."
                ),
                io.Float.Input(
                    "y", default=64.0, min=0.0, max=16384.0, step=1.0, tooltip="Pixels from the first picture's top."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Instead of x and y: a dot in the first picture, such as one painted in Load Image's mask "
                    "editor. Its middle is the point.",
                ),
                io.Image.Input("first_image", optional=True, tooltip="Drawn on the left; grey without it."),
                io.Image.Input("second_images", optional=True, tooltip="Drawn under the heat; grey without them."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="pictures",
                    tooltip="One per picture of second: the point on the left, the heat and the best place on the "
                    "right.",
                ),
                io.Mask.Output(
                    display_name="heat",
                    tooltip="One per picture of second: cosines, 0 for the lowest of all of them, 1 for the highest.",
                ),
                io.String.Output(
                    display_name="points",
                    tooltip="JSON list, one per picture of second: x, y, best x, best y in pixels and cosine.",
                ),
            ],
        )

    @classmethod
    def execute(cls, first, second, kind, x, y, mask=None, first_image=None, second_images=None) -> io.NodeOutput:
        from ..host import finding  # not at every start

        if mask is not None:
            x, y = finding.centre(mask, first)
        found = finding.places(first, second, kind.strip(), x, y)
        pictures = finding.shown(found, first, None if first_image is None else first_image[0], second_images)
        return told(found.json(), pictures, found.masks(), found.json())


class TransferMask(io.ComfyNode):
    """PDM's votes (arXiv 2405.18025) and DIFT's label propagation (arXiv 2306.03881)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptTransferMask",
            display_name="Transfer Mask",
            category="concepts/match",
            description="Finds where the masked part of one picture is in other pictures, by their features.",
            search_aliases=["segment by reference", "mask propagation", "dift", "warp mask", "same object"],
            inputs=[*sources(), io.Mask.Input("mask", tooltip="The part, in the first picture of the first features.")],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="One per picture of the second features, from 0 to 1.")
            ],
        )

    @classmethod
    def execute(cls, first, second, kind, mask) -> io.NodeOutput:
        from ..host import finding  # not at every start

        return io.NodeOutput(finding.transferred(first, second, kind.strip(), mask))


class FindPicture(io.ComfyNode):
    """PDM's retrieval (arXiv 2405.18025)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptFindPicture",
            display_name="Find Picture",
            category="concepts/match",
            description="Says which of several pictures shows the masked thing of another picture, by their features.",
            search_aliases=["retrieval", "pdm", "which image contains", "image search", "same object"],
            inputs=[
                Features.Input("reference", tooltip="Its first picture shows the thing. PDM's maps count too."),
                Features.Input("candidates", tooltip="Pictures to look in, extracted in the same way."),
                io.Mask.Input(
                    "mask", optional=True, tooltip="The thing in the reference; without it the whole picture counts."
                ),
            ],
            outputs=[
                io.Int.Output(
                    display_name="best", tooltip="Which candidate shows it most surely, from 0; for Image From Batch."
                ),
                io.Float.Output(display_name="score", tooltip="That candidate's score, 1 at most."),
                io.String.Output(display_name="order", tooltip="JSON list of picture and score, best first."),
                io.Image.Output(display_name="chart", tooltip="All candidates and their scores as bars, best first."),
            ],
        )

    @classmethod
    def execute(cls, reference, candidates, mask=None) -> io.NodeOutput:
        from ..host import finding  # not at every start

        found = finding.ranked(reference, candidates, mask)
        best, score = found.order[0]
        return told(found.text(), best, score, found.json(), found.chart())


NODES = [MatchPoint, TransferMask, FindPicture]
