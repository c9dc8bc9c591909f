"""The crisis gate: what happens before an answer, and the check of every answer (docs/safety-gate.md)."""
