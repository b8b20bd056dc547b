"""The commands of `wan-pipeline`, and those that join `wan-loader`."""
