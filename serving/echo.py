"""Echoed prompts of /v1/completions with the log-probability of every token, which scores a given text.

    tokens          "The"   " sky"   ...
    token_logprobs  null    -2.31    ...     null for the first token, which has no context
    top_logprobs    null    {" sky": -2.31, " cat": -1.97}    the most likely tokens, and the token itself
    text_offset     0       3        ...     characters before the token

lm-evaluation-harness' `local-completions` uses it (echo, logprobs 1, max_tokens 1, lists of token ids).
Called by responses.py. Read next: ../model/logprobs.py (how the numbers are computed).
"""

from model.detokenizer import IncrementalDetokenizer, token_bytes
from model.logprobs import TokenLogprob
from model.tokenizer import ChatTokenizer
from serving.models import replace_surrogates
from serving.schemas import TextLogprobs

Prompt = str | list[int]  # as in the request


def echoed_text(tokenizer: ChatTokenizer, prompt: Prompt) -> str:
    """The prompt as text: as in the request, or its ids decoded, special tokens included."""
    return replace_surrogates(prompt) if isinstance(prompt, str) else tokenizer.decode(prompt)


def echoed_logprobs(
    tokenizer: ChatTokenizer, prompt: Prompt, ids: list[int], logprobs: list[TokenLogprob]
) -> TextLogprobs:
    """The `logprobs` field of an echoed prompt. `ids`: the prompt's tokens; `logprobs`: those of all but the first."""
    return TextLogprobs(
        tokens=[token_name(tokenizer, i) for i in ids],
        token_logprobs=[None, *(token.logprob for token in logprobs)],
        top_logprobs=[None, *(named_top_logprobs(tokenizer, token) for token in logprobs)],
        text_offset=text_offsets(tokenizer, prompt, ids),
    )


def text_offsets(tokenizer: ChatTokenizer, prompt: Prompt, ids: list[int]) -> list[int]:
    """Number of characters of the echoed text before each token. A bos that the tokenizer adds has no characters."""
    added = tokenizer.special_ids if isinstance(prompt, str) else frozenset()
    text, offsets, characters = IncrementalDetokenizer(tokenizer), [], 0
    for i in ids:
        offsets.append(characters + len(text.completed_by(i)))
        characters += 0 if i in added else len(text.push(i))
    return offsets


def named_top_logprobs(tokenizer: ChatTokenizer, token: TokenLogprob) -> dict[str, float]:
    """{name: logprob} of the most likely tokens and of the token itself; of two with the same name, the likelier."""
    named: dict[str, float] = {}
    for i, logprob in [*token.top_logprobs, (token.id, token.logprob)]:
        named.setdefault(token_name(tokenizer, i), logprob)
    return named


def token_name(tokenizer: ChatTokenizer, token_id: int) -> str:
    """The token's text; its bytes where it is part of a character, which keeps the names of such tokens distinct."""
    spelled = token_bytes(tokenizer, token_id)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)
