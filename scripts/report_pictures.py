"""Make the pictures of the HTML report that the documents show: SmolLM2 by the recipe mixed, in Chromium.

    python scripts/report_pictures.py [MODEL_DIR]

Writes docs/report-light.png and docs/report-dark.png. Needs the extra dev and a Chromium (scripts/browser).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PICTURES = (("light", "header", "#maps"), ("dark", "#rotation", "#tensors tbody tr:nth-child(7)"))
"""Colour scheme, and the first and last element that is in the picture."""


def main() -> None:
    """Convert, write the page, take the pictures."""
    scripts = Path(sys.executable).parent
    model = sys.argv[1] if len(sys.argv) > 1 else _output(sys.executable, str(ROOT / "scripts" / "smollm2.py"))
    chromium = _output(str(ROOT / "scripts" / "browser"))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        file, page = f"{folder}/SmolLM2-135M-mixed.hlwq", f"{folder}/page.html"
        _output(str(scripts / "hlwq-convert"), model, file, "--recipe", "mixed", "--quiet")
        _output(str(scripts / "hlwq-inspect"), file, "--against", model, "--html", page, "--quiet")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scheme, first, last in PICTURES:
            tab = browser.new_page(viewport={"width": 1040, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            tab.goto(Path(page).as_uri())
            top, bottom = tab.locator(first).bounding_box(), tab.locator(last).bounding_box()
            assert top is not None and bottom is not None
            start, end = max(0, top["y"] - 12), bottom["y"] + bottom["height"] + 12
            clip = {"x": 0, "y": start, "width": 1040, "height": end - start}
            tab.screenshot(path=ROOT / "docs" / f"report-{scheme}.png", full_page=True, clip=clip)  # type: ignore[arg-type]
        browser.close()


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
