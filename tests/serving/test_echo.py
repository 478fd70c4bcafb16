"""Echoed prompts with log-probabilities in /v1/completions, as lm-evaluation-harness' local-completions reads them.

Promises: the log-probabilities are those of a plain forward pass; the first token has none; every entry gives its
token, its offset in the text and the most likely tokens with the token itself; each sampled token has one entry, an
end-of-turn token too; texts, token ids, lists of either, n, streams and max_tokens 0 agree; memory for the logits is
bounded.
"""

import json

import httpx
import pytest
import torch

from model.completion import Completion, Sequence
from model.generate import DecodeBatch, generate
from model.logprobs import TokenLogprob, prompt_logprobs
from model.sampling import SamplingParams
from model.tokenizer import load_tokenizer
from serving.responses import echoed_logprobs, echoed_text
from tests.serving.server_helpers import make_random_model, run_server, save_random_model

PROMPTS = ["The sky is 天空 😀 <|im_end|>", "好", "a\nb" * 20]


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    dense = save_random_model(folder / "pretrain_32.pth", tokenizer, "pretrain", max_seq_len=96)
    moe = save_random_model(folder / "pretrain_32_moe.pth", tokenizer, "pretrain", max_seq_len=96, use_moe=True)
    with run_server([f"dense={dense}", f"moe={moe}"]) as server:
        yield server


def complete(server, prompt, name="dense", **options):
    body = {"model": name, "prompt": prompt, "temperature": 0, "echo": True, **options}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30, verify=False)
    assert response.status_code == 200, response.text
    return response.json()


@torch.no_grad()
def forward_logprobs(server, ids, name="dense"):
    """(seq - 1, vocab): log-probabilities of every token but the first."""
    logits = server.service.models[name].model.logits(torch.tensor([ids]))[0]
    return logits.log_softmax(-1)[:-1]


def encode(server, prompt):
    return server.service.models["dense"].tokenizer.encode(prompt)


# ------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("name", ["dense", "moe"])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_match_a_plain_forward_pass(server, name, count):
    answer = complete(server, PROMPTS, name, logprobs=count, max_tokens=0)  # three lengths in one batch
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
        ids, entries = encode(server, prompt), choice["logprobs"]
        expected = forward_logprobs(server, ids, name)
        own = [expected[i, token].item() for i, token in enumerate(ids[1:])]
        assert entries["token_logprobs"][0] is None and entries["top_logprobs"][0] is None
        assert entries["token_logprobs"][1:] == pytest.approx(own, abs=1e-5)
        for i, top in enumerate(entries["top_logprobs"][1:]):
            values = expected[i].topk(count).values.tolist()
            assert sorted(top.values(), reverse=True)[:count] == pytest.approx(values, abs=1e-5)
            assert top[entries["tokens"][i + 1]] == entries["token_logprobs"][i + 1]
            assert len(top) in (count, count + 1)


def test_tokens_and_offsets_match_the_text(server):
    """The text at each offset is the token; a token inside a character has the character's offset."""
    for prompt in PROMPTS:
        for sent in (prompt, encode(server, prompt)):
            (choice,) = complete(server, sent, logprobs=1, max_tokens=0)["choices"]
            assert choice["text"] == prompt and choice["finish_reason"] == "length"
            entries = choice["logprobs"]
            for token, offset in zip(entries["tokens"], entries["text_offset"], strict=True):
                assert token.startswith("bytes:") or prompt[offset : offset + len(token)] == token
            assert entries["text_offset"] == sorted(entries["text_offset"])


def test_a_bos_that_the_tokenizer_adds_has_no_characters(tokenizer):
    """As in Llama's tokenizers: the ids begin with a bos, the text does not."""
    bos, text = tokenizer.eos_id, "ab"
    ids = [bos, *tokenizer.encode(text)]
    entries = prompt_logprobs(make_random_model(tokenizer).lm_head, torch.zeros(3, 32), ids, 1)
    assert echoed_text(tokenizer, text) == "ab"
    assert echoed_logprobs(tokenizer, text, ids, entries).text_offset == [0, 0, 1]
    assert echoed_text(tokenizer, ids) == "<|endoftext|>ab"
    assert echoed_logprobs(tokenizer, ids, ids, entries).text_offset == [0, 13, 14]


