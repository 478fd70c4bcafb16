"""The openai client against a running server: streamed and not, sequential and concurrent.

Promises: responses have every field of OpenAI's API; the text is that of `generate`, streamed or not; usage is correct;
stop, n, seed, logprobs and penalties match `generate`; unknown fields are ignored and named in a header; content may be
text or parts; long histories are shortened by whole turns; errors have OpenAI's shape and status; a failing model
leaves the others alone; stopping the server ends open requests with an error.
"""

import asyncio
import json

import httpx
import openai
import pytest

from model.generate import DecodeBatch, fit_chat, generate
from model.sampling import SamplingParams
from serving.config import ServeConfig
from serving.scheduler import QueueFull, Request
from serving.service import CompletionService, events_until_done
from tests.serving.server_helpers import make_sequence, run_server, save_random_model

HELLO = [{"role": "user", "content": "Hi 你好"}]


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    chat = save_random_model(folder / "full_sft_32.pth", tokenizer)
    moe = save_random_model(folder / "full_sft_32_moe.pth", tokenizer, use_moe=True)
    bare = save_random_model(folder / "pretrain_32.pth", tokenizer, "pretrain", max_seq_len=64)
    with run_server([chat, moe, f"small={bare}"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def generate_alone(server, messages, name="full_sft_32", **options):
    return server.generate(name, messages, **options)


def chat(client, messages=HELLO, **options):
    options = {"model": "full_sft_32", "temperature": 0, "max_tokens": 20, **options}
    return client.chat.completions.create(messages=messages, **options)


# ------------------------------------------------------------------------------------------------ chat


def test_a_chat_completion_has_every_field(client, server):
    answer = chat(client)
    expected = generate_alone(server, HELLO, max_new_tokens=20)
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason == "length"
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-") and answer.created > 1.7e9
    assert answer.model == "full_sft_32"
    prompt = len(server.service.models["full_sft_32"].tokenizer.render(HELLO, True)[0])
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 20)
    assert answer.usage.total_tokens == prompt + 20


@pytest.mark.parametrize("name", ["full_sft_32", "full_sft_32_moe"])
def test_streamed_chunks_join_to_the_whole_answer(client, server, name):
    chunks = list(chat(client, model=name, stream=True))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None and chunk.created for chunk in chunks)
    first, *middle, last = (chunk.choices[0] for chunk in chunks)
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert all(choice.finish_reason is None and choice.delta.content for choice in middle) and len(middle) > 5
    assert last.finish_reason == "length" and not last.delta.content
    assert (
        "".join(choice.delta.content for choice in middle)
        == generate_alone(server, HELLO, name, max_new_tokens=20).text
    )


def test_the_stream_is_server_sent_events_with_usage_and_done(server):
    body = {"messages": HELLO, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": True}}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"


def test_n_answers_are_seeded_by_index_and_counted(client):
    options = {"n": 3, "temperature": 1.2, "seed": 5}
    answer = chat(client, **options, logprobs=True)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in answer.choices) > 40
    assert answer.usage.prompt_tokens == chat(client).usage.prompt_tokens
    again = ["", "", ""]
    for chunk in chat(client, stream=True, **options):
        again[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert again == texts
    assert chat(client, temperature=1.2, seed=6).choices[0].message.content == texts[1]  # seed + index


def test_logprobs_match_generate_streamed_and_whole(client, server):
    expected = generate_alone(server, HELLO, max_new_tokens=20, logprobs=2)
    whole = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    streamed = []
    for chunk in chat(client, logprobs=True, top_logprobs=2, stream=True):
        entry = chunk.choices[0].logprobs
        streamed += entry.content if entry else []
    assert streamed == whole and len(whole) == 20
    assert [token.logprob for token in whole] == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-5)
    assert bytes(b for token in whole for b in token.bytes).decode(errors="replace") == expected.text
    assert all(len(token.top_logprobs) == 2 and token.top_logprobs[0].logprob == token.logprob for token in whole)
    assert chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client).choices[0].logprobs is None


