"""GiB of a card that a replica takes, by formula from its structure and recipe.

Weights are counted exactly. The peaks of a step and of a decode are those of eager execution,
linear in rows × tokens and in pixels: the factors below are what `bench.memory_model` finds by
following every tensor on the meta device; compiled, a step takes less. The CUDA context and the
slack of torch's allocator are assumptions until they are measured on a GPU.

Pure: imports the standard library and pure files only.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

from .structure import TOKEN_PX, Structure

GIB = 2**30
TEXT_TOKENS = 333  # 77 of CLIP and 256 of T5
ROWS_OF_AN_IMAGE = 2  # with guidance

# Peak of a step, in numbers of 16 bit for a token and unit of width; with dual layers one more.
IMAGE_TOKEN_FP8, IMAGE_TOKEN_16_BIT, TEXT_TOKEN = 19, 13, 3
DECODE_BYTES_PER_PX = 1536  # of the VAE in 16 bit: three maps of 256 channels at full size
VAE_PARAMETERS = 83_819_683
CLIP_PARAMETERS = 123_650_304 + 694_659_840
T5_LINEAR_PARAMETERS, T5_PARAMETERS = 4_630_511_616, 4_762_310_656
ENCODER_PEAK_GIB = 0.25  # 4 prompts of 256 tokens, and one layer of T5 out of its storage format

CONTEXT_GIB = 0.5  # assumed: CUDA's context with torch's kernels loaded
WORKSPACE_GIB = 0.25  # assumed: of cuBLAS and cuDNN
SLACK = 0.1  # assumed: what the allocator holds beyond what steps and decodes need

RECIPES = ("fp8", "fp8-adaln8", "bf16", "fp16")


@dataclass(frozen=True, slots=True)
class Footprint:
    """GiB. `step` and `decode` are peaks; on a card they run beside each other."""

    transformer: float
    vae: float
    step: float
    decode: float
    waiting: float  # embeddings and latents of the images under way
    context: float
    slack: float

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))

    @property
    def torch_peak(self) -> float:
        """What `torch.cuda.max_memory_allocated` should report."""
        return self.total - self.context - self.slack


def transformer_bytes(s: Structure, recipe: str) -> int:
    """Of weights, scales and the table of positions; equal to the state dict's."""
    d, layers, dual = s.width, s.layers, s.dual_layers
    # Of width × width: q, k, v and out of images, q, k, v and out of text, four of a second
    # attention to images; the last block gives no text out.
    squares = 4 * layers + (4 * layers - 1) + 4 * dual
    feed_forwards = 2 * layers - 1
    main, main_outs = d * d * (squares + 8 * feed_forwards), d * (squares + 5 * feed_forwards)
    adaln_outs = d * (6 * (layers - dual) + 9 * dual + 6 * (layers - 1) + 2)
    adaln = adaln_outs * d
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
        + _linear_bytes(adaln, adaln_outs, in_8_bit=recipe == "fp8-adaln8")
        + 2 * others
    )


def _linear_bytes(weights: int, outs: int, *, in_8_bit: bool) -> int:
    """With biases of 16 bit; in 8 bit each output also has a scale of 32."""
    return weights + 6 * outs if in_8_bit else 2 * (weights + outs)


def step_bytes(s: Structure, recipe: str, rows: int, pixels: int, text_tokens: int) -> int:
    """The peak of a step of one call with `rows` rows, eager."""
    image = IMAGE_TOKEN_FP8 if recipe.startswith("fp8") else IMAGE_TOKEN_16_BIT
    image_tokens = pixels // TOKEN_PX**2
    per_row = (image + bool(s.dual_layers)) * image_tokens + TEXT_TOKEN * text_tokens
    return 2 * rows * s.width * per_row


def footprint(
    s: Structure, recipe: str, slots: int, pixels: int, text_tokens: int = TEXT_TOKENS
) -> Footprint:
    """Of a Generator that draws `slots` images with guidance at a time, at most this large.

    Batches are padded to a power of two of rows. Raises `ValueError` for an unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe '{recipe}' is none of {', '.join(RECIPES)}")
    rows = padded(ROWS_OF_AN_IMAGE * slots)
    vae_width = 4 if recipe == "fp16" else 2  # its decoder overflows in float16
    step = step_bytes(s, recipe, rows, pixels, text_tokens) / GIB
    decode = DECODE_BYTES_PER_PX * pixels * vae_width / 2 / GIB
    return Footprint(
        transformer=transformer_bytes(s, recipe) / GIB,
        vae=VAE_PARAMETERS * vae_width / GIB,
        step=step,
        decode=decode,
        waiting=2 * rows * text_tokens * s.text_width / GIB,
        context=CONTEXT_GIB,
        slack=WORKSPACE_GIB + SLACK * (step + decode),
    )


def padded(rows: int) -> int:
    """Rows of the call in which so many run: the engine has code for powers of two."""
    return 1 << (rows - 1).bit_length()


def text_encoders_gib(t5_in_fp8: bool = True) -> float:
    """GiB of a TextEncoder with SD3.5's encoders, T5 stored in FP8 or in 16 bit."""
    t5 = T5_LINEAR_PARAMETERS * (1 if t5_in_fp8 else 2)
    t5 += 2 * (T5_PARAMETERS - T5_LINEAR_PARAMETERS)
    weights = (t5 + 2 * CLIP_PARAMETERS) / GIB
    return weights + ENCODER_PEAK_GIB + CONTEXT_GIB + WORKSPACE_GIB
