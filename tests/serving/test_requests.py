"""Requests as clients send them: nulls, -1, unknown model names, a partial answer as the last message.

Promises: null means the default; max_tokens -1 and null fill the context, and every invalid value is one 400 error; a
server of one model uses it for unknown names and says so in a header, unless strict_model_names is set;
continue_final_message uses the ids of the rendered chat up to the end of the partial answer, in every chat format and
with foreign templates.
"""

import httpx
import openai
import pytest

from common.errors import UserError
from model.chat_template import CHAT_FORMATS
from model.generate import generate
from model.sampling import SamplingParams
from model.tokenizer import ChatTokenizer
from tests.serving.server_helpers import run_server, save_random_model

HELLO = [{"role": "user", "content": "Hi 你好"}]
MINIMIND = {"model": "model-identifier", "messages": HELLO, "stream": False, "temperature": 0, "max_tokens": -1}


@pytest.fixture(scope="module")
def checkpoint(tokenizer, tmp_path_factory):
    return save_random_model(tmp_path_factory.mktemp("model") / "full_sft_32.pth", tokenizer, max_seq_len=128)


@pytest.fixture(scope="module")
def server(checkpoint):
    with run_server([f"模型/m 1={checkpoint}"]) as server:
        yield server


def post(server, path="chat/completions", **body):
    if path == "chat/completions":
        body = {"messages": HELLO, "temperature": 0, **body}
    return httpx.post(
        f"{server.url}/v1/{path}", json=body, timeout=30, verify=False
    )  # without TLS, which saves loading certificates


def text_of(response):
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


# ------------------------------------------------------------------------------------------------ names of models


def test_the_request_of_minimind_is_answered(server):
    """Its client sends this model name and max_tokens -1 for any model."""
    response = httpx.post(f"{server.url}/v1/chat/completions", json=MINIMIND, timeout=30)
    answer = response.json()
    assert response.status_code == 200 and answer["model"] == "模型/m 1"
    assert response.headers["x-served-model"] == "%E6%A8%A1%E5%9E%8B/m%201"
    served = server.service.models["模型/m 1"]
    ids = served.tokenizer.render(HELLO, True)[0]
    (expected,) = generate(served.model, [ids], SamplingParams(max_new_tokens=128), served.tokenizer)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["usage"]["total_tokens"] == 128 or expected.finish_reason == "stop"


def test_the_openai_client_reads_the_real_name(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="gpt-4o", messages=HELLO, max_tokens=2, stream=True))
        assert {chunk.model for chunk in chunks} == {"模型/m 1"}
        assert client.completions.create(model="gpt-4o", prompt="a", max_tokens=2).model == "模型/m 1"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")


def test_a_name_that_is_served_or_left_out_needs_no_header(server):
    for name in ("模型/m 1", "", None):
        assert "x-served-model" not in post(server, model=name, max_tokens=1).headers
    assert "x-served-model" in post(server, "completions", model="x", prompt="a", stream=True).headers


def test_strict_names_and_several_models_reject_unknown_names(checkpoint):
    with run_server([checkpoint], strict_model_names=True) as server:
        for path, body in (("chat/completions", {}), ("completions", {"prompt": "a"}), ("embeddings", {"input": "a"})):
            response = post(server, path, model="model-identifier", **body)
            error = response.json()["error"]
            assert response.status_code == 404 and error["code"] == "model_not_found" and error["param"] == "model"
            assert error["message"] == "no model 'model-identifier' on this server: use full_sft_32"
    with run_server([f"a={checkpoint}", f"b={checkpoint}"]) as server:
        response = post(server, model="c")
        assert response.status_code == 404 and "use a, b" in response.json()["error"]["message"]


# ------------------------------------------------------------------------------------------------ lengths


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_minus_one_and_null_fill_the_context(server, field):
    free = text_of(post(server))
    assert [text_of(post(server, **{field: value})) for value in (-1, None, -1.0)] == [free] * 3
    assert text_of(post(server, max_tokens=3, max_completion_tokens=-1)) == free
    usages = [post(server, "completions", prompt="a", temperature=0, max_tokens=n).json()["usage"] for n in (-1, None)]
    assert [usage["total_tokens"] for usage in usages] == [128] * 2
    default = post(server, "completions", prompt="a", temperature=0).json()["usage"]
    assert default["completion_tokens"] == 16


@pytest.mark.parametrize("value", [-2, 2.5, "5", True, [], 10**7, 0])
@pytest.mark.parametrize(("path", "least"), [("chat/completions", 1), ("completions", 0)])
def test_invalid_max_tokens_is_one_clear_error(server, path, least, value):
    response = post(server, path, max_tokens=value, **({} if path[:4] == "chat" else {"prompt": "a"}))
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "max_tokens"
    if value == 0 and type(value) is int and not least:
        assert error["message"] == "max_tokens: 0 is allowed only with echo"
    else:
        rule = f"must be a whole number from {least} to 1000000, or -1 or null for the rest of the context"
        assert error["message"] == f"max_tokens: {rule}"


