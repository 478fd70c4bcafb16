"""How a request's answer is drawn: its fields over the model's preset over the defaults of the command line.

Called by service.py. Read next: ../model/sampling_presets.py (the order), ../model/sampling.py (what the settings do).
"""

from model.sampling import SamplingParams
from model.sampling_presets import DEFAULT_SAMPLING, merge_settings
from serving.errors import ApiError
from serving.models import ServedModel
from serving.schemas import ChatRequest, CompletionRequest

SAMPLING_FIELDS = (  # fields that become a Sampling's as they are
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "no_repeat_ngram_size", "num_beams", "length_penalty",
)  # fmt: skip


def make_sampling_params(body: ChatRequest | CompletionRequest, served: ServedModel) -> SamplingParams:
    """The request's settings; those it leaves out are as in 2-eval.py, and the answer may fill the context.

    Raises ApiError for numbers that do not go together.
    """
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    is_chat, has_several_answers = isinstance(body, ChatRequest), (body.n or 1) > 1
    preset = dict(served.preset) if is_chat else {}
    if has_several_answers or body.num_logprobs is not None:
        preset.pop("num_beams", None)  # one answer, without log-probabilities: the request asks for more
    named = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    chosen = merge_settings(named, preset, DEFAULT_SAMPLING)
    chosen |= {"top_k": max(0, chosen.get("top_k", 0)), "top_p": max(chosen["top_p"], 1e-9)}
    try:
        settings = SamplingParams(
            **chosen,
            max_new_tokens=served.max_model_len if body.max_new_tokens is None else body.max_new_tokens,
            stop=(*(text for text in stop if text), *(served.tokenizer.stop_strings if is_chat else ())),
            seed=None if body.seed == -1 else body.seed,  # as vLLM
            logprobs=body.num_logprobs,
            prompt_logprobs=body.num_prompt_logprobs,
        )
    except ValueError as error:  # its message begins with the field's name
        raise ApiError(400, str(error), str(error).partition(" ")[0]) from None
    if has_several_answers and settings.num_beams > 1:
        raise ApiError(400, "n must be 1 with num_beams above 1: a beam search gives one answer", "n")
    return settings
