"""Procedural landscapes with captions: the training set of the demo model.

Every image shows a `Scene` (place, time of day, extras). It is painted with numpy in the manner of
a flat poster: a sky gradient, a sun or a moon, then silhouettes from far to near that fade into the
haze of the horizon. The wording of captions varies, so that the small text encoders learn words and
not sentences. Nothing is downloaded, and every image follows from its random generator.

    scene = random_scene(rng);  caption(scene, rng);  render(scene, 128, 128, rng)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.floating]
Colour = tuple[int, int, int]
PaintTree = Callable[[float, float, float, Array], None]  # x, foot, height, colour

TIMES = {
    "dawn": ["dawn", "sunrise", "daybreak", "early morning"],
    "noon": ["noon", "midday", "daytime", "a sunny day"],
    "sunset": ["sunset", "dusk", "evening", "golden hour"],
    "night": ["night", "midnight", "late night"],
}
PLACES = {
    "city": ["cityscape", "city", "city skyline", "skyline", "skyscrapers", "metropolis"],
    "mountains": ["mountains", "mountain range", "mountain peaks", "alps", "snowy peaks"],
    "desert": ["desert", "sand dunes", "dunes", "sahara"],
    "forest": ["forest", "pine forest", "woods", "fir trees"],
    "ocean": ["ocean", "sea", "open sea", "ocean waves"],
    "hills": ["green hills", "meadow", "rolling hills", "countryside"],
    "winter": ["snowy hills", "winter landscape", "snow field", "snowy countryside"],
}
EXTRAS = {
    "moon": ["full moon", "a full moon", "a bright moon", "the moon"],
    "stars": ["stars", "a starry sky", "many stars", "bright stars"],
    "clouds": ["clouds", "a cloudy sky", "fluffy clouds", "some clouds"],
    "birds": ["birds", "flying birds", "a flock of birds"],
    "balloon": ["a hot air balloon", "hot air balloons", "a balloon"],
    "boat": ["a sailing boat", "a sailboat", "a boat"],
    "cactus": ["cacti", "a cactus"],
    "lake": ["a lake", "reflected in a lake", "still water", "water"],
}
ADJECTIVES = ["beautiful", "calm", "quiet", "wide", "dreamy", "peaceful", "lonely", "majestic"]
PREFIXES = ["a painting of", "a picture of", "a photo of", "an illustration of", "a poster of"]

# By time of day: the sky's colours at the zenith, in the middle and at the horizon, the light that
# falls on things, the colour of clouds and the colour of the sun.
SKY: dict[str, tuple[Colour, Colour, Colour]] = {
    "dawn": ((112, 136, 200), (234, 178, 196), (255, 222, 180)),
    "noon": ((50, 122, 214), (112, 180, 238), (200, 230, 246)),
    "sunset": ((88, 50, 118), (222, 88, 92), (255, 184, 84)),
    "night": ((18, 24, 70), (36, 50, 112), (78, 100, 168)),
}
LIGHT = {
    "dawn": (0.96, 0.82, 0.86),
    "noon": (1.0, 1.0, 0.98),
    "sunset": (0.86, 0.56, 0.52),
    "night": (0.40, 0.48, 0.80),
}
CLOUD = {
    "dawn": (255, 226, 224),
    "noon": (255, 255, 255),
    "sunset": (255, 158, 128),
    "night": (98, 114, 172),
}
SUN = {"dawn": (255, 240, 190), "noon": (255, 252, 224), "sunset": (255, 222, 120)}
SUPERSAMPLING = 2  # painted pixels along a side of one pixel of the image


@dataclass(frozen=True)
class Scene:
    """The content of an image: keys of `PLACES`, `TIMES` and `EXTRAS`."""

    place: str
    time: str
    extras: frozenset[str] = frozenset()
    futuristic: bool = False


def allowed_extras(place: str, time: str) -> list[str]:
    """The extras that make sense in a place at a time of day."""
    extras = ["clouds"]
    extras += ["moon", "stars"] if time == "night" else ["birds", "balloon"]
    extras += {"ocean": ["boat"], "desert": ["cactus"]}.get(place, [])
    return extras + (["lake"] if place in ("city", "mountains", "forest") else [])


def random_scene(rng: np.random.Generator) -> Scene:
    """A random place at a random time, with random extras among the allowed ones."""
    place, time = str(rng.choice(list(PLACES))), str(rng.choice(list(TIMES)))
    chance = {"moon": 0.5, "stars": 0.4, "clouds": 0.3, "lake": 0.35, "boat": 0.45}
    extras = {e for e in allowed_extras(place, time) if rng.random() < chance.get(e, 0.2)}
    return Scene(place, time, frozenset(extras), place == "city" and rng.random() < 0.4)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Describe a scene in one of many wordings; now and then an extra is left out."""

    def pick(words: list[str]) -> str:
        return words[rng.integers(len(words))]

    place, time = pick(PLACES[scene.place]), pick(TIMES[scene.time])
    if scene.futuristic:
        place = "futuristic " + place
    if rng.random() < 0.35:
        place = f"{pick(ADJECTIVES)} {place}"
    if not place.endswith("s") and rng.random() < 0.6:
        place = ("an " if place[0] in "aeiou" else "a ") + place
    said = [pick(EXTRAS[e]) for e in sorted(scene.extras) if rng.random() < 0.92]
    rng.shuffle(said)
    extras = (" and " if rng.random() < 0.3 else ", ").join(said)
    bare = time.removeprefix("a ")
    forms = [f"{place} at {bare}", f"{time} over {place}", f"{place}, {time}", f"{bare}, {place}"]
    forms += [f"{place} in the {bare}"] if bare in ("night", "evening", "early morning") else []
    text = pick(forms)
    if extras:
        joiner = ", " if extras.startswith("reflected") else pick([", ", ", ", " with ", " and "])
        text = extras + ", " + text if rng.random() < 0.15 else text + joiner + extras
    return f"{pick(PREFIXES)} {text}" if rng.random() < 0.2 else text


