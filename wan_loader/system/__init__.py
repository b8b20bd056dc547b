"""The operating system: files, the page cache, reads in the background, threads, what the machine has."""
