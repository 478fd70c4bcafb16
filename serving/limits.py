"""Settings and limits of one server.

Called by ../serve_openai_api.py. Read next: middleware.py (authorization, sizes), connections.py (connections,
timeouts), worker_pools.py (worker threads), scheduler.py (running and waiting requests).
"""

from dataclasses import dataclass

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")  # names of this machine in the Host header


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one server; `max_num_seqs` and `max_queue` count per model.

    `max_num_seqs`: running sequences, at most. `max_queue`: waiting sequences, at most. `api_keys`: a request needs one
    of them; if the tuple is empty, no key is needed. `allowed_hosts`: accepted names in the Host header; None accepts
    all. A server without a key must check them, because a web page can send requests to this machine under the page's
    own host name (DNS rebinding). `cors`: origins of web pages that may send requests. `strict_model_names`: a server
    of one model answers unknown model names with 404 instead of with that model. `max_request_bytes`: size of one body.
    `max_queued_bytes`: total size of the bodies above SMALL_BODY_BYTES that are being read or answered.
    `client_timeout`: seconds that a client has to send the headers, to send each MiB of `max_request_bytes`, and to
    read MIN_READ_BYTES of the response (connections.py).
    """

    max_num_seqs: int = 16
    max_queue: int = 64
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = LOCAL_HOSTS
    cors: tuple[str, ...] = ()
    strict_model_names: bool = False
    max_request_bytes: int = 2**20
    max_queued_bytes: int = 2**24
    max_connections: int = 256
    client_timeout: float = 30.0