class Canvas:
    """An image of floats (height, width, 3), 0 to 1, with coordinates in units of its height."""

    def __init__(self, width_px: int, height_px: int) -> None:
        self.height_px, self.width_px = height_px * SUPERSAMPLING, width_px * SUPERSAMPLING
        self.aspect = width_px / height_px
        self.x = (np.arange(self.width_px, dtype=np.float32) + 0.5) / self.height_px
        self.y = ((np.arange(self.height_px, dtype=np.float32) + 0.5) / self.height_px)[:, None]
        self.pixels = np.zeros((self.height_px, self.width_px, 3), np.float32)

    def blend(self, colour: Array, alpha: Array) -> None:
        """Paint `colour` (…, 3) where `alpha` (height, width) is 1."""
        self.pixels += (colour - self.pixels) * alpha[..., None]

    def disc(self, x: float, y: float, radius: float) -> Array:
        """A mask (height, width) that is 1 within a circle."""
        return (np.hypot(self.x - x, self.y - y) < radius).astype(np.float32)

    def glow(self, x: float, y: float, radius: float, colour: Array, strength: float) -> None:
        """Paint a soft light around a point."""
        distance = np.hypot(self.x - x, self.y - y)
        self.blend(colour, (strength * np.exp(-((distance / radius) ** 2))).astype(np.float32))

    def box(self, left: float, top: float, right: float, bottom: float) -> Array:
        """A mask (height, width) that is 1 within a rectangle."""
        inside = (self.x > left) & (self.x < right) & (self.y > top) & (self.y < bottom)
        return inside.astype(np.float32)

    def image(self) -> Image.Image:
        """The finished image, reduced to its size."""
        whole = Image.fromarray((self.pixels.clip(0, 1) * 255).astype(np.uint8))
        return whole.reduce(SUPERSAMPLING)


