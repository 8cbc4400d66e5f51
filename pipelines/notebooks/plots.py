"""DVC's plots as a page for JupyterLab: made anew at each visit, and readable without a network.

    python -m pipelines.notebooks.plots 8900      http://127.0.0.1:8900

`dvc plots show` draws with Vega, which it would load from the network; here the page carries it (vl-convert).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipelines.repository import root

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Plots</title>
<script>{vega}</script>
<style>body {{font: 15px system-ui, sans-serif; margin: 2rem; display: flex; flex-wrap: wrap; gap: 2rem}}</style>
</head>
<body>{{plot_divs}}</body>
</html>"""


WAIT = '<!DOCTYPE html><meta http-equiv="refresh" content="0; url=page"><p>DVC is drawing …</p>'


@cache
def template() -> str:
    """What `dvc plots show --html-template` fills."""
    import vl_convert

    return PAGE.format(vega=vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed"))


def page() -> str:
    """The plots of dvc.yaml as HTML; the sentence of DVC where it cannot draw them."""
    with tempfile.TemporaryDirectory() as folder:
        form = Path(folder) / "form.html"
        form.write_text(template(), encoding="utf-8")
        command = [sys.executable, "-m", "dvc", "plots", "show", "--out", folder, "--html-template", str(form)]
        done = subprocess.run(command, cwd=root(), capture_output=True, text=True, check=False)
        made = Path(folder) / "index.html"
        return made.read_text(encoding="utf-8") if made.exists() else f"<pre>{done.stdout}{done.stderr}</pre>"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # noqa: N802  the name is http.server's
        content = (page() if self.path.partition("?")[0].endswith("/page") else WAIT).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(BrokenPipeError):  # the visitor left
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """JupyterLab's terminal has enough to say."""


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
