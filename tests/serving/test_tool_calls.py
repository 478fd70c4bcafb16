"""Tools and thoughts over HTTP, with the openai client and a model that generates given answers.

Promises: the prompt is the rendered chat with its tools, calls and results; an answer's calls are OpenAI's `tool_calls`
with the finish reason of that name, its thought is `reasoning_content`; a streamed answer is the same message however
the text is split; the loop call -> result -> answer works with parallel calls; text that is no call is never one;
tool_choice is followed; without tools and enable_thinking the text is unchanged; invalid tools are one error 400.
"""

import itertools
import json

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.answer_parts import parse_answer
from model.chatml import EMPTY_THOUGHT
from serving.answer_deltas import DeltaReader, join_deltas
from serving.chat_schemas import ChatRequest
from serving.schemas import ChatCompletion
from tests.serving.server_helpers import run_server, save_random_model, script_answers

QUESTION = {"role": "user", "content": "What is 2+3? 几点？"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds 两个数",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": [3, "三"]}}\n</tool_call>'
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    path = save_random_model(tmp_path_factory.mktemp("model") / "full_sft_32.pth", tokenizer, max_seq_len=4096)
    with run_server([path]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


class Script:
    """What the model generates, and the prompts that it has read. `answers`: a text, or a function of the prompt."""

    def __init__(self):
        self.answers, self.prompts = "", []

    def __call__(self, prompt):
        self.prompts.append(prompt)
        return self.answers(prompt) if callable(self.answers) else self.answers


@pytest.fixture
def script(monkeypatch):
    script = Script()
    script_answers(monkeypatch, script)
    return script


def ask(client, messages=(QUESTION,), **options):
    """The first choice. Fields that the client does not know are in `extra`."""
    extra = options.pop("extra", {})
    options = {"temperature": 0, "max_tokens": 300, **options}
    return client.chat.completions.create(model="m", messages=list(messages), extra_body=extra, **options).choices[0]


def parts(message):
    """(thought, content, [(name, arguments)]) of a message of the openai client."""
    calls = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or []]
    return (message.model_extra or {}).get("reasoning_content"), message.content, calls


def streamed(client, messages=(QUESTION,), **options):
    """The parts and the finish reason that a client builds from the chunks of a stream."""
    extra = options.pop("extra", {})
    options = {"temperature": 0, "max_tokens": 300, **options}
    chunks = client.chat.completions.create(model="m", messages=messages, stream=True, extra_body=extra, **options)
    message, calls, reason = {"content": None}, [], None
    for choice in (choice for chunk in chunks for choice in chunk.choices):
        assert reason is None, "a chunk after the finish reason"
        reason = choice.finish_reason
        for key in ("content", "reasoning_content"):
            if (piece := choice.delta.model_dump().get(key)) is not None:
                message[key] = (message.get(key) or "") + piece
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls) and call.id.startswith("call_") and call.type == "function"
                calls.append([call.function.name, ""])
            calls[call.index][1] += call.function.arguments or ""
    content = message["content"] if message["content"] or calls else ""  # the first delta has no content
    parsed = [(name, json.loads(arguments)) for name, arguments in calls]
    return (message.get("reasoning_content"), content, parsed), reason


# ------------------------------------------------------------------------------------------------ calls


def test_a_call_has_every_field_of_the_api(client, script, server):
    script.answers = CALL
    answer = client.chat.completions.create(model="m", messages=[QUESTION], tools=[ADD])
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason, choice.logprobs) == (None, "tool_calls", None)
    (call,) = choice.message.tool_calls
    assert call.id.startswith("call_") and len(call.id) > 20 and (call.type, call.function.name) == ("function", "add")
    assert call.function.arguments == '{"a": 2, "b": [3, "三"]}'
    (served,) = server.service.models.values()
    messages = [{"role": "system", "content": "", "tools": [ADD]}, QUESTION]
    ids = served.tokenizer.render(messages, True)[0]
    assert script.prompts == [served.tokenizer.decode(ids)] and '"name": "add"' in script.prompts[0]
    generated = served.tokenizer.renderer.backend.encode(CALL, add_special_tokens=False).ids
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), len(generated))
    response = server.post("chat/completions", messages=[QUESTION], tools=[ADD], temperature=0)
    described = httpx.get(f"{server.url}/openapi.json").json()["components"]["schemas"]["AssistantMessage"]
    message = response.json()["choices"][0]["message"]
    assert message.keys() == {"role", "content", "refusal", "tool_calls"} < described["properties"].keys()
    assert message["tool_calls"][0]["function"] == call.function.model_dump()
    assert ChatCompletion.model_validate_json(response.text).choices[0].finish_reason == "tool_calls"


