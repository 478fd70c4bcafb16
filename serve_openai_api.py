"""Serve models over HTTP with OpenAI's API, for its clients, OpenWebUI, FastGPT and curl.

    python serve_openai_api.py                                            the latest stage in out/, at 127.0.0.1:8000
    python serve_openai_api.py --checkpoint out/dpo_512.pth out/lora_sft_512.pth ../Qwen3-0.6B    several, by name
    python serve_openai_api.py --host 0.0.0.0 --api_key_file keys.txt     to the network, which requires a key

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" \\
         -d '{"messages": [{"role": "user", "content": "你好"}]}'

Requests are decoded in one batch, which new requests join between two tokens. Routes: /v1/chat/completions,
/v1/completions, /v1/embeddings, /v1/models, /health, /openapi.json.
Needs: pip install "fastapi>=0.115,<1" "uvicorn>=0.30,<1". Reads checkpoints, writes no files.
Read next: serving/service.py (how a request is processed), serving/limits.py (keys, hosts, limits),
serving/scheduler.py (continuous batching), model/generate.py (decoding).
"""

import argparse
import gc
import ipaddress
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from model.rope_flags import add_rope_flags, parse_rope_flags
from model.sampling_presets import PRESET_CHOICES

if TYPE_CHECKING:
    from serving.limits import ServerLimits

PACKAGES = '"fastapi>=0.115,<1" "uvicorn>=0.30,<1"'


