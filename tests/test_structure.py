"""The invariants of the project's structure. The tables contain today's numbers, which may only decrease.

`python -m tests.structure limits` prints the tables; structure/__init__.py lists the other commands.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.structure.banned_words import banned
from tests.structure.documents import missing, path_lines, reading_path
from tests.structure.imports import Size, closure, cycles, layer_violations, lazy_imports, size, unused_sideways
from tests.structure.sources import (
    LESSONS,
    argparse_importers,
    long_files,
    long_functions,
    namespace_users,
    part_lines,
    repeated_names,
    sources,
)

ROOT = Path(__file__).resolve().parent.parent
SLACK = 0.03  # a limit is at most this fraction above the number that it limits
FILE_LINES = 320
FUNCTION_LINES = 65
READING_PATH_LINES = 3529

# Files, lines and classes of the import closure of each lesson.
BUDGET = {
    "1-pretrain.py": Size(61, 9940, 93),
    "2-eval.py": Size(85, 13147, 108),
    "3-full_sft.py": Size(62, 9788, 89),
    "4-lora_sft.py": Size(63, 9931, 89),
    "5-dpo_train.py": Size(71, 11293, 106),
    "6-grpo_train.py": Size(86, 14087, 129),
}

# Public names that several files define, and why.
REPEATED_NAMES = {
    "compute_loss": "each lesson shows its own loss",
    "main": "the entry point of a script",
}

# Lines of the packages with their scripts; data files do not count.
PART_LINES = {"core": 22259, "applications": 19001}

# Imports of project files inside functions: optional branches, and modules that need an optional package.
LAZY_IMPORTS = {
    "1-pretrain.py: trainer/plan.py",
    "1-pretrain.py: trainer/timed_run.py",
    "3-full_sft.py: evaluation/data_scaling.py",
    "curation/commands.py: curation/cluster_dedup.py",
    "data_process.py: curation/perplexity_scorer.py",
    "evaluation/doctor.py: common/__init__.py",
    "evaluation/doctor.py: common/device.py",
    "evaluation/doctor.py: corpus/dataset_meta.py",
    "evaluation/doctor.py: corpus/shard_reader.py",
    "evaluation/doctor.py: export/hf_import.py",
    "evaluation/doctor.py: model/checkpoint.py",
    "evaluation/doctor.py: model/tokenizer.py",
    "demo.py: trainer/report_page.py",
    "demo_world/report.py: model/checkpoint.py",
    "export/hf_import.py: export/hf_folder.py",
    "model/jinja_template.py: model/template_sandbox.py",
    "serve_openai_api.py: serving/app.py",
    "serve_openai_api.py: serving/connections.py",
    "serve_openai_api.py: serving/models.py",
    "trainer/chat_data.py: corpus/examples.py",
    "trainer/chat_data.py: corpus/tokenize_chats.py",
    "trainer/distributed.py: trainer/heartbeat.py",
    "6-grpo_train.py: trainer/explain.py",
    "trainer/loop.py: trainer/explain.py",
    "evaluation/report.py: trainer/report_page.py",
    "trainer/metrics.py: trainer/curves.py",
    "trainer/run.py: trainer/report_page.py",
    "trainer/samples.py: model/generate.py",
    "trainer/samples.py: model/sampling.py",
    "trainer/startup.py: trainer/zero.py",
    "web_demo.py: serving/page.py",
}

# Files with more than FILE_LINES lines.
LONG_FILES: dict[str, int] = {}

# Functions with more than FUNCTION_LINES lines.
LONG_FUNCTIONS: dict[str, int] = {}


def ratchet_faults(today: Mapping[str, int], limits: Mapping[str, int]) -> list[str]:
    """The faults of a table of limits: entries that are missing, exceeded, too high or no longer needed."""
    faults = [f"{key}: {number}, and no entry" for key, number in today.items() if key not in limits]
    faults += [f"{key}: the entry is no longer needed" for key in limits if key not in today]
    for key in today.keys() & limits.keys():
        if today[key] > limits[key]:
            faults.append(f"{key}: {today[key]}, above the limit of {limits[key]}")
        elif today[key] < (1 - SLACK) * limits[key]:
            faults.append(f"{key}: {today[key]}, so the limit of {limits[key]} can be lowered")
    return sorted(faults)


def budget_faults(today: Size, limit: Size) -> list[str]:
    """`ratchet_faults` of the three numbers of a closure."""
    return ratchet_faults(vars(today), vars(limit))


def test_imports_go_down_or_sideways_as_listed():
    assert layer_violations(ROOT) == []


def test_every_listed_sideways_import_is_used():
    assert unused_sideways(ROOT) == []


def test_no_import_cycles():
    assert cycles(ROOT) == []


def test_every_lesson_has_an_import_budget():
    assert sorted(BUDGET) == sorted(LESSONS)


@pytest.mark.parametrize("script", BUDGET)
def test_a_lesson_imports_no_more_than_its_budget_and_the_budget_is_tight(script):
    assert budget_faults(size(ROOT, closure(ROOT, script)), BUDGET[script]) == []


def test_both_readmes_list_the_same_reading_path():
    assert reading_path(ROOT, "README.md") == reading_path(ROOT, "README_zh.md")


def test_the_files_of_the_reading_path_exist_and_are_short_in_total():
    files = reading_path(ROOT)
    assert files and [file for file in files if not (ROOT / file).is_file()] == []
    assert ratchet_faults({"lines": path_lines(ROOT, files)}, {"lines": READING_PATH_LINES}) == []


def test_every_file_function_and_module_named_in_prose_exists():
    assert missing(ROOT) == []


def test_every_public_name_is_defined_once():
    assert {name: files for name, files in repeated_names(ROOT).items() if name not in REPEATED_NAMES} == {}


def test_every_allowed_repeated_name_is_repeated():
    assert sorted(REPEATED_NAMES.keys() - repeated_names(ROOT).keys()) == []


def test_only_the_command_line_module_and_its_types_import_argparse():
    assert argparse_importers(ROOT) == {"common/cli.py", "common/flag_parser.py", "common/flag_types.py"}


def test_a_namespace_never_leaves_the_command_line_module():
    assert namespace_users(ROOT) == {"common/cli.py"}


def test_project_files_are_imported_at_the_top_but_for_the_listed_branches():
    assert lazy_imports(ROOT) == LAZY_IMPORTS


def test_the_core_and_the_applications_have_a_budget():
    assert ratchet_faults(part_lines(ROOT), PART_LINES) == []


def test_only_listed_files_are_long():
    assert ratchet_faults(long_files(ROOT, FILE_LINES), LONG_FILES) == []


def test_only_listed_functions_are_long():
    assert ratchet_faults(long_functions(ROOT, FUNCTION_LINES), LONG_FUNCTIONS) == []


def test_prose_has_no_banned_words():
    assert [f"{file}:{line}: {phrase}" for file, line, phrase in banned(ROOT)] == []


def test_the_analysis_sees_the_whole_project():
    files = sources(ROOT)
    assert len(files) > 100 and {"common/errors.py", "trainer/loop.py", "1-pretrain.py"} <= files.keys()
