"""All commands of the project that write files, on tiny data, for test_kill_matrix.py and test_disk_full.py.

Each stage replaces the result of an older run (other data or another seed). `FaultHarness` has the inputs, runs a
stage with a fault and compares its output with a run without one.
"""

import csv
import io
import json
import math
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.faults.inject import Fault, Injector, RunResult

# Keys whose values differ between two runs of the same command: times, memory, speeds.
VOLATILE = re.compile(r".*(second|minute|time|date|created|memory|speed|per_s|mfu|tflops|started|eta).*|mem")
MODEL = "--dim 16 --n_layers 1 --n_heads 2 --n_kv_heads 2 --max_seq_len 64"
TRAIN = (
    "--device cpu --dtype float32 --batch_size 4 --max_steps 5 --save_interval 2 --eval_interval 3 --log_interval 2"
    " --eval_tokens 256"
)
SAMPLES = {"words": 150, "pretrain": 60, "chats": 40, "pairs": 30, "identity": 30, "questions": 4}
EXAM_HEAD = "id,question,A,B,C,answer\n"


@dataclass(frozen=True)
class Stage:
    """A command line that writes below WORK. IN: the folder of inputs.

    older: additional flags of the older run, or "text->replacement" for its command.
    """

    name: str
    command: str
    older: str = "--seed 1"
    folders: tuple[str, ...] = ()  # output folders below WORK that are replaced atomically
    steps: tuple[str, ...] = ()  # suffixes of files that may contain any step of the run; always readable


def _data(kind: str, source: str, flags: str = "", **more: Any) -> Stage:
    name = more.pop("name", kind)
    return Stage(name, f"data_process.py {kind} IN/raw/{source}.jsonl --out_dir WORK/{name} {flags}",
                 folders=(name,), **{"older": "raw/pretrain->raw/words", **more})  # fmt: skip


def _train(name: str, script: str, data: str, flags: str = "", steps: tuple[str, ...] = (".pth",)) -> Stage:
    """Without an older run: a finished one with other settings is not replaced."""
    return Stage(name, f"{script} --data_path IN/{data} --out_dir WORK {TRAIN} {flags}", "", steps=steps)


def _export(name: str, parent: str, flags: str, older: str) -> Stage:
    command = f"export_model.py IN/out/{parent}_16.pth WORK/exported --overwrite {flags}"
    return Stage(name, command, older, folders=("exported",))


