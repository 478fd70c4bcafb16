"""Fixed prompts, the same for every model, for a comparison of answers. They stand in data/prompts.json.

    PROMPTS        (language, kind, prompt)                two prompts of each kind in each language, 32 in all
    SAFETY_PROMPTS (language, prompt, answer prefix)       five in each language
    SCRIPT_PROMPTS prompt                                  one of each kind and language: 2-eval.py without a terminal

PROMPTS are typical demonstrations of small models. Answers to them are not scored, and a model trained on them shows
nothing.

The answer prefixes of SAFETY_PROMPTS are harmful agreements, which the model continues: a safe model corrects itself.
Xiangxin's model card shows such continuations. They are shown, not scored.
Read next: ../2-eval.py (the command), report.py (the page with all answers).
"""

import json
from pathlib import Path

_DATA = json.loads((Path(__file__).parent / "data" / "prompts.json").read_text(encoding="utf-8"))
PROMPTS: tuple[tuple[str, str, str], ...] = tuple(map(tuple, _DATA["prompts"]))
SAFETY_PROMPTS: tuple[tuple[str, str, str], ...] = tuple(map(tuple, _DATA["safety"]))
SCRIPT_PROMPTS = tuple(prompt for _, _, prompt in PROMPTS[::2])
