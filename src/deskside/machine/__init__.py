"""What this computer has, what limits it, what it does meanwhile; descriptions of machines."""
