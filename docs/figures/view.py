"""Takes the picture of docs/how-to/view.md in headless Chromium: `view.py CT_DIR OUT_DIR`, CT_DIR with LIDC-IDRI-0001.

Needs `chromium` on the path; renders the 5deg sphere first, which takes minutes on two cores.
"""

import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from drrgen import view
from drrgen.config import RenderConfig
from drrgen.run import render_folder
from drrgen.shards import Shard

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.drrgen.browser import Page

# More than the page's own time from a click to what it shows.
SECONDS = 1.0


def main(ct_dir: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        render_folder(ct_dir, folder / "shards", RenderConfig(grid="5deg"), on_defect="reject", overwrite=False)
        (path,) = (folder / "shards").glob("*.h5")
        with Shard(path) as shard:
            print(view.html(shard, folder / "page.html", 24))
        shots = [folder / "desktop.png", folder / "phone.png"]
        with Page(folder / "page.html", folder / "profile", 1180, 800) as page:
            page.drag(-130, 40)
            time.sleep(SECONDS)
            page.screenshot(shots[0])
        with Page(folder / "page.html", folder / "phone-profile", 390, 800, phone=True) as page:
            page.swipe(-195, 0)
            page.click("invert")
            page.click("show-marks")
            time.sleep(SECONDS)
            page.screenshot(shots[1])
        desktop, phone = (Image.open(shot).convert("RGB") for shot in shots)
        phone = phone.resize((390, 800), Image.Resampling.LANCZOS)
        both = Image.new("RGB", (desktop.width + 24 + phone.width, 800), "white")
        both.paste(desktop, (0, 0))
        both.paste(phone, (desktop.width + 24, 0))
        both.save(out / "view.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
