"""Promise: if one bit of a file in a dataset folder is flipped, reading the folder returns the same content or raises a
one-line error that names the file. It never hangs."""

import contextlib
import json
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

import data_process
from common.errors import UserError
from corpus import tokenize_chats as tokenization
from corpus.dataset_meta import read_meta
from corpus.examples import ChatExample, PairExample
from corpus.shard_reader import open_split
from corpus.tokenize_chats import tokenize_chats
from curation.perplexity_filter import ScoreStore
from tests.helpers import make_chat_row, run_script, write_shards

SECONDS = 10  # time limit of one read


def flip_bit(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@contextlib.contextmanager
def flipped_bit(path: Path, bit: int):
    """Flip one bit of `path` inside the context; restore the file afterwards."""
    original = path.read_bytes()
    flip_bit(path, bit)
    try:
        yield
    finally:
        path.write_bytes(original)


@pytest.fixture
def flip_bits(record_attacks):
    """flip_bits(path, read, number): for `number` random bits of a file: flip the bit, call `read`, restore the bit."""

    counts: dict[str, dict[str, int]] = {}

    def run(path: Path, read, number: int, names: str = "") -> None:
        expected, outcomes = read(), counts.setdefault("".join(path.suffixes), {"refused": 0, "equal": 0})
        size = 8 * path.stat().st_size
        rng = random.Random(path.name)
        for bit in rng.sample(range(size), min(number, size)):
            signal.alarm(SECONDS)
            with flipped_bit(path, bit):
                try:
                    assert read() == expected, f"bit {bit} of {path} changed what is read"
                    outcomes["equal"] += 1
                except UserError as error:
                    assert "\n" not in str(error) and re.search(names or re.escape(path.name), str(error)), error
                    outcomes["refused"] += 1
            signal.alarm(0)
        assert read() == expected

    def count() -> None:
        for suffix, outcomes in counts.items():
            record_attacks(f"flipped bits of {suffix} of a data folder", sum(outcomes.values()), **outcomes)

    run.count = count  # called by the test, because pytest does not report properties that are added at teardown
    yield run
    signal.alarm(0)


def read_token_folder(folder: Path) -> list:
    """Return everything that a training script reads from a folder of token shards."""
    meta, found = read_meta(folder), []
    for split in meta["splits"]:
        tokens = open_split(folder, split)
        found += [split, tokens.read(0, tokens.tokens).tobytes(), tokens.read_mask(0, tokens.tokens).tobytes()]
        found += [[(ids.tobytes(), None if mask is None else mask.tobytes()) for ids, mask in
                   map(tokens.read_document, range(tokens.documents))], tokens.offsets().tolist()]  # fmt: skip
    return [meta["splits"], meta["kind"], meta["dtype"], found]


@pytest.fixture(scope="module")
def token_folders(tokenizer, tokenizer_dir, tmp_path_factory):
    """Datasets of all three kinds: texts with shards per source; chats and pairs with jsonl rows and token shards."""
    root = tmp_path_factory.mktemp("flips")
    texts = [{"text": f"{'一' * (i % 40)} story {i} " * 3, "from": f"s{i % 2}"} for i in range(120)]
    pairs = [{"prompt": f"{i}?", "chosen": "yes " * (1 + i % 5), "rejected": "no"} for i in range(60)]
    rows = {"pretrain": texts, "sft": [make_chat_row(i) for i in range(60)], "dpo": pairs}
    for kind, lines in rows.items():
        file = root / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")
        more = ["--source_key", "from"] if kind == "pretrain" else []
        command = [kind, file, "--tokenizer", tokenizer_dir, "--out_dir", root / kind, "--val_share", 0.2, *more]
        data_process.main([*map(str, command)])
    return root


@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo"])
def test_a_flipped_bit_in_a_token_folder_is_refused_or_harmless(token_folders, tokenizer, kind, flip_bits, num_attacks):
    folder = token_folders / kind / ("" if kind == "pretrain" else f"tokens-{tokenizer.rendering_fingerprint}")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    assert {path.suffix for path in files} == {
        ".bin",
        ".npy",
        ".crc",
        ".json",
        *([".mask"] if kind != "pretrain" else []),
    }
    for path in files:
        flip_bits(
            path,
            lambda: read_token_folder(folder),
            num_attacks(12, 300),
            rf"{re.escape(path.name)}|{path.stem.split('.')[0]}\.",
        )
    flip_bits.count()


@pytest.mark.parametrize(("kind", "example_type"), [("sft", ChatExample), ("dpo", PairExample)])
def test_a_flipped_bit_in_rows_is_refused_or_harmless(
    token_folders, tokenizer, kind, example_type, flip_bits, num_attacks, tmp_path
):
    folder = shutil.copytree(token_folders / kind, tmp_path / kind)

    def tokenise():
        shutil.rmtree(folder / f"tokens-{tokenizer.rendering_fingerprint}", ignore_errors=True)
        return read_token_folder(tokenize_chats(folder, tokenizer, 128, example_type))

    for name in ("train.jsonl", "val.jsonl", "meta.json"):
        flip_bits(folder / name, tokenise, num_attacks(6, 300))
    flip_bits.count()


def test_reads_of_large_files_verify_each_block(tmp_path, tokenizer, num_attacks, record_attacks):
    """Reads that overlap the damaged block raise an error; reads of other blocks succeed."""
    rng = np.random.default_rng(0)
    documents = [(rng.integers(0, 200, 3000), rng.integers(0, 2, 3000)) for _ in range(60)]
    folder = write_shards(tmp_path / "sft", "chats", tokenizer, {"train": documents})
    size, number = 60 * 3000, num_attacks(20, 300)
    for _ in range(number):
        suffix = [".bin", ".mask"][rng.integers(2)]
        width, bit = (2, 1)[suffix == ".mask"], int(rng.integers(8 * size))
        block = bit // 8 // 65_536
        first, last = block * 65_536 // width, min((block + 1) * 65_536 // width, size)
        with flipped_bit(folder / f"train_000{suffix}", bit):
            tokens = open_split(folder, "train")
            read = tokens.read if suffix == ".bin" else tokens.read_mask
            for start, stop in ((0, first), (last, size)):
                assert len(read(start, stop)) == stop - start
            for start, stop in ((first, first + 1), (last - 1, last), (max(0, first - 5), first + 5), (0, size)):
                with pytest.raises(
                    UserError, match=rf"train_000{suffix} is damaged: its bytes from {block * 65_536:,}"
                ):
                    read(start, stop)
    record_attacks("flipped bits of large .bin and .mask", number, refused=number)


def convert_to_format_1(folder: Path) -> Path:
    """Convert a token folder to format 1, which has no checksums."""
    meta = read_meta(folder)
    for split in meta["splits"].values():
        for shard in split["shards"]:
            del shard["checksums"]
            (folder / f"{shard['file']}.crc").unlink()
    del meta["checksum"]
    (folder / "meta.json").write_text(json.dumps(meta | {"format": 1}))
    return folder


def test_flipped_bits_in_a_format_1_folder_are_refused_or_change_tokens(
    token_folders, tokenizer, tmp_path, num_attacks, record_attacks, capfd
):
    source = token_folders / "sft" / f"tokens-{tokenizer.rendering_fingerprint}"
    folder = convert_to_format_1(Path(shutil.copytree(source, tmp_path / source.name)))
    assert read_token_folder(folder)[3] == read_token_folder(source)[3] == read_token_folder(folder)[3]
    assert capfd.readouterr().err.count("has no checksums") == 1
    outcomes, number = {"refused": 0, "other_content": 0}, num_attacks(20, 300)
    for path in sorted(folder.iterdir()):
        bits = random.Random(path.name).sample(range(8 * path.stat().st_size), number)
        for bit in bits:
            signal.alarm(SECONDS)
            with flipped_bit(path, bit):
                try:
                    read_token_folder(folder)
                    outcomes["other_content"] += 1
                except UserError as error:
                    assert "\n" not in str(error)
                    outcomes["refused"] += 1
            signal.alarm(0)
    record_attacks("flipped bits of folders without checksums", sum(outcomes.values()), **outcomes)


@pytest.mark.parametrize(
    ("suffix", "write", "message"),
    [
        (
            ".bin",
            lambda old: np.full(len(old) // 2, 60_000, "<u2").tobytes(),
            "holds the id 60,000, the vocabulary has",
        ),
        (".mask", lambda old: b"\2" + old[1:], "holds 2, a mask is 0 or 1"),
        (".mask", None, r"\.mask is missing"),
        (".idx.npy", None, "it is missing or incomplete"),
        (".idx.npy", lambda old: old[:128] + old[136:144] + old[128:136] + old[144:], "offsets do not rise from 0"),
        (".idx.npy", lambda old: b"no array" + old[8:], "it is not a numpy array"),
    ],
)
def test_unreadable_folders_without_checksums_are_refused_in_one_line(
    token_folders, tokenizer, tmp_path, suffix, write, message
):
    source = token_folders / "dpo" / f"tokens-{tokenizer.rendering_fingerprint}"
    folder = convert_to_format_1(Path(shutil.copytree(source, tmp_path / source.name)))
    path = folder / f"train_000{suffix}"
    if write:
        path.write_bytes(write(path.read_bytes()))
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"{message}.*: delete .*, the next training run makes it again"):
        read_token_folder(folder)


@pytest.mark.parametrize(("suffix", "workers"), [(".idx.npy", 0), (".bin", 0), (".mask", 2)])
def test_training_on_damaged_token_shards_raises_the_one_line_error(
    monkeypatch, tmp_path, tokenizer, tiny_parent, sft_dir, suffix, workers
):
    data = Path(shutil.copytree(sft_dir, tmp_path / "sft"))
    tokens = tokenize_chats(data, tokenizer, 64)
    path = tokens / f"train_000{suffix}"
    flags = ["--data_path", data, "--init_from", tiny_parent, "--out_dir", tmp_path / "out", "--device", "cpu"]
    signal.alarm(120)
    with flipped_bit(path, 8 * (path.stat().st_size - 5)):
        with pytest.raises(
            UserError, match=rf"train_000{suffix} is damaged: .*: delete .*the next training run"
        ) as raised:
            run_script(monkeypatch, "3-full_sft.py", *flags, "--num_workers", workers, "--max_steps", 60)
    signal.alarm(0)
    assert "\n" not in str(raised.value)


def test_only_damaged_scores_are_recomputed(tmp_path, num_attacks, record_attacks):
    path, number = tmp_path / "sft.scores-x.jsonl", num_attacks(60, 300)
    scores = ScoreStore(path)
    scores.add((key, key / 1000, 5, ("zh", "en")[key % 2]) for key in range(1, 50))
    scores.close()
    known = {key: scores.get(key) for key in range(1, 50)}
    lost = 0
    for bit in random.Random(0).sample(range(8 * path.stat().st_size), number):
        with flipped_bit(path, bit):
            damaged = ScoreStore(path)
            damaged.close()
            found = {key: damaged.get(key) for key in known}
            assert all(value in (None, known[key]) for key, value in found.items()), "a score has changed"
            assert len(damaged.keys) == sum(value is not None for value in found.values()) >= 47
            lost += None in found.values()
    record_attacks("flipped bits of stored scores", number, scored_again=lost, equal=number - lost)


def test_a_damaged_dpo_reference_is_recomputed(token_folders, tokenizer, tmp_path, num_attacks, record_attacks):
    import torch

    from model.config import ModelConfig
    from model.transformer import Transformer
    from trainer.distributed import DistContext
    from trainer.dpo import load_or_compute_reference

    torch.manual_seed(0)
    model = Transformer(ModelConfig(tokenizer.vocab_size, 16, 1, 2, 2, max_seq_len=64))
    dist, folder = (
        DistContext(torch.device("cpu"), torch.float32),
        token_folders / "dpo" / f"tokens-{tokenizer.rendering_fingerprint}",
    )
    path, number = tmp_path / "dpo_16.reference", num_attacks(8, 150)

    def read():
        return {name: values.tolist() for name, values in
                load_or_compute_reference(dist, model, str(folder), tokenizer.pad_id, path, 8).items()}  # fmt: skip

    expected = read()
    for bit in random.Random(0).sample(range(8 * path.stat().st_size), number):
        with flipped_bit(path, bit):
            assert read() == expected
    record_attacks("flipped bits of DPO's reference", number, equal=number)


def test_resuming_unfinished_work_detects_flipped_bits(
    monkeypatch, tmp_path, tokenizer_dir, num_attacks, record_attacks
):
    """A resumed run verifies the files of the interrupted run before it appends to them."""
    monkeypatch.setattr("corpus.examples.BATCH_EXAMPLES", 20)
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0)
    file = tmp_path / "a.jsonl"
    file.write_text(
        "".join(json.dumps(make_chat_row(i), ensure_ascii=False) + "\n" for i in range(300)), encoding="utf-8"
    )
    command = ["sft", str(file), "--tokenizer", str(tokenizer_dir), "--out_dir", str(tmp_path / "out")]
    render_examples, calls = tokenization.render_examples, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return render_examples(*arguments)

    partial = tmp_path / "out.partial"
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "render_examples", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data_process.main(command)
    kept = Path(shutil.copytree(partial, tmp_path / "kept"))
    data_process.main(command)
    expected = read_token_folder(next((tmp_path / "out").glob("tokens-*")))
    files = [path for path in kept.rglob("*") if path.suffix in (".jsonl", ".bin", ".mask", ".idx", ".json")]
    outcomes, rng = {"refused": 0, "restarted_or_not_counted": 0}, random.Random(0)
    for path in [path for path in sorted(files) if path.stat().st_size] * num_attacks(1, 20):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(kept, partial)
        damaged = partial / path.relative_to(kept)
        flip_bit(damaged, rng.randrange(8 * damaged.stat().st_size))
        try:
            data_process.main(command)
            assert read_token_folder(next((tmp_path / "out").glob("tokens-*"))) == expected
            outcomes["restarted_or_not_counted"] += 1  # rows after the last checkpoint are rewritten
        except UserError as error:
            assert f"{path.name} has changed since an earlier run wrote it: run the same" in str(error)
            assert not partial.exists(), "the next run restarts"
            outcomes["refused"] += 1
    assert outcomes["refused"] >= 4
    record_attacks("flipped bits of unfinished work", sum(outcomes.values()), **outcomes)
