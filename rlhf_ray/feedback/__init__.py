"""What people said about answers: its shape, its store, and the files it is imported from."""
