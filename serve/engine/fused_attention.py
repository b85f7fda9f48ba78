"""Attention with one matrix product for q, k and v together.

Joining the three layers changes no result, even in row-wise FP8: each output channel keeps its
weights and gets its own scale. The separate layers are deleted, so that the weights are in memory
only once. The layers are joined before they are quantised and moved to the card; joined there, they
would leave gaps in the memory that torch's allocator has reserved.
diffusers also has a fused attention processor for SD3. Octet cannot use that one, because it leaves
out the norms of q and k, which SD3.5 has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn


def fuse_qkv(transformer: nn.Module) -> nn.Module:
    """Join the q, k and v layers of every attention module, in place; they must be in 16 bit."""
    for module in transformer.modules():
        if isinstance(module, Attention):
            module.to_qkv = _joined(module.to_q, module.to_k, module.to_v)
            del module.to_q, module.to_k, module.to_v
            if module.added_kv_proj_dim is not None:
                module.to_added_qkv = _joined(
                    module.add_q_proj, module.add_k_proj, module.add_v_proj
                )
                del module.add_q_proj, module.add_k_proj, module.add_v_proj
            module.set_processor(FusedAttention())
    return transformer


def _joined(*layers: nn.Linear) -> nn.Linear:
    """Join several linear layers into one with all their output channels."""
    weight, bias = _cat(layers, "weight"), _cat(layers, "bias")
    with torch.device("meta"):
        joined = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined


def _cat(layers: Sequence[nn.Linear], name: str) -> Any:
    tensors: list[Any] = [getattr(layer, name) for layer in layers]
    return None if tensors[0] is None else torch.cat([t.detach() for t in tensors])


class FusedAttention:
    """An attention processor for diffusers' blocks, with joined q, k and v layers.

    The attention is among the image's tokens alone, or among those of image and text together.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
    ) -> Any:
        """Compute attention for the image (`hidden_states`) and the text, if there is one.

        Both inputs have the shape (rows, tokens, width). Returns the image's output, or the outputs
        of image and text if there is text. The last block has no linear layer for the text's
        output, so there the text's output is returned without that layer.
        """
        q, k, v = _heads(attn.to_qkv(hidden_states), attn.heads)
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            q2, k2, v2 = _heads(attn.to_added_qkv(encoder_hidden_states), attn.heads)
            q2, k2 = attn.norm_added_q(q2), attn.norm_added_k(k2)
            q, k, v = torch.cat([q, q2], 2), torch.cat([k, k2], 2), torch.cat([v, v2], 2)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return attn.to_out[0](out)
        image, text = out[:, : hidden_states.shape[1]], out[:, hidden_states.shape[1] :]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[0](image), text


def _heads(qkv: torch.Tensor, heads: int) -> Sequence[torch.Tensor]:
    """Split (rows, tokens, 3 · width) into q, k and v, each (rows, heads, tokens, head width)."""
    rows, tokens, _ = qkv.shape
    return [part.view(rows, tokens, heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1)]
