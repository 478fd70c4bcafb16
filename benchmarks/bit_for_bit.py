"""Check that two commits produce the same outputs, bit for bit.

    python benchmarks/bit_for_bit.py OLD_COMMIT              compare with HEAD, without uncommitted changes
    python benchmarks/bit_for_bit.py OLD_COMMIT NEW_COMMIT   compare two commits; --keep keeps both outputs

Each commit is checked out in a temporary git worktree and runs a small pipeline there, on the CPU in float32 with one
thread and a fixed seed: demo world, tokenizer, datasets, pretraining (50 steps), full SFT (50), LoRA SFT (30) and its
merged export, DPO (20), pretraining of a mixture of experts (20). All stages but the last also save greedy answers.
Every output file is compared:

    tokenizer, token shards, text, exported weights    byte by byte
    *.pth, *.reference                                 every tensor with torch.equal, every other value with ==
    meta.json, logs, answers                           every value, with renamed keys mapped and volatile keys ignored

Takes two minutes of CPU time. Exit code 0: equal; 1: an output differs or a command failed; 2: wrong usage.
Read next: ../demo.py (the same pipeline with a larger model and world).
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("out/bit_for_bit")  # relative to the worktree, so that paths inside checkpoints are equal

# Metric keys of logs and checkpoints, old -> new; also with the prefix val_ and the suffix _before.
RENAMED_METRICS = (
    ("real_token_share", "token_fraction"),
    ("likelier", "chosen_preferred"),
    ("margin", "reward_margin"),
    ("accuracy", "reward_accuracy"),
    ("chosen_change", "chosen_logp_delta"),
    ("balance_loss", "aux_loss"),
)
RENAMED_LOG_KEYS = dict(RENAMED_METRICS)
# Other keys of meta.json, checkpoints and answers, old -> new.
RENAMED_KEYS: dict[str, str] = {}
# Keys whose values differ between two runs of one commit: times, speeds, memory.
VOLATILE_KEYS = {"seconds", "seconds_left", "tokens_per_second", "peak_memory_mb", "tflops", "mfu"}
# Ignored: the checksum of meta.json itself, which differs if a key was renamed. Its values are compared one by one.
CHECKSUM_KEYS = {"checksum"}

# Modules that write the demo world, newest first. The first one that exists in a commit is run.
DEMO_WORLD_MODULES = ("demo_world.generator", "demo_world", "corpus.demo_world")
STAGES = ("pretrain", "full_sft", "lora_sft", "dpo")
DIM = 64
PROMPTS = (
    "The capital of France is",
    "What is the capital of France?",
    "How many days are there in a week?",
    "Who are you?",
    "法国的首都是",
    "法国的首都是哪座城市？",
    "三加四等于几？",
    "你是谁？",
)
MODEL = f"--dim {DIM} --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 128"
TRAIN = (
    "--device cpu --dtype float32 --seed 1 --batch_size 8 --log_interval 5 --eval_interval 10 --eval_tokens 2048"
    " --save_interval 20"
)
COMMANDS = (
    "-m {demo_world} --out_dir {out}/world --seed 1 --statement_rounds 4 --chat_rounds 1 --questions 20",
    "train_tokenizer.py {out}/world/words.jsonl --vocab_size 1024 --out_dir {out}/tokenizer",
    "data_process.py pretrain {out}/world/pretrain.jsonl --tokenizer {out}/tokenizer --out_dir {out}/data/pretrain",
    "data_process.py sft {out}/world/chats.jsonl --max_seq_len 128 --tokenizer {out}/tokenizer"
    " --out_dir {out}/data/sft",
    "data_process.py sft {out}/world/identity.jsonl --max_seq_len 128 --tokenizer {out}/tokenizer"
    " --out_dir {out}/data/identity",
    "data_process.py dpo {out}/world/pairs.jsonl --max_seq_len 128 --tokenizer {out}/tokenizer"
    " --out_dir {out}/data/dpo",
    "1-pretrain.py --data_path {out}/data/pretrain --tokenizer {out}/tokenizer {model} {train} --max_steps 50"
    " --out_dir {out}",
    "2-eval.py --checkpoint {out}/pretrain_{dim}.pth {answer} --json {out}/answers_pretrain.json",
    "3-full_sft.py --data_path {out}/data/sft {train} --max_steps 50 --out_dir {out}",
    "2-eval.py --checkpoint {out}/full_sft_{dim}.pth {answer} --json {out}/answers_full_sft.json",
    "4-lora_sft.py --data_path {out}/data/identity {train} --max_steps 30 --out_dir {out}",
    "2-eval.py --checkpoint {out}/lora_sft_{dim}.pth {answer} --json {out}/answers_lora_sft.json",
    "export_model.py {out}/lora_sft_{dim}.pth {out}/merged --no-verify",
    "5-dpo_train.py --data_path {out}/data/dpo {train} --max_steps 20 --out_dir {out}",
    "2-eval.py --checkpoint {out}/dpo_{dim}.pth {answer} --json {out}/answers_dpo.json",
    "1-pretrain.py --data_path {out}/data/pretrain --tokenizer {out}/tokenizer {model} {train} --max_steps 20"
    " --use_moe --optimizer adamw --out_dir {out}/moe",
)
ANSWER = "--prompts {out}/prompts.txt --temperature 0 --max_new_tokens 32 --device cpu --dtype float32"

Value = Any  # from JSON or torch.load: dicts, lists, numbers, strings, tensors


class CommandFailed(Exception):
    """A command of the pipeline failed."""


# ---- running the pipeline --------------------------------------------------------------------------------------------
def run_git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    completed = subprocess.run(command, capture_output=True, text=True)  # a fixed program, no shell  # nosec B603
    if completed.returncode:
        raise CommandFailed(f"git {' '.join(arguments)}: {completed.stderr.strip()}")
    return completed.stdout.strip()


def demo_world_module(tree: Path) -> str:
    """Return the module of this commit that writes the demo world with `python -m`."""
    for module in DEMO_WORLD_MODULES:
        base = tree / module.replace(".", "/")
        file = base.with_suffix(".py")
        if (base / "__main__.py").is_file() or (file.is_file() and "__main__" in file.read_text(encoding="utf-8")):
            return module
    raise CommandFailed(f"none of {', '.join(DEMO_WORLD_MODULES)} writes the demo world: extend DEMO_WORLD_MODULES")


def run_pipeline(tree: Path, label: str) -> float:
    """Run all COMMANDS in a worktree and print each. Returns the seconds. Raises CommandFailed if a command fails."""
    started = time.perf_counter()
    (tree / OUT).mkdir(parents=True)
    (tree / OUT / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    names = {"out": OUT.as_posix(), "dim": DIM, "model": MODEL, "train": TRAIN, "demo_world": demo_world_module(tree)}
    names["answer"] = ANSWER.format(**names)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
    for name in ("PYTHONPATH", "WORLD_SIZE", "RANK", "LOCAL_RANK"):
        environment.pop(name, None)
    for command in COMMANDS:
        words = command.format(**names).split()
        print(f"{label}  python {' '.join(words[:2])} ...", flush=True)
        completed = subprocess.run(  # fixed commands, no shell
            [sys.executable, *words], cwd=tree, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace",
        )  # fmt: skip  # nosec B603
        if completed.returncode:
            last = "\n".join(completed.stdout.splitlines()[-15:])
            raise CommandFailed(f"{label}: exit code {completed.returncode} of: python {' '.join(words)}\n{last}")
    return time.perf_counter() - started


# ---- comparing -------------------------------------------------------------------------------------------------------
def current_key(key: str) -> str:
    """Return the current name of a metric or another key; current names stay unchanged."""
    prefix, suffix = ("val_" if key.startswith("val_") else ""), ("_before" if key.endswith("_before") else "")
    metric = key.removeprefix("val_").removesuffix("_before")
    return f"{prefix}{RENAMED_LOG_KEYS[metric]}{suffix}" if metric in RENAMED_LOG_KEYS else RENAMED_KEYS.get(key, key)


def canonical_value(value: Value) -> Value:
    """Return the value with current keys and without volatile keys. All other values stay unchanged."""
    if isinstance(value, dict):
        skipped = VOLATILE_KEYS | CHECKSUM_KEYS
        return {current_key(str(key)): canonical_value(item) for key, item in value.items() if key not in skipped}
    return [canonical_value(item) for item in value] if isinstance(value, (list, tuple)) else value


def first_difference(old: Value, new: Value, where: str = "") -> str:
    """Describe the first difference of two canonical values, or return "". NaN equals NaN; 1 and 1.0 differ."""
    if type(old) is not type(new):
        return f"{where}: {format_value(old)} is now {format_value(new)}"
    if isinstance(old, dict):
        if old.keys() != new.keys():
            removed, added = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
            return f"{where}: keys only in the old output: {removed}, only in the new output: {added}"
        found = (first_difference(old[key], new[key], f"{where}.{key}".lstrip(".")) for key in old)
        return next(filter(None, found), "")
    if isinstance(old, list):
        if len(old) != len(new):
            return f"{where}: {len(old)} entries, now {len(new)}"
        found = (first_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True)))
        return next(filter(None, found), "")
    if isinstance(old, torch.Tensor):
        return tensor_difference(old, new, where)
    same = old == new or (isinstance(old, float) and old != old and new != new)
    return "" if same else f"{where}: {format_value(old)} is now {format_value(new)}"


def tensor_difference(old: torch.Tensor, new: torch.Tensor, where: str) -> str:
    if old.dtype != new.dtype or old.shape != new.shape:
        return f"{where}: {old.dtype} {tuple(old.shape)} is now {new.dtype} {tuple(new.shape)}"
    if torch.equal(old, new):
        return ""
    changed = int((old != new).sum())
    largest = (old.double() - new.double()).abs().max().item()
    return f"{where}: {changed:,} of {old.numel():,} values differ, by at most {largest:.3g}"


def format_value(value: Value) -> str:
    text = f"tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_output(path: Path) -> Value:
    """Read an output file as a canonical value, or as bytes if its format has no renamed or volatile keys."""
    if path.suffix in (".pth", ".reference"):
        return canonical_value(torch.load(path, map_location="cpu", weights_only=True))
    is_json_output = path.name == "meta.json" or path.name.startswith("answers_")
    if is_json_output and path.suffix == ".json":
        return canonical_value(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl" and path.with_suffix(".pth").is_file():  # a training log
        return [canonical_value(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return path.read_bytes()


def output_files(folder: Path) -> dict[str, str]:
    """Return {relative path: row of the result table} without hidden files, plots, the model card and its lineage."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in Path(name).parts)
        excluded = path.suffix == ".png" or (name.startswith("merged/") and path.name in ("README.md", "lineage.json"))
        if path.is_file() and not hidden and not excluded:
            found[name] = table_row(path, name)
    return found


