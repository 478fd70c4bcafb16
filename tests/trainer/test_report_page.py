"""The page of the runs: no requests, no script of a model, readable also where a file of the folder is damaged."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest

from tests.helpers import write_rows

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}</table>"


@pytest.fixture
def write_page(curves):
    from trainer.report_page import write_page

    return lambda *given: write_page(*given).read_text(encoding="utf-8")


def training_rows(steps=5, samples=None, **more):
    rows = [{"step": s, "loss": 5.0 / s, "tokens": 100 * s, "train_bits_per_byte": 3.0 / s, "seconds": 6.0 * s, **more}
            for s in range(1, steps + 1)]  # fmt: skip
    rows.append(
        {"step": steps, "tokens": 500, "val_loss": {"zh": 1.25, "en": 1.5}, "bits_per_byte": {"zh": 1, "en": 2}}
    )
    return rows + [{"step": step, "samples": [{"prompt": EVIL, "answer": f"{step} {EVIL}", "reference": EVIL}]}
                   for step in samples or ()]  # fmt: skip


class Tags(HTMLParser):
    """Collects the tags and the addresses in them, and checks that they are closed in order."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.addresses = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def images(page):
    return [base64.b64decode(part).decode() for part in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]


def answers_file(folder, name, checkpoint, answers):
    rows = [{"question": q, "answer": a, "correct": ok, "keys": [], "lang": "en"} for q, a, ok in answers]
    content = {"checkpoint": checkpoint, "stage": "x", "answers": rows, "counts": {"en": {"accuracy": 0.5}}}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_the_page_is_self_contained_and_escapes_the_text_of_models(write_page, tmp_path):
    write_rows(tmp_path / "pretrain_64.jsonl", training_rows(samples=range(0, 60, 2)))
    answers_file(tmp_path, "a.json", f"out/pretrain{EVIL.replace('/', '')}.pth", [(EVIL, EVIL, False)])
    answers_file(tmp_path, "b.json", "out/full_sft_64.pth", [(EVIL, "fine", True)])
    page = write_page(tmp_path)
    found = Tags(page)
    assert not {"script", "link", "iframe", "object", "style2"} & set(found.tags) and found.tags.count("style") == 1
    assert all(address.startswith(("data:image/svg+xml;base64,", "#")) for address in found.addresses)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", page).replace("http-equiv", "") and "default-src 'none'" in page
    assert "{{ 7*7 }}" in page and ">49<" not in page and page.count("alert(1)") > 10
    steps = [int(step) for step in re.findall(r"step (\d+)</td>", page)]
    assert len(steps) == 8 and steps[0] == 0 and steps[-1] == 58, "the first, the last and some between"


def test_the_stages_stand_in_the_order_of_training_with_their_figures(write_page, tmp_path):
    for name in ("full_sft_64", "pretrain_64", "lora_sft_64"):
        write_rows(tmp_path / f"{name}.jsonl", training_rows())
    page = write_page(tmp_path)
    assert re.findall(r'<h2 id="(\w+)">', page) == ["pretrain_64", "full_sft_64", "lora_sft_64"]
    assert page.count("zh 1.250, en 1.500") == 3 and page.count("<img") == 6 and "500 tokens" in page


def test_the_band_of_the_reference_runs_is_drawn_for_runs_that_have_one(write_page, tmp_path):
    write_rows(tmp_path / "pretrain_64.jsonl", training_rows())
    without = images(write_page(tmp_path))
    band = {"step": 0, "reference": [[100, 1.0, 2.0, 3.0], [500, 0.5, 1.0, 1.5]]}
    write_rows(tmp_path / "pretrain_64.jsonl", [band, *training_rows()])
    drawn = images(write_page(tmp_path))
    assert "reference runs" in drawn[0] and not any("reference runs" in image for image in without)


