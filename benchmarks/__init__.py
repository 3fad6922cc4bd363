"""What deskside is measured with; nothing here is needed to run a model."""
