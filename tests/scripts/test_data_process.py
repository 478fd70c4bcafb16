"""Promise: data_process.py writes complete datasets, counts every row, and resumes after kills and full disks."""

import itertools
import json
import random
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_process
from common.cli import parse_command
from common.errors import UserError
from corpus import prepare_text
from corpus.dataset_meta import read_meta
from corpus.examples import ChatExample, TextExample, text_hash
from corpus.render_chats import render_chat_examples
from corpus.shard_reader import open_split
from corpus.stats import DataStats
from corpus.tokenize_chats import tokenize_chats
from tests.helpers import SHARED_DATA, assign_splits, read_folder, run_process, visible_names, write_rows

EN = [f"Sentence number {i} is about {word}." for i, word in enumerate(["rivers", "trees", "stars"] * 200)]
ZH = [f"第{i}句话说的是{word}。" for i, word in enumerate(["河流", "树木", "星星"] * 200)]
MIXED = [f"用 Python 写的第{i}个 for loop 例子" for i in range(100)]


def chat(*contents, **more) -> dict:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)], **more}


CHATS = [chat(f"What is {i} + 1?", f"It is {i + 1}.") for i in range(300)] + [
    chat(f"{i} 加 1 是多少？", f"是 {i + 1}。", "谢谢", "不客气") for i in range(300)
]


def documents(folder, tokenizer, split) -> list[str]:
    found = open_split(folder, split)
    ids = [found.read_document(i)[0].tolist() for i in range(found.documents)]
    assert all(document[-1] == tokenizer.eos_id for document in ids)
    return [tokenizer.decode(document[:-1]) for document in ids]


# ---- pretrain --------------------------------------------------------------------------------------------------------
def test_text_becomes_shards_that_hold_every_text_once(tmp_path, process, tokenizer, capsys):
    path = write_rows(tmp_path / "a.jsonl", [*EN, *ZH, *MIXED, *EN[:50]])
    folder = process("pretrain", path)
    splits = {split: documents(folder, tokenizer, split) for split in read_meta(folder)["splits"]}
    assert sorted(splits) == ["train", "val_en", "val_zh"]
    assert sorted(itertools.chain(*splits.values())) == sorted(EN + ZH + MIXED)  # English and mixed text are kept
    assert set(splits["val_en"]) <= set(EN) and set(splits["val_zh"]) <= {*ZH, *MIXED}
    meta = read_meta(folder)
    assert meta["tokenizer"] == tokenizer.fingerprint and meta["kind"] == "pretrain" and meta["dtype"] == "uint16"
    assert sum(split["bytes"] for split in meta["splits"].values()) == sum(len(t.encode()) for t in EN + ZH + MIXED)
    report = meta["report"]
    assert (report["read"], report["kept"]) == (1350, 1300)
    assert report["dropped"]["exact duplicate"] == {"count": 50, "first": [f"{path}:{n}" for n in (1301, 1302, 1303)]}
    assert report["languages"]["zh"]["documents"] == 700 and sum(report["lengths"].values()) == 1300
    printed = capsys.readouterr().out
    assert "exact duplicate" in printed and "next: python 1-pretrain.py" in printed and "MB/s" in printed


def test_the_split_depends_on_the_content_alone(tmp_path, process, tokenizer):
    one, other = write_rows(tmp_path / "one.jsonl", EN), write_rows(tmp_path / "other.jsonl", ZH)
    sides = []
    for files in ([one, other], [other, one]):
        folder = process("pretrain", *files)
        sides.append({split: sorted(documents(folder, tokenizer, split)) for split in read_meta(folder)["splits"]})
    assert sides[0] == sides[1]
    shuffled = random.Random(0).sample(EN, len(EN))
    folder = process("pretrain", write_rows(tmp_path / "shuffled.jsonl", shuffled))
    assert sorted(documents(folder, tokenizer, "val_en")) == sides[0]["val_en"]


def items(texts, language="en"):
    return [TextExample(text, language, text_hash(text), "f", i) for i, text in enumerate(texts)]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.text(max_size=8), max_size=60), st.randoms(), st.sampled_from([0.0, 0.01, 0.3]))
def test_every_example_is_in_one_split_in_any_order(texts, shuffle, share):
    texts = sorted(texts)
    first = {item.text: split for split, item in assign_splits(items(texts), share)}
    shuffle.shuffle(texts)
    again = [(item.text, split) for split, item in assign_splits(items(texts), share)]
    assert dict(again) == first and len(again) == len(texts)
    has_validation = any(split != "train" for split in first.values())
    assert has_validation == (len(texts) >= 20 and share > 0) or len(texts) < 20 or share == 0.3
    assert share or not has_validation


