#!/usr/bin/env python3
"""Write the golden files anew, from what the commands answer now: `python tests/golden/regenerate.py [NAME...]`.

For a change of the contract that is wanted; what changed is then in the diff of the commit. Files in `written_by_0_1_0`
are never written again.
"""

import json
import sys
import tempfile
from pathlib import Path

from golden_cases import CAPTURES, HERE

if __name__ == "__main__":
    for name in sys.argv[1:] or CAPTURES:
        with tempfile.TemporaryDirectory(prefix="golden-") as place:
            found = CAPTURES[name](Path(place))
        (HERE / f"{name}.json").write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        print(HERE / f"{name}.json")
