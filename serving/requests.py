"""From the body of a request to the sequences that the scheduler decodes. Runs in a worker thread (service.py).

    bytes -> parse_body: the fields of schemas.py -> make_requests: token ids and sampling parameters, one per answer

The size of a body is bounded (middleware.py). Validation of a list stops at the first wrong entry (`fail_fast` in
schemas.py); otherwise pydantic would build one error for each of 500,000 wrong entries.
Called by service.py. Read next: schemas.py (the fields), models.py (token ids), ../model/sampling_presets.py.
"""

import json
from collections.abc import Sequence as Errors
from typing import Any, TypeVar

from pydantic import ValidationError

from common.errors import UserError
from model.completion import Completion, Sequence
from model.sampling import SamplingParams
from model.sampling_presets import DEFAULT_SAMPLING, merge_settings
from serving.chat_schemas import ChatRequest
from serving.errors import ApiError
from serving.models import PromptTooLong, ServedModel
from serving.scheduler import Request
from serving.schemas import CompletionRequest, LenientModel

MAX_IGNORED_SHOWN = 20  # names in the header x-ignored-fields
UNSUPPORTED_DEFAULTS: tuple[Any, ...] = (None, "", [], {}, {"type": "text"})  # default values of unsupported fields
# pydantic's names of the types of a union, in an error's `loc`: whole names, and beginnings of names
UNION_TYPES, UNION_TYPE_PREFIXES = ("str", "int", "NamedToolChoice"), ("list[", "constrained-", "literal[", "function-")
SAMPLING_FIELDS = (  # copied unchanged into SamplingParams
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "penalty_window", "no_repeat_ngram_size", "num_beams", "length_penalty",
)  # fmt: skip
API_DEFAULTS = {**DEFAULT_SAMPLING, "frequency_penalty": 0.0, "penalty_window": 0}  # penalties as in OpenAI's API
Body = TypeVar("Body", bound=LenientModel)


def parse_body(raw: bytes, kind: type[Body]) -> Body:
    """Return the request in a body. Raises ApiError 400 that names the field and its allowed values."""
    try:
        content = json.loads(raw)
    except RecursionError:
        raise ApiError(400, "the body is not valid JSON: nested too deeply") from None
    except ValueError as error:  # includes bytes that are not UTF-8 and numbers of more than 4,300 digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ApiError(400, f"the body is not valid JSON: {reason}"[:500]) from None
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        where, message = union_error(error.errors(include_url=False, include_input=False))
        raise ApiError(400, f"{where or 'body'}: {message}"[:500], where[:200] or None) from None


def union_error(errors: Errors[Any]) -> tuple[str, str]:
    """Return (field, message) for pydantic's errors of a request; a union field has one error per type.

    The reported error is that of the best matching type: an error other than a type error first, then the longest
    `loc`. If the value has none of the types, the message names all of them.
    """

    def match_depth(error: Any) -> tuple[bool, int]:
        return not error["type"].endswith("_type"), len(error["loc"])

    furthest = max(match_depth(error) for error in errors)
    meant = [error for error in errors if match_depth(error) == furthest]
    where = _field_path(meant[0])
    messages = dict.fromkeys(error["msg"] for error in meant if _field_path(error) == where)
    first, *others = messages
    return where, " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])


def _field_path(error: Any) -> str:
    """An error's `loc` as `messages.0.role`, without pydantic's names of the types of a union."""
    name, *inside = [str(part) for part in error["loc"]] or [""]
    return ".".join([name, *(p for p in inside if p not in UNION_TYPES and not p.startswith(UNION_TYPE_PREFIXES))])


def ignored_fields_header(body: LenientModel) -> dict[str, str]:
    """The header x-ignored-fields: names of unsupported fields whose value is not a default."""
    unsupported = [name for name, value in (body.model_extra or {}).items() if value not in UNSUPPORTED_DEFAULTS]
    names = [name for name in unsupported if name.isascii() and name.replace("-", "_").isidentifier()]
    return {"x-ignored-fields": ", ".join(names[:MAX_IGNORED_SHOWN])[:1000]} if names else {}


def make_requests(body: ChatRequest | CompletionRequest, served: ServedModel) -> list[Request]:
    """Check and tokenise the prompts; return one Request per answer, not queued yet. Raises ApiError 400."""
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    echoes: list[Any] = [None]
    try:
        if isinstance(body, ChatRequest):
            if served.chat_unavailable:
                raise ApiError(400, served.chat_unavailable, "model")
            prompts = [served.chat_ids(body)]
        else:
            if body.max_tokens == 0 and not body.echo:
                raise ApiError(400, "max_tokens: 0 is allowed only with echo", "max_tokens")
            given = body.prompts
            prompts = [served.text_ids(prompt, with_answer=body.max_tokens != 0) for prompt in given]
            echoes = given if body.echo else [None] * len(given)
        settings = make_sampling_params(body, served)
        wanted = [pair for pair in zip(prompts, echoes, strict=True) for _ in range(body.n or 1)]
        return [
            Request(Sequence(served.model, served.tokenizer, prompt, settings, Completion(), i), i, echo)
            for i, (prompt, echo) in enumerate(wanted)
        ]
    except PromptTooLong as error:
        raise ApiError(400, str(error), param, "context_length_exceeded") from None
    except (UserError, ValueError) as error:
        raise ApiError(400, str(error), param) from None


def make_sampling_params(body: ChatRequest | CompletionRequest, served: ServedModel) -> SamplingParams:
    """The request's fields, then the model's preset, then the defaults of 2-eval.py without its frequency penalty.

    The answer may fill the context. Raises ApiError 400 for values that exclude each other.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    is_chat, has_several_answers = isinstance(body, ChatRequest), (body.n or 1) > 1
    preset = dict(served.preset) if is_chat else {}
    if has_several_answers or body.num_logprobs is not None:
        preset.pop("num_beams", None)  # a beam search gives one answer without log-probabilities
    named = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    chosen = merge_settings(named, preset, API_DEFAULTS)
    chosen |= {"top_k": max(0, chosen.get("top_k", 0)), "top_p": max(chosen["top_p"], 1e-9)}
    try:
        settings = SamplingParams(
            **chosen,
            max_new_tokens=served.max_model_len if body.max_new_tokens is None else body.max_new_tokens,
            stop=(*(text for text in stop if text), *(served.tokenizer.stop_strings if is_chat else ())),
            seed=None if body.seed == -1 else body.seed,  # as in vLLM
            logprobs=body.num_logprobs,
            prompt_logprobs=body.num_prompt_logprobs,
        )
    except ValueError as error:  # its message begins with the field's name
        raise ApiError(400, str(error), str(error).partition(" ")[0]) from None
    if has_several_answers and settings.num_beams > 1:
        raise ApiError(400, "n must be 1 with num_beams above 1: a beam search gives one answer", "n")
    return settings
