"""train_tokenizer.py --compare: compression of tokenizers on the same text.

Promises: the counts equal those of the libraries per document, without special tokens; unknown tokens are counted; rows
are sorted; invalid folders and files are one-line errors.
"""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from common.errors import UserError
from corpus.language import detect_language
from evaluation.tokenizer_table import load_any_tokenizer, measure_tokenizers, read_texts_by_language
from tests.helpers import run_here, run_script
from tests.scripts.test_train_tokenizer import made_up_text

TEXTS = [*made_up_text("zh", 12, 5), *made_up_text("en", 12, 5), "<|im_end|> is text", "一"]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A byte-level tokenizer, a word-level one with an unknown token, a SentencePiece model, and the text."""
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("compare")
    tokenizer.save(folder / "ours")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "of": 2, "<s>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.enable_padding(length=500)
    words.enable_truncation(3)
    (folder / "words").mkdir()
    words.save(str(folder / "words" / "tokenizer.json"))
    (folder / "pieces").mkdir()
    (folder / "text.txt").write_text("\n\n".join(TEXTS), encoding="utf-8")
    with (folder / "pieces" / "tokenizer.model").open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, vocab_size=400, byte_fallback=True, minloglevel=2
        )
    return folder


def reference_counts(encode, unknown):
    """[characters per token zh, en, bytes per token, unknown] from the library, one document at a time."""
    ids = [encode(text) for text in TEXTS]
    sums = []
    for lang in ("zh", "en"):
        of = [(len(text), len(row)) for text, row in zip(TEXTS, ids, strict=True) if detect_language(text) == lang]
        sums.append(sum(c for c, _ in of) / sum(n for _, n in of))
    tokens = sum(map(len, ids))
    return [*sums, sum(len(text.encode()) for text in TEXTS) / tokens, sum(row.count(unknown) for row in ids) / tokens]


def test_counts_equal_the_libraries(folder, tokenizer):
    from sentencepiece import SentencePieceProcessor

    texts = read_texts_by_language([str(folder / "text.txt")])
    assert sorted(text for documents in texts.values() for text in documents) == sorted(TEXTS)
    rows = {row.name: row for row in measure_tokenizers(map(load_any_tokenizer, sorted(folder.glob("[opw]*s"))), texts)}
    pieces = SentencePieceProcessor(model_file=str(folder / "pieces" / "tokenizer.model"))
    words = Tokenizer.from_file(str(folder / "words" / "tokenizer.json"))
    words.no_padding(), words.no_truncation()
    ours = Tokenizer.from_file(str(folder / "ours" / "tokenizer.json"))
    ours.encode_special_tokens = True
    for name, entries, expected in (
        ("ours", tokenizer.vocab_size, reference_counts(lambda text: ours.encode(text).ids, -1)),
        ("words", 4, reference_counts(lambda text: words.encode(text).ids, 0)),
        ("pieces", 400, reference_counts(pieces.encode, pieces.unk_id())),
    ):
        row = rows[str(folder / name)]
        assert row.vocab_size == entries
        found = [
            row.characters_per_token["zh"],
            row.characters_per_token["en"],
            row.bytes_per_token,
            row.unknown_fraction,
        ]
        assert found == pytest.approx(expected), name
    assert rows[str(folder / "ours")].bytes_per_token == 1, "one byte per token"
    assert rows[str(folder / "words")].unknown_fraction > 0.5 and rows[str(folder / "pieces")].unknown_fraction == 0


def test_compare_prints_and_writes_sorted_table(folder, monkeypatch, capsys, tmp_path):
    folders = [folder / "ours", folder / "pieces", folder / "words" / "tokenizer.json"]
    monkeypatch.setenv("COLUMNS", "300")
    run_script(monkeypatch, "train_tokenizer.py", "--compare", *folders, "--compare_on", folder / "text.txt", "--out",
               tmp_path / "new" / "t.md")  # fmt: skip
    output = capsys.readouterr().out
    lines = [line for line in (tmp_path / "new" / "t.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    assert lines[0] == "| tokenizer | entries | chars/token zh | chars/token en | bytes/token | unknown |"
    values = [float(line.split("|")[5]) for line in lines[2:]]
    assert len(values) == 3 and values == sorted(values, reverse=True) and values[-1] == 1
    assert all(f" {cell.strip()} " in output.replace("\n", " \n") for cell in lines[2].split("|")[2:-1])
    assert "characters of zh and" in output and "text.txt" in output


def test_compare_defaults_to_demo_world_text(folder, monkeypatch, capsys):
    run_script(monkeypatch, "train_tokenizer.py", "--compare", folder / "ours")
    output = capsys.readouterr().out
    assert "built-in demo world" in output and "--compare_on" in output and "1.000" in output


def test_absent_language_is_a_dash(folder, monkeypatch, capsys, tmp_path):
    (tmp_path / "en.jsonl").write_text(json.dumps({"text": "only English"}) + "\n", encoding="utf-8")
    run_script(monkeypatch, "train_tokenizer.py", "--compare", folder / "ours", "--compare_on", tmp_path / "en.jsonl")
    assert "–" in capsys.readouterr().out


def test_bad_folders_and_flags_are_one_line_errors(folder, monkeypatch, tmp_path, capsys):
    (tmp_path / "empty").mkdir(), (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{oops", encoding="utf-8")
    (tmp_path / "torn.model").write_bytes(b"no model")
    (tmp_path / "empty.txt").write_bytes(b"")
    for arguments, message in (
        ([tmp_path / "absent"], "absent: no such file or folder"),
        ([tmp_path / "empty"], "expected a tokenizer.json or a SentencePiece"),
        ([tmp_path / "bad"], "tokenizer.json .*: damaged or not a tokenizer"),
        ([tmp_path / "torn.model"], "torn.model .*: damaged or not a tokenizer"),
        ([folder / "ours", "--compare_on", "absent.txt"], "absent.txt: no such file"),
        ([folder / "ours", "--compare_on", tmp_path / "empty.txt"], "empty.txt"),
    ):
        with pytest.raises(UserError, match=message) as error:
            run_script(monkeypatch, "train_tokenizer.py", "--compare", *arguments)
        assert "\n" not in str(error.value)
    for arguments in (["--compare", "a", "--inspect", "x"], ["x.txt", "--out", "t.md"], ["x.txt", "--compare_on", "y"]):
        done = run_here(monkeypatch, capsys, "train_tokenizer.py", *arguments)
        assert done.returncode == 2 and "Traceback" not in done.stderr
