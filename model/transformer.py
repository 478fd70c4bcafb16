"""Decoder-only transformer: token ids in, logits of the next token out.

    x = embed(ids)                                                              (batch, seq) -> (batch, seq, dim)
    for each layer:   x = x + attention(rms_norm(x));   x = x + feed_forward(rms_norm(x))
    logits = rms_norm(x) @ lm_head.T                                            (batch, seq, vocab)

LLaMA architecture (Touvron et al. 2023): RMSNorm (Zhang & Sennrich 2019), RoPE in the half-split layout (Su et al.
2021), grouped-query attention (Ainslie et al. 2023), SwiGLU (Shazeer 2020). Parameter names are those of transformers:
the weights of a dense model load into LlamaForCausalLM (Qwen2ForCausalLM with `qkv_bias`, Qwen3ForCausalLM with
`qk_norm`), and theirs load here.
Read next: rope.py, moe.py, generate.py (how the KV cache is used), ../trainer/loss.py (the training loss).
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.device import compute_dtype
from model.config import ModelConfig
from model.cpu_ops import rms_norm, rotate, swiglu_down, trains_on_cpu
from model.moe import MoEFeedForward
from model.rope import apply_rope, dynamic_rope, extend_context, rope_table

CPU_QUERY_BLOCK = 128  # queries per block of the CPU attention; 64 and 256 measured slower at 512 tokens


class RMSNorm(nn.Module):
    """x / rms(x) * weight, over the last dimension; shape unchanged. arXiv:1910.07467, eq. 4."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 and trains_on_cpu(x):
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class KVCache:
    """Keys and values of past tokens. The caller owns the cache and passes it to `forward`; the model has no state.

    keys, values: (n_layers, batch, n_kv_heads, max_len, head_dim). `length` positions of each row are filled. In a view
    whose rows differ, `lengths` (batch,) holds the number for each row, and none is more than `length`.
    """

    def __init__(self, config: ModelConfig, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        # Zeros, not uninitialised memory: masked positions get weight 0, and 0 * NaN is NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.lengths: Tensor | None = None

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def view(self, first: int, end: int, lengths: list[int] | None = None) -> "KVCache":
        """A cache over rows first..end-1 that shares this memory. `lengths`: filled positions per row; None: empty."""
        view = object.__new__(KVCache)
        view.keys, view.values = self.keys[:, first:end], self.values[:, first:end]
        view.length, view.lengths = max(lengths) if lengths else 0, None
        if lengths and min(lengths) < view.length:
            view.lengths = torch.tensor(lengths, device=self.keys.device)
        return view

    def static_view(self, lengths: Tensor) -> "KVCache":
        """A view of the first rows for one more token each, in which no shape depends on `lengths` (rows,)."""
        view = self.view(0, len(lengths))
        view.length, view.lengths = self.max_len - 1, lengths
        return view

    def positions(self, new: int) -> Tensor:
        """Positions of the next `new` tokens: (new,), or (batch, 1, new) where rows have different lengths."""
        ahead = torch.arange(new, device=self.keys.device)
        return self.length + ahead if self.lengths is None else self.lengths[:, None, None] + ahead

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (batch, kv_heads, new, head_dim) of one layer; returns all of the layer."""
        end, all_keys, all_values = self.length + keys.shape[2], self.keys[layer], self.values[layer]
        if self.lengths is None:
            all_keys[:, :, self.length : end] = keys
            all_values[:, :, self.length : end] = values
        else:
            index = self.positions(keys.shape[2])[..., None].expand(keys.shape)
            all_keys.scatter_(2, index, keys.to(all_keys.dtype))
            all_values.scatter_(2, index, values.to(all_values.dtype))
        return all_keys[:, :, :end], all_values[:, :, :end]

    def copy_rows(self, source: "KVCache", rows: list[int] | slice, targets: list[int] | slice, length: int) -> None:
        """Copy the first `length` positions of row rows[i] of `source` (it may be this cache) to row targets[i]."""
        for kept, other in ((self.keys, source.keys), (self.values, source.values)):
            kept[:, targets, :, :length] = other[:, rows, :, :length]  # reads a list of rows before it writes

    def advance(self, new: int) -> None:
        """Add `new` to the lengths, after every layer has appended its keys and values."""
        self.length += new
        if self.lengths is not None:
            self.lengths = self.lengths + new


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v in blocks of queries. No `mask`: causal, the last query sees all keys.

    q (batch, heads, seq, head_dim); k, v (batch, kv_heads, keys >= seq, head_dim); mask as in `Attention.forward`.
    Returns the shape of q. In 16 bits F.scaled_dot_product_attention is slower on a CPU: twice in backward, four times
    for one query. Here the query heads of a key head form one matrix product, and a block of queries skips the keys
    after it.
    """
    batch, heads, seq, head_dim = q.shape
    kv_heads, before = k.shape[1], k.shape[2] - seq  # cached keys, which every query sees
    q = (q * head_dim**-0.5).view(batch, kv_heads, heads // kv_heads, seq, head_dim)
    blocks = []
    for start in range(0, seq, CPU_QUERY_BLOCK):
        end = min(start + CPU_QUERY_BLOCK, seq)
        seen = before + end
        rows = q[:, :, :, start:end].reshape(batch, kv_heads, -1, head_dim)
        scores = (rows @ k[:, :, :seen].transpose(-1, -2)).view(batch, heads, end - start, seen)
        if mask is None:
            future = torch.full((end - start, seen), -math.inf, dtype=scores.dtype, device=q.device)
            scores = scores + future.triu(1 + before + start)
        else:
            scores = scores.masked_fill(~mask[..., start:end, :seen], -math.inf)
        weights = F.dropout(scores.softmax(-1), dropout, training=dropout > 0)
        block = weights.view(batch, kv_heads, -1, seen) @ v[:, :, :seen]
        blocks.append(block.view(batch, heads, end - start, head_dim))
    return torch.cat(blocks, dim=2)


class Attention(nn.Module):
    """Grouped-query attention: n_heads query heads share n_kv_heads key/value heads. arXiv:2305.13245, section 2."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.dim, q_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.dim, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (batch, seq, dim) -> (batch, seq, dim). cos, sin: (seq, head_dim) or (batch, 1, seq, head_dim).

        mask: ([batch, 1,] seq, keys) bool, True where a query sees a key. None: causal, or one query that sees all.
        """
        heads, seq = (*x.shape[:2], -1, self.config.head_dim), x.shape[1]
        x = x.to(compute_dtype(x))  # autocast would convert it for each product
        rope = rotate if trains_on_cpu(x) else apply_rope
        q = rope(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = rope(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        q, k = q.to(v.dtype), k.to(v.dtype)
        dropout = self.config.dropout if self.training else 0.0
        is_short = mask is None or seq == 1
        if x.device.type == "cpu" and v.dtype != torch.float32 and is_short and not torch.compiler.is_compiling():
            out = attention_cpu(q, k, v, dropout, mask)
        else:
            causal = mask is None and (cache is None or seq > 1)  # a bool, also if torch.compile makes seq a symbol
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=True)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), shape unchanged. arXiv:2002.05202, eq. 6."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(compute_dtype(x))  # autocast would convert it for each product
        gate, up = self.gate_proj(x), self.up_proj(x)
        # DeepSpeed ZeRO-3 (ds_id) frees the weights of all modules but the one whose backward runs.
        if trains_on_cpu(x) and type(self.down_proj) is nn.Linear and not hasattr(self.down_proj.weight, "ds_id"):
            return swiglu_down(gate, up, self.down_proj.weight)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class DecoderLayer(nn.Module):
    """Pre-norm residual block: attention, then a dense or MoE feed-forward. Arguments as in `Attention.forward`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        make_mlp = functools.partial(FeedForward, config.dim, config.hidden_dim)
        self.mlp = MoEFeedForward(config, make_mlp) if config.use_moe else make_mlp()
        self.use_moe = config.use_moe
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (batch, seq, dim) -> (batch, seq, dim), and this layer's balance loss (scalar; 0 in a dense model)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        if self.use_moe:
            out, aux_loss = self.mlp(self.post_attention_layernorm(x), token_mask)
        else:
            out, aux_loss = self.mlp(self.post_attention_layernorm(x)), x.new_zeros(())
        return x + self.dropout(out), aux_loss


class Decoder(nn.Module):
    """Embedding, layers and final norm. A separate module, so that parameter names begin with `model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Transformer(nn.Module):
    """The language model. `forward` returns hidden states (for the loss), `logits` returns logits."""

    rope_cos: Tensor  # (max_seq_len, head_dim)
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter: dict[str, Any] = {}  # LoRA settings and parent, {} without an adapter (lora.py)
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.activation_checkpointing = False  # recompute layers in backward: less memory, about 1/3 more time
        self.set_rope(config)
        self.init_weights()

    def set_rope(self, config: ModelConfig) -> None:
        """Set a config that differs only in max_seq_len or RoPE, and recompute the tables of cos and sin."""
        self.config = config
        for name, table in zip(("rope_cos", "rope_sin"), rope_table(config), strict=True):
            self.register_buffer(name, table.to(self.lm_head.weight.device), persistent=False)

    def scale_rope(self, kind: str, factor: float) -> None:
        """Extend max_seq_len by `factor` with RoPE scaling of type `kind`; see rope.extend_context."""
        self.set_rope(extend_context(self.config, kind, factor))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02), divided by sqrt(2 n_layers) for o_proj and down_proj (GPT-2, 2.3); norms 1, biases 0."""
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                nn.init.constant_(weight, 0.0 if name.endswith(".bias") else 1.0)
            else:
                adds_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * self.config.n_layers) if adds_to_stream else 1))

    def forward(
        self, input_ids: Tensor, cache: KVCache | None = None, token_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm, (batch, seq, dim), and the balance loss of an MoE (scalar).

        input_ids: (batch, seq) token ids. Padding on the right needs no mask: attention is causal.
        cache: keys and values of earlier tokens; those of input_ids are appended.
        token_mask: (batch, seq) bool, False at padding: excludes these tokens from the balance loss.
        Balance loss, added to the loss of every token: balance_loss_coef * mean over layers while an MoE trains, else
        0. Raises ValueError if the tokens exceed max_seq_len or KVCache.max_len.
        """
        start, seq = (cache.length if cache else 0), input_ids.shape[1]
        capacity = min(self.config.max_seq_len, cache.max_len) if cache else self.config.max_seq_len
        if start + seq > capacity:
            raise ValueError(f"{start + seq} tokens do not fit: the limit is {capacity} (max_seq_len or cache.max_len)")
        positions = cache.positions(seq) if cache else torch.arange(seq, device=input_ids.device)
        mask = None  # causal from position 0, or one query that sees all keys
        if cache and (cache.lengths is not None or (start and seq > 1)):
            mask = torch.arange(start + seq, device=input_ids.device) <= positions[..., None]
        cos, sin = self.rope_angles(positions, start + seq)

        x = self.model.embed_tokens(input_ids)
        aux_loss = x.new_zeros(())
        for layer in self.model.layers:
            if self.activation_checkpointing and self.training:
                x, layer_aux_loss = checkpoint(layer, x, cos, sin, mask, cache, token_mask, use_reentrant=False)
            else:
                x, layer_aux_loss = layer(x, cos, sin, mask, cache, token_mask)
            aux_loss = aux_loss + layer_aux_loss
        if cache is not None:
            cache.advance(seq)
        weight = self.config.balance_loss_coef / len(self.model.layers) if self.training else 0.0
        return self.model.norm(x), aux_loss * weight

    def rope_angles(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin at positions (..., seq) of sequences of up to `length` tokens, each (..., seq, head_dim)."""
        scaling = self.config.rope_scaling
        if scaling.get("rope_type") != "dynamic" or length <= scaling["original_max_position_embeddings"]:
            return self.rope_cos[positions], self.rope_sin[positions]
        cos, sin = dynamic_rope(self.config, positions)
        return cos.to(self.rope_cos.dtype), sin.to(self.rope_sin.dtype)

    def logits(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits of the next token at each position, (batch, seq, vocab); arguments as in `forward`."""
        logits: Tensor = self.lm_head(self(input_ids, cache)[0])
        return logits

    def count_parameters(self) -> tuple[int, int]:
        """(total, active per token). In an MoE the experts that the router does not select are inactive."""
        total, config = sum(p.numel() for p in self.parameters()), self.config
        idle_experts = config.n_routed_experts - config.n_active_experts if config.use_moe else 0
        return total, total - config.n_layers * idle_experts * 3 * config.dim * config.hidden_dim
