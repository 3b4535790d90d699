"""How long a test waits for what should come at once.

No test says how fast anything is, for the machine may be busy with something else; this only ends what hangs.
"""

PATIENCE_SECONDS = 600.0
