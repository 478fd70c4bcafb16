"""Log-probabilities of options equal transformers; batches, padding and shared examples do not change them; prompts
that exceed the context are truncated on the left."""

from pathlib import Path

import pytest
import torch

from common.errors import UserError
from evaluation import exam_logprobs
from evaluation.chat_model import ChatModel
from evaluation.exam_data import CEVAL_LETTERS, ExamItem, ExamSplit
from evaluation.exam_logprobs import compute_option_log_probs
from evaluation.exam_prompts import PromptConfig, build_prompts
from model.config import ModelConfig
from model.transformer import Transformer

EXAMPLES = [ExamItem("s", str(i), f"example {i}?", ("a", "b", "c", "d"), "ABCD"[i % 4], f"dev:{i}") for i in range(3)]


def make_exam(texts, examples=EXAMPLES):
    """Chinese and English questions form two subjects."""
    subjects = ["zh" if is_chinese(question) else "en" for question, _ in texts]
    items = [
        ExamItem(s, str(i), *text, "A", f"val:{i}") for i, (s, text) in enumerate(zip(subjects, texts, strict=True))
    ]
    items.sort(key=lambda item: item.subject)
    return ExamSplit("val", items, {"zh": examples, "en": examples}, {"zh": "Other", "en": "Other"})


def is_chinese(text):
    return any("\u4e00" <= c <= "\u9fff" for c in text)


MIXED = [  # English first, because subjects are sorted
    ("what?", ("1", "22", "3", "a long answer, longer than the question")),
    ("a much longer question about nothing at all, asked in English?", ("x", "yy", "z", "w")),
    ("一加一等于____。", ("一", "二二", "三三三", "四")),
    ("中文", ("是", "否", "也许", "不知道")),
]


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return Transformer(ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, max_seq_len=512)).eval()


