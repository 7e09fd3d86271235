"""Shows runs: tables in a terminal, a JSON file that can be read back, and a page that stands alone."""