def table_row(path: Path, name: str) -> str:
    if path.suffix == ".pth":
        return "weights, config, stage, lineage"
    if path.suffix == ".jsonl" and path.with_suffix(".pth").is_file():
        return "logs"
    rows = {"tokenizer": "tokenizer", "data": "datasets and token shards", "merged": "merged model, exported"}
    first = name.split("/")[0]
    return "answers" if first.startswith("answers_") else rows.get(first, "demo world, reference log-probabilities")


def compare_outputs(old: Path, new: Path) -> dict[str, list[str]]:
    """Return {row of the result table: [first difference of each file, "" if the file is equal]}."""
    before, after = output_files(old), output_files(new)
    results: dict[str, list[str]] = {}
    for name in sorted(before.keys() | after.keys()):
        row = before.get(name) or after[name]
        if name not in before or name not in after:
            problem = f"{name} is only in the {'old' if name in before else 'new'} output"
        else:
            values = read_output(old / name), read_output(new / name)
            problem = byte_difference(*values) if isinstance(values[0], bytes) else first_difference(*values)
            problem = problem and f"{name}: {problem}"
        results.setdefault(row, []).append(problem)
    return results


def byte_difference(old: bytes, new: bytes) -> str:
    if old == new:
        return ""
    at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    return f"{len(old):,} bytes, now {len(new):,}; the first difference is at byte {at:,}"


