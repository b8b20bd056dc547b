"""`python -m wan_pipeline` is `wan-pipeline`."""

from wan_pipeline.cli import main

main()
