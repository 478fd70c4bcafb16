"""Supported row layouts: the keys of questions, answers, lists of turns, system prompts, …

    FIELD_KEYS    field -> its keys in order of priority; the first *filled* key of a row is used
    ROLE_NAMES    role name in the data -> user, assistant, system, tool (a result) or call
    LAYOUTS       one example row per documented and tested layout (layouts.json)
    TURN_RULES    handling of unusual turns (layouts.json)

To support a new key, add it to FIELD_KEYS. `data_process.py --list_layouts` prints LAYOUTS, dataset/README.md contains
the same table (tests/corpus/test_layouts.py compares them), and `--keys prompt=KEY,answer=KEY` sets the keys of any
other layout.

Read next: chats.py (turns -> messages), row_text.py (row -> text, chat or pair).
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

FIELD_KEYS: dict[str, tuple[str, ...]] = {
    "text": (
        "text", "content", "contents", "raw_content", "document", "passage", "article", "body", "completion", "story",
        "markdown", "正文", "文本", "内容",
    ),
    "messages": (
        "messages", "conversations", "conversation", "dialogue", "dialogues", "dialog", "dialogs", "chat", "chats",
        "turns", "data", "items", "对话", "会话",
    ),
    "prompt": (
        "instruction", "question", "prompt", "query", "q", "problem", "human", "user", "ask",
        "指令", "问题", "提问", "提示", "题目", "问", "用户问题", "用户输入", "提示词", "问题描述", "用户", "inputs",
        "title",
    ),
    "answer": (
        "output", "response", "solution", "answer", "a", "completion", "target", "reply", "assistant", "gpt", "bot",
        "输出", "回答", "回复", "答案", "答复", "答", "参考答案", "标准答案", "模型回答", "助手", "answers",
        "completions", "responses", "targets", "ground_truth", "reward_model",
    ),
    "context": ("input", "context", "passage", "document", "article", "desc", "输入", "上下文", "背景", "材料"),
    "system": (
        "system", "system_prompt", "system_message", "meta_instruction", "系统提示", "系统", "系统提示词", "系统消息",
    ),
    "history": ("history", "历史", "历史对话"),
    "chosen": (
        "chosen", "choose", "chosen_response", "response_chosen", "chosen_answer", "answer_chosen", "preferred_output",
        "preferred", "accepted", "accept", "better", "win", "response_j", "chosen_messages", "preferred_response",
        "winner_response", "positive", "pos_resp", "good", "优选", "好回答", "好的回答", "更好的回答",
    ),
    "rejected": (
        "rejected", "reject", "rejected_response", "response_rejected", "rejected_answer", "answer_rejected",
        "non_preferred_output", "dispreferred", "worse", "lose", "response_k", "rejected_messages",
        "dispreferred_response", "loser_response", "negative", "neg_resp", "bad", "劣选", "差回答", "差的回答",
        "较差的回答",
    ),
    "tools": ("tools", "functions"),
    "label": ("label", "kto_tag"),
    "weight": ("weight",),
}  # fmt: skip

# (key of the first answer, of the second, of the preferred one, values that mean the first and the second).
COMPARISON_KEYS: tuple[tuple[str, str, str, tuple[Any, Any]], ...] = (
    ("response_0", "response_1", "better_response_id", (0, 1)),
    ("conversation_a", "conversation_b", "winner", ("a", "b")),  # also model_a, response_a
    ("response_a", "response_b", "winner", ("a", "b")),
    ("human_ref_A", "human_ref_B", "labels", (1, 0)),
)

# Lists under these keys have no order, unless the answers have a rank or score.
UNORDERED_ANSWER_KEYS = ("answers", "completions", "responses")
# (key, 1 if lower is better or -1 if higher is better).
RANKING_KEYS = (("rank", 1), ("overall_score", -1), ("score", -1), ("rating", -1), ("pm_score", -1))

ROLE_KEYS = ("role", "from", "speaker", "sender", "author", "type", "角色")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance", "内容")
ROLE_NAMES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer", "usr", "用户", "人类", "提问者"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "gpt4", "gpt-4", "bot", "chatbot", "model", "ai", "bing", "bard",
                     "claude", "moss", "chatglm", "助手", "机器人", "客服"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response", "tool_result", "ipython",
                     "工具"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),
}  # fmt: skip
TOOL_KEYS = ("tool_calls", "function_call")  # of a message that is a tool call
TRAINING_FLAG_KEYS = ("weight", "train", "training", "trained", "loss", "loss_weight")  # 0 or false: not trained
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought", "思考")

# Metadata keys are ignored; every other unused key is reported.
METADATA_KEYS = frozenset((
    "author", "batch", "category", "categories", "chosen_model", "chosen_score", "cluster", "conversation_hash",
    "conversation_id", "count", "country", "created", "created_at", "dataset", "dataset_name", "date", "dialog_id",
    "dialogue_id", "difficulty", "domain", "dump", "file", "file_path", "filename", "generation_model", "generator",
    "hash", "hashed_ip", "id", "idx", "index", "info", "input_len", "is_safe", "kind", "label_name", "lang",
    "language", "length", "level", "license", "licence", "line", "link", "margin", "meta", "metadata", "model",
    "model_name", "msg_id", "name", "num_tokens", "num_turns", "num_utter", "origin", "page", "prompt_hash",
    "prompt_id", "quality", "rank", "rating", "rejected_model", "rejected_score", "safety", "score", "score_chosen",
    "score_rejected", "scores", "sha", "shard", "source", "source_dataset", "source_file", "split", "src", "subject",
    "subset", "tag", "tags", "task", "task_id", "task_name", "task_type", "time", "timestamp", "topic", "toxic",
    "turn", "turn_id", "type", "uid", "updated", "url", "user_id", "uuid", "version", "weight", "year", "output_len",
    "type_keyword", "data_source", "", "unnamed: 0", "_id", "qid", "question_id", "unique_id", "message_id", "post_id",
    "subcategory", "redacted", "tstamp", "编号", "序号", "分类", "类别", "来源",
))  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A documented layout: an example row, and the projects or datasets that use it, in English and Chinese."""

    name: str
    kind: str  # "text", "chat" or "pair"
    example: Any
    used_by: str
    used_by_zh: str = ""  # "": same as `used_by`


