"""Looks at the built site in a real browser, at a desktop's and at a phone's width.

Run by `make docs-look` after `make docs`; needs chromium. Pictures go to site-pictures/. Fails for
a page that is wider than its window, or empty.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

ROOT = Path(__file__).parents[1]
PAGES = ("", "quantized/", "api/models/", "notebooks/quickstart/")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
# A frame, because a browser's own window has a least width.
_FRAME = """<!doctype html>
<style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe src="/{page}" width="{width}" height="{height}" onload="
  const page = this.contentDocument.documentElement;
  document.title = 'LOOKED ' + JSON.stringify(
    {{wide: page.scrollWidth, tall: page.scrollHeight, words: page.innerText.length}});
"></iframe>"""


class _Site(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if asked.path != "/__look":
            return super().do_GET()
        fields = {name: values[0] for name, values in parse_qs(asked.query, True).items()}
        body = _FRAME.format(**fields).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return None

    def log_message(self, *_: object) -> None:
        """Quiet."""


def _look(browser: str, port: int, page: str, kind: str, folder: Path) -> str | None:
    """Take a picture; what is wrong with the page, if anything."""
    width, height = SIZES[kind]
    url = f"http://127.0.0.1:{port}/__look?page={page}&width={width}&height={height}"
    picture = folder / f"{(page or 'front').strip('/').replace('/', '-')}-{kind}.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--window-size={max(width, 500)},{height}", "--virtual-time-budget=5000"]
    shot = [*command, f"--screenshot={picture}", url]
    subprocess.run(shot, check=True, capture_output=True, timeout=120)
    text = subprocess.run(
        [*command, "--dump-dom", url], check=True, capture_output=True, timeout=120, text=True
    ).stdout
    looked = re.search(r"<title>LOOKED (\{.*?\})</title>", text)
    if looked is None:
        return f"{page or 'front page'} ({kind}) did not load"
    found = json.loads(looked[1])
    if found["wide"] > width:
        return f"{page or 'front page'} ({kind}) is {found['wide']} pixels wide, of {width}"
    if found["words"] < 500 or picture.stat().st_size < 10_000:
        return f"{page or 'front page'} ({kind}) is nearly empty: {found}"
    return None


def main() -> int:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        print("No chromium: install it (Debian: apt install chromium).", file=sys.stderr)
        return 2
    folder = ROOT / "site-pictures"
    folder.mkdir(exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Site, directory=str(ROOT / "site")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    looks = [_look(browser, server.server_address[1], p, k, folder) for p in PAGES for k in SIZES]
    server.shutdown()
    wrong = [look for look in looks if look is not None]
    print("\n".join(wrong) or f"{len(looks)} pages looked at: {folder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
