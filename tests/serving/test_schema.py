"""Property-based tests of the API with schemathesis, from /openapi.json.

Promises: no status 5xx; every status and body conforms to the description; a body that it forbids gets 400; methods
that it does not list get 405.
"""

import re

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.serving.server_helpers import run_server, save_random_model


@pytest.fixture(scope="module")
def api(tokenizer, tmp_path_factory):
    path = save_random_model(tmp_path_factory.mktemp("model") / "full_sft_32.pth", tokenizer, max_seq_len=16384)
    with run_server([f"m={path}"], max_context=16384, max_queue=1100, max_request_bytes=2**24) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def clamp_ids(prompt):
    if isinstance(prompt, list):
        return [clamp_ids(part) for part in prompt]
    return prompt % 256 if isinstance(prompt, (int, float)) and prompt > 255 else prompt


def objects(value):
    """The items of a list of objects; [] for any other value."""
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else []


def answer_calls(messages):
    """The messages with one result per call, directly after it, and with arguments that are JSON text of an object."""
    answered = []
    for message in messages:
        if message.get("role") == "tool":  # answers no call
            message["role"] = "user"
        answered.append(message)
        for i, call in enumerate(objects(message.get("tool_calls"))):
            if isinstance(function := call.get("function"), dict) and isinstance(function.get("arguments"), str):
                function["arguments"] = '{"a": 1}'
            if isinstance(call.get("id"), str) and call["id"]:
                call["id"] = str(i)
            if message.get("role") == "assistant":
                answered.append({"role": "tool", "tool_call_id": str(i), "content": "r"})
    return answered


def has_valid_name(tool):
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return isinstance(name, str) and re.fullmatch("[a-zA-Z0-9_-]{1,64}", name)


def choose_offered_tool(body):
    """Give the tools different names, and choose none where the tools or other fields exclude the choice."""
    tools, choice = objects(body.get("tools")), body.get("tool_choice")
    for i, tool in enumerate(tools):
        if has_valid_name(tool):
            tool["function"]["name"] = f"{tool['function']['name'][:60]}{i}"
    is_named = isinstance(choice, dict) and choice.get("type") == "function" and has_valid_name(choice)
    if is_named or (choice == "required" and (not tools or body.get("add_generation_prompt") is False)):
        body["tool_choice"] = "none"


@schemathesis.hook
def before_call(context, case, kwargs):
    """Use the served model's name and ids, which the schema does not contain, and short answers to save time."""
    if isinstance(case.body, dict):
        if objects(case.body.get("messages")):
            case.body["messages"] = answer_calls(case.body["messages"])
        choose_offered_tool(case.body)
        if case.path.endswith("chat/completions") and not case.body.get("max_completion_tokens"):
            case.body.setdefault("max_tokens", 2)
        case.body |= {"prompt": clamp_ids(case.body["prompt"])} if "prompt" in case.body else {}
        if isinstance(case.body.get("model"), str):
            case.body["model"] = "m"
        if "input" in case.body:
            case.body["input"] = clamp_ids(case.body["input"])
        if case.body.get("max_tokens") == 0 and (case.body.get("echo") is None or case.body["echo"] is False):
            case.body["echo"] = True
        if case.body.get("continue_final_message") is True:  # needs an assistant message at the end
            case.body["continue_final_message"] = False
        excludes_beams = any(case.body.get(name) for name in ("temperature", "n", "top_logprobs"))
        excludes_beams |= case.body.get("logprobs") is not None  # 0 counts
        if excludes_beams and case.body.get("num_beams") in range(2, 9):  # needs one answer at temperature 0
            case.body["num_beams"] = 1
        for name in ("max_tokens", "max_completion_tokens"):
            if name in case.body and case.body[name] in (None, -1):  # the rest of the context
                case.body[name] = 2
            if type(case.body.get(name)) in (int, float) and case.body[name] > 2:
                case.body[name] = 2 if float(case.body[name]).is_integer() else 2.5


POST_ROUTES = ["POST /v1/chat/completions", "POST /v1/completions", "POST /v1/embeddings"]
GET_ROUTES = ["GET /health", "GET /v1/models", "GET /v1/models/{name}"]


def test_openapi_describes_every_route(api):
    assert sorted(found.ok().label for found in api.get_all_operations()) == GET_ROUTES + POST_ROUTES


@pytest.mark.parametrize(
    ("label", "mode"),
    [(label, "POSITIVE") for label in GET_ROUTES + POST_ROUTES]
    + [(label, "NEGATIVE") for label in POST_ROUTES],  # GET requests have no body to invalidate
)
def test_responses_conform_to_the_openapi_description(api, label, mode):
    (operation,) = (found.ok() for found in api.get_all_operations() if found.ok().label == label)

    once = (Phase.explicit, Phase.generate)  # without shrinking, which takes minutes

    @settings(max_examples=15, deadline=None, database=None, phases=once, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=GenerationMode[mode]))
    def answered_as_described(case):
        case.call_and_validate()

    answered_as_described()
