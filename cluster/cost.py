"""The work of an image: its predicted seconds on one reference replica.

    work = constant + steps · (step + rows · (token · n + token2 · n²)) + pixel · pixels · vae

n is the number of tokens of image and text together; rows is 2 with guidance, else 1. vae is 1 for
an image that is only decoded, and 1 + `ENCODE_COST` for an edit, whose picture is encoded first.
The five coefficients (`CostCoefficients`) belong to a model, a recipe and a card. `REFERENCES`
holds the measured ones. Others are estimated from the arithmetic of SD3.5's transformer and the
card's peak rates. The estimate assumes that the fraction `EFFICIENCY` of the peak is reached. A
block of width d takes 24 · d² floating-point operations for the linear layers of a token, and 4 · d
for each pair of tokens. A block that attends to the image a second time takes 8 · d² and 4 · d
more.

A replica learns its real cost from the images that it generates: see `LearnedCost`.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cluster.cards import CARDS, Card
from cluster.structure import TOKEN_PX, Structure

VAE_FLOPS_PER_PIXEL = 1.0e7  # of SD3.5's VAE: 10.5 TFLOP for 1024 × 1024
# Encoding a picture, as a part of decoding one: 4.88 of 10.47 TFLOP for 1024 × 1024 pixels.
ENCODE_COST = 0.47
EFFICIENCY = 0.5  # fraction of a card's peak rate that is reached
UNKNOWN_GPU = CARDS["rtx4090"]  # its rates stand in for those of a card that is not listed
# Seconds of one core for a prompt of 256 tokens in t5-fp8: `python -m bench.t5` on two cores, which
# have no bfloat16.
PROMPT_CORE_S = 109.4
LEARNING_RATE = 0.3  # the part of an observed error by which the learned cost is corrected
MAX_FACTOR = 16.0  # a learned coefficient is 1/16 to 16 times the reference's


class CardRates(NamedTuple):
    """Peak floating-point operations per second: in linear layers, and in everything else."""

    linear: float
    other: float


CPU = {  # two cores of a cloud machine
    "fp8": CardRates(75e9, 150e9),
    "bf16": CardRates(150e9, 150e9),
}


def rates(recipe: str, card: Card | None) -> CardRates:
    """The peak rates of a recipe on a card, or on a CPU if `card` is None."""
    if card is None:
        return CPU["fp8" if recipe.startswith("fp8") else "bf16"]
    linear = card.fp8_tflops if recipe.startswith("fp8") else None
    return CardRates(1e12 * (linear or card.tflops), 1e12 * card.tflops)


@dataclass(frozen=True, slots=True)
class ImageShape:
    """The properties of an image on which its work depends.

    `rows` is 2 with guidance, else 1. `steps` are those that run. `edit`: whether a picture of the
    same size is encoded first.
    """

    width_px: int
    height_px: int
    text_tokens: int
    rows: int
    steps: int
    edit: bool = False

    @property
    def pixels(self) -> int:
        return self.width_px * self.height_px

    @property
    def image_tokens(self) -> int:
        return self.pixels // TOKEN_PX**2

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens


class CostCoefficients(NamedTuple):
    """The coefficients of the cost formula, each in seconds.

    `constant`: per image. `step`: per step. `token`: per token of one row in one step. `token2`:
    per pair of tokens of one row in one step. `pixel`: per pixel that the VAE decodes.
    """

    constant: float
    step: float
    token: float
    token2: float
    pixel: float

    def parts(self, shape: ImageShape) -> tuple[float, ...]:
        """The seconds that each coefficient adds to the work of an image, in the fields' order."""
        row_steps, n = shape.steps * shape.rows, shape.tokens
        vae_pixels = shape.pixels * (1 + ENCODE_COST * shape.edit)
        amounts = 1, shape.steps, row_steps * n, row_steps * n * n, vae_pixels
        return tuple(c * amount for c, amount in zip(self, amounts, strict=True))

    def work_s(self, shape: ImageShape) -> float:
        """The work of an image, in seconds."""
        return sum(self.parts(shape))