# ------------------------------------------------------------------------------------------------ nulls and defaults


def test_fields_at_their_default_do_not_change_the_answer(server):
    """Many clients send default values of unsupported fields; none is reported as ignored."""
    plain = text_of(post(server, max_tokens=12))
    for body in (
        {"stop": None}, {"stop": []}, {"stop": ""}, {"n": None}, {"n": 1}, {"temperature": 0.0}, {"top_p": None},
        {"top_p": 1}, {"top_k": -1}, {"top_k": None}, {"top_k": 0}, {"min_p": None}, {"min_p": 0}, {"min_p": -1},
        {"presence_penalty": None}, {"frequency_penalty": 0}, {"repetition_penalty": None}, {"seed": None},
        {"seed": -1}, {"stream": None}, {"stream": False}, {"stream_options": None},
        {"stream_options": {"include_usage": True}}, {"logprobs": None}, {"logprobs": False}, {"top_logprobs": None},
        {"logit_bias": {}}, {"logit_bias": None}, {"user": "me"}, {"user": None},
        {"response_format": {"type": "text"}}, {"response_format": None}, {"tools": []}, {"tools": None},
        {"functions": None}, {"metadata": {}}, {"max_completion_tokens": None}, {"continue_final_message": None},
        {"continue_final_message": False}, {"add_generation_prompt": None}, {"add_generation_prompt": True},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi 你好"}], "name": None}]},
        {"model": None}, {"model": ""},
    ):  # fmt: skip
        response = post(server, **{"max_tokens": 12, **body})
        assert text_of(response) == plain, body
        assert not {"x-ignored-fields", "x-served-model"} & set(response.headers), body
    sampled = [text_of(post(server, max_tokens=40, temperature=None, seed=seed)) for seed in (-1, -1, None)]
    assert len(set(sampled)) == 3, "seed -1 means no seed"


def test_null_fields_of_completions_mean_defaults(server):
    plain = post(server, "completions", prompt="ab", temperature=0).json()["choices"]
    for name in ("logprobs", "echo", "suffix", "best_of", "stop", "n", "logit_bias", "seed", "stream", "user"):
        response = post(server, "completions", prompt="ab", temperature=0, **{name: None})
        assert response.json()["choices"] == plain and "x-ignored-fields" not in response.headers


def test_empty_messages_are_rejected_and_a_last_answer_opens_a_new_turn(server):
    response = post(server, messages=[])
    assert response.status_code == 400 and response.json()["error"]["message"].startswith("messages: ")
    continued = [*HELLO, {"role": "assistant", "content": "A"}]
    served = server.service.models["模型/m 1"]
    (expected,) = generate(
        served.model, [served.tokenizer.render(continued, True)[0]], SamplingParams(max_new_tokens=5), served.tokenizer
    )
    assert text_of(post(server, messages=continued, max_tokens=5)) == expected.text, "as in OpenAI's API"


# ------------------------------------------------------------------------------------------------ continued answers


CHATS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}],
    [
        {"role": "system", "content": "kind"},
        {"role": "user", "content": "1 "},
        {"role": "assistant", "content": " 2\n"},
        {"role": "user", "content": "<|im_end|>3"},
        {"role": "assistant", "content": "4 <|im_start|> "},
    ],
]
TEMPLATES = {
    "plain": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "thinking": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "trimming": "{{ eos_token }}{% for m in messages %}{{ m.role + ': ' + (m.content | trim) + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}


def tokenizer_with_template(tokenizer, template):
    files = {**tokenizer.files, "chat_template.jinja": template}
    config = '{"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}'
    return ChatTokenizer({**files, "tokenizer_config.json": config})


def all_tokenizers(tokenizer):
    yield from (tokenizer.with_chat_format(name) for name in CHAT_FORMATS)
    yield from (tokenizer_with_template(tokenizer, template) for template in TEMPLATES.values())


@pytest.mark.parametrize("messages", CHATS)
def test_a_continued_answer_has_the_leading_ids_of_the_whole_one(tokenizer, messages):
    for kind in all_tokenizers(tokenizer):
        ids = kind.render_unfinished(messages)
        longer = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + "5 and more"}]
        whole = kind.render_unfinished(longer)
        assert whole[: len(ids)] == ids and kind.decode(whole[len(ids) :]) == "5 and more"
        rendered = kind.decode(kind.renderer.backend.encode(kind.format.text(longer)).ids)
        assert rendered.startswith(kind.decode(whole)) and kind.decode(ids).endswith(messages[-1]["content"])
        if kind.format_name != "template":
            written, mask = kind.render(longer)
            last = len(mask) - mask[::-1].index(1)  # after the end-of-turn marker of the answer
            assert written[: last - 1] == whole


