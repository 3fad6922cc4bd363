"""What a record says, and how it is shown."""
