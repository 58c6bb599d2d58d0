"""Reading a file into torch: the only folder that imports torch."""
