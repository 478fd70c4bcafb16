"""/v1/embeddings: the mean of the last hidden states.

Promises: the vector is the mean of the hidden states after the final norm over the input's tokens; it does not depend
on the batch; texts and ids, floats and base64 agree; invalid inputs are one-line errors with numbers; a large request
is computed in bounded batches between the decode steps of running requests and does not change their text; a request
whose client has disconnected is aborted.
"""

import base64
import json
import socket
import struct
import threading
import time

import httpx
import openai
import pytest
import torch

from model.generate import generate
from model.sampling import SamplingParams
from serving.embeddings import EmbeddingJob, embedding_batches
from serving.scheduler import PREFILL_TOKENS, QueueFull, abort
from tests.serving.server_helpers import SchedulerDriver, make_random_model, run_server, save_random_model

INPUTS = ["The sky", "天空是蓝的 😀", "a", "b" * 90]


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    chat = save_random_model(folder / "full_sft_32.pth", tokenizer, max_seq_len=512)
    moe = save_random_model(folder / "pretrain_32_moe.pth", tokenizer, "pretrain", max_seq_len=128, use_moe=True)
    with run_server([f"chat={chat}", f"moe={moe}"], max_queue=8) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@torch.no_grad()
def mean_of_states(server, text, name="chat"):
    """The mean of lm_head's inputs for one text."""
    served = server.service.models[name]
    states = []
    hook = served.model.lm_head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    served.model.logits(torch.tensor([served.tokenizer.encode(text)]))
    hook.remove()
    return states[0][0].mean(0).tolist()


def close(a, b):
    return a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("name", ["chat", "moe"])
def test_vectors_are_the_means_of_the_last_states_for_any_batching(client, server, name):
    answer = client.embeddings.create(model=name, input=INPUTS)  # the client requests and decodes base64
    assert [item.index for item in answer.data] == [0, 1, 2, 3] and answer.model == name and answer.object == "list"
    for text, item in zip(INPUTS, answer.data, strict=True):
        assert item.object == "embedding" and len(item.embedding) == 32
        assert close(item.embedding, mean_of_states(server, text, name))
        (one,) = client.embeddings.create(model=name, input=text, encoding_format="float").data
        assert close(one.embedding, item.embedding)
    tokens = sum(len(text.encode()) for text in INPUTS)  # one token per byte
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens


def test_token_ids_and_text_give_equal_vectors(client, server):
    tokenizer = server.service.models["chat"].tokenizer
    ids = [tokenizer.encode(text) for text in INPUTS]
    expected = [item.embedding for item in client.embeddings.create(model="chat", input=INPUTS).data]
    several = client.embeddings.create(model="chat", input=ids)
    assert [close(item.embedding, v) for item, v in zip(several.data, expected, strict=True)] == [True] * 4
    (one,) = client.embeddings.create(model="chat", input=ids[1]).data
    assert close(one.embedding, expected[1])


def test_base64_is_little_endian_fp32(server):
    url = f"{server.url}/v1/embeddings"
    packed, floats = (
        httpx.post(url, json={"model": "chat", "input": "a", "encoding_format": kind}).json()["data"][0]["embedding"]
        for kind in ("base64", "float")
    )
    assert list(struct.unpack("<32f", base64.b64decode(packed))) == floats
    assert httpx.post(url, json={"model": "chat", "input": "a", "encoding_format": None}).json()["data"][0][
        "embedding"
    ] == pytest.approx(floats, abs=1e-6)


