"""Promise: a killed `data_process.py` resumes to the same bytes, and never from another job's files."""

import json
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from corpus import prepare_text, tokenize_chats
from corpus.stats import DataStats
from tests.helpers import ROOT, read_folder, visible_names, write_rows


def make_row(kind, question, good, bad):
    if kind == "pretrain":
        return {"text": f"{question} {good}"}
    if kind == "dpo":
        return {"prompt": question, "chosen": good, "rejected": bad}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": good}]}


def write(path, kind, count=1200):
    """Rows of every counted kind: duplicates, a row that is too long for chats, bad rows, an empty answer."""
    en = [make_row(kind, f"What is {i} + 1?", f"It is {i + 1}.", f"No idea {i}") for i in range(count)]
    zh = [make_row(kind, f"{i} 加 1 是多少？", f"是 {i + 1}。", f"不知道{i}") for i in range(count)]
    rows = [(zh, en)[i % 2][i] for i in range(count)] + zh[:90:18]
    rows[500:500] = [make_row(kind, "long?", "x" * 900, "y"), {"nothing": 1}]
    dropped = make_row(kind, "q?", "same", "same") if kind == "dpo" else {"messages": [{"role": "user", "content": ""}]}
    return write_rows(path, [*rows, dropped])


@pytest.fixture
def save_progress_always(monkeypatch):
    """Small batches, small shards, and a progress file after every batch."""
    monkeypatch.setattr("corpus.examples.BATCH_EXAMPLES", 100)
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr("corpus.shard_writer.SHARD_TOKENS", 9000)


@pytest.fixture
def prepare(process):
    """Run data_process.py; returns the bytes of every file of the dataset."""
    return lambda *arguments, out="out", **flags: read_folder(
        process(*arguments, out=out, **{"max_bad_share": 0.1} | flags)
    )


@pytest.fixture
def interrupted(prepare, monkeypatch):
    """Interrupt a run at batch number `at`; returns the list of batch sizes, which later runs extend."""

    def run(kind, file, at, **flags):
        module, name = (prepare_text, "tokenize_texts") if kind == "pretrain" else (tokenize_chats, "render_examples")
        tokenize, sizes = getattr(module, name), []

        def counted(examples, *rest):
            sizes.append(len(examples))
            if len(sizes) == at:
                raise KeyboardInterrupt
            return tokenize(examples, *rest)

        monkeypatch.setattr(module, name, counted)
        with pytest.raises(KeyboardInterrupt):
            prepare(kind, file, **flags)
        return sizes

    return run


@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("at", [2, 7, 13])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, prepare, interrupted, save_progress_always, kind, at, capsys):
    file = write(tmp_path / "a.jsonl", kind)
    whole = prepare(kind, file)
    assert any(name.endswith("_002.bin") for name in whole)
    sizes = interrupted(kind, file, at)
    partial = tmp_path / "out.partial"
    assert read_folder(tmp_path / "out") == whole, "the older dataset stays until the new one is complete"
    assert f"unfinished work is kept in {partial}: the same command resumes it" in capsys.readouterr().out
    for path in partial.glob("*.jsonl"):
        with path.open("a") as cut:
            cut.write('{"messages": [{"ro')  # a write that was cut by the kill
    (partial / ".progress.json.999999.tmp").write_text('{"job')
    assert prepare(kind, file) == whole and not partial.exists()
    assert "holds an unfinished run: it is resumed" in capsys.readouterr().out
    assert sum(sizes) == 1201 + sizes[at - 1], "only the interrupted batch is tokenized twice"


