"""--gguf: a GGUF file that llama.cpp runs as the same model.

Promises: the file has the sizes, RoPE scaling, tensors and tokenizer of the model, with rows of q and k in the order of
each architecture's RoPE; llama.cpp gives equal ids for any text, equal logits and an equal greedy answer, in every
quantization and architecture; the chat template gives the ids of training; a model or tokenizer that llama.cpp does not
support is rejected by name; the Modelfile lists the stop strings.
"""

import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.tokenizer_training import train_tokenizer
from export.gguf_export import check_supported, go_template, interleave, modelfile, write_gguf
from export.gguf_tokenizer import piece_across_cut, pre_tokenizer_name
from export.verify_gguf import check_gguf
from model.chat_template import CHAT_FORMATS
from model.checkpoint import save_model
from model.config import ModelConfig
from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, ChatTokenizer, tokenizer_files
from tests.export.test_hf_export import CASES, LINEAGE, random_model
from tests.export.test_hf_import import make_tokenizer
from tests.helpers import run_script

LENGTHS = {"factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", **LENGTHS}
LLAMA3 = {"rope_type": "llama3", **LENGTHS, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = CASES | {
    "llama-wide": {"head_dim": 32},
    "qwen2": {"qkv_bias": True},
    "qwen2-wide": {"qkv_bias": True, "head_dim": 32},
    "qwen2-llama3": {"qkv_bias": True, "rope_scaling": LLAMA3},
    "qwen3-wide": {"qk_norm": True, "head_dim": 32},
    "qwen3moe": {"use_moe": True, "qk_norm": True, "n_shared_experts": 0, "head_dim": 32},
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama-llama3": {"rope_scaling": LLAMA3},
    "llama-yarn": {"rope_scaling": YARN},
    "qwen3-yarn": {"qk_norm": True, "rope_scaling": {**YARN, "attention_factor": 1.3}},
    "llama-yarn-mscale": {"rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.6}},
    "moe-llama3": {"use_moe": True, "rope_scaling": LLAMA3},
}
ARCHITECTURE = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3moe", "moe": "granitemoe"}
FACTS = {"stage": "full_sft", "size": "32"}
TEXT = ["the sun and the moon and the river, of the sea < the sky\n 太阳和月亮，还有星星。太阳很大，月亮很小。\n"] * 40


def chat_tokenizer(algorithm="bpe", chat_format="chatml"):
    backend = train_tokenizer(algorithm, TEXT, 400, [*SPECIAL_TOKENS, *SPARE_TOKENS])
    return ChatTokenizer(tokenizer_files(backend, chat_format))


@pytest.fixture(scope="module")
def chats():
    return chat_tokenizer()


def edit_bpe(chats, change):
    """The tokenizer after change(vocab, merges) of its BPE."""
    content = json.loads(chats.files["tokenizer.json"])
    change(content["model"]["vocab"], content["model"]["merges"])
    return ChatTokenizer({**chats.files, "tokenizer.json": json.dumps(content)})


def tiny_model(chats, **changes):
    size = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 128}
    return random_model(ModelConfig(chats.vocab_size + 5, **{**size, **changes}))


def test_interleave_makes_the_halves_of_a_head_neighbours():
    matrix = torch.arange(8.0)[:, None].expand(8, 2)  # two heads of four rows
    assert interleave(matrix, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert interleave(matrix, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("case", CASES)
def test_gguf_file_holds_sizes_tensors_and_tokenizer_of_the_model(case, chats, tmp_path):
    import gguf

    model, path = tiny_model(chats, **CASES[case]), tmp_path / "m.gguf"
    write_gguf(path, model, chats, "f32", FACTS)
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    kind = values["general.architecture"]
    assert kind == ("llama" if case in ("qwen2-wide", "qwen2-llama3") else ARCHITECTURE[case.split("-")[0]])
    config = model.config
    assert values[f"{kind}.embedding_length"] == config.dim and values[f"{kind}.context_length"] == config.max_seq_len
    assert values[f"{kind}.rope.freq_base"] == config.rope_theta
    assert values[f"{kind}.attention.key_length"] == values[f"{kind}.attention.value_length"] == config.head_dim
    scaling = config.rope_scaling.get("rope_type")
    assert values.get(f"{kind}.rope.scaling.type") == (scaling if scaling in ("linear", "yarn") else None)
    assert values.get(f"{kind}.rope.scaling.factor") == (4.0 if scaling in ("linear", "yarn") else None)
    if scaling == "yarn":
        assert values[f"{kind}.rope.scaling.original_context_length"] == 32
    assert values[f"{kind}.attention.layer_norm_rms_epsilon"] == pytest.approx(config.norm_eps)
    assert values["tokenizer.ggml.tokens"][: len(SPECIAL_TOKENS)] == SPECIAL_TOKENS
    assert len(values["tokenizer.ggml.tokens"]) == config.vocab_size
    assert values["tokenizer.ggml.eos_token_id"] == chats.eos_id
    assert values["tokenizer.ggml.eot_token_id"] == chats.im_end_id
    assert values["tokenizer.chat_template"] == chats.format.template and not values["tokenizer.ggml.add_bos_token"]
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert ("output.weight" in tensors) != config.tie_embeddings
    q = model.model.layers[1].self_attn.q_proj.weight.detach()
    keeps_row_order = kind in ("qwen2", "qwen3", "qwen3moe")
    assert np.array_equal(
        tensors["blk.1.attn_q.weight"], (q if keeps_row_order else interleave(q, config.n_heads)).numpy()
    )
    assert ("blk.1.attn_k.bias" in tensors) == config.qkv_bias and "blk.1.attn_output.bias" not in tensors
    if config.qkv_bias:
        k = model.model.layers[1].self_attn.k_proj.bias.detach()
        k = k if keeps_row_order else interleave(k, config.n_kv_heads)
        assert np.array_equal(tensors["blk.1.attn_k.bias"], k.numpy())
    assert ("rope_freqs.weight" in tensors) == (scaling == "llama3")
    if scaling == "llama3":
        factors = tensors["rope_freqs.weight"]
        assert factors.shape == (config.head_dim // 2,) and factors[0] == 1 and factors[-1] == pytest.approx(4)
    if config.use_moe:
        up = torch.stack([expert.up_proj.weight for expert in model.model.layers[0].mlp.experts])
        assert np.array_equal(tensors["blk.0.ffn_up_exps.weight"], up.detach().numpy())
    weight = dict(model.named_parameters())["model.layers.0.self_attn.k_proj.weight"]
    with torch.no_grad():
        weight[0, 0] += 1
    with pytest.raises(UserError, match="attn_k"):
        check_gguf(path, model, chats, "f32")


# ---- run in llama.cpp ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which a fresh machine must compile")


FORMATS = [(case, number) for case in CASES for number in ("f32", "q8_0")[: 1 if "-" in case else 2]]
FORMATS += [("llama", "f16"), ("llama", "bf16")]


@pytest.mark.parametrize(("case", "number"), FORMATS)
def test_llama_cpp_gives_equal_tokens_logits_and_answer(llama_cpp, case, number, chats, tmp_path):
    """check_gguf raises if tokens, logits or the answer differ; the next test checks that it does."""
    model, path = tiny_model(chats, **CASES[case]), tmp_path / "m.gguf"
    write_gguf(path, model, chats, number, FACTS)
    message = check_gguf(path, model, chats, number)
    assert "in llama.cpp: equal tokens" in message
    assert number != "f32" or "64 greedy tokens equal" in message


def test_check_gguf_finds_wrong_rows_and_missing_merges(llama_cpp, chats, tmp_path, monkeypatch):
    model, path = tiny_model(chats), tmp_path / "m.gguf"
    with monkeypatch.context() as patch:
        patch.setattr("export.gguf_export.interleave", lambda matrix, heads: matrix)
        write_gguf(path, model, chats, "f32", FACTS)
        with pytest.raises(UserError, match="logits differ"):
            check_gguf(path, model, chats, "f32")
    write_gguf(path, model, edit_bpe(chats, lambda vocab, merges: merges.__delitem__(slice(20, None))), "f32", FACTS)
    with pytest.raises(UserError, match="other tokens"):
        check_gguf(path, model, chats, "f32")


@pytest.fixture(scope="module")
def llama_model(llama_cpp, chats, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, tiny_model(chats), chats, "f32", FACTS)
    return llama_cpp.Llama(str(path), n_ctx=128, vocab_only=True, verbose=False)


PIECES = st.sampled_from(["the sun", " of the", "太阳", "，还有", "<", "<|im_end|>", "\n", "\r\n", "  ", "12345", "①②"])
ANY_TEXT = st.lists(PIECES | st.text(st.characters(exclude_categories=("Cs",)), max_size=8), max_size=12).map("".join)


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_gives_the_same_tokens(llama_model, chats, text):
    text = text.replace("\0", "")  # a C string ends at \0
    assert llama_model.tokenize(text.encode(), add_bos=False, special=False) == chats.encode(text)


# ---- rejected by name ------------------------------------------------------------------------------------------------
def test_unsupported_tokenizers_are_rejected(tokenizer, tmp_path):
    for other, message in ((chat_tokenizer("unigram"), "no byte fallback"), (tokenizer, "no pre-tokenizer")):
        with pytest.raises(UserError, match=message):
            pre_tokenizer_name(other)
    make_tokenizer(tmp_path)
    from model.tokenizer import load_tokenizer

    assert pre_tokenizer_name(load_tokenizer(tmp_path)) == "gpt-2"  # ByteLevel with its own pattern


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", **LENGTHS}}, "dynamic"),
        ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
        ({"rope_scaling": {**YARN, "beta_fast": 16}}, "beta_fast"),
        ({"rope_scaling": LLAMA3, "qk_norm": True}, "llama3 RoPE scaling in the architecture qwen3"),
    ],
)
def test_unsupported_rope_scaling_is_rejected(changes, message, chats, tmp_path):
    model = tiny_model(chats, **changes)
    for call in (
        lambda: check_supported(model.config, chats),
        lambda: write_gguf(tmp_path / "m.gguf", model, chats, "f32", FACTS),
    ):
        with pytest.raises(UserError, match=f"--gguf: llama.cpp does not compute .*{message}"):
            call()
    assert not (tmp_path / "m.gguf").exists()


def test_a_piece_across_a_pre_tokenizer_split_is_rejected(chats):
    assert piece_across_cut(chats) == ""

    def add_piece(vocab, merges):
        vocab["a<"] = len(vocab)
        merges.append(["a", "<"])

    with pytest.raises(UserError, match="crosses"):
        pre_tokenizer_name(edit_bpe(chats, add_piece))


def test_unsupported_exports_are_rejected_before_any_work(monkeypatch, tokenizer, chats, tmp_path):
    def save_checkpoint(tokenizer):
        model = random_model(ModelConfig(tokenizer.vocab_size, 32, 1, 2, 2, max_seq_len=64))
        save_model(tmp_path / "full_sft_32.pth", model, "full_sft", tokenizer, LINEAGE)
        return tmp_path / "full_sft_32.pth"

    with pytest.raises(UserError, match="no pre-tokenizer"):
        run_script(monkeypatch, "export_model.py", save_checkpoint(tokenizer), tmp_path / "a", "--gguf", "f16")
    run_script(monkeypatch, "export_model.py", save_checkpoint(chats), tmp_path / "a", "--gguf", "q8_0")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names >= {"full_sft_32-q8_0.gguf", "Modelfile", "config.json", "README.md"}
    assert "FROM ./full_sft_32-q8_0.gguf\n" in (tmp_path / "a" / "Modelfile").read_text(encoding="utf-8")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match='pip install "gguf'):
        run_script(monkeypatch, "export_model.py", save_checkpoint(chats), tmp_path / "b", "--gguf", "f16")
    assert not (tmp_path / "b").exists()


def test_without_llama_cpp_the_install_command_is_printed(monkeypatch, chats, tmp_path):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    write_gguf(tmp_path / "m.gguf", tiny_model(chats), chats, "f16", FACTS)
    assert "pip install llama-cpp-python" in check_gguf(tmp_path / "m.gguf", tiny_model(chats), chats, "f16")


# ---- Ollama ----------------------------------------------------------------------------------------------------------
def test_modelfile_names_template_stops_and_context(chats):
    text = modelfile("m.gguf", chats, ModelConfig(chats.vocab_size, max_seq_len=300))
    assert text.splitlines()[1:] == [
        "FROM ./m.gguf",
        'TEMPLATE """{{ range .Messages }}<|im_start|>{{ .Role }}',
        "{{ .Content }}<|im_end|>",
        "{{ end }}<|im_start|>assistant",
        '"""',
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "<|endoftext|>"',
        "PARAMETER num_ctx 300",
        "PARAMETER temperature 0.7",
        "PARAMETER top_p 0.9",
    ]


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_go_templates_write_the_format(name, chats):
    """The test renders them by substitution; these templates use no other feature of Go."""
    import re

    chat = chats.with_chat_format(name).format
    messages = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    pattern = r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*?)"
    start, body, end = re.fullmatch(pattern, go_template(chat), re.S).groups()
    text = start
    for role, content in messages:
        branches = re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', body, re.S)
        turn = dict(branches).get(role, "") if branches else body
        text += turn.replace("{{ .Role }}", role).replace("{{ .Content }}", content)
    assert text + end == chat.text([{"role": r, "content": c} for r, c in messages], True)
