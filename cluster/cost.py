"""The work of a request: its predicted seconds on one reference replica.

    work = constant + steps · (step + rows · (token · n + token² · n²)) + pixel · pixels

n is the number of tokens, image and text; rows is 2 with guidance. The five coefficients belong to
a model, a recipe and a card: `REFERENCES` has those that were measured; otherwise they follow from
the arithmetic of SD3.5's transformer and a card's peak rates, of which `EFFICIENCY` is reached. A
block d wide has 24 · d² floating-point operations for a token's linear layers and 4 · d for each
pair of tokens; one that attends to the image a second time has 8 · d² and 4 · d more.

What replicas take in truth they learn from what they draw: see `LearnedCost`.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from cluster.cards import CARDS, Card
from cluster.structure import TOKEN_PX, Structure

VAE_FLOPS_PER_PIXEL = 1.0e7  # of SD3.5's VAE: 10.5 TFLOP for 1024 × 1024
EFFICIENCY = 0.5  # of a card's peak
UNKNOWN_GPU = CARDS["rtx4090"]  # its rates stand in for those of a card that is not listed
RATE = 0.3  # how far an observation moves what is learnt
BOUND = 16.0  # how far what is learnt may leave the reference


class CardRates(NamedTuple):
    """Peak floating-point operations a second: of linear layers, and of all else."""

    linear: float
    other: float


CPU = {
    "fp8": CardRates(75e9, 150e9),
    "bf16": CardRates(150e9, 150e9),
}  # two cores of a cloud machine


def rates(recipe: str, card: Card | None) -> CardRates:
    """Of a card, or of a CPU if it is None."""
    if card is None:
        return CPU["fp8" if recipe.startswith("fp8") else "bf16"]
    linear = card.fp8_tflops if recipe.startswith("fp8") else None
    return CardRates(1e12 * (linear or card.tflops), 1e12 * card.tflops)


@dataclass(frozen=True, slots=True)
class ImageShape:
    """What the work depends on; `rows` is 2 with guidance, else 1."""

    width_px: int
    height_px: int
    text_tokens: int
    rows: int
    steps: int

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
    """Seconds: of an image, a step, a row's token and token², and a pixel of the VAE."""

    constant: float
    step: float
    token: float
    token2: float
    pixel: float

    def parts(self, shape: ImageShape) -> tuple[float, ...]:
        """What each coefficient contributes to the work."""
        row_steps, n = shape.steps * shape.rows, shape.tokens
        amounts = 1, shape.steps, row_steps * n, row_steps * n * n, shape.pixels
        return tuple(c * amount for c, amount in zip(self, amounts, strict=True))

    def work_s(self, shape: ImageShape) -> float:
        return sum(self.parts(shape))


def estimated(structure: Structure, rates: CardRates) -> CostCoefficients:
    """Coefficients from arithmetic, where nothing was measured; what comes beside it is a guess."""
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
    """The coefficients of a model in a recipe on a card, or on a CPU if it is None."""
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
    """A replica's own coefficients, refitted from each image that it has finished.

    Each is a factor of the reference's. An image moves the factors along what it consists of
    (normalised least mean squares), by `RATE` of its error; an error counts for no more than the
    prediction itself, and no factor leaves 1/`BOUND` … `BOUND`, so that a hiccup does little.
    """

    def __init__(
        self,
        reference: CostCoefficients,
        unit: CostCoefficients | None = None,
        usual: ImageShape | None = None,
    ) -> None:
        """`reference`: of this kind of replica; `unit`: in which speed is told, by default that.

        Until an image is observed, speed is that of a `usual` one.
        """
        self.reference, self._unit = reference, unit or reference
        self._factors = [1.0] * len(reference)
        self._first = self._unit.work_s(usual) / reference.work_s(usual) if usual else 1.0
        self._unit_s = self._busy_s = 0.0

    @property
    def coefficients(self) -> CostCoefficients:
        return CostCoefficients(
            *(f * c for f, c in zip(self._factors, self.reference, strict=True))
        )

    @property
    def speed(self) -> float:
        """Work of recent images, in `unit`, ÷ the seconds that they took of the replica.

        Their errors are bounded as above.
        """
        return self._unit_s / self._busy_s if self._busy_s else self._first

    def observe(self, shape: ImageShape, busy_s: float) -> None:
        """An image is finished; `busy_s`: its share of the replica's time."""
        parts = self.reference.parts(shape)
        predicted = sum(f * p for f, p in zip(self._factors, parts, strict=True))
        error = min(max(busy_s - predicted, -predicted), predicted)
        gain = RATE * error / sum(p * p for p in parts)
        self._factors = [
            min(max(f + gain * p, 1 / BOUND), BOUND)
            for f, p in zip(self._factors, parts, strict=True)
        ]
        self._unit_s = self._unit_s * (1 - RATE) + self._unit.work_s(shape) * RATE
        self._busy_s = self._busy_s * (1 - RATE) + (predicted + error) * RATE