def test_val_share_applies_to_each_language():
    both = items([f"text {i}" for i in range(20_000)]) + items([f"字 {i}" for i in range(20)], "zh")
    held_out = [item.language for split, item in assign_splits(both, 0.01) if split != "train"]
    assert 140 < held_out.count("en") < 260 and held_out.count("zh") >= 1
    same_question = [TextExample(f"answer {i}", "en", 5, "f", i) for i in range(30)]
    assert len({split for split, _ in assign_splits(same_question, 0.01)}) == 1


def test_long_documents_in_chunks_give_the_ids_of_the_whole_text(monkeypatch):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from model.tokenizer import SPARE_TOKENS, SPECIAL_TOKENS, ChatTokenizer, tokenizer_files

    backend = Tokenizer(models.BPE())
    newline = pre_tokenizers.Split(Regex("\n"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([newline, pre_tokenizers.ByteLevel(False)])
    backend.decoder = decoders.ByteLevel()
    alphabet, specials = sorted(pre_tokenizers.ByteLevel.alphabet()), SPECIAL_TOKENS + SPARE_TOKENS
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(EN + ZH, trainer)
    tokenizer = ChatTokenizer(tokenizer_files(backend))
    text = "\n\n".join(EN[:60] + ZH[:60]) + "\r\n \n" + EN[0]
    monkeypatch.setattr(prepare_text, "CHUNK_CHARACTERS", 100)
    monkeypatch.setattr("corpus.examples.BATCH_CHARACTERS", 500)
    packed = [ids.tolist() for ids in prepare_text.tokenize_texts(items([text, *EN[:20]]), tokenizer, DataStats())]
    assert packed == [[*tokenizer.encode(t), tokenizer.eos_id] for t in [text, *EN[:20]]]


# ---- errors ----------------------------------------------------------------------------------------------------------
def test_bad_input_is_a_one_line_error_and_nothing_is_written(tmp_path, process, tokenizer_dir):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("".join(json.dumps({"text": text}) + "\n" for text in EN[:50]) + "{broken\n")
    plain = tmp_path / "notes.txt"
    plain.write_text("Only text.\n\nMore text.")
    before = visible_names(tmp_path)
    for kind, file, words in (
        ("pretrain", broken, "1 of 51 rows read are bad .2.0%, allowed are 1.0%.: 1 x broken JSON .*broken.jsonl:51"),
        ("sft", plain, "plain text, not a chat.*a chat row needs a list of turns"),
        ("sft", write_rows(tmp_path / "texts.jsonl", EN), "none of its 600 rows.*found the keys text"),
        ("pretrain", tmp_path / "nowhere.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=words) as error:
            process(kind, file)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"no tokenizer in .*train_tokenizer\.py.*--tokenizer"):
        data_process.main(["pretrain", str(broken), "--tokenizer", str(tmp_path / "none")])
    assert visible_names(tmp_path) == sorted([*before, "texts.jsonl"])


def test_a_folder_with_other_files_is_not_changed(tmp_path, process):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        process("pretrain", write_rows(tmp_path / "a.jsonl", EN))
    assert read_folder(tmp_path / "pretrain") == {"thesis.doc": b"mine"}


def test_the_command_line_on_full_and_read_only_disks(tmp_path, tokenizer_dir):
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in EN + ZH]
    rows[5:5], rows[900:900] = ["{half a row"], ['{"text": 5}', "\x00"]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    command = [sys.executable, "data_process.py", "pretrain", path, "--tokenizer", tokenizer_dir, "--out_dir"]
    done = run_process(*command, tmp_path / "out")
    assert done.returncode == 0 and "kept" in done.stdout and "1,200" in done.stdout and done.stderr == ""
    for line in ("bad: broken JSON", "bad: text is a number, not a string", "bad: NUL character", "a.jsonl:6"):
        assert line in done.stdout

    def small_disk():
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    for out_dir, options in ((path / "out", {}), (tmp_path / "full", {"preexec_fn": small_disk})):
        failed = run_process(*command, out_dir, **options)
        assert failed.returncode == 2 and failed.stderr.startswith("error: cannot write")
        assert failed.stderr.count("\n") == 1 and not (tmp_path / "full").exists()


def test_help_and_defaults():
    def parse(*arguments):
        return parse_command(data_process.DATA_COMMANDS, "", arguments)[1]

    config = parse("sft", "x.jsonl")
    assert (config.tokenizer, config.out_dir, config.max_seq_len) == ("model/tokenizer", "dataset/sft", 512)
    assert (config.val_fraction, config.max_bad_fraction, config.check_only) == (0.01, 0.01, False)
    assert (parse("pretrain", "x").out_dir, parse("dpo", "x").val_fraction) == ("dataset/pretrain", 0.05)
    assert parse("sft", "x", "--val_share", "0.1", "--max_bad_share", "0.2").val_fraction == 0.1
    with pytest.raises(UserError, match="--val_fraction: 3 is not a number of at least 0 and below 1"):
        parse("sft", "x", "--val_fraction", "3")


# ---- sft -------------------------------------------------------------------------------------------------------------
def answers_of(row) -> list[str]:
    return [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]


def trained_runs(ids, mask, tokenizer) -> list[str]:
    groups = itertools.groupby(zip(ids.tolist(), mask.tolist(), strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([i for i, _ in group]) for trained, group in groups if trained]


def test_chats_become_jsonl_and_masked_tokens(tmp_path, process, tokenizer):
    path = write_rows(tmp_path / "a.jsonl", [*CHATS, *CHATS[:7], chat("Only a question?")])
    folder = process("sft", path)
    stored = {n: [json.loads(x) for x in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("train", "val")}
    assert len(stored["train"]) + len(stored["val"]) == 600
    assert {row["lang"] for row in stored["val"]} == {"zh", "en"}
    tokens = folder / f"tokens-{tokenizer.fingerprint}"
    meta = read_meta(tokens)
    assert (
        meta["kind"] == "chats"
        and meta["max_seq_len"] == 512
        and sorted(meta["splits"]) == ["train", "val_en", "val_zh"]
    )
    train = open_split(tokens, "train")
    for i, row in enumerate(stored["train"]):
        ids, mask = train.read_document(i)
        assert (ids.tolist(), mask.tolist()) == tokenizer.render(row["messages"])
        assert trained_runs(ids, mask, tokenizer) == answers_of(row)
    report = json.loads((folder / "meta.json").read_text())["report"]
    assert (report["read"], report["kept"]) == (608, 600)
    assert report["dropped"]["exact duplicate"]["count"] == 7
    assert report["dropped"]["no answer, so nothing to train on"]["count"] == 1


def test_a_question_is_in_one_split(tmp_path, process):
    rows = [chat(f"question {i % 200}", f"answer {i}") for i in range(1000)]
    folder = process("sft", write_rows(tmp_path / "a.jsonl", rows), val_share=0.1)
    sides = [
        {json.loads(x)["messages"][0]["content"] for x in (folder / f"{n}.jsonl").open()} for n in ("train", "val")
    ]
    assert not sides[0] & sides[1] and all(sides)


MESSAGES = st.lists(
    st.tuples(st.text(min_size=1, max_size=12), st.text(min_size=1, max_size=12)), min_size=1, max_size=5
)


@settings(max_examples=80, deadline=None)
@given(turns=MESSAGES, system=st.booleans(), limit=st.integers(10, 150))
def test_long_chats_are_truncated_after_whole_turns(tokenizer, turns, system, limit):
    messages = chat(*itertools.chain(*turns))["messages"]
    messages = [{"role": "system", "content": "s"}, *messages] if system else messages
    report = DataStats()
    (rendered,) = render_chat_examples([ChatExample(messages)], tokenizer, limit, report)
    prefixes = [messages[:end] for end in range(len(messages), 1, -1) if messages[end - 1]["role"] == "assistant"]
    fitting = next((p for p in prefixes if len(tokenizer.render(p)[0]) <= limit), None)
    if fitting is None:
        assert rendered == [] and report.dropped_rows == 1
        return
    ((ids, mask, answer_bytes),) = rendered
    assert (ids, mask) == tokenizer.render(fitting)
    assert answer_bytes == sum(len(m["content"].encode()) for m in fitting if m["role"] == "assistant")
    assert len(report.changed) == (len(fitting) < len(messages))


def test_token_folders_are_reused_and_rebuilt(tmp_path, process, tokenizer):
    folder = process("sft", write_rows(tmp_path / "a.jsonl", CHATS))
    tokens = folder / f"tokens-{tokenizer.fingerprint}"
    stamp = tokens.stat().st_mtime_ns
    assert tokenize_chats(folder, tokenizer, 512) == tokens and tokens.stat().st_mtime_ns == stamp
    assert tokenize_chats(folder, tokenizer, 70) == tokens and read_meta(tokens)["max_seq_len"] == 70
    assert open_split(tokens, "train").lengths().max() <= 70

    class Other:
        render_each = tokenizer.render_each
        vocab_size, rendering_fingerprint = 100_000, "other"
        special_ids = chat_marker_ids = frozenset()

    other = tokenize_chats(folder, Other(), 512)
    assert read_meta(other)["dtype"] == "uint32" and tokens.is_dir()
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(chat("new", "row", lang="en")) + "\n")
    before = read_meta(other)["splits"]["train"]["documents"]
    assert read_meta(tokenize_chats(folder, Other(), 512))["splits"]["train"]["documents"] == before + 1
    assert not list(folder.glob("*partial*")) and not list(folder.glob("*.old"))
    with pytest.raises(
        UserError, match=r"no chat is left to train on: .*first turn longer than 5 tokens: give a larger --max_seq_len"
    ):
        tokenize_chats(folder, tokenizer, 5)
    assert not list(folder.glob("*partial*"))
    with pytest.raises(UserError, match=r"data_process\.py sft"):
        tokenize_chats(tmp_path / "nothing", tokenizer, 512)


# ---- --check ---------------------------------------------------------------------------------------------------------
def test_check_prints_statistics_and_samples_and_writes_nothing(tmp_path, process, capsys):
    process("sft", write_rows(tmp_path / "a.jsonl", [*CHATS, chat("long", "x" * 900)]), check=True, samples=2)
    printed = capsys.readouterr().out
    assert "first turn longer than 512 tokens" in printed and printed.count("trained ones marked") == 2
    assert "<|im_start|>assistant\n[[" in printed and "<|im_end|>]]" in printed
    process("pretrain", write_rows(tmp_path / "b.jsonl", ["[bold]你好 a[/bold]"] * 2), check=True)
    assert "[|b|o|l|d|]|你|好| |a|[|/|b|o|l|d|]" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(UserError, match="these files have no trainable row"):
        process("sft", write_rows(tmp_path / "c.jsonl", [chat("long", "x" * 900)]), check=True)


# ---- large and real data ---------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_memory_stays_bounded(tmp_path, tokenizer_dir):
    """150 MB of text, a third of it in one line without spaces, takes less than 700 MB of memory."""
    line = "".join(random.Random(0).choices("天地玄黄宇宙洪荒日月盈昃辰宿列张", k=20_000))
    (tmp_path / "one line.txt").write_text(line * 800, encoding="utf-8")
    big_row = json.dumps({"text": line * 300}) + "\n"
    (tmp_path / "big rows.jsonl").write_text(big_row + big_row.replace("天", "云"))
    with (tmp_path / "many.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{i} " + "some words " * 40}) + "\n" for i in range(100_000))
    script = (
        "import sys, data_process; from trainer.metrics import peak_memory_mb; data_process.main(sys.argv[1:]); "
        "print('peak', int(peak_memory_mb('cpu')))"
    )
    files = [tmp_path / name for name in ("one line.txt", "big rows.jsonl", "many.jsonl")]
    flags = ["--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out"]
    done = run_process(sys.executable, "-c", script, "pretrain", *files, *flags)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 700


@pytest.mark.real
@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason="needs ../shared/data")
def test_real_chats_are_all_kept(process):
    folder = process("sft", SHARED_DATA / "sft_en.jsonl.xz")
    assert json.loads((folder / "meta.json").read_text())["report"]["bad"] == {}


def test_characters_per_token_do_not_count_markers(tmp_path, process, capsys):
    """One token per byte: a letter is a token, and the end of the text is none of its characters."""
    process("pretrain", write_rows(tmp_path / "a.jsonl", [{"text": f"the sun is {i}"} for i in range(100, 400)]))
    assert re.search(r"│ en .* 1\.00 │", capsys.readouterr().out)
    chats = [{"question": f"what is {i}", "answer": f"number {i}"} for i in range(100, 400)]
    folder = process("sft", write_rows(tmp_path / "chats.jsonl", chats))
    counts = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["report"]["languages"]["en"]
    assert counts["markers"] == 300 * 4  # <|im_start|> and <|im_end|> of two messages
