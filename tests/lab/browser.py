"""A page in a real browser: how wide it becomes at a width of the window, and what it looks like.

python -m tests.lab.browser PAGE.html [PICTURE.png] prints the widths at 390 and 1280 pixels.
"""

import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (390, 1280)
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)


def run_browser(page: str, *options: str) -> str:
    """The page's document after its scripts have run."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "frame.html"
        path.write_text(page, encoding="utf-8")
        switches = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--hide-scrollbars"]
        command = [CHROMIUM, *switches, f"--user-data-dir={directory}/profile", *options, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def frame(page: Path, width: int, height: int) -> str:
    """The page in a frame of this width: a browser's own window has a least width."""
    # with its own place, where its style sheets are
    text = page.read_text("utf-8").replace("<head>", f'<head><base href="{page.as_uri()}">', 1)
    text = html.escape(text, quote=True)
    return (
        f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:{height}px" srcdoc="{text}"></iframe>'
    )


def needed_width(page: Path, width: int) -> int:
    """How wide the page is laid out in a window of this width: more than that, and a reader must scroll sideways."""
    script = """<script>onload = () => { document.title = 'width ' +
        document.querySelector('iframe').contentDocument.documentElement.scrollWidth }</script>"""
    found = re.search(r"<title>width (\d+)</title>", run_browser(frame(page, width, 900) + script, "--dump-dom"))
    assert found, f"{CHROMIUM} did not lay {page} out"
    return int(found[1])


def picture(page: Path, width: int, path: Path, height: int = 3000) -> None:
    run_browser(frame(page, width, height), f"--screenshot={path}", f"--window-size={max(width, 500)},{height}")


if __name__ == "__main__":
    report = Path(sys.argv[1])
    for wide in WIDTHS:
        print(f"{report}: {needed_width(report, wide)} at {wide}")
        for name in sys.argv[2:]:
            picture(report, wide, Path(f"{name}-{wide}.png"))