def make_parser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models").add_argument
    add(
        "--checkpoint",
        nargs="+",
        type=flag_types.path_string,
        metavar="FILE",
        help=".pth files or transformers folders; NAME=FILE sets a model's name",
    )
    add(
        "--out_dir",
        type=flag_types.path_string,
        default="out",
        help="folder whose latest stage is served without --checkpoint (default: out)",
    )
    add("--max_context", type=flag_types.int_at_least(8), default=4096,
        help="tokens of prompt and answer together, at most (default: 4096)")  # fmt: skip
    strict = "404 for unknown model names (default: a server of one model uses it for any name)"
    add("--strict_model_names", action="store_true", help=strict)
    preset = "sampling defaults of chats: the preset of the model's chat format (auto), none, or another format's"
    add("--sampling_preset", choices=PRESET_CHOICES, default="auto", help=f"{preset} (default: auto)")
    add_rope_flags(parser)
    add = parser.add_argument_group("access").add_argument
    add(
        "--host",
        type=flag_types.non_empty_text,
        default="127.0.0.1",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    add("--port", type=flag_types.int_between(0, 65535), default=8000, help="0: any free port (default: 8000)")
    shown = "other users of this machine can see it in the process list (ps)"
    add(
        "--api_key",
        type=flag_types.non_empty_text,
        metavar="KEY",
        help=f"clients must send it; {shown} (default: $MENGYA_API_KEY, else none)",
    )
    add(
        "--api_key_file",
        type=flag_types.path_string,
        metavar="FILE",
        help="one key per line; clients must send one of them",
    )
    names = "further names accepted in the Host header (default: localhost, 127.0.0.1, ::1, --host; any with a key)"
    add("--allowed_hosts", action=cli.NameList, default=[], metavar="NAME", help=names)
    add("--cors", action=cli.NameList, default=[], metavar="ORIGIN",
        help="origins of web pages that may send requests, as https://chat.example.org")  # fmt: skip
    add = parser.add_argument_group("limits").add_argument
    add("--seats", type=flag_types.positive_int, default=16,
        help="sequences per model that run in one batch, max_num_seqs (default: 16)")  # fmt: skip
    add("--queue", type=flag_types.non_negative_int, default=64,
        help="sequences per model that may wait; further requests get 429 (default: 64)")  # fmt: skip
    add("--max_request_bytes", type=flag_types.positive_int, default=2**20,
        help="larger requests get 413 (default: 1048576)")  # fmt: skip
    add("--max_queued_bytes", type=flag_types.positive_int,
        help="total of large requests; further ones get 429 (default: 16 times --max_request_bytes)")  # fmt: skip
    add("--max_connections", type=flag_types.int_at_least(2), default=256,
        help="open connections; new ones replace idle ones (default: 256)")  # fmt: skip
    timeout = "seconds a client has to send headers, to send each MiB of a body, and to read part of the answer"
    add("--client_timeout", type=flag_types.int_at_least(1), default=30, help=f"{timeout} (default: 30)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=flag_types.device_name, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    dtype = "float32 (default): text independent of other requests; auto, bfloat16, float16: faster where native"
    add("--dtype", choices=flag_types.DTYPE_NAMES, default="float32", help=dtype)
    return parser


def read_api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """The key of --api_key, or else of $MENGYA_API_KEY, and the keys of --api_key_file.

    Raises UserError for a key that a header cannot contain, and for a file that cannot be read or has no key.
    """
    given = args.api_key or os.environ.get("MENGYA_API_KEY")
    keys = [("--api_key", given)] if given else []
    if args.api_key_file is not None:
        try:
            lines = Path(args.api_key_file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UserError(
                f"--api_key_file {args.api_key_file}: {reason}: use a text file with one key per line"
            ) from None
        keys += [(f"--api_key_file {args.api_key_file}", line.strip()) for line in lines if line.strip()]
        if not any(line.strip() for line in lines):
            raise UserError(f"--api_key_file {args.api_key_file}: no key in it: write one key per line")
    for source, key in keys:
        if not (key.isascii() and key.isprintable() and " " not in key):
            raise UserError(f"{source}: a key must be printable ASCII without spaces")
    return tuple(key for _, key in keys)


def make_limits(args: argparse.Namespace) -> "ServerLimits":
    """Return the limits of the server, checked before any model is loaded.

    Raises UserError for an invalid key, and for --host other than this machine without a key.
    """
    from serving.limits import LOCAL_HOSTS, ServerLimits

    parse_rope_flags(args)
    keys = read_api_keys(args)
    try:
        is_local = args.host == "localhost" or ipaddress.ip_address(args.host).is_loopback
    except ValueError:  # a host name
        is_local = False
    if not is_local and not keys:
        raise UserError(f"--host {args.host} accepts other machines: set --api_key KEY or --api_key_file FILE as well")
    max_queued = args.max_queued_bytes or 16 * args.max_request_bytes
    if max_queued < args.max_request_bytes:
        raise UserError(f"--max_queued_bytes {max_queued} is less than --max_request_bytes {args.max_request_bytes}")
    hosts = (*LOCAL_HOSTS, args.host, *args.allowed_hosts)
    return ServerLimits(
        max_num_seqs=args.seats,
        max_queue=args.queue,
        api_keys=keys,
        allowed_hosts=hosts if args.allowed_hosts or not keys else None,
        cors=tuple(args.cors),
        strict_model_names=args.strict_model_names,
        max_request_bytes=args.max_request_bytes,
        max_queued_bytes=max_queued,
        max_connections=args.max_connections,
        client_timeout=args.client_timeout,
    )


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket. It is bound before the models are loaded, so an occupied port fails at once."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"cannot listen on {host} port {port} ({error.strerror}): choose another --port") from None


def main() -> None:
    args = make_parser().parse_args()
    limits = make_limits(args)
    try:
        from serving.app import make_app
        from serving.connections import make_server
    except ImportError as error:
        if error.name not in ("uvicorn", "fastapi", "starlette", "pydantic"):
            raise
        raise UserError(f"{error.name} is not installed: pip install {PACKAGES}") from None
    from common.device import autocast, pick_device, pick_dtype
    from model.rope import rope_summary
    from model.sampling_presets import format_settings
    from serving.models import last_stage_checkpoint, open_models

    with open_socket(args.host, args.port) as server_socket:
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        checkpoints = args.checkpoint or [last_stage_checkpoint(args.out_dir)]
        models = open_models(checkpoints, args.max_context, device, args.sampling_preset, parse_rope_flags(args))
        for served in models.values():
            size = served.model.count_parameters()[0] / 1e6
            summary = f"{served.stage}, {size:.1f} M parameters, {served.max_model_len} tokens of context"
            rope = f", RoPE {scaled}" if (scaled := rope_summary(served.model.config)) else ""
            print(f"{served.name}: {summary}{rope}, {device}, {str(dtype).removeprefix('torch.')}", flush=True)
            if served.preset:
                print(f"    default sampling of chats: {format_settings(served.preset)}", flush=True)
            if served.preset.get("num_beams", 1) > args.seats:
                problem = f"--seats {args.seats} is less than the num_beams of {served.name}'s sampling preset"
                raise UserError(f"{problem}: set --seats {served.preset['num_beams']} or --sampling_preset none")
        app = make_app(models, limits, lambda: autocast(device, dtype))
        host = f"[{args.host}]" if ":" in args.host else args.host
        print(f"listening on http://{host}:{server_socket.getsockname()[1]}/v1 (Ctrl-C stops it)", flush=True)
        gc.collect()
        gc.freeze()  # later collections skip the modules and models
        make_server(app, limits).run(sockets=[server_socket])


if __name__ == "__main__":
    with fail_in_one_line():
        main()
