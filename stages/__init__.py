"""What one step does: a room a subject. `catalog` says which stages there are, the other rooms do their work."""
