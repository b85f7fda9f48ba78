"""The memory that a replica takes of its card, computed from the model's structure and recipe.

Weights are counted exactly. The peaks of a step and of a decode are those of eager execution; a
compiled step takes less. The peak of a step grows linearly with rows × tokens, that of a decode
with the pixels. `bench.memory_model` finds the factors below by following every tensor on torch's
meta device. The CUDA context and the slack of torch's allocator are assumptions until they are
measured on a GPU.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from .structure import TOKEN_PX, Structure

GIB = 2**30
TEXT_TOKENS = 333  # 77 from CLIP and 256 from T5
ROWS_OF_AN_IMAGE = 2  # with guidance

# Peak of a step: how many 16-bit numbers it holds for each token and unit of width. A model with
# dual layers holds one more for each image token.
IMAGE_TOKEN_FP8, IMAGE_TOKEN_16_BIT, TEXT_TOKEN = 19, 13, 3
# By the VAE in 16 bit: three maps of 256 channels at full size. Encoding the picture of an edit
# takes less, and happens at another time.
DECODE_BYTES_PER_PX = 1536
VAE_PARAMETERS = 83_819_683
CLIP_PARAMETERS = 123_650_304 + 694_659_840
T5_LINEAR_PARAMETERS, T5_PARAMETERS = 4_630_511_616, 4_762_310_656
ENCODER_PEAK_GIB = 0.25  # 4 prompts of 256 tokens, and one layer of T5 converted to 16 bit

MODULATED_STEPS = 8  # whose modulation an image keeps: STEPS of serve/engine/modulation.py
CONTEXT_GIB = 0.75  # assumed: CUDA's context with torch's kernels loaded; 0.6 to 0.9 by estimate
WORKSPACE_GIB = 0.25  # assumed: workspaces of cuBLAS and cuDNN
SLACK = 0.1  # assumed: fraction that the allocator holds beyond what steps and decodes need

RECIPES = ("fp8", "fp8-adaln8", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Footprint:
    """A replica's memory by use, in GiB.

    `step` and `decode` are peaks. They add up, because on a card a step and a decode overlap.
    """

    transformer: float
    vae: float
    step: float
    decode: float
    waiting: float  # embeddings and modulation of the running images
    context: float
    slack: float

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))

    @property
    def torch_peak(self) -> float:
        """The GiB that `torch.cuda.max_memory_allocated` should report."""
        return self.total - self.context - self.slack


def transformer_bytes(s: Structure, recipe: str) -> int:
    """Bytes of a transformer's weights, scales and position table: the size of its state dict."""
    d, layers, dual = s.width, s.layers, s.dual_layers
    # Matrices of width × width: q, k, v and out of the image, q, k, v and out of the text, and four
    # more in a dual layer. The last block has no text output.
    squares = 4 * layers + (4 * layers - 1) + 4 * dual
    feed_forwards = 2 * layers - 1
    main, main_outs = d * d * (squares + 8 * feed_forwards), d * (squares + 5 * feed_forwards)
    adaln = adaln_outs(s) * d
    others = sum(
        (
            s.patch_values * d + d,  # pos_embed
            s.positions * d,
            256 * d + d + d * d + d,  # timestep
            s.pooled_width * d + d + d * d + d,  # pooled text
            s.text_width * d + d,  # context_embedder
            s.head_width * (4 * layers + 2 * dual),  # RMS norms of q and k
            2 * d * d + 2 * d,  # norm_out
            d * s.patch_values + s.patch_values,  # proj_out
        )
    )
    return (
        _linear_bytes(main, main_outs, in_8_bit=recipe.startswith("fp8"))
        + _linear_bytes(adaln, adaln_outs(s), in_8_bit=recipe == "fp8-adaln8")
        + 2 * others
    )


def adaln_outs(s: Structure) -> int:
    """The outputs of AdaLN's linear layers in all blocks."""
    plain = s.layers - s.dual_layers
    return s.width * (6 * plain + 9 * s.dual_layers + 6 * (s.layers - 1) + 2)


def _linear_bytes(weights: int, outs: int, *, in_8_bit: bool) -> int:
    """Bytes of linear layers with 16-bit biases; 8-bit layers add a 32-bit scale per output."""
    return weights + 6 * outs if in_8_bit else 2 * (weights + outs)


def step_bytes(s: Structure, recipe: str, rows: int, pixels: int, text_tokens: int) -> int:
    """Bytes at the peak of one step with `rows` rows, in eager execution."""
    image = IMAGE_TOKEN_FP8 if recipe.startswith("fp8") else IMAGE_TOKEN_16_BIT
    image_tokens = pixels // TOKEN_PX**2
    per_row = (image + bool(s.dual_layers)) * image_tokens + TEXT_TOKEN * text_tokens
    return 2 * rows * s.width * per_row


def footprint(
    s: Structure, recipe: str, slots: int, pixels: int, text_tokens: int = TEXT_TOKENS
) -> Footprint:
    """The memory of a Generator that runs `slots` images with guidance at a time.

    `pixels`: the area of the largest image. The rows of a batch are padded to a power of two.
    Raises `ValueError` for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe '{recipe}' must be one of {', '.join(RECIPES)}")
    rows = padded(ROWS_OF_AN_IMAGE * slots)
    vae_width = 4 if recipe == "fp16" else 2  # bytes: the VAE's decoder overflows in float16
    step = step_bytes(s, recipe, rows, pixels, text_tokens) / GIB
    decode = DECODE_BYTES_PER_PX * pixels * vae_width / 2 / GIB
    return Footprint(
        transformer=transformer_bytes(s, recipe) / GIB,
        vae=VAE_PARAMETERS * vae_width / GIB,
        step=step,
        decode=decode,
        waiting=2 * rows * (text_tokens * s.text_width + MODULATED_STEPS * adaln_outs(s)) / GIB,
        context=CONTEXT_GIB,
        slack=WORKSPACE_GIB + SLACK * (step + decode),
    )


def padded(rows: int) -> int:
    """Round a number of rows up to a power of two.

    The engine has code for these numbers of rows only.
    """
    return 1 << (rows - 1).bit_length()


def text_encoders_gib(t5_in_fp8: bool = True) -> float:
    """GiB of a TextEncoder replica with SD3.5's encoders.

    `t5_in_fp8`: whether T5's weights are stored in FP8; otherwise they are stored in 16 bit.
    """
    t5 = T5_LINEAR_PARAMETERS * (1 if t5_in_fp8 else 2)
    t5 += 2 * (T5_PARAMETERS - T5_LINEAR_PARAMETERS)
    weights = (t5 + 2 * CLIP_PARAMETERS) / GIB
    return weights + ENCODER_PEAK_GIB + CONTEXT_GIB + WORKSPACE_GIB
