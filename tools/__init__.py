"""Tools for the developers of deskside. Nothing here is needed to run a model."""
