"""The words of the terminal chat in English and Chinese.

    texts = terminal_texts("auto")      of the language of $LC_ALL, $LC_MESSAGES or $LANG; --lang chooses one

Called by terminal_chat.py; demo.py has its own texts.
"""

import os

ENGLISH = {
    "hint": "/help lists the commands, Ctrl-C stops an answer, /exit quits",
    "help": """/reset              clear the conversation
/retry              sample the last answer again (a --seed gives the same answer; /seed none removes it)
/save [FILE]        write the conversation to a jsonl file (input of data_process.py sft)
/system [TEXT]      set the system message; without TEXT remove it
/history [N]        put the last N turns into the prompt (0: only the question); without N all turns
/tools [NAMES]      tools that the model may call, as calculator,clock; without NAMES none
/thinking off       off: an empty thought before each answer; on, auto: the model decides
/temperature 0.7    also /top_k /top_p /min_p /repetition_penalty /frequency_penalty /penalty_window
                    /no_repeat_ngram_size /max_new_tokens /seed; without a number: show the settings
/num_beams 4        beam search (temperature 0), prints complete answers; also /length_penalty
/exit               quit""",
    "reasoning": "[thought]\n",
    "content": "[answer]\n",
    "tool_call": "[call] ",
    "tool_result": "[result] ",
    "stopped": " [stopped]",
    "speed": "[{tokens} tokens, {speed:.0f} tokens/s]",
    "cleared": "conversation cleared",
    "written": "written: {path}",
    "system": "system message set",
    "no system": "no system message",
    "history": "history: last {count} turns",
    "all history": "history: all turns",
    "thinking": "thinking: {value}",
    "tools": "tools: {names}",
    "none": "none",
    "empty": "the conversation is empty",
    "exists": "{path} exists already: name another file",
    "bad history": "/history {value}: must be a whole number of at least 0",
    "bad thinking": "/thinking {value}: give on, off or auto",
}
CHINESE = {
    "hint": "/help 列出命令，Ctrl-C 中止回答，/exit 退出",
    "help": """/reset              清空对话
/retry              重新生成上一个回答（设了 --seed 时结果相同；/seed none 取消种子）
/save [文件]        把对话写成 jsonl 文件（可作为 data_process.py sft 的输入）
/system [文字]      设置系统消息；不带文字则去掉
/history [N]        提示词只带最近 N 轮（0：只带当前问题）；不带 N 则带全部
/tools [名称]       模型可以调用的工具，如 calculator,clock；不带名称则不用工具
/thinking off       off：每个回答前放一段空的思考；on、auto：由模型决定
/temperature 0.7    还有 /top_k /top_p /min_p /repetition_penalty /frequency_penalty /penalty_window
                    /no_repeat_ngram_size /max_new_tokens /seed；不带数字则显示当前设置
/num_beams 4        束搜索（temperature 为 0），一次输出完整回答；还有 /length_penalty
/exit               退出""",
    "reasoning": "[思考]\n",
    "content": "[回答]\n",
    "tool_call": "[调用] ",
    "tool_result": "[结果] ",
    "stopped": " [已中止]",
    "speed": "[{tokens} 个 token，{speed:.0f} token/秒]",
    "cleared": "对话已清空",
    "written": "已写入：{path}",
    "system": "系统消息已设置",
    "no system": "没有系统消息",
    "history": "历史：最近 {count} 轮",
    "all history": "历史：全部",
    "thinking": "思考：{value}",
    "tools": "工具：{names}",
    "none": "无",
    "empty": "对话还是空的",
    "exists": "{path} 已存在：请换一个文件名",
    "bad history": "/history {value}：应为不小于 0 的整数",
    "bad thinking": "/thinking {value}：请写 on、off 或 auto",
}


def terminal_language(lang: str) -> str:
    """Return "zh" or "en". "auto": of the first of $LC_ALL, $LC_MESSAGES and $LANG that is set, else English."""
    if lang == "auto":
        names = (os.environ.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
        lang = next(filter(None, names), "")[:2]
    return "zh" if lang == "zh" else "en"


def terminal_texts(lang: str) -> dict[str, str]:
    """The texts of "zh", "en" or "auto" (the language of the terminal)."""
    return CHINESE if terminal_language(lang) == "zh" else ENGLISH
