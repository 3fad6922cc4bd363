"""Prepares a tape to run: sections, steps, buffers, panels, bytes. Nothing here runs it."""
