"""Schemas of requests and responses, as in OpenAI's API; the source of /openapi.json.

Unknown and unsupported fields (response_format, logit_bias, functions, ...) are accepted, ignored, and named in the
response header `x-ignored-fields`. Types are strict: "0.7" is not a number.
Sources: OpenAI's API reference, "Chat" and "Completions"; vLLM for top_k, min_p and repetition_penalty; transformers'
GenerationConfig for num_beams, length_penalty and no_repeat_ngram_size.
Called by requests.py, responses.py and app.py. Read next: chat_schemas.py (chats and tools), requests.py (parsing),
responses.py (building a response).
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from model.sampling import MAX_BEAMS

MAX_TOKENS = 1_000_000
DEFAULT_COMPLETION_TOKENS = 16  # default max_tokens of /v1/completions


def _whole_number(value: Any) -> Any:
    """5.0 -> 5, because JSON has only one type of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


ACCEPT_WHOLE_FLOATS = BeforeValidator(_whole_number)  # listed after the bounds, which then appear in /openapi.json
Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def _token_limit_validator(minimum: int) -> BeforeValidator:
    """Accepts a number from `minimum`, or -1 (as in llama.cpp) or null for all space in the context."""
    rule = f"must be a whole number from {minimum} to {MAX_TOKENS}, or -1 or null for the rest of the context"

    def check_limit(value: Any) -> Any:
        value = _whole_number(value)
        if value is None or (type(value) is int and (value == -1 or minimum <= value <= MAX_TOKENS)):
            return value
        raise PydanticCustomError("token_limit", "{rule}", {"rule": rule})

    return BeforeValidator(check_limit)


def _token_limit_schema(minimum: int) -> WithJsonSchema:
    integer_schema = {"type": "integer", "minimum": minimum, "maximum": MAX_TOKENS}
    return WithJsonSchema({"anyOf": [integer_schema, {"const": -1}, {"type": "null"}]})


TokenLimit = Annotated[int | None, _token_limit_validator(1), _token_limit_schema(1)]
TokenLimitOrZero = Annotated[int | None, _token_limit_validator(0), _token_limit_schema(0)]
MinP = Annotated[
    float,
    Field(ge=0, le=1),
    BeforeValidator(lambda value: 0.0 if value == -1 else value),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"const": -1}]}),
]
StopString = Annotated[str, Field(max_length=200)]
NumLogprobs = Annotated[int, Field(ge=0, le=20), ACCEPT_WHOLE_FLOATS]


class LenientModel(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class StreamOptions(LenientModel):
    include_usage: bool | None = Field(None, description="send the token counts in a last chunk")


class GenerationRequest(LenientModel):
    """Fields of both chat and text requests. null means the default."""

    model: str | None = Field(None, description="a name from /v1/models (default: the first)")
    stream: bool | None = Field(None, description="send the answer while it is generated, as server-sent events")
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="0: greedy (default: 0.7)")
    top_p: Probability | None = Field(None, description="sample from the likeliest tokens that sum to p (default: 0.9)")
    top_k: Annotated[int, Field(ge=-1, le=1_000_000), ACCEPT_WHOLE_FLOATS] | None = Field(
        None, description="0 or -1: all (default)"
    )
    min_p: MinP | None = Field(None, description="drop tokens below this fraction of the likeliest (0 or -1: off)")
    n: Annotated[int, Field(ge=1, le=16), ACCEPT_WHOLE_FLOATS] | None = Field(
        None, description="answers per prompt (default: 1)"
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=8, fail_fast=True)] | None = None
    seed: Annotated[int, ACCEPT_WHOLE_FLOATS] | None = Field(
        None, description="the same seed samples the same answer (-1: none)"
    )
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    penalty_window: Annotated[int, Field(ge=0, le=1_000_000), ACCEPT_WHOLE_FLOATS] | None = Field(
        None, description="both penalties count this many last tokens of the answer; 0: all (default)"
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=1000), ACCEPT_WHOLE_FLOATS] | None = Field(
        None, description="no n-gram of tokens occurs twice, the prompt included; 0: off (default)"
    )
    num_beams: Annotated[int, Field(ge=1, le=MAX_BEAMS), ACCEPT_WHOLE_FLOATS] | None = Field(
        None, description="beam search: temperature 0, one answer, sent as one piece (default: 1, off)"
    )
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = Field(
        None, description="a beam's score is its log-probability / length ** length_penalty (default: 1)"
    )
    user: str | None = Field(None, description="accepted and not stored")

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


TokenIds = Annotated[list[Annotated[int, Field(ge=0), ACCEPT_WHOLE_FLOATS]], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=64, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=64, fail_fast=True)]
    )
    max_tokens: TokenLimitOrZero = Field(
        DEFAULT_COMPLETION_TOKENS, description="-1, null: the rest of the context; 0: only with echo"
    )
    logprobs: NumLogprobs | None = None
    echo: bool | None = Field(None, description="begin with the prompt, its log-probabilities included")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list; the field `prompt` is a text, several, token ids, or several lists of them."""
        prompt: Any = self.prompt
        return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]

    @property
    def max_new_tokens(self) -> int | None:
        return None if self.max_tokens == -1 else self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As `num_logprobs`, for the tokens of the prompt; 0 if the response contains only the prompt."""
        if self.echo and self.logprobs is not None:
            return self.logprobs
        return 0 if self.max_tokens == 0 else None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ContentLogprob]
    refusal: None = None


class FunctionCall(BaseModel):
    name: str
    arguments: str = Field(description="JSON text of an object")


class ResponseToolCall(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null: the answer consists of tool calls")
    refusal: None = None
    reasoning_content: str | None = Field(None, description="absent for an answer without a thought")
    tool_calls: list[ResponseToolCall] | None = Field(None, description="absent for an answer without calls")

    @model_serializer(mode="wrap")
    def _without_absent_parts(self, serialize: SerializerFunctionWrapHandler) -> Any:
        fields = serialize(self)
        return {k: v for k, v in fields.items() if v is not None or k not in ("reasoning_content", "tool_calls")}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> Any:
        """The schema of the fields, which the serializer hides."""
        return handler({key: value for key, value in core_schema.items() if key != "serialization"})


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]  # null: the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: Literal["stop", "length"]


class TextCompletion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mengya"
    stage: str
    parameters: int
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: dict[str, dict[str, int]]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    error: ErrorDetail
