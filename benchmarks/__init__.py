"""Every benchmark and soak: run them from a checkout (see README.md). The last line of each is one JSON object."""
