"""Grounds, outlines and surfaces of the toy world."""

import math
import random

from PIL import Image, ImageDraw

SIZE = 128
OVERSAMPLE = 2
COLOURS = {
    "red": (214, 40, 44),
    "green": (34, 160, 84),
    "blue": (36, 86, 230),
    "yellow": (246, 206, 30),
    "purple": (138, 56, 176),
    "white": (244, 244, 244),
    "black": (38, 38, 42),
    "orange": (238, 126, 24),
}


def background(name: str, rng: random.Random) -> Image.Image:
    """A ground [SIZE]. Raises: ValueError for an unknown one."""
    s = SIZE
    image = Image.new("RGB", (s, s))
    d = ImageDraw.Draw(image)
    shade = rng.uniform(0.92, 1.08)

    def tone(*rgb):
        return tuple(max(0, min(255, int(v * shade))) for v in rgb)

    if name == "grass":
        d.rectangle([0, 0, s, s], fill=tone(104, 176, 84))
        for _ in range(70):
            x, y = rng.random() * s, rng.random() * s
            d.line([x, y, x + rng.uniform(-3, 3), y - 8], fill=tone(58, 128, 54), width=2)
    elif name == "brick":
        d.rectangle([0, 0, s, s], fill=tone(164, 88, 66))
        top = rng.randrange(16)
        for row, y in enumerate(range(-top, s + 16, 16)):
            d.line([0, y, s, y], fill=tone(212, 202, 192), width=2)
            for x in range(-(row % 2) * 16, s, 32):
                d.line([x, y, x, y + 16], fill=tone(212, 202, 192), width=2)
    elif name == "sky":
        for y in range(s):
            d.line([0, y, s, y], fill=tone(120 + y // 2, 184 + y // 4, 244))
        for _ in range(3):
            x, y = rng.random() * s, rng.random() * s
            for k in range(4):
                d.ellipse([x + k * 9 - 12, y - 8, x + k * 9 + 12, y + 8], fill=(252, 252, 252))
    elif name == "sand":
        d.rectangle([0, 0, s, s], fill=tone(232, 206, 152))
        shift = rng.random() * 14
        for y in range(-14, s, 14):
            d.line(
                [(x, y + shift + 4 * math.sin(x / 9 + y)) for x in range(0, s + 4, 4)],
                fill=tone(204, 172, 112),
                width=2,
            )
    elif name == "wood":
        d.rectangle([0, 0, s, s], fill=tone(152, 106, 64))
        for x in range(-rng.randrange(22), s, 22):
            d.line([x, 0, x, s], fill=tone(96, 62, 36), width=3)
    elif name == "snow":
        d.rectangle([0, 0, s, s], fill=tone(214, 226, 238))
        for _ in range(40):
            x, y = rng.random() * s, rng.random() * s
            d.ellipse([x - 2.5, y - 2.5, x + 2.5, y + 2.5], fill=(255, 255, 255))
    elif name == "water":
        d.rectangle([0, 0, s, s], fill=tone(44, 142, 172))
        for _ in range(22):
            x, y = rng.random() * s, rng.random() * s
            d.arc([x - 9, y - 5, x + 9, y + 5], 180, 360, fill=tone(150, 220, 226), width=2)
    elif name == "night":
        d.rectangle([0, 0, s, s], fill=tone(24, 22, 66))
        for _ in range(26):
            x, y = rng.random() * s, rng.random() * s
            d.ellipse([x - 1.6, y - 1.6, x + 1.6, y + 1.6], fill=(250, 240, 190))
    else:
        raise ValueError(f"unknown background {name!r}")
    return image


def silhouette(shape: str, cx: float, cy: float, s: float, outline: tuple = ()) -> Image.Image:
    """Mask [SIZE x OVERSAMPLE] of a shape with half-height ``s``; all lengths in oversampled pixels."""
    mask = Image.new("L", (SIZE * OVERSAMPLE,) * 2)
    d = ImageDraw.Draw(mask)

    def box(x0, y0, x1, y1):
        return [cx + x0 * s, cy + y0 * s, cx + x1 * s, cy + y1 * s]

    def poly(*points, fill=255):
        d.polygon([(cx + x * s, cy + y * s) for x, y in points], fill=fill)

    def star(points, inner, phase=0.0):
        return [
            (
                math.sin(k * math.pi / points + phase) * (1 if k % 2 == 0 else inner),
                -math.cos(k * math.pi / points + phase) * (1 if k % 2 == 0 else inner),
            )
            for k in range(2 * points)
        ]

    if shape == "thing":
        lobes, spiky, aspect, phase = outline
        radius = [(1 - spiky * (0.5 - 0.5 * math.cos(lobes * a)), a) for a in (k * math.tau / 180 for k in range(180))]
        wide, tall = min(1.0, aspect), min(1.0, 1 / aspect)
        poly(*[(wide * r * math.sin(a + phase), tall * r * math.cos(a + phase)) for r, a in radius])
    elif shape == "mug":
        d.rectangle(box(-0.75, -0.8, 0.4, 0.8), fill=255)
        d.ellipse(box(0.05, -0.45, 0.95, 0.45), outline=255, width=max(2, int(0.2 * s)))
    elif shape == "hat":
        d.rectangle(box(-0.5, -0.8, 0.5, 0.45), fill=255)
        d.ellipse(box(-1, 0.2, 1, 0.7), fill=255)
    elif shape == "star":
        poly(*star(5, 0.42))
    elif shape == "fish":
        d.ellipse(box(-1, -0.55, 0.5, 0.55), fill=255)
        poly((0.2, 0), (1, -0.65), (1, 0.65))
    elif shape == "house":
        d.rectangle(box(-0.7, -0.15, 0.7, 0.9), fill=255)
        poly((-1, -0.1), (0, -1), (1, -0.1))
    elif shape == "tree":
        d.rectangle(box(-0.16, 0.3, 0.16, 1), fill=255)
        d.ellipse(box(-0.75, -1, 0.75, 0.5), fill=255)
    elif shape == "key":
        d.ellipse(box(-1, -0.5, 0, 0.5), outline=255, width=max(3, int(0.24 * s)))
        d.rectangle(box(-0.1, -0.13, 1, 0.13), fill=255)
        d.rectangle(box(0.55, 0, 0.8, 0.5), fill=255)
    elif shape == "heart":
        d.ellipse(box(-1, -0.8, 0.04, 0.24), fill=255)
        d.ellipse(box(-0.04, -0.8, 1, 0.24), fill=255)
        poly((-0.93, -0.08), (0.93, -0.08), (0, 1))
    elif shape == "boat":
        poly((-1, 0.3), (1, 0.3), (0.6, 0.85), (-0.6, 0.85))
        poly((-0.05, -1), (-0.05, 0.15), (-0.75, 0.15))
        poly((0.08, -0.7), (0.08, 0.15), (0.7, 0.15))
    elif shape == "bottle":
        d.rounded_rectangle(box(-0.45, -0.25, 0.45, 1), radius=0.2 * s, fill=255)
        d.rectangle(box(-0.17, -1, 0.17, 0), fill=255)
    elif shape == "moon":
        d.ellipse(box(-0.95, -0.95, 0.95, 0.95), fill=255)
        d.ellipse(box(-0.35, -0.95, 1.3, 0.7), fill=0)
    elif shape == "bell":
        d.pieslice(box(-0.65, -0.9, 0.65, 0.5), 180, 360, fill=255)
        poly((-0.65, -0.25), (0.65, -0.25), (0.95, 0.65), (-0.95, 0.65))
        d.ellipse(box(-0.22, 0.55, 0.22, 0.99), fill=255)
    elif shape == "crown":
        poly((-0.9, 0.7), (-1, -0.6), (-0.45, 0.05), (0, -0.85), (0.45, 0.05), (1, -0.6), (0.9, 0.7))
    elif shape == "umbrella":
        d.pieslice(box(-1, -0.9, 1, 0.9), 180, 360, fill=255)
        d.rectangle(box(-0.08, 0, 0.08, 0.85), fill=255)
        d.arc(box(-0.5, 0.6, 0.08, 1), 0, 180, fill=255, width=max(2, int(0.15 * s)))
    elif shape == "rocket":
        poly((0, -1), (0.4, -0.4), (0.4, 0.5), (0.8, 1), (-0.8, 1), (-0.4, 0.5), (-0.4, -0.4))
    elif shape == "duck":
        d.ellipse(box(-0.9, -0.1, 0.7, 0.85), fill=255)
        d.ellipse(box(0.1, -0.85, 0.8, -0.05), fill=255)
        poly((0.7, -0.6), (1, -0.4), (0.7, -0.3))
        poly((-0.9, -0.25), (-0.4, 0.4), (-0.85, 0.5))
    elif shape == "dot":
        d.ellipse(box(-1, -1, 1, 1), fill=255)
    elif shape == "ring":
        d.ellipse(box(-1, -1, 1, 1), outline=255, width=max(2, int(0.45 * s)))
    elif shape == "square":
        d.rectangle(box(-0.9, -0.9, 0.9, 0.9), fill=255)
    elif shape == "bar":
        d.rectangle(box(-1, -0.4, 1, 0.4), fill=255)
    elif shape == "cross":
        d.rectangle(box(-1, -0.35, 1, 0.35), fill=255)
        d.rectangle(box(-0.35, -1, 0.35, 1), fill=255)
    elif shape == "bolt":
        poly((0.2, -1), (-0.7, 0.2), (0, 0.2), (-0.2, 1), (0.7, -0.25), (0.05, -0.25))
    elif shape == "clover":
        for x, y in ((0, -0.5), (-0.5, 0.3), (0.5, 0.3)):
            d.ellipse(box(x - 0.5, y - 0.5, x + 0.5, y + 0.5), fill=255)
    else:
        raise ValueError(f"unknown shape {shape!r}")
    return mask


def texture(colour: str, pattern: str, second: str, cx: float, cy: float) -> Image.Image:
    """Object surface [SIZE x OVERSAMPLE], anchored to the object so that it moves with it."""
    big = SIZE * OVERSAMPLE
    base = COLOURS[colour]
    ink = tuple(int(v * 0.42) for v in base) if sum(base) > 240 else (206, 206, 206)
    image = Image.new("RGB", (big, big), base)
    d = ImageDraw.Draw(image)
    if second:
        d.rectangle([0, cy, big, big], fill=COLOURS[second])
    left, top = int(cx) % 48 - 48, int(cy) % 48 - 48
    if pattern == "striped":
        for x in range(left - big, big * 2, 32):
            d.line([x, 0, x + big // 2, big], fill=ink, width=13)
    elif pattern == "banded":
        for y in range(top, big, 30):
            d.rectangle([0, y, big, y + 12], fill=ink)
    elif pattern == "dotted":
        for row, y in enumerate(range(top, big, 26)):
            for x in range(left + (row % 2) * 15, big, 30):
                d.ellipse([x - 8, y - 8, x + 8, y + 8], fill=ink)
    elif pattern == "checkered":
        for row, y in enumerate(range(top, big, 24)):
            for x in range(left + (row % 2) * 24, big, 48):
                d.rectangle([x, y, x + 23, y + 23], fill=ink)
    elif pattern == "zigzag":
        for y in range(top - 48, big + 48, 34):
            d.line([(x, y + (18 if (x // 18) % 2 else 0)) for x in range(left, big + 18, 18)], fill=ink, width=11)
    elif pattern == "rings":
        for r in range(14, 120, 26):
            d.ellipse([cx - r, cy - r, cx + r, cy + r], outline=ink, width=10)
    elif pattern == "quartered":
        d.rectangle([cx, 0, big, cy], fill=ink)
        d.rectangle([0, cy, cx, big], fill=ink)
    elif pattern != "plain":
        raise ValueError(f"unknown pattern {pattern!r}")
    return image
