"""Puts the demo's report between the README's markers: `python docs/figures/readme.py demo/report.md README.md`."""

import re
import sys
from pathlib import Path

report, readme = Path(sys.argv[1]), Path(sys.argv[2])
text = readme.read_text()
between = re.compile(r"(<!-- demo: begin -->\n).*(<!-- demo: end -->)", re.DOTALL)
assert between.search(text), f"{readme} has no demo markers"
readme.write_text(between.sub(lambda found: f"{found[1]}{report.read_text()}{found[2]}", text))
