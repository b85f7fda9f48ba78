"""Facts about the cards that Octet knows: memory, compute capability, rates and prices.

Sources:

- Memory is the lowest figure seen of what CUDA reports: the total of nvidia-smi less what the
  driver keeps (github.com/modal-labs/modal-client pull request 2797 lists totals). Those of the RTX
  2080 Ti, 3060, 3090 and 4060 are in error messages of torch that their owners have published. No
  such figure was found for the RTX 4070, 4080 and 5080: they are taken as 96.9 % of the memory on
  the box, the lowest share that was seen.
- Compute capabilities are those of NVIDIA's list of CUDA GPUs.
- Rates are dense: they do not count on zeros in the weights. They come from NVIDIA's datasheets
  (T4, A10, L4, L40S, A100, B200) and architecture white papers (GeForce cards: with float32
  accumulation). The white papers do not list the RTX 3060, 4060 and 4070: their rates are 512
  operations per clock and multiprocessor, as of the listed cards, times multiprocessors and boost
  clock. The clock of an RTX 4060 laptop GPU depends on its power limit; 2.37 GHz is the highest.
  For the H100 and H200 NVIDIA states 989 (16 bit) and 1,979 (FP8) TFLOP/s. A large bf16 product on
  random data reaches 800 of the 989, so 800 is used; FP8 is taken as twice that.
- Prices are those of one large provider in March 2026 (deploybase.ai, "RunPod GPU pricing"), with
  exceptions. The T4's are Google Cloud's list prices. The A10's, and the A100-40's on demand, are
  Lambda's. The A100-40's spot price is DataCrunch's. There are none for cards that people own
  rather than rent. Prices differ between providers by factors of two to four: set your own with
  `octet plan --prices FILE`.

Pure: standard library only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

FP8_SINCE = (8, 9)  # compute capability
BF16_SINCE = (8, 0)
# The memory that CUDA reports may differ from `Card.memory_gib` by this fraction, because drivers
# keep different amounts of memory for themselves.
MEMORY_TOLERANCE = 0.08


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU model.

    - `name`: the part of the driver's device name that identifies the card.
    - `ray_names`: the values of Ray's label `ray.io/accelerator-type` that mean this card.
    - `tflops`: dense TFLOP/s in 16 bit (fp16 where there is no bf16).
    - `fp8_tflops`: dense TFLOP/s in FP8, None without FP8 tensor cores.
    - `on_demand_usd_h`, `spot_usd_h`: prices in US dollars per hour of one card, None if not known.
    """

    id: str
    name: str
    ray_names: tuple[str, ...]
    memory_gib: float
    compute_capability: tuple[int, int]
    tflops: float
    fp8_tflops: float | None
    bandwidth_gb_s: float
    on_demand_usd_h: float | None = None
    spot_usd_h: float | None = None

    @property
    def has_fp8(self) -> bool:
        return self.compute_capability >= FP8_SINCE


