"""``python -m polyprag``."""

from polyprag.cli import main

main()
