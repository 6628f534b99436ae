"""Where jobs come from besides a file of JSON lines, and where answers go besides the run directory."""