def test_invalid_inputs_are_one_line_errors_with_numbers(server):
    for body, message in (
        ({"input": ""}, "input: must not be empty: a text, token ids, or a list of either"),
        ({"input": []}, "input: must not be empty: a text, token ids, or a list of either"),
        ({"input": [[]]}, "input: number 0 is empty (counted from 0)"),
        ({"input": ["a", ""]}, "input: number 1 is empty (counted from 0)"),
        ({"input": ["a"] * 2049}, "input: 2049 inputs in one request, at most 2048"),
        ({"input": ["a", "b" * 600]}, "input 1: this model's context is 512 tokens, and this text has 600: shorten it"),
        ({"input": [[50], [272]]}, "input 1: token id 272: this model's last id is 271"),
        ({"input": "a", "dimensions": 8}, "dimensions: the vectors have the model's full size only"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format: Input should be 'float' or 'base64'"),
        ({"input": "a", "model": "other"}, "no model 'other' on this server: use chat, moe"),
        ({}, "input: Field required"),
        ({"input": 5}, "input: "),
    ):
        response = httpx.post(f"{server.url}/v1/embeddings", json={"model": "chat", **body}, verify=False)
        assert response.status_code == (404 if "model" in body else 400)
        assert response.json()["error"]["message"].startswith(message) and "\n" not in response.text
    assert httpx.post(f"{server.url}/v1/embeddings", json={"input": "b" * 512}, verify=False).status_code == 200


def test_embedding_batches_are_bounded_and_complete():
    inputs = [[1] * (1 + 37 * i % 300) for i in range(200)] + [[1] * (3 * PREFILL_TOKENS)]
    batches = list(embedding_batches(inputs))
    assert sorted(i for batch in batches for i in batch) == list(range(201))
    for batch in batches:
        assert len(batch) == 1 or max(len(inputs[i]) for i in batch) * len(batch) <= PREFILL_TOKENS
    assert len(batches) < 30


def test_concurrent_embeddings_and_completions_do_not_change_each_other(client, server):
    """One stream and three clients, whose large requests are computed between the stream's tokens."""
    texts = [f"text {i} " * (i % 40) + "." for i in range(90)]
    expected = [mean_of_states(server, text) for text in texts]
    served = server.service.models["chat"]
    prompt = served.tokenizer.render([{"role": "user", "content": "1"}], True)[0]
    (answer,) = generate(served.model, [prompt], SamplingParams(max_new_tokens=200), served.tokenizer)
    results, steps = [], []

    def embed():
        results.append([item.embedding for item in client.embeddings.create(model="chat", input=texts).data])
        steps.append(len(pieces))

    pieces: list[str] = []
    threads = [threading.Thread(target=embed) for _ in range(3)]
    body = {"model": "chat", "messages": [{"role": "user", "content": "1"}], "temperature": 0, "max_tokens": 200}
    with client.chat.completions.create(**body, stream=True) as stream:
        for chunk in stream:
            if len(pieces) == 5:
                for thread in threads:
                    thread.start()
            pieces.append(chunk.choices[0].delta.content or "")
    for thread in threads:
        thread.join()
    assert "".join(pieces) == answer.text
    assert min(steps) > 10, "tokens are sent while the vectors are computed"
    for result in results:
        assert all(close(vector, other) for vector, other in zip(result, expected, strict=True))
    server.wait_until_idle()


# ------------------------------------------------------------------------------------------------ jobs in the scheduler


@pytest.fixture
def driver(tokenizer):
    return SchedulerDriver(make_random_model(tokenizer), tokenizer, max_num_seqs=1, max_queue=2)


def test_jobs_alternate_and_count_against_the_queue(driver):
    long, short, third = EmbeddingJob([[5] * 250] * 60), EmbeddingJob([[5]]), EmbeddingJob([[6]])
    for job in (long, short, third):
        driver.scheduler.add([job])
    assert driver.num_waiting == 3
    with pytest.raises(QueueFull):
        driver.scheduler.add([EmbeddingJob([[7]])])
    driver.run()
    assert [(item.request, item.finish_reason) for item in driver.events] == [
        (short, "stop"),
        (third, "stop"),
        (long, "stop"),
    ]
    assert driver.num_waiting == 0


def test_a_disconnect_aborts_the_job(server, driver):
    job, other = EmbeddingJob([[5] * 250] * 60), EmbeddingJob([[5]])
    driver.scheduler.add([job])
    driver.step()
    abort([job])
    assert driver.num_waiting == 0
    driver.scheduler.add([other])
    driver.run()
    assert [item.request for item in driver.events] == [other] and len(job.vectors) < 60

    body = json.dumps({"model": "chat", "input": ["b" * 500] * 1500}).encode()
    head = "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        deadline = time.monotonic() + 20
        while not server.status()["waiting"]:
            assert time.monotonic() < deadline
            time.sleep(0.002)
    assert server.wait_until_idle() < 1.0, "the whole request would take several seconds"


def test_a_failing_job_fails_alone(driver, capsys):
    bad, good = EmbeddingJob([[10**6]]), EmbeddingJob([[5]])
    driver.scheduler.add([bad])
    driver.scheduler.add([good])
    driver.run()
    assert [(item.request, item.finish_reason) for item in driver.events] == [(bad, "error"), (good, "stop")]
    assert "IndexError" in capsys.readouterr().err


def test_fail_ends_jobs_with_an_error(driver):
    jobs = [EmbeddingJob([[5] * 250] * 200) for _ in range(2)]
    for job in jobs:
        driver.scheduler.add([job])
    driver.step()
    events = driver.scheduler.fail(including_waiting=True)
    assert {(item.request, item.finish_reason) for item in events} == {(job, "error") for job in jobs}


def test_a_failing_model_is_a_500_error_body(server, monkeypatch):
    monkeypatch.setattr(EmbeddingJob, "step", lambda self, model: 1 / 0)
    response = httpx.post(f"{server.url}/v1/embeddings", json={"model": "chat", "input": "a"}, verify=False)
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
