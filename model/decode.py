"""The decoding step: the last token of each row in, the logits of its next token out.

    decoder = DecodeModel(model, dtype)                                      weights in `dtype`
    round_to_int8(model); decoder = DecodeModel(model, dtype, int8=True)     int8 weights, products in bf16
    logits = decoder.step(ids, lengths, cache)    row i holds lengths[i] tokens and appends ids[i]

The same function as `Transformer.forward` for one new token per row, to rounding, in fewer operations. In the dtype of
the model it uses the model's own matrices; in another dtype it holds copies, which do not follow later changes of the
model. Weight-only int8: w[o, i] = scale[o] * q[o, i] with integers |q| <= 127, one scale per output channel. The model
keeps the same values, so that prompts and scores are computed with the weights that decode.
With `backend` the step is one compiled graph for each number of rows (a power of two) and capacity of the cache.
Called by generate.py. Read next: transformer.py (the oracle of tests/model/test_decode.py).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.device import has_fast_bf16
from common.errors import require
from model.lora import LoRALinear
from model.transformer import Attention, KVCache, Transformer

KERNEL_MULTIPLE = 32  # torch's int8 kernel reads outside of the matrix if in_features is not a multiple of it
# Private functions of torch, which its compiler calls: oneDNN's product with a matrix that was packed before.
HAS_PACKED_BF16 = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.ops.mkldnn._is_mkldnn_bf16_supported()

MakeProduct = Callable[[Sequence[nn.Module]], nn.Module]  # linear layers of one input -> a module that joins them


def max_fast_rows(device: torch.device, dtype: torch.dtype, int8: bool) -> float:
    """The number of rows up to which products with 8- or 16-bit weights are faster than those in fp32.

    Measured with a model of 27 M parameters, on one thread, with oneDNN limited to the instructions of older CPUs.
    """
    if device.type != "cpu" or (dtype == torch.bfloat16 and not int8 and has_fast_bf16(device)):
        return math.inf
    if int8:
        return 16
    if dtype != torch.bfloat16:
        return 0
    has_instructions = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return 16 if has_instructions else 1 if HAS_PACKED_BF16 else 0


class SharedProduct(nn.Module):
    """x (..., in) -> the outputs of the given layers side by side, by these layers."""

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.linears, self.dtype = nn.ModuleList(linears), dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        outputs = [linear(x) for linear in self.linears]
        return torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]


def joined_weight(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None]:
    """The weights (out, in) of linear layers below each other, with LoRA's delta, and their biases (out,) or None."""
    merged: list[Any] = [linear.merged_linear() if isinstance(linear, LoRALinear) else linear for linear in linears]
    bias = torch.cat([linear.bias for linear in merged]) if isinstance(merged[0].bias, Tensor) else None
    return torch.cat([linear.weight for linear in merged]), bias


class CopiedProduct(nn.Module):
    """The same with one matrix in another dtype. F.linear packs a matrix in bf16 for oneDNN again at each call."""

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = joined_weight(linears)
        weight = weight.detach().to(dtype)
        self.is_packed = HAS_PACKED_BF16 and dtype == torch.bfloat16 and weight.device.type == "cpu"
        if self.is_packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.dtype)
        if not self.is_packed:
            return F.linear(x, self.weight, self.bias)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return out if self.bias is None else out + self.bias


def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (out, in) -> integers (out, in) and scales (out,) in bf16, in which the CPU kernel reads them.

    A second call on their product returns the same.
    """
    scale = (weight.float().abs().amax(1) / 127).bfloat16()
    quotient = weight.float() / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return quotient.round().clamp(-127, 127).to(torch.int8), scale


class Int8Product(nn.Module):
    """The same with an int8 matrix, in torch's CPU kernel, which is fast for x in bf16 only."""

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        weight, self.bias = joined_weight(linears)
        self.integers, self.scale = (nn.Parameter(value, requires_grad=False) for value in int8_weight(weight))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch._weight_int8pack_mm(x.bfloat16(), self.integers, self.scale)
        return out if self.bias is None else out + self.bias


