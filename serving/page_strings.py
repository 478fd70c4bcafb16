"""Every word of the chat page, in both languages, from strings.json. `{…}` is filled in by the page.

    LANGUAGES[lang]        the language's own name
    STAGES[lang][stage]    [name, explanation] of what a model of this stage does, in one line
    SCORES[lang][kind]     what a score counts
    STARTS[lang][kind]     to begin with: questions for a chat model (chat), beginnings for a pretrained one (text)
    WORDS[lang][key]       everything else

Called by page.py and sidebar.py. A test holds both languages to the same keys and the same blanks.
"""

import json
from pathlib import Path
from typing import Any

_STRINGS: dict[str, Any] = json.loads(Path(__file__).with_name("strings.json").read_text(encoding="utf-8"))
LANGUAGES: dict[str, str] = _STRINGS["languages"]
STAGES: dict[str, dict[str, list[str]]] = _STRINGS["stages"]
SCORES: dict[str, dict[str, str]] = _STRINGS["scores"]
STARTS: dict[str, dict[str, list[str]]] = _STRINGS["starts"]
WORDS: dict[str, dict[str, str]] = _STRINGS["words"]
