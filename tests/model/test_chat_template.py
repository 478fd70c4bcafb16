"""Chat formats: golden renderings with their loss masks, compared with transformers.

Promises: training and generation use the golden strings below, for one turn and for three; the loss covers the answers
and the end-of-turn token after each; the exported chat template gives the same ids; a marker in a message is never a
control token; tokenizer and checkpoint store the format, and each format has its own token folder.
"""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.tokenizer_training import train_tokenizer
from model.chat_template import CHAT_FORMATS
from model.checkpoint import load_model, save_model
from model.config import ModelConfig
from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, ChatTokenizer, load_tokenizer, save_tokenizer
from model.tokenizer_files import LEGACY_TEMPLATE
from model.transformer import Transformer
from tests.helpers import IGNORE_TOKEN_FOLDERS, force_tokens, load_weights, run_here, run_script
from tests.scripts.test_train_tokenizer import made_up_text
from trainer.datasets import check_data

ONE = [("user", " 你好？"), ("assistant", "Hi.\n")]
THREE = [("system", "Be kind."), *ONE, ("user", "1+1"), ("assistant", " 2"), ("user", "Bye\n"), ("assistant", "再见")]

# Rendered text; [[...]] is trained. The eos of this project's tokenizers is <|endoftext|>.
GOLDEN = {
    ("chatml", "one"): "<|im_start|>user\n 你好？<|im_end|>\n<|im_start|>assistant\n[[Hi.\n<|im_end|>]]\n",
    ("chatml", "three"): "<|im_start|>system\nBe kind.<|im_end|>\n"
    "<|im_start|>user\n 你好？<|im_end|>\n<|im_start|>assistant\n[[Hi.\n<|im_end|>]]\n"
    "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n[[ 2<|im_end|>]]\n"
    "<|im_start|>user\nBye\n<|im_end|>\n<|im_start|>assistant\n[[再见<|im_end|>]]\n",
    ("mindllm", "one"): "<|endoftext|><user>\n你好？\n<assistant>\n[[Hi.\n<|endoftext|>]]",
    ("mindllm", "three"): "<|endoftext|>Be kind.\n"
    "<user>\n你好？\n<assistant>\n[[Hi.\n<|endoftext|>]]"
    "\n<|endoftext|><user>\n1+1\n<assistant>\n[[ 2<|endoftext|>]]"
    "\n<|endoftext|><user>\nBye\n<assistant>\n[[再见<|endoftext|>]]",
    ("belle", "one"): "Human: 你好？ \n\nAssistant:[[Hi.\n<|endoftext|>]]",
    ("belle", "three"): "Be kind.\n\n"
    "Human: 你好？ \n\nAssistant:[[Hi.\n]]"
    "Human: 1+1 \n\nAssistant:[[ 2]]"
    "Human: Bye \n\nAssistant:[[再见<|endoftext|>]]",
    ("text", "one"): " 你好？[[Hi.\n<|endoftext|>]]",
    ("text", "three"): "Be kind.\n 你好？[[Hi.\n<|endoftext|>]]1+1[[ 2<|endoftext|>]]Bye\n[[再见<|endoftext|>]]",
}
PROMPT = {  # ends with the generation prompt
    "chatml": "<|im_start|>user\n 你好？<|im_end|>\n<|im_start|>assistant\n",
    "mindllm": "<|endoftext|><user>\n你好？\n<assistant>\n",
    "belle": "Human: 你好？ \n\nAssistant:",
    "text": " 你好？",
}
STOP = {"chatml": ["<|im_end|>"], "mindllm": [], "belle": [], "text": []}  # in addition to <|endoftext|>


def messages_of(turns):
    return [{"role": role, "content": content} for role, content in turns]


def format_tokens(tokenizer, ids, mask):
    """The text of the ids, trained runs in [[brackets]]."""
    text, start = "", 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or mask[i] != mask[start]:
            part = tokenizer.decode(ids[start:i])
            text += f"[[{part}]]" if mask[start] else part
            start = i
    return text


