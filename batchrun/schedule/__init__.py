"""What to do next: sequences that advance by tokens, pages that hold their KV, steps that say so."""