def test_the_client_loop_of_parallel_calls(client, script, server):
    """Two calls; their results are sent in the other order; then the answer."""
    results = {"add": "5", "clock": "12:30"}
    script.answers = lambda prompt: "5, 12:30" if "12:30" in prompt else f"Moment.\n{CALL}\n{CLOCK_CALL}"
    messages = [{"role": "system", "content": "kind"}, QUESTION]
    choice = ask(client, messages, tools=[ADD, CLOCK])
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Moment."
    assert len({call.id for call in choice.message.tool_calls}) == 2
    messages.append(choice.message)
    for call in reversed(choice.message.tool_calls):
        messages.append({"role": "tool", "tool_call_id": call.id, "content": results[call.function.name]})
    choice = ask(client, messages, tools=[ADD, CLOCK], parallel_tool_calls=True)
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("5, 12:30", "stop", None)
    calls = [{"name": "add", "arguments": {"a": 2, "b": [3, "三"]}}, {"name": "clock", "arguments": {}}]
    canonical = [
        {"role": "system", "content": "kind", "tools": [ADD, CLOCK]},
        QUESTION,
        {"role": "assistant", "content": "Moment.", "tool_calls": [{"type": "function", "function": c} for c in calls]},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "12:30"},
    ]
    (served,) = server.service.models.values()
    assert script.prompts[1] == served.tokenizer.decode(served.tokenizer.render(canonical, True)[0])
    assert f"assistant\nMoment.\n{CALL}\n{CLOCK_CALL}<|im_end|>" in script.prompts[1], "as it was generated"


def test_the_openai_clients_own_stream_helper(client, script):
    script.answers = f"<think>\nhm\n</think>\n\nMoment.\n{CALL}\n{CLOCK_CALL}"
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in (ADD, CLOCK)]
    with client.chat.completions.stream(model="m", messages=[QUESTION], tools=strict) as stream:
        names = [event.name for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0]
    assert names == ["add", "clock"] and final.finish_reason == "tool_calls"
    expected = [("add", {"a": 2, "b": [3, "三"]}), ("clock", {})]
    assert (final.message.content, parts(final.message)[2]) == ("Moment.", expected)


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", CALL, CLOCK_CALL, "\n", "\n\n", " ", "a", "答", "<"]
answers = st.lists(st.sampled_from(PIECES) | st.text("<>/abc 文\n", max_size=4), max_size=7).map("".join)


def test_deltas_are_the_same_message_however_the_text_is_cut():
    """The message has the parts of parse_answer; without tools, calls are content."""
    fields = {"messages": [QUESTION], "enable_thinking": True}
    offering, bare = ChatRequest(**fields, tools=[ADD]), ChatRequest(**fields)

    def joined(body, pieces):
        reader = DeltaReader(body)
        deltas = [delta for i, piece in enumerate(pieces, 1) for delta in reader.push(piece, i == len(pieces))]
        message = join_deltas(deltas)
        calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls", [])]
        assert reader.num_calls == len(calls)
        return message.get("reasoning_content"), message["content"], calls

    @settings(max_examples=200, deadline=None, database=None)
    @given(answers, st.lists(st.integers(0, 200), max_size=8))
    def same(text, cuts):
        edges = [0, *sorted(cuts), len(text)]
        pieces = [text[start:end] for start, end in itertools.pairwise(edges)]
        expected = parse_answer(text)
        calls = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in expected.tool_calls]
        assert joined(offering, pieces) == (expected.reasoning, expected.content or (None if calls else ""), calls)
        reasoning, content, calls = joined(bare, pieces)
        assert calls == [] and reasoning == expected.reasoning
        if reasoning is None:
            assert content == text
        else:
            assert content.count("<tool_call>") == text.partition("</think>")[2].count("<tool_call>")

    same()


def test_a_streamed_answer_is_the_same_message_as_a_whole_one(client, monkeypatch):
    """Also if it is cut by max_tokens."""
    script = Script()
    script_answers(monkeypatch, script)

    @settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(answers, st.sampled_from([300, 20]))
    def same(text, max_tokens):
        script.answers = text
        options = {"tools": [ADD], "max_tokens": max_tokens}
        whole = ask(client, **options)
        assert streamed(client, **options) == (parts(whole.message), whole.finish_reason)
        if max_tokens == 300:
            assert whole.finish_reason == ("tool_calls" if parse_answer(text).tool_calls else "stop")

    same()