def make_product(linears: Sequence[Any], dtype: torch.dtype, int8: bool) -> nn.Module:
    """The product of linear layers of one input. `int8`: with int8 weights where torch has a kernel for them."""
    weight = linears[0].weight
    is_multiple = weight.shape[1] % KERNEL_MULTIPLE == 0
    if int8 and weight.device.type == "cpu" and is_multiple and hasattr(torch, "_weight_int8pack_mm"):
        return Int8Product(linears)
    return (SharedProduct if dtype == weight.dtype else CopiedProduct)(linears, dtype)


@torch.no_grad()
def round_to_int8(model: Transformer) -> None:
    """Round every matrix but the routers to the values of int8 weights, in place. Raises UserError with an adapter."""
    require(not model.adapter, "int8 weights: merge the adapter first, because W and W + BA round differently")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(".mlp.gate"):
            integers, scale = int8_weight(module.weight)
            module.weight.copy_(integers.float() * scale.float()[:, None])


class DecodeFeedForward(nn.Module):
    """A FeedForward on x (rows, dim)."""

    def __init__(self, mlp: Any, product: MakeProduct) -> None:
        super().__init__()
        self.gate_up, self.down = product([mlp.gate_proj, mlp.up_proj]), product([mlp.down_proj])

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


class DecodeMoE(nn.Module):
    """`MoEFeedForward` on x (rows, dim): each expert in use processes all rows, with weight 0 where not selected."""

    def __init__(self, mlp: Any, product: MakeProduct) -> None:
        super().__init__()
        self.gate, self.n_active = mlp.gate, mlp.n_active
        self.experts = nn.ModuleList(DecodeFeedForward(expert, product) for expert in mlp.experts)
        self.shared = nn.ModuleList(DecodeFeedForward(expert, product) for expert in mlp.shared_experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = F.linear(x, self.gate.weight.float()).softmax(-1).topk(self.n_active, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        # A compiled step runs all experts: to know which are in use, the host would have to wait for the GPU.
        in_use = range(len(self.experts)) if torch.compiler.is_compiling() else sorted(set(chosen.flatten().tolist()))
        out = torch.zeros_like(x)
        for i in in_use:
            out = out + self.experts[i](x) * (weights * (chosen == i)).sum(-1, keepdim=True)
        for expert in self.shared:
            out = out + expert(x)
        return out


class DecodeAttention(nn.Module):
    """`Attention` on x (rows, dim) with a cache: queries of one key head attend as if they were a sequence."""

    def __init__(self, attention: Attention, product: MakeProduct) -> None:
        super().__init__()
        config = attention.config
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        self.layer, self.has_norm = attention.layer, config.qk_norm
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.qkv = product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = product([attention.o_proj])

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        """rotation ([rows,] head_dim, head_dim): RoPE as a matrix. mask (rows, 1, 1, keys): 0 or -inf, None: all 0."""
        heads = self.qkv(x).view(len(x), -1, self.head_dim)
        q_k, v = heads.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], 1)
        if self.has_norm:
            q_k = torch.cat((self.q_norm(q_k[:, : self.n_heads]), self.k_norm(q_k[:, self.n_heads :])), 1)
        q, k = (q_k.float() @ rotation).split([self.n_heads, self.n_kv_heads], 1)
        keys, values = cache.append(self.layer, k[:, :, None], v[:, :, None])
        grouped = q.reshape(len(x), self.n_kv_heads, -1, self.head_dim).to(keys.dtype)
        out = F.scaled_dot_product_attention(grouped, keys, values, mask)
        projected: Tensor = self.out(out.reshape(len(x), -1))
        return projected


class DecodeLayer(nn.Module):
    """`DecoderLayer` on x (rows, dim), in fp32 between the products."""

    def __init__(self, layer: Any, product: MakeProduct) -> None:
        super().__init__()
        self.input_norm, self.post_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention = DecodeAttention(layer.self_attn, product)
        self.mlp = (DecodeMoE if layer.use_moe else DecodeFeedForward)(layer.mlp, product)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None, cache: KVCache) -> Tensor:
        x = x + self.attention(self.input_norm(x), rotation, mask, cache)
        out: Tensor = x + self.mlp(self.post_norm(x))
        return out


