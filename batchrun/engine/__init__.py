"""torch begins here: the model, its KV, attention over shared prefixes, sampling."""
