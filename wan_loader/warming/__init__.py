"""Files into and out of the page cache, by their paths."""
