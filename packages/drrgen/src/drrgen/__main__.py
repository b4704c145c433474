"""`python -m drrgen`."""

from drrgen.cli import main

main()
