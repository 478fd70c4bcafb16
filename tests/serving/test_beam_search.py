"""Beam search, no_repeat_ngram_size and sampling presets over HTTP.

Promises: the fields are used, not ignored; a beam search gives the text of `generate`, streamed as one chunk, also
beside other requests; fields that exclude beam search are rejected by name; a chat without sampling fields uses the
preset of the model's chat format, a completion the defaults.
"""

import asyncio

import httpx
import openai
import pytest

from model.generate import generate
from model.sampling import SamplingParams
from tests.helpers import run_script
from tests.serving.server_helpers import run_server, save_random_model

HELLO = [{"role": "user", "content": "Hi 你好"}]
SEARCH = {"num_beams": 4, "no_repeat_ngram_size": 3, "length_penalty": 0.5}


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    files = [f"{name}={save_random_model(folder / f'{name}.pth', tokenizer.with_chat_format(name))}"
             for name in ("chatml", "belle", "mindllm")]  # fmt: skip
    with run_server(files, max_num_seqs=6) as server:
        yield server


def post(server, route="chat/completions", **body):
    body = {"model": "chatml", "max_tokens": 20, **body}
    if route == "chat/completions":
        body.setdefault("messages", HELLO)
    return httpx.post(f"{server.url}/v1/{route}", json=body, timeout=60)


def text_of(response):
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["message"]["content"] if "message" in choice else choice["text"]


def generate_alone(server, name="chatml", prompt=None, **options):
    served = server.service.models[name]
    ids = served.tokenizer.encode_document(prompt) if prompt else served.tokenizer.render(HELLO, True)[0]
    stop = () if prompt else served.tokenizer.stop_strings
    settings = SamplingParams(**{"max_new_tokens": 20, "stop": stop, **options})
    return generate(served.model, [ids], settings, served.tokenizer)[0].text


def test_beam_search_over_http_matches_generate(server):
    expected = generate_alone(server, **SEARCH)
    response = post(server, temperature=0, **SEARCH)
    assert text_of(response) == text_of(post(server, **SEARCH)) == expected != generate_alone(server)
    assert "x-ignored-fields" not in response.headers
    assert response.json()["usage"]["completion_tokens"] > 5
    assert text_of(post(server, "completions", prompt="abc", **SEARCH)) == generate_alone(
        server, prompt="abc", **SEARCH
    )
    sampled = {"temperature": 0.9, "seed": 3, "no_repeat_ngram_size": 2}
    assert text_of(post(server, **sampled)) == generate_alone(server, top_p=0.9, **sampled)


def test_a_streamed_beam_search_is_one_chunk(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(
            model="chatml", messages=HELLO, max_tokens=20, stream=True, extra_body=SEARCH
        ))  # fmt: skip
    contents = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert contents == [generate_alone(server, **SEARCH)] and chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_concurrent_searches_and_plain_requests_match_generate(server):
    async def ask_all():
        async with httpx.AsyncClient(timeout=60) as client:
            bodies = [SEARCH, {}, {"num_beams": 2}, {"no_repeat_ngram_size": 1}] * 3
            posts = (client.post(f"{server.url}/v1/chat/completions", json={
                "model": "chatml", "messages": HELLO, "max_tokens": 20, "temperature": 0, **body
            }) for body in bodies)  # fmt: skip
            return bodies, await asyncio.gather(*posts)

    bodies, responses = asyncio.run(ask_all())
    assert [text_of(response) for response in responses] == [generate_alone(server, **body) for body in bodies]
    server.wait_until_idle()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"num_beams": 9}, "num_beams"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2.5}, "num_beams"),
        ({"num_beams": 7}, "num_beams"),  # above this server's max_num_seqs of 6
        ({"num_beams": 2, "temperature": 0.7}, "temperature"),
        ({"num_beams": 2, "n": 2}, "n"),
        ({"num_beams": 2, "logprobs": True}, "logprobs"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
        ({"length_penalty": 11}, "length_penalty"),
    ],
)
def test_fields_that_beam_search_cannot_honour_are_rejected(server, body, param):
    response = post(server, **body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and param in error["message"]


def test_chats_use_the_sampling_preset_of_their_chat_format(server):
    belle = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2}
    assert text_of(post(server, model="belle", seed=1)) == generate_alone(server, "belle", seed=1, **belle)
    assert text_of(post(server, model="belle", seed=1, top_k=3)) == generate_alone(
        server, "belle", seed=1, **{**belle, "top_k": 3}
    )
    search = {"num_beams": 4, "no_repeat_ngram_size": 5}
    assert text_of(post(server, model="mindllm")) == generate_alone(server, "mindllm", **search)
    sampled = {"temperature": 0.9, "top_p": 0.9, "seed": 1, "no_repeat_ngram_size": 5}
    assert text_of(post(server, model="mindllm", temperature=0.9, seed=1)) == generate_alone(
        server, "mindllm", **sampled
    )
    plain = {"temperature": 0.7, "top_p": 0.9, "seed": 1}
    given = {"model": "belle", "prompt": "abc", "seed": 1}
    assert text_of(post(server, "completions", **given)) == generate_alone(server, "belle", "abc", **plain)


def test_a_preset_never_rejects_a_request(server):
    """Beam search excludes n and logprobs: such a request is sampled without the preset's num_beams."""
    response = post(server, model="mindllm", n=2, seed=1, logprobs=True)
    assert response.status_code == 200 and len(response.json()["choices"]) == 2
    expected = generate_alone(server, "mindllm", temperature=0.7, top_p=0.9, seed=1, no_repeat_ngram_size=5)
    assert text_of(response) == expected


def test_a_preset_with_too_many_beams_is_a_startup_error(monkeypatch, tokenizer, tmp_path):
    from common.errors import UserError

    path = save_random_model(tmp_path / "full_sft_32.pth", tokenizer.with_chat_format("mindllm"))
    with pytest.raises(
        UserError, match=r"--max_num_seqs 2 is less than the num_beams of full_sft_32's .*: set --max_num_seqs 4"
    ):
        run_script(monkeypatch, "serve_openai_api.py", "--checkpoint", path, "--port", "0", "--seats", "2")
