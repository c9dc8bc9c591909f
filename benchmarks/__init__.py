"""Every benchmark and soak: run from a checkout, each ends in one line of JSON."""