def test_calls_after_the_limit_of_tokens_are_reported_with_the_reason_length(client, script):
    script.answers = f"{CLOCK_CALL}\n{CALL}"
    choice = ask(client, tools=[ADD, CLOCK], max_tokens=65)
    assert choice.finish_reason == "length" and parts(choice.message)[2] == [("clock", {})]
    assert choice.message.content and CALL.startswith(choice.message.content.strip())


def test_without_parallel_calls_the_first_one_is_returned(client, script):
    script.answers = f"{CLOCK_CALL}\n{CALL}"
    options = {"tools": [ADD, CLOCK], "parallel_tool_calls": False}
    choice = ask(client, **options)
    assert parts(choice.message) == (None, None, [("clock", {})]) and choice.finish_reason == "tool_calls"
    assert streamed(client, **options) == (parts(choice.message), "tool_calls")


@pytest.mark.parametrize(
    "call",
    [
        '<tool_call>\n{"name": "add", "arguments": {"a": 2}\n</tool_call>',
        "<tool_call>\n[1]\n</tool_call>",
        '<tool_call>\n{"name": "", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": 5}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": 1e999}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {"a": "\\ud800"}}\n</tool_call>',
        '<tool_call>\n{"name": "add", "arguments": {}}',
        '<tool_call>\n{"name": "add", "arguments": ' + '{"a":' * 33 + "1" + "}" * 34 + "\n</tool_call>",
    ],
)
def test_text_that_is_no_call_is_content(client, script, call):
    script.answers = call
    choice = ask(client, tools=[ADD], max_tokens=600)
    assert (parts(choice.message), choice.finish_reason) == ((None, call, []), "stop")
    assert streamed(client, tools=[ADD], max_tokens=600) == ((None, call, []), "stop")


def test_several_answers_have_calls_of_their_own(client, script):
    script.answers = CALL
    completion = client.chat.completions.create(model="m", messages=[QUESTION], tools=[ADD], n=2)
    calls = [choice.message.tool_calls[0] for choice in completion.choices]
    assert calls[0].id != calls[1].id and calls[0].function == calls[1].function


@pytest.mark.parametrize("text", [f"<think>\nhm 好\n</think>\n\nso\n{CALL}", CALL, "plain"])
def test_log_probabilities_are_those_of_all_generated_tokens(client, script, text):
    script.answers = text
    options = {"tools": [ADD], "logprobs": True, "top_logprobs": 1}
    whole = ask(client, **options).logprobs.content
    spelled = b"".join(bytes(token.bytes) for token in whole)
    assert spelled.decode() == text
    stream = client.chat.completions.create(
        model="m", messages=[QUESTION], stream=True, max_tokens=300, temperature=0, **options
    )
    entries = [choice.logprobs for chunk in stream for choice in chunk.choices if choice.logprobs]
    assert [token for entry in entries for token in entry.content] == whole


# ------------------------------------------------------------------------------------------------ tool_choice


def test_tool_choice_none_offers_no_tools_and_reads_no_calls(client, script, server):
    script.answers = CALL
    choice = ask(client, tools=[ADD], tool_choice="none")
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
    (served,) = server.service.models.values()
    assert script.prompts == [served.tokenizer.decode(served.tokenizer.render([QUESTION], True)[0])]
    script.answers = f"<think>\nhm\n</think>\n\n{CALL}"
    choice = ask(client, tools=[ADD], tool_choice="none", extra={"enable_thinking": True})
    assert parts(choice.message) == ("hm", CALL, [])


@pytest.mark.parametrize(
    ("tool_choice", "opening"),
    [
        ("required", '<tool_call>\n{"name": "'),
        ({"type": "function", "function": {"name": "add"}}, '<tool_call>\n{"name": "add", "arguments":'),
    ],
)
def test_a_required_call_is_begun_for_the_model(client, script, server, tool_choice, opening):
    options = {"tools": [ADD, CLOCK], "tool_choice": tool_choice}
    script.answers = lambda prompt: CALL[len(opening) :]
    choice = ask(client, **options)
    assert parts(choice.message) == (None, None, [("add", {"a": 2, "b": [3, "三"]})])
    assert choice.finish_reason == "tool_calls"
    assert streamed(client, **options) == (parts(choice.message), "tool_calls")
    (served,) = server.service.models.values()
    messages = [{"role": "system", "content": "", "tools": [ADD, CLOCK]}, QUESTION]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [3, "三"]}}}]
    ids = served.tokenizer.render([*messages, {"role": "assistant", "content": "", "tool_calls": calls}])[0]
    prompt = script.prompts[0]
    assert prompt.endswith(f"<|im_start|>assistant\n{opening}") and served.tokenizer.decode(ids).startswith(prompt)
    script.answers = "oops"
    choice = ask(client, **options)
    assert (parts(choice.message), choice.finish_reason) == ((None, f"{opening}oops", []), "stop"), (
        "no call is invented"
    )
    assert streamed(client, **options) == (parts(choice.message), "stop")
    choice = ask(client, **options, max_tokens=2)
    assert (choice.message.content, choice.finish_reason) == (f"{opening}oo", "length")