def test_offsets_of_a_tokenizer_that_writes_spaces_as_marks(tmp_path):
    """As Llama 2's: it adds a bos and a space before the text and encodes rare characters as bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab, [("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    marks = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([marks, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", len(pieces))])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    ids = ours.encode_document("a b 好b")
    logprobs = [TokenLogprob(i, -1.0, [(i, -1.0)]) for i in ids[1:]]
    entries = echoed_logprobs(ours, "a b 好b", ids, logprobs)
    assert entries.tokens[:3] == ["<s>", "a", "b"] and entries.tokens[4:7] == [
        f"bytes:\\x{byte:02x}" for byte in "好".encode()
    ]
    assert entries.text_offset == [0, 0, 1, 3, 4, 4, 4, 5]


def test_chunked_prompt_logprobs_equal_unchunked_ones(tokenizer, monkeypatch):
    """Any number of positions per chunk gives the same values, and no chunk exceeds MAX_LOGITS."""
    model = make_random_model(tokenizer)
    ids = torch.randint(20, 200, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        hidden = model(torch.tensor([ids]))[0][0]
        whole = prompt_logprobs(model.lm_head, hidden, ids, 2)
        widths = []
        monkeypatch.setattr("model.logprobs.MAX_LOGITS", 7 * model.lm_head.weight.shape[0])
        model.lm_head.register_forward_hook(lambda module, inputs, output: widths.append(len(output)))
        parts = prompt_logprobs(model.lm_head, hidden, ids, 2)
    assert len(whole) == len(parts) == 149 and max(widths) == 7 and sum(widths) == 149
    for a, b in zip(whole, parts, strict=True):
        assert a.id == b.id and a.logprob == pytest.approx(b.logprob, abs=1e-5)


# ------------------------------------------------------------------------------------------------ prompts with answers


def test_echo_prepends_the_prompt_to_the_answer(server):
    plain = complete(server, PROMPTS, echo=False, logprobs=2, max_tokens=6)
    echoed = complete(server, PROMPTS, logprobs=2, max_tokens=6)
    scored = complete(server, PROMPTS, logprobs=2, max_tokens=0)
    for prompt, answer, both, score in zip(PROMPTS, *(x["choices"] for x in (plain, echoed, scored)), strict=True):
        assert both["text"] == prompt + answer["text"] and both["finish_reason"] == answer["finish_reason"]
        for key in ("tokens", "top_logprobs", "token_logprobs"):
            assert len(both["logprobs"][key]) == len(score["logprobs"][key]) + len(answer["logprobs"][key])
            assert both["logprobs"]["tokens"] == score["logprobs"]["tokens"] + answer["logprobs"]["tokens"]
        offsets = [len(prompt) + offset for offset in answer["logprobs"]["text_offset"]]
        assert both["logprobs"]["text_offset"] == score["logprobs"]["text_offset"] + offsets
    assert echoed["usage"] == plain["usage"] and scored["usage"]["completion_tokens"] == 0


def test_without_logprobs_the_text_alone_is_echoed(server):
    for length in (0, 4):
        for choice, prompt in zip(complete(server, PROMPTS, max_tokens=length)["choices"], PROMPTS, strict=True):
            assert choice["text"].startswith(prompt) and choice["logprobs"] is None
            assert (choice["text"] == prompt) == (length == 0)


def test_several_answers_each_begin_with_the_prompt(server):
    answer = complete(server, PROMPTS[:2], n=2, temperature=1.5, seed=1, logprobs=1, max_tokens=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice, prompt in zip(answer["choices"], [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2, strict=True):
        assert choice["text"].startswith(prompt)
        read = len(encode(server, prompt))
        assert choice["logprobs"]["token_logprobs"][0] is None and len(choice["logprobs"]["tokens"]) >= read + 5
    assert len({choice["text"] for choice in answer["choices"][:2]}) == 2


@pytest.mark.parametrize("length", [0, 1, 9])
def test_a_stream_with_echo_equals_the_whole_answer(server, length):
    options = {"logprobs": 2, "max_tokens": length, "n": 2}
    whole = complete(server, PROMPTS, **options)["choices"]
    body = {"model": "dense", "prompt": PROMPTS, "temperature": 0, "echo": True, "stream": True, **options}
    streamed = [{"text": "", "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []} for _ in whole]
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                one = streamed[choice["index"]]
                one["text"] += choice["text"]
                for key, values in (choice["logprobs"] or {}).items():
                    one[key] += values
                one["finish_reason"] = choice["finish_reason"]
    for one, choice in zip(streamed, whole, strict=True):
        assert one == {"text": choice["text"], "finish_reason": choice["finish_reason"], **choice["logprobs"]}


def test_a_sampled_end_of_turn_token_has_its_own_entry(server, monkeypatch):
    """lm-evaluation-harness drops the last entry as the sampled token; without it, it would drop a prompt token."""
    served = server.service.models["dense"]
    ids = encode(server, "ab")
    with torch.no_grad():
        hidden = served.model(torch.tensor([ids]))[0][0, -1]
        monkeypatch.setattr(
            served.model.lm_head.weight, "data", served.model.lm_head.weight.data.clone()
        )  # the answer to this prompt becomes the eos
        served.model.lm_head.weight.data[served.tokenizer.eos_id] = 9 * hidden / hidden.norm()
        row = Sequence(served.model, served.tokenizer, ids, SamplingParams(max_new_tokens=1, logprobs=1), Completion())
        DecodeBatch(served.model, served.tokenizer).prefill([row])
    assert row.completion.finish_reason == "stop" and row.completion.ids == [] and row.completion.stop_logprob
    (choice,) = complete(server, "ab", logprobs=1, max_tokens=1)["choices"]
    assert choice["text"] == "ab" and choice["finish_reason"] == "stop"
    assert choice["logprobs"]["tokens"] == ["a", "b", "<|endoftext|>"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]


def test_a_prompt_that_fills_the_context_can_be_scored_and_not_answered(server):
    full = [50 + i for i in range(96)]
    assert len(complete(server, full, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]["tokens"]) == 96
    for prompt, length in ((full, 1), ([*full, 50], 0)):
        body = {"model": "dense", "prompt": prompt, "echo": True, "max_tokens": length}
        response = httpx.post(f"{server.url}/v1/completions", json=body, verify=False)
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_scoring_beside_running_answers_changes_neither(server):
    alone = complete(server, PROMPTS, logprobs=1, max_tokens=40)
    served = server.service.models["dense"]
    (expected,) = generate(served.model, [encode(server, "x")], SamplingParams(max_new_tokens=80), served.tokenizer)
    body = {"model": "dense", "prompt": "x", "temperature": 0, "max_tokens": 80, "stream": True}
    text = ""
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
        for i, line in enumerate(response.iter_lines()):
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            if i in (2, 8):
                scored = complete(server, PROMPTS, logprobs=1, max_tokens=0)["choices"]
                for one, choice in zip(scored, alone["choices"], strict=True):
                    entries = one["logprobs"]["token_logprobs"]
                    assert entries[1:] == pytest.approx(
                        choice["logprobs"]["token_logprobs"][1 : len(entries)], abs=1e-5
                    )
    assert text == expected.text


# ------------------------------------------------------------------------------------------------ lm-evaluation-harness


def test_scores_of_lm_evaluation_harness_match_the_model(server):
    """local-completions sends context + continuation as ids and sums token_logprobs[len(context) : -1].

    is_greedy is true if every token's log-probability is the largest of its top_logprobs.
    """
    pairs = [("The sky is", " blue"), ("天空", "是蓝的"), ("1 2 3", " 4")]
    ids = [(encode(server, context), encode(server, more)) for context, more in pairs]
    for name in ("dense", "moe"):
        asked = list(ids)
        for context, _ in ids:  # add a greedy continuation
            top_logprobs = server.service.models[name].model.logits(torch.tensor([context]))[0, -1].argmax().item()
            asked.append((context, [top_logprobs]))
        options = {"max_tokens": 1, "logprobs": 1, "seed": 1234}
        choices = complete(server, [context + more for context, more in asked], name, **options)["choices"]
        scores = []
        for (context, more), choice in zip(asked, sorted(choices, key=lambda choice: choice["index"]), strict=True):
            entries, scored = choice["logprobs"], slice(len(context), -1)
            tops = [max(top.values()) for top in entries["top_logprobs"][scored]]
            scores.append((sum(entries["token_logprobs"][scored]), tops == entries["token_logprobs"][scored]))
            expected = forward_logprobs(server, context + more, name)[len(context) - 1 :]
            summed = expected[range(len(more)), torch.tensor(more)].sum().item()
            assert scores[-1][0] == pytest.approx(summed, abs=1e-4)
            assert scores[-1][1] == (expected.argmax(-1).tolist() == more)
        assert [greedy for _, greedy in scores[3:]] == [True] * 3
