"""The page in a browser, at the widths of phones and of screens: nothing sticks out."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import report_folders

from hf_compress import write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--allow-file-access-from-files",
)
"""The last lets a page measure another one in a frame, which may be narrower than any window."""

FRAME = """<iframe id="page" src="file://{page}" style="border:0;width:{width}px;height:800px"></iframe><script>
page.onload = () => {{
  const window = page.contentWindow, root = page.contentDocument.documentElement;
  const chart = page.contentDocument.querySelector("svg[data-lines]");
  if (chart) {{
    const box = chart.getBoundingClientRect(), at = {{ clientX: box.left + box.width / 2, clientY: box.top + 9 }};
    chart.dispatchEvent(new window.PointerEvent("pointermove", at));
  }}
  const readout = chart ? chart.parentNode.querySelector(".readout").textContent : "";
  document.title = [root.scrollWidth, window.innerWidth, readout].join("|");
}};
</script>"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]


def measured(page: Path, width: int, tmp_path: Path) -> tuple[int, int, str]:
    """Width of the contents, width of the view, and what a chart says under the pointer."""
    frame = tmp_path / f"frame-{width}.html"
    frame.write_text(FRAME.format(page=page, width=width), encoding="utf-8")
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{frame}"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    content, view, readout = re.search(r"<title>(\d+)\|(\d+)\|(.*?)</title>", out, flags=re.DOTALL).groups()
    return int(content), int(view), readout


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_page_scrolls_sideways(tmp_path, width: int) -> None:
    long = "x" * 300
    hard = report_folders.comparison(
        {"dense": 3_000_000, "compressed": 2_000_000, long: 1_900_000},
        notes=(long,),
        environment={long: long, "cpu": long},
    )
    runs = tmp_path / "runs"
    pages = [
        write_report(report_folders.write_run(runs / "plain")),
        write_report(report_folders.write_run(runs / long[:200], hard, {"model": long})),
        write_report(runs),
    ]
    for page in pages:
        content, view, _ = measured(page, width, tmp_path)
        assert view == width
        assert content <= view, page


def test_charts_say_what_is_under_the_pointer(tmp_path) -> None:
    page = write_report(report_folders.write_run(tmp_path / "run"))
    *_, readout = measured(page, 390, tmp_path)
    assert readout == "step 4: loss 0.523, eval_loss 0.6"