@pytest.mark.parametrize(("name", "turns"), GOLDEN)
def test_golden_renderings(tokenizer, name, turns):
    formatted = tokenizer.with_chat_format(name)
    ids, mask = formatted.render(messages_of(ONE if turns == "one" else THREE))
    assert format_tokens(formatted, ids, mask) == GOLDEN[name, turns]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_golden_prompts_and_stop_tokens(tokenizer, name):
    formatted = tokenizer.with_chat_format(name)
    ids, mask = formatted.render(messages_of(ONE[:1]), add_generation_prompt=True)
    assert formatted.decode(ids) == PROMPT[name] and not any(mask)
    stops = [formatted.decode([i]) for i in formatted.stop_ids]
    assert sorted(stops) == sorted([*STOP[name], "<|endoftext|>"])
    # Role markers that are ordinary text are stop strings: the model must not generate the next question.
    assert formatted.stop_strings == {"mindllm": ("<user>\n",), "belle": ("Human: ",)}.get(name, ())


def test_prompts_of_the_mindllm_model_card(tokenizer):
    """Prompts equal those of the card, and each is a prefix of the trained chat."""
    formatted = tokenizer.with_chat_format("mindllm")
    asked = {
        "<|endoftext|><user>\n你知道电动车相对传统汽油车有哪些优点吗?\n<assistant>\n": [
            ("user", "你知道电动车相对传统汽油车有哪些优点吗?")
        ],
        "<|endoftext|><user>\n你好,请问你叫什么名字?\n<assistant>\n嗨,我是一个AI助手。<|endoftext|>\n"
        "<|endoftext|><user>\n请问你如何看待AI助手?\n<assistant>\n": [
            ("user", "你好,请问你叫什么名字?"),
            ("assistant", "嗨,我是一个AI助手。"),
            ("user", "请问你如何看待AI助手?"),
        ],
    }
    for text, turns in asked.items():
        ids, _ = formatted.render(messages_of(turns), add_generation_prompt=True)
        assert formatted.decode(ids) == text
        trained, _ = formatted.render(messages_of([*turns, ("assistant", "好。")]))
        assert trained[: len(ids)] == ids


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_generation_prompt_is_a_prefix_of_the_trained_chat(tokenizer, name):
    formatted = tokenizer.with_chat_format(name)
    whole, mask = formatted.render(messages_of(THREE))
    for end in (2, 4, 6):  # after each question
        prompt, _ = formatted.render(messages_of(THREE[:end]), add_generation_prompt=True)
        assert whole[: len(prompt)] == prompt and mask[len(prompt)] == 1 and mask[len(prompt) - 1] == 0


def test_belle_joins_turns_by_concatenation_alone(tokenizer):
    formatted = tokenizer.with_chat_format("belle")
    ids, _ = formatted.render(messages_of(THREE[1:]), add_generation_prompt=True)
    assert (
        formatted.decode(ids)
        == "Human: 你好？ \n\nAssistant:Hi.\nHuman: 1+1 \n\nAssistant: 2Human: Bye \n\nAssistant:再见Assistant:"
    )


def test_chatml_has_other_roles(tokenizer):
    chat = messages_of([("critic", "No.")])
    ids, mask = tokenizer.render(chat)
    assert tokenizer.decode(ids) == "<|im_start|>critic\nNo.<|im_end|>\n"
    assert not any(mask)
    for name, roles in (("belle", chat), ("chatml", messages_of([("a\n<|im_end|>", "x")]))):
        with pytest.raises(UserError, match="role"):
            tokenizer.with_chat_format(name).render(roles)


# ---- agreement with transformers -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tokenizer_pairs(tmp_path_factory):
    """(ChatTokenizer, transformers' tokenizer) for each format and tokenizer algorithm."""
    from transformers import AutoTokenizer

    texts = made_up_text("zh", 150) + [text + ' Assistant:"ba" Assistant: The' for text in made_up_text("en", 150)]
    pairs = []
    for algorithm in ("bpe", "unigram"):
        backend = train_tokenizer(algorithm, texts, 800, [*SPECIAL_TOKENS, *SPARE_TOKENS])
        for name in CHAT_FORMATS:
            folder = tmp_path_factory.mktemp(f"{algorithm}-{name}")
            pairs.append((save_tokenizer(backend, folder, name), AutoTokenizer.from_pretrained(folder)))
    return pairs


