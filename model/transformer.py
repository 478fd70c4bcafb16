"""The decoder: token ids in, a distribution over the next token out.

    x = embed(ids)
    for each layer:   x = x + attention(rms_norm(x));   x = x + feed_forward(rms_norm(x))
    logits = rms_norm(x) @ lm_head.T

RMSNorm (Zhang & Sennrich 2019), RoPE in the half-split layout (Su et al. 2021), grouped-query attention (Ainslie et al.
2023), SwiGLU (Shazeer 2020): the LLaMA recipe (Touvron et al. 2023). Parameters carry the names that transformers gives
them, so a dense checkpoint opens as LlamaForCausalLM, with `qkv_bias` as Qwen2ForCausalLM, with `qk_norm` as
Qwen3ForCausalLM, and the other way round.
Read next: rope.py (the angles), moe.py (the other feed-forward), generate.py (the cache in use), ../trainer/loss.py
(the training loss).
"""

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
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
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class KVCache:
    """Keys and values of the tokens already seen, owned by the caller and passed in: the model itself keeps no state.

    Room for `max_len` tokens in each of `batch` rows; `length` of them are filled. Where rows differ (see `view`),
    `lengths` (batch,) tells how many of each row, and `length` is the most.
    """

    def __init__(self, config: ModelConfig, batch: int, max_len: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layers, batch, config.n_kv_heads, max_len, config.head_dim)
        # Zeros, because a masked place is multiplied by 0, and 0 times what memory happened to hold may be NaN.
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0
        self.lengths: Tensor | None = None

    @property
    def max_len(self) -> int:
        return self.keys.shape[3]

    def view(self, first: int, end: int, lengths: list[int] | None = None) -> "KVCache":
        """The rows from `first` to before `end`, in the same memory; `lengths` of them are filled (None: none)."""
        view = copy.copy(self)
        view.keys, view.values = self.keys[:, first:end], self.values[:, first:end]
        view.length = max(lengths) if lengths else 0
        view.lengths = torch.tensor(lengths, device=self.keys.device) if lengths else None
        return view

    def positions(self, new: int) -> Tensor:
        """Where the next `new` tokens go: (new,), or (batch, new) where rows differ."""
        ahead = torch.arange(new, device=self.keys.device)
        return self.length + ahead if self.lengths is None else self.lengths[:, None] + ahead

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store new keys and values (batch, kv_heads, new, head_dim) behind the old ones; returns all of them."""
        end = self.length + keys.shape[2]
        if self.lengths is None:
            self.keys[layer, :, :, self.length : end] = keys
            self.values[layer, :, :, self.length : end] = values
        else:
            row = torch.arange(len(keys), device=keys.device)[:, None]
            slot = self.positions(keys.shape[2])
            self.keys[layer][row, :, slot] = keys.transpose(1, 2).to(self.keys.dtype)
            self.values[layer][row, :, slot] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def copy_rows(self, sources: list[int], targets: list[int], length: int) -> None:
        """Row targets[i] becomes a copy of row sources[i], which holds `length` tokens. All are read first."""
        for tensor in (self.keys, self.values):
            tensor[:, targets, :, :length] = tensor[:, sources, :, :length]

    def advance(self, new: int) -> None:
        """Count `new` tokens that every layer has stored."""
        self.length += new
        if self.lengths is not None:
            self.lengths = self.lengths + new


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, dropout: float, mask: Tensor | None = None) -> Tensor:
    """Exactly softmax(q k^T / sqrt(head_dim) + mask) v, in blocks of queries; without `mask` the last sees every key.

    The library kernel's backward takes a third of a CPU training step at head size 32, and in bf16 it is four times
    slower where a single token asks. Here the query heads that share a key head become one tall matrix product, and a
    block of queries never touches the keys after it.
    q (batch, heads, seq, head_dim), k and v (batch, kv_heads, keys >= seq, head_dim), mask as in `Attention` -> as q.
    """
    batch, heads, seq, head_dim = q.shape
    kv_heads, before = k.shape[1], k.shape[2] - seq  # keys that every query sees: those of a cache
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
    """Grouped-query self-attention: n_heads queries over n_kv_heads keys and values. arXiv:2305.13245, section 2."""

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
        """x (batch, seq, dim) -> the same shape.

        mask: ([batch, 1,] seq, keys) bool, True where a query sees a key. None: causal attention over x alone, or one
        token that sees everything.
        """
        batch, seq, _ = x.shape
        heads = (batch, seq, -1, self.config.head_dim)
        q = apply_rope(self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2), cos, sin)
        k = apply_rope(self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        q, k, v = q.to(v.dtype), k.to(v.dtype), v
        dropout = self.config.dropout if self.training else 0.0
        if x.device.type == "cpu" and (mask is None or seq == 1):
            out = attention_cpu(q, k, v, dropout, mask)
        else:
            causal = mask is None and seq > 1
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=True
            )
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
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp: nn.Module
        if config.use_moe:
            self.mlp = MoEFeedForward(config, lambda: FeedForward(config.dim, config.hidden_dim))
        else:
            self.mlp = FeedForward(config.dim, config.hidden_dim)
        self.use_moe = config.use_moe
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KVCache | None, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (batch, seq, dim) -> x of the same shape, and this layer's balance loss (a scalar; 0 when dense)."""
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache))
        if self.use_moe:
            out, aux_loss = self.mlp(self.post_attention_layernorm(x), token_mask)
        else:
            out, aux_loss = self.mlp(self.post_attention_layernorm(x)), x.new_zeros(())
        return x + self.dropout(out), aux_loss


