"""llama.cpp's server, in this process through the package xllamacpp, as a program of ../decoding.py.

    python -m benchmarks.peer_cases.llama_cpp_server FOLDER --dtype f32|q8_0 --rows 1,16

Reads FOLDER/model-DTYPE.gguf. The KV cache is fp16 and all settings are llama.cpp's defaults, but for the context: one
slot of the model's context per row. Rows are requests of as many threads, which the server decodes together.
Needs xllamacpp only. Read next: ../decoding.py, which lists the numbers.
"""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xllamacpp

from benchmarks.decoding import DecodingConfig, Prompt, measure_generator
from common import cli
from common.errors import fail_in_one_line


class LlamaCppGenerator:
    """llama.cpp's server with a slot per row; no port is opened."""

    def __init__(self, config: DecodingConfig) -> None:
        path, rows = config.folder / f"model-{config.dtype}.gguf", max(map(int, config.rows))
        self.weight_bytes = path.stat().st_size  # the tokenizer in it is below 1 %
        params = xllamacpp.CommonParams()
        params.model.path, params.verbosity = str(path), -1
        params.n_parallel, params.n_ctx = rows, rows * config.model_config()["max_position_embeddings"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = config.num_threads
        self.server = xllamacpp.Server(params)

    def complete(self, prompt: Prompt, new_tokens: int, on_piece: Callable[[Any], None] | None = None) -> Any:
        request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
        request |= {"cache_prompt": False, "stream": on_piece is not None}
        return (
            self.server.handle_completions(request, on_piece) if on_piece else self.server.handle_completions(request)
        )

    def generate(self, prompts: list[Prompt], new_tokens: int) -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:
            for answer in pool.map(lambda prompt: self.complete(prompt, new_tokens), prompts):
                assert answer["usage"]["completion_tokens"] == new_tokens, "a row has ended early"

    def token_times(self, prompt: Prompt, new_tokens: int) -> list[float]:
        times: list[float] = []
        self.complete(prompt, new_tokens, lambda piece: times.append(time.perf_counter()))
        return times[:new_tokens]  # the last event is the end


if __name__ == "__main__":
    with fail_in_one_line():
        decoding = cli.parse(DecodingConfig, __doc__)
        print(json.dumps(measure_generator(LlamaCppGenerator(decoding), decoding)))