def test_rewards_pairs_and_experts_have_their_panels(write_page, tmp_path):
    rollouts = [{"step": s, "loss": 0.0, "answers": 8 * s, "reward": 0.5, "pass@1": 0.5, "entropy": 1.0, "kl": 0.1,
                 "clip_fraction": 0.0, "no_signal": 0.5, "answer_length": 9.0} for s in (1, 2)]  # fmt: skip
    write_rows(tmp_path / "grpo_64.jsonl", [*rollouts, {"step": 2, "answers": 16, "val_reward": {"en": 0.75}}])
    pairs = [{"step": 1, "loss": 0.7, "pairs": 4}, {"step": 2, "loss": 0.5, "pairs": 8},
             {"step": 2, "pairs": 8, "val_loss": {"en": 0.6}, "val_reward_accuracy": {"en": 0.9}}]  # fmt: skip
    write_rows(tmp_path / "dpo_64.jsonl", pairs)
    load = {"step": 5, "samples": [], "expert_load": [[0.7, 0.3], [0.4, 0.6]]}
    write_rows(tmp_path / "pretrain_64_moe.jsonl", [*training_rows(), load])
    page = write_page(tmp_path)
    drawn = images(page)
    for text in ("reward accuracy, validation", "tokens per answer", "held-out reward en", "layer"):
        assert sum(text in image for image in drawn) == 1, text
    assert "70%" in next(image for image in drawn if "layer" in image) and "Expert load at step 5" in page
    assert "reward en 0.750" in page and "16 answers" in page


def test_only_questions_of_all_models_stand_side_by_side(write_page, tmp_path):
    answers_file(
        tmp_path, "one.json", f"{tmp_path.name}/pretrain_64.pth", [("common", "no", False), ("zebra", "x", True)]
    )
    answers_file(tmp_path, "two.json", f"{tmp_path.name}/full_sft_64.pth", [("common", "yes", True)])
    report = {"prompts": [{"prompt": "common"}], "models": [{"label": "served", "answers": [{"answer": "maybe"}]}]}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "report.json").write_text(json.dumps(report))
    page = write_page(tmp_path)
    assert "zebra" not in page and re.findall(r"<th>(pretrain_64|full_sft_64|served)</th>", page) == [
        "pretrain_64", "full_sft_64", "served"
    ]  # fmt: skip
    assert (
        '<span class="bad">✗</span> no' in page
        and '<span class="good">✓</span> yes' in page
        and "<td>maybe</td>" in page
    )
    other = tmp_path / "elsewhere.txt"
    other.write_text(json.dumps({**report, "models": [{"label": "other", "answers": [{"answer": "hm"}]}]}))
    assert "<td>hm</td>" in write_page(tmp_path, other)


def test_exam_bars(write_page, tmp_path):
    folder = tmp_path / "ceval" / "model_exam"
    folder.mkdir(parents=True)
    (folder / "summary.csv").write_text(
        "\ufeffkind,name,category,questions,correct,accuracy,chance\nsubject,sums,STEM,4,3,0.75,0.25\n"
        "all,all,,4,3,0.75,0.25\n", encoding="utf-8"
    )  # fmt: skip
    page = write_page(tmp_path)
    assert (
        "model_exam" in page
        and "all (4)" in images(page)[0]
        and "75%" in images(page)[0]
        and "chance" in images(page)[0]
    )


def test_damaged_and_foreign_files_are_skipped(write_page, tmp_path):
    write_rows(tmp_path / "pretrain_64.jsonl", training_rows())
    (tmp_path / "full_sft_64.jsonl").write_bytes(b'\xff{"step": 1, "loss": 1.0}\n{"step"\n[]\n')
    write_rows(tmp_path / "lora_sft_64.jsonl", [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])  # no tokens
    for i, content in enumerate(["[", "[]", "{}", '{"models": 3}', '{"answers": [1]}', "[" * 100_000, "null", '"a"']):
        (tmp_path / f"{i}.json").write_text(content)
    (tmp_path / "ceval" / "x").mkdir(parents=True)
    (tmp_path / "ceval" / "x" / "summary.csv").write_text("kind,name\n")
    page = write_page(tmp_path)
    assert 'id="pretrain_64"' in page and page.count("<img") == 2 and 'id="scores"' not in page


def test_an_empty_folder_gives_a_page(write_page, tmp_path):
    tags = Tags(write_page(tmp_path)).tags
    assert tags.count("h1") == 1 and "table" not in tags