TOKENS = "--tokenizer IN/tok --val_share 0.1"
SHORT = f"{TOKENS} --max_seq_len 64"
CHATS = {"older": "raw/chats->raw/identity"}
STAGES = (
    Stage(
        "demo_world", "-m demo_world.generator --out_dir WORK/world --statement_rounds 1 --chat_rounds 1 --questions 5"
    ),
    Stage(
        "demo_tools",
        "-m demo_world.tool_chats --out_dir WORK/tools --tool_chats 4 --sums 4 --replay 8 --wordings 1 --questions 4",
    ),
    Stage("demo_exam", "-m demo_world.exam --out_dir WORK/exam"),
    Stage("tokenizer", "train_tokenizer.py IN/raw/words.jsonl --vocab_size 400 --out_dir WORK/tok", "words->chats"),
    Stage(
        "tokenizer_table",
        "train_tokenizer.py --compare IN/tok --out WORK/t.md --compare_on IN/raw/words.jsonl",
        "words->chats",
    ),
    _data("pretrain", "pretrain", TOKENS),
    _data("sft", "chats", SHORT, **CHATS),
    _data("sft", "chats", f"{SHORT} --scorer IN/out/pretrain_16.pth --keep_share 0.5", name="sft_scored", **CHATS),
    _data("dpo", "pairs", SHORT, older="--val_share 0.3"),
    _data("rl", "chats", "--val_share 0.1", **CHATS),
    _data("clean", "pretrain"),
    _data("dedup", "pretrain"),
    _data("dedup", "pretrain", "--executor local", name="dedup_many"),
    _data("decontaminate", "pretrain", "--against IN/raw/against.jsonl"),
    Stage("download", "data_process.py download ceval --mirror MIRROR --out_dir WORK/raw", ""),
    _train("pretrain_run", "1-pretrain.py", "pretrain", f"--tokenizer IN/tok {MODEL}"),
    _train(
        "pretrain_mixed",
        "1-pretrain.py",
        "pretrain",
        f"--tokenizer IN/tok {MODEL} --mix zh=0.5,en=0.5 --stage2_mix zh=0.8,en=0.2 --stage2_at 0.5",
    ),
    _train("full_sft", "3-full_sft.py", "sft", "--init_from IN/out/pretrain_16.pth"),
    _train(
        "data_study",
        "3-full_sft.py",
        "sft",
        "--init_from IN/out/pretrain_16.pth --data_share 0.5,1.0 --questions IN/raw/questions.jsonl",
        (".pth", "study.json", "data_study.csv", "data_study.json", "data_study.md"),
    ),
    _train("lora_sft", "4-lora_sft.py", "sft", "--init_from IN/out/full_sft_16.pth --rank 2"),
    _train("dpo_run", "5-dpo_train.py", "dpo", "--init_from IN/out/full_sft_16.pth"),
    _train(
        "grpo_run",
        "6-grpo_train.py",
        "rl",
        "--init_from IN/out/full_sft_16.pth --lora_rank 2 --prompts_per_step 2 --group_size 3 --max_new_tokens 4"
        " --inner_steps 2",
    ),
    _export("export", "full_sft", "", "--dtype bfloat16"),
    _export("export_gguf", "lora_sft", "--gguf f16", "--dtype bfloat16"),
    _export("export_adapter", "lora_sft", "--adapter", "--license mit"),
    Stage(
        "eval",
        "2-eval.py --checkpoint IN/out/full_sft_16.pth --questions IN/raw/questions.jsonl --json WORK/a.json"
        " --max_new_tokens 3",
        "--checkpoint IN/out/pretrain_16.pth",
    ),
    Stage(
        "report",
        "2-eval.py --report IN/out/pretrain_16.pth IN/out/full_sft_16.pth --prompt hello --json WORK/r.json"
        " --max_new_tokens 3 --texts en=IN/raw/pretrain.jsonl --max_bytes 2000 --chats IN/sft/val.jsonl",
    ),
    Stage(
        "exam",
        "eval_ceval.py --data IN/exam --checkpoint IN/out/full_sft_16.pth --out_dir WORK --json WORK/e.json --prompt",
        "--shuffle_options 2 --json WORK/e2.json",
    ),
    Stage(
        "exam_submission",
        "eval_ceval.py --data IN/exam --split test --checkpoint IN/out/full_sft_16.pth --out_dir WORK",
        "--checkpoint IN/out/pretrain_16.pth",
    ),
    Stage("demo", "-m tests.faults.small_demo --out_dir WORK/demo --max_steps 2", "", steps=("",)),
)
STAGE_NAMES = [stage.name for stage in STAGES]
# Scripts and modules that write no files, except caches of libraries and, by atomic_write, tables of benchmarks and
# saved conversations.
READ_ONLY = {
    "serve_openai_api.py",
    "chat_openai_api.py",
    "web_demo.py",
    "train_on.py",  # its own file is steps.json, written by atomic_write; its commands are stages above
    "evaluation.doctor",
    "benchmarks.loaders",
    "benchmarks.rollout_case",
    "benchmarks.rollouts",
    "benchmarks.size_sweep",
    "benchmarks.reference_curves",
    "demo_world.speed",
    "experiments.__main__",
    "benchmarks.machines",
    "benchmarks.bit_for_bit",
    "benchmarks.journeys",
    "benchmarks.call_recorder",
    "benchmarks.compare_commits",
    "benchmarks.inputs",
    "benchmarks.decode_mengya",
    "benchmarks.memory_read",
    "benchmarks.generation",
    "benchmarks.gpu",
    "benchmarks.pretrain_throughput",
    "benchmarks.data",
    "benchmarks.data_case",
    "benchmarks.data_inputs",
    "benchmarks.train_case",
    "benchmarks.training",
    "benchmarks.growth",
    "demo_world.answers_picture",
}