def rgb(colour: tuple[float, float, float]) -> Array:
    """Convert a colour from 0..255 to 0..1."""
    return np.asarray(colour, np.float32) / 255


def rough(x: Array, rng: np.random.Generator, octaves: int, start_hz: float, decay: float) -> Array:
    """Ridge noise: a sum of triangle waves, with values of about -1 to 1.

    Each of the `octaves` has about twice the frequency of the one before, from `start_hz`, and
    `decay` times its amplitude. A smaller `decay` makes the noise smoother.
    """
    total, scale = np.zeros_like(x), 1.0
    for octave in range(octaves):
        hz = start_hz * 2**octave * rng.uniform(0.8, 1.25)
        total += scale * (4 * np.abs((x * hz + rng.random()) % 1 - 0.5) - 1)
        scale *= decay
    return total.astype(np.float32)


def smooth(x: Array, rng: np.random.Generator, octaves: int, start_hz: float) -> Array:
    """Smooth noise: a sum of sine waves with random frequencies and phases."""
    waves = [
        np.sin(2 * np.pi * (x * start_hz * 1.9**k * rng.uniform(0.8, 1.2) + rng.random())) / 1.8**k
        for k in range(octaves)
    ]
    total: Array = np.sum(waves, axis=0).astype(np.float32)
    return total