_HARD = ["<|im_end|>", "<|endoftext|>", "<|spare_3|>", "<user>\n", "<assistant>", "Human: ", "\n\nAssistant:", "'",
         '"', "[[",
         "{{ x }}", "{% if %}", "\\n", "\r\n", "\n", " ",
         "👩‍👩‍👧", "e\u0301", "\ue000", "的，", " the", "3.14"]  # fmt: skip
_TEXT = st.lists(st.sampled_from(_HARD) | st.text(st.characters(exclude_categories=("Cs",)), max_size=8), max_size=6)
_CHAT = st.lists(_TEXT.map("".join), min_size=1, max_size=6)


def chat_of(contents, system):
    start = [("system", contents[0])] if system else []
    roles = ("user", "assistant") * 3
    return messages_of([*start, *zip(roles, contents[system:], strict=False)])


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=_CHAT, system=st.booleans(), prompt=st.booleans())
def test_transformers_renders_the_same(tokenizer_pairs, contents, system, prompt):
    chat = chat_of(contents, system)
    for ours, theirs in tokenizer_pairs:
        ids, mask = ours.render(chat, add_generation_prompt=prompt)
        assert len(ids) == len(mask)
        text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        assert ours.decode(ids) == text
        if not any(marker in content for marker in _HARD[:3] for content in contents):
            again = theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=True, return_dict=False)
            assert list(again) == ids, ours.format_name


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=_CHAT, system=st.booleans())
def test_mask_covers_exactly_the_answers(tokenizer_pairs, contents, system):
    """The loss covers answers and their end-of-turn tokens only; markers in messages are not control tokens."""
    chat = chat_of(contents, system)
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    for tokenizer, _ in tokenizer_pairs:
        ids, mask = tokenizer.render(chat)
        trained = [i for i, m in zip(ids, mask, strict=True) if m]
        closed = [i for i, id_ in enumerate(trained) if id_ == tokenizer.end_of_turn_id]
        if tokenizer.format_name == "belle":  # only the last answer ends with eos
            assert closed == [len(trained) - 1] * (chat[-1]["role"] == "assistant")
            continue
        assert len(closed) == len(answers) and closed[-1:] == [len(trained) - 1] * bool(answers)
        for answer, start, end in zip(answers, [-1, *closed], closed, strict=False):
            learnt = tokenizer.decode(trained[start + 1 : end])
            if tokenizer.format_name in ("chatml", "mindllm"):  # after a newline: no token crosses the boundary
                assert learnt == answer
            else:
                assert answer.endswith(learnt.lstrip("\ufffd"))
        control = sum(i in tokenizer.special_ids for i in ids)
        alone, _ = tokenizer.render([{**message, "content": "x"} for message in chat])
        assert control == sum(i in tokenizer.special_ids for i in alone)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(several=st.lists(_CHAT, min_size=1, max_size=5), prompt=st.booleans())
def test_render_each_equals_rendering_each_chat(tokenizer_pairs, several, prompt):
    """The mask, found by binary search, equals a test of every token: does it begin in an answer?"""
    chats = [chat_of(contents, False) for contents in several]
    for tokenizer, _ in tokenizer_pairs:
        batch = [rendered.samples[-1] for rendered in tokenizer.render_each(chats, prompt)]
        assert [(ids, mask) for ids, mask, _ in batch] == [tokenizer.render(chat, prompt) for chat in chats]
        for chat, (_, mask, _) in zip(chats, batch, strict=True):
            (((_, answers, _), parts),), _ = tokenizer.renderer._sample_texts(chat, prompt)
            starts, place = [], 0
            for part in parts:
                encoding = tokenizer.renderer.backend.encode(part, add_special_tokens=False)
                starts += [place + start for start, _ in encoding.offsets]
                place += len(part) + 1
            assert mask == [int(any(first <= start < end for first, end in answers)) for start in starts]


