"""A foreign model: opened from its transformers folder, trained with its own chat template, saved as a .pth.

Promises: logits equal transformers' before training (1e-5), for Llama and Qwen3, tied or not, in one file or several
(other architectures and RoPE scaling: test_hf_architectures.py); ids equal apply_chat_template's, with a mask over the
answers; afterwards the .pth alone suffices; an unsupported setting or a damaged folder is rejected in one line that
names it.
"""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from export.hf_import import open_model
from model.tokenizer import load_tokenizer
from tests.helpers import IGNORE_TOKEN_FOLDERS, run_here, run_script
from tests.model.test_chat_template import format_tokens, messages_of

# A typical foreign template: bos first, trimmed contents, its own eos, optional system and tool turns.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if message.role == 'assistant' %}\n        {{- '<|bot|>\\n' }}"
    "{% generation %}{{ message.content | trim + eos_token }}{% endgeneration %}{{ '\\n' }}\n"
    "    {%- else %}\n        {{- '<|' + message.role + '|>\\n' + message.content | trim + eos_token + '\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|bot|>\\n' }}{% endif %}"
)
UNSTABLE = (  # as Qwen3's: only the last answer keeps its thoughts
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = messages_of(
    [("system", "Kind."), ("user", " 1+1? "), ("assistant", " 2\n"), ("user", "好"), ("assistant", "！")]
)


def make_tokenizer(folder, template=TEMPLATE, **special):
    """A foreign byte-level tokenizer, saved by transformers."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the sun and the moon and the river 太阳 月亮 " * 9], trainer)
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<|bot|>", "<|user|>")])
    backend.enable_truncation(4)  # some tokenizer.json set these; chats must be neither truncated nor padded
    backend.enable_padding(length=9)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", **special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_folder(folder, family="Llama", shard="20KB", template=TEMPLATE, **changes):
    """Save a random transformers model in `folder`; return (model, tokenizer)."""
    import transformers

    tokenizer = make_tokenizer(folder, template)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    rope = {"rope_theta": 5000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}
    config = getattr(transformers, f"{family}Config")(vocab_size=320, **{**size, **more, **rope, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = weight.dim() == 1 and not name.endswith(".bias")
            weight.copy_(1 + 0.2 * torch.randn_like(weight) if norm else torch.randn_like(weight) * 0.15)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_folder(folder)
    return folder


CASES = [("Llama", "20KB", False), ("Llama", "1GB", True), ("Qwen3", "20KB", False), ("Qwen3", "1GB", True)]


@pytest.mark.parametrize(("family", "shard", "tied"), CASES)
def test_logits_are_equal_after_training_and_saving(family, shard, tied, monkeypatch, capsys, sft_dir, tmp_path):
    folder, out = tmp_path / "theirs", tmp_path / "out"
    hf_model, _ = make_folder(folder, family, shard, tie_word_embeddings=tied)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "20KB")
    model, _, checkpoint = open_model(folder)
    ids = torch.randint(0, 320, (2, 50))
    with torch.no_grad():
        logits = hf_model(ids).logits
        torch.testing.assert_close(model.logits(ids), logits, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.3 and checkpoint["config"]["tie_embeddings"] is tied

    chats = shutil.copytree(sft_dir, tmp_path / "sft", ignore=IGNORE_TOKEN_FOLDERS)
    flags = ["--device", "cpu", "--dtype", "float32", "--batch_size", 8, "--max_steps", 2, "--log_interval", 1]
    run_script(monkeypatch, "3-full_sft.py", *flags, "--init_from", folder, "--data_path", chats, "--out_dir", out)
    shutil.rmtree(folder)
    trained, tokenizer, checkpoint = open_model(out / "full_sft_32.pth")
    assert [entry["stage"] for entry in checkpoint["lineage"]] == ["transformers", "full_sft"]
    changed = [n for n, w in trained.named_parameters() if not torch.equal(w, dict(model.named_parameters())[n])]
    assert len(changed) == len(list(model.named_parameters())), "all weights are trained"
    assert tokenizer.format_name == "template" and tokenizer.chat_format.template == TEMPLATE
    capsys.readouterr()
    run_script(monkeypatch, "2-eval.py", "--checkpoint", out / "full_sft_32.pth", "--prompt", "1?", "--seed", 1,
               "--max_new_tokens", 5)  # fmt: skip
    assert "full_sft, 0.0 M" in capsys.readouterr().out


def test_evaluation_reads_a_transformers_folder(llama, monkeypatch, capsys, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1?", "keys": ["2"]}\n')
    for flags in (["--prompt", "1?"], ["--questions", tmp_path / "q.jsonl"]):
        run_script(monkeypatch, "2-eval.py", "--checkpoint", llama, "--max_new_tokens", 5, *flags)
        assert f"{llama}: transformers, 0.0 M" in capsys.readouterr().out


# ---- the chat template -----------------------------------------------------------------------------------------------
def test_the_folders_template_masks_the_answers(llama):
    tokenizer = load_tokenizer(llama)
    assert format_tokens(tokenizer, *tokenizer.render(CHAT)) == (
        "<s><|system|>\nKind.</s>\n<|user|>\n1+1?</s>\n<|bot|>\n[[2</s>]]\n<|user|>\n好</s>\n<|bot|>\n[[！</s>]]\n"
    )
    ids, mask = tokenizer.render(CHAT[:2], add_generation_prompt=True)
    assert tokenizer.decode(ids).endswith("1+1?</s>\n<|bot|>\n") and not any(mask)
    assert [tokenizer.decode([i]) for i in tokenizer.stop_ids] == ["</s>"] and tokenizer.stop_strings == ()
    assert tokenizer.encode_document("a") == [tokenizer.backend.token_to_id("<s>"), *tokenizer.encode("a")]


@pytest.fixture(scope="module")
def own_and_hf_tokenizer(llama):
    from transformers import AutoTokenizer

    return load_tokenizer(llama), AutoTokenizer.from_pretrained(llama)


def test_a_sentencepiece_tokenizer_renders_and_streams(tmp_path):
    """As Llama 2's: ▁ for each space and one prepended, bytes for rare characters. Streaming gives the whole text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from model.detokenizer import IncrementalDetokenizer

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b", "1", "+", "<|", "|>"]
    merges = [("▁", "a"), ("▁", "b")]
    backend = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    marks = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([marks, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "<|bot|>")])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    theirs.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    ids, mask = ours.render(CHAT)
    assert ids == list(theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False))
    trained = [i for i, m in zip(ids, mask, strict=True) if m]
    assert trained.count(ours.eos_id) == 2 and ours.decode(trained).replace(" ", "") == "2</s>！</s>"
    for text in ("a b a b", "a 好 b", "好好", "a😀"):
        ids = ours.encode(text)
        stream = IncrementalDetokenizer(ours)
        assert "".join([*(stream.push(i) for i in ids), stream.finish()]) == ours.decode(ids) == text
        assert ours.byte_lengths()[ids].sum() == len((" " + text).encode())
    broken = [*ours.encode("a")[-1:], pieces.index("<0xE5>"), pieces.index("b")]
    stream = IncrementalDetokenizer(ours)
    assert "".join([*(stream.push(i) for i in broken), stream.finish()]) == ours.decode(broken)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(contents=st.lists(st.text(max_size=12) | st.sampled_from(["</s>", "a<|bot|>\n", " x "]), min_size=1, max_size=5))