CARDS = {
    card.id: card
    for card in (
        Card("t4", "T4", ("T4",), 14.56, (7, 5), 65, None, 320, 0.35, 0.11),
        Card(
            id="rtx2080ti",
            name="RTX 2080 Ti",
            ray_names=("GeForce-RTX-2080-Ti",),
            memory_gib=10.76,
            compute_capability=(7, 5),
            tflops=53.8,
            fp8_tflops=None,
            bandwidth_gb_s=616,
        ),
        Card("rtx3060", "RTX 3060", ("GeForce-RTX-3060",), 11.75, (8, 6), 25.5, None, 360),
        Card("rtx3090", "RTX 3090", ("GeForce-RTX-3090",), 23.69, (8, 6), 71.2, None, 936),
        Card("rtx4060", "RTX 4060", ("GeForce-RTX-4060",), 7.75, (8, 9), 30.2, 60.5, 272),
        Card(
            id="rtx4060-laptop",
            name="RTX 4060 Laptop GPU",
            ray_names=("GeForce-RTX-4060-Laptop-GPU",),
            memory_gib=7.75,
            compute_capability=(8, 9),
            tflops=29.1,
            fp8_tflops=58.2,
            bandwidth_gb_s=256,
        ),
        Card("rtx4070", "RTX 4070", ("GeForce-RTX-4070",), 11.63, (8, 9), 58.3, 116.6, 504),
        Card("rtx4080", "RTX 4080", ("GeForce-RTX-4080",), 15.5, (8, 9), 97.5, 194.9, 717),
        Card("rtx5080", "RTX 5080", ("GeForce-RTX-5080",), 15.5, (12, 0), 112.6, 225.1, 960),
        Card("a10", "A10", ("A10",), 21.98, (8, 6), 125, None, 600, 0.75, None),
        Card("l4", "L4", ("L4",), 22.03, (8, 9), 121, 242, 300, 0.78, 0.44),
        Card("l40s", "L40S", ("L40S",), 44.31, (8, 9), 362, 733, 864, 1.40, 0.79),
        Card(
            "rtx4090", "RTX 4090", ("GeForce-RTX-4090",), 23.51, (8, 9), 165, 330, 1008, 0.60, 0.34
        ),
        Card(
            "rtx5090", "RTX 5090", ("GeForce-RTX-5090",), 31.35, (12, 0), 209, 419, 1792, 1.22, 0.69
        ),
        # Ray's "A100" does not say how much memory the card has, and counts as the smaller card.
        Card("a100-40", "A100", ("A100", "A100-40G"), 39.38, (8, 0), 312, None, 1555, 1.29, 0.25),
        Card("a100-80", "A100", ("A100-80G",), 79.14, (8, 0), 312, None, 1935, 2.10, 1.19),
        Card("h100", "H100", ("H100",), 79.11, (9, 0), 800, 1600, 3350, 4.76, 2.69),
        Card("h200", "H200", ("H200",), 139.7, (9, 0), 800, 1600, 4800, 6.35, 3.59),
        Card("b200", "B200", ("B200",), 178.3, (10, 0), 2250, 4500, 7700, 10.57, 5.98),
    )
}

# Compute capabilities of cards that are not in `CARDS`, by Ray's name.
OTHER_CAPABILITIES = {
    "P4": (6, 1),
    "P100": (6, 0),
    "V100": (7, 0),
    "A30": (8, 0),
    "A2": (8, 6),
    "A10G": (8, 6),
    "A16": (8, 6),
    "A40": (8, 6),
    "RTX-A6000": (8, 6),
    "L40": (8, 9),
    "H20": (9, 0),
    "GH200": (9, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
    "RTX-PRO-6000": (12, 0),
}
# Compute capabilities of all known cards, by Ray's name.
CAPABILITIES = {
    **{name: card.compute_capability for card in CARDS.values() for name in card.ray_names},
    **OTHER_CAPABILITIES,
}


def cards_named(text: str) -> list[Card]:
    """The cards that a person may mean by a text, such as H100, 4090 or a100-80gb.

    The names that `nvidia-smi` prints are known too: "NVIDIA A100-SXM4-80GB" is `a100-80`. "A100"
    may be either A100.
    """
    words = re.sub(r"nvidia|geforce|tesla|pcie|sxm\d?|hbm\de?|nvl|gi?b\b", " ", text.lower())
    given = re.sub(r"[^a-z0-9]", "", words)
    exact = [card for card in CARDS.values() if given == re.sub(r"[^a-z0-9]", "", card.id)]
    return exact or [card for card in CARDS.values() if _is_named(card, given)]


def _is_named(card: Card, given: str) -> bool:
    """Return whether letters and digits are a card's name, with or without its memory in GB."""
    name = re.sub(r"[^a-z0-9]", "", card.name.lower())
    for known in (name, name.removeprefix("rtx")):
        rest = given.removeprefix(known) if given.startswith(known) else None
        if rest == "":
            return True
        if rest and rest.isdecimal() and abs(int(rest) / card.memory_gib - 1) < MEMORY_TOLERANCE:
            return True
    return False


def card_of(ray_name: str) -> Card | None:
    """The card that Ray's label `ray.io/accelerator-type` names; None if it is unknown."""
    return next((card for card in CARDS.values() if ray_name in card.ray_names), None)


def card_of_device(name: str, memory_gib: float) -> Card | None:
    """The card that the driver reports by this name and memory; None if it is unknown.

    Example: "NVIDIA A100-SXM4-40GB" with 39.4 GiB is `a100-40`. Memory is compared too, because
    partitions and larger cards have the same name and are other cards.
    """
    return next(
        (
            card
            for card in CARDS.values()
            if re.search(rf"\b{card.name}\b(?! (Ti|SUPER|D|Laptop)\b)", name)
            and abs(memory_gib / card.memory_gib - 1) < MEMORY_TOLERANCE
        ),
        None,
    )
