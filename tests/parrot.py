"""A model that always says the same thing, piece by piece: what the tests of the front ends talk to.

Each piece is one token, and nothing but the token before decides which comes next.
"""

import itertools
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer

from model.checkpoint import save_model
from model.config import ModelConfig
from model.tokenizer import ChatTokenizer, tokenizer_files
from model.transformer import Transformer


def save_parrot(
    path: Path,
    tokenizer: ChatTokenizer,
    pieces: list[str],
    stage: str = "full_sft",
    after: str = "\n",
    ends: bool = True,
    max_seq_len: int = 128,
) -> Path:
    """Says `pieces` after `after` (a single byte; a chat prompt ends with a newline); without `ends`, for ever."""
    backend = Tokenizer.from_str(tokenizer.files["tokenizer.json"])
    backend.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    own = ChatTokenizer(tokenizer_files(backend)).with_format(tokenizer.format_name or None)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(own.vocab_size, 64, 1, 2, 2, max_seq_len=max_seq_len, tie_embeddings=False))
    says = [backend.token_to_id(piece) for piece in pieces]
    chain = [*own.encode(after), *says, own.close_id if ends else says[0]]
    rig(model, chain)
    save_model(path, model, stage, own, [{"stage": stage, "tokens": 1_500_000, "data": "text"}])
    return path


@torch.no_grad()
def rig(model: Transformer, chain: list[int], sureness: float = 4) -> None:
    """Each token of the chain is followed by the next one, the surer the larger `sureness`: nothing but embeddings."""
    for name, weight in model.named_parameters():
        if "layers" in name:
            weight.zero_()
    model.model.embed_tokens.weight.normal_()
    model.lm_head.weight.zero_()
    for now, then in itertools.pairwise(chain):
        model.lm_head.weight[then] += sureness * model.model.embed_tokens.weight[now]
