"""What happened: records, tables, progress, the page."""
