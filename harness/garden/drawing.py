"""Flowers drawn with Pillow: an offline, deterministic data set for fine-grained classification.

A species is a combination of petal count, petal shape, colour, centre and arrangement. Many species share most of
these, so no single attribute (colour least of all) tells them apart. A picture shows one plant of a species under
random conditions: background, light, viewing angle, distance, irregular growth, things in front, sensor noise.

Lengths are in one of three units. Flower units: the petals of a flower reach to 1. Picture units: the picture is 1
wide. Canvas pixels: pixels of the supersampled drawing, `SUPERSAMPLING` of which make one pixel of the picture.
Angles are in radians. Colours are red, green, blue in 0..255.
"""

import hashlib
from dataclasses import dataclass, replace
from math import cos, pi, sin, tau

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from harness.garden.species import ROSE, VIOLET, WHITE, YELLOW, Arrangement, Centre, Colour, Shape, Species

# Increment when a pixel changes: it is part of the keys of caches and weights.
DRAWING_VERSION = 1

SUPERSAMPLING = 3

GOLD, RUST, CREAM, PLUM = (246, 196, 60), (176, 104, 30), (255, 248, 214), (120, 24, 60)
BROWN, SOOT, LIME, GREEN = (66, 40, 30), (46, 28, 21), (150, 176, 70), (84, 124, 60)

Array = NDArray[np.float64]


def _rotation(angle: float) -> Array:
    return np.array(((cos(angle), -sin(angle)), (sin(angle), cos(angle))))


def _polar(angle: Array, radius: Array | float = 1.0) -> Array:
    """Points, one row each, from their angles and distances."""
    return np.stack([np.cos(angle) * radius, np.sin(angle) * radius], axis=-1)


def _outline(*half: tuple[float, float]) -> Array:
    """A closed outline from control points of its upper half, base to tip: corners cut twice, then mirrored."""
    points = np.array(half)
    for _ in range(2):
        cut = np.stack([0.75 * points[:-1] + 0.25 * points[1:], 0.25 * points[:-1] + 0.75 * points[1:]], axis=1)
        points = np.concatenate([points[:1], cut.reshape(-1, 2), points[-1:]])
    return np.concatenate([points, points[::-1] * (1, -1)])


# One petal pointing along +x, base at 0, tip at 1; the height suits a ring of five.
OUTLINES = {
    Shape.ROUND: _outline((0, 0.1), (0.35, 0.36), (0.75, 0.68), (1.03, 0.42), (1.03, 0)),
    Shape.POINTED: _outline((0, 0.06), (0.25, 0.22), (0.55, 0.37), (0.8, 0.18), (1.08, 0)),
    Shape.HEART: _outline((0, 0.06), (0.35, 0.22), (0.75, 0.74), (1.1, 0.5), (1.08, 0.14), (0.68, 0)),
    Shape.STRAP: _outline((0, 0.12), (0.2, 0.25), (0.9, 0.25), (1.03, 0.16), (1.03, 0)),
    Shape.NOTCHED: _outline((0, 0.06), (0.4, 0.12), (0.9, 0.5), (1.12, 0.5), (0.94, 0.22), (1.06, 0.0)),
    Shape.TEARDROP: _outline((0, 0.04), (0.45, 0.1), (0.72, 0.5), (1.04, 0.36), (1.04, 0)),
}
LEAF = _outline((0, 0.02), (0.2, 0.2), (0.55, 0.28), (0.85, 0.08), (1, 0))
BLADE = _outline((0, 0.05), (0.4, 0.06), (0.8, 0.03), (1, 0))
TUBE = _outline((-1.3, 0.12), (-1.3, 0.4), (-0.8, 0.5), (-0.3, 0.42), (0.1, 0.6), (0.1, 0))[:, ::-1]
CENTRE_DISCS: dict[Centre, tuple[tuple[float, Colour], ...]] = {  # radius and colour, largest first
    Centre.SMALL: ((0.15, RUST), (0.12, GOLD)),
    Centre.LARGE: ((0.34, RUST), (0.31, GOLD)),
    Centre.RINGED: ((0.33, CREAM), (0.25, PLUM), (0.13, GOLD)),
    Centre.DARK: ((0.25, SOOT), (0.2, BROWN), (0.08, RUST)),
    Centre.STARRED: ((0.12, GOLD),),
}
CIRCLE = _polar(tau * np.arange(20) / 20)