@pytest.mark.parametrize("kind", ["pretrain", "sft", "dpo"])
@pytest.mark.parametrize("name", ["progress.json", "train_*00[5-9].bin"])
def test_sigkill_at_any_time_resumes_to_the_same_bytes(
    tmp_path, prepare, tokenizer_dir, save_progress_always, kind, name
):
    file = write(tmp_path / "a.jsonl", kind, count=20_000 if kind == "pretrain" else 4000)
    setup = "import data_process; from corpus import examples, job_state, shard_writer; examples.BATCH_EXAMPLES = 100; "
    setup += "job_state.CHECKPOINT_SECONDS = 0; shard_writer.SHARD_TOKENS = 9000; "
    arguments = [kind, file, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out", "--max_bad_share", "0.1"]
    code = setup + f"data_process.main({[*map(str, arguments)]!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "out.partial").rglob(name)) and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "out.partial" / "progress.json").is_file() and not (tmp_path / "out").exists()
    assert prepare(kind, file) == prepare(kind, file, out="whole")


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
@pytest.mark.parametrize("flags", [{"val_share": 0.2}, {"max_seq_len": 60}, {}])
def test_other_flags_or_files_restart_the_job(tmp_path, prepare, interrupted, save_progress_always, kind, flags):
    flags = {"source_key": "file"} if kind == "pretrain" and "max_seq_len" in flags else flags
    file = write(tmp_path / "a.jsonl", kind)
    interrupted(kind, file, 5)
    if not flags:
        write(file, kind, count=700)
    assert prepare(kind, file, **flags) == prepare(kind, file, **flags, out="whole")


def test_another_tokenizer_restarts_the_job(tmp_path, prepare, interrupted, save_progress_always, tokenizer):
    interrupted("sft", file := write(tmp_path / "a.jsonl", "sft"), 5)
    tokenizer.with_chat_format("belle").save(tmp_path / "belle")
    found = prepare("sft", file, tokenizer=tmp_path / "belle")
    assert found == prepare("sft", file, tokenizer=tmp_path / "belle", out="whole")
    assert len({name.split("/")[0] for name in found if "/" in name}) == 1, "no files of the other tokenizer"


def test_a_perplexity_filter_resumes_and_another_one_restarts(
    tmp_path, prepare, interrupted, save_progress_always, tiny_parent, capsys
):
    file, flags = write(tmp_path / "a.jsonl", "sft"), {"scorer": tiny_parent, "keep_entropy": "10%,60%"}
    whole = prepare("sft", file, **flags)
    sizes = interrupted("sft", file, 4, **flags)
    capsys.readouterr()
    assert prepare("sft", file, **flags) == whole
    assert sum(sizes) == sum(json.loads(whole["meta.json"])["rows"].values()) + sizes[3]
    assert "→" in capsys.readouterr().out, "the histogram has examples"
    interrupted("sft", file, 4, **flags)
    flags["keep_entropy"] = "20%,60%"
    other = prepare("sft", file, **flags)
    assert other == prepare("sft", file, **flags) != whole


def test_bad_data_and_runs_without_progress_leave_nothing(
    tmp_path, prepare, interrupted, save_progress_always, monkeypatch
):
    file = write(tmp_path / "a.jsonl", "sft")
    with file.open("a") as more:
        more.writelines("{broken\n" for _ in range(400))
    with pytest.raises(UserError, match="rows read are bad"):
        prepare("sft", file)
    assert visible_names(tmp_path) == ["a.jsonl"]
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 20)
    interrupted("sft", write(file, "sft"), 3)
    assert visible_names(tmp_path) == ["a.jsonl"]


def test_ctrl_c_while_scoring_reports_that_scores_are_kept(tmp_path, prepare, tiny_parent, monkeypatch, capsys):
    from curation.perplexity_scorer import Scorer

    monkeypatch.setattr(Scorer, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare("sft", write(tmp_path / "a.jsonl", "sft"), scorer=tiny_parent)
    assert "scores so far are kept in" in capsys.readouterr().out


COUNTED = st.lists(
    st.tuples(
        st.sampled_from(["row_kept", "row_dropped", "row_truncated", "row_bad"]),
        st.integers(1, 99_999),
        st.sampled_from("abc"),
    )
)


@given(before=COUNTED, after=COUNTED)
def test_counts_before_and_after_a_kill_add_up(before, after):
    whole, first, second = DataStats(1), DataStats(1), DataStats(1)
    for part, counted in ((first, before), (second, after)):
        for report in (part, whole):
            report.row_kept(
                "en", 1, 1, 1, trained_tokens=1
            )  # `to_dict` has truncated chats only if there are trained tokens
            for what, number, name in counted:
                if what == "row_kept":
                    report.row_kept(("zh", "en")[number % 2], number, number, 3 * number, trained_tokens=number // 2)
                else:
                    getattr(report, what)(name, f"{name}:x.jsonl", number)
    second_run = DataStats(1)
    second_run.merge(json.loads(json.dumps(first.to_dict())))
    second_run.merge(second.to_dict())
    assert second_run.to_dict() == whole.to_dict()
    assert (second_run.bad_rows, second_run.dropped_rows) == (whole.bad_rows, whole.dropped_rows)