def test_stop_strings_cut_text_and_logprobs(client, server):
    whole = generate_alone(server, HELLO, max_new_tokens=60).text
    stop = whole[20:22]
    cut = whole[: whole.index(stop)]
    for value in (stop, [stop, "never said"]):
        choice = chat(client, stop=value, max_tokens=60, logprobs=True).choices[0]
        assert (choice.message.content, choice.finish_reason) == (cut, "stop")
        spelled = bytes(b for token in choice.logprobs.content for b in token.bytes).decode(errors="replace")
        assert spelled.startswith(cut) and len(spelled) == len(cut)
    chunks = list(chat(client, stop=stop, max_tokens=60, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut
    assert chat(client, stop=[]).choices[0].finish_reason == "length"


def test_sampling_fields_reach_the_generator(client, server):
    numbers = {"top_p": 0.8, "seed": 3, "presence_penalty": 0.5, "frequency_penalty": 0.7}
    ours = {"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "penalty_window": 3}
    answer = chat(client, temperature=0.9, **numbers, extra_body=ours)
    expected = generate_alone(server, HELLO, max_new_tokens=20, temperature=0.9, **numbers, **ours)
    assert answer.choices[0].message.content == expected.text
    default = chat(client, temperature=None, seed=3).choices[0].message.content
    assert default == generate_alone(server, HELLO, max_new_tokens=20, temperature=0.7, top_p=0.9, seed=3).text


def test_max_completion_tokens_takes_precedence(client, server):
    assert chat(client, max_completion_tokens=7, max_tokens=None).usage.completion_tokens == 7
    assert chat(client, max_completion_tokens=7, max_tokens=9).usage.completion_tokens == 7
    filled = chat(client, max_tokens=None)  # fills the context
    assert filled.choices[0].message.content == generate_alone(server, HELLO, max_new_tokens=256).text
    assert filled.usage.total_tokens > 90


def test_content_parts_and_all_roles_are_accepted(client, server):
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "你好"}]
    assert chat(client, [{"role": "user", "content": parts}]).choices == chat(client).choices
    messages = [
        {"role": "developer", "content": "Be"},
        {"role": "system", "content": "kind"},
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None},
        {"role": "function", "name": "f", "content": "4"},
    ]
    entry = [("system", "Be\n\nkind"), ("user", "?"), ("assistant", ""), ("function", "4")]
    expected = generate_alone(server, [{"role": role, "content": text} for role, text in entry], max_new_tokens=20)
    assert chat(client, messages).choices[0].message.content == expected.text


def test_unknown_fields_are_ignored_and_named_in_a_header(client):
    options = {"functions": [{"name": "f"}], "user": "me", "extra_body": {"num_ctx": 7, "bad name\r\nx: y": 1}}
    answer = client.chat.completions.with_raw_response.create(
        model="full_sft_32", messages=HELLO, temperature=0, max_tokens=20, **options
    )
    assert answer.headers["x-ignored-fields"] == "functions, num_ctx"
    assert answer.parse().choices == chat(client).choices


def test_a_long_history_is_cut_by_whole_turns(client, server):
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(9) for role in ("user", "assistant")]
    messages = [{"role": "system", "content": "kind"}, *turns, {"role": "user", "content": "last?"}]
    served = server.service.models["full_sft_32"]
    kept = fit_chat(served.tokenizer, messages, served.max_model_len - 20)
    assert served.tokenizer.decode(kept).startswith("<|im_start|>system\nkind<|im_end|>\n<|im_start|>user\nuser ")
    assert len(kept) < len(served.tokenizer.render(messages, True)[0])
    answer = chat(client, messages)
    assert answer.usage.prompt_tokens == len(kept)
    (expected,) = generate(served.model, [kept], SamplingParams(max_new_tokens=20), served.tokenizer)
    assert answer.choices[0].message.content == expected.text


def test_a_history_of_thousands_of_turns_is_cut_quickly(client):
    turns = [{"role": role, "content": "word " * 5} for _ in range(2000) for role in ("user", "assistant")]
    assert chat(client, [*turns, *HELLO], timeout=10, max_tokens=2).usage.completion_tokens == 2


def test_concurrent_async_clients_get_equal_texts(server, client):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def streamed(text):
                chunks = await chat(client, [{"role": "user", "content": text}], stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            async def whole(text):
                return (await chat(client, [{"role": "user", "content": text}])).choices[0].message.content

            return await asyncio.gather(*(way(f"q {i}") for i in range(6) for way in (streamed, whole)))

    answers = asyncio.run(ask())
    for i in range(6):
        expected = generate_alone(server, [{"role": "user", "content": f"q {i}"}], max_new_tokens=20).text
        assert answers[2 * i] == answers[2 * i + 1] == expected


# ------------------------------------------------------------------------------------------------ completions


def test_completions_match_generate_for_texts_and_ids(client, server):
    served = server.service.models["small"]
    prompts = ["The sky", "天空"]
    ids = [served.tokenizer.encode(prompt) for prompt in prompts]
    texts = [a.text for a in generate(served.model, ids, SamplingParams(max_new_tokens=16), served.tokenizer)]
    options = {"model": "small", "temperature": 0}
    for prompt in (prompts, ids):
        answer = client.completions.create(prompt=prompt, **options)
        assert [choice.text for choice in answer.choices] == texts
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids[0]) + len(ids[1]), 32)
    assert client.completions.create(prompt=ids[1], **options).choices[0].text == texts[1]
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts and chunk.choices[0].finish_reason == "length"
    entry = client.completions.create(prompt=prompts[0], logprobs=2, **options).choices[0].logprobs
    assert len(entry.tokens) == len(entry.token_logprobs) == len(entry.text_offset) == len(entry.top_logprobs) == 16
    assert all(max(top.values()) == p for top, p in zip(entry.top_logprobs, entry.token_logprobs, strict=True))
    assert client.completions.create(prompt="", max_tokens=3, **options).usage.completion_tokens == 3


