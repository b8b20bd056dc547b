"""One process of a `wan-loader` command; RANK in the words stands for its number."""

import os
import sys

from wan_loader.cli import main

if __name__ == "__main__":
    sys.argv = ["wan-loader", *(word.replace("RANK", os.environ["RANK"]) for word in sys.argv[1:])]
    main()