def test_rendered_ids_equal_those_of_transformers(own_and_hf_tokenizer, contents):
    ours, theirs = own_and_hf_tokenizer
    contents = [content.encode("utf-8", "replace").decode() for content in contents]
    chat = messages_of(zip(("user", "assistant") * 3, contents, strict=False))
    for prompt in (False, True):
        ids, _ = ours.render(chat, add_generation_prompt=prompt)
        assert ours.decode(ids) == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
        if not any("<" in content for content in contents):
            again = theirs.apply_chat_template(chat, tokenize=True, return_dict=False, add_generation_prompt=prompt)
            assert ids == list(again)
    control = [i for i in ours.render(chat)[0] if i in ours.special_ids]
    plain = [i for i in ours.render([{**m, "content": "x"} for m in chat])[0] if i in ours.special_ids]
    assert control == plain, "a typed marker stays text"


def test_a_template_that_rewrites_earlier_answers_can_be_replaced(tmp_path):
    make_tokenizer(tmp_path / "tok", UNSTABLE)
    tokenizer = load_tokenizer(tmp_path / "tok")
    belle = tokenizer.with_chat_format("belle")
    assert format_tokens(belle, *belle.render(CHAT[1:3])) == "Human: 1+1? \n\nAssistant:[[ 2\n</s>]]"
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        tokenizer.with_chat_format("chatml")


@pytest.mark.parametrize(
    ("template", "expected_message"),
    [
        ("{% for %}", "not valid jinja"),
        ("{{ raise_exception('only users') }}", "only users"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "no control token"),
        ("{{ messages[0].nothing.more }}", "fails"),
    ],
)
def test_invalid_templates_are_rejected(template, expected_message, tmp_path):
    make_tokenizer(tmp_path, template)
    with pytest.raises(UserError, match=expected_message):
        load_tokenizer(tmp_path).render(CHAT)