_TABLES = json.loads(Path(__file__).with_name("layouts.json").read_text(encoding="utf-8"))
LAYOUTS = tuple(Layout(**layout) for layout in _TABLES["layouts"])
# Handling of turns, the same in every command: (case, handling) in English, then in Chinese.
TURN_RULES: list[tuple[str, str, str, str]] = [tuple(rule) for rule in _TABLES["turn_rules"]]


def parse_keys(text: str) -> dict[str, str]:
    """Parses `--keys prompt=KEY,answer=KEY,…` into {field: key}. Raises UserError for an invalid specification."""
    keys: dict[str, str] = {}
    fields = [field for field in FIELD_KEYS if field not in ("label", "weight")]
    for part in filter(None, (part.strip() for part in text.split(","))):
        field, equals, key = (piece.strip() for piece in part.partition("="))
        if field not in fields or not equals or not key:
            raise UserError(f"--keys {text}: write FIELD=KEY,…; the fields are {', '.join(fields)}")
        if field in keys:
            raise UserError(f"--keys {text}: {field} is given twice: give each field one key")
        keys[field] = key
    return keys


def explain_expected_keys(kind: str, found: Iterable[str]) -> str:
    """Returns the error text: keys that a row of `kind` ("text", "chat", "pair" or "any") needs, nearest layouts."""
    found = list(found)
    needs = {
        "text": "a text row needs a text (text, content, …), or a chat",
        "chat": "a chat row needs a list of turns (messages, conversations, …), or a question with an answer "
        "(instruction/output, question/answer, …)",
        "pair": "a pair row needs chosen and rejected: whole conversations, or answers to its prompt",
        "any": "a row needs text, a chat or a pair of answers",
    }[kind]
    if not found:
        return f"{needs}; found no object with keys"
    nearest = ", ".join(json.dumps(layout.example, ensure_ascii=False) for layout in nearest_layouts(kind, found))
    fields = {"text": "text=KEY", "pair": "prompt=KEY,chosen=KEY,rejected=KEY"}.get(kind, "prompt=KEY,answer=KEY")
    return (
        f"{needs}; found the keys {', '.join(found)}; nearest: {nearest}; "
        f"set the keys with --keys {fields}, or list all layouts with data_process.py --list_layouts"
    )


def nearest_layouts(kind: str, found: list[str]) -> list[Layout]:
    """Returns the two layouts of this kind whose keys, or keys of the same fields, are most similar to `found`."""

    def similarity(layout: Layout) -> float:
        keys = list(layout.example) if isinstance(layout.example, dict) else []
        score = 0.0
        for key in found:
            same_field = {other for names in FIELD_KEYS.values() if key.lower() in names for other in names}
            ratios = [difflib.SequenceMatcher(None, key.lower(), other).ratio() for other in keys]
            score += 1.0 if same_field & set(keys) else max([ratio for ratio in ratios if ratio > 0.6], default=0.0)
        return score / (1 + len(keys))

    choices = [layout for layout in LAYOUTS if kind in ("any", layout.kind)]
    return sorted(choices, key=lambda layout: -similarity(layout))[:2]


def print_layouts() -> None:
    """Prints the layouts, the keys of every field and the handling of turns."""
    for layout in LAYOUTS:
        example = json.dumps(layout.example, ensure_ascii=False)
        print(f"{layout.kind:5} {layout.name}: {layout.used_by}\n      {example}")
    print("\nkeys of each field, in order of priority (--keys FIELD=KEY,… sets others):")
    for field, keys in FIELD_KEYS.items():
        print(f"  {field:9} {', '.join(keys)}")
    print("\nhandling of turns, the same in every command:")
    for case, handling, *_ in TURN_RULES:
        print(f"  {case}: {handling}")


def layout_tables(chinese: bool = False) -> str:
    """Returns the same as Markdown tables, for dataset/README.md and dataset/README_zh.md."""
    layouts = [
        (layout.kind, f"`{json.dumps(layout.example, ensure_ascii=False)}`",
         (chinese and layout.used_by_zh) or layout.used_by) for layout in LAYOUTS
    ]  # fmt: skip
    fields = [(f"`{field}`", ", ".join(f"`{key}`" for key in keys)) for field, keys in FIELD_KEYS.items()]
    rules = [rule[2:] if chinese else rule[:2] for rule in TURN_RULES]
    headers = (
        (("种类", "示例", "使用者"), ("字段", "键（靠前者优先）"), ("轮次中的情况", "处理方式"))
        if chinese
        else (("kind", "example", "used by"), ("field", "keys, in order of priority"), ("turns", "handling"))
    )
    tables = zip(headers, (layouts, fields, rules), strict=True)
    return "\n\n".join(_markdown_table(header, rows) for header, rows in tables)  # type: ignore[arg-type]


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
