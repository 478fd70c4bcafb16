"""All texts of the chat page, in Chinese and English, from strings.json. The page fills in `{…}`.

    LANGUAGE_LABELS[lang]        the language's own name
    STAGE_LABELS[lang][stage]    [name, one-line description] of a training stage
    SCORE_LABELS[lang][kind]     name of a metric
    EXAMPLE_PROMPTS[lang][kind]  questions for a chat model (chat), text prompts for a pretrained one (text)
    STRINGS[lang][key]           everything else

Called by page.py and sidebar.py. A test checks that both languages have the same keys and the same fields `{…}`.
"""

import json
from pathlib import Path
from typing import Any

_CONTENT: dict[str, Any] = json.loads(Path(__file__).with_name("strings.json").read_text(encoding="utf-8"))
LANGUAGE_LABELS: dict[str, str] = _CONTENT["languages"]
STAGE_LABELS: dict[str, dict[str, list[str]]] = _CONTENT["stages"]
SCORE_LABELS: dict[str, dict[str, str]] = _CONTENT["scores"]
EXAMPLE_PROMPTS: dict[str, dict[str, list[str]]] = _CONTENT["starts"]
STRINGS: dict[str, dict[str, str]] = _CONTENT["words"]