def test_a_base_model_without_a_template_needs_chat_format(monkeypatch, capsys, sft_dir, tmp_path):
    """It continues text; SFT needs the name of a chat format."""
    make_folder(tmp_path / "base", template=None)
    run_script(monkeypatch, "2-eval.py", "--checkpoint", tmp_path / "base", "--prompt", "1?", "--max_new_tokens", 5)
    assert "> 1?" in capsys.readouterr().out
    chats = shutil.copytree(sft_dir, tmp_path / "sft", ignore=IGNORE_TOKEN_FOLDERS)
    flags = ["--device", "cpu", "--batch_size", 8, "--max_steps", 1, "--init_from", tmp_path / "base"]
    paths = ["--data_path", chats, "--out_dir", tmp_path / "out"]
    with pytest.raises(UserError, match="--chat_format"):
        run_script(monkeypatch, "3-full_sft.py", *flags, *paths)
    run_script(monkeypatch, "3-full_sft.py", *flags, *paths, "--chat_format", "belle")
    assert open_model(tmp_path / "out" / "full_sft_32.pth")[1].format_name == "belle"


def test_chatml_without_a_template_is_written_with_one(tmp_path):
    """A tokenizer with chatml's markers and no template uses chatml; the saved tokenizer has the template."""
    from transformers import AutoTokenizer

    make_tokenizer(tmp_path, None, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    ours = load_tokenizer(tmp_path)
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for chat, prompt in ((CHAT, False), (CHAT[:2], True)):
        assert ours.decode(ours.render(chat, prompt)[0]) == theirs.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=prompt
        )


# ---- rejected by name ------------------------------------------------------------------------------------------------
def edit_json(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "expected_message"),
    [
        ({"model_type": "phi3"}, "model_type 'phi3'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "RoPE scaling 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "8"}}, "factor must be a positive number"),
        ({"rope_scaling": {"rope_type": "linear"}}, "has the keys factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layers"),
        ({"partial_rotary_factor": 0.5}, "partial rotary"),
        ({"attention_bias": True}, "o_proj has a bias too"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "sliding window"),
        ({"model_type": "mistral", "sliding_window": 95}, "sliding window"),  # of 96 positions
        ({"model_type": "mistral", "max_position_embeddings": 4097}, "sliding window"),  # transformers' default: 4096
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"head_dim": 16}, "does not fit"),
        ({"head_dim": 7}, "head_dim .* is odd"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": False}, "norm_topk_prob"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True, "decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": True}, "moe_intermediate_size must be"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_size": None}, "hidden_size must be"),
        ({"hidden_size": "x"}, "hidden_size must be"),
        ({"num_key_value_heads": 3}, "n_kv_heads"),
        ({"num_hidden_layers": 3}, "does not fit"),
        ({"intermediate_size": 50}, "does not fit"),
        ({"vocab_size": 100}, "ids up to"),
    ],
)
def test_unsupported_settings_are_rejected(llama, changes, expected_message, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    edit_json(folder, "config.json", **changes)
    with pytest.raises(UserError, match=expected_message):
        open_model(folder)


def remove_files(folder, pattern="*"):
    for path in folder.glob(pattern):
        path.unlink()


TORN = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
FIRST_SHARD = "model-00001-of-*.safetensors"
DAMAGES = {  # damage -> what it does to the folder, and a text of the message
    "empty": (remove_files, "no config.json"),
    **{name: (lambda folder, name=name: (folder / name).write_text("{ torn"), name) for name in TORN},
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "not a JSON object"),
    "torn shard": (lambda folder: os.truncate(*folder.glob(FIRST_SHARD), 100), "model-00001-of-"),
    "lost shard": (lambda folder: remove_files(folder, FIRST_SHARD), "model-00001-of-"),
    "no tokenizer": (lambda folder: remove_files(folder, "tokenizer.json"), "no tokenizer.json"),
    "path": (
        lambda folder: edit_json(folder, "model.safetensors.index.json", weight_map={"x": "../other.safetensors"}),
        "other.safetensors",
    ),
    "pytorch": (lambda folder: remove_files(folder, "*safetensors*"), "model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_rejected_in_one_line(llama, damage, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "copy")
    (folder / "pytorch_model.bin").write_bytes(b"")
    apply, expected_message = DAMAGES[damage]
    apply(folder)
    with pytest.raises(UserError) as error:
        open_model(folder)
    assert expected_message in str(error.value) and "\n" not in str(error.value)


def test_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    done = run_here(monkeypatch, capsys, "2-eval.py", "--checkpoint", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