class DecodeModel(nn.Module):
    """A `Transformer` in the form of the decoding step. Holds no state but weights."""

    identity: Tensor  # (head_dim, head_dim)
    turn: Tensor  # (head_dim, head_dim): x @ turn exchanges the halves of x and negates the first result

    def __init__(self, model: Transformer, dtype: torch.dtype, int8: bool = False, backend: str | None = None) -> None:
        """dtype: of the products. int8: the model has the values of round_to_int8. backend: of torch.compile, with one
        graph; None: not compiled."""
        super().__init__()
        weight, self.model = model.lm_head.weight, model
        self.device = weight.device
        self.max_rows = max_fast_rows(self.device, dtype, int8)
        dtype = dtype if self.max_rows else weight.dtype
        product = functools.partial(make_product, dtype=dtype, int8=int8)
        self.layers = nn.ModuleList(DecodeLayer(layer, product) for layer in model.model.layers)
        self.lm_head = product([model.lm_head])
        half = torch.eye(model.config.head_dim, device=self.device).chunk(2)
        self.register_buffer("turn", torch.cat((half[1], -half[0])), persistent=False)
        self.register_buffer("identity", torch.cat(half), persistent=False)
        self.plain: DecodeModel | None = None  # the form in the model's dtype, without copies, for more than max_rows
        if self.max_rows < math.inf and (int8 or dtype != weight.dtype):
            self.plain = DecodeModel(model, weight.dtype)
        self.compiled: Callable[..., Tensor] | None = None
        if backend:
            self.compiled = torch.compile(self._step_in_place, fullgraph=True, dynamic=False, backend=backend)

    @torch.inference_mode()
    def step(self, ids: list[int], lengths: list[int], cache: KVCache) -> Tensor:
        """Logits (rows, vocab) in fp32 of the tokens after `ids`, which are appended to rows 0, 1, … of `cache`.

        Row i already holds lengths[i] tokens, less than the cache's capacity.
        """
        if self.plain and len(ids) > self.max_rows:
            return self.plain.step(ids, lengths, cache)
        with torch.autocast(self.device.type, enabled=False):
            if self.compiled:
                rows = min(1 << (len(ids) - 1).bit_length(), cache.keys.shape[1])
                padding = [0] * (rows - len(ids))  # these rows of the cache are free
                tokens = torch.tensor([ids + padding, lengths + padding], device=self.device)
                return self.compiled(tokens, cache)[: len(ids)]
            return self.forward(torch.tensor(ids, device=self.device), cache.view(0, len(ids), lengths))

    def _step_in_place(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """tokens (2, rows): ids and lengths. All shapes depend on the number of rows and the capacity alone."""
        return self.forward(tokens[0], cache.static_view(tokens[1]))

    def forward(self, ids: Tensor, cache: KVCache) -> Tensor:
        """ids (rows,), cache: a view of these rows -> logits (rows, vocab) in fp32."""
        positions, mask, end = cache.positions(1), None, cache.length + 1
        if cache.lengths is not None:
            unseen = torch.arange(end, device=ids.device) > positions[..., None]
            mask = torch.zeros(unseen.shape, dtype=cache.keys.dtype, device=ids.device).masked_fill(unseen, -torch.inf)
        cos, sin = (angle.view(-1, 1, angle.shape[-1]) for angle in self.model.rope_angles(positions, end))
        rotation = self.identity * cos + self.turn * sin  # one product instead of the six operations of apply_rope
        x = F.embedding(ids, self.model.model.embed_tokens.weight).float()
        for layer in self.layers:
            x = layer(x, rotation, mask, cache)
        logits: Tensor = self.lm_head(self.model.model.norm(x))
        return logits.float()
