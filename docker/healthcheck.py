"""Is this container's Ray node alive? Says why in one line; exit code 0 or 1.

It asks the two addresses that answer without the token. Whether it is the head's container or another's it knows from
the command of process 1; a container that runs something else than a node has nothing to ask, and is well.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path

HEAD = "http://127.0.0.1:8265/api/gcs_healthz"
OTHER = "http://127.0.0.1:{port}/api/local_raylet_healthz"
# Ray's folders: that of memmeta node, and that of ray start.
FOLDERS = Path("/tmp")
PORT = 52365
SECONDS = 4.0


def address(command: list[str]) -> str | None:
    """What to ask in the container of this command; ``None``: nothing."""
    if "node" not in command:
        return None
    return HEAD if "--head" in command else OTHER.format(port=_port())


def _port() -> int:
    """Where the node's agent listens: a node that joins may let it choose, and Ray writes down what it chose."""
    name = "session_2*/dashboard_agent_listen_port_*"
    found = [*FOLDERS.glob(f"mn-*/r/{name}"), *FOLDERS.glob(f"ray/{name}")]
    files = sorted(found, key=lambda file: file.stat().st_mtime)
    text = files[-1].read_text(encoding="utf-8").strip() if files else ""
    return int(text) if text.isdecimal() else PORT


def ask(url: str) -> tuple[bool, str]:
    """Whether the node is well, and why that is so."""
    # Without a proxy: the node is in this container, whatever http_proxy says.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=SECONDS) as answer:
            body = answer.read(200).decode("utf-8", "replace").strip()
    except urllib.error.HTTPError as error:
        return False, f"{url} answers {error.code}"
    except OSError as error:
        return False, f"{url} does not answer: {getattr(error, 'reason', error)}"
    return "success" in body, f"{url} answers {body!r}"


def main(process: Path = Path("/proc/1/cmdline")) -> int:
    """Asks, prints one line, returns the exit code."""
    url = address(process.read_text(encoding="utf-8", errors="replace").split("\0"))
    well, why = (True, "no node runs here") if url is None else ask(url)
    print(f"{'well' if well else 'unwell'}: {' '.join(why.split())}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