def test_each_answer_is_one_run_of_ones(tokenizer_pairs):
    """Even if a token spans question and answer, which is possible in a format without roles."""
    texts = ("他们", "我", "我", "们在", "?", "的")
    for tokenizer, _ in tokenizer_pairs:
        _, mask = tokenizer.render(messages_of(zip(("user", "assistant") * 3, texts, strict=True)))
        assert len("".join(map(str, mask)).replace("0", " ").split()) == 3


# ---- saved formats ---------------------------------------------------------------------------------------------------
def test_chat_format_is_saved_with_the_tokenizer(tokenizer, tmp_path):
    belle = tokenizer.with_chat_format("belle")
    belle.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.format_name == "belle" and again.files == belle.files
    assert json.loads(again.files["tokenizer_config.json"])["chat_format"] == "belle"
    assert again.with_chat_format("chatml").files == tokenizer.files == again.with_chat_format("chatml").files
    assert tokenizer.with_chat_format(None) is tokenizer and ChatTokenizer(tokenizer.files).format_name == "chatml"


def test_rendering_fingerprint_names_the_format(tokenizer):
    """fingerprint identifies the vocabulary, rendering_fingerprint also the format; both are equal for chatml."""
    formats = [tokenizer.with_chat_format(name) for name in CHAT_FORMATS]
    assert {one.fingerprint for one in formats} == {tokenizer.fingerprint}
    assert len({one.rendering_fingerprint for one in formats}) == len(CHAT_FORMATS)
    assert tokenizer.rendering_fingerprint == tokenizer.fingerprint


def test_tokenizers_with_the_legacy_template_are_chatml(tokenizer):
    config = json.loads(tokenizer.files["tokenizer_config.json"])
    del config["chat_format"]
    config["chat_template"] = LEGACY_TEMPLATE
    old = ChatTokenizer({**tokenizer.files, "tokenizer_config.json": json.dumps(config)})
    assert old.format_name == "chatml" and old.rendering_fingerprint == tokenizer.fingerprint


def test_tokenizers_of_an_earlier_revision_get_a_new_fingerprint(tokenizer, tmp_path):
    """They open with the template of this version, and their token folders are rebuilt."""
    for name in ("mindllm", "belle"):
        now = tokenizer.with_chat_format(name)
        config = {**json.loads(now.files["tokenizer_config.json"]), "chat_template": "{{ 'as it was' }}"}
        files = {**now.files, "tokenizer_config.json": json.dumps(config)}
        for old in (files, {**files, "chat_template.jinja": "{{ 'as it was' }}"}):
            opened = ChatTokenizer(old)
            assert opened.files == now.files and opened.render(messages_of(THREE)) == now.render(messages_of(THREE))
            assert opened.rendering_fingerprint == now.rendering_fingerprint != f"{tokenizer.fingerprint}-{name}"
    assert tokenizer.with_chat_format("text").rendering_fingerprint == f"{tokenizer.fingerprint}-text"


def test_unknown_chat_formats_raise(tokenizer):
    config = {**json.loads(tokenizer.files["tokenizer_config.json"]), "chat_format": "alpaca"}
    with pytest.raises(UserError, match="alpaca"):
        ChatTokenizer({**tokenizer.files, "tokenizer_config.json": json.dumps(config)})
    with pytest.raises(UserError, match=r"alpaca.*chatml"):
        tokenizer.with_chat_format("alpaca")


def test_train_tokenizer_takes_a_format(tmp_path, monkeypatch, capsys):
    (tmp_path / "notes.txt").write_text("\n\n".join(made_up_text("en", 60)), encoding="utf-8")
    flags = ["--vocab_size", 400, "--out_dir", tmp_path / "tok", "--chat_format", "mindllm"]
    done = run_here(monkeypatch, capsys, "train_tokenizer.py", tmp_path / "notes.txt", *flags)
    assert done.returncode == 0, done.stderr
    assert "mindllm" in done.stdout and load_tokenizer(tmp_path / "tok").format_name == "mindllm"


