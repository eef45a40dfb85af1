"""Pages clicked through in headless Chromium: a script acts as a reader would, and tells what it found."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on the PATH")

TOOLS = """
const found = {};
const send = (target, event) => { target.dispatchEvent(event); return event; };
const key = (name, target) => send(target, new KeyboardEvent("keydown", { key: name, bubbles: true }));
const middle = (id) => {
  const [x, y, w, h] = outline(id), point = svg.createSVGPoint();
  [point.x, point.y] = [x + w / 2, y + h / 2];
  return point.matrixTransform(view.getScreenCTM());
};
const at = (id, kind, more = {}) => {
  const p = middle(id), target = document.elementFromPoint(p.x, p.y);
  const kinds = { click: MouseEvent, pointermove: PointerEvent };
  return send(target, new kinds[kind](kind, { clientX: p.x, clientY: p.y, bubbles: true, view: window, ...more }));
};
const set = (id, value, kind = "change") => { $(id).value = value; send($(id), new Event(kind, { bubbles: true })); };
const type = (id, value) => set(id, value, "input");
const text = (id) => $(id).textContent;
const visible = () => [...layers.edges.children].filter((line) => line.style.display !== "none").length;
"""


def act(page: str, script: str, folder: Path, seconds: int = 60) -> dict[str, Any]:
    """What the script writes into `found` after it has acted on the page, opened from a file and without a network."""
    guarded = f"try {{ {script} }} catch (error) {{ found.error = String(error.stack || error); }}"
    told = '$("findings").textContent = JSON.stringify(found);'
    tail = f'<pre id="findings"></pre><script>{TOOLS}{guarded}\n{told}</script>'
    before, _, after = page.rpartition("</body>")
    path = folder / "page.html"
    path.write_text(f"{before}{tail}</body>{after}", encoding="utf-8")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1400,800",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ]
    command = [str(BROWSER), *flags, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, timeout=seconds, check=True).stdout.decode()
    findings = re.search(r'<pre id="findings">(.*?)</pre>', dom, re.S)
    assert findings is not None, dom[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(findings[1]))
    assert "error" not in found, found["error"]
    return found