def check_complete(folder: Path) -> None:
    """Raise CommandFailed if an expected output is missing. Without this check two empty folders would be equal."""
    wanted = [f"{stage}_{DIM}{suffix}" for stage in STAGES for suffix in (".pth", ".jsonl")]
    wanted += [f"answers_{stage}.json" for stage in STAGES] + [
        f"moe/pretrain_{DIM}_moe{suffix}" for suffix in (".pth", ".jsonl")
    ]
    wanted += ["tokenizer/tokenizer.json", f"dpo_{DIM}.reference", "merged/model.safetensors"]
    wanted += [f"data/{name}/meta.json" for name in ("pretrain", "sft", "identity", "dpo")]
    if missing := [name for name in wanted if not (folder / name).is_file()]:
        raise CommandFailed(f"{folder} lacks {', '.join(missing)}")


# ---- the command -----------------------------------------------------------------------------------------------------
def print_table(results: dict[str, list[str]]) -> None:
    print(f"\n{'compared':<42} {'files':>5}  result")
    for row, problems in sorted(results.items()):
        different = [problem for problem in problems if problem]
        print(f"{row:<42} {len(problems):>5}  {f'{len(different)} differ' if different else 'equal'}")
        for problem in different[:3]:
            print(f"    {problem}")


def run_both_commits(commits: list[str], folder: Path) -> list[Path]:
    """Run the pipeline of both commits at the same time. Returns their output folders."""
    trees = [folder / "old", folder / "new"]
    for commit, tree in zip(commits, trees, strict=True):
        run_git("worktree", "add", "--detach", "--quiet", str(tree), commit)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_pipeline, tree, tree.name) for tree in trees]
        for commit, tree, run in zip(commits, trees, runs, strict=True):
            print(f"{tree.name} ({commit[:12]}): {run.result():.0f} seconds", flush=True)
    for tree in trees:
        check_complete(tree / OUT)
    return [tree / OUT for tree in trees]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD_COMMIT", help="commit to compare with")
    parser.add_argument("new", metavar="NEW_COMMIT", nargs="?", default="HEAD", help="commit to check (default: HEAD)")
    parser.add_argument("--keep", action="store_true", help="keep the worktrees and outputs, and print their folder")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bit_for_bit_"))
    try:
        commits = [run_git("rev-parse", "--verify", f"{name}^{{commit}}") for name in (args.old, args.new)]
        results = compare_outputs(*run_both_commits(commits, folder))
    except CommandFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if args.keep:
            print(f"kept {folder}/old and {folder}/new: remove each with `git worktree remove --force`")
        else:
            for tree in folder.iterdir():
                with contextlib.suppress(CommandFailed):
                    run_git("worktree", "remove", "--force", str(tree))
            shutil.rmtree(folder, ignore_errors=True)
    print_table(results)
    equal = not any(problem for problems in results.values() for problem in problems)
    print(f"\n{'equal' if equal else 'NOT equal'}: {commits[0][:12]} and {commits[1][:12]}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
