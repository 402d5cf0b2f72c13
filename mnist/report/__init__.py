"""The pages that explain a study and its models."""
