"""Chat page in the browser for one model or two side by side, in Chinese and English.

    python web_demo.py                                 the models in out/; prints the address to open
    python web_demo.py --out_dir elsewhere --port 8600
    python web_demo.py --checkpoint out/dpo_512.pth ../Qwen3-0.6B       these instead: .pth files, transformers folders
    python web_demo.py --history_dir none              save no conversations

Needs: pip install "streamlit>=1.51,<2". Runs from any folder, sends no requests to other servers, and listens on this
machine only unless --host is set. The page has no password. Reads out/; writes saved conversations only, by default in
~/.local/share/mengya/chats. Everybody who can open the page can read them, so where --host lets other machines open it,
nothing is saved unless --history_dir names a folder.
Read next: serving/page.py (the page), serving/conversation.py (streaming replies), serving/history.py (saved ones).
"""

import socket
import sys
from pathlib import Path

from common import cli
from common.device import pick_device, pick_dtype
from common.errors import UserError, fail_in_one_line
from common.packages import require_packages
from evaluation.tools import find_tools
from serving.config import PageConfig

STREAMLIT_SETTINGS = {
    "server.headless": "true",  # opens no browser and does not ask for an e-mail address
    "server.fileWatcherType": "none",
    "browser.gatherUsageStats": "false",
    "client.toolbarMode": "minimal",
    "theme.light.primaryColor": "#4b7f5b",
    "theme.light.sidebar.backgroundColor": "#f6f7f3",
    "theme.dark.primaryColor": "#7fb58e",
}


def check_files_and_port(config: PageConfig) -> None:
    """Raises UserError for a missing or invalid file and for a port that cannot be opened."""
    for path in config.checkpoint:
        if not Path(path).exists():
            raise UserError(f"--checkpoint {path}: no such file or folder")
    if config.lookup_file:
        find_tools("lookup", config.lookup_file)
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            address = f"{config.host}:{config.port}"
            raise UserError(f"cannot listen on {address} ({reason}): try another --port or --host") from None


def launch_streamlit(config: PageConfig) -> None:
    """Run this file in streamlit, with the same flags."""
    require_packages("the chat page", "streamlit")
    check_files_and_port(config)
    from streamlit.web import cli as streamlit_cli

    device = pick_device(config.device)
    source = ", ".join(config.checkpoint) or f"models in {config.models_dir}"
    print(f"{source}, {device}, {pick_dtype(config.dtype, device)}; Ctrl-C stops the page", flush=True)
    print(f"conversations are {f'saved in {folder}' if (folder := config.history_folder) else 'not saved'}", flush=True)
    settings = {**STREAMLIT_SETTINGS, "server.address": config.host, "server.port": config.port}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    streamlit_cli.main(["run", __file__, *flags, "--", *sys.argv[1:]])


def main() -> None:
    config = cli.parse(PageConfig, __doc__)
    streamlit = sys.modules.get("streamlit")  # not imported, so --help stays fast
    if streamlit and streamlit.runtime.exists():  # streamlit runs this file again to draw the page
        from serving.page import draw_page

        draw_page(config)
    else:
        launch_streamlit(config)


if __name__ == "__main__":
    with fail_in_one_line():
        main()