class Painter:
    """Paints a scene; one method for each place, extra and part of the sky."""

    def __init__(self, scene: Scene, width_px: int, height_px: int, rng: np.random.Generator):
        self.scene, self.rng, self.canvas = scene, rng, Canvas(width_px, height_px)
        self.haze = rgb(SKY[scene.time][2])
        self.horizon = 0.62 if scene.place != "ocean" else float(rng.uniform(0.50, 0.60))
        self.water = float(rng.uniform(0.72, 0.78)) if "lake" in scene.extras else 1.0

    def lit(self, colour: Colour, depth: float) -> Array:
        """A colour in the light of the hour; `depth`: 0 is near, 1 is lost in the haze."""
        near = rgb(colour) * np.asarray(LIGHT[self.scene.time], np.float32)
        return near + (self.haze - near) * depth

    def paint(self) -> Image.Image:
        """Paint the scene from the sky to the foreground."""
        extras, canvas = self.scene.extras, self.canvas
        self.sky()
        if "stars" in extras:
            self.stars()
        self.sun_or_moon()
        if "clouds" in extras:
            self.clouds()
        getattr(self, self.scene.place)()
        if "lake" in extras:
            self.reflection()
        if "balloon" in extras:
            self.balloon()
        if "birds" in extras:
            self.birds()
        return canvas.image()

    # -- the sky ------------------------------------------------------------------------------

    def sky(self) -> None:
        top, middle, bottom = (rgb(c) for c in SKY[self.scene.time])
        t = (self.canvas.y / self.horizon).clip(0, 1)[..., None]
        upper = top + (middle - top) * (t / 0.6).clip(0, 1)
        self.canvas.pixels[:] = upper + (bottom - upper) * ((t - 0.6) / 0.4).clip(0, 1)

    def sun_or_moon(self) -> None:
        rng, time, canvas = self.rng, self.scene.time, self.canvas
        x = float(rng.uniform(0.2, 0.8)) * canvas.aspect
        self.source_x: float | None = x
        if time == "night":
            if "moon" not in self.scene.extras:
                self.source_x = None
                return
            y, radius, pale = float(rng.uniform(0.14, 0.26)), float(rng.uniform(0.085, 0.115)), 250
            canvas.glow(x, y, radius * 2.6, rgb((150, 170, 225)), 0.55)
            canvas.blend(rgb((pale, 246, 226)), canvas.disc(x, y, radius))
            for dx, dy, r in ((-0.3, -0.2, 0.24), (0.35, 0.15, 0.2), (-0.1, 0.42, 0.16)):
                crater = canvas.disc(x + dx * radius, y + dy * radius, r * radius)
                canvas.blend(rgb((226, 222, 206)), crater)
            return
        low = {"dawn": (0.34, 0.46), "noon": (0.10, 0.2), "sunset": (0.38, 0.5)}[time]
        y = float(rng.uniform(*low)) * self.horizon / 0.62
        radius = {"dawn": 0.075, "noon": 0.06, "sunset": 0.1}[time] * float(rng.uniform(0.9, 1.15))
        canvas.glow(x, y, radius * 3.4, rgb(SUN[time]), 0.6)
        canvas.blend(rgb(SUN[time]), canvas.disc(x, y, radius))

    def stars(self) -> None:
        for _ in range(int(14 * self.canvas.aspect + self.rng.integers(10))):
            x, y = self.rng.random() * self.canvas.aspect, self.rng.random() ** 1.2 * 0.5
            size = self.rng.uniform(0.006, 0.012)
            self.canvas.glow(x, y, size * 1.5, rgb((255, 250, 230)), 0.95)

    def clouds(self) -> None:
        rng, canvas = self.rng, self.canvas
        for _ in range(int(rng.integers(2, 4) * canvas.aspect + 0.5)):
            x, y = rng.uniform(0.05, 0.95) * canvas.aspect, rng.uniform(0.08, 0.36)
            if "moon" in self.scene.extras and abs(x - (self.source_x or 0)) < 0.3:
                continue  # no cloud may cover a moon that the caption names
            width, alpha = rng.uniform(0.10, 0.17), np.zeros_like(canvas.pixels[..., 0])
            for k in np.linspace(-1, 1, 5):
                r = width * (0.52 - 0.3 * abs(k)) * rng.uniform(0.85, 1.2)
                alpha = np.maximum(alpha, canvas.disc(x + k * width, y - r * 0.3, r))
            alpha *= canvas.y < y + width * 0.10
            shade = ((y + 0.1 * width - canvas.y) / (width * 0.7)).clip(0, 1)[..., None]
            bright = rgb(CLOUD[self.scene.time])
            dim = bright + (rgb(SKY[self.scene.time][1]) - bright) * 0.45
            canvas.blend(dim + (bright - dim) * shade, alpha * 0.92)

    def birds(self) -> None:
        rng, canvas = self.rng, self.canvas
        cx, cy = rng.uniform(0.3, 0.7) * canvas.aspect, rng.uniform(0.12, 0.3)
        dark = rgb((46, 44, 66))
        for _ in range(rng.integers(4, 7)):
            x, y = cx + rng.uniform(-0.26, 0.26), cy + rng.uniform(-0.09, 0.09)
            span = rng.uniform(0.028, 0.046)
            reach = np.abs(canvas.x - x) / span
            wing = y - span * 0.6 * np.sin(np.pi * reach.clip(0, 1) ** 0.8) + span * 0.2 * reach
            canvas.blend(dark, ((np.abs(canvas.y - wing) < 0.009) & (reach < 1)).astype(np.float32))

    def balloon(self) -> None:
        rng, canvas = self.rng, self.canvas
        palettes = [((214, 62, 58), (250, 214, 120)), ((64, 110, 190), (246, 240, 226))]
        stripe = palettes[rng.integers(2)]
        for size in (0.085, 0.05)[: rng.integers(1, 3)]:
            x, y = rng.uniform(0.15, 0.85) * canvas.aspect, rng.uniform(0.14, 0.34)
            envelope = canvas.disc(x, y, size)
            below = (canvas.y - y) / size
            taper = np.abs(canvas.x - x) < size * (1.02 - 0.62 * (below - 0.3).clip(0, 1.4))
            envelope = np.maximum(envelope, (taper & (below > 0.55) & (below < 1.25)) * 1.0)
            bands = (np.floor((canvas.x - x) / size * 2.5 + 0.5) % 2)[None, :, None]
            tint = np.asarray(LIGHT[self.scene.time], np.float32) ** 0.4
            first, second = rgb(stripe[0]) * tint, rgb(stripe[1]) * tint
            canvas.blend(first + (second - first) * bands, envelope.astype(np.float32))
            basket = canvas.box(x - size * 0.2, y + size * 1.4, x + size * 0.2, y + size * 1.72)
            canvas.blend(rgb((96, 62, 44)), basket)

    # -- the ground ---------------------------------------------------------------------------

    def layer(self, top: Array, colour: Array, foot: Array | None = None) -> Array:
        """Fill everything below the skyline `top` (width,), and return a mask of the filled part.

        The colour changes from `colour` at the skyline to `foot` below.
        """
        mask = (self.canvas.y > top).astype(np.float32)
        down = ((self.canvas.y - top) / 0.35).clip(0, 1)[..., None]
        self.canvas.blend(colour if foot is None else colour + (foot - colour) * down, mask)
        return mask

    def mountains(self) -> None:
        rng, canvas = self.rng, self.canvas
        rock, snow, wood = (112, 116, 138), (246, 248, 255), (58, 88, 78)
        sunny_left = rng.random() < 0.5
        for depth, base, height, wide in ((0.6, 0.58, 0.24, 0.26), (0.3, 0.66, 0.36, 0.36)):
            count = max(2, round(canvas.aspect / wide * 1.4))
            for place in rng.permutation(count):
                x = (place + rng.uniform(0.1, 0.9)) / count * canvas.aspect
                tall, half = height * rng.uniform(0.65, 1.1), wide * rng.uniform(0.7, 1.0)
                jag = 0.010 * rough(canvas.x, rng, 2, 7, 0.6)
                summit = base - tall
                mask = self.layer(summit + tall * np.abs(canvas.x - x) / half + jag, rgb((0, 0, 0)))
                edge = x + 0.05 * rough(canvas.y, rng, 2, 4, 0.6) * (canvas.y - summit) / tall
                light = ((canvas.x < edge) == sunny_left)[..., None]
                down = ((canvas.y - summit) / tall).clip(0, 1)[..., None]
                stone = (
                    self.lit(rock, depth)
                    + (self.lit(wood, depth + 0.1) - self.lit(rock, depth)) * down
                )
                canvas.blend(np.where(light, stone, stone * 0.76), mask)
                cap = summit + tall * 0.36 + 0.05 * rough(canvas.x, rng, 1, 9, 0.6)
                white = self.lit(snow, depth * 0.4)
                canvas.blend(np.where(light, white, white * 0.8), mask * (canvas.y < cap))
        self.layer(0.68 - 0.03 * smooth(canvas.x, rng, 3, 1.1), self.lit(wood, 0.15))
        self.pines(0.86, 0.15, 0.0, (30, 62, 58))

    def pines(self, base: float, height: float, depth: float, colour: Colour) -> None:
        x, rng = self.canvas.x, self.rng
        ground = base - 0.02 * smooth(x, rng, 2, 0.9)
        top = ground.copy()
        spacing = height * 0.34
        for centre in np.arange(-0.05, self.canvas.aspect + 0.05, spacing):
            centre += rng.uniform(-0.3, 0.3) * spacing
            tall = height * rng.uniform(0.6, 1.15)
            reach = np.abs(x - centre) / (tall * 0.27)
            tiers = 1 - reach + 0.10 * ((reach * 3.0) % 1)
            top = np.minimum(top, np.where(reach < 1, ground - tall * tiers.clip(0, 1), ground))
        self.layer(top, self.lit(colour, depth), self.lit(colour, depth) * 0.8)

    def forest(self) -> None:
        self.layer(
            0.48 - 0.05 * smooth(self.canvas.x, self.rng, 3, 0.9), self.lit((92, 128, 120), 0.6)
        )
        rows = ((0.6, 0.17, 0.5), (0.70, 0.22, 0.26), (0.86, 0.30, 0.06))
        for (base, height, depth), green in zip(
            rows, ((66, 118, 92), (48, 104, 74), (30, 78, 58)), strict=True
        ):
            self.pines(base, height, depth, green)

    def desert(self) -> None:
        rng, canvas = self.rng, self.canvas
        for depth, base, height in ((0.45, 0.56, 0.05), (0.22, 0.66, 0.07), (0.0, 0.8, 0.09)):
            crest = smooth(canvas.x, rng, 2, rng.uniform(0.5, 0.9))
            top = base - height * crest
            lee = canvas.y - top < 0.55 * height * (1 + np.sin(canvas.x * 5 + rng.uniform(0, 6)))
            side = np.where(
                lee[..., None], self.lit((250, 206, 134), depth), self.lit((222, 162, 96), depth)
            )
            self.layer(top, side)
            if "cactus" in self.scene.extras and depth < 0.4:
                self.cactus(base + 0.02, 0.2 - 0.2 * depth)

    def cactus(self, foot: float, tall: float) -> None:
        canvas, thick = self.canvas, tall * 0.1
        x = self.rng.uniform(0.15, 0.85) * canvas.aspect
        green = self.lit((56, 124, 78), 0.05)
        shape = canvas.box(x - thick, foot - tall, x + thick, foot)
        shape = np.maximum(shape, canvas.disc(x, foot - tall, thick))
        for side, high in ((-1, 0.45), (1, 0.6)):
            arm = x + side * thick * 3.2
            level, tip = foot - tall * high, foot - tall * (high + 0.28)
            parts = [canvas.box(min(x, arm), level - thick * 0.7, max(x, arm), level + thick * 0.7)]
            parts += [canvas.box(arm - thick * 0.7, tip, arm + thick * 0.7, level + thick * 0.7)]
            parts += [canvas.disc(arm, tip, thick * 0.7)]
            shape = np.maximum.reduce([shape, *parts])
        canvas.blend(green, shape)

    def hills(self) -> None:
        self.rolling([(150, 190, 96), (118, 172, 78), (84, 146, 62)])

    def winter(self) -> None:
        self.pines(0.58, 0.12, 0.5, (70, 110, 120))
        self.rolling([(222, 232, 248), (232, 240, 252), (246, 250, 255)])
        self.lone_trees(self.lone_pine, (44, 86, 84))

    def rolling(self, colours: list[Colour]) -> None:
        rng = self.rng
        rows = ((0.5, 0.55, 0.05), (0.25, 0.66, 0.06), (0.0, 0.80, 0.07))
        for (depth, base, height), colour in zip(rows, colours, strict=True):
            top = base - height * smooth(self.canvas.x, rng, 2, rng.uniform(0.5, 0.9))
            near = self.lit(colour, depth)
            self.layer(top, near, near * 0.8)
            if self.scene.place == "hills" and depth:
                self.lone_trees(self.round_tree, (58, 112, 58), base, depth)

    def lone_trees(
        self, paint_tree: PaintTree, colour: Colour, foot: float = 0.78, depth: float = 0.1
    ) -> None:
        for _ in range(self.rng.integers(1, 4)):
            x = self.rng.uniform(0.05, 0.95) * self.canvas.aspect
            paint_tree(x, foot + 0.02, 0.2 * (1 - depth), self.lit(colour, depth))

    def round_tree(self, x: float, foot: float, tall: float, colour: Array) -> None:
        trunk = self.canvas.box(x - tall * 0.05, foot - tall * 0.5, x + tall * 0.05, foot)
        self.canvas.blend(self.lit((96, 70, 52), 0.2), trunk)
        self.canvas.blend(colour, self.canvas.disc(x, foot - tall * 0.55, tall * 0.34))
        glint = self.canvas.disc(x - tall * 0.08, foot - tall * 0.62, tall * 0.2)
        self.canvas.blend(np.minimum(colour * 1.25, 1), glint)

    def lone_pine(self, x: float, foot: float, tall: float, colour: Array) -> None:
        up = (foot - self.canvas.y) / tall
        reach = np.abs(self.canvas.x - x) / (tall * 0.3)
        shape = (up > 0) & (reach < 1 - up - 0.14 * ((up * 3.2) % 1))
        self.canvas.blend(colour, shape.astype(np.float32))

    def ocean(self) -> None:
        rng, canvas, sky = self.rng, self.canvas, SKY[self.scene.time]
        far = rgb(sky[2]) * 0.55 + rgb(sky[1]) * 0.35
        near = {
            "dawn": (88, 112, 164),
            "noon": (18, 84, 150),
            "sunset": (78, 40, 92),
            "night": (18, 30, 82),
        }[self.scene.time]
        depth = ((canvas.y - self.horizon) / (1 - self.horizon)).clip(0, 1)[..., None] ** 0.7
        water = far + (rgb(near) - far) * depth
        canvas.blend(water, np.broadcast_to(canvas.y > self.horizon, canvas.pixels.shape[:2]) * 1.0)
        y = canvas.y - self.horizon
        for row in range(9):
            at = 0.012 + 0.042 * row**1.12
            crest = at + 0.004 * smooth(canvas.x, rng, 2, 3.0)
            band = (np.abs(y - crest) < 0.0022 + 0.0009 * row) & (
                smooth(canvas.x, rng, 2, 1.6) > 0.1
            )
            canvas.blend(np.minimum(water * 1.22 + 0.05, 1), band * 0.65)
            if self.source_x is not None:
                half = (0.03 + 0.012 * row) * rng.uniform(0.6, 1.4)
                middle = self.source_x + rng.uniform(-0.02, 0.02)
                shine = (np.abs(canvas.x - middle) < half) & (
                    np.abs(y - at - 0.012) < 0.005 + 0.0007 * row
                )
                light = rgb(SUN.get(self.scene.time, (236, 238, 232)))
                canvas.blend(light, shine * np.float32(0.8))
        if "boat" in self.scene.extras:
            self.boat()

    def boat(self) -> None:
        rng, canvas = self.rng, self.canvas
        x, y, s = rng.uniform(0.2, 0.8) * canvas.aspect, self.horizon + rng.uniform(0.06, 0.16), 0.2
        up, across = (y - canvas.y) / s, (canvas.x - x) / s
        hull = (up > -0.16) & (up < 0.04) & (np.abs(across) < 0.5 + 0.9 * (up - 0.04))
        main = (up > 0.08) & (across > 0.02) & (across < 0.46 * (1 - up) + 0.02) & (up < 1)
        jib = (up > 0.08) & (across < -0.03) & (-across < 0.4 * (0.85 - up)) & (up < 0.85)
        canvas.blend(self.lit((150, 62, 48), 0.05), hull.astype(np.float32))
        cloth = np.sqrt(self.lit((255, 252, 244), 0.1))
        canvas.blend(cloth, (main | jib).astype(np.float32))

    def city(self) -> None:
        rows = ((0.58, 0.54, 0.16), (0.32, 0.62, 0.24), (0.06, 0.74, 0.30))
        stones = ((120, 132, 164), (92, 104, 140), (62, 70, 104))
        for (depth, base, height), stone in zip(rows, stones, strict=True):
            self.buildings(base, height, depth, stone)
        park = smooth(self.canvas.x, self.rng, 3, 2.2)
        self.layer(0.91 - 0.016 * park, self.lit((44, 78, 66), 0.0))

    def buildings(self, base: float, height: float, depth: float, stone: Colour) -> None:
        rng, canvas, futuristic = self.rng, self.canvas, self.scene.futuristic
        time, x = self.scene.time, -0.04
        glass = {
            "dawn": (255, 232, 190),
            "noon": (196, 226, 246),
            "sunset": (255, 212, 120),
            "night": (255, 216, 118),
        }
        lamps = rgb((90, 236, 246) if futuristic and time != "noon" else glass[time])
        share = {"dawn": 0.35, "noon": 0.55, "sunset": 0.5, "night": 0.62}[time]
        front = self.lit(stone, depth)
        while x < canvas.aspect:
            width = rng.uniform(0.11, 0.19) * (0.85 if futuristic else 1)
            tall = height * rng.uniform(0.45, 1.25) * (1.2 if futuristic else 1)
            top, middle = base - tall, x + width / 2
            shape = canvas.box(x, top, x + width, 2)
            kind = rng.random()
            if futuristic and kind < 0.45:
                taper = width / 2 * ((canvas.y - top + 0.02) / (tall * 0.55)).clip(0.05, 1) ** 0.6
                shape = ((np.abs(canvas.x - middle) < taper) & (canvas.y > top)).astype(np.float32)
            elif futuristic and kind < 0.7:
                shape = np.maximum(shape, canvas.disc(middle, top, width / 2))
            elif kind < 0.3:
                mast = canvas.box(middle - 0.006, top - 0.07, middle + 0.006, top)
                shape = np.maximum(shape, mast)
            elif kind < 0.5:
                step = canvas.box(x + width * 0.22, top - 0.045, x + width * 0.78, top)
                shape = np.maximum(shape, step)
            tone = front * np.float32(rng.uniform(0.86, 1.12))
            side = np.where((canvas.x > x + width * 0.62)[:, None], tone * 0.82, tone)
            canvas.blend(side, shape)
            pitch_x, pitch_y = width / 3, 0.052
            column, row = (canvas.x - x) / pitch_x, (canvas.y - top - 0.012) / pitch_y
            pane = (np.abs(column % 1 - 0.5) < 0.28) & (np.abs(row % 1 - 0.5) < 0.30) & (row > 0)
            on = rng.random((64, 8)) < share
            cell = on[row.astype(int).clip(0, 63), column.astype(int).clip(0, 7)]
            inside = shape * canvas.box(x + 0.008, top, x + width - 0.008, 2)
            if futuristic and kind < 0.45:
                cell = cell & (np.abs(canvas.x - middle) < width * 0.2)
            canvas.blend(lamps, (pane & cell) * inside * np.float32(1.0 - 0.75 * depth))
            x += width * rng.uniform(0.92, 1.12)

    def reflection(self) -> None:
        """Mirror the image at the water line, darker and rippled."""
        canvas = self.canvas
        line = int(self.water * canvas.height_px)
        rows = np.arange(line, canvas.height_px)
        distance = rows - line
        wobble = 2.2 * np.sin(distance / canvas.height_px * 150) * (distance / len(rows))
        mirrored = canvas.pixels[(line - 1 - distance * 1.5).astype(int).clip(0)]
        columns = np.arange(canvas.width_px)[None] + wobble[:, None].astype(int)
        mirrored = np.take_along_axis(
            mirrored, columns.clip(0, canvas.width_px - 1)[..., None], axis=1
        )
        tint = rgb(SKY[self.scene.time][1])
        canvas.pixels[line:] = mirrored * 0.72 + tint * 0.2
        shore = np.abs(canvas.y - self.water) < 0.005
        canvas.blend(self.haze, np.broadcast_to(shore, canvas.pixels.shape[:2]) * np.float32(0.6))


def render(scene: Scene, width_px: int, height_px: int, rng: np.random.Generator) -> Image.Image:
    """Render a scene as an RGB image of `width_px` × `height_px`."""
    return Painter(scene, width_px, height_px, rng).paint()
