"""A tape made ready to run: sections, steps, buffers, panels, bytes. Pure: runs nothing."""
