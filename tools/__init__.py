"""Tools of the project's makers; nothing here is needed to run a model."""
