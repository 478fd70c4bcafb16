"""--gguf for SentencePiece tokenizers: llama.cpp's `llama` tokenizer.

Promises: for a model trained by sentencepiece, the file has the scores, token types and space prefix with which
llama.cpp tokenizes any text as sentencepiece and tokenizer.json do; the ids of special tokens are right; a tokenizer
that llama.cpp would apply differently is rejected with the reason. The references are sentencepiece, the tokenizers
library and, if installed, llama.cpp.
"""

import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.errors import UserError
from export.gguf_export import write_gguf
from export.gguf_tokenizer import (
    BYTE_PIECES,
    TOKEN_BYTE,
    TOKEN_CONTROL,
    TOKEN_NORMAL,
    TOKEN_UNKNOWN,
    TOKEN_UNUSED,
    SentencePieceVocabulary,
    pre_tokenizer_name,
)
from export.verify_gguf import check_gguf
from model.config import ModelConfig
from model.tokenizer import load_tokenizer
from tests.export.test_hf_export import random_model
from tests.export.test_hf_import import CHAT
from tests.scripts.test_train_tokenizer import made_up_text

FACTS = {"stage": "full_sft", "size": "32"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LLAMA = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@pytest.fixture(scope="module")
def sp_model():
    """A BPE trained by sentencepiece, as Llama 2's: dummy prefix, byte fallback, every space a ▁."""
    import sentencepiece

    model = io.BytesIO()
    texts = made_up_text("zh", 150) + made_up_text("en", 150) + ["the  sun and   the moon, of the sea", "太阳 和 月亮"]
    lines = (line for text in texts for line in text.splitlines() if line)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, model_type="bpe", vocab_size=700, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.99, minloglevel=2,
        allow_whitespace_only_pieces=True, split_digits=True, num_threads=1,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def tokenizer_backend(sp_model, keep=lambda left, right: True):
    """tokenizer.json of a sentencepiece model: all pairs of pieces that make a piece, by descending score."""
    pieces = [sp_model.id_to_piece(i) for i in range(sp_model.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        if piece not in BYTE_PIECES and piece not in ("<unk>", "<s>", "</s>"):
            splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
            merges += [
                (left, right) for left, right in splits if left in vocab and right in vocab and keep(left, right)
            ]
    merges.sort(key=lambda merge: -sp_model.get_score(vocab["".join(merge)]))
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = LLAMA
    return backend


def save_tokenizer(backend, folder, template=TEMPLATE):
    from transformers import PreTrainedTokenizerFast

    marks = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([marks, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": template}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def ours(sp_model, tmp_path_factory):
    return save_tokenizer(tokenizer_backend(sp_model), tmp_path_factory.mktemp("spm"))


def small_model(tokenizer):
    size = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "hidden_dim": 48, "max_seq_len": 128}
    return random_model(ModelConfig(tokenizer.vocab_size + 3, **size))


def read_gguf_fields(path):
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture(scope="module")
def gguf_file(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    write_gguf(path, small_model(ours), ours, "f32", FACTS)
    return path


@pytest.fixture(scope="module")
def read_vocabulary(gguf_file):
    """The vocabulary as llama.cpp reads it from the file."""
    values = read_gguf_fields(gguf_file)
    lists = [values[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    return SentencePieceVocabulary(*lists, values["tokenizer.ggml.add_space_prefix"])


def test_gguf_file_holds_sizes_tensors_and_tokenizer_of_the_model(ours, sp_model, gguf_file):
    values = {name.removeprefix("tokenizer.ggml."): value for name, value in read_gguf_fields(gguf_file).items()}
    assert (values["model"], values["pre"]) == ("llama", "default")
    assert (values["bos_token_id"], values["eos_token_id"], values["unknown_token_id"]) == (1, 2, 0)
    assert values["add_space_prefix"] and values["add_bos_token"] and values["tokenizer.chat_template"] == TEMPLATE
    pieces, types = values["tokens"], values["token_type"]
    assert pieces[: sp_model.vocab_size()] == [sp_model.id_to_piece(i) for i in range(sp_model.vocab_size())]
    assert types[:3] == [TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_CONTROL] and types[3:259] == [TOKEN_BYTE] * 256
    assert set(types[259 : ours.vocab_size]) == {TOKEN_NORMAL} and types[ours.vocab_size :] == [TOKEN_UNUSED] * 3
    made = [i for i in range(259, ours.vocab_size) if len(pieces[i]) > 1]  # in merge order
    assert made and sorted(made, key=lambda i: -values["scores"][i]) == sorted(
        made, key=lambda i: -sp_model.get_score(i)
    )


MARKS = ["▁", "<0x41>", "\n", "\r\n", "  ", "12345", "①②", "👩\u200d👩\u200d👧", "e\u0301", "\t", "é", "𠮷"]
PIECES = st.sampled_from(["the sun", " of the", "太阳", ",还有", *MARKS])
ANY_TEXT = st.lists(PIECES | st.text(st.characters(exclude_categories=("Cs",)), max_size=8), max_size=12).map("".join)


@given(ANY_TEXT)
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_text_gives_the_same_tokens(ours, sp_model, read_vocabulary, text):
    """Only sentencepiece drops \\0 and reads ▁ as a space."""
    ids = read_vocabulary.encode(text)
    assert ids == ours.encode(text)
    if text and not set(text) & {"\0", "▁"}:
        assert ids == sp_model.encode(text)


def test_thousands_of_texts_give_the_same_tokens(ours, sp_model, read_vocabulary):
    texts = made_up_text("zh", 1200) + made_up_text("en", 1200)
    texts += [f"{a}{b}" for a in ("", " ", "  ", "\n", "👍") for b in texts[:300]]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert read_vocabulary.encode(text) == ids == sp_model.encode(text)


def test_a_chat_gives_the_same_tokens(ours, read_vocabulary):
    for end, prompt in ((2, True), (3, False), (4, True), (5, False)):
        ids, _ = ours.render(CHAT[:end], add_generation_prompt=prompt)
        text = ours.format.text(CHAT[:end], prompt)
        assert read_vocabulary.encode(text, parse_special=True) == ids


def test_llama_cpp_gives_equal_tokens(ours, gguf_file):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python, which a fresh machine must compile")
    assert "in llama.cpp: equal tokens" in check_gguf(gguf_file, small_model(ours), ours, "f32")


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("always", pre_tokenizers.Metaspace("▁", "always", split=False)),
        ("never", pre_tokenizers.Metaspace("▁", "never", split=False)),
        ("replace", normalizers.Replace(" ", "▁")),
    ],
)
def test_metaspace_steps_are_converted(sp_model, name, step, tmp_path):
    backend = tokenizer_backend(sp_model)
    backend.normalizer = step if name == "replace" else None
    if name != "replace":
        backend.pre_tokenizer = step
    tokenizer = save_tokenizer(backend, tmp_path)
    write_gguf(tmp_path / "m.gguf", small_model(tokenizer), tokenizer, "f32", FACTS)
    values = read_gguf_fields(tmp_path / "m.gguf")
    assert values["tokenizer.ggml.add_space_prefix"] == (name == "always")
    message = check_gguf(tmp_path / "m.gguf", small_model(tokenizer), tokenizer, "f32")
    assert ("begins with a space has one more ▁" in message) == (name == "always")


# ---- rejected by name ------------------------------------------------------------------------------------------------
def rejection_message(backend, folder, template=TEMPLATE):
    with pytest.raises(UserError, match="GGUF does not support") as error:
        pre_tokenizer_name(save_tokenizer(backend, folder, template))
    return str(error.value)


def test_steps_that_llama_cpp_lacks_are_rejected(sp_model, tmp_path):
    backend = tokenizer_backend(sp_model)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    assert "no NFKC before the merges" in rejection_message(backend, tmp_path / "a")
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    assert "after each control token of a chat" in rejection_message(backend, tmp_path / "b")
    assert pre_tokenizer_name(save_tokenizer(backend, tmp_path / "c", template=None)) == "default", (
        "plain text is the same"
    )
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["e▁"] = len(content["model"]["vocab"])
    content["model"]["merges"].append(["e", "▁"])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    assert "merges across words" in rejection_message(backend, tmp_path / "d")


def test_a_tokenizer_without_byte_fallback_is_rejected(tmp_path):
    """Unknown characters are <unk> here and bytes in llama.cpp."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = LLAMA
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the sun and the moon"] * 9, trainer)
    assert "no byte fallback" in rejection_message(backend, tmp_path)


def test_a_missing_merge_is_rejected(sp_model, tmp_path):
    """A pair that makes a piece but is not in merges: llama.cpp merges it nevertheless."""
    pieces = {sp_model.id_to_piece(i) for i in range(sp_model.vocab_size())}
    dropped = next(piece for piece in sorted(pieces) if len(piece) == 2 and not piece.startswith("<"))
    backend = tokenizer_backend(sp_model, keep=lambda left, right: left + right != dropped)
    assert "merges any two neighbours" in rejection_message(backend, tmp_path)


def test_merges_of_bytes_are_rejected(sp_model, tmp_path):
    content = json.loads(tokenizer_backend(sp_model).to_str())
    content["model"]["vocab"]["<0xE4><0xBD>"] = len(content["model"]["vocab"])
    content["model"]["merges"].append(["<0xE4>", "<0xBD>"])
    assert "never merges bytes" in rejection_message(Tokenizer.from_str(json.dumps(content)), tmp_path)
