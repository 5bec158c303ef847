"""Pairs of points that show the same part in two pictures."""

from comfy_api.latest import io

from .sockets import Features, told


def sources() -> list:
    """Both features, and which of their maps."""
    return [
        Features.Input("first", tooltip="Features of the picture that is matched or masked."),
        Features.Input("second", tooltip="Features of the other picture, extracted in the same way."),
        io.String.Input(
            "kind", default="dift", tooltip="Which map: dift (what a part is), or query, key, value (how it looks)."
        ),
    ]


class MatchFeatures(io.ComfyNode):
    """DIFT's nearest neighbours (arXiv 2306.03881)."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptMatchFeatures",
            display_name="Match Features",
            category="concepts/match",
            description="Finds the cells of two pictures that show the same part, by the cosine of their features.",
            search_aliases=["dift", "correspondence", "keypoints", "nearest neighbour", "same part"],
            inputs=[
                *sources(),
                io.Int.Input("first_picture", default=0, min=0, max=4095, tooltip="Which of the first, from 0."),
                io.Int.Input("second_picture", default=0, min=0, max=4095, tooltip="Which of the second, from 0."),
                io.Boolean.Input(
                    "mutual",
                    default=True,
                    tooltip="Only pairs that are each other's nearest. Off: the nearest of every cell, as in DIFT.",
                ),
                io.Float.Input(
                    "minimum_score", default=-1.0, min=-1.0, max=1.0, step=0.01, tooltip="Smallest cosine of a pair."
                ),
                io.Int.Input("best", default=0, min=0, max=1000000, tooltip="How many to keep, best first; 0: all."),
                io.Boolean.Input(
                    "finer", default=True, tooltip="Places the second picture's points between its cells."
                ),
                io.Int.Input("shown", default=40, min=1, max=1000, tooltip="Most lines in the picture."),
                io.Mask.Input("first_mask", optional=True, tooltip="Only points of this area of the first picture."),
                io.Mask.Input("second_mask", optional=True, tooltip="Only points of this area of the second picture."),
                io.Image.Input("first_image", optional=True, tooltip="Drawn on the left; grey without it."),
                io.Image.Input("second_image", optional=True, tooltip="Drawn on the right; grey without it."),
                io.Int.Input(
                    "frames",
                    default=81,
                    min=2,
                    max=4096,
                    optional=True,
                    advanced=True,
                    tooltip="Length of the tracks: as many as the video that takes them has.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="picture", tooltip="Lines between both pictures, red for the best score."),
                io.Float.Output(display_name="score", tooltip="Mean cosine of all pairs that were kept."),
                io.String.Output(display_name="points", tooltip="JSON list of pairs: x, y, x, y in pixels and cosine."),
                io.Tracks.Output(
                    display_name="tracks",
                    tooltip="Straight ways from first to second points, in the first picture's pixels; for Wan Move.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        first,
        second,
        kind,
        first_picture,
        second_picture,
        shown,
        first_mask=None,
        second_mask=None,
        first_image=None,
        second_image=None,
        frames=81,
        **how,
    ) -> io.NodeOutput:
        from ..host import matching  # not at every start

        which = (first_picture, second_picture)
        how["minimum"] = how.pop("minimum_score")
        found = matching.matches(first, second, kind.strip(), which, (first_mask, second_mask), **how)
        images = [
            None if given is None or 1 < len(given) <= n else given[n if len(given) > 1 else 0]
            for given, n in zip((first_image, second_image), which, strict=True)
        ]
        text = f"{len(found.score)} pairs, cosine {found.score[0]:.3f} to {found.score[-1]:.3f}"
        picture = matching.joined(found, *images, shown)
        tracks = found.tracks(frames)
        return told(text, picture, float(found.score.mean()), found.json(), tracks)


NODES = [MatchFeatures]
