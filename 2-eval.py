"""Chat with a model, measure its accuracy on questions with keys, or compare several models.

    python 2-eval.py                             chat with the latest stage in out/; without a terminal: fixed prompts
    python 2-eval.py --stage pretrain --prompt "The sky is"
    python 2-eval.py --checkpoint ../Qwen3-0.6B  a transformers folder (Llama, Mistral, Qwen2, Qwen3)
    python 2-eval.py --rope_scaling yarn --rope_factor 4 --prompt "…"     a context 4 times as long as in training
    python 2-eval.py --prompts FILE.txt          one prompt per line (-: of a pipe); --history 9: as one conversation
    python 2-eval.py --num_beams 4 --no_repeat_ngram_size 5         beam search without repeated 5-grams
    python 2-eval.py --tools calculator,clock    the model may call tools; with --questions too
    python 2-eval.py --enable_thinking false     an empty thought before each answer
    python 2-eval.py --questions FILE.jsonl --json out/report.json
    python 2-eval.py --report out/pretrain_512.pth out/full_sft_512.pth --texts zh=held_out_zh.jsonl en=held_out_en.txt
    python 2-eval.py --report out/full_sft_512.pth other=http://localhost:8000/v1     a served model
    python 2-eval.py --report --judge http://localhost:8000/v1 --judge_model NAME

A pretrained model continues the prompt; a model of a chat stage answers it in its chat format.
A line of a questions file: {"question": "...", "keys": ["...", ...], "lang": "zh" or "en", "kind": "..."}; lang and
kind are optional. Answers are greedy, and correct if they contain any of the keys as a word (evaluation/qa_data.py).
Tools (evaluation/tools.py): a call in an answer is run and its result put into the prompt, until the model answers
without a call. Tools only compute; they run no generated code.
--report compares the given models, or every stage in --out_dir. It writes a Markdown page and a json file: all answers,
bits per byte of --texts, loss by position up to 4 times the trained length, loss on --chats, repetition, speed, and
continuations of answers that begin with a harmful agreement (shown, not scored). The answers also stand on the page of
the runs in --out_dir, report.html.
NAME=http://HOST/v1 is a model served with OpenAI's API (append #MODEL to choose one of several): the server gets the
prompts; figures that it cannot provide are shown as "–". No data leaves the machine unless --report or --judge names a
server. The judge (API key in OPENAI_API_KEY) gets the prompts and answers, not the names of the models.
Reads out/*.pth; writes the file of --json, a report in out/eval/, and the file of /save.
Read next: evaluation/chat_model.py and evaluation/terminal_chat.py, model/generate.py (the sampling loop),
3-full_sft.py.
"""

import json
import sys

from common import cli
from common.errors import UserError, fail_in_one_line, require_nonempty_text
from common.files import write_text
from evaluation.chat_model import ChatModel, find_model, open_chat_model
from evaluation.eval_config import EvalConfig
from evaluation.prompts import SCRIPT_PROMPTS
from evaluation.qa import evaluate_questions
from evaluation.qa_data import read_keyed_questions, read_prompt_lines
from evaluation.report import compare_models
from evaluation.terminal_chat import TerminalChat, run_terminal_chat
from evaluation.tool_loop import NO_TOOLS, ToolOptions
from evaluation.tools import find_tools
from model.sampling_presets import find_preset, format_settings

DESCRIPTION = f"{__doc__}\nThe fixed prompts:\n" + "\n".join(f"    {prompt}" for prompt in SCRIPT_PROMPTS)


def open_chosen_model(config: EvalConfig) -> ChatModel:
    """Open the model of --checkpoint or --stage. Raises UserError if both are given and differ."""
    path = find_model(config.out_dir, config.checkpoint, config.stage)
    chat_model = open_chat_model(path, config.device, config.dtype, config.rope, config.quantize)
    if config.stage and config.stage != chat_model.stage:
        raise UserError(
            f"{path} is of stage {chat_model.stage}, not {config.stage}: leave out --stage or name another file"
        )
    return chat_model


def tool_options(config: EvalConfig) -> ToolOptions:
    """The tools and the thinking switch of the flags. Raises UserError for an unknown tool."""
    tools = tuple(find_tools(config.tools, config.lookup_file))
    return ToolOptions(tools, config.max_tool_calls, config.enable_thinking, config.lookup_file)


def start_chat(
    config: EvalConfig, chat_model: ChatModel, history: int | None, options: ToolOptions = NO_TOOLS
) -> TerminalChat:
    """Return an empty conversation; prints the model and the settings that the preset of its chat format makes."""
    choice = config.sampling_preset if chat_model.is_chat_model else "none"
    name, preset = find_preset(choice, chat_model.tokenizer.format)
    settings, given = config.settings(preset, chat_model.stop_strings), config.explicit_settings
    chat = TerminalChat(chat_model, settings, config.system, history, options, config.lang)
    print(chat_model.summary(), flush=True)
    if used := {key: value for key, value in preset.items() if key not in given and getattr(settings, key) == value}:
        print(f"sampling: {name} preset: {format_settings(used)} (--sampling_preset none turns it off)", flush=True)
    return chat


def main() -> None:
    config = cli.parse(EvalConfig, DESCRIPTION)
    questions = read_keyed_questions(config.questions) if config.questions else []
    prompts = [text for _, text in read_prompt_lines(config.prompts)] if config.prompts else []
    if config.prompt is not None:
        prompts = [require_nonempty_text(config.prompt, "--prompt")]
    if config.report is not None:
        return compare_models(config, prompts)
    if not questions and not prompts and not sys.stdin.isatty():
        prompts = list(SCRIPT_PROMPTS)
        print("standard input is no terminal: the fixed prompts follow (--prompts - reads prompts from it)", flush=True)

    options = tool_options(config)
    chat_model = open_chosen_model(config)
    if questions:
        print(chat_model.summary(), flush=True)
        scores, tokens, seconds = evaluate_questions(
            chat_model, questions, config.system, config.max_new_tokens, options
        )
    else:
        chat = start_chat(config, chat_model, (config.history or 0) if prompts else config.history, options)
        for prompt in prompts:
            print(f"\n> {prompt}")
            chat.send_message(prompt, is_interactive=False)
        if not prompts:
            run_terminal_chat(chat, config.out_dir)
        scores, tokens, seconds = {"answers": chat.answers}, chat.tokens, chat.seconds
    speed = tokens / max(seconds, 1e-9)
    print(f"{tokens} tokens, {speed:.0f} tokens/s")
    if config.json:
        facts = {"checkpoint": str(chat_model.path), "stage": chat_model.stage, "tokens_per_second": round(speed, 1)}
        write_text(config.json, json.dumps(facts | scores, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    with fail_in_one_line():
        main()
