"""What to do before doing it: memory, lengths, order."""
