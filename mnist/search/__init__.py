"""The search: a study, its trials and the processes that carry them out."""
