"""Engines: the verbs of a training step on sharded weights. Know nothing of SAP."""
