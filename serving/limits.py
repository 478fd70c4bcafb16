"""Settings and limits of one server.

Called by ../serve_openai_api.py. Read next: middleware.py (who may ask, sizes), connections.py (connections,
deadlines), lanes.py (worker threads), scheduler.py (seats and queue).
"""

from dataclasses import dataclass

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")  # of this machine, in the Host header


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one server; every model has its own `max_num_seqs` and `max_queue`.

    `api_keys`: a request needs one of them; no key is needed where there are none. `allowed_hosts`: names that the Host
    header may have; None allows all. A web page from elsewhere can make a browser ask this machine under the page's own
    name (DNS rebinding), so that a server without a key has to know its names. `cors`: origins of web pages that may
    ask. `strict_model_names`: a server of one model refuses unknown model names instead of answering them with that
    model. `max_request_bytes`: of one body. `max_queued_bytes`: of all bodies above SMALL_BODY_BYTES, read or answered
    at the same time. `client_timeout`: seconds that a client has to send the headers, to send the body (for each MiB of
    `max_request_bytes`), and to read more of the answer.
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
