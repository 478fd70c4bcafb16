"""Chat page in the browser for one model or two side by side, in Chinese and English.

    python web_demo.py                                 the models in out/; prints the address to open
    python web_demo.py --out_dir elsewhere --port 8600
    python web_demo.py --checkpoint out/dpo_512.pth ../Qwen3-0.6B       these instead: .pth files, transformers folders

Needs: pip install "streamlit>=1.51,<2". Runs from any folder, sends no requests to other servers, and listens on this
machine only unless --host is set. The page has no password. Reads out/, writes no files.
Read next: serving/page.py (the page), serving/conversation.py (streaming replies), model/generate.py.
"""

import argparse
import importlib.util
import socket
import sys
from pathlib import Path

from common import cli, flag_types
from common.errors import UserError, fail_in_one_line
from model.rope_flags import add_rope_flags, parse_rope_flags

HERE = Path(__file__).resolve().parent
STREAMLIT_SETTINGS = {
    "server.headless": "true",  # opens no browser and does not ask for an e-mail address
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "theme.light.primaryColor": "#4b7f5b",
    "theme.light.sidebar.backgroundColor": "#f6f7f3",
    "theme.dark.primaryColor": "#7fb58e",
}


def make_parser() -> argparse.ArgumentParser:
    parser = cli.FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("models").add_argument
    add(
        "--out_dir",
        type=flag_types.path_string,
        help="folder of the models (default: out, here or in the project's folder)",
    )
    add(
        "--checkpoint",
        nargs="+",
        type=flag_types.path_string,
        default=[],
        metavar="FILE",
        help=".pth files or transformers folders to use instead",
    )
    add_rope_flags(parser)
    add = parser.add_argument_group("page").add_argument
    add(
        "--host",
        type=flag_types.non_empty_text,
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 accepts other machines (default: 127.0.0.1)",
    )
    add("--port", type=flag_types.int_between(1, 65535), default=8501, help="default: 8501")
    add("--lang", choices=("auto", "zh", "en"), default="auto", help="initial language (auto: the browser's)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", type=flag_types.device_name, default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add(
        "--dtype",
        choices=flag_types.DTYPE_NAMES,
        default="auto",
        help="auto, float32, bfloat16, float16 (default: auto)",
    )
    return parser


def find_out_dir(args: argparse.Namespace) -> Path:
    """--out_dir, else out/ in the working directory, else out/ beside this script."""
    return Path(args.out_dir) if args.out_dir else next((p for p in (Path("out"),) if p.is_dir()), HERE / "out")


def launch_streamlit(args: argparse.Namespace) -> None:
    """Check the flags and the port, then run this file in streamlit."""
    if importlib.util.find_spec("streamlit") is None:
        raise UserError('the chat page needs streamlit: pip install "streamlit>=1.51,<2"')
    parse_rope_flags(args)
    for path in args.checkpoint:
        if not Path(path).exists():
            raise UserError(f"--checkpoint {path}: no such file or folder")
    with socket.socket(socket.AF_INET6 if ":" in args.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((args.host, args.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot listen on {args.host}:{args.port} ({reason}): try another --port or --host"
            ) from None
    from common.device import pick_device, pick_dtype

    device = pick_device(args.device)
    source = ", ".join(args.checkpoint) or f"models in {find_out_dir(args)}"
    print(f"{source}, {device}, {pick_dtype(args.dtype, device)}; Ctrl-C stops the page", flush=True)
    from streamlit.web import cli as streamlit_cli

    settings = {**STREAMLIT_SETTINGS, "server.address": args.host, "server.port": args.port}
    streamlit_cli.main(
        ["run", __file__, *(f"--{name}={value}" for name, value in settings.items()), "--", *sys.argv[1:]]
    )


def run_page(args: argparse.Namespace) -> None:
    """Draw the page once, inside streamlit."""
    from common.device import pick_device, pick_dtype
    from serving.page import PageOptions, draw_page

    device = pick_device(args.device)
    files = tuple(Path(path) for path in args.checkpoint)
    draw_page(
        PageOptions(
            find_out_dir(args), files, device, pick_dtype(args.dtype, device), args.lang, parse_rope_flags(args)
        )
    )


def main() -> None:
    args = make_parser().parse_args()
    streamlit = sys.modules.get("streamlit")  # not imported, so --help stays fast
    if streamlit and streamlit.runtime.exists():
        run_page(args)
    else:
        launch_streamlit(args)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
