"""Sampling parameters of a request: its fields, then the model's preset, then the project's defaults.

Called by service.py. Read next: ../model/sampling_presets.py (precedence), ../model/sampling.py (what they do).
"""

from model.sampling import SamplingParams
from model.sampling_presets import DEFAULT_SAMPLING, merge_settings
from serving.errors import ApiError
from serving.models import ServedModel
from serving.schemas import ChatRequest, CompletionRequest

SAMPLING_FIELDS = (  # copied unchanged into SamplingParams
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "no_repeat_ngram_size", "num_beams", "length_penalty",
)  # fmt: skip


def make_sampling_params(body: ChatRequest | CompletionRequest, served: ServedModel) -> SamplingParams:
    """Return the request's settings; missing ones are as in 2-eval.py, and the answer may fill the context.

    Raises ApiError 400 for values that exclude each other.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    is_chat, has_several_answers = isinstance(body, ChatRequest), (body.n or 1) > 1
    preset = dict(served.preset) if is_chat else {}
    if has_several_answers or body.num_logprobs is not None:
        preset.pop("num_beams", None)  # a beam search gives one answer without log-probabilities
    named = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    chosen = merge_settings(named, preset, DEFAULT_SAMPLING)
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