@dataclass(frozen=True)
class _Pose:
    """An affine map from an object's own units to canvas pixels: a matrix and an offset."""

    matrix: Array
    offset: Array

    def __call__(self, points: Array) -> Array:
        return points @ self.matrix.T + self.offset

    def moved(self, x: float, y: float, scale: float, squeeze: float = 1.0) -> "_Pose":
        """Return the pose of a part at x, y, `scale` times as large and flattened along y by `squeeze`."""
        return _Pose(self.matrix * (scale, scale * squeeze), self(np.array((x, y))))


def _shade(colour: Colour, factor: float, alpha: int = 255) -> tuple[int, int, int, int]:
    """Make the colour darker (factor below 1) or paler (above 1: mixed with white)."""
    if factor > 1:
        red, green, blue = (round(255 - (255 - part) * (2 - min(factor, 2.0))) for part in colour)
    else:
        red, green, blue = (round(part * factor) for part in colour)
    return red, green, blue, alpha


class _Scene:
    """One picture being drawn: the canvas, its random generator, and the angle of the light."""

    def __init__(self, rng: np.random.Generator, canvas: Image.Image) -> None:
        self.rng = rng
        self.canvas = canvas
        self.pen = ImageDraw.Draw(canvas, "RGBA")
        self.light = rng.uniform(0, tau)

    def fill(self, points: Array, colour: tuple[int, int, int, int]) -> None:
        self.pen.polygon(points.ravel().tolist(), fill=colour)

    def greenery(self, outline: Array, start: Array, angle: float, length: float, width: float) -> None:
        """Draw a bent leaf or blade from `start`, `length` long (picture units); `width` scales that of its outline."""
        rng, side = self.rng, self.canvas.width
        green = (int(rng.uniform(50, 120)), int(rng.uniform(105, 165)), int(rng.uniform(35, 80)))
        x, y = outline[:, 0], outline[:, 1]
        bent = np.stack([x * length, y * width + rng.normal(0, 0.18) * length * x * x], axis=1)
        points = (bent @ _rotation(angle).T + start) * side
        self.fill(points, _shade(green, rng.uniform(0.5, 0.95)))
        half = len(points) // 2
        self.fill(points[:half], _shade(green, rng.uniform(0.75, 1.15)))


def _background(rng: np.random.Generator, side: int) -> Image.Image:
    """Soil, sky, shade or meadow, out of focus: drawn tiny and enlarged, which blurs it."""
    tiny = 24
    grounds = (((104, 78, 54), (66, 48, 36)), ((150, 192, 232), (206, 222, 232)), ((30, 56, 36), (60, 92, 48)),
               ((104, 140, 62), (62, 100, 52)), ((168, 172, 120), (92, 120, 66)))  # fmt: skip
    first, second = np.array(grounds[rng.integers(len(grounds))], dtype=float)
    angle = rng.uniform(0, tau)
    x, y = np.meshgrid(np.linspace(-0.5, 0.5, tiny), np.linspace(-0.5, 0.5, tiny))
    ramp = np.clip(0.5 + x * cos(angle) + y * sin(angle), 0, 1)[..., None]
    ground = first + (second - first) * ramp + rng.normal(0, 12, (tiny, tiny, 1))
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image, "RGBA")
    spots = (VIOLET, WHITE, YELLOW, ROSE, LIME, LIME, (40, 70, 40), (40, 70, 40), (190, 200, 150))
    for _ in range(rng.integers(2, 11)):
        (across, down), radius = rng.uniform(0, tiny, 2), rng.uniform(1.2, 4)
        colour = _shade(spots[rng.integers(len(spots))], rng.uniform(0.6, 1.1), int(rng.uniform(50, 190)))
        pen.ellipse((across - radius, down - radius, across + radius, down + radius), fill=colour)
    return image.filter(ImageFilter.GaussianBlur(0.8)).resize((side, side), Image.Resampling.BICUBIC)


