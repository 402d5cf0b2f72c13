"""Search, train and keep classifiers of small images; imports nothing from serve/."""