# ------------------------------------------------------------------------------------------------ models, errors


def test_models_are_listed_and_retrieved(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["full_sft_32", "full_sft_32_moe", "small"]
    small = client.models.retrieve("small")
    assert small == models["small"] and small.object == "model" and small.owned_by == "mengya" and small.created
    assert small.model_extra["stage"] == "pretrain" and small.model_extra["max_model_len"] == 64
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")


def test_health_reports_the_queue_of_each_model(server):
    answer = httpx.get(f"{server.url}/health").json()
    assert answer["status"] == "ok"
    assert answer["models"]["small"] == {"running": 0, "waiting": 0, "seats": 16, "queue": 64}


def test_errors_have_the_openai_body_and_status(client, server):
    long = "x" * 300
    for options, kind, message in (
        ({"model": "gpt-4"}, openai.NotFoundError, "no model 'gpt-4' on .*: use full_sft_32, full_sft_32_moe, small"),
        ({"model": "small"}, openai.BadRequestError, "small is a pretrained model"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"messages": [{"role": "king", "content": "?"}]}, openai.BadRequestError, "messages.0.role"),
        ({"messages": [{"role": "user", "content": long}]}, openai.BadRequestError, "256 tokens, .* has 319"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, openai.BadRequestError, "'text'"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"temperature": "0.5"}}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"temperature": 10**400}}, openai.BadRequestError, "temperature"),
        ({"n": 0}, openai.BadRequestError, "n"),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens"),
        ({"top_p": 1.5, "stream": True}, openai.BadRequestError, "top_p"),
    ):
        with pytest.raises(kind, match=message) as error:
            chat(client, **options)
        assert error.value.body.keys() == {"message", "type", "param", "code"}
        assert error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="64 tokens, and the prompt has 300"):
        client.completions.create(model="small", prompt="x" * 300)
    with pytest.raises(openai.BadRequestError, match="token id 272: this model's last id is 271"):
        client.completions.create(model="small", prompt=[50, 272])
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("PUT", "/v1/models", 405)):
        response = httpx.request(method, server.url + path)
        assert response.status_code == status and response.json()["error"]["message"].startswith(f"{method} {path}")


def test_a_failing_model_is_an_error_and_other_models_answer(client, server, monkeypatch, capfd):
    small, prefill = server.service.models["small"].model, DecodeBatch.prefill
    monkeypatch.setattr(DecodeBatch, "prefill", lambda own, s: 1 / 0 if own.model is small else prefill(own, s))
    with pytest.raises(openai.InternalServerError, match="the model failed on this request"):
        client.completions.create(model="small", prompt="a")
    with pytest.raises(openai.APIError, match="the model failed on this request"):
        list(client.completions.create(model="small", prompt="a", stream=True))
    assert chat(client).choices[0].message.content == generate_alone(server, HELLO).text
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_stopping_the_service_fails_every_open_request(server):
    async def stop_while_running():
        service = CompletionService(server.service.models, ServeConfig(max_num_seqs=2))
        service.start(asyncio.get_running_loop())
        served = service.models["full_sft_32"]
        work = [Request(make_sequence(served.model, served.tokenizer, [50], max_new_tokens=240), i) for i in range(5)]
        inbox = service.submit("full_sft_32", work)
        await inbox.get()
        await asyncio.to_thread(service.stop)
        async for event in events_until_done(inbox, 5):
            assert not event.finish_reason or event.finish_reason == "error"
        with pytest.raises(QueueFull):
            service.submit("full_sft_32", work)
        return {event.request.index for event in [event, *(inbox.get_nowait() for _ in range(inbox.qsize()))]}

    assert asyncio.run(stop_while_running()) == set(range(5))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'"\\ud800"', b"\xff\xfe", b'{"messages": [{"role": "user", "content": NaN}]}']
)
def test_malformed_bodies_get_400(server, body):
    response = httpx.post(
        f"{server.url}/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_lone_surrogates_in_a_request_are_handled(server):
    good = b'{"messages": [{"role": "user", "content": "\\ud800"}], "max_tokens": 2}'
    for body, status in (
        (good, 200),
        (good.replace(b"2}", b'2, "stop": "\\ud800"}'), 400),
        (good.replace(b"user", b"\\ud800"), 400),
        (good.replace(b"{", b'{"\\udfff": 1, ', 1), 400),
        (good.replace(b"{", b'{"model": "\\udfff", ', 1), 404),
    ):
        kind = {"content-type": "application/json"}
        response = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=kind)
        assert response.status_code == status and response.json()