def test_an_empty_answer_is_continued_where_one_would_begin(tokenizer):
    for name in CHAT_FORMATS:
        kind = tokenizer.with_chat_format(name)
        assert kind.render_unfinished([*HELLO, {"role": "assistant", "content": ""}]) == kind.render(HELLO, True)[0]


def test_continued_ids_match_transformers(tokenizer, tmp_path):
    """As apply_chat_template(continue_final_message=True), which strips the answer; this one has no trailing space."""
    transformers = pytest.importorskip("transformers")
    for template in (TEMPLATES["plain"], TEMPLATES["thinking"]):
        ours = tokenizer_with_template(tokenizer, template)
        ours.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        text = theirs.apply_chat_template(CHATS[0], tokenize=False, continue_final_message=True)
        assert ours.decode(ours.render_unfinished(CHATS[0])) == text
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.render_unfinished(CHATS[0])


def test_a_template_that_leaves_the_answer_out_cannot_continue_it(tokenizer):
    silent = tokenizer_with_template(
        tokenizer, "{% for m in messages if m.role == 'user' %}{{ m.content + eos_token }}{% endfor %}"
    )
    with pytest.raises(UserError, match="leaves out the last message"):
        silent.render_unfinished(CHATS[0])


def test_the_server_continues_the_last_answer(server):
    served = server.service.models["模型/m 1"]
    whole = text_of(post(server, max_tokens=20))
    for cut in (0, 5, len(whole) - 1):
        continued = [*HELLO, {"role": "assistant", "content": whole[:cut]}]
        if "\ufffd" in whole[:cut]:  # cuts a character, whose bytes the text does not contain
            continue
        for flags in ({}, {"add_generation_prompt": False}):
            answer = post(server, messages=continued, max_tokens=30, continue_final_message=True, **flags)
            ids = served.tokenizer.render_unfinished(continued)
            (expected,) = generate(served.model, [ids], SamplingParams(max_new_tokens=30), served.tokenizer)
            assert text_of(answer) == expected.text
            assert answer.json()["usage"]["prompt_tokens"] == len(ids)


def test_a_long_history_before_a_continued_answer_is_cut_by_whole_turns(server):
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(9) for role in ("user", "assistant")]
    answer = post(server, messages=turns, continue_final_message=True, max_tokens=4).json()
    last = server.service.models["模型/m 1"].tokenizer.render_unfinished(turns[-2:])
    assert len(last) <= answer["usage"]["prompt_tokens"] <= 128 - 4


def test_continuing_anything_but_an_answer_is_rejected(server):
    continued = [*HELLO, {"role": "assistant", "content": "A"}]
    for body, message in (
        ({"messages": continued, "add_generation_prompt": True}, "and add_generation_prompt cannot both be true"),
        ({"messages": HELLO}, "the last message must be the assistant's, not the user's"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "x" * 200}]}, "context is 128 tokens"),
    ):
        response = post(server, continue_final_message=True, **body)
        assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_without_a_generation_prompt_no_turn_is_opened(server):
    served = server.service.models["模型/m 1"]
    answer = post(server, add_generation_prompt=False, max_tokens=2)
    assert answer.json()["usage"]["prompt_tokens"] == len(served.tokenizer.render(HELLO)[0])


@pytest.mark.parametrize(
    ("path", "fields", "message"),
    [
        ("chat/completions", {"stop": 5}, "stop: Input should be a valid string or a valid list"),
        ("chat/completions", {"stop": ["a"] * 9}, "stop: List should have at most 8 items after validation, not 9"),
        ("chat/completions", {"stop": ["a", 5]}, "stop.1: Input should be a valid string"),
        ("chat/completions", {"stream": "yes"}, "stream: Input should be a valid boolean"),
        ("completions", {"prompt": None}, "prompt: Input should be a valid string or a valid list"),
        ("completions", {"prompt": []}, "prompt: List should have at least 1 item after validation, not 0"),
        ("completions", {"prompt": ["a"] * 65}, "prompt: List should have at most 64 items after validation, not 65"),
        ("completions", {"prompt": [[1, "a"]]}, "prompt.0.1: Input should be a valid integer"),
        ("embeddings", {"input": 5}, "input: Input should be a valid string or a valid list"),
    ],
)
def test_a_value_of_the_wrong_type_is_rejected_with_the_allowed_types(server, path, fields, message):
    response = post(server, path, **fields)
    assert (response.status_code, response.json()["error"]["message"]) == (400, message)