# ------------------------------------------------------------------------------------------------ thoughts


def test_thinking_is_switched_and_returned(client, script):
    script.answers = lambda prompt: "2" if prompt.endswith(EMPTY_THOUGHT) else "<think>\n1+1\n</think>\n\n2"
    assert parts(ask(client, extra={"enable_thinking": True}).message) == ("1+1", "2", [])
    assert streamed(client, extra={"enable_thinking": True}) == (("1+1", "2", []), "stop")
    for extra in ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}):
        message = ask(client, extra=extra).message
        assert parts(message) == (None, "2", []) and "reasoning_content" not in message.model_dump()
    both = {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False, "other": 1}}
    assert parts(ask(client, extra=both).message) == ("1+1", "2", []), "the request's own field comes first"
    script.answers = "<think>\n\n</think>\n\n2"
    assert parts(ask(client, extra={"enable_thinking": True}).message) == ("", "2", []), "an empty thought is one"


def test_thoughts_are_read_again_within_a_turn_and_left_out_after_it(client, script, server):
    script.answers = "ok"
    called = {"role": "assistant", "content": None, "reasoning_content": "let me add", "tool_calls": [
        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": [3, "三"]}'}}
    ]}  # fmt: skip
    turn = [QUESTION, called, {"role": "tool", "tool_call_id": "1", "content": "5"}]
    ask(client, turn, tools=[ADD])
    ask(client, [*turn, {"role": "assistant", "content": "5", "reasoning_content": "easy"}, QUESTION], tools=[ADD])
    silent = [QUESTION, {**called, "reasoning_content": None}, turn[-1]]
    ask(client, silent, tools=[ADD], extra={"enable_thinking": False})
    first, second, third = script.prompts
    assert f"assistant\n{EMPTY_THOUGHT}{CALL}<|im_end|>" in third, "the prompt after which the call was generated"
    assert f"assistant\n<think>\nlet me add\n</think>\n\n{CALL}<|im_end|>" in first
    assert "<think>" not in second and f"assistant\n{CALL}<|im_end|>" in second and "assistant\n5<|im_end|>" in second


@pytest.mark.parametrize("text", [f"<think>a</think>b{CALL}", "</tool_call><think>", " \n<think>\n\n</think>\n\n x \n"])
def test_without_tools_and_switch_the_text_is_unchanged(client, script, server, text):
    """Also with marker tokens in it, and the response has no further fields."""
    script.answers = text
    response = server.post("chat/completions", messages=[QUESTION], temperature=0)
    assert response.json()["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": None,
        "finish_reason": "stop",
    }
    events = server.post("chat/completions", messages=[QUESTION], temperature=0, stream=True).text.split("\n\n")[:-2]
    first, *middle, last = (json.loads(event.removeprefix("data: "))["choices"][0] for event in events)
    assert first["delta"] == {"role": "assistant", "content": ""} and last["delta"] == {}
    assert all(choice["delta"].keys() == {"content"} for choice in middle)
    assert "".join(choice["delta"]["content"] for choice in middle) == text


def test_a_format_without_tools_refuses_them_and_has_no_thoughts(tokenizer, tmp_path, script):
    path = save_random_model(tmp_path / "full_sft_32.pth", tokenizer.with_chat_format("belle"))
    script.answers = text = "<think>a</think>b"
    with run_server([path]) as server:
        response = server.post("chat/completions", messages=[QUESTION], tools=[ADD])
        assert response.status_code == 400 and "belle" in response.json()["error"]["message"], response.text
        response = server.post("chat/completions", messages=[QUESTION], temperature=0, enable_thinking=True)
        assert response.json()["choices"][0]["message"] == {"role": "assistant", "content": text, "refusal": None}
