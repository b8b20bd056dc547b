"""The entry of `python -m wan_loader`, which is `wan-loader`."""

from wan_loader.cli import main

main()
