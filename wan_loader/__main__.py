"""`python -m wan_loader` is `wan-loader`."""

from wan_loader.cli import main

main()