@pytest.fixture(scope="module")
def transformers_model(model):
    """The same weights in LlamaForCausalLM."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.dim,
        intermediate_size=c.hidden_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        tie_word_embeddings=True,
    )
    other = LlamaForCausalLM(config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def option_log_probs(model, tokenizer, prompts, method, batch_tokens=4096):
    """The log-probabilities of all options, (questions, options)."""
    score(model, tokenizer, prompts, method, batch_tokens)
    return torch.tensor([one.log_probs for one in prompts])


def score(model, tokenizer, prompts, method, batch_tokens=4096):
    chat_model = ChatModel("m", Path("m"), model, tokenizer, "full_sft", torch.device("cpu"), torch.float32)
    assert len(list(compute_option_log_probs(chat_model, prompts, method, batch_tokens))) == len(prompts)


@torch.no_grad()
def reference_log_probs(transformers_model, tokenizer, texts, chat, method, shots):
    """Reference: one option at a time, no cache, no padding, prompts written out here."""
    rows = []
    for question, options in texts:
        zh = is_chinese(question)
        tail, gap = ("\n答案：", "") if zh else ("\nAnswer:", " ")
        instruction = "\n请直接回答选项的字母。" if zh else "\nAnswer with the letter of the right option."

        def page(q, shown, instruction=instruction):
            listed = "".join(f"\n{letter}. {text}" for letter, text in zip(CEVAL_LETTERS, shown, strict=True))
            return q if method == "text" else q + listed + (instruction if chat else "")

        replies = [
            e.answer if method == "letter" else e.options[CEVAL_LETTERS.index(e.answer)] for e in EXAMPLES[:shots]
        ]
        before = [page(e.question, e.options) for e in EXAMPLES[:shots]]
        if chat:
            pairs = zip(before, replies, strict=True)
            text = "".join(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n" for q, a in pairs)
            text += f"<|im_start|>user\n{page(question, options)}<|im_end|>\n<|im_start|>assistant\n"
            start, gap = tokenizer.renderer.backend.encode(text, add_special_tokens=False).ids, ""
        else:
            text = "".join(f"{q}{tail}{gap}{a}\n\n" for q, a in zip(before, replies, strict=True))
            start = tokenizer.encode(text + page(question, options) + tail)
        row = []
        for continuation in CEVAL_LETTERS if method == "letter" else options:
            more = tokenizer.encode(gap + continuation)
            logs = transformers_model(torch.tensor([start + more])).logits[0].log_softmax(-1)
            total = sum(logs[len(start) + i - 1, token].item() for i, token in enumerate(more))
            row.append(total / (len(continuation) if method == "text" else 1))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize("method", ["letter", "text"])
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("shots", [0, 2])
def test_log_probabilities_equal_transformers(model, transformers_model, tokenizer, method, chat, shots):
    prompts = list(build_prompts(make_exam(MIXED), tokenizer, PromptConfig(method, shots, 1, chat), 512))
    assert not any(one.is_truncated for one in prompts) and all(one.num_shots == shots for one in prompts)
    ours = option_log_probs(model, tokenizer, prompts, method)
    torch.testing.assert_close(
        ours, reference_log_probs(transformers_model, tokenizer, MIXED, chat, method, shots), atol=2e-4, rtol=1e-4
    )


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(("method", "shots"), [("letter", 0), ("text", 0), ("letter", 3), ("text", 1), ("text", 2)])
def test_batches_and_shared_examples_do_not_change_log_probs(model, tokenizer, method, shots, chat):
    texts = [(f"{question} {'.' * i}", options) for i in range(6) for question, options in MIXED]
    texts += [(f"{question} {'long ' * (30 + i)}", options) for i in range(2) for question, options in MIXED]
    prompts = list(
        build_prompts(make_exam(texts), tokenizer, PromptConfig(method, shots, 1, chat), 420 if chat else 340)
    )
    assert shots != 3 or len({one.num_shots for one in prompts}) > 1, "the examples fit only some questions"
    alone = option_log_probs(model, tokenizer, prompts, method, 1)
    for batch_tokens in (300, 4096):
        torch.testing.assert_close(
            option_log_probs(model, tokenizer, prompts, method, batch_tokens), alone, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("method", ["letter", "text"])
@pytest.mark.parametrize("shots", [0, 2])
def test_numbers_of_options_may_differ(model, transformers_model, tokenizer, method, shots):
    texts = [(f"what {i}?", ("x", "yy", "z z", "four", "five")[:count]) for i, count in enumerate((2, 5, 3, 2, 4, 5))]
    prompts = list(build_prompts(make_exam(texts), tokenizer, PromptConfig(method, shots), 512))
    score(model, tokenizer, prompts, method)
    for one, (_, options) in zip(prompts, texts, strict=True):
        assert len(one.log_probs) == len(options) == len(one.options)
        assert ("E. five" in tokenizer.decode(one.prompt)) == (method == "letter" and len(options) == 5)
        start = one.prompt
        for found, continuation, text in zip(one.log_probs, one.options, options, strict=True):
            with torch.no_grad():
                logs = transformers_model(torch.tensor([start + continuation])).logits[0].log_softmax(-1)
            total = sum(logs[len(start) + i - 1, token].item() for i, token in enumerate(continuation))
            assert found == pytest.approx(total / (len(text) if method == "text" else 1), abs=2e-4)
            assert tokenizer.decode(continuation).strip() == (
                text if method == "text" else "ABCDE"[options.index(text)]
            )


def test_cache_size_is_limited(model, tokenizer, monkeypatch):
    texts = [(f"{question} {'.' * i}", options) for i in range(6) for question, options in MIXED]
    prompts = list(build_prompts(make_exam(texts), tokenizer, PromptConfig("text", 1), 340))
    alone, positions = option_log_probs(model, tokenizer, prompts, "text", 1), []
    original_init = exam_logprobs.KVCache.__init__

    def recording_init(self, config, batch, max_len, *rest):
        positions.append(batch * max_len)
        original_init(self, config, batch, max_len, *rest)

    monkeypatch.setattr(exam_logprobs.KVCache, "__init__", recording_init)
    option_log_probs(model, tokenizer, prompts, "text")
    assert max(positions) > 3 * 512
    token = 4 * model.config.n_layers * model.config.n_kv_heads * model.config.head_dim  # bytes per token in a cache
    monkeypatch.setattr(exam_logprobs, "MAX_CACHE_BYTES", 3 * 512 * token)
    positions.clear()
    torch.testing.assert_close(option_log_probs(model, tokenizer, prompts, "text"), alone, atol=1e-5, rtol=1e-5)
    assert max(positions) <= 3 * 512


def test_option_orders_are_undone_in_log_probs(model, tokenizer):
    prompts = list(build_prompts(make_exam(MIXED[2:3]), tokenizer, PromptConfig(orders=4), 256))
    texts = [tokenizer.decode(one.prompt) for one in prompts]
    assert "A. 一\nB. 二二" in texts[0] and "A. 二二\nB. 三三三\nC. 四\nD. 一" in texts[1]
    found = option_log_probs(model, tokenizer, prompts, "letter")
    rotated = make_exam([(MIXED[2][0], ("二二", "三三三", "四", "一"))])
    plain = option_log_probs(model, tokenizer, list(build_prompts(rotated, tokenizer, PromptConfig(), 256)), "letter")
    torch.testing.assert_close(found[1][[1, 2, 3, 0]], plain[0])


def test_truncation_drops_examples_before_question_start(tokenizer):
    def only(texts, config, limit):
        (one,) = build_prompts(make_exam(texts), tokenizer, config, limit)
        assert len(one.prompt) + one.continuation_length <= limit
        return one, tokenizer.decode(one.prompt)

    whole, text = only(MIXED[:1], PromptConfig(shots=3), 500)
    assert whole.num_shots == 3 and text.startswith("example 0?\nA. a") and "Answer: A\n\nexample 1?" in text
    fewer, text = only(MIXED[:1], PromptConfig(shots=3), len(whole.prompt) - 1)
    assert (fewer.num_shots, fewer.is_truncated) == (2, False) and text.startswith("example 1?"), "drops the first"
    for chat in (False, True):
        long = [("long " * 60 + "end?", ("1", "2", "3", "4"))]
        one, text = only(long, PromptConfig(shots=3, is_chat=chat), 150)
        assert one.num_shots == 0 and one.is_truncated and "end?\nA. 1\nB. 2" in text and "long long" in text
        assert text.endswith("<|im_start|>assistant\n" if chat else "\nAnswer:")
        assert text.startswith("<|im_start|>user\n") == chat
    _, text = only([("长" * 100, ("1", "2", "3", "4"))], PromptConfig(is_chat=True), 130)
    assert "\ufffd" not in text, "no incomplete character at the cut"
    with pytest.raises(UserError, match="val:0: the options do not fit"):
        only([("q", ("1", "2", "3", "x" * 200))], PromptConfig("text", is_chat=True), 100)


def test_prompt_language_is_that_of_the_subject(tokenizer):
    items = [
        ExamItem("s", str(i), q, ("1", "2", "3", "4"), "A", f"v:{i}")
        for i, q in enumerate(("中文问题", "int main() {}"))
    ]
    prompts = build_prompts(ExamSplit("val", items, {}, {"s": "Other"}), tokenizer, PromptConfig(), 256)
    assert all(tokenizer.decode(one.prompt).endswith("答案：") for one in prompts), "code in a Chinese exam"


def test_too_few_examples_is_an_error(tokenizer):
    with pytest.raises(UserError, match="--shots 5: en has 3 examples in dev"):
        list(build_prompts(make_exam(MIXED), tokenizer, PromptConfig(shots=5), 256))


def test_long_prompts_and_long_options_do_not_exceed_the_context(model, tokenizer):
    texts = [("q" * 200 + "?", ("1", "22", "3", "4")), ("short?", ("1", "2", "3", "y" * 180))]
    prompts = list(build_prompts(make_exam(texts), tokenizer, PromptConfig("text"), 256))
    batched = option_log_probs(model, tokenizer, prompts, "text")
    torch.testing.assert_close(batched, option_log_probs(model, tokenizer, prompts, "text", 1), atol=1e-5, rtol=1e-5)


def test_nan_model_is_an_error(model, tokenizer):
    broken = Transformer(model.config)
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    prompts = list(build_prompts(make_exam(MIXED), tokenizer, PromptConfig(), 256))
    with pytest.raises(UserError, match="the log-probabilities are not finite"):
        option_log_probs(broken, tokenizer, prompts, "letter")
