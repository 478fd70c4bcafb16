"""Promise: a killed `data_process.py sft` or `dpo` resumes to the same bytes, and never from another job's files."""

import json
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_process
from common.errors import UserError
from corpus import tokenize_chats
from corpus.stats import DataStats
from tests.helpers import ROOT


def make_messages(question, *answers):
    """A chat for one answer, a pair for two."""
    if len(answers) == 2:
        return {"prompt": question, "chosen": answers[0], "rejected": answers[1]}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answers[0]}]}


def row(kind, i):
    good, bad = (f"It is {i + 1}.", f"No idea {i}") if i % 2 else (f"是 {i + 1}。", f"不知道{i}")
    question = f"What is {i} + 1?" if i % 2 else f"{i} 加 1 是多少？"
    return make_messages(question, *[good, bad][: 1 + (kind == "dpo")])


def write(path, kind, count=1200):
    """Rows of every counted kind: duplicates, a row that is too long, bad rows, an empty answer."""
    rows = [row(kind, i) for i in range(count)] + [row(kind, i) for i in range(0, 90, 9)]
    rows[500:500] = [make_messages("long?", *["x" * 900, "y"][: 1 + (kind == "dpo")]), {"nothing": 1}]
    rows.append(
        {"messages": [{"role": "user", "content": "alone"}]} if kind == "sft" else make_messages("q?", "same", "same")
    )
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return path


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def save_progress_always(monkeypatch):
    """Small batches, small shards, and a progress file after every batch."""
    monkeypatch.setattr("corpus.examples.BATCH_EXAMPLES", 100)
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr("corpus.shard_writer.SHARD_TOKENS", 9000)


@pytest.fixture
def process(tmp_path, tokenizer_dir):
    def run(kind, file, *flags, out="out"):
        common = [kind, file, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / out, "--max_bad_share", 0.1]
        data_process.main([*map(str, [*common, *flags])])
        return content(tmp_path / out)

    return run


@pytest.fixture
def interrupted(process, monkeypatch):
    """Interrupt a run at batch number `at`; returns the list of batch sizes, which later runs extend."""

    def run(kind, file, *flags, at):
        render_examples, sizes = tokenize_chats.render_examples, []

        def render(examples, *rest):
            sizes.append(len(examples))
            if len(sizes) == at:
                raise KeyboardInterrupt
            return render_examples(examples, *rest)

        monkeypatch.setattr(tokenize_chats, "render_examples", render)
        with pytest.raises(KeyboardInterrupt):
            process(kind, file, *flags)
        return sizes

    return run


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("at", [2, 7, 13])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path, process, interrupted, save_progress_always, kind, at, capsys):
    file = write(tmp_path / "a.jsonl", kind)
    whole = process(kind, file, out="whole")
    assert any(name.endswith("train_002.bin") for name in whole)
    sizes = interrupted(kind, file, at=at)
    partial = tmp_path / "out.partial"
    assert f"unfinished work is kept in {partial}: the same command resumes it" in capsys.readouterr().out
    for name in ("train.jsonl", "val.jsonl"):
        with (partial / name).open("a") as cut:
            cut.write('{"messages": [{"ro')  # a write that was cut by the kill
    (partial / ".progress.json.999999.tmp").write_text('{"job')
    assert process(kind, file) == whole and not partial.exists()
    assert "holds an unfinished run: it is resumed" in capsys.readouterr().out
    assert sum(sizes) == 1201 + sizes[at - 1], "only the interrupted batch is tokenised twice"


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("name", ["progress.json", "tokens-*/train_007.bin"])
def test_sigkill_at_any_time_resumes_to_the_same_bytes(
    tmp_path, process, tokenizer_dir, save_progress_always, kind, name
):
    file = write(tmp_path / "a.jsonl", kind, count=4000)
    setup = "import data_process; from corpus import examples, job_state, shard_writer; examples.BATCH_EXAMPLES = 100; "
    setup += "job_state.CHECKPOINT_SECONDS = 0; shard_writer.SHARD_TOKENS = 9000; "
    arguments = [kind, file, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out", "--max_bad_share", "0.1"]
    code = setup + f"data_process.main({[*map(str, arguments)]!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not list((tmp_path / "out.partial").glob(name)) and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (tmp_path / "out.partial" / "progress.json").is_file() and not (tmp_path / "out").exists()
    assert process(kind, file) == process(kind, file, out="whole")


@pytest.mark.parametrize("flags", [("--val_share", "0.2"), ("--max_seq_len", "60"), ("other file",)])
def test_changed_flags_restart_the_job(tmp_path, process, interrupted, save_progress_always, flags):
    file = write(tmp_path / "a.jsonl", "sft")
    interrupted("sft", file, at=5)
    if flags == ("other file",):
        file, flags = write(file, "sft", count=700), ()
    assert process("sft", file, *flags) == process("sft", file, *flags, out="whole")


def test_another_tokenizer_restarts_the_job(tmp_path, process, interrupted, save_progress_always, tokenizer):
    interrupted("sft", file := write(tmp_path / "a.jsonl", "sft"), at=5)
    tokenizer.with_chat_format("belle").save(tmp_path / "belle")
    found = process("sft", file, "--tokenizer", tmp_path / "belle")
    assert found == process("sft", file, "--tokenizer", tmp_path / "belle", out="whole")
    assert len({name.split("/")[0] for name in found if "/" in name}) == 1, "no files of the other tokenizer"


def test_a_perplexity_filter_resumes_and_another_one_restarts(
    tmp_path, process, interrupted, save_progress_always, tiny_parent, capsys
):
    file = write(tmp_path / "a.jsonl", "sft")
    scorer = ("--scorer", tiny_parent, "--keep_entropy")
    whole = process("sft", file, *scorer, "10%,60%")
    sizes = interrupted("sft", file, *scorer, "10%,60%", at=4)
    capsys.readouterr()
    assert process("sft", file, *scorer, "10%,60%") == whole
    assert sum(sizes) == sum(json.loads(whole["meta.json"])["rows"].values()) + sizes[3]
    assert "→" in capsys.readouterr().out, "the histogram has examples"
    interrupted("sft", file, *scorer, "10%,60%", at=4)
    other = process("sft", file, *scorer, "20%,60%")
    assert other == process("sft", file, *scorer, "20%,60%") != whole


def test_bad_data_and_runs_without_progress_leave_nothing(
    tmp_path, process, interrupted, save_progress_always, monkeypatch
):
    file = write(tmp_path / "a.jsonl", "sft")
    with file.open("a") as more:
        more.writelines("{broken\n" for _ in range(400))
    with pytest.raises(UserError, match="rows read are bad"):
        process("sft", file)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["a.jsonl"]
    monkeypatch.setattr("corpus.job_state.CHECKPOINT_SECONDS", 20)
    interrupted("sft", write(file, "sft"), at=3)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["a.jsonl"]


def test_ctrl_c_while_scoring_reports_that_scores_are_kept(tmp_path, process, tiny_parent, monkeypatch, capsys):
    from curation.perplexity_scorer import Scorer

    monkeypatch.setattr(Scorer, "score_chats", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        process("sft", write(tmp_path / "a.jsonl", "sft"), "--scorer", tiny_parent)
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
