"""The sections of scripts/gpu_check, a module each: `run(setting)` yields what goes into the JSON, again whenever
there is more of it.

Of a section's result `sections` and `table` know: `passed`; `error`, why it did not; `cases` and `of`, how many were
run of how many; `note`, a line; `rows`, a table. All else is for the reader of the JSON.
"""
