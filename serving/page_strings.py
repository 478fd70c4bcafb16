"""Every word of the chat page, in both languages, from strings.json. `{…}` is filled in by the page.

    LANGUAGE_LABELS[lang]        the language's own name
    STAGE_LABELS[lang][stage]    [name, explanation] of what a model of this stage does, in one line
    SCORE_LABELS[lang][kind]     what a score counts
    EXAMPLE_PROMPTS[lang][kind]   questions for a chat model (chat), beginnings for a pretrained one (text)
    STRINGS[lang][key]       everything else

Called by page.py and sidebar.py. A test holds both languages to the same keys and the same blanks.
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
