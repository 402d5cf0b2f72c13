"""One command, from its options to the saved model."""
