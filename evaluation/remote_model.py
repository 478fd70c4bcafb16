"""A model served with OpenAI's API in a report: --report NAME=http://host:port/v1

    NAME=http://localhost:8000/v1            the first model of GET /v1/models
    NAME=http://localhost:8000/v1#MODEL      the model of that name

The server gets the prompts of the report and the sampling settings that differ from the defaults. A setting that the
server rejects is left out and named in the report. The API key is --report_api_key or the variable REPORT_API_KEY; it
is sent only to the servers of --report and is not written to any file. The API has no log-probabilities of given text,
so bits per byte and loss are not measured; the report says so.

Called by report.py. Read next: judge_client.py (the requests), chat_model.py (a local model).
"""

import dataclasses
import re
from typing import Any

from common.errors import UserError
from evaluation.judge_client import ChatClient
from evaluation.qa_data import system_messages
from model.sampling import SamplingParams
from model.sampling_presets import SAMPLING_SETTINGS

_NAMED_ADDRESS = re.compile(r"([^=/]*)=(https?://.*)", re.DOTALL)


class ReportClient(ChatClient):
    """A ChatClient with its own API key: the judge's key is sent to the judge only."""

    key_variable = "REPORT_API_KEY"
    key_help = "give --report_api_key KEY or set REPORT_API_KEY"
    retry_help = ""


class RemoteModel:
    """A served model. `address`: base URL with /v1, with an optional #MODEL.

    Raises UserError for an invalid address, a server that does not answer, and where neither the address nor the
    server names a model.
    """

    def __init__(self, label: str, address: str, settings: SamplingParams, system: str, api_key: str) -> None:
        url, _, model = address.partition("#")
        self.label, self.settings, self.system = label, settings, system_messages(system)
        self.client = ReportClient(url, model, flag=f"--report {label}")
        self.client.key = (api_key or self.client.key).strip()
        names = self.client.list_model_names()  # raises where the server does not answer or rejects the key
        self.client.model = model or next(iter(names), "")
        if not self.client.model:
            raise UserError(f"--report {label}: {url} lists no models: name one, as {label}={url}#MODEL")
        self.client.options = _request_options(settings)

    def answer_prompts(self, prompts: list[str]) -> tuple[list[dict[str, Any]], float]:
        """({"answer", "finish_reason", "tokens"} for each prompt, seconds). Tokens are None where they are not counted.

        Raises UserError when the server stops answering.
        """
        answers: list[dict[str, Any]] = []
        seconds = 0.0
        for number, prompt in enumerate(prompts):
            messages = [*self.system, {"role": "user", "content": prompt}]
            seed = {} if self.settings.seed is None else {"seed": self.settings.seed + number}
            try:
                reply = self.client.complete(messages, **seed)
            except UserError as error:
                raise UserError(f"{error} ({number} of {len(prompts)} prompts were answered)") from None
            seconds += reply.seconds
            answers.append({"answer": reply.text.strip(), "finish_reason": reply.finish_reason, "tokens": reply.tokens})
        return answers, seconds

    def missing_figures(self, is_counted: bool) -> list[str]:
        """Sentences about missing figures and differences from local models."""
        reasons = [
            "bits per byte and SFT loss need the log-probabilities of given text, parameters and stage the checkpoint; "
            "a server provides neither",
            "prompts are sent one at a time, so there is no batch speed; the speed includes the network",
            "safety prompts need an answer prefix, which OpenAI's API does not support",
        ]
        if not is_counted:
            reasons.append("the server does not count tokens, so the speed is unknown")
        if refused := self.client.rejected_options:
            reasons.append(f"the server rejected {', '.join(refused)}: its answers are sampled without")
        return reasons


def is_address(given: str) -> bool:
    """Whether an entry of --report is an address, with or without a name, rather than a file."""
    return bool(_NAMED_ADDRESS.fullmatch(given)) or given.startswith(("http://", "https://"))


def parse_address(given: str) -> tuple[str, str]:
    """(NAME, address) of NAME=http://…. Raises UserError where the name is missing."""
    found = _NAMED_ADDRESS.fullmatch(given)
    if not found or not found[1].strip():
        raise UserError(f"--report {given}: give the served model a name, as NAME={given}")
    return found[1].strip(), found[2]


def _request_options(settings: SamplingParams) -> dict[str, Any]:
    """The fields of a request; those outside of OpenAI's API are sent only where they differ from the default."""
    fields = {"temperature": settings.temperature, "top_p": settings.top_p, "max_tokens": settings.max_new_tokens}
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    extra = {
        name: getattr(settings, name) for name in SAMPLING_SETTINGS if name not in (*fields, "max_new_tokens", "seed")
    }
    return fields | {name: value for name, value in extra.items() if value != defaults[name]}