class Decoder(nn.Module):
    """The trunk. It is a module of its own only so that names begin with `model.` as they do in transformers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)


class Transformer(nn.Module):
    """The whole model. `forward` gives hidden states for the losses, `logits` gives logits for everybody else."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter: dict[str, Any] = {}  # what is attached to this model (lora.py), and to which parent
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.activation_checkpointing = False  # recompute each layer in backward: less memory, about a third more time
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.set_rope(config)
        self.init_weights()

    def set_rope(self, config: ModelConfig) -> None:
        """Compute the table of angles for a config that differs from the model's in max_seq_len and RoPE alone."""
        self.config = config
        for name, table in zip(("rope_cos", "rope_sin"), rope_table(config), strict=True):
            self.register_buffer(name, table.to(self.lm_head.weight.device), persistent=False)

    def scale_rope(self, kind: str, factor: float) -> None:
        """Read `factor` times as many tokens as in training; see rope.extend_context."""
        self.set_rope(extend_context(self.config, kind, factor))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Normal(0, 0.02); what a layer adds to the residual stream is scaled down by sqrt(2 n_layers) (GPT-2, 2.3).
        Norms start at one, biases at zero."""
        for name, weight in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(weight)
            elif weight.dim() < 2:
                nn.init.ones_(weight)
            else:
                adds_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * self.config.n_layers) if adds_to_stream else 1))

    def forward(
        self,
        input_ids: Tensor,
        cache: KVCache | None = None,
        padding: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the last norm, and the balance loss.

        input_ids: (batch, seq) token ids.
        cache: tokens seen before; the new ones are appended to it.
        padding: (batch,) number of pad tokens at the *left* of each row (counted from the start of the cache). Pads on
            the right need nothing: no real token looks that way.
        token_mask: (batch, seq) bool, False at padding, so that padding does not count in the balance loss of an MoE.
        Returns (batch, seq, dim), and a scalar to be added to the loss of every token: balance_loss_coef times the mean
        over layers of the router's balance loss while an MoE trains, 0 otherwise.
        Raises ValueError beyond max_seq_len or the room of the cache.
        """
        start, seq = (cache.length if cache else 0), input_ids.shape[1]
        capacity = min(self.config.max_seq_len, cache.max_len) if cache else self.config.max_seq_len
        if start + seq > capacity:
            raise ValueError(
                f"{start + seq} tokens do not fit: the limit is {capacity} (max_seq_len or the cache's room)"
            )
        positions = cache.positions(seq) if cache else torch.arange(seq, device=input_ids.device)
        mask = None  # x alone, or one token that sees all before it: every kernel knows these
        if padding is not None or (cache and cache.lengths is not None) or (start and seq > 1):
            keys = torch.arange(start + seq, device=input_ids.device)
            mask = keys <= positions[..., None]  # (seq, keys), or (batch, seq, keys) where rows of the cache differ
            if padding is not None:  # a pad token sees only itself: an empty row of the softmax would be NaN
                mask = mask & (keys >= padding[:, None, None]) | (keys == positions[:, None])
                positions = (positions - padding[:, None]).clamp(min=0)
            if mask.dim() == 3:
                mask = mask[:, None]  # (batch, 1, seq, keys)
        cos, sin = self._angles(positions, start + seq)  # (seq, head_dim) or (batch, seq, head_dim)
        if positions.dim() == 2:
            cos, sin = cos[:, None], sin[:, None]

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

    def _angles(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin at positions (seq,) or (batch, seq), of sequences of at most `length` tokens."""
        scaling = self.config.rope_scaling
        if scaling.get("rope_type") != "dynamic" or length <= scaling["original_max_position_embeddings"]:
            return self.rope_cos[positions], self.rope_sin[positions]
        lengths = positions.amax(-1) + 1 if positions.dim() == 2 else positions.new_full((), length)
        cos, sin = dynamic_rope(self.config, positions, lengths)
        return cos.to(self.rope_cos.dtype), sin.to(self.rope_sin.dtype)

    def logits(self, input_ids: Tensor, cache: KVCache | None = None, padding: Tensor | None = None) -> Tensor:
        """Logits (batch, seq, vocab) of the token after each position; arguments as in `forward`."""
        logits: Tensor = self.lm_head(self(input_ids, cache, padding)[0])
        return logits

    def count_parameters(self) -> tuple[int, int]:
        """(total, active per token): they differ when a router leaves experts out."""
        total = sum(p.numel() for p in self.parameters())
        if not self.config.use_moe:
            return total, total
        expert = 3 * self.config.dim * self.config.hidden_dim
        idle = self.config.n_routed_experts - self.config.n_active_experts
        return total, total - self.config.n_layers * idle * expert
