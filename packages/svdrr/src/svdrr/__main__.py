"""`python -m svdrr` is `svdrr`."""

from svdrr.cli import main

main()
