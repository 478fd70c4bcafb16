"""Serve models over HTTP with OpenAI's API, for its clients, OpenWebUI, FastGPT and curl.

    python serve_openai_api.py                                            the latest stage in out/, at 127.0.0.1:8000
    python serve_openai_api.py --checkpoint out/dpo_512.pth out/lora_sft_512.pth ../Qwen3-0.6B    several, by name
    python serve_openai_api.py --host 0.0.0.0 --api_key_file keys.txt     to the network, which requires a key

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
         -d '{"messages": [{"role": "user", "content": "你好"}]}'

Requests are decoded in one batch, which new requests join between two tokens. Routes: /v1/chat/completions,
/v1/completions, /v1/embeddings, /v1/models, /health, /openapi.json. Chats may have tools and thoughts, as in OpenAI's
API (serving/chat_schemas.py); the client runs the tools, the server never does.
Needs: pip install "fastapi>=0.115,<1" "uvicorn>=0.30,<1". Reads checkpoints, writes no files.
Read next: serving/config.py (the flags), serving/service.py (how a request is processed), serving/scheduler.py
(continuous batching), model/generate.py (decoding).
"""

import gc
import socket

from common import cli
from common.errors import UserError, fail_in_one_line
from common.packages import require_packages
from serving.config import ServeConfig


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket. It is bound before the models are loaded, so an occupied port fails at once."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}): choose another --port") from None


def main() -> None:
    config = cli.parse(ServeConfig, __doc__)
    require_packages("the server", "fastapi", "uvicorn")
    from serving.app import make_app
    from serving.connections import make_server
    from serving.models import open_models

    with open_socket(config.host, config.port) as server_socket:
        models = open_models(config)
        for served in models.values():
            print(served.summary(), flush=True)
        server = make_server(make_app(models, config), config)
        host = f"[{config.host}]" if ":" in config.host else config.host
        print(f"listening on http://{host}:{server_socket.getsockname()[1]}/v1 (Ctrl-C stops it)", flush=True)
        gc.collect()
        gc.freeze()  # later collections skip the modules and models
        server.run(sockets=[server_socket])


if __name__ == "__main__":
    with fail_in_one_line():
        main()