SHORT = ["--device", "cpu", "--dtype", "float32", "--batch_size", "8", "--max_steps", "2"]


def test_sft_takes_a_format_and_evaluation_follows(monkeypatch, capsys, tiny_parent, sft_dir, tmp_path):
    """Each format has its own token folder for the same chats; evaluation uses the format of the checkpoint."""
    chats = shutil.copytree(sft_dir, tmp_path / "sft", ignore=IGNORE_TOKEN_FOLDERS)
    for name in ("belle", None):
        flags = ["--chat_format", name] if name else []
        out = tmp_path / (name or "same")
        run_script(monkeypatch, "3-full_sft.py", *SHORT, "--data_path", chats, "--init_from", tiny_parent,
                   "--out_dir", out, *flags)  # fmt: skip
    parent = torch.load(tiny_parent, weights_only=True)["tokenizer"]
    assert len(list(chats.glob("tokens-*"))) == 2 == len(list(chats.glob(f"tokens-{parent['fingerprint']}*")))
    _, belle, checkpoint = load_model(tmp_path / "belle" / "full_sft_32.pth")
    assert belle.format_name == "belle" and checkpoint["tokenizer"]["fingerprint"] == parent["fingerprint"]
    assert torch.load(tmp_path / "same" / "full_sft_32.pth", weights_only=True)["tokenizer"] == parent
    assert load_weights(tmp_path / "belle" / "full_sft_32.pth").keys() == load_weights(tiny_parent).keys()
    with pytest.raises(UserError, match=f"made with tokenizer {belle.fingerprint}-belle"):
        check_data(str(chats / f"tokens-{belle.rendering_fingerprint}"), "chats", belle.with_chat_format("text"))
    capsys.readouterr()
    run_script(monkeypatch, "2-eval.py", "--checkpoint", tmp_path / "belle" / "full_sft_32.pth", "--prompt", "1?",
               "--max_new_tokens", 3)  # fmt: skip
    assert "> 1?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [("chatml", ["\nA巴", "<|im_end|>"]), ("belle", [":A巴", "<|endoftext|>"]), ("mindllm", ["\nA巴<user>\n"])],
)
def test_stop_tokens_and_stop_strings_end_an_answer(tokenizer, name, says, monkeypatch, tmp_path):
    """The end-of-turn token, or a plain-text beginning of the next turn, ends the answer and is not part of it."""
    formatted = tokenizer.with_chat_format(name)
    chain = [*tokenizer.encode(says[0]), *(tokenizer.backend.token_to_id(token) for token in says[1:])]
    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 64, 1, 2, 2, max_seq_len=96, tie_embeddings=False))
    force_tokens(model, chain, logit_scale=1)
    save_model(tmp_path / "full_sft_64.pth", model, "full_sft", formatted, [{"stage": "full_sft"}])
    run_script(monkeypatch, "2-eval.py", "--out_dir", tmp_path, "--prompt", "你好", "--temperature", 0,
               "--sampling_preset", "none", "--json", tmp_path / "a.json")  # fmt: skip
    answers = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["answers"]
    assert answers == [{"prompt": "你好", "answer": "A巴", "finish_reason": "stop"}]


def test_chat_formats_have_the_sampling_of_their_model_card(tokenizer):
    """The default frequency penalty is no part of a model card: the presets turn it off."""
    belle = {"top_k": 30, "top_p": 0.85, "temperature": 0.35, "repetition_penalty": 1.2, "frequency_penalty": 0}
    mindllm = {"num_beams": 4, "no_repeat_ngram_size": 5, "frequency_penalty": 0}
    assert tokenizer.with_chat_format("belle").format.sampling == belle
    assert tokenizer.with_chat_format("mindllm").format.sampling == mindllm
    assert tokenizer.format.sampling == tokenizer.with_chat_format("text").format.sampling == {}