def _ring(scene: _Scene, species: Species, pose: _Pose, length: float, phase: float, tone: float) -> None:
    """One ring of petals reaching to `length` (flower units), turned by `phase`; `tone` darkens or pales it."""
    rng, count, outline = scene.rng, species.petals, OUTLINES[species.shape]
    angle = phase + tau * np.arange(count) / count + rng.normal(0, 0.2 / count, count)
    long = length * (1 + rng.normal(0, 0.05, count))
    wide = length * (5 / count) ** 0.75 * (1 + rng.normal(0, 0.07, count))
    # Three nested outlines for each petal: its rim, its body, and a glow towards the tip.
    inset, shrink = np.array(((0.0, 1.0), (0.05, 0.87), (0.38, 0.5))).T[:, :, None, None]
    # A petal lies along x, bends in y, and is then rotated around the middle.
    x = (inset + shrink * outline[:, 0]) * long[:, None]
    y = shrink * outline[:, 1] * wide[:, None] + rng.normal(0, 0.07, count)[:, None] * x * x
    turn_x, turn_y = np.cos(angle)[:, None], np.sin(angle)[:, None]
    petals = pose(np.stack([x * turn_x - y * turn_y, x * turn_y + y * turn_x], axis=-1))
    spines = petals[0, :, len(outline) // 2] - pose.offset  # from the middle of the flower to each tip
    facing = spines @ (cos(scene.light), sin(scene.light)) / np.linalg.norm(spines, axis=1)
    lit = tone * (1 + 0.1 * facing + rng.normal(0, 0.03, count))
    for rim, body, glow, spine, light in zip(*petals, spines, lit.tolist(), strict=True):
        scene.fill(rim, _shade(species.colour, 0.66 * light))
        scene.fill(body, _shade(species.colour, 0.95 * light))
        scene.fill(glow, _shade(species.colour, 1.25 * light, 120))
        scene.pen.line((*pose.offset, *(pose.offset + spine)), fill=_shade(species.colour, 0.6, 110), width=1)


def _centre(scene: _Scene, species: Species, pose: _Pose, phase: float) -> None:
    """Draw the middle of a flower of its species; `phase` is that of the petals."""
    if species.centre is Centre.STARRED:
        corners = np.arange(2.0 * species.petals)
        star = _polar(phase + corners * pi / species.petals, np.where(corners % 2 == 0, 0.48, 0.15))
        scene.fill(pose(star), _shade(LIME, 0.75))
    for radius, colour in CENTRE_DISCS[species.centre]:
        scene.fill(pose(CIRCLE * radius), (*colour, 255))
    if species.centre is Centre.LARGE:
        seeds = np.arange(1.0, 22.0)
        for x, y in pose(_polar(seeds * 2.4, 0.062 * np.sqrt(seeds))).tolist():  # 2.4: the golden angle
            scene.pen.rectangle((x - 1, y - 1, x + 1, y + 1), fill=(*RUST, 170))


def _cluster(scene: _Scene, species: Species, pose: _Pose) -> None:
    """Draw six small flowers around a seventh, each rotated."""
    rng = scene.rng
    places = _polar(rng.uniform(0, tau) + tau * np.arange(6) / 6, 0.62)
    for x, y in np.concatenate([places, np.zeros((1, 2))]) + rng.normal(0, 0.04, (7, 2)):
        floret, turn = pose.moved(x, y, rng.uniform(0.36, 0.46)), rng.uniform(0, tau)
        _ring(scene, species, floret, 1.0, turn, 1.0)
        _centre(scene, species, floret, turn)


def _bell_tube(scene: _Scene, colour: Colour, pose: _Pose) -> None:
    """Draw a tube from its green foot at y = -1.2 to its mouth at the origin, paler in the middle."""
    for width, height, tone in ((1.0, 1.0, 0.6), (0.75, 0.96, 0.82), (0.25, 0.85, 0.98)):
        scene.fill(pose(TUBE * (width, height) + ((1 - width) * 0.2, 0)), _shade(colour, tone))
    scene.fill(pose(CIRCLE * (0.2, 0.16) + (0, -1.22)), (*GREEN, 255))


def _flower(scene: _Scene, species: Species, pose: _Pose) -> None:
    """Draw the flower head, about 1 flower unit in radius, rotated by its pose."""
    if species.arrangement is Arrangement.CLUSTER:
        _cluster(scene, species, pose)
        return
    rings: tuple[float, ...] = (1.0,)
    tone, scale = 1.0, 1.0  # tone: of each ring compared with the one outside it; scale: of the centre
    if species.arrangement is Arrangement.BELL:
        mouth = pose.moved(0, 0.5, 1.1)
        _bell_tube(scene, species.colour, mouth)
        pose = mouth.moved(0, 0, 0.76, squeeze=0.6)
    elif species.arrangement is Arrangement.DOUBLE:
        rings, tone = (1.0, 0.76), 1.2
    elif species.arrangement is Arrangement.ROSETTE:
        rings, tone, scale = (1.0, 0.8, 0.6, 0.42), 0.95, 0.7
    phase = scene.rng.uniform(0, tau)
    for index, length in enumerate(rings):
        _ring(scene, species, pose, length, phase + index * pi / species.petals, tone**index)
    _centre(scene, species, pose.moved(0, 0, scale), phase)


def _plant(scene: _Scene, species: Species) -> None:
    """Draw stem, leaves, the flower at random, and sometimes something in front of it."""
    rng, side = scene.rng, scene.canvas.width
    middle = rng.uniform(0.4, 0.6, 2)
    radius = rng.uniform(0.29, 0.43)
    heading = rng.uniform(0, tau)  # where the flower's own +x axis points
    for _ in range(rng.integers(0, 7)):
        scene.greenery(BLADE, rng.uniform((0, 0.9), (1, 1.2)), rng.uniform(-0.8, -0.2) * pi, rng.uniform(0.6, 1.3), 1.0)
    scene.greenery(BLADE, middle, heading - pi / 2, 1.2, rng.uniform(0.6, 1.0))
    for _ in range(rng.integers(0, 4)):
        scene.greenery(LEAF, middle, rng.uniform(0, tau), radius * rng.uniform(1.1, 1.7), rng.uniform(0.3, 0.6))
    tilt_axis = _rotation(rng.uniform(0, tau))
    tilt = tilt_axis @ np.diag((1.0, rng.uniform(0.7, 1.0))) @ tilt_axis.T
    shadow = (middle + 0.035 * np.array((-cos(scene.light), -sin(scene.light)))) * side
    scene.fill(_Pose(tilt * radius * side, shadow)(CIRCLE * 0.75), (10, 20, 10, 60))
    _flower(scene, species, _Pose(tilt @ _rotation(heading) * radius * side, middle * side))
    if rng.random() < 0.5:
        # A blade or leaf crosses the flower off its middle: it hides a petal or two, never all.
        side_angle = rng.uniform(0, tau)
        across = np.array((cos(side_angle), sin(side_angle)))
        start = middle + across * radius * rng.uniform(0.35, 0.9) - _rotation(pi / 2) @ across * 0.75
        outline, width = ((BLADE, 1.1), (LEAF, 0.5))[rng.integers(2)]
        scene.greenery(outline, start, side_angle + pi / 2, rng.uniform(0.8, 1.4), width)


def _photograph(rng: np.random.Generator, image: Image.Image) -> Image.Image:
    """Add exposure, warmth, dappled and directional light, blur and sensor noise to an image of final size."""
    size = image.width
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.004, 0.011) * size))
    warmth = rng.normal(0, 0.08)
    gain = np.exp(rng.normal(0, 0.2)) * np.array((1 + warmth, 1.0, 1 - warmth), dtype=np.float32)
    steps = np.linspace(-1, 1, 5)
    angle, strength = rng.uniform(0, tau), rng.uniform(0, 0.3)
    dapple = 1 + strength * (cos(angle) * steps + sin(angle) * steps[:, None]) + rng.normal(0, 0.12, (5, 5))
    light = Image.fromarray(dapple.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) * np.asarray(light)[..., None] * gain
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(rng.uniform(2, 12))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def draw(species: Species, seed: int, size: int) -> Image.Image:
    """Draw an RGB image, `size` x `size` pixels; the same arguments always give the same pixels."""
    digest = hashlib.sha256(f"{species.name}/{seed}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    side = size * SUPERSAMPLING
    scene = _Scene(rng, _background(rng, side))
    jitter = np.clip(np.array(species.colour) + rng.normal(0, 9, 3), 0, 255)
    red, green, blue = jitter.astype(int).tolist()
    _plant(scene, replace(species, colour=(red, green, blue)))
    return _photograph(rng, scene.canvas.resize((size, size), Image.Resampling.LANCZOS))