class FaultHarness:
    """Inputs, an injector, and a folder WORK with the same path in every attack.

    With `disk` (an empty folder), the scripts see a tmpfs of 16 MB mounted there, which contains WORK.
    """

    def __init__(self, folder: Path, mirror: str, disk: Path | None = None) -> None:
        self.inputs, self.older = folder / "in", folder / "older"
        self.work = (disk or folder) / "work"
        mount = 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"'
        self.injector = Injector(["unshare", "-rm", "sh", "-c", mount, str(disk)] if disk else ())
        self.view = self.work  # path of WORK in this process
        if disk:
            self.injector.run(["-m", "calendar"], [])  # returns after the mount
            self.view = Path(f"/proc/{self.injector.server.pid}/root{self.work}")
        self.mirror = mirror
        self.expected: dict[str, dict[str, Any]] = {}
        self.before: dict[str, dict[str, Any]] = {}
        self.undisturbed: dict[str, RunResult] = {}
        self.prepare_inputs()

    def prepare_inputs(self) -> None:
        raw = self.inputs / "raw"
        raw.mkdir(parents=True)
        self.run_checked(
            "-m demo_world.generator --out_dir IN/world --statement_rounds 1 --chat_rounds 1 --questions 5"
        )
        for name, count in SAMPLES.items():
            lines = (self.inputs / f"world/{name}.jsonl").read_text(encoding="utf-8").splitlines(True)
            step = max(1, len(lines) // count)
            (raw / f"{name}.jsonl").write_text("".join(lines[::step][:count]), encoding="utf-8")
        texts = [json.loads(line)["text"] for line in (raw / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()]
        questions = [json.dumps({"question": text}) + "\n" for text in texts[::20]]
        (raw / "against.jsonl").write_text("".join(questions), encoding="utf-8")
        for split, key in (("dev", "B"), ("val", "A"), ("test", "")):
            (self.inputs / "exam" / split).mkdir(parents=True)
            for subject in ("law", "physics"):
                rows = [f"{i},{split}: what does book {i} say of {subject}?,yes,no,maybe,{key}\n" for i in range(3)]
                (self.inputs / "exam" / split / f"{subject}_{split}.csv").write_text(EXAM_HEAD + "".join(rows))
        out = f"--out_dir IN/out {TRAIN}"
        for command in (
            "train_tokenizer.py IN/raw/words.jsonl --vocab_size 400 --out_dir IN/tok",
            f"data_process.py pretrain IN/raw/pretrain.jsonl --out_dir IN/pretrain {TOKENS}",
            f"data_process.py sft IN/raw/chats.jsonl --out_dir IN/sft {SHORT}",
            f"data_process.py dpo IN/raw/pairs.jsonl --out_dir IN/dpo {SHORT}",
            "data_process.py rl IN/raw/chats.jsonl --out_dir IN/rl --val_share 0.1",
            f"1-pretrain.py --data_path IN/pretrain --tokenizer IN/tok {MODEL} {out}",
            f"3-full_sft.py --data_path IN/sft {out}",
            f"4-lora_sft.py --data_path IN/sft --rank 2 {out}",
        ):
            self.run_checked(command)

    def argv(self, command: str) -> list[str]:
        places = {"IN": str(self.inputs), "WORK": str(self.work), "MIRROR": self.mirror}
        return [re.sub("IN|WORK|MIRROR", lambda found: places[found[0]], word) for word in command.split()]

    def run_checked(self, command: str) -> RunResult:
        done = self.injector.run(self.argv(command), [self.work])
        assert done.code == 0, f"{command}\n{done.output}"
        return done

    def stage(self, name: str, twice: bool = False) -> Stage:
        """A stage, after its older run and a run without fault. `twice`: a second run must give equal output."""
        stage = STAGES[STAGE_NAMES.index(name)]
        if name not in self.expected:
            shutil.rmtree(self.view, ignore_errors=True)
            self.view.mkdir()
            if stage.older:
                old, _, new = stage.older.partition("->")
                self.run_checked(stage.command.replace(old, new) if new else f"{stage.command} {old}")
            self.before[name] = comparable_contents(self.view)
            shutil.copytree(self.view, self.older / name)
            self.undisturbed[name] = self.run_checked(stage.command)
            self.expected[name] = comparable_contents(self.view)
            assert self.expected[name] != self.before[name], "the older run must differ"
        if twice:
            self.reset_work_folder(stage)
            self.undisturbed[name] = self.run_checked(stage.command)  # faster: all modules are imported
            assert self.expected[name] == (again := comparable_contents(self.view)), describe_difference(
                again, self.expected[name]
            )
        return stage

    def reset_work_folder(self, stage: Stage) -> None:
        shutil.rmtree(self.view)
        shutil.copytree(self.older / stage.name, self.view)

    def run(self, stage: Stage, fault: Fault | None = None) -> RunResult:
        return self.injector.run(self.argv(stage.command), [self.work], fault)

    def check_no_partial_output(self, stage: Stage, after: str) -> None:
        """Each final name has the older result, the new one, or a readable intermediate step of the run."""
        found, before, new = comparable_contents(self.view), self.before[stage.name], self.expected[stage.name]
        for folder in stage.folders:
            mine, old, wanted = (
                {name: value for name, value in tree.items() if name.startswith(f"{folder}/")}
                for tree in (found, before, new)
            )
            assert mine in ({}, old, wanted), (
                f"{after}: {folder} is partly written: {describe_difference(mine, wanted)}"
            )
        for name, value in found.items():
            if (
                is_unfinished(name)
                or name.endswith(stage.steps or ("\0",))
                or name.endswith((".jsonl", ".png", ".html"))
            ):
                continue  # comparable_contents has read it
            assert value in (before.get(name), new.get(name)), f"{after}: {name} is neither the older nor the new one"

    def check_finished(self, stage: Stage, after: str) -> None:
        """The output equals that of a run without fault; no temporary file is left and no lock is held."""
        found = comparable_contents(self.view)
        assert found == self.expected[stage.name], f"{after}: {describe_difference(found, self.expected[stage.name])}"
        left = [
            name
            for name in relative_paths(self.view)
            if is_unfinished(name) and not re.search(r"\.lock$|\.log(/|$)", name)
        ]
        assert not left, f"{after}: left over: {left}"
        for lock in self.view.rglob(".*.lock"):
            FileLock(lock, timeout=0).acquire().lock.release()


def is_unfinished(name: str) -> bool:
    """True for files of incomplete work, locks and temporary names."""
    return bool(
        re.search(r"(^|/)\.[^/]*|\.(tmp|part|partial|resume|log|old|gone)(/|$)|\.part\.json$|\.progress$", name)
    )


def relative_paths(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def describe_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    lines = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    lines += [f"{name} is unexpected" for name in found.keys() - wanted.keys()]
    lines += [f"{name} differs" for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    return ", ".join(lines[:8])


def comparable_contents(folder: Path) -> dict[str, Any]:
    """Contents of the finished files without VOLATILE values. Raises AssertionError for a partly written file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not is_unfinished(name):
            try:
                found[name] = comparable_content(path)
            except Exception as error:
                raise AssertionError(f"{name} is damaged: {error!r}") from error
    return found


def comparable_content(path: Path) -> Any:
    data, end = path.read_bytes(), path.suffix
    if end == ".pth":
        import torch

        return without_volatile(torch.load(io.BytesIO(data), weights_only=True))
    if end == ".json":
        return without_volatile(json.loads(data))
    if end == ".jsonl":  # a log may end in a truncated line, which the next run drops
        rows = [without_volatile(json.loads(line)) for line in data.split(b"\n")[:-1] if line]
        return sorted(rows) if ".scores-" in path.name else rows  # scores are appended as they are computed
    if end == ".html":  # the page of the runs, with their durations
        assert data.rstrip().endswith(b"</html>"), "a truncated page"
        return "a page"
    if end == ".png":
        assert data[:4] == b"\x89PNG" and data[-8:-4] == b"IEND", "a truncated image"
        return "an image"
    if end == ".csv":
        return without_volatile(list(csv.DictReader(io.StringIO(data.decode()))))
    if end == ".md":  # contains durations and speeds; the .json beside it has the exact numbers
        return re.sub(r"[\d.,]+", "N", data.decode())
    return len(data), zlib.crc32(data)


def without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_volatile(item) for key, item in value.items() if not VOLATILE.fullmatch(str(key))}
    if isinstance(value, (list, tuple)):
        return [without_volatile(item) for item in value]
    if hasattr(value, "numpy"):
        return str(value.dtype), tuple(value.shape), zlib.crc32(value.contiguous().numpy().tobytes())
    return "nan" if isinstance(value, float) and math.isnan(value) else value