def estimated(structure: Structure, rates: CardRates) -> CostCoefficients:
    """Estimate coefficients from arithmetic, for models and cards that were not measured.

    `constant` and `step`, which do not follow from arithmetic, are guesses.
    """
    d, layers, dual = structure.width, structure.layers, structure.dual_layers
    linear, other = (rate * EFFICIENCY for rate in rates)
    return CostCoefficients(
        constant=0.01,
        step=0.001,
        token=d * d * (24 * layers + 8 * dual) / linear,
        token2=4 * d * (layers + dual) / other,
        pixel=VAE_FLOPS_PER_PIXEL / other,
    )


def reference(structure: Structure, recipe: str, card: Card | None) -> CostCoefficients:
    """The coefficients of a model in a recipe on a card, or on a CPU if `card` is None.

    Measured coefficients are preferred to estimated ones. A CPU that computes in float32, because
    it has no bfloat16, begins with the coefficients of bfloat16.
    """
    recipe = "bf16" if recipe == "fp32" else recipe
    measured = REFERENCES.get((structure, recipe, card.id if card else "cpu"))
    return measured or estimated(structure, rates(recipe, card))


# Printed by `python -m bench.engine --recipe …`: the demo model on two cores of a cloud machine.
DEMO = Structure(
    width=192,
    layers=4,
    dual_layers=1,
    head_width=32,
    text_width=128,
    pooled_width=128,
    positions=32 * 32,
)
REFERENCES = {
    (DEMO, "fp8", "cpu"): CostCoefficients(0.00704, 0.0222, 4.52e-5, 8.91e-8, 8.32e-7),
    (DEMO, "bf16", "cpu"): CostCoefficients(0.00387, 0.00599, 2.88e-5, 0.0, 1.4e-6),
}


class LearnedCost:
    """A replica's own coefficients, corrected after each image that it has finished.

    A learned coefficient is a factor times the reference's. Each image shows the error of its
    prediction, and the factors are corrected by `LEARNING_RATE` of the error. The larger the part
    of a coefficient in the image's work, the more its factor is corrected (normalised least mean
    squares). An error counts as at most the prediction itself, and every factor stays between
    1/`MAX_FACTOR` and `MAX_FACTOR`. So a single outlier changes little.
    """

    def __init__(
        self,
        reference: CostCoefficients,
        unit: CostCoefficients | None = None,
        usual: ImageShape | None = None,
    ) -> None:
        """`reference`: the coefficients to start from, of this model, recipe and card.

        `unit`: the coefficients of the reference replica, whose seconds are the unit of work; by
        default `reference`. `usual`: an image from which `speed` is predicted until the first image
        is observed.
        """
        self.reference, self._usual = reference, usual
        self._factors = [1.0] * len(reference)
        self.unit = unit or reference

    @property
    def unit(self) -> CostCoefficients:
        """The coefficients of the reference replica; setting them begins to learn `speed` anew."""
        return self._unit

    @unit.setter
    def unit(self, unit: CostCoefficients) -> None:
        self._unit, usual = unit, self._usual
        self._first = unit.work_s(usual) / self.coefficients.work_s(usual) if usual else 1.0
        self._unit_s = self._busy_s = 0.0

    @property
    def coefficients(self) -> CostCoefficients:
        """The learned coefficients."""
        return CostCoefficients(
            *(f * c for f, c in zip(self._factors, self.reference, strict=True))
        )

    @property
    def speed(self) -> float:
        """Seconds of a reference replica's work that this replica does in a second.

        Computed from recent images: their work in `unit` ÷ the seconds of this replica's time that
        they took. Errors are bounded as described for the class.
        """
        return self._unit_s / self._busy_s if self._busy_s else self._first

    def observe(self, shape: ImageShape, busy_s: float) -> None:
        """Learn from a finished image.

        `busy_s`: the image's share of the replica's time, in seconds.
        """
        parts = self.reference.parts(shape)
        predicted = sum(f * p for f, p in zip(self._factors, parts, strict=True))
        error = min(max(busy_s - predicted, -predicted), predicted)
        gain = LEARNING_RATE * error / sum(p * p for p in parts)
        self._factors = [
            min(max(f + gain * p, 1 / MAX_FACTOR), MAX_FACTOR)
            for f, p in zip(self._factors, parts, strict=True)
        ]
        self._unit_s = self._unit_s * (1 - LEARNING_RATE) + self._unit.work_s(shape) * LEARNING_RATE
        self._busy_s = self._busy_s * (1 - LEARNING_RATE) + (predicted + error) * LEARNING_RATE
